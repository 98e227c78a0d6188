"""How models come into memory under an engine, and what DeepSpeed is told."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from conf.adapters import needs_whole
from conf.choices import Offload
from conf.schema import AdapterConfig, EngineConfig
from rlhf.process import distributed

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
