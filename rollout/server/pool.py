"""Several servers that share the work: who gets which requests, and what follows when one fails.

A server that fails is away: its open requests go to the others, and a thread of its own brings it
back, with a restart where this process started it. It serves again only once it holds the current
weights. One that does not come back is left out. The run stops when none is left.
"""

import functools
import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from rlhf.types import UserError
from rollout.server.client import Request, Server, ServerFault, Written
from rollout.server.fleet import tell_progress

LOG = logging.getLogger("rollout.server")
_LOOK_S = 1.0  # between two looks at servers that are away
_LEAN = 4  # more open requests that a server may have which holds a group's prefix
_Result = TypeVar("_Result")
Arrived = Callable[[int, Written], None]  # a request's index, and its response


class State(Enum):
    serving = "serving"
    away = "away"  # on its way back
    lost = "lost"  # left out for good


@dataclass(slots=True, eq=False)
class Member:
    """One of the servers, whichever process answers at its address."""

    server: Server  # another object after it was away
    state: State = State.serving
    tainted: bool = False  # an update broke off in it: its weights are of no use
    failures: int = 0  # since it wrote a response

    @property
    def url(self) -> str:
        return self.server.url


class Pool:
    """The servers of a run, as one rank sees them."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        bring_back: Callable[[Member], Server],
        accept: Callable[[Sequence[str]], str | None],
        most_failures: int,
    ) -> None:
        """`bring_back` makes a server usable that was away, the current weights included, and
        returns its client; it raises ServerFault where it can't. `accept` says what is wrong with
        the labels of the weights that wrote a response, None where nothing is. `most_failures`: of
        a server that comes back each time but writes nothing of use.
        """
        self.members = [Member(server) for server in servers]
        self._bring_back, self._accept = bring_back, accept
        self._most_failures = most_failures
        self._changed = threading.Condition()
        self._first: ServerFault | None = None  # of those that led to the present state
        # which server wrote a group last: it holds what the group's next prompts begin with
        self.places: dict[str, Server] = {}

    def serving(self) -> list[Member]:
        """Those that serve now. Waits for one that is on its way back where there is no other.
        Raises UserError where none is left.
        """
        while True:
            with self._changed:
                members = [m for m in self.members if m.state is State.serving]
                if members:
                    return members
                if all(m.state is State.lost for m in self.members):
                    raise self._none_left()
                self._changed.wait(_LOOK_S)
            tell_progress()

    def has_serving(self) -> bool:
        return any(member.state is State.serving for member in self.members)

    def failed(self) -> list[str]:
        """URLs of those that do not serve."""
        return [m.url for m in self.members if m.state is not State.serving]

    def server(self, url: str) -> Server:
        return self._member(url).server

    def _member(self, url: str) -> Member:
        (member,) = (member for member in self.members if member.url == url)
        return member

    def write(self, requests: Sequence[Request], arrived: Arrived) -> None:
        """A response to each request, of which `arrived` is told. Raises UserError where no server
        is left.
        """
        _Round(self, requests, arrived).run()

    def each(self, work: Callable[[Server], _Result]) -> dict[str, _Result]:
        """What `work` returns for each server that serves, by URL, all at the same time. One that
        faults is dropped. Raises UserError where no server is left.
        """
        results: dict[str, _Result] = {}
        while not results:
            results = self._each(self.serving(), work)
        return results

    def _each(
        self, members: Sequence[Member], work: Callable[[Server], _Result]
    ) -> dict[str, _Result]:
        results: dict[str, _Result] = {}
        with ThreadPoolExecutor(len(members)) as threads:
            futures = [(member, threads.submit(work, member.server)) for member in members]
            for member, future in futures:
                try:
                    results[member.url] = future.result()
                except ServerFault as fault:
                    self.drop(member.server, fault)
        return results

    def drop(self, server: Server, fault: ServerFault, *, tainted: bool = False) -> None:
        """A server failed: it serves no more until it is back. `tainted`: its weights are of no
        use.
        """
        with self._changed:
            member = self._member(server.url)
            is_known = member.server is not server or member.state is not State.serving
            if is_known:
                return
            member.tainted |= tainted
            member.failures += 1
            member.state = State.away
            self._first = self._first or fault
            self._changed.notify_all()
        LOG.warning("a rollout server fails and is brought back: %s", fault)
        name = f"rollout-{member.url}"
        threading.Thread(target=self._return, args=(member,), name=name, daemon=True).start()

    def accept(self, server: Server, written: Written) -> None:
        """Note a response. Raises ServerFault where other weights wrote it than were sent."""
        wrong = self._accept(written.versions)
        if wrong is not None:
            raise ServerFault(server.url, wrong)
        self._member(server.url).failures = 0
        if not self.failed():
            self._first = None

    def close(self) -> None:
        with self._changed:
            for member in self.members:
                member.state = State.lost
            self._changed.notify_all()
        for member in self.members:
            member.server.close()

    def _return(self, member: Member) -> None:
        """Bring a server back, or leave it out."""
        member.server.close()
        try:
            if member.failures > self._most_failures:
                cause = f"it came back and failed again, {member.failures} times in a row"
                raise ServerFault(member.url, cause)
            server = self._bring_back(member)
        except Exception as error:  # noqa: BLE001 - others wait for the outcome, whatever it is
            with self._changed:
                if member.state is State.away:
                    member.state = State.lost
                    LOG.warning("a rollout server is left out from now on: %s", error)
                self._changed.notify_all()
            return
        with self._changed:
            if member.state is State.away:
                member.server, member.state, member.tainted = server, State.serving, False
                LOG.warning("a rollout server serves again: %s", member.url)
            self._changed.notify_all()

    def _none_left(self) -> UserError:
        urls = ", ".join(member.url for member in self.members)
        return UserError(
            f"rollout=server: no server is left of {urls}. The first cause: {self._first}. "
            "Start servers again and go on with run.resume=true."
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """What became of a request at a server: one of the three."""

    server: Server
    index: int
    written: Written | None = None
    fault: ServerFault | None = None
    error: Exception | None = None


class _Round:
    """The requests of one call, until each has a response."""

    def __init__(self, pool: Pool, requests: Sequence[Request], arrived: Arrived) -> None:
        self._pool, self._requests, self._arrived = pool, requests, arrived
        self._waiting = deque(self._groups(range(len(requests))))
        self._open: dict[Server, set[int]] = {}
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()

    def run(self) -> None:
        missing = len(self._requests)
        while missing:
            self._take_back()
            self._share_out()
            try:
                answer = self._answers.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            missing -= self._take(answer)

    def _groups(self, indices: Iterable[int]) -> Iterable[list[int]]:
        """Requests of one group side by side, in their order."""
        groups: dict[str, list[int]] = {}
        for index in indices:
            groups.setdefault(self._requests[index].group, []).append(index)
        return groups.values()

    def _take_back(self) -> None:
        """Requests that are open at a server which serves no more wait again, first in the line."""
        serving = {m.server for m in self._pool.members if m.state is State.serving}
        for server in [server for server in self._open if server not in serving]:
            indices = sorted(self._open.pop(server))
            self._waiting.extendleft(reversed(list(self._groups(indices))))

    def _share_out(self) -> None:
        """Give waiting groups to servers, each to the one with the fewest open requests."""
        while self._waiting:
            servers = [m.server for m in self._pool.members if m.state is State.serving]
            if not servers:
                servers = [member.server for member in self._pool.serving()]
            own = {server: len(self._open.get(server, ())) for server in servers}
            # other threads may have rounds of their own
            loads = {server: max(count, server.open) for server, count in own.items()}
            chosen = min(servers, key=lambda server: loads[server])
            name = self._requests[self._waiting[0][0]].group
            before = self._pool.places.get(name)
            if before is not None and loads.get(before, math.inf) <= loads[chosen] + _LEAN:
                chosen = before
            if own[chosen] >= chosen.at_once:
                return
            self._pool.places[name] = chosen
            group = self._waiting.popleft()
            self._open.setdefault(chosen, set()).update(group)
            for index in group:
                chosen.submit(functools.partial(self._ask, chosen, index))

    def _ask(self, server: Server, index: int) -> None:
        """In a thread: one request's answer."""
        try:
            written = server.write(self._requests[index])
            self._pool.accept(server, written)
            answer = _Answer(server, index, written=written)
        except ServerFault as fault:
            answer = _Answer(server, index, fault=fault)
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits
            answer = _Answer(server, index, error=error)
        self._answers.put(answer)

    def _take(self, answer: _Answer) -> int:
        """Note an answer; returns how many responses it brought."""
        open_there = self._open.get(answer.server, set())
        if answer.index not in open_there:  # the server was dropped: the request went elsewhere
            return 0
        if answer.error is not None:
            raise answer.error
        if answer.fault is not None:
            self._pool.drop(answer.server, answer.fault)
            return 0
        assert answer.written is not None
        open_there.discard(answer.index)
        self._arrived(answer.index, answer.written)
        tell_progress()
        return 1
