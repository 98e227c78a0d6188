"""The steps of an update that are the same on every way to a server.

Pause the server (its requests end, or wait with their caches cleared), give its workers the
weights, label them with the version, resume it. A server that failed is condemned: its workers
refuse every later batch, and nobody resumes it.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import RLock, Thread
from typing import Any, TypeVar

import torch

from rlhf.types import SyncError
from rollout.server.client import Server, ServerFault
from rollout.weights import HubNames, Incoming, Spec

T = TypeVar("T")

_CONDEMNING_S = 5.0  # longest wait for a server that is given up


@dataclass(frozen=True, slots=True)
class Model:
    """What the servers have to know of the model."""

    names: HubNames
    dtype: torch.dtype  # that the servers hold

    @property
    def specs(self) -> dict[str, Spec]:
        specs = self.names.specs.items()
        return {name: Spec(spec.shape, self.dtype) for name, spec in specs}


class Deadline:
    """The end of a time limit."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s

    def left(self) -> float:
        """Seconds, above 0."""
        return max(0.001, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end


def in_background(call: Callable[[], T]) -> "Future[T]":
    """`call` in a thread that does not keep the process from ending, as a pool's would."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    Thread(target=run, name="weights", daemon=True).start()
    return future


def take_all(incoming: Incoming, version: int) -> None:
    """Take part in the trainer's gathering without sending. Raises SyncError."""
    for _ in incoming:
        pass
    incoming.finish(version)


class Refused(Exception):
    """vLLM's code for the family does not take the weights, which a new server would not change."""


class Updates:
    """The servers that take part, and the steps of their updates."""

    def __init__(self, model: Model, *, limit_s: float, in_flight: bool, sender: bool) -> None:
        self.model = model
        self.limit_s = limit_s
        self.sender = sender
        self.lock = RLock()  # a server may rejoin from the thread that generates
        self.servers: dict[str, Server] = {}  # by their URLs
        # "keep" leaves requests where they are; without their caches they are computed again
        self._pause = "/pause?clear_cache=true&mode=" + ("keep" if in_flight else "wait")

    @property
    def family(self) -> str:
        return self.model.names.family

    def prepare(self, server: Server) -> tuple[int, bool]:
        """Tell a server's workers the model's tensors. Returns how many workers it has, and whether
        its model has a head of its own. Raises ServerFault.
        """
        specs = {
            name: [str(spec.dtype).removeprefix("torch."), list(spec.shape)]
            for name, spec in self.model.specs.items()
        }
        answers = server.call("rlhf_prepare", specs=specs, limit_s=self.limit_s)
        size = server.get("/get_world_size", limit_s=self.limit_s)
        try:
            return int(size["world_size"]), all(answer["has_head"] for answer in answers)
        except (KeyError, TypeError, ValueError):
            cause = f"rlhf_prepare answered {answers}, /get_world_size {size}"
            raise ServerFault(server.url, cause) from None

    def join(self, server: Server, info: dict[str, Any]) -> None:
        """Set up a server's end of the way. Raises ServerFault."""
        body = {"init_info": info}
        server.post("/init_weight_transfer_engine", body, limit_s=self.limit_s)

    def pause(self, server: Server, deadline: Deadline) -> None:
        """No request is computed from now on, and nothing computed is kept. Raises ServerFault."""
        server.post(self._pause, limit_s=deadline.left())

    def pause_all(self, servers: Iterable[Server], version: int) -> list[ServerFault]:
        """Pause the servers, which has a time limit of its own: requests may have to end. Returns
        faults; who failed takes part no longer.
        """
        deadline = Deadline(self.limit_s)
        running = {}
        for server in servers:
            running[server.url] = in_background(partial(self.pause, server, deadline))
        return self.settle(running, version, deadline)

    def call(self, server: Server, method: str, deadline: Deadline, **kwargs: Any) -> None:
        """A step of an update in all workers of a server. Raises ServerFault or Refused."""
        for answer in server.call(method, limit_s=deadline.left(), **kwargs):
            if isinstance(answer, dict) and answer.get("refused"):
                raise Refused(str(answer["refused"]))

    def resume(self, server: Server, version: int, deadline: Deadline) -> None:
        """The server holds `version`, all of it. Raises ServerFault."""
        if deadline.passed:  # it may count as lost already
            raise _late(server.url, version, deadline)
        label = {"new_version": str(version)}
        server.post("/update_weight_version", label, limit_s=deadline.left())
        server.post("/resume", limit_s=deadline.left())

    def update(
        self, server: Server, info: dict[str, Any], version: int, deadline: Deadline
    ) -> None:
        """The update of a server that is paused. Raises ServerFault or Refused."""
        self.call(server, "rlhf_update", deadline, info=info)
        self.resume(server, version, deadline)

    def settle(
        self, updates: "dict[str, Future[None]]", version: int, deadline: Deadline
    ) -> list[ServerFault]:
        """Wait for a step of the servers' updates; condemn those that failed. Raises SyncError
        where vLLM refused the weights.
        """
        faults = []
        refused: Refused | None = None
        for url, update in updates.items():
            try:
                update.result(deadline.left())
            except Refused as error:
                refused = error
                self.condemn(url, str(error))
            except ServerFault as fault:
                faults.append(fault)
                self.condemn(url, fault.cause)
            except TimeoutError:
                late = _late(url, version, deadline)
                faults.append(late)
                self.condemn(url, late.cause)
        if refused is not None:
            raise SyncError(
                f"weight sync {version}: vLLM does not take the weights of {self.family} "
                f"({refused}). Set rollout=hf, or remove the cause."
            ) from refused
        return faults

    def condemn(self, url: str, reason: str) -> None:
        """Have a server refuse to compute from now on, as far as it still listens."""
        server = self.servers.pop(url)
        with suppress(ServerFault):  # it is dead, or hangs and stays paused
            server.call("rlhf_condemn", reason=reason, limit_s=_CONDEMNING_S)

    def condemn_all(self, urls: Iterable[str], reason: str) -> None:
        for url in list(urls):
            self.condemn(url, reason)


def _late(url: str, version: int, deadline: Deadline) -> ServerFault:
    return ServerFault(
        url, f"its update to weights {version} took longer than {deadline.limit_s:g} s"
    )
