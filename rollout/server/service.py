"""The servers of a run as one rank uses them: rank 0 starts or finds them and brings back those
that fail; the other ranks ask the same servers and wait for rank 0.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.model import Transfer
from conf.schema import RolloutConfig
from rlhf.types import UserError
from rollout.server.adapters import Adapters
from rollout.server.client import Server, ServerFault
from rollout.server.fleet import PROBE_S, Connection, OwnServers, RunningServers
from rollout.server.pool import Member, Pool
from rollout.server.process import Recipe
from rollout.server.routes import Model, Route, make_route, on_this_machine

_FRESH = "default"  # vLLM's label of the weights that a server started with
_LOOK_S = 1.0  # between two looks at the weights of a server that is away


@dataclass(slots=True)
class Current:
    """What servers have to hold."""

    version: int = 0
    # labels of whole weights whose responses are taken -> version; empty before the first sync
    labels: dict[str, int] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)  # own name -> name at servers
    chosen: str | None = None  # the adapter that writes, by its name at servers

    def fault(self, labels: Sequence[str]) -> str | None:
        """What is wrong with the weights that wrote a response, by their labels."""
        strange = sorted(set(labels) - set(self.labels))
        if not self.labels or not strange:
            return None
        return f"its weights are {strange[0]!r}, not version {self.version}"

    def is_held(self, server: Server) -> bool:
        """Whether a server holds it. Raises ServerFault."""
        if self.adapters and not set(self.adapters.values()) <= set(server.adapters()):
            return False
        return not self.labels or server.held_version() in self.labels


@dataclass(frozen=True, slots=True)
class Setup:
    """What the ways to servers have in common."""

    cfg: RolloutConfig
    model: Model
    max_tokens: int  # prompt and response together
    folder: Path  # of logs, descriptions, and files for servers on other machines
    connection: Connection


class Service:
    """The servers, the way of weights to them, and what they have to hold."""

    def __init__(self, setup: Setup, fleet: OwnServers | RunningServers, run: str) -> None:
        self.run = run  # sets this run's adapters apart from others'
        self.current = Current()
        self.fleet = fleet
        self.pool: Pool
        self.route: Route
        self.adapters = Adapters(run, None if on_this_machine(fleet.urls) else setup.folder)
        self._setup = setup

    def lead(self, transfer: Transfer) -> None:
        """On rank 0: connect to the servers and tell them what they will get. Raises UserError,
        ServerFault.
        """
        self.route = self._route(transfer, sender=True)
        servers = self.fleet.connect()
        for server in servers:
            self._check(server)
        self.route.open(servers)
        self.pool = self._pool(servers, self._bring_back)

    def follow(self) -> None:
        """On the other ranks."""
        self.route = self._route(Transfer.file, sender=False)
        servers = self.fleet.connect()
        self.pool = self._pool(servers, self._wait_for)

    def _pool(self, servers: Sequence[Server], bring_back: Callable[[Member], Server]) -> Pool:
        most = self._setup.cfg.server.restarts
        return Pool(servers, bring_back=bring_back, accept=self.current.fault, most_failures=most)

    def _route(self, transfer: Transfer, *, sender: bool) -> Route:
        setup = self._setup
        return make_route(
            transfer,
            setup.model,
            self.fleet.urls,
            limit_s=setup.cfg.sync_limit_s,
            in_flight=setup.cfg.in_flight,
            sender=sender,
            shared_folder=setup.folder,
        )

    def _check(self, server: Server) -> None:
        """It takes the longest sequences. Raises UserError or ServerFault."""
        longest, needed = server.longest(), self._setup.max_tokens
        if longest < needed:
            raise UserError(
                f"rollout.servers={server.url}: it takes sequences of {longest} tokens, but "
                f"data.max_prompt_length + rollout.max_response_length (of episodes "
                f"environment.max_tokens) are {needed}. Lower them, "
                "or start it with the same values (stage=serve_rollout)."
            )

    def _bring_back(self, member: Member) -> Server:
        """On rank 0, in a thread: a server that failed, with the current weights. Raises
        ServerFault.
        """
        self.route.leave(member.server)
        deadline = time.monotonic() + self._setup.cfg.server.start_limit_s
        while True:
            server = self.fleet.again(member.url)
            try:
                if not self._update(server, tainted=member.tainted):
                    self._await_sync(server)
                server.probe(model=self.current.chosen, limit_s=PROBE_S)
                return server
            except _TooLate:
                raise
            except ServerFault:
                server.close()
                # own servers may be restarted so many times, others so long
                is_late = time.monotonic() > deadline
                if is_late and isinstance(self.fleet, RunningServers):
                    raise
            time.sleep(_LOOK_S)

    def _update(self, server: Server, *, tainted: bool) -> bool:
        """Give a server that answers again the current weights, unless it has them; returns whether
        it has them then, and gets those of later syncs. Raises ServerFault.
        """
        label = server.held_version()
        if tainted and label != _FRESH:
            # It ends at the next request. Who started it starts it anew.
            cause = "an update of its weights failed"
            server.call("rlhf_condemn", reason=cause, limit_s=PROBE_S)
            raise ServerFault(server.url, f"{cause}; start it anew")
        is_current = self.route.rejoin(server, label)
        if self.current.adapters:
            self.adapters.load_latest(server, self._setup.cfg.sync_limit_s)
        return is_current or not self.current.labels

    def _await_sync(self, server: Server) -> None:
        """Wait until the next sync has brought the weights. Raises ServerFault."""
        while not self.current.is_held(server):
            if not self.pool.has_serving():
                cause = (
                    "a restarted server gets its weights with the next sync only, and no other "
                    "writes until then; rollout.server.transfer=file and gloo keep them"
                )
                raise _TooLate(server.url, cause)
            time.sleep(_LOOK_S)

    def _wait_for(self, member: Member) -> Server:
        """On the other ranks, in a thread: a server that rank 0 brought back. Raises
        ServerFault.
        """
        cfg = self._setup.cfg
        limit_s = cfg.server.start_limit_s + cfg.sync_limit_s
        deadline = time.monotonic() + limit_s
        while True:
            server = self.fleet.again(member.url)
            if self.current.is_held(server):
                return server
            server.close()
            if time.monotonic() > deadline:
                raise ServerFault(member.url, f"rank 0 did not bring it back in {limit_s:g} s")
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """End the servers that this run started, and delete the files for weights."""
        self.pool.close()
        self.route.close()
        self.adapters.close()
        self.fleet.close()


class _TooLate(ServerFault):
    """No further restart would help."""


def own_service(setup: Setup, recipe: Recipe) -> Service:
    """Servers that this process starts."""
    fleet = OwnServers(recipe, setup.folder, setup.connection)
    return Service(setup, fleet, secrets.token_hex(4))


def running_service(setup: Setup, urls: Sequence[str], run: str | None = None) -> Service:
    """Servers that run already. `run`: None: a new one."""
    fleet = RunningServers(urls, setup.cfg.server, setup.connection)
    return Service(setup, fleet, run or secrets.token_hex(4))
