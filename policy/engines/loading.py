"""What an engine starts from: how models come into memory, the groups of their parameters with
learning rates of their own, some of which begin to train later, and what DeepSpeed is told.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.adapters import needs_whole
from conf.choices import Offload
from conf.schema import AdapterConfig, EngineConfig
from rlhf.process import distributed
from rlhf.types import UserError

log = logging.getLogger(__name__)


class Loader:
    """Loads models whole, on the CPU. Under ZeRO-3 policy/engines/parts.py has another, whose
    methods are collectives.
    """

    parts = False  # whether the ranks hold a model together

    def load(self, make: Callable[[], Any]) -> Any:
        """The model that `make` reads with transformers."""
        return make()

    def adapt(self, model: Any, attach: Callable[[Any], Any]) -> Any:
        """`attach(model)`, which may run passes of the model, and puts an adapter on it."""
        return attach(model)

    def passing(self, model: Any) -> AbstractContextManager[None]:
        """While inside, a model that no engine runs can be called."""
        return nullcontext()


# By ZeRO stage, of an engine and its weights' dtype; rlhf/stages/methods.py fills it.
LOADERS: dict[int, Callable[[EngineConfig, torch.dtype], Loader]] = {}

# What lets ranks share the rows of an online step's models (engine.sequence_parallel), and what
# chooses the class of stage=sft's trainer for a model: "shared" rows, or "packed" ones. methods.py
# fills them.
SHARING: dict[str, Callable[[Any, EngineConfig], None]] = {}
TRAINERS: dict[str, Callable[[Any, EngineConfig], type[Any]]] = {}


def loader_of(
    engine: EngineConfig, dtype: torch.dtype, adapter: AdapterConfig | None = None
) -> Loader:
    """How the engine's models are loaded, or, where an adapter is put on one, that one."""
    make = LOADERS.get(engine.zero_stage)
    if make is None:
        return Loader()
    if adapter is not None and needs_whole(adapter):
        if distributed.is_main():
            log.info(
                "adapter.kind=%s init=%s starts from whole weights: every rank loads them",
                adapter.kind.value,
                adapter.init.value,
            )
        return Loader()
    return make(engine, dtype)


def holder_of(engine: EngineConfig, dtype: torch.dtype) -> Any:
    """How the engine's ranks hold a frozen model together; None where each has it whole."""
    loader = loader_of(engine, dtype)
    return loader if loader.parts else None


# ---- groups of parameters ----

# All groups exist from the start, since ZeRO never trains what was frozen when its engine was made.
# A group that waits has a learning rate of 0, so that neither the update nor weight decay moves it,
# and no gradient, so that it is not in the norm that gradients are clipped by. When its turn comes
# it starts as a fresh AdamW does: moments of 0, and step 1 in their bias correction. Gradients from
# while it waited would be those of another model, whose upper blocks had not moved yet; and a step
# count that had gone on would divide the first moments by nearly 1 each, so that the first update
# is up to (1 - beta1) / sqrt(1 - beta2) = 3.2 times as large as a fresh one's.

TAKEN = "taken"  # in a group of `WaitingAdamW`: the steps that it took


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate."""

    params: list[nn.Parameter]
    scale: float = 1.0  # what the learning rate is multiplied by
    wait: int = 0  # unfreezings before they train


@dataclass(frozen=True, slots=True)
class Rates:
    """All groups of a model, in the order of the optimizer's, and when those that wait begin.

    factor: what every learning rate is multiplied by at each unfreezing; every: optimizer steps
    between unfreezings, None where something else decides.
    """

    groups: tuple[Group, ...]
    factor: float = 1.0
    every: int | None = None

    @property
    def unfreezings(self) -> int:
        """How many there are until everything trains."""
        return max((group.wait for group in self.groups), default=0)

    @property
    def plain(self) -> bool:
        """Whether all parameters have the learning rate as it is, from the start."""
        return all(group.scale == 1.0 and group.wait == 0 for group in self.groups)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters in the order of the groups."""
        return [param for group in self.groups for param in group.params]

    def phase(self, steps: int) -> int:
        """Unfreezings that have happened after so many optimizer steps."""
        return 0 if self.every is None else min(self.unfreezings, steps // self.every)

    def factors(self, phase: int) -> list[float]:
        """What the learning rate of each group is multiplied by after so many unfreezings; 0 for
        one that waits.
        """
        fallen = self.factor**phase
        return [0.0 if group.wait > phase else group.scale * fallen for group in self.groups]

    def hold(self, phase: int) -> None:
        """Let exactly the groups that train after so many unfreezings take gradients. Not under
        ZeRO, which knows gradients of what needed them when its engine was made.
        """
        for group in self.groups:
            for param in group.params:
                param.requires_grad_(group.wait <= phase)

    def silence(self, phase: Callable[[], int]) -> None:
        """Make the gradients of groups that wait 0; `phase` tells the unfreezings so far. For ZeRO,
        in place of `hold`; before the engine is made.
        """
        for group in self.groups:
            for param in group.params if group.wait else ():
                param.register_hook(_silencer(group.wait, phase))


def _silencer(wait: int, phase: Callable[[], int]) -> Callable[[Tensor], Tensor | None]:
    def silenced(gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if phase() < wait else None

    return silenced


def grouped(
    module: nn.Module, place: Callable[[str, nn.Parameter], tuple[float, int]]
) -> tuple[Group, ...]:
    """The parameters of `module` that train, by their place: scale and wait, as in `Group`. Groups
    come in the order of their first parameter, and so do the parameters in them.
    """
    found: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            found.setdefault(place(name, param), []).append(param)
    return tuple(Group(params, scale, wait) for (scale, wait), params in found.items())


def rates_by_name(module: nn.Module, scale: Callable[[str], float]) -> Rates:
    """Rates whose scales come from the parameters' names in `module`."""
    return Rates(grouped(module, lambda name, param: (scale(name), 0)))


def mark_tables(module: nn.Module) -> None:
    """Mark the weights of embeddings and of heads, whose rows are of single tokens: Muon leaves
    them to AdamW.
    """
    for part in module.modules():
        tables: list[Any] = [part] if isinstance(part, nn.Embedding) else []
        head_of: Any = getattr(part, "get_output_embeddings", None)
        if head_of is not None:
            tables.append(head_of())
        for table in tables:
            if isinstance(getattr(table, "weight", None), nn.Parameter):
                table.weight.is_table = True


def one_rate(module: nn.Module) -> Rates:
    """One group of all parameters that train."""
    return Rates((Group([param for param in module.parameters() if param.requires_grad]),))


def set_rates(
    groups: Iterable[dict[str, Any]], rates: Sequence[float], factors: Sequence[float]
) -> None:
    """Before an optimizer step: the learning rate of each of an optimizer's `groups` is its rate
    times its factor. One with a factor of 0 takes no step.
    """
    for group, rate, factor in zip(groups, rates, factors, strict=True):
        group["lr"] = rate * factor
        if TAKEN in group and factor > 0:
            group[TAKEN] += 1


class WaitingAdamW(torch.optim.AdamW):
    """AdamW for ZeRO, which steps all groups at once: each group's bias correction counts the steps
    that the group itself took (`set_rates`).

    The count is an option of the group, like its weight decay, so every form of a checkpoint holds
    it.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault(TAKEN, 0)

    def step(self, closure: Any = None) -> Any:
        """One step; those of a group that waits (rate 0, gradients 0) change nothing."""
        for group in self.param_groups:
            for param in group["params"]:
                if self.state.get(param):
                    self.state[param]["step"].fill_(max(group[TAKEN] - 1, 0))
        return super().step(closure)


def check_groups(saved: Sequence[Any], groups: Sequence[Any], checkpoint: Path) -> None:
    """Raises UserError where a checkpoint's optimizer has not as many parameters in as many groups
    as this run's.
    """
    sizes = [[len(group["params"]) for group in some] for some in (saved, groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{checkpoint}: its optimizer has groups of {sizes[0]} tensors, this run's of "
            f"{sizes[1]}. Resume with the stage.train, stage.unfreeze, stage.depth_decay and "
            "adapter options that it was saved with."
        )


# ---- what DeepSpeed is told ----


def zero_config(
    cfg: EngineConfig, *, hidden_size: int, half: bool, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration for our own loop: no scheduler, no accumulation, the client's AdamW
    on the device it likes.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 1e9,  # 0 would leave the norm uncomputed below ZeRO-1
        # Only vectors (norms, biases) stay whole; with the default of 100,000 elements a small
        # model would never be partitioned.
        "zero_optimization": zero_options(cfg, whole_below=10 * hidden_size),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
        **gradient_sums(cfg, half=half),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def zero_options(cfg: EngineConfig, *, whole_below: int | str) -> dict[str, Any]:
    """How weights and optimizer state are shared out and offloaded. whole_below: elements of a
    tensor up to which ZeRO-3 keeps it whole on every rank.
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = whole_below
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if cfg.offload is Offload.none:
        return zero
    target: dict[str, Any] = {"device": cfg.offload.value}
    if cfg.offload is Offload.nvme:
        target["nvme_path"] = cfg.nvme_path
    zero["offload_optimizer"] = dict(target)
    if cfg.zero_stage == 3:
        zero["offload_param"] = dict(target)
    return zero


def gradient_sums(cfg: EngineConfig, *, half: bool) -> dict[str, Any]:
    """DeepSpeed's options for adding bfloat16 gradients of micro-batches in float32; none for
    float32 weights.

    ZeRO-0 can't, and ZeRO-1 would change to an optimizer with checkpoints of another form: both add
    in bfloat16, so their error grows with the number of micro-batches.
    """
    if not half or cfg.zero_stage < 2:
        return {}
    return {"data_types": {"grad_accum_dtype": "fp32"}}
