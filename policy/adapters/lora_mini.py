"""LoRA-Mini (Singh, Aher and Garg 2024, arXiv:2411.15804): each of LoRA's two matrices is split in
two, and only the inner ones train.

    dW = alpha / r  B_aux B A A_aux    A_aux [w, in], A [r, w], B [w, r], B_aux [out, w]

With w the inner width, 2 r w numbers train in a layer, whatever its size is; w (in + out) are
frozen and saved with them.

Known of the paper are its abstract and the equation; its starts, widths and scales are not, and the
authors' repository holds no readable code. Both inner matrices at 0 would have no gradient for
ever. So here A starts as LoRA's A does and B at 0, and the outer ones are normal with variances
1 / in and 1 / w: then A A_aux has the variance of LoRA's A, and a step of Adam moves an entry of
B_aux B about as far as one of LoRA's B.

The outer matrices follow from a layer's name alone, so that a run that resumes has the same ones: a
checkpoint holds what trains. With the adapter they are saved whole, since a generator's numbers may
change from one version of torch to the next.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, Tuner
from policy.adapters.guards import put_on
from policy.adapters.low_rank import (
    LowRankConfig,
    LowRankLayer,
    LowRankModel,
    dropout_of,
    options_of,
    plain_lora,
    random_linear,
    zero_linear,
)
from policy.adapters.targets import adapted_linears, check_targets, check_whole, whole_count
from rlhf.types import UserError

NAME = "LORA_MINI"


@dataclass
class LoraMiniConfig(LowRankConfig):
    """What PEFT saves beside the weights."""

    inner: int = 32  # w

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME


class LoraMiniLayer(LowRankLayer):
    adapter_layer_names = ("mini_a", "mini_b")
    other_param_names = ("dropouts", "mini_outer_a", "mini_outer_b")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scales: dict[str, float] = {}

    def put(self, adapter_name: str, config: LoraMiniConfig, layer_name: str) -> None:
        inner = config.inner
        numbers = torch.Generator().manual_seed(zlib.crc32(layer_name.encode()))
        self.scales[adapter_name] = config.alpha / config.r
        self.dropouts[adapter_name] = dropout_of(config.dropout)
        self.mini_outer_a[adapter_name] = _frozen(
            self.in_features, inner, self.in_features, numbers
        )
        self.mini_a[adapter_name] = random_linear(inner, config.r)
        self.mini_b[adapter_name] = zero_linear(config.r, inner)
        self.mini_outer_b[adapter_name] = _frozen(inner, self.out_features, inner, numbers)

    def update(self, adapter_name: str, x: Tensor) -> Tensor:
        middle = self.mini_a[adapter_name](self.mini_outer_a[adapter_name](x))
        out = self.mini_outer_b[adapter_name](self.mini_b[adapter_name](middle))
        return out * self.scales[adapter_name]

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        a = self.mini_a[adapter_name].weight @ self.mini_outer_a[adapter_name].weight
        b = self.mini_outer_b[adapter_name].weight @ self.mini_b[adapter_name].weight
        return a, b * self.scales[adapter_name]


class LoraMiniModel(LowRankModel):
    prefix = "mini_"
    tuner_layer_cls = LoraMiniLayer


def _frozen(inputs: int, outputs: int, fan: int, numbers: torch.Generator) -> nn.Linear:
    """A matrix that stays at its normal start, of variance 1 / `fan`."""
    linear = nn.Linear(inputs, outputs, bias=False)
    start = torch.randn(outputs, inputs, generator=numbers, device="cpu") / math.sqrt(fan)
    linear.weight = nn.Parameter(start, requires_grad=False)
    return linear


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with a fresh adapter; only its inner matrices train. Raises UserError as
    `lora.attach`.
    """
    options = options_of(model, adapter, fresh)
    config = LoraMiniConfig(inner=adapter.lora_mini.inner, **options)
    return put_on(model, adapter, config, LoraMiniLayer)


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """What `attach` refuses before weights load. Raises UserError."""
    inner = adapter.lora_mini.inner
    if inner < adapter.rank:
        raise UserError(
            f"adapter.lora_mini.inner={inner} is below adapter.rank={adapter.rank}, which no "
            f"update could have: raise it, or set adapter.rank={inner}."
        )
    check_targets(model, adapter.targets, trains_head=trains_head)
    check_whole(model, adapter)


def expected(model: Any, adapter: AdapterConfig) -> int:
    """2 r w for each layer adapted, and the modules that adapter.save_whole names."""
    inner = 2 * adapter.rank * adapter.lora_mini.inner * len(adapted_linears(model, adapter))
    return inner + whole_count(model, adapter)


def frozen(model: Any, adapter: AdapterConfig) -> int:
    """w (in + out) for each layer adapted."""
    widths = sum(inputs + outputs for inputs, outputs in adapted_linears(model, adapter).values())
    return adapter.lora_mini.inner * widths


METHOD = Method(
    attach=attach,
    expected=expected,
    frozen=frozen,
    check=check,
    tuner=Tuner(NAME, LoraMiniConfig, LoraMiniModel),
    as_lora=plain_lora,
)
