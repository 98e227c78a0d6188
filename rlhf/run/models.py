"""The model that a run left: stages that use a finished model find it by run.name alone."""

import json
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, RunConfig
from rlhf.models.directories import ADAPTER_CONFIG, CLASSIFIER
from rlhf.process.files import json_object
from rlhf.run.directory import SUMMARY_FILE
from rlhf.types import UserError

_HEAD = "ForSequenceClassification"
# Stages that only write other forms of a model.
_COPIES = ("export",)


def model_path(model: ModelConfig, run: RunConfig) -> str:
    """``model.path``, or the newest policy that a stage of the run has finished. Raises UserError
    where there is none, and for a reward model.
    """
    if model.path is not None:
        if is_classifier(Path(model.path).expanduser()):
            raise UserError(
                f"model.path={model.path} is a reward model, which writes no text. Expected a "
                "policy; stage=serve_reward serves reward models."
            )
        return model.path
    folder = Path(run.dir).expanduser() / run.name
    found = [(path.stat().st_mtime, path) for path in folder.glob(f"*/{SUMMARY_FILE}")]
    for _, summary in sorted(found, reverse=True):
        held = _model_of(summary)
        if held is not None and not is_classifier(held):
            return str(held)
    raise UserError(
        f"model.path is not set, and no stage in {folder} has left a policy. Set model.path to a "
        "model's directory, or run.name (and run.dir) to a run with a finished stage."
    )


def _model_of(summary: Path) -> Path | None:
    """The model of a finished stage, where it has one."""
    content = json_object(summary, "restore it, or remove it")
    name = content.get("model")
    if content.get("stage") in _COPIES or not isinstance(name, str):
        return None
    path = summary.parent / name
    return path if path.is_dir() else None


def is_classifier(directory: Path) -> bool:
    """Whether a directory holds a model with a scalar head, as its configuration says."""
    config = _read(directory / "config.json")
    names = config.get("architectures") or []
    whole = any(str(name).endswith(_HEAD) for name in names)
    return whole or _read(directory / ADAPTER_CONFIG).get("task_type") == CLASSIFIER


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none that can be read, which loading will tell."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
