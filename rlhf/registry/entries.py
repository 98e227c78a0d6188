"""A version from the run that left it: its files, lineage, figures and card."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.models.directories import contents, fingerprint
from rlhf.process.files import json_object
from rlhf.registry.files import digest_of, listed
from rlhf.registry.records import Draft, Version
from rlhf.registry.store import Registry
from rlhf.run.directory import SUMMARY_FILE
from rlhf.run.manifest import Entry, read_manifest, run_of
from rlhf.types import UserError

CARD = "README.md"  # the model card, as rlhf/export writes it
REGISTRY_KEY = "registry"  # of a manifest's entry: the versions that it comes from
_KEPT = ("stage", "seed", "commit", "versions", "parents", "data", "wandb")  # of a manifest


def draft_of(name: str, model: str, registry: Registry) -> Draft:
    """The model of a directory, with all files read once for their hashes. Raises UserError."""
    held = contents(model, "model.path")
    folder = Path(model).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(
            f"model.path={model}: a hub's name has no files here to be registered. Expected a "
            "directory; stage=export writes one."
        )
    files = listed(folder)
    lineage = _lineage(folder, registry)
    if held.adapters:
        lineage["base"] = {"path": held.weights, "weights": fingerprint(held.weights)}
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    return Draft(name, str(folder), files, digest_of(files), fingerprint(model), lineage, text)


def _lineage(folder: Path, registry: Registry) -> dict[str, Any]:
    """What the manifest of the run says that made it; the registry's versions among the ancestors
    stand under ``versions``.
    """
    run = run_of(folder)
    manifest = None if run is None else read_manifest(run)
    if run is None or manifest is None:
        return {"run": None, "ancestors": []}
    kept = {key: manifest[key] for key in _KEPT if key in manifest}
    return {"run": str(run), **kept, "ancestors": _ancestors(run, manifest, registry)}


def _ancestors(run: Path, manifest: Entry, registry: Registry) -> list[str]:
    """The registry's versions, as NAME@NUMBER, that a run and the runs before it read: as models,
    or as what made their data.
    """
    out: list[str] = []
    seen = {run}
    waiting = [(run, manifest)]
    while waiting:
        place, content = waiting.pop(0)
        for entry in [*content["parents"], *content["data"]]:
            labels = list(entry.get(REGISTRY_KEY, []))
            if "weights" in entry:
                labels += registry.known_by(entry["weights"])
            out += [label for label in dict.fromkeys(labels) if label not in out]
            source = entry.get("from")
            if source is None:
                continue
            parent = (place / source["run"]).resolve()
            found = read_manifest(parent)
            if found is not None and parent not in seen:
                seen.add(parent)
                waiting.append((parent, found))
    return out


# ---- figures ----


def run_figures(draft: Draft) -> list[tuple[str, dict[str, float]]]:
    """The figures of the run that made a model, by the run."""
    run = draft.lineage["run"]
    if run is None or not (Path(run) / SUMMARY_FILE).is_file():
        return []
    figures = _numbers(Path(run) / SUMMARY_FILE)
    return [(run, figures)] if figures else []


def figures_from(place: str, draft: Draft) -> tuple[str, dict[str, float]]:
    """The figures in a run directory's summary or in a JSON file's `metrics`, by where they are.

    Raises UserError where there are none, and for a run that read other models than this one.
    """
    path = Path(place).expanduser().resolve()
    file = path / SUMMARY_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"stage.summaries: {file}: no such file. Expected a finished run's directory, or a "
            'JSON file {"metrics": {NAME: NUMBER}}.'
        )
    manifest = read_manifest(file.parent)
    if manifest is not None and file.parent != Path(str(draft.lineage["run"])):
        _check_about(manifest, file.parent, draft)
    figures = _numbers(file)
    if not figures:
        raise UserError(
            f"stage.summaries: {file} holds no figures. Expected "
            '{"metrics": {NAME: NUMBER}}, as every finished run\'s summary.json has them.'
        )
    return str(file), figures


def _check_about(manifest: Entry, run: Path, draft: Draft) -> None:
    """A run whose figures shall be a model's has read that model."""
    for entry in manifest["parents"]:
        same_path = (run / entry["path"]).resolve() == Path(draft.path)
        same_path = same_path or Path(entry["path"]).resolve() == Path(draft.path)
        if same_path or (draft.weights is not None and entry.get("weights") == draft.weights):
            return
    read = ", ".join(entry["path"] for entry in manifest["parents"]) or "none"
    raise UserError(
        f"stage.summaries: the run {run} did not read the model {draft.path}, so its figures are "
        f"not this model's. It read: {read}."
    )


def _numbers(file: Path) -> dict[str, float]:
    content = json_object(file, "its figures can't be read")
    metrics = content.get("metrics")
    out: dict[str, float] = {}
    if isinstance(metrics, Mapping):
        for name, value in metrics.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and math.isfinite(value):
                out[str(name)] = float(value)
    return out


def as_json(version: Version) -> str:
    """A version's lineage for people and programs."""
    draft = version.draft
    content = {
        "version": version.label,
        "digest": draft.digest,
        "path": draft.path,
        "registered": version.time,
        "by": version.who,
        "lineage": draft.lineage,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)
