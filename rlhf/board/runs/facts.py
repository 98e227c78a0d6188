"""What a run's manifest says, how the run goes on, and which stages its results lead to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from rlhf.board.paths import run_and_stage, run_link
from rlhf.board.runs.listing import Stage
from rlhf.cli.presets import choices, stage_schema
from rlhf.cli.writing import override
from rlhf.process.redaction import REDACTED
from rlhf.types import UserError

_HASH_LENGTH = 12  # digits of a hash that a page shows
# Options of a start that a resume sets itself.
_OWN = ("run.resume", "run.overwrite", "run.dry_run", "run.dir", "run.name")
# Schemas of stages -> the stages that may follow on their model.
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "sft": ("reward", "dpo", "ppo"),
    "reward": ("ppo",),
    **dict.fromkeys(("dpo", "kto", "cpo", "orpo", "ppo"), ()),
}
_USES = ("eval", "chat", "export")  # of any model that writes


@dataclass(frozen=True, slots=True)
class Input:
    """What a run was made of: its kind, its path, a mark that tells versions apart, and the page of
    the run that made it, "" for none here.
    """

    kind: str
    path: str
    mark: str
    link: str


@dataclass(frozen=True, slots=True)
class Next:
    """A stage that may follow, and the page where it begins."""

    name: str
    link: str


def inputs(manifest: Mapping[str, Any], stage: Stage, runs: Path) -> list[Input]:
    """Models and data that the manifest names."""
    entries = [*_list(manifest, "parents")]
    entries += [{"kind": "data", **entry} for entry in _list(manifest, "data")]
    out = []
    for entry in entries:
        mark = str(entry.get("sha256") or entry.get("weights") or "")[:_HASH_LENGTH]
        kind, path = str(entry.get("kind", "")), str(entry.get("path", ""))
        out.append(Input(kind, path, mark, _origin(entry, stage, runs)))
    return out


def _list(manifest: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = manifest.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _origin(entry: Mapping[str, Any], stage: Stage, runs: Path) -> str:
    """The page of the run that an input comes from, where that is a run of this run.dir."""
    source = entry.get("from")
    if not isinstance(source, dict) or not isinstance(source.get("run"), str):
        return ""
    folder = stage.folder / source["run"]
    made = run_and_stage(folder, runs)
    return run_link(*made) if made is not None and folder.is_dir() else ""


def starts(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The starts of a run, the first one first."""
    return _list(manifest, "starts")


def command(argv: Sequence[str]) -> str:
    """A command line for a shell."""
    import shlex

    return shlex.join(["python", "-m", "rlhf", *argv])


def resume_argv(manifest: Mapping[str, Any] | None, stage: Stage, runs: Path) -> list[str]:
    """The command line of the run's last start, to go on from its last checkpoint. Raises UserError
    where it isn't known.
    """
    held = starts(manifest or {})
    argv = held[-1].get("argv") if held else None
    if not isinstance(argv, list) or not argv:
        raise UserError(
            f"{stage.folder}: its manifest.json has no command line (starts, argv), so the page "
            "can't resume the run. Start it from a terminal with run.resume=true."
        )
    kept = []
    for argument in map(str, argv):
        key = argument.partition("=")[0].lstrip("+")
        if REDACTED in argument:
            raise UserError(
                f"{key}: its value was a secret, which manifest.json does not keep ({argument}). "
                "Start the run from a terminal, with that value and run.resume=true."
            )
        if key not in _OWN:
            kept.append(argument)
    own = [override("run.dir", str(runs)), override("run.name", stage.run), "run.resume=true"]
    return [*kept, *own]


def following(stage: Stage, stages: Sequence[Stage], manifest: Mapping[str, Any]) -> list[Next]:
    """What stages may follow a stage that has ended, each with its form filled in."""
    name = None if stage.summary is None else stage.summary.get("model")
    if not isinstance(name, str) or stage.stage not in choices("stage"):
        return []
    schema = stage_schema(stage.stage)
    model = str(stage.folder / name)
    out = []
    for follower in _FOLLOWS.get(schema, ()):
        options = {"run.name": stage.run}
        if schema == "reward":
            options |= {"reward.path": model, **_policy_beside(stage, stages)}
        else:
            options |= {"model.path": model}
        if follower == "ppo" and schema != "reward":
            options |= _reward_beside(stage, stages)
        out.append(Next(follower, f"/new/{follower}?{urlencode(options)}"))
    if schema in _FOLLOWS and schema != "reward":
        out += _uses(stage, model, manifest)
    return out


def _model_of(wanted: str, stage: Stage, stages: Sequence[Stage]) -> str | None:
    """The model of another stage of the same run, where that has ended."""
    for other in stages:
        if (other.run, other.stage) == (stage.run, wanted) and other.summary is not None:
            name = other.summary.get("model")
            return str(other.folder / name) if isinstance(name, str) else None
    return None


def _policy_beside(stage: Stage, stages: Sequence[Stage]) -> dict[str, str]:
    model = _model_of("sft", stage, stages)
    return {} if model is None else {"model.path": model}


def _reward_beside(stage: Stage, stages: Sequence[Stage]) -> dict[str, str]:
    model = _model_of("reward", stage, stages)
    return {} if model is None else {"reward.path": model}


def _uses(stage: Stage, model: str, manifest: Mapping[str, Any]) -> list[Next]:
    policies = [entry for entry in _list(manifest, "parents") if entry.get("kind") == "policy"]
    compared = {"run.name": stage.run, "stage.after": model}
    if policies:
        compared["stage.before"] = str(policies[-1].get("path", ""))
    exported = {"run.name": stage.run, "model.path": model}
    return [
        Next("eval", f"/new/eval?{urlencode(compared)}"),
        Next("chat", f"/chat?{urlencode({'model': model})}"),
        Next("export", f"/new/export?{urlencode(exported)}"),
    ]
