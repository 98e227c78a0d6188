"""Tasks for people: answers of policies (or of a run, or of a review queue), the pairs worth
asking, gold and repeated ones hidden among them.

The run directory holds the ledger (rlhf/labels/ledger.py), the files for annotators in out/, and
server.json where tasks went to a server. An export that is there is never made again:
run.resume=true writes the files that it lacks and pushes what was not pushed.
"""

import datetime
import json
import logging
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.choices import ChoiceMethod, LabelTarget
from conf.schema import Config
from reward.base import model_paths
from rlhf.data import mixture
from rlhf.labels.asking import ask, most_repeats, share_of
from rlhf.labels.checks_export import instructions_text, policies_of
from rlhf.labels.ledger import (
    EXPORT_FILE,
    OUT_FOLDER,
    SERVER_FILE,
    TASKS_FILE,
    read_export,
    write_export,
)
from rlhf.labels.records import Export, Role
from rlhf.run.context import RunContext, write_json
from rlhf.run.tracking.files import plain_config
from rlhf.stages.labelling.answers import Clock
from rlhf.stages.labelling.sources import answered, gold_tasks, require_scores, review
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.label")
_ASKED = (
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
_TOLD = (
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
_DECIDE: dict[str, tuple[str, ...] | None] = {
    "label": (*_ASKED, *_TOLD),
    "model": ("path", "gguf_file"),
    "data": None,
    "rollout": ("max_response_length", "temperature", "top_p", "top_k"),
    "reward": ("path", "function", "terms"),
}
_HOW = {
    LabelTarget.page: "open it in a browser, judge by keyboard, download the labels",
    LabelTarget.label_studio: "import the tasks with the labelling config (or label.push=true)",
    LabelTarget.argilla: "log the records into a dataset",
    LabelTarget.csv: "fill in the judgement columns",
    LabelTarget.xlsx: "fill in the judgement columns",
    LabelTarget.jsonl: "add the judgements to each line",
}


def export(ctx: RunContext) -> None:
    """Write an export, or go on with the one that is there. Raises UserError where nothing is left
    to ask, with the reason.
    """
    clock = Clock(ctx.watchdog)
    _register(ctx)
    made = existing(ctx.dir, ctx.cfg)
    if made is None:
        made = _make(ctx, clock)
        write_export(made, ctx.dir)
    else:
        LOG.info(
            "resume: export %s with %d tasks is there already, so nothing is generated.",
            made.id,
            len(made.tasks),
        )
    with clock.phase("write"):
        files = write_files(made, ctx.cfg.label.targets, ctx.dir)
    published = [
        ctx.dir / EXPORT_FILE,
        ctx.dir / TASKS_FILE,
        *(path for paths in files.values() for path in paths),
    ]
    known = {
        "export": made.id,
        "kind": made.kind.value,
        "tasks": len(made.tasks),
        **{k: made.details[k] for k in ("source", "policies", "seed")},
    }
    ctx.publish(f"{ctx.cfg.run.name}-export", "label-export", published, known)
    ctx.watchdog.phase("push")
    project = _push(ctx, made)
    ctx.watchdog.phase("finish")
    _finish(ctx, made, clock, files, project)


def _register(ctx: RunContext) -> None:
    """The manifest names what the export is made of."""
    cfg, label = ctx.cfg, ctx.cfg.label
    policies = policies_of(cfg.label, cfg.model.path)
    for path in policies.values():
        ctx.add_parent("policy", path)
    for _, path in model_paths(cfg.reward):
        ctx.add_parent("reward", path)
    for path in label.samples:
        ctx.add_parent("samples", Path(path).parent)
        ctx.add_data(path)
    if label.review is not None:
        ctx.add_parent("review", Path(label.review).parent)
        ctx.add_data(label.review)
    gold = (
        []
        if label.gold_path is None
        else mixture.one_source(label.gold_path, "label.gold_path").parts
    )
    for file in [
        *(mixture.data_files(cfg) if label.review is None else []),
        *(file for part in gold for file in part.files),
    ]:
        ctx.add_data(file)


def options_of(cfg: Config) -> dict[str, Any]:
    """The options that decided what is in an export, as far as they are not the defaults; those of
    targets, servers and imports may change.
    """
    given, usual = plain_config(cfg), plain_config(Config(stage=cfg.stage))
    out = {"run.seed": cfg.run.seed}
    for group, keys in _DECIDE.items():
        out |= {
            f"{group}.{key}": given[group][key]
            for key in keys or given[group]
            if given[group][key] != usual[group][key]
        }
    return out


def existing(folder: Path, cfg: Config) -> Export | None:
    """The export that an earlier start wrote there. Raises UserError where this start asks for
    another one; preflight calls it, too.
    """
    if not (folder / EXPORT_FILE).is_file():
        return None
    made = read_export(folder)
    old, new = made.details.get("options", {}), json.loads(json.dumps(options_of(cfg)))
    changed = [
        f"{key}: {old.get(key, 'default')!r} -> {new.get(key, 'default')!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder / EXPORT_FILE} was made with other options ({'; '.join(changed)}), and "
            "people may be labelling it. Go on with the options that "
            "it was made with (label.targets and label.push may change), or choose another "
            "run.name."
        )
    return made


def _make(ctx: RunContext, clock: Clock) -> Export:
    """Answers, choice, gold and repeats, sides: everything of an export but its files."""
    cfg, label = ctx.cfg, ctx.cfg.label
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = review(cfg) if label.review is not None else answered(ctx, clock)
    main = found.questions
    if label.prelabel:
        require_scores(
            (answer.score for question in main for answer in question.answers),
            "label.prelabel=true",
        )
    gold = gold_tasks(cfg, main)
    repeats = share_of(label.repeat_share, len(main))
    most = most_repeats(len(main), len(gold))
    if repeats > most:
        LOG.warning(
            "label.repeat_share=%g: with so few tasks a repeat would stand beside its first, so "
            "there are %d.",
            label.repeat_share,
            most,
        )
    asked = ask(main, gold, repeats=min(repeats, most), seed=cfg.run.seed, created=created)
    if asked.origins:
        found.details["origins"] = asked.origins
    details = found.details | {
        "choice": dict(label.choice) or {ChoiceMethod.random.value: 1.0},
        "budget": label.budget,
        "seed": cfg.run.seed,
        "counts": found.counts,
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


def write_files(
    made: Export, targets: Sequence[LabelTarget], folder: Path
) -> dict[LabelTarget, list[Path]]:
    """The files for annotators by target. A file that is there stays as it is: it may hold labels
    by now.
    """
    from rlhf.labels.targets import TARGETS

    out, beside = folder / OUT_FOLDER, folder / (OUT_FOLDER + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    files: dict[LabelTarget, list[Path]] = {}
    for target in targets:
        part = beside / target.value
        part.mkdir(parents=True)
        files[target] = []
        for path in TARGETS[target].write(made, part):
            place = out / path.relative_to(part)
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
            files[target].append(place)
    shutil.rmtree(beside, ignore_errors=True)
    return files


def _push(ctx: RunContext, made: Export) -> int | None:
    """The project that the tasks are in on the server, which is made once. Raises UserError as the
    server does; the export stays whole.
    """
    label, record = ctx.cfg.label, ctx.dir / SERVER_FILE
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if known is not None:
        ctx.record("server", known)
    if not label.push:
        return None if known is None else int(known["project"])
    if known is not None and known["url"] != label.url:
        raise UserError(
            f"{record}: this export is project {known['project']} of {known['url']} already, so "
            f"it can't go to {label.url} too. Make another."
        )
    if known is not None:
        LOG.info(
            "resume: the tasks are in project %s of %s already.", known["project"], known["url"]
        )
        return int(known["project"])
    from rlhf.labels.server import push

    assert label.url is not None, "the configuration refuses label.push without label.url"
    try:
        project = push(made, url=label.url, token=os.environ[label.token_env])
    except UserError as error:
        raise UserError(
            f"{error} Nothing is lost: the export is in {ctx.dir}. Push it again with the same "
            "options and run.resume=true."
        ) from error
    write_json(record, {"url": label.url, "project": project})
    ctx.record("server", {"url": label.url, "project": project})
    return project


def _metrics(made: Export, seconds: Mapping[str, float]) -> dict[str, float]:
    roles = {"main": Role.main, "gold": Role.gold, "repeats": Role.repeat}
    metrics: dict[str, float] = {"label/tasks": len(made.tasks)}
    metrics |= {
        f"label/{name}": sum(task.role is role for task in made.tasks)
        for name, role in roles.items()
    }
    metrics |= {f"label/{name}": count for name, count in made.details["counts"].items()}
    for task in made.tasks:
        if task.role is Role.main:
            metrics[f"label/chosen_{task.chosen_by}"] = (
                metrics.get(f"label/chosen_{task.chosen_by}", 0) + 1
            )
    return metrics | {
        f"time/{name}_s": value for name, value in {**made.details["seconds"], **seconds}.items()
    }


def next_command(cfg: Config, project: int | None) -> str:
    """What brings the labels back."""
    where = [
        "run.name=" + cfg.run.name,
        *([] if cfg.run.dir == "runs" else ["run.dir=" + cfg.run.dir]),
    ]
    back = (
        ["label.files=[FILE]"]
        if project is None
        else ["label.pull=true", f"label.url={cfg.label.url}"]
    )
    return " ".join(
        ["python -m rlhf stage=label label.mode=import", *map(shlex.quote, where), *back]
    )


def _finish(
    ctx: RunContext,
    made: Export,
    clock: Clock,
    files: Mapping[LabelTarget, Sequence[Path]],
    project: int | None,
) -> None:
    metrics = _metrics(made, clock.seconds)
    ctx.tracker.log(0, metrics)
    ctx.record("export", {"id": made.id, "tasks": len(made.tasks)})
    counts = made.details["counts"]
    shown: dict[str, Any] = {
        "tasks": f"{metrics['label/tasks']:.0f}, of which gold {metrics['label/gold']:.0f}, "
        f"repeated {metrics['label/repeats']:.0f}"
    }
    shown["prompts"] = str(counts["prompts"])
    if "ab" in made.details:
        ab = made.details["ab"]
        shown["A/B"] = (
            f"{' against '.join(ab['policies'])}: {ab['asked']} pairs of {ab['pairs']} planned, "
            f"{ab['identical']} prompts answered alike"
        )
    shown |= {f"to label ({target.value})": _HOW[target] for target in files}
    if project is not None:
        shown["server"] = f"project {project}"
    places: dict[str, Path | str] = {"ledger (not for annotators)": ctx.dir / TASKS_FILE}
    places |= {
        target.value if i == 0 else f"{target.value} {i + 1}": path
        for target, paths in files.items()
        for i, path in enumerate(paths)
    }
    ctx.finish(
        steps=1,
        metrics=metrics,
        model=None,
        figures=shown,
        files=places,
        next_command=next_command(ctx.cfg, project),
    )
