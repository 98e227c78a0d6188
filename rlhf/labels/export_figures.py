"""What an export shows at its end: metrics, figures, files, and the command that brings the labels
back.
"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.choices import LabelTarget
from rlhf.labels.records import Export, Role

# what people do with the files of each target
_USE = {
    LabelTarget.page: "open it in a browser, judge by keyboard, download the labels",
    LabelTarget.label_studio: "import the tasks with the labelling config (or label.push=true)",
    LabelTarget.argilla: "log the records into a dataset",
    LabelTarget.csv: "fill in the judgement columns",
    LabelTarget.xlsx: "fill in the judgement columns",
    LabelTarget.jsonl: "add the judgements to each line",
}


def metrics_of(export: Export, seconds: Mapping[str, float]) -> dict[str, float]:
    """The export's line of metrics.jsonl. `seconds`: of each phase, beside those of the export."""
    roles = Counter(task.role for task in export.tasks)
    metrics: dict[str, float] = {
        "label/tasks": len(export.tasks),
        "label/main": roles[Role.main],
        "label/gold": roles[Role.gold],
        "label/repeats": roles[Role.repeat],
    }
    for name, count in export.details["counts"].items():
        metrics[f"label/{name}"] = count
    methods = Counter(task.chosen_by for task in export.tasks if task.role is Role.main)
    for method, count in methods.items():
        metrics[f"label/chosen_{method}"] = count
    for name, value in {**export.details["seconds"], **seconds}.items():
        metrics[f"time/{name}_s"] = value
    return metrics


def shown_figures(
    export: Export,
    metrics: Mapping[str, float],
    targets: Sequence[LabelTarget],
    project: int | None,
) -> dict[str, str]:
    """Figures for the console. `project`: the tasks' number on a server."""
    shown = {
        "tasks": f"{metrics['label/tasks']:.0f}, of which gold {metrics['label/gold']:.0f}, "
        f"repeated {metrics['label/repeats']:.0f}",
        "prompts": str(export.details["counts"]["prompts"]),
    }
    if "ab" in export.details:
        ab = export.details["ab"]
        shown["A/B"] = (
            f"{' against '.join(ab['policies'])}: {ab['asked']} pairs of {ab['pairs']} planned, "
            f"{ab['identical']} prompts answered alike"
        )
    for target in targets:
        shown[f"to label ({target.value})"] = _USE[target]
    if project is not None:
        shown["server"] = f"project {project}"
    return shown


def shown_files(ledger: Path, files: Mapping[LabelTarget, Sequence[Path]]) -> dict[str, Path | str]:
    """Files for the console by what they are."""
    shown: dict[str, Path | str] = {"ledger (not for annotators)": ledger}
    for target, paths in files.items():
        for number, path in enumerate(paths, start=1):
            name = target.value if number == 1 else f"{target.value} {number}"
            shown[name] = path
    return shown


def import_command(run_name: str, run_dir: str, url: str | None, project: int | None) -> str:
    """The command that imports the labels: from files, or from `project` of the server at
    `url`.
    """
    options = [f"run.name={run_name}"]
    if run_dir != "runs":
        options.append(f"run.dir={run_dir}")
    words = ["python -m rlhf stage=label label.mode=import", *map(shlex.quote, options)]
    if project is None:
        words.append("label.files=[FILE]")
    else:
        words += ["label.pull=true", f"label.url={url}"]
    return " ".join(words)
