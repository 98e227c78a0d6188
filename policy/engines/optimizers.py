"""Optimizers beside AdamW (stage.optimizer), for the torch engine and TRL's trainers on it.

bitsandbytes holds the state in 8 bits, in blocks of 256 with a scale each; tensors of less than
4096 elements keep 32 bits. Its paged kinds let CUDA move the state to the host where memory is
short; on a CPU they are the plain ones. Adafactor is transformers', with the stage's learning rate
and without momentum, as its Trainer has it.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

from transformers.optimization import Adafactor

from conf.schedule import OptimizerKind
from policy.adapters.quantized import bitsandbytes
from policy.engines.base import OptimSettings

Groups = list[dict[str, Any]]

_NAMES = {
    OptimizerKind.adamw_8bit: "AdamW8bit",
    OptimizerKind.paged_adamw: "PagedAdamW32bit",
    OptimizerKind.paged_adamw_8bit: "PagedAdamW8bit",
    OptimizerKind.lion: "Lion32bit",
    OptimizerKind.lion_8bit: "Lion8bit",
}


def _of_bitsandbytes(name: str, groups: Groups, optim: OptimSettings) -> Any:
    kind = getattr(bitsandbytes().optim, name)
    options: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    if "Adam" in name:
        options["eps"] = optim.eps
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return kind(groups, betas=optim.betas, **options)


def _adafactor(groups: Groups, optim: OptimSettings) -> Any:
    return Adafactor(
        groups,
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


ALL: dict[OptimizerKind, Callable[[Groups, OptimSettings], Any]] = {
    OptimizerKind.adafactor: _adafactor,
    **{kind: functools.partial(_of_bitsandbytes, name) for kind, name in _NAMES.items()},
}
