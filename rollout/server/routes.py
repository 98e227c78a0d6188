"""How weights get from the trainer into vLLM servers. Runs in the trainer, without vLLM.

    file   a safetensors file in memory or on a shared disk: the plainest way
    gloo   over the network, in buckets (rollout/server/stream.py)
    nccl   between devices                    } rollout/server/device_routes.py
    ipc    within a device that both share    }

What a server does with them is in rollout/server/extension.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from conf.model import Transfer
from rlhf.process.files import memory_folder
from rlhf.process.http import is_loopback
from rlhf.types import UserError
from rollout.server.client import Server, ServerFault
from rollout.server.stream import Broadcast, Group, buckets, last_message, message, own_address
from rollout.server.updates import Deadline, Model, Updates, in_background, take_all
from rollout.server.weight_file import WeightFile
from rollout.weights import Incoming


class Route(Protocol):
    """Takes weights to servers. On ranks that do not send, every method but `send` does nothing."""

    def open(self, servers: Sequence[Server]) -> None:
        """Tell the servers what to expect; before anything else. Raises ServerFault."""
        ...

    def send(self, incoming: Incoming, version: int) -> list[ServerFault]:
        """Give all servers the weights, and resume those that hold them. Returns a fault for each
        server that does not: it is condemned, and gets no more weights before `rejoin`. Every rank
        takes the whole of `incoming`, whose `finish` is called.

        Raises SyncError for weights that do not fit the model, or that vLLM's code for the family
        does not take; all servers that saw some of them are condemned then.
        """
        ...

    def rejoin(self, server: Server, label: str) -> bool:
        """Take in a server that was away; `label`: of the weights that it holds. Returns whether it
        holds the latest ones now and may write; otherwise the next `send` brings them. Raises
        ServerFault.
        """
        ...

    def leave(self, server: Server) -> None:
        """Send nothing more to a server that is gone."""
        ...

    def close(self) -> None: ...


def on_this_machine(urls: Iterable[str]) -> bool:
    """Whether all the servers listen on a loopback address."""
    return all(is_loopback(urlsplit(url).hostname or "") for url in urls)


def resolve_transfer(
    transfer: Transfer, urls: Iterable[str], *, cuda: bool, shared_device: bool = False
) -> Transfer:
    """The way that `auto` stands for: nccl between devices, ipc within one that trainer and server
    share; on CPUs a file for servers on this machine, else gloo.
    """
    if transfer is not Transfer.auto:
        return transfer
    if cuda:
        return Transfer.ipc if shared_device else Transfer.nccl
    return Transfer.file if on_this_machine(urls) else Transfer.gloo


def engine_name(transfer: Transfer) -> str:
    """vLLM's name of the weight-transfer engine that a server has to be started with."""
    if transfer in (Transfer.nccl, Transfer.ipc):
        return transfer.value
    return "rlhf"  # rollout/server/extension.py registers it


def make_route(
    transfer: Transfer,
    model: Model,
    urls: Sequence[str],
    *,
    limit_s: float,
    in_flight: bool = False,
    sender: bool = True,
    shared_folder: Path | None = None,
) -> Route:
    """The way `transfer`, which is not auto any more (`resolve_transfer`).

    `limit_s`: of one update of all servers. `in_flight`: requests wait during an update and go on
    with the new weights; else they end before. `sender`: whether this rank sends. `shared_folder`:
    on a disk that servers on other machines see, for the file. Raises UserError.
    """
    updates = Updates(model, limit_s=limit_s, in_flight=in_flight, sender=sender)
    if transfer in (Transfer.nccl, Transfer.ipc):
        from rollout.server.device_routes import make_device_route

        return make_device_route(transfer, updates)
    if transfer is Transfer.gloo:
        return GlooRoute(updates)
    if on_this_machine(urls):
        return FileRoute(updates, memory_folder())
    if shared_folder is None:
        raise UserError(
            "rollout.server.transfer=file: the servers are on other machines, and no folder is "
            "known that they share with this one. Set rollout.server.transfer=gloo."
        )
    return FileRoute(updates, shared_folder)


class FileRoute:
    """By a safetensors file. Servers go on writing while it grows, and weights that do not fit
    never reach one; a restarted server is brought to the version at once.
    """

    def __init__(self, updates: Updates, place: Path | None) -> None:
        """`place`: None: the system's folder for temporary files."""
        self._updates = updates
        self._place = place
        self._file: WeightFile | None = None
        self._held: int | None = None  # version of the whole file

    def open(self, servers: Sequence[Server]) -> None:
        if self._updates.sender:
            for server in servers:
                self._join(server)

    def _join(self, server: Server) -> None:
        self._updates.prepare(server)
        names = self._updates.model.names
        self._updates.join(server, {"family": names.family, "copies": sorted(names.copies)})
        self._updates.servers[server.url] = server

    def send(self, incoming: Incoming, version: int) -> list[ServerFault]:
        if not self._updates.sender:
            take_all(incoming, version)
            return []
        with self._updates.lock:
            self._held = None
            file = self._written(incoming, version)
            incoming.finish(version)
            self._held = version
            return self._load(file, list(self._updates.servers.values()), version)

    def _written(self, incoming: Incoming, version: int) -> WeightFile:
        try:
            if self._file is None:
                self._file = WeightFile(self._updates.model.specs, self._place)
            self._file.write(incoming)
        except OSError as error:
            if incoming.failed:
                raise
            take_all(incoming, version)  # other ranks wait for this one
            raise UserError(
                f"rollout.server.transfer=file: the weights can't be written in "
                f"{self._place or 'the folder of temporary files'} ({error.strerror or error}). "
                "Free some room there, or set rollout.server.transfer=gloo."
            ) from error
        return self._file

    def _load(self, file: WeightFile, servers: Sequence[Server], version: int) -> list[ServerFault]:
        faults = self._updates.pause_all(servers, version)
        failed = {fault.url for fault in faults}
        deadline = Deadline(self._updates.limit_s)
        info = {"path": str(file.path)}
        running = {}
        for server in servers:
            if server.url not in failed:
                update = partial(self._updates.update, server, info, version, deadline)
                running[server.url] = in_background(update)
        return faults + self._updates.settle(running, version, deadline)

    def rejoin(self, server: Server, label: str) -> bool:
        with self._updates.lock:
            self._join(server)
            if self._held is None or self._file is None:
                return False
            if label == str(self._held):
                return True
            for fault in self._load(self._file, [server], self._held):
                raise fault
            return True

    def leave(self, server: Server) -> None:
        with self._updates.lock:
            self._updates.servers.pop(server.url, None)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class GlooRoute:
    """By gloo, in buckets, to a group of each server's own. The sender keeps a copy of the latest
    weights on its host, so that a restarted server is brought to the version at once.
    """

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._groups: dict[str, Group] = {}  # by the servers' URLs
        self._kept: dict[str, Tensor] = {}  # in the servers' dtype
        self._held: int | None = None  # version of the copy, where it is whole

    def open(self, servers: Sequence[Server]) -> None:
        if self._updates.sender:
            for server in servers:
                self._join(server)

    def _join(self, server: Server) -> None:
        from torch.distributed import TCPStore

        workers, _ = self._updates.prepare(server)
        address = _way_to(server)
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        names = self._updates.model.names
        info = {
            "family": names.family,
            "copies": sorted(names.copies),
            "host": address,
            "port": store.port,
            "size": 1 + workers,
            "limit_s": self._updates.limit_s,
        }
        group = partial(
            Group, store, 0, 1 + workers, address=address, limit_s=self._updates.limit_s
        )
        theirs = in_background(partial(self._updates.join, server, info))
        ours = in_background(group)
        both: list[Future[Any]] = [theirs, ours]
        wait(both, timeout=self._updates.limit_s, return_when=FIRST_EXCEPTION)
        self._groups[server.url] = _joined(server, theirs, ours)
        self._updates.servers[server.url] = server

    def send(self, incoming: Incoming, version: int) -> list[ServerFault]:
        if not self._updates.sender:
            take_all(incoming, version)
            return []
        with self._updates.lock:
            self._held = None
            servers = list(self._updates.servers.values())
            return self._update(servers, self._taken(incoming, version), version)

    def _taken(self, incoming: Incoming, version: int) -> Iterator[tuple[str, Tensor]]:
        """All tensors of `incoming`, as they are kept."""
        specs = self._updates.model.specs
        for name, tensor in incoming:
            if name not in self._kept:
                spec = specs[name]
                self._kept[name] = torch.empty(spec.shape, dtype=spec.dtype)
            yield name, self._kept[name].copy_(tensor.detach())
        incoming.finish(version)
        self._held = version

    def _update(
        self, servers: Sequence[Server], tensors: Iterator[tuple[str, Tensor]], version: int
    ) -> list[ServerFault]:
        """Give the servers all of `tensors`."""
        try:
            faults = self._updates.pause_all(servers, version)
            failed = {fault.url for fault in faults}
            paused = [server for server in servers if server.url not in failed]
            return faults + self._stream(paused, tensors, version)
        finally:
            for server in servers:
                if server.url not in self._updates.servers:
                    self._groups.pop(server.url).close()

    def _stream(
        self, servers: Sequence[Server], tensors: Iterator[tuple[str, Tensor]], version: int
    ) -> list[ServerFault]:
        """Send to servers that are paused. One that stops taking tensors is left alone: its update
        has failed, or will.
        """
        deadline = Deadline(self._updates.limit_s)
        running = {}
        for server in servers:
            update = partial(self._updates.update, server, {}, version, deadline)
            running[server.url] = in_background(update)
        # a part of the time for a server that hangs, so that the others are not late as well
        broadcast = Broadcast(self._groups, running, self._updates.limit_s / 4)
        try:
            for bucket in buckets(tensors, self._updates.model.specs):
                broadcast.send(message(bucket))
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            broadcast.send(last_message(reason))
            self._updates.condemn_all(running, reason)
            raise
        broadcast.send(last_message(None))
        return self._updates.settle(running, version, deadline)

    def rejoin(self, server: Server, label: str) -> bool:
        with self._updates.lock:
            self._join(server)
            if self._held is None:
                return False
            if label == str(self._held):
                return True
            for fault in self._update([server], iter(self._kept.items()), self._held):
                raise fault
            return True

    def leave(self, server: Server) -> None:
        with self._updates.lock:
            self._updates.servers.pop(server.url, None)
            group = self._groups.pop(server.url, None)
            if group is not None:
                group.close()

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._groups.clear()


def _way_to(server: Server) -> str:
    """This machine's address as the server sees it. Raises ServerFault."""
    parts = urlsplit(server.url)
    try:
        return own_address(parts.hostname or "", parts.port or 80)
    except OSError as error:
        raise ServerFault(server.url, f"no way to its machine ({error})") from error


def _joined(server: Server, theirs: "Future[None]", ours: "Future[Group]") -> Group:
    """Our end of the group. Raises ServerFault where one side did not join."""
    if theirs.done():
        theirs.result()
    if not ours.done():
        raise ServerFault(server.url, "its workers did not join the gloo group in time")
    try:
        return ours.result()
    except RuntimeError as error:
        raise ServerFault(server.url, f"no gloo group with its workers ({error})") from error
