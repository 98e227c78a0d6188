"""launch=local: ranks and rollout servers as child processes of this one, on this machine.

A signal is passed on to the ranks, which save and end. When a rank fails the others are ended, and
the first cause is what is shown. Servers end after the ranks.
"""

import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf.launch import ready
from rlhf.launch.children import Child, Command, all_ended, end_all, first_failed
from rlhf.process import redaction
from rlhf.process.supervision import Stopping
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.launch")
_POLL_S = 0.1
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times that bound a launch."""

    start_s: float  # of a server, until it answers
    grace_s: float  # from the wish that a process ends until it is killed


@dataclass(slots=True)
class Server:
    """A rollout server that this process starts."""

    command: Command
    url: str
    child: Child | None = None
    is_lost: bool = False  # it ended while ranks ran


@dataclass(slots=True)
class Launched:
    """The processes of a run on this machine. They are ended when the context is left."""

    limits: Limits
    servers: list[Server] = field(default_factory=list)
    ranks: list[Child] = field(default_factory=list)
    signalled: int | None = None  # the signal that asked the run to end

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        # ranks first: a rank that still saves may wait for a server
        end_all(self.ranks, self.limits.grace_s)
        end_all(self._running_servers(), self.limits.grace_s)

    def _running_servers(self) -> list[Child]:
        return [server.child for server in self.servers if server.child is not None]

    def pass_on(self, number: int) -> None:
        """A signal came: tell the ranks. Called from another thread."""
        self.signalled = number
        for rank in list(self.ranks):
            rank.tell(number)

    def start_servers(self, servers: Sequence[Server]) -> None:
        """Start `servers`, without waiting until they answer."""
        self.servers = list(servers)
        for server in self.servers:
            server.child = Child.start(server.command)

    def wait_for_servers(self) -> None:
        """Return once all servers answer, or a signal came. Raises UserError for one that ended, or
        does not answer in time.
        """
        urls = [server.url for server in self.servers]
        missing = ready.wait(urls, self.limits.start_s, self._is_starting)
        if missing and self.signalled is None:
            self.check_servers()
            raise UserError(too_slow(missing, self.limits.start_s))

    def _is_starting(self) -> bool:
        """Whether no server has ended and nobody wants the run to end."""
        ended = [child.look() for child in self._running_servers()]
        return not any(ended) and self.signalled is None

    def check_servers(self) -> None:
        """Raises UserError for a server that ended before it was ready."""
        for child in self._running_servers():
            if child.look():
                raise UserError(f"{child.name} ended before it was ready: {child.failure()}")

    def start_ranks(self, commands: Sequence[Command]) -> None:
        """Start the ranks, unless a signal came meanwhile."""
        for command in commands:
            if self.signalled is not None:
                return
            self.ranks.append(Child.start(command))
            self._tell_again()

    def _tell_again(self) -> None:
        """A signal may have come between the start of a rank and its entry in the list."""
        if self.signalled is not None:
            self.ranks[-1].tell(self.signalled)

    def wait(self) -> Child | None:
        """Wait until the ranks have ended, and end the others when one fails. Returns the rank that
        failed first, or None.
        """
        while not self.is_over():
            time.sleep(_POLL_S)
        failed = first_failed(self.ranks)
        end_all(self.ranks, self.limits.grace_s)
        return failed

    def is_over(self) -> bool:
        """Whether all ranks have ended, or one has failed."""
        if all_ended(self.ranks):
            return True
        failed = first_failed(self.ranks)
        if failed is not None and not self._was_asked(failed):
            return True
        self._warn_of_servers()
        return False

    def _was_asked(self, ended: Child) -> bool:
        """Whether a rank ended since a signal asked it to; the others then do so, too."""
        return self.signalled is not None and ended.code in STOPPED

    def _warn_of_servers(self) -> None:
        """Log the end of each server once. Their stage starts vLLM again by itself; the ranks leave
        out a server that stays away, and stop where none is left.
        """
        for server in self.servers:
            if server.child is not None and not server.is_lost and server.child.look():
                server.is_lost = True
                LOG.warning("%s: %s", server.command.name, server.child.failure())

    def exit_code(self, failed: Child | None) -> int:
        """What the launcher ends with: the code of the first failure, or of the signal."""
        if failed is None:
            stopped_early = self.signalled is not None and not self.ranks
            return 128 + (self.signalled or 0) if stopped_early else 0
        assert failed.code is not None
        if self._was_asked(failed):
            return failed.code
        message = f"error: {failed.name} failed first: {failed.failure()}"
        print(redaction.text(message), file=sys.stderr, flush=True)
        return failed.code


def run(servers: Sequence[Server], ranks: Sequence[Command], limits: Limits) -> int:
    """Start the servers, then the ranks, wait for the ranks, and end everything. Returns the exit
    code: 0, that of the rank that failed first, or 128 + n after signal n.
    """
    launched = Launched(limits)
    # left last, so that no signal breaks off the end of the children
    with Stopping(launched.pass_on), launched:
        launched.start_servers(servers)
        launched.wait_for_servers()
        launched.start_ranks(ranks)
        failed = launched.wait()
        return launched.exit_code(failed)


def too_slow(missing: Sequence[str], limit_s: float) -> str:
    """The message about servers that don't answer."""
    return (
        f"{', '.join(missing)}: no answer within rollout.server.start_limit_s={limit_s:g}. Their "
        "logs say how far they came; raise the limit if the model is merely slow to load."
    )
