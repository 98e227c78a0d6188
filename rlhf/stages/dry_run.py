"""``run.dry_run=true`` of a training stage: the launch command, the arithmetic of its batches, its
first rows as tokens, and its memory plan.

Tokenizers and data files are read; no weights are, and nothing is written.
"""

import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf import published
from conf.schema import Config
from conf.stages import OfflineStage, OnlineStage, SFTStage
from reward.checks import scoring_models
from rlhf.checks import capacity, launch
from rlhf.checks.launch import BatchPlan
from rlhf.checks.memory import GIB
from rlhf.checks.memory.moments import HEADROOM, machine_of
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import can_plan, shapes_of
from rlhf.checks.memory.tables import plan_table
from rlhf.cli import config
from rlhf.data import reading
from rlhf.data.formats import Use
from rlhf.data.formats.base import both_sides, columns_of
from rlhf.data.preview import RowPreview, preview_row, render
from rlhf.process import redaction
from rlhf.run.console import console
from rlhf.run.directory import run_directory
from rlhf.types import PreferencePair

LOG = logging.getLogger("rlhf")
ROWS = 2  # shown as tokens where data.preview doesn't say how many


def show(cfg: Config, argv: Sequence[str], stage_module: Any) -> None:
    """Print all that is known before weights load. `stage_module` is the stage's own module. Raises
    UserError for data that the stage could not train on.
    """
    print(config.to_yaml(cfg))
    if isinstance(cfg.stage, (OfflineStage, OnlineStage)):
        _show_training(cfg, argv, stage_module)
    print(
        f"dry run: stage={cfg.stage.name} composes and passes its checks; no weights were loaded."
    )


def _show_training(cfg: Config, argv: Sequence[str], stage_module: Any) -> None:
    for note in published.outside_range(cfg.stage, cfg.adapter.kind):
        LOG.warning(note)
    ranks = launch.count_ranks(cfg.engine, dry_run=True)
    print(f"launch: {launch_command(argv, ranks)}")
    tokenizer = tokenizer_of(cfg)
    rows = read_rows(cfg, tokenizer)
    if isinstance(cfg.stage, OnlineStage):
        figures = online_arithmetic(cfg, ranks, rows.count)
    else:
        batches = launch.plan_batches(cfg.stage.batch_size, cfg.engine.micro_batch_size, ranks)
        trained = stage_module.count_trained(reading.DataRequest.of(cfg), tokenizer, batches.micro)
        figures = offline_arithmetic(cfg.stage, batches, rows.count, trained)
    _print_figures("batches", figures)
    if rows.previews:
        console().print(render(rows.previews))
    if can_plan(cfg.model):
        _print_plan(cfg)


def launch_command(argv: Sequence[str], ranks: int) -> str:
    """The command that runs what `argv` describes, for a shell; secrets are left out."""
    arguments = [
        one
        for one in redaction.arguments(argv)
        if one.lstrip("+").partition("=")[0] != "run.dry_run"
    ]
    launcher = (
        ["python"] if ranks == 1 else ["torchrun", "--standalone", "--nproc_per_node", str(ranks)]
    )
    return shlex.join([*launcher, "-m", "rlhf", *arguments])


def tokenizer_of(cfg: Config) -> Any:
    """The tokenizer that the stage will have."""
    from rlhf.models.loading import load_or_train_tokenizer

    texts = reading.stage_texts(reading.DataRequest.of(cfg))
    return load_or_train_tokenizer(cfg.model, cfg.data.chat_template, texts)


@dataclass(frozen=True, slots=True)
class Rows:
    """The training rows: how many, and the first as tokens."""

    count: int
    previews: list[RowPreview]


def read_rows(cfg: Config, tokenizer: Any) -> Rows:
    """The training rows as the stage will have them. Raises UserError as the stage would for rows
    that don't fit, or prompts that are too long.
    """
    use, shown = reading.DataRequest.of(cfg).use, cfg.data.preview or ROWS
    if use is Use.prompt:
        prompts = reading.prompts(reading.DataRequest.of(cfg), tokenizer)
        columns = [{"prompt": prompt.source} for prompt in prompts[:shown]]
        return Rows(len(prompts), _previews(tokenizer, use, columns, cfg.data.max_prompt_length))
    values: list[Any]
    if use is Use.sft:
        values = reading.sft_rows(reading.DataRequest.of(cfg))[0]
    else:
        values = (
            reading.preference_pairs(reading.DataRequest.of(cfg))[0]
            if use is Use.preference
            else reading.judged_answers(reading.DataRequest.of(cfg))[0]
        )
    first: list[Any] = values[:shown]
    if use is Use.unpaired:
        first = [
            side
            for value in first
            for side in (both_sides(value) if isinstance(value, PreferencePair) else [value])
        ]
    return Rows(
        len(values),
        _previews(tokenizer, use, [columns_of(value, {}) for value in first], cfg.stage.max_length),
    )


def _previews(
    tokenizer: Any, use: Use, columns: Sequence[dict[str, Any]], limit: int
) -> list[RowPreview]:
    return [
        preview_row(tokenizer, use, one, f"training row {number}", limit)
        for number, one in enumerate(columns, start=1)
    ]


# ---- arithmetic ----


def online_arithmetic(cfg: Config, ranks: int, prompts: int) -> dict[str, str]:
    """How prompts become optimizer steps, over all ranks."""
    stage = cfg.stage_as(OnlineStage)
    assert stage.steps is not None
    responses = stage.prompts_per_step * stage.samples_per_prompt
    updates = stage.epochs * stage.minibatches
    longest = cfg.data.max_prompt_length + cfg.rollout.max_response_length
    rows = math.ceil(responses / stage.minibatches / ranks)
    together = max(1, cfg.engine.micro_tokens // longest)
    micro = math.ceil(rows / together)
    drawn = stage.steps * stage.prompts_per_step
    return {
        "responses of a step": f"{stage.prompts_per_step} prompts x {stage.samples_per_prompt} "
        f"samples = {responses}, {_each(responses, ranks)}",
        "optimizer steps of a step": f"{stage.epochs} epochs x {stage.minibatches} minibatches = "
        f"{updates}",
        "rows of an optimizer step": f"{responses} responses / {stage.minibatches} minibatches / "
        f"{launch.name_ranks(ranks)} = {rows} on each",
        "micro-batches": (
            f"at most {micro} of {together} rows on each rank: {cfg.engine.micro_tokens} tokens "
            f"(engine.micro_tokens) / {longest} of the longest row"
        ),
        "steps": f"{stage.steps} (stage.steps), {stage.steps * updates} optimizer steps, "
        f"{stage.steps * responses} responses",
        "data": f"{drawn} prompts drawn from {prompts}: {drawn / prompts:.3g} passes",
    }


def offline_arithmetic(
    stage: OfflineStage, batches: BatchPlan, read: int, rows: int
) -> dict[str, str]:
    """How rows become optimizer steps, over all ranks; `read` rows are in the data, `rows` of them
    train, or so many packed ones.
    """
    steps = launch.count_steps(stage, rows)
    whole = max(1, rows // stage.batch_size)
    kept = ""
    if isinstance(stage, SFTStage) and stage.packing:
        kept = f", packed into {rows}"
    elif rows != read:
        kept = f", of which {rows} can train"
    source = "stage.steps"
    if stage.steps is None:
        source = f"{stage.epochs:g} epochs x {whole} whole batches"
    micro, accumulation, ranks = batches.micro, batches.accumulation, batches.ranks
    return {
        "rows of a step": f"{micro} rows x {accumulation} micro-batches x "
        f"{launch.name_ranks(ranks)} = {micro * accumulation * ranks} (stage.batch_size)",
        "steps": f"{steps} ({source})",
        "data": f"{read} training rows{kept}, {steps * stage.batch_size} trained: "
        f"{steps * stage.batch_size / rows:.3g} passes",
    }


def _each(total: int, ranks: int) -> str:
    return "all on one rank" if ranks == 1 else f"{total // ranks} on each of {ranks} ranks"


def _print_figures(title: str, figures: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in figures.items():
        table.add_row(name, value)
    console().print(table)


def _print_plan(cfg: Config) -> None:
    machine = machine_of(cfg.engine, cfg.model.params, all_devices=False)
    scoring = []
    if isinstance(cfg.stage, OnlineStage):
        scoring = scoring_models(cfg.reward, cfg.stage.watch)
    shapes, notes = shapes_of(cfg.model, scoring)
    found = plan(cfg, shapes, machine)
    console().print(plan_table(found, "memory plan"))
    for note in (*notes, *machine.notes, *found.notes, *([found.problem] if found.problem else [])):
        print(f"  {note}")
    limit = HEADROOM * machine.device_gib
    verdict = (
        "fits"
        if found.fits
        else "does not fit: python -m rlhf stage=doctor with the same options says which setting "
        "does"
    )
    need, free = capacity.need_of(cfg, shapes), capacity.free_bytes(run_directory(cfg))
    held = (
        f"{need.count} checkpoints of {need.checkpoint / GIB:.2g} GiB at once and the model: "
        f"{need.total / GIB:.2g} GiB"
    )
    print(
        f"  disk of run.dir: {held} of {free / GIB:.1f} free: "
        f"{'fits' if need.total <= free else 'does not fit'}"
    )
    print(
        f"  peak {found.device_gib:.1f} GiB of {limit:.1f} usable on each "
        f"{'device' if machine.cuda else 'rank'}: {verdict}"
    )
