"""Weights between devices, by vLLM's own engines: nccl between devices of their own, ipc within one
that trainer and server share.

NOT RUN ON A GPU: written from vLLM 0.32's source, since no device was at hand. Unlike the other
ways these import vLLM into the trainer, for its communicator and its handles.
"""

import base64
import math
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from conf.model import Transfer
from rlhf.process import distributed
from rlhf.types import UserError
from rollout.server.client import Server, ServerFault
from rollout.server.stream import own_address
from rollout.server.updates import Deadline, Refused, Updates, in_background, take_all
from rollout.weights import Incoming

_BUFFER_BYTES = 256 * 2**20
# Its joined experts and sinks go around vLLM's weight loaders (rollout.vllm_private.Streamed).
_REFUSED_FAMILIES = ("gpt_oss",)


def make_device_route(transfer: Transfer, updates: Updates) -> "DeviceRoute":
    """Raises UserError for a family whose weights vLLM's engines do not take."""
    if updates.family in _REFUSED_FAMILIES:
        raise UserError(
            f"rollout.server.transfer={transfer.value}: vLLM does not take {updates.family}'s "
            "weights this way. Set rollout.server.transfer=file."
        )
    return NCCLRoute(updates) if transfer is Transfer.nccl else IPCRoute(updates)


class DeviceRoute:
    """What both ways share: an update in three steps, in which all servers take part. A fault of
    one ends it for all of them, since vLLM's engines send to all at once.
    """

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self._unknown: frozenset[str] = frozenset()
        self._latest: int | None = None  # version that servers were given

    every_rank_packs: bool

    def open(self, servers: Sequence[Server]) -> None:
        if self.updates.sender:
            self.updates.servers = {server.url: server for server in servers}
            self.connect()

    def prepare(self, server: Server) -> int:
        """How many workers a server has; they know the model then. Raises ServerFault."""
        workers, has_head = self.updates.prepare(server)
        self._unknown = frozenset(() if has_head else self.updates.model.names.copies)
        return workers

    def connect(self) -> None:
        """Set up both ends, for the servers that take part now. Raises ServerFault."""
        raise NotImplementedError

    def transmit(self, tensors: Iterator[tuple[str, Tensor]], deadline: Deadline) -> None:
        """Send all tensors. Raises ServerFault or Refused."""
        raise NotImplementedError

    def send(self, incoming: Incoming, version: int) -> list[ServerFault]:
        # none on ranks that do not send
        if not (self.updates.servers or self.every_rank_packs):
            take_all(incoming, version)
            return []
        with self.updates.lock:
            urls = list(self.updates.servers)
            self._latest = None
            try:
                self._update(incoming, version)
                self._latest = version
            except (ServerFault, Refused) as error:
                self.updates.condemn_all(urls, str(error))
                take_all(incoming, version)  # other ranks wait for this one
                return [ServerFault(url, str(error)) for url in urls]
            except BaseException as error:
                self.updates.condemn_all(urls, f"{type(error).__name__}: {error}")
                raise
            return []

    def _update(self, incoming: Incoming, version: int) -> None:
        deadline = Deadline(self.updates.limit_s)
        call = self.updates.call
        self.each(self.updates.pause, deadline)
        self.each(partial(call, method="rlhf_start"), deadline)
        self.transmit(self._cast(incoming), deadline)
        incoming.finish(version)
        self.each(partial(call, method="rlhf_finish"), deadline)
        self.each(partial(self.updates.resume, version=version), deadline)

    def each(self, step: Callable[..., None], deadline: Deadline) -> None:
        """A step of the update on all servers at once; on ranks that do not send there are none.
        Raises ServerFault or Refused.
        """
        running = {}
        for url, server in self.updates.servers.items():
            running[url] = in_background(partial(step, server, deadline=deadline))
        for url, future in running.items():
            _result(future, url, deadline)

    def _cast(self, incoming: Incoming) -> Iterator[tuple[str, Tensor]]:
        """Tensors on this rank's device, in the dtype that the servers hold."""
        for name, tensor in incoming:
            if name not in self._unknown:
                yield name, tensor.detach().to(distributed.device(), self.updates.model.dtype)

    def rejoin(self, server: Server, label: str) -> bool:
        with self.updates.lock:
            self.updates.servers[server.url] = server
            self.connect()
            return label == str(self._latest)

    def leave(self, server: Server) -> None:
        with self.updates.lock:
            if self.updates.servers.pop(server.url, None) is not None and self.updates.servers:
                self.connect()

    def close(self) -> None:
        return


class NCCLRoute(DeviceRoute):
    """One communicator of the sending rank and every worker."""

    every_rank_packs = False
    _communicator: Any = None

    def connect(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        servers = list(self.updates.servers.values())
        workers = [self.prepare(server) for server in servers]
        first = urlsplit(servers[0].url)
        info: dict[str, Any] = {
            "master_address": own_address(first.hostname or "", first.port or 80),
            "master_port": _free_port(),
            "world_size": 1 + sum(workers),
        }
        offset = 1
        joining = {}
        for server, count in zip(servers, workers, strict=True):
            theirs = info | {
                "rank_offset": offset,
                "packed": True,
                "packed_buffer_size_bytes": _BUFFER_BYTES,
            }
            joining[server.url] = in_background(partial(self.updates.join, server, theirs))
            offset += count
        self._communicator = trainer_init(info)
        deadline = Deadline(self.updates.limit_s)
        for url, future in joining.items():
            _result(future, url, deadline)

    def transmit(self, tensors: Iterator[tuple[str, Tensor]], deadline: Deadline) -> None:
        first = next(iter(self.updates.servers))  # who a fault of the communicator is told of
        for group in _grouped(tensors, _BUFFER_BYTES):
            step = partial(self.updates.call, method="rlhf_receive", info=_described(group))
            # both ends meet in the broadcast
            sending = in_background(partial(self._broadcast, group))
            self.each(step, deadline)
            _result(sending, first, deadline)

    def _broadcast(self, group: list[tuple[str, Tensor]]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(distributed.device())  # this thread's
        torch.cuda.synchronize()  # the tensors come from another thread's stream
        packed_nccl_broadcast_producer(
            iterator=iter(group),
            group=self._communicator,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=_BUFFER_BYTES,
        )


class IPCRoute(DeviceRoute):
    """Handles of a buffer on each trainer rank's device, which the workers on the same device open:
    every rank packs, and rank 0 passes on the handles of all.
    """

    every_rank_packs = True

    def connect(self) -> None:
        for server in self.updates.servers.values():
            self.prepare(server)
            self.updates.join(server, {"packed": True})

    def transmit(self, tensors: Iterator[tuple[str, Tensor]], deadline: Deadline) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        largest = max(math.prod(spec.shape) for spec in self.updates.model.specs.values())
        size = max(_BUFFER_BYTES, largest * self.updates.model.dtype.itemsize)
        device = distributed.device()
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        _, handle = reduce_tensor(buffer)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        gathered = distributed.gather(({uuid: handle}, self._unknown))
        handles: dict[str, Any] = {}
        for of_rank, _ in gathered:
            handles |= of_rank
        self._unknown = gathered[0][1]  # the sender's, who asked the servers
        text = base64.b64encode(pickle.dumps(handles)).decode()
        failure: ServerFault | Refused | None = None
        for group in _grouped(tensors, size):
            sizes = _packed(group, buffer)
            torch.cuda.synchronize()
            distributed.barrier()  # every rank's buffer is full
            info = _described(group) | {"tensor_sizes": sizes, "ipc_handles_pickled": text}
            step = partial(self.updates.call, method="rlhf_receive", info=info)
            if failure is None:
                try:
                    self.each(step, deadline)
                except (ServerFault, Refused) as error:
                    failure = error  # later, since other ranks wait for this one
            distributed.barrier()  # and read
        if failure is not None:
            raise failure


def _grouped(
    tensors: Iterable[tuple[str, Tensor]], limit: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors of together up to `limit` bytes, or a single larger one; copies, since under ZeRO-3 a
    tensor is gone once the next comes.
    """
    group: list[tuple[str, Tensor]] = []
    filled = 0
    for name, tensor in tensors:
        if group and filled + tensor.nbytes > limit:
            yield group
            group, filled = [], 0
        group.append((name, tensor.clone(memory_format=torch.contiguous_format)))
        filled += tensor.nbytes
    if group:
        yield group


def _packed(group: Iterable[tuple[str, Tensor]], buffer: Tensor) -> list[int]:
    """Write the tensors into the buffer, one behind the other; returns their bytes."""
    sizes = []
    start = 0
    for _, tensor in group:
        flat = tensor.reshape(-1).view(torch.uint8)
        buffer[start : start + len(flat)].copy_(flat)
        sizes.append(len(flat))
        start += len(flat)
    return sizes


def _described(group: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """What vLLM's engines are told of tensors that come."""
    names, tensors = zip(*group, strict=True)
    return {
        "names": list(names),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        "shapes": [list(tensor.shape) for tensor in tensors],
    }


def _result(future: "Future[None]", url: str, deadline: Deadline) -> None:
    try:
        future.result(deadline.left())
    except TimeoutError:
        cause = f"weights took longer than {deadline.limit_s:g} s"
        raise ServerFault(url, cause) from None
    except RuntimeError as error:  # of the communicator
        raise ServerFault(url, f"weights did not arrive ({error})") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
