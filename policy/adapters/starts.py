"""Starts of low-rank adapters that take a part out of the base and train it: PiSSA (Meng et al.
2024, arXiv:2404.02948) its largest singular values, OLoRA (Büyükakyüz 2024, arXiv:2406.01775) the
first columns of its QR decomposition, CorDA (Yang et al. 2024, arXiv:2406.05223) the directions
that matter most on rows of the task.

A layer's weight W becomes W - s B0 A0, and the adapter starts at A0, B0 with the scale s: the layer
starts as W. On the base that it came from such an adapter means something else. What it learned is
an update of W all the same, s (B A - B0 A0): a LoRA of twice the rank (`as_plain`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.types import AdapterWeights

# A matrix whose shorter side is longer gets its first singular vectors by a random projection and
# as many power iterations (Halko et al. 2011): exact ones of 4096 x 4096 take most of a minute.
_LARGEST_EXACT = 2048
_ITERATIONS = 16

Pair = tuple[Tensor, Tensor]  # A0 [rank, in] and B0 [out, rank], on the CPU


def peft_name(name: str, model: Any, targets: Sequence[str]) -> str:
    """PEFT's name of a start; of PiSSA's the one that is fast enough for the layers `targets`."""
    if name != "pissa":
        return name
    sides = [min(model.get_submodule(target).weight.shape) for target in targets]
    if max(sides) <= _LARGEST_EXACT:
        return name
    return f"pissa_niter_{_ITERATIONS}"


def prepare_corda(model: Any, config: Any, rows: Sequence[Sequence[int]]) -> None:
    """Have PEFT look at the layers' inputs on rows of token ids, for CorDA's start: those of the
    task, so that the directions which matter most on it train ("instruction previewed").
    """
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def read() -> None:
        for row in rows:
            ids = torch.tensor([list(row)], device=model.device)
            model(input_ids=ids)

    config.corda_config = CordaConfig(corda_method="ipm")
    training = model.training
    preprocess_corda(model, config, run_model=read)
    model.train(training)


def pairs_of(model: Any) -> dict[str, Pair]:
    """A0 and B0 of each adapted layer, by PEFT's name of it, of a fresh adapter."""
    from peft.tuners.lora import Linear

    pairs = {}
    for name, layer in model.named_modules():
        if type(layer) is not Linear:
            continue
        adapter = layer.active_adapter[0]
        down = layer.lora_A[adapter].weight
        up = layer.lora_B[adapter].weight
        pairs[name] = (_copy(down), _copy(up))
    return pairs


def _copy(param: Tensor) -> Tensor:
    return param.detach().cpu().clone()


def as_plain(weights: AdapterWeights, pairs: Mapping[str, Pair]) -> AdapterWeights:
    """The adapter as a LoRA of the base that it came from, twice its rank: the rows of A and A0,
    the columns of B and -B0.
    """
    tensors = dict(weights.tensors)
    for name, (down, up) in pairs.items():
        key = f"{name}.lora_A.weight"
        own = tensors[key]
        tensors[key] = torch.cat((own, down.to(own)))
        key = f"{name}.lora_B.weight"
        own = tensors[key]
        tensors[key] = torch.cat((own, -up.to(own)), dim=1)
    return AdapterWeights(tensors, _doubled(weights.config))


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json for twice the rank in every layer at the same scales: alpha grows as
    the rank does, under rsLoRA as its root.
    """
    growth = 2.0
    if config["use_rslora"]:
        growth = math.sqrt(growth)
    ranks, alphas = {}, {}
    for name, rank in config["rank_pattern"].items():
        ranks[name] = 2 * rank
    for name, alpha in config["alpha_pattern"].items():
        alphas[name] = growth * alpha
    doubled = dict(config)
    doubled["r"] = 2 * config["r"]
    doubled["lora_alpha"] = growth * config["lora_alpha"]
    doubled["rank_pattern"] = ranks
    doubled["alpha_pattern"] = alphas
    return doubled
