"""Checks before any weight loads: the stage's own, on all ranks; the ranks and the engine; how a
step's rows spread over them; the generator.

What is checked belongs to the stage: `check(cfg)` in its module of rlhf/stages/ raises `UserError`
with the option, what was expected, what is there instead and a remedy. What only the weights can
tell is checked where they are loaded.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from conf.choices import (
    AdapterKind,
    Carrier,
    Dtype,
    EngineKind,
    KTOLoss,
    LoraSync,
    Offload,
    OnNonFinite,
    RolloutBackend,
)
from conf.online import OnlineStage
from conf.schema import (
    AdapterConfig,
    Config,
    EngineConfig,
    RolloutConfig,
    carrier_of,
    facts_of,
    generator_of,
    vllm_lora_rank,
)
from conf.stages import KTOStage, OfflineStage, PreferenceStage, TrainStage
from conf.training import SORTING
from rlhf.process import distributed
from rlhf.run import directory
from rlhf.run.tracking import tracker
from rlhf.types import UserError

Check = Callable[[Config], list[str]]  # notes worth a warning; raises UserError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the rows of an optimizer step are spread: ranks x micro x accumulation = the batch.

    With micro-batches by tokens `micro` is a rank's rows of a step, which it parts by itself.
    """

    ranks: int  # or groups of ranks that share rows
    micro: int  # rows per forward pass and rank
    accumulation: int  # forward passes per optimizer step and rank
    tokens: int | None = None  # padded tokens of a micro-batch
    sharing: int = 1  # ranks of a group (engine.sequence_parallel)

    def rows_of_longest(self, length: int) -> int:
        """Rows of `length` tokens, the longest that there are, in a forward pass of a rank."""
        if self.tokens is None:
            return self.micro
        return max(1, min(self.micro, self.tokens // length))


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


def name_groups(count: int, sharing: int) -> str:
    """``4 ranks``, or ``2 x 2 ranks that share rows``."""
    return name_ranks(count) if sharing == 1 else f"{count} x {name_ranks(sharing)} that share rows"


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


def plan_batches(batch_size: int, engine: EngineConfig, ranks: int) -> BatchPlan:
    """Spread the `batch_size` rows of an optimizer step over ranks and forward passes: so many rows
    each (engine.micro_batch_size), so many tokens (engine.micro_batch_tokens), or a rank's rows in
    one pass. Raises UserError where they don't divide.
    """
    sharing = engine.sequence_parallel
    _check_divides("engine.gpus", ranks, sharing, "engine.sequence_parallel")
    groups = ranks // sharing
    what = name_groups(groups, sharing)
    if engine.micro_batch_size is None:
        _check_divides("stage.batch_size", batch_size, groups, what)
        return BatchPlan(groups, batch_size // groups, 1, engine.micro_batch_tokens, sharing)
    unit = groups * engine.micro_batch_size
    what += f" x engine.micro_batch_size={engine.micro_batch_size}"
    _check_divides("stage.batch_size", batch_size, unit, what)
    return BatchPlan(groups, engine.micro_batch_size, batch_size // unit, sharing=sharing)


def check_micro_tokens(stage: OfflineStage, engine: EngineConfig) -> None:
    """Micro-batches by tokens hold different numbers of rows. Raises UserError where that would
    change the update, or DeepSpeed needs the number of micro-batches at the start.
    """
    why = counts_rows(stage, engine)
    if engine.micro_batch_tokens is not None and why is not None:
        raise UserError(
            f"engine.micro_batch_tokens={engine.micro_batch_tokens}: {why}. "
            "Set engine.micro_batch_size instead, in rows."
        )


def counts_rows(stage: OfflineStage, engine: EngineConfig) -> str | None:
    """Why the micro-batches of a stage hold so many rows, not so many tokens; None where they
    may be either.
    """
    if isinstance(stage, KTOStage) and stage.loss is KTOLoss.kto:
        return "stage.loss=kto compares the rows of a forward pass with each other"
    if isinstance(stage, PreferenceStage):
        sorting = [loss.value for loss in stage.losses if loss in SORTING]
        if sorting:
            return f"stage.losses={sorting[0]} sorts the pairs of a forward pass"
    if engine.offload is not Offload.none and engine.zero_stage < 3:
        return (
            f"DeepSpeed's ZeRO-{engine.zero_stage} with offload must know the number of "
            "micro-batches"
        )
    return None


def check_growth(stage: OfflineStage, engine: EngineConfig, ranks: int) -> None:
    """Every size that a step grows to is a whole number of the first one's micro-batches on each
    rank. Raises UserError.
    """
    if not stage.batch_growth.steps:
        return
    if engine.offload is not Offload.none and engine.zero_stage < 3:
        raise UserError(
            f"stage.batch_growth.steps={stage.batch_growth.steps}: DeepSpeed's "
            f"ZeRO-{engine.zero_stage} with offload must know the number of micro-batches, which "
            "grows. Set engine.offload=none, or engine=zero3, or leave stage.batch_growth out."
        )
    plan = plan_batches(stage.batch_size, engine, ranks)
    micro = 1 if plan.tokens is not None else plan.micro
    what = f"{name_groups(plan.ranks, plan.sharing)} x {micro} rows of a micro-batch"
    for size in stage.step_sizes()[1:]:
        _check_divides("stage.batch_growth: rows", size, plan.ranks * micro, what)


def count_steps(stage: OfflineStage, rows: int) -> int:
    """Optimizer steps: ``stage.steps``, or as many as ``stage.epochs`` passes over `rows` have
    whole batches, one at least. Raises UserError where a step would grow beyond the rows.
    """
    steps = stage.steps
    if stage.batch_growth.steps:
        if steps is None:
            steps = _growing_steps(stage, rows)
        largest = stage.step_size(steps - 1)
        if largest > rows:
            raise UserError(
                f"stage.batch_growth: a step of {largest} rows (steps={stage.batch_growth.steps}, "
                f"batch_size={stage.batch_size}), but {rows} train. Let it grow less, or later."
            )
    if steps is not None:
        return steps
    whole_batches = max(1, rows // stage.batch_size)
    return max(1, round(stage.epochs * whole_batches))


def _growing_steps(stage: OfflineStage, rows: int) -> int:
    """Steps of ``stage.epochs`` passes, each cut to whole steps; one too large for them ends it."""
    passes = math.floor(stage.epochs)
    ends = [0]  # steps after each pass, up to the one that the epochs end in
    while len(ends) < passes + 2:
        step, left = ends[-1], rows
        while (size := stage.step_size(step)) <= left:
            step, left = step + 1, left - size
        if step == ends[-1]:
            return step + 1
        ends.append(step)
    part = round((stage.epochs - passes) * (ends[-1] - ends[-2]))
    return max(1, ends[-2] + part)


def check_noise(stage: TrainStage, dtype: Dtype) -> None:
    """Raises UserError where float16's loss scale would be in the norms that stage.noise_scale
    averages.
    """
    if stage.noise_scale is not None and dtype is Dtype.float16:
        raise UserError(
            f"stage.noise_scale={stage.noise_scale} with model.dtype=float16, which scales its "
            "loss by another factor each time. Set stage.noise_scale=null, or model.dtype=bfloat16."
        )


def growth_note(stage: TrainStage, steps: int) -> list[str]:
    """A note about growth that a run of so many steps never comes to."""
    late = [at for at in stage.batch_growth.steps if at >= steps]
    if not late:
        return []
    return [f"stage.batch_growth.steps: the run has {steps} steps, so it doesn't grow at {late}."]


def check_prompts_per_step(stage: OnlineStage, ranks: int) -> None:
    """Prompts spread evenly over ranks, and each rank's responses over minibatches. Raises
    UserError.
    """
    for size in stage.step_sizes():
        grown = size != stage.prompts_per_step
        key = "stage.batch_growth: prompts" if grown else "stage.prompts_per_step"
        _check_divides(key, size, ranks, name_ranks(ranks))
        share = size // ranks * stage.samples_per_prompt
        if share % stage.minibatches:
            raise UserError(
                f"stage.minibatches={stage.minibatches} doesn't divide the {share} rollouts of "
                f"each of {name_ranks(ranks)} "
                f"({'prompts of a step' if grown else 'prompts_per_step'}={size} x "
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


def gradient_note(engine: EngineConfig, dtype: Dtype) -> list[str]:
    """A note where gradients of micro-batches are added in bfloat16, as DeepSpeed does below ZeRO-2
    (policy/engines/loading.py: gradient_sums).
    """
    import torch  # here: stage=data loads neither torch nor a model's libraries

    from rlhf.models.loading import resolve_dtype

    half = resolve_dtype(dtype) is torch.bfloat16
    if engine.kind is not EngineKind.deepspeed or engine.zero_stage >= 2 or not half:
        return []
    return [
        f"engine=zero{engine.zero_stage} in bfloat16 adds the gradients of micro-batches in "
        "bfloat16, so its error grows with their number (0.012 of the gradient with 512). "
        "engine=zero2, zero3 and torch add in float32."
    ]


def check_stage(checks: Iterable[Check], cfg: Config, has_directory: bool = True) -> list[str]:
    """Run the `checks` of a stage in their order, then look at the tracker and the run directory,
    where it has them. Returns notes worth a warning, on the main rank only.

    Raises UserError on every rank alike, with the message of the first rank that has one: a rank
    whose disk lacks a file must not leave the others waiting, and no rank may open the run
    directory before all have looked.
    """
    notes: list[str] = []
    problem: str | None = None
    try:
        for check in checks:
            notes += check(cfg)
        # rank 0 alone writes
        if distributed.is_main() and has_directory and not cfg.run.dry_run:
            tracker.check(cfg.tracking)
            directory.check_directory(cfg)
    except UserError as error:
        problem = str(error)
    problems = [text for text in distributed.gather(problem) if text is not None]
    if problems:
        raise UserError(problems[0])
    return notes if distributed.is_main() else []


def check_backend(backend: RolloutBackend) -> list[str]:
    """vLLM is there where it is asked for; a note where ``auto`` goes without it. Raises
    UserError.
    """
    if runs_vllm(backend) or backend is RolloutBackend.hf:
        return []
    return ["rollout=auto: vLLM is not installed, so responses come from Hugging Face generate."]


def runs_vllm(backend: RolloutBackend) -> bool:
    """Whether responses come from vLLM, in this process or in servers. Raises UserError where it is
    asked for and missing.
    """
    try:
        return generator_of(backend) in (RolloutBackend.vllm, RolloutBackend.server)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_adapter(rollout: RolloutConfig, adapter: AdapterConfig) -> None:
    """The generator takes the adapter's weights in the form in which they are sent. Raises
    UserError.
    """
    carrier, vllm = carrier_of(rollout, adapter), runs_vllm(rollout.backend)
    if rollout.max_lora_rank is not None and carrier is not Carrier.lora:
        raise UserError(
            f"rollout.max_lora_rank={rollout.max_lora_rank} with "
            f"adapter.kind={adapter.kind.value}: no LoRA goes to the generator. Set "
            "rollout.max_lora_rank=null."
        )
    if adapter.kind is AdapterKind.none:
        if rollout.lora_sync is LoraSync.adapter:
            raise UserError(
                "rollout.lora_sync=adapter with adapter=none: there is no adapter to send. Set "
                "rollout.lora_sync=auto, or adapter=lora."
            )
        return
    sync, method = rollout.lora_sync, f"adapter.kind={adapter.kind.value}"
    if sync is LoraSync.adapter and carrier is Carrier.merged:
        what = f"{method} init={adapter.init.value} save_whole={list(adapter.save_whole)}"
        if adapter.dora:
            what = "adapter.dora=true"
        raise UserError(
            f"rollout.lora_sync=adapter with {what}: generation engines apply plain LoRA only, "
            "which this update is not. Set rollout.lora_sync=merged or auto."
        )
    if sync is LoraSync.merged and not facts_of(adapter).merges:
        raise UserError(
            f"rollout.lora_sync=merged: whole weights can't hold {method}. "
            "Set rollout.lora_sync=auto."
        )
    if vllm and carrier is Carrier.hf:
        raise UserError(f"rollout=vllm has no way for {method}. Set rollout=hf.")
    if adapter.kind in (AdapterKind.lora, AdapterKind.lora_mini):
        check_rank(rollout, adapter, adapter.rank, f"adapter.rank={adapter.rank}")


def check_rank(rollout: RolloutConfig, adapter: AdapterConfig, rank: int, given: str) -> None:
    """Raises UserError for a LoRA that the generator has no room for. given: the option that its
    `rank` follows from, as messages name it.
    """
    most = rollout.max_lora_rank
    if most is not None and most < rank:
        raise UserError(f"rollout.max_lora_rank={most} is below {given}: expected at least {rank}.")
    if runs_vllm(rollout.backend) and carrier_of(rollout, adapter) is Carrier.lora:
        try:
            vllm_lora_rank(rank, most, given)
        except ValueError as error:
            raise UserError(str(error)) from error
