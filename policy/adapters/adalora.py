"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) on PEFT's AdaLoraModel: each update is
alpha / initial_rank P diag(E) Q, whose singular values are given up where they matter least, until
adapter.rank of each matrix are left in the mean (policy/adapters/budget.py).

PEFT's model adds the penalty for bases that are not orthogonal to the loss that a transformers
model returns, which no trainer here uses, and which fails under ZeRO-3. `Model` leaves it out, and
`Budget.penalty` is added by the trainers themselves. PEFT's rank pattern stays empty: weights keep
their initial shape, with zeros, so that checkpoints and the saved adapter load as they are.
"""

import logging
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import LoraModel

from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, Tuner
from policy.adapters.budget import Budget, Triplets
from policy.adapters.guards import put_on
from policy.adapters.targets import (
    adapted_linears,
    check_targets,
    check_whole,
    modules_to_save,
    peft_targets,
    whole_count,
)
from policy.model import Gather
from policy.saving import adapter_weights
from rlhf.types import AdapterWeights

LOG = logging.getLogger("rlhf.policy")
_EPS = 1e-5  # PEFT divides by the rank and this


class Model(AdaLoraModel):
    """PEFT's, without the penalty in its forward pass, and with room for the second adapter that
    TRL adds for a moment.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)

    def _check_new_adapter_config(self, config: Any) -> None:
        LoraModel._check_new_adapter_config(self, config)


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with fresh updates, which are 0: P and Q are random, E is 0. Raises UserError."""
    options = adapter.adalora
    config = AdaLoraConfig(
        task_type=fresh.task,
        init_r=options.initial_rank,
        target_r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        beta1=options.beta1,
        beta2=options.beta2,
        deltaT=options.every,
        orth_reg_weight=options.orthogonality,
        total_step=1,  # known once the rows are; `Budget.begin`
        target_modules=peft_targets(model, adapter),
        modules_to_save=modules_to_save(model, adapter, fresh.task),
    )
    adapted = put_on(model, adapter, config, SVDLinear)
    adapted.tending = Budget(triplets_of(adapted), adapter.rank, options)
    adapted.found = lambda: found(adapted.tending)
    return adapted


def triplets_of(adapted: Any, name: str = "default") -> dict[str, Triplets]:
    """The update of each adapted layer, by the layer's name in transformers' model."""
    triplets = {}
    for full, module in adapted.get_base_model().named_modules():
        if isinstance(module, SVDLinear):
            triplets[full] = Triplets(module.lora_A[name], module.lora_E[name], module.lora_B[name])
    return triplets


def found(budget: Budget) -> dict[str, Any]:
    """The ranks at the end, for summary.json and the plots."""
    ranks = budget.ranks()
    used = sum(ranks.values())
    if not budget.kept:
        LOG.warning(
            "adapter=adalora: training ended before the ranks fell to their budget: %d singular "
            "values are left, not %d. Some of the planned steps were not taken.",
            used,
            budget.target,
        )
    return {"method": "adalora", "budget": budget.target, "used": used, "rank": ranks}


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """What `attach` refuses before weights load. Raises UserError."""
    check_targets(model, adapter.targets, trains_head=trains_head)
    check_whole(model, adapter)


def expected(model: Any, adapter: AdapterConfig) -> int:
    """initial_rank (in + out + 1) for each layer adapted, and the modules that adapter.save_whole
    names.
    """
    count = 0
    for inputs, outputs in adapted_linears(model, adapter).values():
        count += adapter.adalora.initial_rank * (inputs + outputs + 1)
    return count + whole_count(model, adapter)


def lora_rank(model: Any, adapter: AdapterConfig) -> tuple[int, str]:
    """The rank of `as_lora`, and what gives it."""
    rank = adapter.adalora.initial_rank
    return rank, f"adapter.adalora.initial_rank={rank}"


def as_lora(model: Any, gather: Gather) -> AdapterWeights:
    """The plain LoRA with the same update: A = alpha / initial_rank diag(E) Q, B = P, unscaled."""
    own = adapter_weights(model, gather)
    config: dict[str, Any] = dict(own.config)
    rank = int(config["init_r"])
    scale = float(config["lora_alpha"]) / (torch.tensor(float(rank)) + _EPS)
    tensors = {}
    for name, tensor in own.tensors.items():
        if name.endswith(".lora_A"):
            values = own.tensors[name.removesuffix("A") + "E"]
            tensors[f"{name}.weight"] = tensor * values * scale.to(tensor.device)
        elif name.endswith(".lora_B"):
            tensors[f"{name}.weight"] = tensor
        elif not name.endswith(".lora_E"):
            tensors[name] = tensor
    return AdapterWeights(tensors, _lora_config(config, rank))


def _lora_config(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """PEFT's configuration of a LoRA of `rank` whose scale is 1, from that of AdaLoRA."""
    from peft import LoraConfig

    kept = ("task_type", "target_modules", "modules_to_save", "base_model_name_or_path")
    made = LoraConfig(r=rank, lora_alpha=rank, **{name: config[name] for name in kept})
    plain = made.to_dict()
    plain["peft_type"], plain["target_modules"] = "LORA", config["target_modules"]
    plain["inference_mode"] = config["inference_mode"]
    return {name: getattr(value, "value", value) for name, value in plain.items()}


METHOD = Method(
    attach=attach,
    expected=expected,
    check=check,
    tuner=Tuner("ADALORA", AdaLoraConfig, Model),
    as_lora=as_lora,
    lora_rank=lora_rank,
)
