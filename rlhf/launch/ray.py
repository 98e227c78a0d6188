"""launch=ray: ranks and rollout servers on a Ray cluster. A placement group has a bundle for each
node of the plan; an actor in each bundle starts the processes of that node.

Ray finds the nodes and, after the loss of one, another; starting, signals and the first cause are
as with launch=local. Code and files are expected at the same paths on all nodes.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conf.run import LaunchConfig, RayConfig
from rlhf.launch import build, local, machine, ready
from rlhf.launch.build import Meeting, Setup
from rlhf.launch.children import end_all, first_failed
from rlhf.launch.plan import Plan, Planned, Role
from rlhf.process.libraries import require
from rlhf.process.supervision import Stopping
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.launch")
_EVERY = "0.0.0.0"  # servers have to be reached from other nodes
_POLL_S = 0.5
_MARGIN_S = 30.0  # that an actor gets beyond the time that its processes have to end


# ---- on a node ----


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank of a node that failed first."""

    name: str
    code: int
    cause: str
    at: float  # seconds of the node's clock


class Node:
    """The processes of one node of the plan; lives in an actor there."""

    def __init__(self, planned: Plan, setup: Setup, limits: local.Limits, number: int) -> None:
        self._plan, self._setup = planned, setup
        self._processes = on_reserved_devices(planned, number, os.environ)
        self._launched = local.Launched(limits)
        self._ports = machine.Ports()
        # removed with the actor's process
        self._failures = TemporaryDirectory(prefix="rlhf-launch-")

    def reserve(self, port: int, server_port: int) -> tuple[str, int, list[str]]:
        """The node's address, a port for the ranks to meet at, and the URLs of its servers. The
        arguments are the ports that are wished, or 0.
        """
        import ray

        address: str = ray.util.get_node_ip_address()
        meet = self._ports.keep("launch.port", port)
        for process in self._of(Role.server):
            wished = server_port + process.local if server_port else 0
            chosen = self._ports.keep("launch.server_port", wished)
            command = build.server_command(self._setup, process, _EVERY, chosen)
            self._launched.servers.append(local.Server(command, f"http://{address}:{chosen}"))
        return address, meet, [server.url for server in self._launched.servers]

    def start_servers(self) -> None:
        """Start the node's servers."""
        self._launched.start_servers(self._launched.servers)

    def missing(self) -> list[str]:
        """The URLs of servers that don't answer yet. Raises UserError for one that has ended."""
        self._launched.check_servers()
        return [server.url for server in self._launched.servers if not ready.answers(server.url)]

    def start_ranks(self, meeting: Meeting) -> None:
        """Start the node's ranks."""
        failures = Path(self._failures.name)
        commands = [
            build.rank_command(self._setup, self._plan, process, meeting, failures)
            for process in self._of(Role.rank)
        ]
        self._launched.start_ranks(commands)

    def look(self) -> tuple[bool, Failed | None]:
        """Whether the node's ranks have ended or one has failed, and the one that failed first."""
        is_over = self._launched.is_over()
        child = first_failed(self._launched.ranks)
        if child is None or child.code is None:
            return is_over, None
        at = time.time() - (time.monotonic() - child.ended_at)
        return is_over, Failed(child.name, child.code, child.failure(), at)

    def tell(self, number: int) -> None:
        """Pass a signal on to the node's ranks."""
        self._launched.pass_on(number)

    def end_ranks(self) -> None:
        """End the node's ranks."""
        end_all(self._launched.ranks, self._launched.limits.grace_s)

    def end_servers(self) -> None:
        """End the node's servers, once no rank needs them."""
        self._launched.__exit__()
        self._ports.close()

    def _of(self, role: Role) -> list[Planned]:
        return [process for process in self._processes if process.role is role]


def on_reserved_devices(planned: Plan, node: int, environment: Any) -> list[Planned]:
    """The processes of a node with the devices that Ray reserved there and named in `environment`:
    ranks on the first ones, each server on some of the rest. Unchanged where it reserved none.
    """
    processes = planned.on(node)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in visible.split(",") if name]
    if not names:
        return processes
    ranks = sum(process.role is Role.rank for process in processes)
    size, out = planned.devices_per_server, []
    for process in processes:
        first = ranks + process.local * size
        taken = names[:ranks] if process.role is Role.rank else names[first : first + size]
        out.append(dataclasses.replace(process, devices=",".join(taken)))
    return out


# ---- on the machine of the command ----


def bundles(options: RayConfig, planned: Plan, gpus: bool) -> list[dict[str, float]]:
    """What each node of the plan reserves. gpus: devices, too."""
    out = []
    for node in range(planned.nodes + planned.server_nodes):
        processes = planned.on(node)
        ranks = sum(process.role is Role.rank for process in processes)
        servers = len(processes) - ranks
        bundle = {"CPU": ranks * options.cpus_per_rank + servers * options.cpus_per_server}
        if gpus:
            bundle["GPU"] = float(ranks + servers * planned.devices_per_server)
        out.append(bundle)
    return out


@contextlib.contextmanager
def _cluster(options: RayConfig) -> Iterator[Any]:
    """Ray's module, connected to the cluster or to a new one of this machine."""
    ray = require("ray", "ray")
    # Ray's client, which such an address asks for, takes no options of a cluster
    own = {} if "://" in (options.address or "") else {"include_dashboard": False}
    try:
        ray.init(address=options.address, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = options.address or os.environ.get("RAY_ADDRESS") or "a cluster of this machine"
        raise UserError(
            f"launch.ray.address={options.address}: no connection to {where} ({error}). Start a "
            "cluster with `ray start --head`, or leave the address out."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class _Run:
    """A run on the cluster, with the actors of its nodes while they are there."""

    def __init__(self, ray: Any, launch: LaunchConfig, planned: Plan, limits: local.Limits) -> None:
        self._ray, self._launch, self._plan, self._limits = ray, launch, planned, limits
        self._nodes: list[Any] = []
        self._signalled: int | None = None

    def place(self) -> Any:
        """The placement group, once the cluster has room for it. Raises UserError."""
        ray, options = self._ray, self._launch.ray
        gpus = options.gpus
        if gpus is None:
            gpus = ray.cluster_resources().get("GPU", 0) > 0
        wished = bundles(options, self._plan, gpus)
        group = ray.util.placement_group(wished, strategy=options.strategy.value)
        try:
            ray.get(group.ready(), timeout=options.wait_s)
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(
                f"launch.ray.wait_s={options.wait_s:g}: the cluster has no room for {wished} "
                f"({options.strategy.value}); it has {ray.cluster_resources()} in all. Ask for "
                "fewer ranks or cores (launch.ray.cpus_per_rank), or raise the limit."
            ) from error
        return group

    def pass_on(self, number: int) -> None:
        """A signal came: tell all ranks. Called from another thread."""
        self._signalled = number
        for node in list(self._nodes):
            node.tell.remote(number)

    def once(self, group: Any, setup: Setup) -> int:
        """Start all processes, wait for the ranks, and end everything; the exit code."""
        self._start_nodes(group, setup)
        try:
            self._start(setup)
            while True:
                is_over, failed = self._look()
                if is_over:
                    break
                time.sleep(_POLL_S)
            return self._exit_code(failed)
        finally:
            self._end()

    def _start_nodes(self, group: Any, setup: Setup) -> None:
        strategies = self._ray.util.scheduling_strategies
        actor = self._ray.remote(Node)
        self._nodes = []
        for number, bundle in enumerate(group.bundle_specs):
            strategy = strategies.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=number
            )
            options = actor.options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=strategy,
            )
            node = options.remote(self._plan, setup, self._limits, number)
            self._nodes.append(node)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What a method returns on each node. Raises UserError as a node does."""
        asked = [getattr(node, method).remote(*arguments) for node in self._nodes]
        try:
            return list(self._ray.get(asked))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise

    def _start(self, setup: Setup) -> None:
        """The servers, and once they answer the ranks."""
        reserved = self._all("reserve", self._launch.port, self._launch.server_port)
        urls = [url for _, _, of_node in reserved for url in of_node]
        if urls:
            self._all("start_servers")
            self._wait_for_servers()
        address, port, _ = reserved[0]
        meeting = Meeting(address=address, port=port, urls=",".join(urls) or None)
        if self._signalled is None:
            self._all("start_ranks", meeting)

    def _wait_for_servers(self) -> None:
        deadline = time.monotonic() + self._limits.start_s
        while self._signalled is None:
            missing = [url for of_node in self._all("missing") for url in of_node]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise UserError(local.too_slow(missing, self._limits.start_s))
            time.sleep(_POLL_S)

    def _look(self) -> tuple[bool, Failed | None]:
        """Whether the run is over: one rank has failed, or all have ended."""
        looks = self._all("look")
        failures = [failed for _, failed in looks if failed is not None]
        first = min(failures, key=lambda failed: failed.at, default=None)
        failed_by_itself = first is not None and not self._was_asked(first)
        return failed_by_itself or all(over for over, _ in looks), first

    def _was_asked(self, failed: Failed) -> bool:
        return self._signalled is not None and failed.code in local.STOPPED

    def _exit_code(self, failed: Failed | None) -> int:
        if failed is None:
            return 0
        if not self._was_asked(failed):
            print(f"error: {failed.name} failed first: {failed.cause}", file=sys.stderr)
        return failed.code

    def _end(self) -> None:
        """End all processes on the nodes that are left, the ranks first."""
        limit = self._limits.grace_s + _MARGIN_S
        for method in ("end_ranks", "end_servers"):
            asked = [getattr(node, method).remote() for node in self._nodes]
            for answer in asked:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    self._ray.get(answer, timeout=limit)
        for node in self._nodes:
            self._ray.kill(node)
        self._nodes = []


def run(
    launch: LaunchConfig, planned: Plan, setup: Setup, limits: local.Limits, saved: Path
) -> int:
    """Place and start the processes, wait for the ranks, and end everything. Returns the exit code.

    saved: the run's directory, from which it goes on after a node was lost.
    """
    with _cluster(launch.ray) as ray:
        placed = _Run(ray, launch, planned, limits)
        with Stopping(placed.pass_on):
            group = placed.place()
            for left in reversed(range(launch.ray.restarts + 1)):
                try:
                    return placed.once(group, setup)
                except ray.exceptions.RayActorError as error:
                    if left == 0:
                        raise UserError(
                            f"launch=ray: a node or its actor was lost ({error}). "
                            "run.resume=true goes on from the last checkpoint; "
                            "launch.ray.restarts lets a run do so by itself."
                        ) from error
                    LOG.warning("a node was lost; the run starts again (%d left): %s", left, error)
                    setup = dataclasses.replace(setup, argv=_resumed(setup.argv, saved))
    raise AssertionError("unreachable: the last round returns or raises")


def _resumed(argv: Sequence[str], saved: Path) -> list[str]:
    """The command line that goes on with the run in `saved`, if it has begun."""
    keys = ("run.resume", "run.overwrite")
    kept = [word for word in argv if word.lstrip("+").partition("=")[0] not in keys]
    return [*kept, "run.resume=true"] if saved.is_dir() else kept
