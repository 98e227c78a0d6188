"""Mixtures of low-rank experts with a soft router in each linear layer (MoLoRA, Zadouri et al.
2023, arXiv:2309.05444): y + alpha / r sum_e softmax(R x)_e B_e A_e x (rlhf/models/inserted.py).

The shares depend on the input, so no weights can hold the update.
"""

from typing import Any

from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, Tuner
from policy.adapters.guards import put_on
from policy.adapters.inserted import MoLoraLayer, MoLoraModel, MoLoraPeftConfig
from policy.adapters.lora import ALL_LINEAR, adapted_linears, check_targets, heads_of
from rlhf.models.inserted import MOLORA


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with experts beside its linear layers; only they and their routers train."""
    targets: Any = list(adapter.targets)
    if targets == ALL_LINEAR:
        targets = "all-linear"
    config = MoLoraPeftConfig(
        task_type=fresh.task,
        target_modules=targets,
        modules_to_save=[*(heads_of(fresh.task) or ()), *adapter.save_whole] or None,
        dropout=adapter.dropout,
        r=adapter.rank,
        alpha=adapter.alpha,
        experts=adapter.molora.experts,
    )
    return put_on(model, adapter, config, MoLoraLayer)


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """adapter.targets names linear layers of the model. Raises UserError."""
    check_targets(model, adapter.targets, trains_head=trains_head)


def places(model: Any, adapter: AdapterConfig) -> list[str]:
    """Paths of the linear layers that get experts."""
    return list(adapted_linears(model, adapter))


def expected(model: Any, adapter: AdapterConfig) -> int:
    """E (r (in + out) + in) for each layer adapted."""
    count = 0
    for width_in, width_out in adapted_linears(model, adapter).values():
        low_rank = adapter.rank * (width_in + width_out)
        count += adapter.molora.experts * (low_rank + width_in)
    return count


METHOD = Method(
    attach=attach,
    expected=expected,
    check=check,
    places=places,
    tuner=Tuner(MOLORA, MoLoraPeftConfig, MoLoraModel),
)
