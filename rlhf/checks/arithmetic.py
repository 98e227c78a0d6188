"""How the rows of a stage become optimizer steps, in words: for a dry run."""

import math

from conf.online import OnlineStage
from conf.stages import OfflineStage, SFTStage, TrainStage
from rlhf.checks import launch
from rlhf.checks.launch import BatchPlan


def online_arithmetic(
    stage: OnlineStage, micro_tokens: int, longest: int, ranks: int, prompts: int
) -> dict[str, str]:
    """How prompts become optimizer steps, over all ranks. `longest` is the longest prompt with its
    response, in tokens; `prompts` are in the data.
    """
    assert stage.steps is not None
    responses = stage.prompts_per_step * stage.samples_per_prompt
    updates = stage.epochs * stage.minibatches
    rows = math.ceil(responses / stage.minibatches / ranks)
    together = max(1, micro_tokens // longest)
    drawn = sum(stage.step_size(step) for step in range(stage.steps))
    return {
        "responses of a step": f"{stage.prompts_per_step} prompts x {stage.samples_per_prompt} "
        f"samples = {responses}, {_each(responses, ranks)}{_growth(stage)}",
        "optimizer steps of a step": f"{stage.epochs} epochs x {stage.minibatches} minibatches = "
        f"{updates}",
        "rows of an optimizer step": f"{responses} responses / {stage.minibatches} minibatches / "
        f"{launch.name_ranks(ranks)} = {rows} on each",
        "micro-batches": (
            f"at most {math.ceil(rows / together)} of {together} rows on each rank: "
            f"{micro_tokens} tokens (engine.micro_tokens) / {longest} of the longest row"
        ),
        "steps": f"{stage.steps} (stage.steps), {stage.steps * updates} optimizer steps, "
        f"{drawn * stage.samples_per_prompt} responses",
        "data": f"{drawn} prompts drawn from {prompts}: {drawn / prompts:.3g} passes",
    }


def offline_arithmetic(
    stage: OfflineStage, batches: BatchPlan, read: int, rows: int
) -> dict[str, str]:
    """How rows become optimizer steps, over all ranks; `read` rows are in the data, `rows` of them
    train, or so many packed ones.
    """
    steps = launch.count_steps(stage, rows)
    trained = sum(stage.step_size(step) for step in range(steps))
    whole = max(1, rows // stage.batch_size)
    kept = ""
    if isinstance(stage, SFTStage) and stage.packing:
        kept = f", packed into {rows}"
    elif rows != read:
        kept = f", of which {rows} can train"
    source = "stage.steps"
    if stage.steps is None:
        source = f"{stage.epochs:g} epochs x {whole} whole batches"
        if stage.batch_growth.steps:
            source = f"{stage.epochs:g} epochs"
    micro, accumulation = batches.micro, batches.accumulation
    parts = f"{micro} rows x {accumulation} micro-batches"
    if batches.tokens is not None:
        parts = f"{micro} rows in micro-batches of at most {batches.tokens} tokens"
    return {
        "rows of a step": f"{parts} x {launch.name_groups(batches.ranks, batches.sharing)} = "
        f"{micro * accumulation * batches.ranks} (stage.batch_size){_growth(stage)}",
        "steps": f"{steps} ({source})",
        "data": f"{read} training rows{kept}, {trained} trained: {trained / rows:.3g} passes",
    }


def _growth(stage: TrainStage) -> str:
    """How the first step's rows or prompts grow; nothing where they don't."""
    grown = zip(stage.batch_growth.steps, stage.step_sizes()[1:], strict=True)
    what = "prompts" if isinstance(stage, OnlineStage) else "rows"
    return "".join(f", {size} {what} after {at} steps" for at, size in grown)


def _each(total: int, ranks: int) -> str:
    return "all on one rank" if ranks == 1 else f"{total // ranks} on each of {ranks} ranks"
