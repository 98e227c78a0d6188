"""Resuming on another number of ranks, or at another ZeRO stage: a checkpoint records how it was
saved, and one that doesn't fit this launch is converted into a copy.

ZeRO splits weights and optimizer state over the ranks, so DeepSpeed loads a checkpoint only where
it was saved: on as many ranks, at the same stage. Its universal form (Lian et al. 2024,
arXiv:2406.18820) is whole tensors by name, which any number of ranks can split again.

Beside it, and with no share in it, the noise of gradients, measured alike on any number of ranks.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.choices import EngineKind, Offload
from conf.schema import EngineConfig
from policy.engines.deepspeed import CHECKPOINT_CLASSES
from rlhf.process import checkpoints, distributed
from rlhf.types import UserError

LOG = logging.getLogger("policy.engines.resharding")
LAYOUT = "layout.json"
ROOT = Path(__file__).resolve().parents[2]  # what the converter's process imports from
_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sharding:
    """How a checkpoint's state is spread."""

    engine: str
    zero_stage: int
    ranks: int
    offload: str

    @staticmethod
    def of(engine: EngineConfig) -> "Sharding":
        """This launch's."""
        stage = engine.zero_stage if engine.kind is EngineKind.deepspeed else 0
        return Sharding(engine.kind.value, stage, distributed.world_size(), engine.offload.value)

    def __str__(self) -> str:
        name = (
            f"zero{self.zero_stage}" if self.engine == EngineKind.deepspeed.value else self.engine
        )
        offload = "" if self.offload == Offload.none.value else f" engine.offload={self.offload}"
        return f"engine={name}{offload} on {self.ranks} rank{'' if self.ranks == 1 else 's'}"


def record(directory: Path, engine: EngineConfig) -> None:
    """Write the layout of this launch into a checkpoint; rank 0's to call, before the checkpoint is
    sealed.
    """
    (directory / LAYOUT).write_text(
        json.dumps(dataclasses.asdict(Sharding.of(engine))) + "\n", encoding="utf-8"
    )


def recorded(directory: Path) -> Sharding | None:
    """The layout that a checkpoint was saved in; None where it is older than the record."""
    path = directory / LAYOUT
    if not path.is_file():
        return None
    return Sharding(**json.loads(path.read_text(encoding="utf-8")))


def adapt(checkpoint: Path, engine: EngineConfig) -> tuple[Path, str | None]:
    """The folder from which this launch can load a whole checkpoint, and a warning, if any: the
    checkpoint itself, or its universal form, which is converted once.

    Rank 0's to call, before anything loads. Raises UserError where no conversion covers the change,
    or where loading would run code that DeepSpeed never wrote.
    """
    check_pickles(checkpoint)
    saved, now = recorded(checkpoint), Sharding.of(engine)
    if saved is None:
        _check_unrecorded(checkpoint, now)
        return checkpoint, None
    if dataclasses.replace(saved, offload=now.offload) == now:
        return checkpoint, None
    _refuse(checkpoint, saved, now)
    if now.zero_stage == 0:  # nothing is split, so there is nothing to convert
        warning = f"checkpoint {checkpoint.name} was saved by {saved}, and goes on with {now}"
        return checkpoint, warning
    converted = universal(checkpoint, saved)
    return converted, (
        f"checkpoint {checkpoint.name} was saved by {saved}; its universal form is loaded by {now}"
    )


def _check_unrecorded(checkpoint: Path, now: Sharding) -> None:
    """A checkpoint from before layouts were recorded goes on as it was saved; its ranks are counted
    by their files. Raises UserError.
    """
    files = [list(root.rglob("*_optim_states.pt")) for root in deepspeed_roots(checkpoint)]
    ranks = max(map(len, files), default=0)
    if ranks not in (0, now.ranks):
        raise UserError(
            f"the checkpoint {checkpoint} was saved by {ranks} ranks, before checkpoints had a "
            f"{LAYOUT}, and this launch has {now}. "
            f"Resume on {ranks} ranks; the checkpoints saved then can go on with any number."
        )


def adapt_on_all_ranks(checkpoint: Path, engine: EngineConfig) -> Path:
    """`adapt` on rank 0, its outcome on every rank. A collective; raises UserError on all ranks
    alike.
    """
    adapted: Path | None = None
    wrong: str | None = None
    if distributed.is_main():
        try:
            adapted, _ = adapt(checkpoint, engine)
        except UserError as error:
            wrong = str(error)
    adapted, wrong = distributed.broadcast((adapted, wrong))
    if adapted is None:
        raise UserError(wrong)
    return adapted


def _refuse(checkpoint: Path, saved: Sharding, now: Sharding) -> None:
    """Raises UserError for a change of layout that no conversion covers."""
    why = None
    if saved.engine != now.engine:
        why = "The torch engine and DeepSpeed keep their state in different forms"
    elif saved.zero_stage != now.zero_stage and 0 in (saved.zero_stage, now.zero_stage):
        why = "ZeRO-0 keeps no state that is split, so it has no universal form"
    elif Offload.nvme.value in (saved.offload, now.offload):
        why = "State on NVMe is read back only by the ranks that wrote it"
    if why is not None:
        raise UserError(
            f"the checkpoint {checkpoint} was saved by {saved}, but this launch has {now}. "
            f"{why}. Resume as it was saved, "
            "or begin a new run with model.path at the weights of this one."
        )


def check_pickles(checkpoint: Path) -> None:
    """Raises UserError where a file names anything that DeepSpeed does not write, since DeepSpeed
    unpickles its files. Nothing is unpickled here.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for root in deepspeed_roots(checkpoint):
        for path in sorted(root.rglob("*.pt")):
            try:
                strange = sorted(set(get_unsafe_globals_in_checkpoint(path)) - CHECKPOINT_CLASSES)
            except Exception as error:  # whatever a crafted file makes of the reader
                raise UserError(
                    f"{path} is no file that torch.save wrote ({error}). {_FOREIGN}"
                ) from error
            if strange:
                raise UserError(
                    f"{path} would load {', '.join(strange[:3])}, which DeepSpeed never writes. "
                    f"{_FOREIGN}"
                )


_FOREIGN = (
    "DeepSpeed unpickles its checkpoints, so it would run code in there. Resume from an "
    "earlier checkpoint of your own: move this one away."
)


def deepspeed_roots(checkpoint: Path) -> list[Path]:
    """The folders of a checkpoint that DeepSpeed wrote: each holds a file that names the folder of
    its state.
    """
    markers = [*checkpoint.rglob("latest"), *checkpoint.rglob("latest_universal")]
    return sorted({path.parent for path in markers})


def universal(checkpoint: Path, saved: Sharding) -> Path:
    """The universal form of a sealed checkpoint, under ``universal/`` beside it: converted at the
    first call, the original untouched.

    DeepSpeed's converter runs in a process of its own, on the CPU: it forks, and this one may hold
    a GPU. Raises UserError.
    """
    target = checkpoint.parent / checkpoints.UNIVERSAL / checkpoint.name
    if target.is_dir() and checkpoints.problem(target) is None:
        return target
    side = target.with_name(target.name + ".part")
    for old in (side, target):
        shutil.rmtree(old, ignore_errors=True)
    with checkpoints.storing(f"the universal form of {checkpoint}", side, checkpoint.parent):
        side.mkdir(parents=True)
        command = [sys.executable, "-m", "policy.engines.universal", str(checkpoint), str(side)]
        done = subprocess.run(
            command, env=_converter_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            shutil.rmtree(side, ignore_errors=True)
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(
                f"the checkpoint {checkpoint} can't be brought to another layout: {last}. Resume "
                f"with {saved}, as it was saved."
            )
        checkpoints.seal(side)
        side.rename(target)
    return target


def _converter_environment() -> dict[str, str]:
    """The environment of the converter's process: no launcher, no GPU, our own code first."""
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
    python_path = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        python_path.append(os.environ["PYTHONPATH"])
    return environment | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(python_path),
    }


# ---- the noise of gradients ----

_ALONE = (
    "stage.noise_scale: a step of a single micro-batch says nothing about its noise. Smaller "
    "micro-batches do (engine.micro_tokens, engine.micro_batch_size)."
)


class GradientNoise:
    """The gradient-noise scale, the rows of a step beyond which more of them better its gradient
    but little (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    Hooks see the share of each micro-batch in a step's gradient; the whole is known by its norm. Of
    m micro-batches over all ranks, of n_i rows with the mean gradient g_i, and all N rows with G,

        trace = (sum of n_i |g_i|^2 - N |G|^2) / (m - 1)
        square = |G|^2 - trace / N

    are unbiased for the trace of independent rows' covariance and the square of their true
    gradient. The noise scale is the ratio of their exponential averages.
    """

    def __init__(self, params: Sequence[nn.Parameter], decay: float) -> None:
        """params: those that train; decay: of the averages, in [0, 1)."""
        self.params, self.decay = params, decay
        self.trace = self.square = self.weight = 0.0  # averages, and the weight of what is in them
        self._warned = False
        self._seen: set[int] = set()  # parameters, in the pass under way
        self._norm: Any = 0.0  # squared, of the pass under way
        self._sum: Any = 0.0  # of squared norms by their rows
        self._rows = self._parts = 0

    def watch(self) -> None:
        """Add the hooks, once, after those that change gradients."""
        for number, param in enumerate(self.params):
            trains = param.requires_grad
            param.requires_grad_(True).register_hook(functools.partial(self._see, number))
            param.requires_grad_(trains)

    def _see(self, number: int, gradient: Tensor) -> None:
        """A parameter's gradient in the pass under way, before it is added to any other."""
        if number in self._seen:
            raise UserError(
                "stage.noise_scale: a parameter gets its gradient in several pieces (reentrant "
                "checkpointing), whose norms don't add up. Set stage.noise_scale=null."
            )
        self._seen.add(number)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        self._norm = self._norm + torch.linalg.vector_norm(gradient, dtype=exact) ** 2

    def begin(self) -> None:
        """A step begins; what an earlier one has left over is forgotten."""
        self._seen, self._norm, self._sum = set(), 0.0, 0.0
        self._rows = self._parts = 0

    def part(self, rows: int) -> None:
        """The backward pass of a micro-batch of `rows` rows is over; 0: of rows at weight 0."""
        if rows:
            self._sum = self._sum + self._norm / rows
            self._rows += rows
            self._parts += 1
        self._seen, self._norm = set(), 0.0

    def end(self, norm: float | None) -> None:
        """A step's passes are over. norm: of its whole gradient, before clipping; None: it is given
        up. A collective.
        """
        if norm is None:
            self.begin()
            return
        # gradients are averaged over ranks
        own = float(self._sum) / distributed.world_size() ** 2
        shares, rows, parts = distributed.all_sum([own, self._rows, self._parts])
        self.begin()
        if parts < 2:
            if not self._warned and distributed.is_main():
                LOG.warning(_ALONE)
            self._warned = True
            return
        trace = (rows**2 * shares - rows * norm**2) / (parts - 1)
        square = norm**2 - trace / rows
        if not math.isfinite(trace + square):
            return
        fresh = 1.0 - self.decay
        self.trace += fresh * (trace - self.trace)
        self.square += fresh * (square - self.square)
        self.weight += fresh * (1.0 - self.weight)

    def figures(self) -> dict[str, float]:
        """``train/noise_scale`` in rows, unless noise hides the gradient; its two averages."""
        if not self.weight:
            return {}
        trace, square = self.trace / self.weight, self.square / self.weight
        figures = {"train/noise_trace": trace, "train/noise_square": square}
        if trace > 0 and square > 0:
            figures["train/noise_scale"] = trace / square
        return figures

    def state_dict(self) -> dict[str, float]:
        return {"trace": self.trace, "square": self.square, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.trace, self.square = state["trace"], state["square"]
        self.weight = state["weight"]
