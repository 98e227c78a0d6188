"""Checks of how a run was launched: ranks, engine, and how a step's rows spread over them."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from conf.choices import Dtype, EngineKind, Offload, OnNonFinite
from conf.online import OnlineStage
from conf.schema import EngineConfig
from conf.stages import OfflineStage
from rlhf.process import distributed
from rlhf.types import UserError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the rows of an optimizer step are spread: ranks x micro x accumulation = the batch."""

    ranks: int
    micro: int  # rows per forward pass and rank
    accumulation: int  # forward passes per optimizer step and rank


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def count_ranks(engine: EngineConfig, *, dry_run: bool) -> int:
    """Ranks that the run will have: those launched; in a dry run those that it asks about."""
    if dry_run and engine.gpus is not None:
        return engine.gpus
    return distributed.world_size()


def name_ranks(count: int) -> str:
    """``1 rank`` or ``4 ranks``."""
    return "1 rank" if count == 1 else f"{count} ranks"


def check_engine(engine: EngineConfig, *, dry_run: bool) -> None:
    """The engine trains on as many ranks as there are, its packages are installed, and engine.gpus
    is what was launched. Raises UserError.
    """
    if engine.kind is EngineKind.torch:
        asked = engine.gpus if dry_run else None
        distributed.require_one_process("engine=torch", distributed.SEVERAL_PROCESSES, asked)
    if engine.kind is EngineKind.deepspeed and not installed("deepspeed"):
        raise UserError(
            f"engine=zero{engine.zero_stage} needs the package deepspeed, which is not "
            "installed: `pip install deepspeed`, or engine=torch."
        )
    if engine.offload is Offload.nvme and not Path(str(engine.nvme_path)).expanduser().is_dir():
        raise UserError(
            f"engine.nvme_path={engine.nvme_path}: no such directory. Give one on the NVMe disk, "
            "or set engine.offload=cpu."
        )
    if not dry_run:
        _check_launched(engine.gpus)


def _check_launched(gpus: int | None) -> None:
    launched = distributed.world_size()
    if gpus is None or gpus == launched:
        return
    were = "was" if launched == 1 else "were"
    raise UserError(
        f"engine.gpus={gpus}, but {name_ranks(launched)} {were} launched. Launch with `torchrun "
        f"--standalone --nproc_per_node {gpus} -m rlhf ...`, or leave engine.gpus out."
    )


def plan_batches(batch_size: int, micro_batch_size: int | None, ranks: int) -> BatchPlan:
    """Spread the `batch_size` rows of an optimizer step over ranks and forward passes; without a
    micro-batch size each rank takes its rows in one pass. Raises UserError where they don't divide.
    """
    if micro_batch_size is None:
        _check_divides("stage.batch_size", batch_size, ranks, name_ranks(ranks))
        return BatchPlan(ranks, batch_size // ranks, 1)
    unit = ranks * micro_batch_size
    what = f"{name_ranks(ranks)} x engine.micro_batch_size={micro_batch_size}"
    _check_divides("stage.batch_size", batch_size, unit, what)
    return BatchPlan(ranks, micro_batch_size, batch_size // unit)


def count_steps(stage: OfflineStage, rows: int) -> int:
    """Optimizer steps: ``stage.steps``, or as many as ``stage.epochs`` passes over `rows` have
    whole batches, one at least.
    """
    if stage.steps is not None:
        return stage.steps
    whole_batches = max(1, rows // stage.batch_size)
    return max(1, round(stage.epochs * whole_batches))


def check_prompts_per_step(stage: OnlineStage, ranks: int) -> None:
    """Prompts spread evenly over ranks, and each rank's responses over minibatches. Raises
    UserError.
    """
    _check_divides("stage.prompts_per_step", stage.prompts_per_step, ranks, name_ranks(ranks))
    share = stage.prompts_per_step // ranks * stage.samples_per_prompt
    if share % stage.minibatches:
        raise UserError(
            f"stage.minibatches={stage.minibatches} doesn't divide the {share} rollouts of "
            f"each of {name_ranks(ranks)} "
            f"(prompts_per_step={stage.prompts_per_step} x "
            f"samples_per_prompt={stage.samples_per_prompt} / ranks). "
            f"Expected a divisor of {share}, such as {math.gcd(share, stage.minibatches)}."
        )


def _check_divides(key: str, value: int, unit: int, what: str) -> None:
    if value % unit:
        raise UserError(
            f"{key}={value} doesn't divide by {what} = {unit}. Expected a multiple of {unit}, "
            f"such as {key}={math.ceil(value / unit) * unit}."
        )


def check_nonfinite(on_nonfinite: OnNonFinite, engine: EngineConfig, dtype: Dtype) -> None:
    """A step can be left out only before it is applied: DeepSpeed tells a gradient's norm after its
    step, and float16's loss scaler needs to see every step. Raises UserError.
    """
    if on_nonfinite is not OnNonFinite.skip:
        return
    if engine.kind is EngineKind.deepspeed:
        raise UserError(
            f"stage.on_nonfinite=skip needs engine=torch: engine=zero{engine.zero_stage} "
            "tells a gradient's norm only after it was applied. "
            "Set stage.on_nonfinite=rewind (an online stage then needs stage.save_steps), or stop."
        )
    if dtype is Dtype.float16:
        raise UserError(
            "stage.on_nonfinite=skip with model.dtype=float16: its loss scaler leaves out steps "
            "that overflow by itself and counts them. "
            "Set stage.on_nonfinite=stop or rewind, or model.dtype=bfloat16."
        )
