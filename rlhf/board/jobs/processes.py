"""Processes by what nobody else has: their number and the moment of their start.

A number alone says little: after a reboot, or long after, another process may have it.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
# Fields of /proc/PID/stat after the name in brackets: the state, and the start in ticks since boot.
_STATE, _START = 0, 19
_ENDED = ("Z", "X")  # ended, though nobody has asked for the exit code yet
_MIB = 2**20


def start_mark(pid: int) -> str | None:
    """What tells the process `pid` from all that had its number before; None where none runs."""
    if sys.platform != "linux":
        return _mark_elsewhere(pid)
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if fields[_STATE] in _ENDED:
        return None
    return f"{boot}:{fields[_START]}"


def _mark_elsewhere(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return str(process.create_time())
    except psutil.Error:
        return None


def is_alive(pid: int, mark: str) -> bool:
    """Whether the process with this number and this mark still runs."""
    return start_mark(pid) == mark


def of_session(leader: int) -> list[int]:
    """All processes of the session that `leader` leads, and those that it or they started, in
    sessions of their own too.
    """
    import psutil

    members = {pid for pid in psutil.pids() if _session(pid) == leader}
    for pid in [leader, *members]:
        with suppress(psutil.Error):
            members |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return sorted(members)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended
        return None


def kill_session(leader: int) -> None:
    """End all processes of a session at once."""
    for pid in of_session(leader):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def memory_mib(leader: int) -> float:
    """The resident memory of all processes of a session, in MiB; pages that they share count for
    each.
    """
    import psutil

    total = 0
    for pid in of_session(leader):
        with suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total / _MIB


def writing(name: str) -> set[Path]:
    """The files with this name that a process of this user has open for writing, the own process
    excepted.
    """
    links = _open_files() if _PROC.is_dir() else _open_files_elsewhere()
    return {path for path in links if path.name == name}


def _open_files() -> Iterator[Path]:
    own = str(os.getpid())
    for folder in _numbered(_PROC):
        if folder.name != own:
            yield from _written_by(folder)


def _numbered(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.name.isdigit())


def _written_by(process: Path) -> Iterator[Path]:
    with suppress(OSError):  # another user's, or ended
        for link in _numbered(process / "fd"):
            target = os.readlink(link)
            if target.endswith(".jsonl") and _writes(process / "fdinfo" / link.name):
                yield Path(target)


def _writes(info: Path) -> bool:
    """Whether a file was opened for writing, by its flags in octal digits."""
    for line in info.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "flags":
            return bool(int(value, 8) & (os.O_WRONLY | os.O_RDWR))
    return False


def _open_files_elsewhere() -> Iterator[Path]:
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid():
                yield from (Path(file.path) for file in process.open_files())
