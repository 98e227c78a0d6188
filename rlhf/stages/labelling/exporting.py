"""Tasks for people: the pairs worth asking, gold and repeated ones hidden among them.

The run directory holds the ledger (rlhf/labels/ledger.py), the files for annotators in out/, and
server.json where tasks went to a server. An export that exists is never made again:
run.resume=true writes the files that it lacks and pushes what was not pushed.
"""

import datetime
import logging
import os
from pathlib import Path
from typing import Any

from conf.choices import ChoiceMethod
from conf.labelling import LabelConfig
from conf.schema import Config
from reward.base import model_paths
from rlhf.data import sources
from rlhf.data.loading import DataRequest
from rlhf.labels import export_figures
from rlhf.labels.asking import ask, repeat_count
from rlhf.labels.checks_export import instructions_text, policies_of
from rlhf.labels.ledger import EXPORT_FILE, TASKS_FILE, read_resumable, write_export
from rlhf.labels.records import Export
from rlhf.labels.selection import require_scores
from rlhf.labels.server import push_once, pushed_to
from rlhf.labels.targets import write_files
from rlhf.process.supervision import Clock
from rlhf.run.context import RunContext
from rlhf.run.tracking.files import plain_config
from rlhf.stages.labelling.sources import select, select_gold

LOG = logging.getLogger("rlhf.stages.label")
# what is asked
_QUESTION_OPTIONS = (
    "policies",
    "samples",
    "review",
    "prompts",
    "responses",
    "kind",
    "group",
    "budget",
    "choice",
    "vectors",
    "gold_path",
    "gold_share",
)
# how annotators see it
_TASK_OPTIONS = (
    "repeat_share",
    "title",
    "instructions",
    "ratings",
    "comments",
    "prelabel",
    "overlap",
    "ab",
)
# options that decide what an export holds, by group; None: all of the group
_CONTENT_OPTIONS: dict[str, tuple[str, ...] | None] = {
    "label": (*_QUESTION_OPTIONS, *_TASK_OPTIONS),
    "model": ("path", "gguf_file"),
    "data": None,
    "rollout": ("max_response_length", "temperature", "top_p", "top_k"),
    "reward": ("path", "function", "terms"),
}


def export(ctx: RunContext) -> None:
    """Write an export, or continue with the one that exists. Raises UserError where nothing is left
    to ask, with the reason.
    """
    cfg = ctx.cfg
    clock = Clock(ctx.watchdog)
    _record_origins(ctx)
    made = read_resumable(ctx.dir, options_of(cfg))
    if made is None:
        made = _make(cfg, ctx.dir, clock)
        write_export(made, ctx.dir)
    else:
        LOG.info(
            "resume: export %s with %d tasks exists already, so nothing is generated.",
            made.id,
            len(made.tasks),
        )
    with clock.phase("write"):
        files = write_files(made, cfg.label.targets, ctx.dir)
    published = [ctx.dir / EXPORT_FILE, ctx.dir / TASKS_FILE]
    for paths in files.values():
        published += paths
    metadata = {
        "export": made.id,
        "kind": made.kind.value,
        "tasks": len(made.tasks),
        **{key: made.details[key] for key in ("source", "policies", "seed")},
    }
    ctx.publish(f"{cfg.run.name}-export", "label-export", published, metadata)
    ctx.watchdog.phase("push")
    server = _push(cfg.label, ctx.dir, made)
    project = None
    if server is not None:
        ctx.record("server", server)
        project = int(server["project"])
    ctx.watchdog.phase("finish")
    metrics = export_figures.metrics_of(made, clock.seconds)
    ctx.tracker.log(0, metrics)
    ctx.record("export", {"id": made.id, "tasks": len(made.tasks)})
    ctx.finish(
        steps=1,
        metrics=metrics,
        model=None,
        figures=export_figures.shown_figures(made, metrics, list(files), project),
        files=export_figures.shown_files(ctx.dir / TASKS_FILE, files),
        next_command=export_figures.import_command(
            cfg.run.name, cfg.run.dir, cfg.label.url, project
        ),
    )


def _record_origins(ctx: RunContext) -> None:
    """Record in the manifest what the export is made of."""
    cfg, label = ctx.cfg, ctx.cfg.label
    for path in policies_of(label, cfg.model.path).values():
        ctx.add_parent("policy", path)
    for _, path in model_paths(cfg.reward):
        ctx.add_parent("reward", path)
    for path in label.samples:
        ctx.add_parent("samples", Path(path).parent)
        ctx.add_data(path)
    if label.review is None:
        files = list(sources.data_files(cfg.data))
    else:
        ctx.add_parent("review", Path(label.review).parent)
        ctx.add_data(label.review)
        files = []
    if label.gold_path is not None:
        for part in sources.one_source(label.gold_path, "label.gold_path").parts:
            files += part.files
    for file in files:
        ctx.add_data(file)


def options_of(cfg: Config) -> dict[str, Any]:
    """The options that decide what is in an export, as far as they are not the defaults. Those of
    targets, servers and imports may change.
    """
    given, defaults = plain_config(cfg), plain_config(Config(stage=cfg.stage))
    options = {"run.seed": cfg.run.seed}
    for group, keys in _CONTENT_OPTIONS.items():
        for key in keys or given[group]:
            if given[group][key] != defaults[group][key]:
                options[f"{group}.{key}"] = given[group][key]
    return options


def _make(cfg: Config, folder: Path, clock: Clock) -> Export:
    """Everything of an export but its files: answers, choice, gold and repeated tasks, sides."""
    label = cfg.label
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    selection = select(cfg, folder, clock)
    main = selection.questions
    if label.prelabel:
        scores = (answer.score for question in main for answer in question.answers)
        require_scores(scores, "label.prelabel=true")
    gold = select_gold(main, label, DataRequest.of(cfg), cfg.model, cfg.reward)
    repeats = repeat_count(label.repeat_share, len(main), len(gold))
    asked = ask(main, gold, repeats=repeats, seed=cfg.run.seed, created=created)
    details = dict(selection.details)
    if asked.origins:
        details["origins"] = asked.origins
    details |= {
        "choice": dict(label.choice) or {ChoiceMethod.random.value: 1.0},
        "budget": label.budget,
        "seed": cfg.run.seed,
        "counts": selection.counts,
        "seconds": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        "options": options_of(cfg),
    }
    return Export(
        id=asked.id,
        kind=label.kind,
        title=label.title,
        instructions=instructions_text(label.instructions),
        ratings=label.ratings,
        comments=label.comments,
        created=created,
        tasks=asked.tasks,
        prelabel=label.prelabel,
        overlap=label.overlap,
        details=details,
    )


def _push(label: LabelConfig, folder: Path, made: Export) -> dict[str, Any] | None:
    """{"url", "project"} of the server that the tasks are on; None where they are on none. Raises
    UserError as the server does, with the export kept.
    """
    if not label.push:
        return pushed_to(folder)
    assert label.url is not None, "the configuration refuses label.push without label.url"
    return push_once(made, folder, url=label.url, token=os.environ[label.token_env])
