"""``python -m rlhf`` with one fault in it, for rlhf.stages.chaos: the product itself knows nothing of faults.

The environment variable `FAULT` holds a JSON object: `point` (a phase of the watchdog's, "seal" for the moment before a checkpoint is sealed, or
"reward"), `times` (at which of its occurrences), `action` (one of ACTIONS, or "nan" at the reward), `rank`.
"""

import json
import math
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULT = "RLHF_CHAOS"
_INSIDE_S = 0.005  # after a phase began: it is then under way
_CALLS: Counter[str] = Counter()


def fault() -> dict[str, Any]:
    """The fault of this process; an empty one where there is none, or where it is another rank's."""
    chosen: dict[str, Any] = json.loads(os.environ.get(FAULT, "{}"))
    return chosen if chosen.get("rank", 0) == int(os.environ.get("RANK", "0")) else {}


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """The runs' reward: the share of even token ids; NaN where the fault says so."""
    _CALLS["reward"] += 1
    scores = [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
    chosen = fault()
    return [math.nan, *scores[1:]] if chosen.get("point") == "reward" and _CALLS["reward"] == chosen["times"] else scores


def _kill() -> None:
    def inside() -> None:
        time.sleep(_INSIDE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=inside, daemon=True).start()


def _kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt_twice() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)


def _fill_disk() -> None:
    """No file may grow beyond 20,000 bytes: what a full disk is to whoever writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _hang() -> None:
    time.sleep(3600)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "kill_now": _kill_now,
    "terminate": _terminate,
    "interrupt_twice": _interrupt_twice,
    "fill_disk": _fill_disk,
    "hang": _hang,
}


def install(chosen: dict[str, Any]) -> None:
    """Wrap the points at which a fault can be, from outside."""
    from rlhf import checkpoints
    from rlhf.watchdog import Watchdog

    seen: Counter[str] = Counter()

    def reached(point: str) -> None:
        seen[point] += 1
        if point == chosen.get("point") and seen[point] == chosen["times"] and chosen["action"] in ACTIONS:
            ACTIONS[chosen["action"]]()

    begin, seal = Watchdog.phase, checkpoints.seal

    def phase(self: Watchdog, name: str) -> None:
        begin(self, name)
        reached(name)

    def sealing(directory: Path) -> None:
        reached("seal")
        seal(directory)

    Watchdog.phase = phase  # type: ignore[method-assign]
    checkpoints.seal = sealing


if __name__ == "__main__":
    install(fault())
    sys.argv[0] = "rlhf"
    runpy.run_module("rlhf", run_name="__main__", alter_sys=True)
