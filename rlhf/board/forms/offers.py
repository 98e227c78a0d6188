"""What a form offers where a file or a model is asked for: uploads, and what earlier runs left."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf.board.paths import run_directories

_MOST = 200
# Which list an option's field has.
OFFERED = {
    "data.path": "data",
    "data.eval_path": "data",
    "model.path": "models",
    "reward.path": "rewards",
    "stage.before": "models",
    "stage.after": "models",
}
# Files that stages write for others: stage=data and stage=label, and recipes.
_ROWS = ("*/data/*.jsonl", "*/label*/*.jsonl", "*/recipe/*.jsonl")


def offers(runs: Path, uploads: Path) -> dict[str, Sequence[str]]:
    """Paths by the list's name, newest first; at most 200 in each."""
    uploaded = [path for path in uploads.glob("*") if path.is_file()]
    written = [path for pattern in _ROWS for path in runs.glob(pattern)]
    made = [folder / "model" for _, _, folder in run_directories(runs)]
    models = [path for path in made if path.is_dir()]
    rewards = [path for path in models if path.parent.name == "reward"]
    return {
        "data": [*_newest(uploaded), *_newest(written)][:_MOST],
        "models": _newest(path for path in models if path not in rewards),
        "rewards": _newest(rewards),
    }


def _newest(paths: Iterable[Path]) -> list[str]:
    found = sorted(paths, key=_changed, reverse=True)
    return [str(path) for path in found[:_MOST]]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just been removed
        return 0.0
