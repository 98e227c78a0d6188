"""Names in a request as paths: one plain folder or file name each, which stays, links followed,
inside run.dir or the folder of uploads.
"""

from pathlib import Path

from starlette.exceptions import HTTPException

from rlhf.board.app import Place

_LONGEST = 255  # bytes of a file's name


class NotHere(HTTPException):
    """What was asked for is not in run.dir or among the uploads: a page says so (404)."""

    def __init__(self) -> None:
        super().__init__(404)


def plain_name(name: str) -> str:
    """`name`, where it is that of one folder or file and leads nowhere else; raises NotHere. Hidden
    names are the board's own.
    """
    fits = bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}
    try:
        fits = fits and len(name.encode()) <= _LONGEST
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise NotHere
    return name


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is there, and, links followed, below `folder` outside of hidden folders."""
    try:
        real, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):  # missing, not allowed, or links in a circle
        return False
    if real == root or not real.is_relative_to(root):
        return False
    return not any(part.startswith(".") for part in real.relative_to(root).parts)


def run_folder(place: Place, run: str) -> Path:
    """The folder of all stages of `run`. Raises NotHere."""
    folder = place.runs / plain_name(run)
    if not folder.is_dir() or not lies_inside(folder, place.runs):
        raise NotHere
    return folder


def stage_folder(place: Place, run: str, stage: str) -> Path:
    """The run directory of a stage. Raises NotHere."""
    folder = run_folder(place, run) / plain_name(stage)
    if not folder.is_dir() or not lies_inside(folder, place.runs):
        raise NotHere
    return folder


def stage_file(place: Place, run: str, stage: str, name: str) -> Path:
    """A file of a stage's run directory. Raises NotHere."""
    path = stage_folder(place, run, stage) / plain_name(name)
    if not path.is_file() or not lies_inside(path, place.runs):
        raise NotHere
    return path


def upload(place: Place, name: str) -> Path:
    """An uploaded file. Raises NotHere."""
    path = place.uploads / plain_name(name)
    if not path.is_file() or not lies_inside(path, place.uploads):
        raise NotHere
    return path


def folders_of(place: Place) -> tuple[Path, ...]:
    """The folders whose files and models a page may name."""
    return (place.runs, place.uploads, *place.folders)
