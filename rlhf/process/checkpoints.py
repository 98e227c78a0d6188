"""Checkpoints that can be trusted: written to the side, sealed with the hash of every file,
renamed, and checked before they are loaded.

A checkpoint of the online loop is ``checkpoints/step-N``, one of transformers' Trainer
``checkpoints/checkpoint-N``. `SEAL` is the last file written into it, so a folder without one was
cut short.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf.process import distributed
from rlhf.process.files import sha256
from rlhf.types import TrainingDiverged, UserError

SEAL = "checksums.json"
TORN = "torn"  # folder beside the checkpoints: those that a resumed run passed over
# folder beside the checkpoints: what policy.engines.resharding converted; it goes when a newer
# checkpoint is whole
UNIVERSAL = "universal"
# ours, and the name that transformers' Trainer gives
_NAME = re.compile(r"(?:step|checkpoint)-(\d+)")
# a file in a checkpoint of weights without their optimizer's state
WEIGHTS_ALONE = "weights_alone.txt"
_PART = ".part"
_HASHING_THREADS = 4  # hashlib lets go of the interpreter's lock, so files are hashed side by side
_STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
)
# How torch and safetensors, which write outside Python, tell of a disk that takes no more.
_WRITERS = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error|I/O error|os error \d+|No "
    r"space left|cannot be opened"
)


def storage_error(error: BaseException) -> bool:
    """Whether `error` says that the disk is full, read-only or broken, rather than that something
    of ours is wrong.
    """
    if isinstance(error, OSError):
        return error.errno in _STORAGE
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return foreign and _WRITERS.search(str(error)) is not None


def seal(directory: Path) -> None:
    """Write the size and hash of every file of `directory` into its `SEAL`, all of it on the disk
    before the seal is.
    """
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SEAL)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = list(pool.map(_measured, files))
    content = {
        p.relative_to(directory).as_posix(): entry for p, entry in zip(files, found, strict=True)
    }
    beside = directory / (SEAL + _PART)
    with beside.open("w", encoding="utf-8") as out:
        json.dump({"files": content}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, directory / SEAL)


def _measured(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def problem(directory: Path) -> str | None:
    """Why a checkpoint can't be trusted, None where it can: every file that was sealed is there, of
    the same size and hash.
    """
    try:
        sealed = json.loads((directory / SEAL).read_text(encoding="utf-8"))["files"]
        wanted = {
            str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in sealed.items()
        }
    except FileNotFoundError:
        return f"it has no {SEAL}, so its writing was cut short"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {SEAL} can't be read ({error})"
    for name, (size, _) in wanted.items():  # sizes first: they cost nothing
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = pool.map(lambda name: sha256(directory / name), wanted)
        changed = next(
            (name for name, found in zip(wanted, hashes, strict=True) if found != wanted[name][1]),
            None,
        )
    return None if changed is None else f"{changed} is not what was written (another sha256)"


def mark_weights_alone(directory: Path) -> None:
    """Say in a checkpoint, before it is sealed, that no run can go on from it."""
    text = "Weights without the optimizer's state (stage.save_optimizer=false).\n"
    (directory / WEIGHTS_ALONE).write_text(text, encoding="utf-8")


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of `folder` by step, the newest first; whether they are whole is not looked
    at.
    """
    found = [
        (int(match.group(1)), path)
        for path in folder.glob("*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, reverse=True)


def step_of(checkpoint: Path | str | None) -> int:
    """The step of a checkpoint by its name; 0 for none."""
    match = _NAME.fullmatch(Path(checkpoint).name) if checkpoint else None
    return int(match.group(1)) if match else 0


def newest(folder: Path) -> tuple[tuple[Path, int] | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, with its step, and those newer than it with what is
    wrong with each.
    """
    passed_over: list[tuple[Path, str]] = []
    for step, path in numbered(folder):
        wrong = problem(path)
        if wrong is None:
            return (path, step), passed_over
        passed_over.append((path, wrong))
    return None, passed_over


def rewind_target(folder: Path, rewinds: int, allowed: int, cause: str) -> Path:
    """The checkpoint that rewind number `rewinds` (from 1) of `allowed` goes to: the newest whole
    one, the same on every rank. A collective.

    Raises TrainingDiverged, beginning with `cause`, where there is none or no further rewind is
    allowed.
    """
    found = newest(folder)[0] if distributed.is_main() else None
    found = distributed.broadcast(found)
    if found is not None and rewinds <= allowed:
        path: Path = found[0]
        return path
    why = f"stage.rewinds={allowed} times it was tried already"
    if found is None:
        why = "there is no whole checkpoint to go back to"
    raise TrainingDiverged(f"{cause} stage.on_nonfinite=rewind: {why}.")


def set_aside(path: Path) -> Path:
    """Move a torn checkpoint out of the way of the one that the run will write in its place;
    returns where it lies now.
    """
    folder = path.parent / TORN
    folder.mkdir(exist_ok=True)
    place = folder / path.name
    number = 1
    while place.exists():
        number += 1
        place = folder / f"{path.name}.{number}"
    path.rename(place)
    return place


def clear_parts(folder: Path) -> None:
    """Remove what a killed save left beside the checkpoints."""
    for path in folder.glob("*" + _PART):
        shutil.rmtree(path, ignore_errors=True)


def clear_universal(folder: Path) -> None:
    """Remove converted checkpoints: they can be had anew, and take as much room as the state
    itself.
    """
    shutil.rmtree(folder / UNIVERSAL, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints (0: all)."""
    for _, path in numbered(folder)[keep:] if keep else []:
        # first, so that a removal that is cut short leaves nothing that looks whole
        (path / SEAL).unlink(missing_ok=True)
        shutil.rmtree(path)


@contextlib.contextmanager
def storing(what: str, half: Path, folder: Path) -> Iterator[None]:
    """Around writing `what` to `half`: where the disk takes no more, `half` goes and a UserError
    says what is still there. On the rank that fails.
    """
    try:
        yield
    except Exception as error:
        if not storage_error(error):
            raise
        free = shutil.disk_usage(
            next(place for place in (folder, *folder.parents) if place.is_dir())
        ).free  # torch's writer says nothing of a full disk
        shutil.rmtree(half, ignore_errors=True)
        whole = next((path.name for _, path in numbered(folder) if (path / SEAL).is_file()), None)
        left = (
            f"The last whole checkpoint is {folder / whole}"
            if whole
            else "There is no earlier checkpoint"
        )
        raise UserError(
            f"{what} could not be written: {error} ({free:.1f} MiB were free there). Nothing "
            f"half-written was left. {left}. Make room or give "
            "write access, then go on with run.resume=true."
        ) from error


@contextlib.contextmanager
def written(final: Path, *, keep: int) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `final` once every rank has left; older
    ones beyond `keep` go. A collective.

    Raises UserError on every rank when rank 0 can't seal it. A rank whose own part fails raises
    alone: the others are inside collectives of the engine's, and it is the launcher that ends them.
    """
    side, folder = final.with_name(final.name + _PART), final.parent
    what = f"checkpoint {final}"
    wrong: str | None = None
    if distributed.is_main():
        try:
            with storing(what, side, folder):
                shutil.rmtree(side, ignore_errors=True)
                side.mkdir(parents=True)
        except UserError as error:
            wrong = str(error)
    _agree(wrong)
    with storing(what, side, folder):
        yield side
    distributed.barrier()
    if distributed.is_main():
        try:
            with storing(what, side, folder):
                seal(side)
                if final.exists():
                    shutil.rmtree(final)
                side.rename(final)
                prune(folder, keep)
                clear_universal(folder)
        except UserError as error:
            wrong = str(error)
    _agree(wrong)


def _agree(wrong: str | None) -> None:
    """Rank 0's outcome on every rank. Raises UserError."""
    wrong = distributed.broadcast(wrong)
    if wrong is not None:
        raise UserError(wrong)
