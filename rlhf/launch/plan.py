"""Which process of a run is started where: on which node, with which cores, devices and port."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from conf.choices import EngineKind, RolloutBackend
from conf.model import EngineConfig, RolloutConfig
from conf.run import LaunchConfig, LaunchKind
from rlhf.launch import machine
from rlhf.process.devices import visible_devices
from rlhf.types import UserError

_ANY = "any"


class Role(Enum):
    """What a launched process is."""

    rank = "rank"
    server = "server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A process of a run. Node 0 has the first rank; nodes with servers alone come last."""

    role: Role
    number: int  # among those of its role
    node: int
    local: int  # number among those of its role on its node
    cores: str | None = None  # such as 0-3; None: any
    devices: str | None = None  # CUDA_VISIBLE_DEVICES; None: as the environment has it

    @property
    def name(self) -> str:
        return f"{self.role.value} {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All processes of a run."""

    kind: LaunchKind
    nodes: int  # with ranks
    server_nodes: int  # with servers alone
    devices_per_server: int  # 0 where there are none
    processes: tuple[Planned, ...] = field(default=())
    sharing: int = 1  # ranks that share rows (engine.sequence_parallel)

    @property
    def ranks(self) -> list[Planned]:
        return [process for process in self.processes if process.role is Role.rank]

    @property
    def servers(self) -> list[Planned]:
        return [process for process in self.processes if process.role is Role.server]

    @property
    def ranks_per_node(self) -> int:
        return len(self.ranks) // self.nodes

    @property
    def servers_per_node(self) -> int:
        """Servers on each node that has any."""
        return len(self.servers) // max(1, self.server_nodes)

    def on(self, node: int) -> list[Planned]:
        """The processes of a node, its servers first."""
        there = [process for process in self.processes if process.node == node]
        return sorted(there, key=lambda process: (process.role is Role.rank, process.number))


def starts_servers(rollout: RolloutConfig, generates: bool) -> bool:
    """Whether a run that `generates` needs servers that nobody has started."""
    return generates and rollout.backend is RolloutBackend.server and not rollout.servers


def plan(
    launch: LaunchConfig, engine: EngineConfig, rollout: RolloutConfig, *, generates: bool
) -> Plan:
    """Who runs where. generates: whether the stage writes responses. Raises UserError for counts
    that don't fit together or don't fit on this machine.
    """
    # under torchrun the first rank starts its servers itself
    own_servers = starts_servers(rollout, generates) and launch.kind is not LaunchKind.torchrun
    count = rollout.server.count if own_servers else 0
    size = rollout.server.tensor_parallel * rollout.server.data_parallel
    _check_server_nodes(launch, count)
    if launch.kind is LaunchKind.local:
        found = _on_this_machine(launch, engine, rollout, count, size)
    else:
        visible = visible_devices() if launch.kind is LaunchKind.torchrun else None
        per_node = _ranks_per_node(launch, engine, visible)
        processes = _servers(launch, count) + _ranks(launch.nodes, per_node)
        found = Plan(
            kind=launch.kind,
            nodes=launch.nodes,
            server_nodes=launch.server_nodes,
            devices_per_server=size,
            processes=tuple(processes),
        )
    sharing, ranks = engine.sequence_parallel, len(found.ranks)
    if ranks % sharing:
        raise UserError(
            f"engine.sequence_parallel={sharing}: {ranks} ranks are to be launched, which is no "
            f"multiple of it. Launch {-(-ranks // sharing) * sharing}, or set "
            "engine.sequence_parallel=1."
        )
    return replace(found, sharing=sharing)


def _check_server_nodes(launch: LaunchConfig, count: int) -> None:
    nodes = launch.server_nodes
    if nodes and not count:
        raise UserError(
            f"launch.server_nodes={nodes}, but no servers are to be started. Set "
            "launch.server_nodes=0, or rollout=server with rollout.servers=[]."
        )
    if nodes and count % nodes:
        raise UserError(
            f"rollout.server.count={count} servers don't spread evenly over "
            f"launch.server_nodes={nodes}. Expected a multiple of {nodes}."
        )


def _ranks_per_node(
    launch: LaunchConfig, engine: EngineConfig, devices: Sequence[str] | None
) -> int:
    """Ranks of each node. devices: those of each node that are free for ranks; None where they are
    not known here. Raises UserError.
    """
    asked, gpus = launch.ranks_per_node, engine.gpus
    if asked is not None and gpus is not None and asked * launch.nodes != gpus:
        raise UserError(
            f"engine.gpus={gpus}, but launch.nodes={launch.nodes} x launch.ranks_per_node={asked} "
            f"are {asked * launch.nodes} ranks. Leave one of them out."
        )
    if asked is None and gpus is not None:
        if gpus % launch.nodes:
            raise UserError(
                f"engine.gpus={gpus} ranks don't spread evenly over launch.nodes={launch.nodes}."
            )
        asked = gpus // launch.nodes
    if asked is None:
        asked = _default_ranks(launch, engine, devices)
    if asked * launch.nodes > 1 and engine.kind is EngineKind.torch:
        raise UserError(
            f"engine=torch runs in one process, but {asked * launch.nodes} ranks are to be "
            "launched. Use engine=zero0, zero1, zero2 or zero3, or launch.ranks_per_node=1."
        )
    return asked


def _default_ranks(
    launch: LaunchConfig, engine: EngineConfig, devices: Sequence[str] | None
) -> int:
    if engine.kind is EngineKind.torch and launch.nodes == 1:
        return 1
    if devices is None:
        raise UserError(
            f"launch.ranks_per_node=None with launch={launch.kind.value}: the other machines' "
            "devices are not known here. Set launch.ranks_per_node, or engine.gpus."
        )
    return max(1, len(devices))


def _ranks(nodes: int, per_node: int) -> list[Planned]:
    out = []
    for number in range(nodes * per_node):
        node, local = divmod(number, per_node)
        out.append(Planned(role=Role.rank, number=number, node=node, local=local))
    return out


def _servers(launch: LaunchConfig, count: int) -> list[Planned]:
    """Servers on nodes of their own, or all on the first."""
    per_node = count // max(1, launch.server_nodes)
    first = launch.nodes if launch.server_nodes else 0
    out = []
    for number in range(count):
        node, local = divmod(number, per_node)
        out.append(Planned(role=Role.server, number=number, node=first + node, local=local))
    return out


# ---- on this machine ----


def _on_this_machine(
    launch: LaunchConfig, engine: EngineConfig, rollout: RolloutConfig, count: int, size: int
) -> Plan:
    """The plan of launch=local: ranks take the first devices, servers the next ones."""
    devices = visible_devices()
    if launch.cores is not None and launch.ranks_per_node is None and engine.gpus is None:
        ranks = len(launch.cores)
    else:
        free = _left(devices, rollout, count * size)
        ranks = _ranks_per_node(launch, engine, free)
    _check_cores(launch, rollout, ranks)
    of_ranks, of_servers = _share(devices, launch, rollout, ranks, count, size)
    processes = []
    cores = rollout.server.cores
    for number in range(count):
        processes.append(
            Planned(
                role=Role.server,
                number=number,
                node=0,
                local=number,
                cores=cores[number] if cores is not None else None,
                devices=of_servers[number],
            )
        )
    for number in range(ranks):
        processes.append(
            Planned(
                role=Role.rank,
                number=number,
                node=0,
                local=number,
                cores=launch.cores[number] if launch.cores is not None else None,
                devices=of_ranks,
            )
        )
    return Plan(
        kind=launch.kind,
        nodes=1,
        server_nodes=0,
        devices_per_server=size if devices else 0,
        processes=tuple(processes),
    )


def _left(devices: Sequence[str], rollout: RolloutConfig, of_servers: int) -> list[str]:
    """The devices that no server takes."""
    if rollout.server.devices is None:
        return list(devices[: max(0, len(devices) - of_servers)])
    taken = {name.strip() for names in rollout.server.devices for name in names.split(",")}
    return [name for name in devices if name not in taken]


def _check_cores(launch: LaunchConfig, rollout: RolloutConfig, ranks: int) -> None:
    """Lists of cores have an entry for each process, and name cores of this machine."""
    if launch.cores is not None and len(launch.cores) != ranks:
        raise UserError(
            f"launch.cores={launch.cores}: expected an entry for each of {ranks} ranks."
        )
    for key, lists in (
        ("launch.cores", launch.cores),
        ("rollout.server.cores", rollout.server.cores),
    ):
        for text in lists or ():
            machine.parse_cores(key, text)


def _share(
    devices: Sequence[str],
    launch: LaunchConfig,
    rollout: RolloutConfig,
    ranks: int,
    count: int,
    size: int,
) -> tuple[str | None, list[str | None]]:
    """CUDA_VISIBLE_DEVICES of all ranks, and of each of `count` servers of `size` devices; None on
    a machine without devices. Raises UserError where there are too few.
    """
    if not devices:
        return None, [None] * count
    servers = rollout.server.devices
    if launch.devices is not None:
        names = launch.devices.split(",")
        if len(names) != ranks:
            raise UserError(
                f"launch.devices={launch.devices!r}: expected a device for each of {ranks} ranks."
            )
        of_ranks = launch.devices
        rest = [name for name in devices if name not in names]
    else:
        free = _left(devices, rollout, 0)
        of_ranks, rest = ",".join(free[:ranks]), free[ranks:]
        if len(free) < ranks:
            raise _too_few(devices, ranks, count, size)
    if servers is not None:
        return of_ranks, list(servers)
    if len(rest) < count * size:
        raise _too_few(devices, ranks, count, size)
    parts = [rest[number * size : (number + 1) * size] for number in range(count)]
    return of_ranks, [",".join(part) for part in parts]


def _too_few(devices: Sequence[str], ranks: int, count: int, size: int) -> UserError:
    return UserError(
        f"{ranks} ranks and {count} servers of {size} devices need {ranks + count * size} devices, "
        f"but this machine shows {len(devices)}. Set launch.ranks_per_node or rollout.server.count "
        "lower, or name devices that both share in launch.devices and rollout.server.devices."
    )


# ---- for people ----


def rows(planned: Plan, addresses: dict[str, str]) -> list[dict[str, str]]:
    """The plan as a table. addresses: by a process's name, where it can be reached, as far as that
    is known before the start.
    """
    out = []
    nodes = planned.nodes + planned.server_nodes
    for node in range(nodes):
        for process in planned.on(node):
            where = "this machine" if planned.kind is LaunchKind.local else f"node {node}"
            out.append(
                {
                    "process": process.name,
                    "where": where,
                    "devices": _devices(planned, process),
                    "cores": process.cores or _ANY,
                    "address": addresses.get(process.name, ""),
                }
            )
            if planned.sharing > 1:
                out[-1]["rows"] = _rows_of(planned, process)
    return out


def _rows_of(planned: Plan, process: Planned) -> str:
    """The group of ranks whose rows a rank has a part of."""
    if process.role is not Role.rank:
        return ""
    return f"of group {process.number // planned.sharing}"


def _devices(planned: Plan, process: Planned) -> str:
    """The device of a rank among those that all ranks of its node see; all devices of a server."""
    if process.devices is not None:
        names = process.devices.split(",")
        return names[process.local] if process.role is Role.rank else process.devices
    if planned.kind is LaunchKind.local:
        return "none"
    if process.role is Role.rank:
        return f"{process.local} of its node"
    return f"{planned.devices_per_server} of its node"
