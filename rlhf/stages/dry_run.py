"""``run.dry_run=true`` of a training stage: the launch command, the arithmetic of its batches, its
first rows as tokens, and its memory plan.

Tokenizers and data files are read; no weights are, and nothing is written but the file that the
environment variable `FACTS_FILE` names: the same as JSON, for the board.
"""

import json
import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf import published
from conf.run import LaunchKind
from conf.schema import Config
from conf.stages import OfflineStage, OnlineStage
from reward.terms import scoring_models
from rlhf.board.forms.looking import FACTS_FILE
from rlhf.checks import capacity, launch
from rlhf.checks.arithmetic import offline_arithmetic, online_arithmetic
from rlhf.checks.memory import fit
from rlhf.checks.memory.moments import Plan, machine_of
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import can_plan, shapes_of
from rlhf.checks.memory.states import GIB
from rlhf.checks.memory.tables import answers, plan_table, roles_of
from rlhf.cli import config
from rlhf.data import reading
from rlhf.data.formats import Use
from rlhf.data.preview import RowPreview, preview_row, render
from rlhf.process import redaction
from rlhf.run.console import console
from rlhf.run.directory import run_directory
from rlhf.stages import rows as stage_rows

LOG = logging.getLogger("rlhf")
Facts = dict[str, Any]
ROWS = 2  # shown as tokens where data.preview doesn't say how many


def show(cfg: Config, argv: Sequence[str]) -> None:
    """Print all that is known before weights load. Raises UserError for data that the stage could
    not train on.
    """
    print(config.to_yaml(cfg))
    facts: Facts = {}
    if isinstance(cfg.stage, (OfflineStage, OnlineStage)):
        facts = _show_training(cfg, argv)
    if FACTS_FILE in os.environ:
        text = json.dumps(facts, ensure_ascii=False, default=lambda member: member.value)
        Path(os.environ[FACTS_FILE]).write_text(text, encoding="utf-8")
    print(
        f"dry run: stage={cfg.stage.name} composes and passes its checks; no weights were loaded."
    )


def _show_training(cfg: Config, argv: Sequence[str]) -> Facts:
    for note in published.outside_range(cfg.stage, cfg.adapter.kind):
        LOG.warning(note)
    ranks = launch.count_ranks(cfg.engine, dry_run=True)
    started = ranks if cfg.launch.kind is LaunchKind.none else 1  # it starts the ranks itself
    print(f"launch: {launch_command(argv, started)}")
    tokenizer = stage_rows.tokenizer_of(cfg.model, reading.DataRequest.of(cfg))
    rows = read_rows(cfg, tokenizer)
    work: Facts = {"stage": cfg.stage.name, "steps": cfg.stage.steps}
    if isinstance(cfg.stage, OnlineStage):
        work["rows"] = cfg.stage.prompts_per_step * cfg.stage.samples_per_prompt
        stage, micro_tokens = cfg.stage_as(OnlineStage), cfg.engine.micro_tokens
        response = cfg.environment.longest(cfg.rollout.max_response_length)
        longest = cfg.data.max_prompt_length + response
        figures = online_arithmetic(stage, micro_tokens, longest, ranks, rows.count)
    else:
        batches = launch.plan_batches(cfg.stage.batch_size, cfg.engine, ranks)
        trained = stage_rows.count_trained(reading.DataRequest.of(cfg), tokenizer, batches.micro)
        figures = offline_arithmetic(cfg.stage, batches, rows.count, trained)
        work |= {"rows": cfg.stage.batch_size, "steps": launch.count_steps(cfg.stage, trained)}
    if cfg.engine.sequence_parallel > 1:
        sharing = launch.name_ranks(cfg.engine.sequence_parallel)
        figures["each row"] = f"shared by {sharing} (engine.sequence_parallel)"
    _print_figures("batches", figures)
    if rows.previews:
        console().print(render(rows.previews))
    facts = {"figures": figures, "rows": rows.count, "previews": list(map(asdict, rows.previews))}
    if can_plan(cfg.model):
        memory = _print_plan(cfg)
        facts |= {"memory": memory, "work": work | {"parameters": memory["parameters"]}}
    return facts


def launch_command(argv: Sequence[str], ranks: int) -> str:
    """The command that runs what `argv` describes, for a shell; secrets are left out."""
    arguments = []
    for argument in redaction.arguments(argv):
        if argument.lstrip("+").partition("=")[0] != "run.dry_run":
            arguments.append(argument)
    launcher = ["python"]
    if ranks > 1:
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(ranks)]
    return shlex.join([*launcher, "-m", "rlhf", *arguments])


@dataclass(frozen=True, slots=True)
class Rows:
    """The training rows: how many, and the first as tokens."""

    count: int
    previews: list[RowPreview]


def read_rows(cfg: Config, tokenizer: Any) -> Rows:
    """The training rows as the stage will have them. Raises UserError as the stage would for rows
    that don't fit, or prompts that are too long.
    """
    request = reading.DataRequest.of(cfg)
    use, shown = request.use, cfg.data.preview or ROWS
    if use is Use.prompt:
        loaded = reading.prompt_records(request)
        reading.tokenised(tokenizer, loaded, request)  # refuses those that are too long
        named = [
            (record.place, {"prompt": record.value, "tools": record.tools})
            for record in loaded.records[:shown]
        ]
        previews = _previews(tokenizer, use, named, cfg.data.max_prompt_length)
        return Rows(len(loaded.records), previews)
    read = {
        Use.sft: reading.sft_records,
        Use.preference: reading.preference_records,
        Use.unpaired: reading.unpaired_records,
    }[use]
    records = read(request)[0]
    # pairs of whole texts have no prompt
    prompt = {} if use is Use.sft else {"prompt": ""}
    first = [(record.place, prompt | record.value) for record in records[:shown]]
    return Rows(len(records), _previews(tokenizer, use, first, cfg.stage.max_length))


def _previews(
    tokenizer: Any, use: Use, rows: Sequence[tuple[str, dict[str, Any]]], limit: int
) -> list[RowPreview]:
    """Rows by their places."""
    return [preview_row(tokenizer, use, columns, place, limit) for place, columns in rows]


def _print_figures(title: str, figures: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in figures.items():
        table.add_row(name, value)
    console().print(table)


def _print_plan(cfg: Config) -> Facts:
    size, nodes = cfg.model.params, cfg.launch.nodes
    machine = machine_of(cfg.engine, size, all_devices=False, nodes=nodes)
    scoring = []
    if isinstance(cfg.stage, OnlineStage):
        scoring = scoring_models(cfg.reward, cfg.stage.watch)
    shapes, notes = shapes_of(cfg.model, scoring)
    planned = plan(cfg, shapes, machine)
    console().print(plan_table(planned, "memory plan"))
    for note in (*notes, *machine.notes, *planned.notes):
        print(f"  {note}")
    if planned.problem:
        print(f"  {planned.problem}")
    need, free = capacity.need_of(cfg, shapes), capacity.free_bytes(run_directory(cfg))
    verdict = "fits" if need.total <= free else "does not fit"
    print(
        f"  disk of run.dir: {need.count} checkpoints of {need.checkpoint / GIB:.2g} GiB at once "
        f"and the model: {need.total / GIB:.2g} GiB of {free / GIB:.1f} free: {verdict}"
    )
    verdict = "fits"
    if not planned.fits:
        remedy = "python -m rlhf stage=doctor with the same options says which setting does"
        verdict = f"does not fit: {remedy}"
    print(
        f"  peak {planned.device_gib:.1f} GiB of {planned.usable_gib:.1f} usable on each "
        f"{'device' if machine.cuda else 'rank'}: {verdict}"
    )
    facts = _plan_facts(planned, [*notes, *machine.notes, *planned.notes])
    facts |= {"disk_gib": need.total / GIB, "free_gib": free / GIB, "remedies": []}
    facts["parameters"] = shapes.policy.parameters
    if not planned.fits:
        facts["remedies"] = answers(fit.rows(cfg, shapes, machine), machine)
    return facts


def _plan_facts(planned: Plan, notes: Sequence[str]) -> Facts:
    """A plan as JSON has it, in GiB of a device or a rank."""
    peak = planned.peak()
    held = [name for name in roles_of(planned) if name in peak.roles]
    roles = {name: peak.roles[name].device / GIB for name in held}
    return {
        "peak_gib": planned.device_gib,
        "usable_gib": planned.usable_gib,
        "phase": peak.phase.value,
        "roles": roles,
        "fits": planned.fits,
        "problem": planned.obstacle,
        "notes": list(notes),
        "device": planned.machine.cuda,
    }
