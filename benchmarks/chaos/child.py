"""``python -m rlhf`` with one fault in it, for benchmarks.chaos: the product itself knows
nothing of faults.

The environment variable `FAULT` holds a JSON object: `point` (a phase of the watchdog's, "seal" for
the moment before a checkpoint is sealed, "reward", or "metrics.jsonl" or "samples.jsonl" for the
moment before a line is written there), `times` (at which of its occurrences), `action` (one of
ACTIONS, or "nan" at the reward), `rank`, and `place` (a directory that the action needs).
"""

import contextlib
import errno
import json
import math
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.shared import descendants

FAULT = "RLHF_CHAOS"
ENGINES = "engine processes: "  # before their number, on standard error
_INSIDE_S = 0.005  # after a phase began: it is then under way
_UNDER_WAY_S = 1.0  # that a server is stopped before it is killed
_FILES = 20_000  # bytes, of limit_files
_PAGE = 4096  # bytes that a tmpfs gives to a file at a time
_CALLS: Counter[str] = Counter()


class Broken(RuntimeError):
    """An error that nothing in the product expects."""


def fault() -> dict[str, Any]:
    """The fault of this process; an empty one where there is none, or where it is another
    rank's.
    """
    chosen: dict[str, Any] = json.loads(os.environ.get(FAULT, "{}"))
    return chosen if chosen.get("rank", 0) == int(os.environ.get("RANK", "0")) else {}


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """The runs' reward: the share of even token ids; NaN, or an error, where the fault says so."""
    _CALLS["reward"] += 1
    scores = [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
    chosen = fault()
    if chosen.get("point") != "reward" or _CALLS["reward"] != chosen["times"]:
        return scores
    if chosen["action"] == "raise":
        raise Broken(f"the reward of rank {chosen['rank']} is broken")
    return [math.nan, *scores[1:]]


# ---- actions ----


def _kill(place: str) -> None:
    def inside() -> None:
        time.sleep(_INSIDE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=inside, daemon=True).start()


def _kill_now(place: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def named(word: bytes, but: bytes | None = None) -> list[int]:
    """Process ids among this process's descendants whose command line holds `word` but not
    `but`.
    """
    found = []
    for child in descendants(os.getpid()):
        with contextlib.suppress(OSError):  # a process that has just ended
            words = Path(f"/proc/{child}/cmdline").read_bytes()
            if word in words and not (but is not None and but in words):
                found.append(child)
    return found


def engine_processes() -> list[int]:
    """Of vLLM engines, by the name that vLLM gives them."""
    return named(b"EngineCore")


def server_processes() -> list[int]:
    """Of vLLM servers: the one that answers requests, and its engine. Raises Broken where there is
    none. The guard, whose command line holds the server's, is left alone.
    """
    found = [*named(b"openai.api_server", b"rollout.server.guard"), *engine_processes()]
    if not found:
        raise Broken("no vLLM server runs")
    return found


def _kill_engine(place: str) -> None:
    """vLLM's own process; where the engine is in this process, this process."""
    engines = engine_processes()
    print(f"{ENGINES}{len(engines)}", file=sys.stderr, flush=True)
    for process in engines or [os.getpid()]:
        os.kill(process, signal.SIGKILL)


def _stop_server(place: str) -> None:
    """The server hangs from here on; its port still takes connections."""
    for process in server_processes():
        os.kill(process, signal.SIGSTOP)


def _kill_server(place: str) -> None:
    """The server is gone a second from here: it is stopped until then, so that what is asked of it
    in this phase is under way.
    """
    processes = server_processes()
    _stop_server(place)

    def end() -> None:
        time.sleep(_UNDER_WAY_S)
        for process in processes:
            os.kill(process, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


def _spoil_weights(place: str) -> None:
    """From here on servers get other matrices than the trainer's, of a kind that vLLM keeps packed
    on a CPU.
    """
    file = sys.modules["rollout.server.weight_file"].WeightFile  # loaded with the run's servers
    put = file._put

    def spoiled(self: Any, opened: Any, name: str, tensor: Any) -> None:
        put(self, opened, name, tensor * 1.5 if name.endswith("down_proj.weight") else tensor)

    file._put = spoiled


def _cut_link(place: str) -> None:
    """Take down the network of this process's namespace (benchmarks/chaos/network.py)."""
    from benchmarks.chaos.network import NEAR

    subprocess.run(["ip", "link", "set", NEAR, "down"], check=True)


def _terminate(place: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _terminate_launcher(place: str) -> None:
    """torchrun, whose children the ranks are."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(1.0)


def _interrupt_twice(place: str) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)


def _limit_files(place: str) -> None:
    """No file may grow beyond `_FILES` bytes: what a full disk is to whoever writes, and to be had
    anywhere.
    """
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (_FILES, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


def _fill(place: str) -> None:
    """A file that takes all the room of the disk under `place`."""
    with (Path(place) / "filler").open("wb", buffering=0) as out:
        try:
            while True:
                out.write(b"\0" * 2**20)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def _read_only(place: str) -> None:
    """`place` becomes read-only for all that is opened from now on; files that are open stay as
    they are.
    """
    from benchmarks.chaos.disk import seal_off

    seal_off(Path(place))


def _hang(place: str) -> None:
    time.sleep(3600)


def _raise(place: str) -> None:
    raise Broken(f"rank {os.environ.get('RANK', '0')} is broken")


ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": _kill,
    "kill_now": _kill_now,
    "kill_engine": _kill_engine,
    "kill_server": _kill_server,
    "stop_server": _stop_server,
    "spoil_weights": _spoil_weights,
    "cut_link": _cut_link,
    "terminate": _terminate,
    "terminate_launcher": _terminate_launcher,
    "interrupt_twice": _interrupt_twice,
    "limit_files": _limit_files,
    "fill": _fill,
    "read_only": _read_only,
    "hang": _hang,
    "raise": _raise,
}


def install(chosen: dict[str, Any]) -> None:
    """Wrap the points at which a fault can be, from outside. Plots are left out: they would take a
    third of the time of runs as short as these.
    """
    from rlhf.process import checkpoints
    from rlhf.process.supervision import Watchdog
    from rlhf.run import plots

    plots.plot_run = lambda directory: []
    plots.plot_frontier = lambda *points: False
    seen: Counter[str] = Counter()

    def reached(point: str) -> None:
        seen[point] += 1
        if (
            point == chosen.get("point")
            and seen[point] == chosen["times"]
            and chosen["action"] in ACTIONS
        ):
            ACTIONS[chosen["action"]](chosen.get("place", ""))

    begin, seal = Watchdog.phase, checkpoints.seal
    before = [""]

    def phase(self: Watchdog, name: str) -> None:
        begin(self, name)
        # after an update it is the wait for what is written ahead, not a step's first phase
        if (before[0], name) != ("update", "rollout"):
            reached(name)
        before[0] = name

    def sealing(directory: Path) -> None:
        reached("seal")
        seal(directory)

    Watchdog.phase = phase  # type: ignore[method-assign]
    checkpoints.seal = sealing
    if chosen.get("point", "").endswith(".jsonl"):
        _break_line(chosen)


def _break_line(chosen: dict[str, Any]) -> None:
    """From occurrence `times` on: "tear" writes half of the line and kills; another action comes
    before the first line that needs another page, since on a full disk a file still fills the page
    that it has.
    """
    from rlhf.run.tracking import tracker

    write = tracker.write_line
    seen: Counter[str] = Counter()

    def writing(file: Any, offset: int, text: str, path: Path) -> None:
        if path.name == chosen["point"]:
            seen["line"] += 1
            due = seen["line"] >= chosen["times"] and not seen["done"]
            if due and chosen["action"] == "tear":
                file.seek(offset)
                file.write(text.encode()[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            elif due and -(-offset // _PAGE) != -(-(offset + len(text.encode()) + 1) // _PAGE):
                seen["done"] += 1
                ACTIONS[chosen["action"]](chosen.get("place", ""))
        write(file, offset, text, path)

    tracker.write_line = writing


if __name__ == "__main__":
    install(fault())
    sys.argv[0] = "rlhf"
    runpy.run_module("rlhf", run_name="__main__", alter_sys=True)
