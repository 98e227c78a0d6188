"""What a search leaves for people: the trials as lines and as a table, the best settings, the
importance of each option, plots.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.process.files import json_value
from rlhf.search.plots import plot_front, plot_history, plot_importance
from rlhf.search.study import Study
from rlhf.search.trials import State, Trial

TRIALS_FILE, TABLE_FILE = "trials.jsonl", "trials.md"
PLOTS = "plots"
# What a trial's stage leaves that is large, and what a kept trial is kept for.
_WEIGHTS = ("model", "adapter", "checkpoints", "start", "best", "unrounded")


def write_trials(study: Study, folder: Path) -> None:
    """trials.jsonl: a line a trial, in the order of their numbers; whole at any time."""
    names = list(study.plan.directions)
    text = ""
    for trial in study.trials():
        line = json.dumps(row(trial, names), ensure_ascii=False)
        text += f"{line}\n"
    beside = folder / f"{TRIALS_FILE}.tmp"
    beside.write_text(text, encoding="utf-8")
    beside.replace(folder / TRIALS_FILE)


def row(trial: Trial, names: Sequence[str]) -> dict[str, Any]:
    """A trial as a JSON object; `names`: the objectives'."""
    values = None
    if trial.values:
        values = dict(zip(names, trial.values, strict=False))
    out: dict[str, Any] = json_value(
        {
            "number": trial.number,
            "state": trial.state.value,
            "setting": dict(trial.setting),
            "values": values,
            "last": trial.last,
            "reason": trial.reason or None,
            "steps": trial.steps,
            "seconds": trial.seconds,
        }
    )
    return out


def counts(trials: Sequence[Trial]) -> dict[str, int]:
    """How many trials stand how."""
    out = {state.value: 0 for state in State}
    for trial in trials:
        out[trial.state.value] += 1
    return out


def steps_done(trials: Sequence[Trial]) -> int:
    """Steps that all trials trained."""
    return sum(trial.steps or 0 for trial in trials)


def importances(study: Study) -> dict[str, dict[str, float]]:
    """Shares of each option, by objective; empty for an objective that says nothing."""
    return {name: study.importance(name) for name in study.plan.directions}


def write_report(
    study: Study, folder: Path, shares: Mapping[str, Mapping[str, float]], commands: Sequence[str]
) -> list[Path]:
    """trials.md and the plots. `commands` run the best settings. Returns the plots."""
    plots = folder / PLOTS
    plots.mkdir(exist_ok=True)
    drawn = []
    trials, best = study.trials(), study.best()
    directions = study.plan.directions
    for place, (name, direction) in enumerate(directions.items()):
        path = plots / f"history_{_file_name(name)}.png"
        if plot_history(trials, place, name, direction, path):
            drawn.append(path)
        path = plots / f"importance_{_file_name(name)}.png"
        if shares[name]:
            plot_importance(shares[name], name, path)
            drawn.append(path)
    if len(directions) > 1 and best:
        path = plots / "front.png"
        plot_front(trials, best, list(directions), path)
        drawn.append(path)
    text = table(study, shares, commands)
    (folder / TABLE_FILE).write_text(text, encoding="utf-8")
    return drawn


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def table(study: Study, shares: Mapping[str, Mapping[str, float]], commands: Sequence[str]) -> str:
    """All of it as Markdown, the best first."""
    names = list(study.plan.directions)
    trials = study.trials()
    best = study.best()
    lines = ["# Search", ""]
    lines += [_summary(trials), ""]
    title = "Best setting" if len(names) == 1 else "Pareto front"
    lines += [f"## {title}", ""]
    lines += _rows(best, names)
    lines += [""]
    lines += [f"    {command}" for command in commands]
    for name in names:
        lines += ["", f"## Importance for {name}", ""]
        lines += _importance_rows(study, shares[name])
    rest = [trial for trial in trials if trial not in best]
    lines += ["", "## Other trials", ""]
    lines += _rows(rest, names)
    return "\n".join(lines) + "\n"


def _summary(trials: Sequence[Trial]) -> str:
    """How many trials there are, how they stand, and their steps."""
    counted = []
    for state, number in counts(trials).items():
        if number:
            counted.append(f"{number} {state}")
    return f"{len(trials)} trials: {', '.join(counted)}; {steps_done(trials)} steps."


def _rows(trials: Sequence[Trial], names: Sequence[str]) -> list[str]:
    if not trials:
        return ["none"]
    keys: list[str] = []
    for trial in trials:
        keys += [key for key in trial.setting if key not in keys]
    header = ["trial", "state", *names, *keys, "steps", "note"]
    lines = [_line(header), "|" + " --- |" * len(header)]
    for trial in trials:
        values = [f"{value:.6g}" for value in trial.values]
        if not values:
            values = [""] * len(names)
        setting = [_shown(trial.setting.get(key, "")) for key in keys]
        steps = "" if trial.steps is None else str(trial.steps)
        note = _escaped(trial.reason).replace("\n", " ")
        state = trial.state.value
        lines.append(_line([str(trial.number), state, *values, *setting, steps, note]))
    return lines


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    joined = " | ".join(cells)
    return f"| {joined} |"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return _escaped(str(value))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _importance_rows(study: Study, shares: Mapping[str, float]) -> list[str]:
    if not shares:
        return ["Not known: fewer than two complete trials, or all alike."]
    lines = ["| option | share of the variance |", "| --- | --- |"]
    lines += [f"| {key} | {share:.3f} |" for key, share in shares.items()]
    missing = [each.key for each in study.plan.parameters if each.key not in shares]
    if missing:
        lines += ["", f"Left out, since not all complete trials have it: {', '.join(missing)}."]
    return lines


def drop_weights(study: Study, trials: Path, keep: int) -> list[int]:
    """Delete the weights and checkpoints of ended trials that are none of the `keep` best (with
    several objectives: of the Pareto front). `trials`: the folder of all. Returns their numbers.
    """
    best = study.best_first()[:keep]
    kept = {trial.number for trial in best}
    dropped = set()
    for trial in study.trials():
        if trial.state is State.running or trial.number in kept:
            continue
        folder = trials / f"{trial.number:04d}"
        for name in _WEIGHTS:
            for path in folder.glob(f"*/{name}"):
                shutil.rmtree(path)
                dropped.add(trial.number)
    return sorted(dropped)
