"""Names in a request as paths: plain folder or file names, which stay, links followed, inside
run.dir or the folder of uploads; and the addresses of runs.

A run's name may have slashes (``films/second``): its folder lies deeper.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request

from rlhf.board.app import Place
from rlhf.run.directory import CONFIG_FILE, SUMMARY_FILE
from rlhf.run.manifest import MANIFEST_FILE
from rlhf.run.tracking.files import METRICS_FILE

_LONGEST = 255  # bytes of a file's name
DEEPEST = 4  # names in a run's name
_MARKS = (MANIFEST_FILE, CONFIG_FILE, METRICS_FILE, SUMMARY_FILE)  # of a run directory


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


def is_run_directory(folder: Path) -> bool:
    """Whether a stage wrote there."""
    return any((folder / name).is_file() for name in _MARKS)


def run_directories(runs: Path) -> Iterator[tuple[str, str, Path]]:
    """The run directories below run.dir: the run, the stage, the folder."""
    for folder in _folders_in(runs, runs):
        yield from _stages_in(folder, runs, folder.name, 1)


def _stages_in(folder: Path, runs: Path, run: str, depth: int) -> Iterator[tuple[str, str, Path]]:
    for inner in _folders_in(folder, runs):
        if is_run_directory(inner):
            yield run, inner.name, inner
        elif depth < DEEPEST:
            yield from _stages_in(inner, runs, f"{run}/{inner.name}", depth + 1)


def _folders_in(folder: Path, root: Path) -> Iterator[Path]:
    """The folders in a folder that a page may show."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.is_dir() and lies_inside(path, root):
            yield path


def run_and_stage(folder: Path, runs: Path) -> tuple[str, str] | None:
    """Of a folder that may be a run directory of run.dir; None outside."""
    real, root = folder.resolve(), runs.resolve()
    if not real.is_relative_to(root):
        return None
    *names, stage = real.relative_to(root).parts or ("",)
    return ("/".join(names), stage) if names else None


def run_path(place: Place, run: str) -> Path:
    """Where the folder of `run` lies, or would lie. Raises NotHere for a name that leads elsewhere,
    or into a run directory.
    """
    folder = place.runs
    names = run.split("/")
    for name in names:
        folder = folder / plain_name(name)
        if is_run_directory(folder):
            raise NotHere
    if len(names) > DEEPEST:
        raise NotHere
    return folder


def run_folder(place: Place, run: str) -> Path:
    """The folder of all stages of `run`. Raises NotHere."""
    folder = run_path(place, run)
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


def in_address(run: str) -> str:
    """A run's name as one part of an address: a slash is ``~1`` and ``~`` is ``~0`` (RFC 6901),
    since servers read ``%2F`` before they take an address apart.
    """
    return quote(run.replace("~", "~0").replace("/", "~1"), safe="")


def run_named(request: Request) -> str:
    """The name of the run in a request's address."""
    name: str = request.path_params["run"]
    return name.replace("~1", "/").replace("~0", "~")


def run_link(run: str, stage: str | None = None) -> str:
    """The address of a run's page, or of one of its stages."""
    link = f"/runs/{in_address(run)}"
    return link if stage is None else f"{link}/{quote(stage, safe='')}"


def upload(place: Place, name: str) -> Path:
    """An uploaded file. Raises NotHere."""
    path = place.uploads / plain_name(name)
    if not path.is_file() or not lies_inside(path, place.uploads):
        raise NotHere
    return path


def folders_of(place: Place) -> tuple[Path, ...]:
    """The folders whose files and models a page may name."""
    return (place.runs, place.uploads, *place.folders)
