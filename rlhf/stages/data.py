"""``stage=data``: rows of any format through the steps of data.pipeline into train.jsonl and
eval.jsonl, with what was left out and why.

The run directory holds, beside the files of every run, train.jsonl, eval.jsonl (after a split, or
with data.eval_path), rejected.jsonl (step, reason, file, row, content), and steps/ with each step's
rows, from which run.resume=true goes on.
"""

import dataclasses
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from conf.schema import Config, DataConfig, ModelConfig
from rlhf.data.formats import Use
from rlhf.data.prepare import ingest
from rlhf.data.prepare.held import gathered
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.outputs import (
    SPLITS,
    Outputs,
    next_command,
    step_metrics,
    table_row,
    write_targets,
    written_rows,
)
from rlhf.data.prepare.pipeline import stream, write_rejected
from rlhf.data.prepare.store import StepReport
from rlhf.data.sources import data_files
from rlhf.process import distributed
from rlhf.process.files import sha256
from rlhf.process.randomness import seed_everything
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.data")


def check(cfg: Config) -> list[str]:
    """The sources are there, and the steps can run on what they hold. Raises UserError."""
    distributed.require_one_process("stage=data", "Run it without torchrun.")
    ingest.check(cfg)
    return []


def run(ctx: RunContext) -> None:
    """Prepare the rows of data.path (and data.eval_path). Raises UserError where nothing is left to
    train on.
    """
    with ctx.closing():
        _run(ctx)


def _run(ctx: RunContext) -> None:
    cfg = ctx.cfg
    ctx.watchdog.phase("hash")
    kind = ingest.kind_of(cfg.data)
    formats = ", ".join(dict.fromkeys(ingest.formats_read(cfg.data, kind).values()))
    steps = ingest.steps_of(cfg.data, cfg.run.seed, kind)
    hashes = {str(path): str(ctx.add_data(path)) for path in data_files(cfg.data)}
    identity = ingest.identity(cfg.data, cfg.run.seed, kind, hashes)
    if identity is None and cfg.data.cache:
        LOG.info(
            "Rows of a hub may change, so no step's rows are kept: every run starts from the "
            "first step."
        )
    scorer = None
    if any(step.options.torch for step in steps):
        _set_torch_up(cfg.engine.threads, cfg.run.seed)
        from rlhf.stages.pair_scores import pair_scorer

        scorer = pair_scorer(cfg.reward.batch_tokens)
    held_out = cfg.data.eval_path is not None
    done: list[StepReport] = []
    rows = stream(
        ingest.reader(cfg.data, cfg.run.seed, kind, ctx.dir),
        steps,
        kind=kind,
        folder=ctx.dir,
        done=done,
        identity=identity,
        held_out=held_out,
        keep=cfg.data.cache,
        score_pairs=scorer,
        alive=ctx.watchdog.alive,
    )
    ctx.watchdog.phase("steps")
    outputs = Outputs(ctx.dir)
    examined: Sequence[Item] = ()
    try:
        if cfg.data.report:  # it looks at all rows together
            examined = gathered(outputs.written(rows), ctx.dir)
        else:
            for item in rows:
                outputs.write(item)
    except BaseException:
        outputs.abandon()
        raise
    ctx.watchdog.phase("write")
    files = outputs.close(held_out=held_out or any(step.options.splits for step in steps))
    files["rejected"] = write_rejected(ctx.dir, done)
    files |= write_targets(cfg.data, kind, files, ctx.dir)
    ctx.watchdog.phase("report")
    if examined:
        files |= _examine(
            cfg.data, cfg.model, kind, examined, done, folder=ctx.dir, seed=cfg.run.seed
        )
    _report(ctx, kind, formats, done, outputs, files)
    if cfg.data.preview:
        _preview(cfg.data, cfg.model, kind, files["train"])


def _set_torch_up(threads: int | None, seed: int) -> None:
    """What the other stages do at their start: torch takes seconds to import, and few steps load a
    model.
    """
    distributed.name_accelerator()
    distributed.set_threads(threads)
    seed_everything(seed)


def _preview(data: DataConfig, model: ModelConfig, kind: Use, path: Path) -> None:
    """Show the first rows' tokens in colour, as the model of model.path reads them."""
    from rlhf.data.preview import preview_row, render
    from rlhf.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model, data.chat_template)
    limit = data.max_prompt_length if kind is Use.prompt else None
    rows = [
        preview_row(tokenizer, kind, item.columns, item.place, limit)
        for item in islice(written_rows(path), data.preview)
    ]
    console.console().print(render(rows))


def _examine(
    data: DataConfig,
    model: ModelConfig,
    kind: Use,
    items: Sequence[Item],
    done: Sequence[StepReport],
    *,
    folder: Path,
    seed: int,
) -> dict[str, Path]:
    """data.report=true: write report.json and report.html into `folder`, and print their tables."""
    from rlhf.data.report.staged import of_stage
    from rlhf.data.report.terminal import tables

    report = of_stage(data, model, kind, items, done, folder, seed)
    for table in tables(report):
        console.console().print(table)
    return {f"report ({suffix})": path for suffix, path in report.files.items()}


def _report(
    ctx: RunContext,
    kind: Use,
    formats: str,
    done: Sequence[StepReport],
    outputs: Outputs,
    files: dict[str, Path],
) -> None:
    """The table of the steps, their metrics, the manifest and the closing panel."""
    rows = outputs.rows
    for report in done:
        ctx.tracker.log(report.number, step_metrics(report))
    console.table([table_row(report) for report in done], title=f"Preparation of {kind.value} rows")
    if not rows["train"]:
        raise UserError(
            f"No row is left to train on: every one was left out by a step. {files['rejected']} "
            "says which, and why."
        )
    splits = [report for report in done if report.step == "split"]
    if splits:
        ctx.record("split", splits[0].figures)
    ctx.record("kind", kind.value)
    ctx.record("steps", [dataclasses.asdict(report) for report in done])
    ctx.record(
        "outputs",
        [
            {"path": str(path), "rows": rows.get(name), "sha256": sha256(path)}
            for name, path in files.items()
        ],
    )
    published = [path for name, path in files.items() if name.split()[0] in SPLITS]
    ctx.publish(
        f"{ctx.cfg.run.name}-data",
        "dataset",
        published,
        {"kind": kind.value, "rows": {name: rows.get(name) for name in SPLITS}},
    )
    figures = {
        "read as": formats,
        "rows read": done[0].rows_in,
        "to train on": rows["train"],
        "held out": rows["eval"],
        "left out": sum(r.rejected for r in done),
    }
    metrics = {
        "data/rows_read": done[0].rows_in,
        "data/rows_train": rows["train"],
        "data/rows_eval": rows["eval"],
    }
    metrics |= {f"rejected/{report.number:02d}-{report.step}": report.rejected for report in done}
    ctx.finish(
        steps=len(done) - 1,
        metrics=metrics,
        model=None,
        figures={name: str(value) for name, value in figures.items()},
        files=files,
        next_command=next_command(kind, files, ctx.cfg.data, outputs.examples),
    )
