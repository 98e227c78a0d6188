"""Games of other people's libraries, each episode in a process of its own.

They seed and draw from the global random generators of Python and numpy, which in this process are
the run's; one that hangs can be ended; and what evaluates a policy's text does so elsewhere. The
processes are forked from one that has the library imported, so that an episode begins within
milliseconds. They answer in JSON, which, unlike pickles, can't bring code along.
"""

import json
import multiprocessing
import os
import random
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from rlhf.types import Environment, Observation, Step

_CONTEXT = multiprocessing.get_context("forkserver")
_LOCK = threading.Lock()
_SEED_VARIABLE = "PYTHONHASHSEED"
_MEMORY = 4 << 30  # bytes of a process's address space
_START_S = 180.0  # imports, on a machine under load
_GRACE = 1.5  # who waits for an answer ends the episode first, where it can

Build = Callable[[], Environment]


class GameError(RuntimeError):
    """What a game raised, in its process."""


def prepare(*modules: str) -> None:
    """Start the process that others are forked from, with these modules imported; once a run."""
    with _LOCK:
        before = os.environ.get(_SEED_VARIABLE)
        # sets have the same order in every run
        os.environ[_SEED_VARIABLE] = "0"
        try:
            _CONTEXT.set_forkserver_preload([__name__, *modules])
            forkserver.ensure_running()
        finally:
            os.environ.pop(_SEED_VARIABLE)
            if before is not None:
                os.environ[_SEED_VARIABLE] = before


class Apart:
    """An environment whose episode is in a process of its own."""

    def __init__(self, build: Build, limit_s: float) -> None:
        """`build`: makes the environment, there; it can be pickled. `limit_s`: longest time for an
        answer.
        """
        self._build, self._limit_s = build, limit_s
        self._process: Any = None
        self._pipe: Connection | None = None

    def reset(self, row: Mapping[str, object], seed: int) -> Observation:
        """Raises GameError, and TimeoutError where there is no answer in time."""
        self.close()
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_serve, args=(theirs, self._build), daemon=True)
        process.start()
        theirs.close()
        self._process, self._pipe = process, ours
        self._receive(_START_S)
        self._send({"row": dict(row), "seed": seed})
        observation: Observation = self._receive(_GRACE * self._limit_s)["observation"]
        return observation

    def step(self, text: str) -> Step:
        """Raises as `reset` does."""
        self._send({"text": text})
        answer = self._receive(_GRACE * self._limit_s)
        return Step(answer["observation"], answer["reward"], answer["done"], answer["info"])

    def _send(self, message: dict[str, object]) -> None:
        if self._pipe is None:
            raise GameError("the episode is over")
        try:
            self._pipe.send_bytes(json.dumps(message, default=str).encode())
        except OSError as error:
            raise GameError("the game's process has ended") from error

    def _receive(self, limit_s: float) -> dict[str, Any]:
        pipe = self._pipe
        assert pipe is not None
        try:
            if not pipe.poll(limit_s):
                self.close()
                raise TimeoutError(f"the game gave no answer within {limit_s:g} s")
            answer: dict[str, Any] = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise GameError("the game's process has ended") from error
        if "error" in answer:
            raise GameError(answer["error"])
        return answer

    def close(self) -> None:
        """End its process, also one that hangs."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is not None:
            process.kill()
            process.join()
            process.close()
        if pipe is not None:
            pipe.close()


# ---- in the process of an episode ----


def _serve(pipe: Connection, build: Build) -> None:
    """Answer until the pipe ends."""
    # what a library prints belongs to no stream of the run
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    made: Environment | None = None
    try:
        made = build()
        _say(pipe, {"ready": True})
        while True:
            _say(pipe, _answer(made, json.loads(pipe.recv_bytes())))
    except (EOFError, OSError):
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is told
        _say(pipe, {"error": _line(error)})


def _line(error: Exception) -> str:
    """An exception, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _say(pipe: Connection, answer: dict[str, object]) -> None:
    pipe.send_bytes(json.dumps(answer, default=str).encode())


def _answer(made: Environment, request: dict[str, Any]) -> dict[str, object]:
    if "seed" in request:
        _seed(request["seed"])
        return {"observation": made.reset(request["row"], request["seed"])}
    step = made.step(request["text"])
    assert isinstance(step, Step)  # games here are no coroutines
    return {
        "observation": step.observation,
        "reward": step.reward,
        "done": step.done,
        "info": step.info,
    }


def _seed(seed: int) -> None:
    """The global generators, which are this process's own."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
