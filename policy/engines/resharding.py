"""Resuming on another number of ranks, or at another ZeRO stage: a checkpoint records how it was
saved, and one that doesn't fit this launch is converted into a copy.

ZeRO splits weights and optimizer state over the ranks, so DeepSpeed loads a checkpoint only where
it was saved: on as many ranks, at the same stage. Its universal form (Lian et al. 2024,
arXiv:2406.18820) is whole tensors by name, which any number of ranks can split again.
"""

import dataclasses
import json
import logging
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.choices import EngineKind, Offload
from conf.schema import EngineConfig
from rlhf.process import checkpoints, distributed
from rlhf.types import UserError

LOG = logging.getLogger("policy.engines.resharding")
LAYOUT = "layout.json"
# What DeepSpeed pickles into a checkpoint beside tensors and plain values. Anything else could be
# code, and DeepSpeed would run it.
CHECKPOINT_CLASSES = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
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


# ---- DeepSpeed loads a checkpoint ----


def is_universal(directory: Path) -> bool:
    """Whether a checkpoint folder that DeepSpeed wrote was converted to its universal form."""
    return (directory / "latest_universal").is_file()


@contextmanager
def reading(engine: Any, directory: Path) -> Iterator[None]:
    """While inside, DeepSpeed's `engine` loads `directory` as what it is: its own ranks' files, or
    the universal form. A collective.

    DeepSpeed takes this from its configuration, which is made before a checkpoint is known, and one
    run may load both. Raises UserError where a rank would hold no part of some parameter group,
    which the universal form's loader can't do without.
    """
    config, logger = engine._config, logging.getLogger("DeepSpeed")
    before, level = config.load_universal_checkpoint, logger.level
    config.load_universal_checkpoint = is_universal(directory)
    try:
        if config.load_universal_checkpoint:
            _check_parts(engine)
            logger.setLevel(logging.ERROR)  # it warns that there is no tensor parallelism
        yield
        if config.load_universal_checkpoint:
            repair_universal(engine, directory)
    finally:
        config.load_universal_checkpoint = before
        logger.setLevel(level)


def _check_parts(engine: Any) -> None:
    """Every rank holds a part of every parameter group under ZeRO-1 and 2. Raises UserError on all
    ranks alike. A collective.
    """
    groups = getattr(engine.optimizer, "bit16_groups", getattr(engine.optimizer, "bf16_groups", []))
    missing = distributed.gather(any(_holds_nothing(group) for group in groups))
    if any(missing):
        ranks = ", ".join(str(rank) for rank, empty in enumerate(missing) if empty)
        raise UserError(
            f"the model is too small for {len(missing)} ranks: rank {ranks} would hold no part "
            "of some group of weights, and DeepSpeed can't load a "
            "universal checkpoint then. Resume on fewer ranks, or at engine=zero3."
        )


def _holds_nothing(group: Iterable[Any]) -> bool:
    return all(getattr(parameter, "_hp_mapping", None) is None for parameter in group)


def repair_universal(engine: Any, directory: Path) -> None:
    """After DeepSpeed loaded a universal form: what its ZeRO-3 loader gets wrong where the weights
    are in several groups.

    It gives all groups the hyperparameters of the first, so that weights without decay decay, and
    the same tensor as step count, which each optimizer step then counts up once per group.
    """
    import torch

    tag = (directory / "latest_universal").read_text(encoding="utf-8").strip()
    with torch.serialization.safe_globals(checkpoint_classes()):
        saved = torch.load(
            directory / tag / "zero" / "optimizer_state.pt", weights_only=True, map_location="cpu"
        )["param_groups"]
    optimizer = engine.optimizer.optimizer
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({k: v for k, v in values.items() if k != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def checkpoint_classes() -> list[Any]:
    """The classes that DeepSpeed pickles into its checkpoints, for
    ``torch.load(weights_only=True)``.
    """
    return [pkgutil.resolve_name(name) for name in sorted(CHECKPOINT_CLASSES)]
