"""The model card: where an exported model comes from, what it was trained on, its figures, its
licence, and how its files answered when they were loaded again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.export.answers import Agreement
from rlhf.models.directories import Contents
from rlhf.run.directory import SUMMARY_FILE
from rlhf.run.manifest import read_manifest, run_of

_FIELD = re.compile(r"^license:\s*[\"']?([^\"'\s#]+)", re.MULTILINE)
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_SHOWN_ANSWERS = 3


@dataclass(frozen=True, slots=True)
class Source:
    """What the exported model was made from."""

    path: str  # as it was given
    weights: str  # the directory or hub's name of the base
    adapters: tuple[str, ...]  # that were merged in
    license_name: str | None
    run: Path | None  # the run that left it
    manifest: Mapping[str, Any]  # the run's; {} without one
    metrics: Mapping[str, Any]


def source_of(held: Contents, license_name: str | None) -> Source:
    """What is known of a model. `license_name`: None: what the files of its base say."""
    run = run_of(Path(held.path)) if Path(held.path).exists() else None
    manifest = (read_manifest(run) if run is not None else None) or {}
    if license_name is None:
        places = [held.path, held.weights, *_parents(manifest)]
        license_name = next(filter(None, map(_license_of, places)), None)
    return Source(
        held.path,
        held.weights,
        tuple(str(adapter.directory) for adapter in held.adapters),
        license_name,
        run,
        manifest,
        _metrics(run),
    )


def _parents(manifest: Mapping[str, Any]) -> list[str]:
    """The policies that a run started from."""
    entries = manifest.get("parents", [])
    return [entry["path"] for entry in entries if entry.get("kind") == "policy"]


def _license_of(place: str) -> str | None:
    """What a model's card says, or the first line of its licence."""
    folder = Path(place)
    card = folder / "README.md"
    if card.is_file():
        found = _FIELD.search(card.read_text(encoding="utf-8", errors="replace"))
        if found is not None:
            return found[1]
    for name in _LICENSE_FILES:
        path = folder / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip() for line in lines if line.strip()), None)
    return None


def _metrics(run: Path | None) -> dict[str, Any]:
    path = None if run is None else run / SUMMARY_FILE
    if path is None or not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    metrics = content.get("metrics") if isinstance(content, dict) else None
    return metrics if isinstance(metrics, dict) else {}


# ---- the card ----


def card(title: str, source: Source, agreements: Sequence[Agreement], notes: Sequence[str]) -> str:
    """The card as Markdown with a header of fields, as model hubs read it."""
    header = {
        "license": source.license_name or "unknown",
        "base_model": source.weights,
        "pipeline_tag": "text-generation",
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"]
    lines += ["", f"# {title}", "", *_origin(source)]
    lines += ["", "## Data", "", *_data(source.manifest)]
    lines += ["", "## Figures", "", *_figures(source.metrics)]
    lines += ["", "## Check", "", *_check(agreements)]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _origin(source: Source) -> list[str]:
    lines = [f"- Weights: `{source.weights}`"]
    lines += [f"- Adapter, merged in: `{path}`" for path in source.adapters]
    if source.manifest:
        lines.append(f"- Trained by: stage={source.manifest['stage']} (`{source.run}`)")
    lines.append(f"- Licence: {source.license_name or 'not known: its base does not tell'}")
    return lines


def _data(manifest: Mapping[str, Any]) -> list[str]:
    entries = manifest.get("data", [])
    if not entries:
        return ["Not known: no manifest of a run lies with the model, or it read no file."]
    lines = ["| file | bytes | sha256 |", "|---|---|---|"]
    for entry in entries:
        size, digest = entry.get("bytes", ""), str(entry.get("sha256", ""))[:16]
        lines.append(f"| `{entry['path']}` | {size} | {digest} |")
    return lines


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    if not numbers:
        return ["None: the model comes from no run."]
    lines = ["| figure | value |", "|---|---|"]
    return lines + [f"| {name} | {value:.6g} |" for name, value in sorted(numbers.items())]


def _check(agreements: Sequence[Agreement]) -> list[str]:
    lines = [
        "Each file was loaded again and answered 20 questions, the most likely token each time; "
        "counted are answers that are the model's own in float32, token by token.",
        "",
        "| file | same answers |",
        "|---|---|",
    ]
    lines += [f"| {item.name} | {item.same} of {item.asked} |" for item in agreements]
    for item in agreements:
        for own, other in item.differing[:_SHOWN_ANSWERS]:
            lines += ["", f"{item.name}, {own.question}", "", f"- {own.text!r}"]
            lines.append(f"- {other.text!r}")
    return lines
