"""Disks that fill up and turn read-only, for benchmarks.chaos: small tmpfs in a mount
namespace of the harness's own (Linux).

What is mounted there is seen by the harness and its runs only, and is gone with them, however they
end.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.shared import environment, module

INSIDE = "RLHF_CHAOS_MAY_MOUNT"  # set in the environment of a harness that has such a namespace
PAGE = 4096  # bytes: a tmpfs gives room to files by pages
ROOMY = 256 * 2**20  # bytes
# For root, and for everyone else where the system allows user namespaces (root in a container may
# be allowed the second alone).
_WAYS = (("unshare", "-m"), ("unshare", "-Urm"))
_PROBE = (
    'mount -t tmpfs -o size=64k tmpfs "$0" && mount -o remount,size=128k tmpfs "$0" && umount "$0"'
)


def way() -> tuple[tuple[str, ...], str]:
    """The command prefix that gives a program a mount namespace in which it may mount, and "" ; or
    () and why there is none.
    """
    why = []
    with tempfile.TemporaryDirectory() as place:
        for prefix in _WAYS:
            try:
                done = subprocess.run(
                    [*prefix, "sh", "-c", _PROBE, place],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=30,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                why.append(f"{' '.join(prefix)}: {error}")
                continue
            if done.returncode == 0:
                return prefix, ""
            why.append(
                f"{' '.join(prefix)}: "
                f"{(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[0]}"
            )
    return (), "; ".join(why)


def enter(arguments: Sequence[str]) -> str:
    """Begin this program again, with `arguments`, where it may mount; returns only where that is
    impossible (why), or done already ("").
    """
    if INSIDE in os.environ:
        return ""
    prefix, why = way()
    if prefix:
        os.environ[INSIDE] = "1"
        command = [*prefix, *module("benchmarks.chaos", *arguments)]
        os.execvpe(command[0], command, environment())
    return why


def _mount(*arguments: str) -> None:
    """Raises CalledProcessError, with what mount said."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes at `place` while inside."""
    place.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield
    finally:
        restore(place)
        subprocess.run(["umount", "-l", str(place)], check=True)


def seal_off(place: Path) -> None:
    """Mount `place` read-only over itself. Files that are open for writing stay so: a disk that
    they are on can't be remounted read-only.
    """
    _mount("--bind", str(place), str(place))
    _mount("-o", "remount,bind,ro", str(place))


def restore(place: Path) -> None:
    """Undo `seal_off` of `place` and of what lies in it."""
    for mount in reversed(_below(place)):
        subprocess.run(["umount", "-l", mount], check=True)


def _below(place: Path) -> list[str]:
    """Mount points in `place`, and those over `place` itself but the first, in the order of
    mounting.
    """
    points = [
        line.split()[4].encode().decode("unicode_escape")
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    ]
    own = [point for point in points if point == str(place) or point.startswith(f"{place}/")]
    return own[1:] if own[:1] == [str(place)] else own


def enlarge(place: Path, size: int = ROOMY) -> None:
    _mount("-o", f"remount,size={size}", "tmpfs", str(place))


def room(folder: Path) -> int:
    """Bytes that a folder's files take on a tmpfs."""
    return sum(
        -(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file()
    )
