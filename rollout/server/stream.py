"""Weights over a network in buckets: what the trainer packs and each worker of a server unpacks.

A gloo group joins the trainer (rank 0) and the workers of one server, so that one server's fault
leaves the others alone. Each message is a broadcast of two sizes, of a JSON header and of the
bucket's bytes. The last message has no tensors: it says whether the trainer sent all of them.
Neither side holds more than a bucket and a tensor beside its model.
"""

import ctypes
import json
import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import BroadcastOptions, ProcessGroupGloo

from rollout.weights import Spec

BUCKET_BYTES = 64 * 2**20
_POLL_S = 0.0005  # between looks at a broadcast
_ALIGNED = 64  # bytes: where a tensor may start, whatever its dtype

# name, dtype and shape of each tensor in a bucket
Entry = tuple[str, str, list[int]]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some tensors, one behind the other."""

    entries: list[Entry]
    payload: Tensor  # uint8 [bytes], which the next bucket may overwrite


def buckets(
    tensors: Iterable[tuple[str, Tensor]], specs: Mapping[str, Spec], limit: int = BUCKET_BYTES
) -> Iterator[Bucket]:
    """The `tensors` in the dtypes of `specs`, up to `limit` bytes a bucket; a larger one has a
    bucket of its own.
    """
    shared = torch.empty(_aligned(limit), dtype=torch.uint8)
    entries: list[Entry] = []
    filled = 0
    for name, tensor in tensors:
        dtype = specs[name].dtype
        size = tensor.numel() * dtype.itemsize
        entry = (name, str(dtype).removeprefix("torch."), list(tensor.shape))
        if entries and filled + size > limit:
            yield Bucket(entries, shared[:filled])
            entries, filled = [], 0
        if size > limit:
            own = torch.empty(_aligned(size), dtype=torch.uint8)
            _view(own, 0, dtype, entry[2]).copy_(tensor.detach())
            yield Bucket([entry], own)
            continue
        _view(shared, filled, dtype, entry[2]).copy_(tensor.detach())
        entries.append(entry)
        filled = _aligned(filled + size)
    if entries:
        yield Bucket(entries, shared[:filled])


def unpacked(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of its payload."""
    start = 0
    for name, dtype_name, shape in bucket.entries:
        dtype = getattr(torch, dtype_name)
        yield name, _view(bucket.payload, start, dtype, shape)
        start = _aligned(start + math.prod(shape) * dtype.itemsize)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _view(payload: Tensor, start: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return payload[start : start + size].view(dtype).view(shape)


# ---- messages ----


class SenderGaveUp(RuntimeError):
    """The trainer ended the transfer before its last tensor."""


def message(bucket: Bucket) -> list[Tensor]:
    """What is broadcast of a bucket, in this order."""
    return _message({"tensors": bucket.entries}, bucket.payload)


def last_message(failure: str | None) -> list[Tensor]:
    """The end of a transfer: of all tensors, or with the reason why it is not."""
    return _message({"failure": failure}, torch.empty(0, dtype=torch.uint8))


def _message(header: Mapping[str, Any], payload: Tensor) -> list[Tensor]:
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    sizes = torch.tensor([len(text), len(payload)], dtype=torch.int64)
    return [sizes, text, payload] if len(payload) else [sizes, text]


class Received:
    """(name, tensor) pairs while their buckets arrive. `finish` afterwards, whatever happened."""

    def __init__(self, group: "Group") -> None:
        self.failed = False  # whether the transfer broke, rather than who reads it
        self._group = group
        self._passing = self._pass()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._passing

    def finish(self) -> None:
        """Take what is left: the trainer waits until all is taken. Raises what broke."""
        for _ in self._passing:
            pass

    def _pass(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            try:
                bucket = self._next()
            except Exception:
                self.failed = True
                raise
            if bucket is None:
                return
            yield from unpacked(bucket)

    def _next(self) -> Bucket | None:
        self._group.expect()
        sizes = torch.empty(2, dtype=torch.int64)
        self._group.receive(sizes)
        text = torch.empty(int(sizes[0]), dtype=torch.uint8)
        self._group.receive(text)
        header = json.loads(text.numpy().tobytes())
        if "tensors" not in header:
            if header["failure"] is not None:
                raise SenderGaveUp(header["failure"])
            return None
        payload = torch.empty(int(sizes[1]), dtype=torch.uint8)
        if len(payload):
            self._group.receive(payload)
        return Bucket(header["tensors"], payload)


# ---- the group ----


def own_address(host: str, port: int) -> str:
    """This machine's address on the way to `host`. Raises OSError where there is no way."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


class Group:
    """A gloo group beside torch's default one. Rank 0 sends messages once all others have said that
    they are ready: a broadcast that a worker does not take could not be called back.
    """

    def __init__(self, store: Store, rank: int, size: int, *, address: str, limit_s: float) -> None:
        """Waits until all `size` ranks are there. `address`: of this rank's network interface.
        `limit_s`: of joining and of each broadcast. Raises RuntimeError.
        """
        gloo: Any = ProcessGroupGloo  # its stub lacks these options
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=limit_s)
        self._store = PrefixStore("weights", store)
        self._size = size
        self._number = 0  # of the next message
        self._handles: list[Any] = []  # of the latest message
        self._group = gloo(self._store, rank, size, options)

    def is_ready(self) -> bool:
        """On rank 0: whether all others take the next message. Raises RuntimeError."""
        return self._store.add(f"ready-{self._number}", 0) == self._size - 1

    def send(self, tensors: Sequence[Tensor]) -> None:
        """On rank 0: begin to send a message. Raises RuntimeError."""
        self._store.delete_key(f"ready-{self._number}")
        self._number += 1
        self._handles = [self._broadcast(tensor) for tensor in tensors]

    def is_sent(self) -> bool:
        """Whether all others have it. Raises RuntimeError where it did not arrive."""
        if not all(handle.is_completed() for handle in self._handles):
            return False
        for handle in self._handles:
            handle.wait()
        return True

    def expect(self) -> None:
        """On other ranks: take the next message, by `receive` of its parts. Raises RuntimeError."""
        self._store.add(f"ready-{self._number}", 1)
        self._number += 1

    def receive(self, tensor: Tensor) -> None:
        """Fill `tensor` with rank 0's. Raises RuntimeError."""
        self._broadcast(tensor).wait()

    def close(self) -> None:
        """Cut the connections; who waits at their other end fails at once."""
        if not all(handle.is_completed() for handle in self._handles):
            # A worker that hangs in the middle of a message. The group's end would wait for it, and
            # so would the end of this process: the group is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        self._handles = []  # they hold the connections, too
        self._group = None

    def _broadcast(self, tensor: Tensor) -> Any:
        if self._group is None:
            raise RuntimeError("the gloo group is closed")
        options = BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        return self._group.broadcast([tensor], options)


class Broadcast:
    """Sends to several groups at once, each of a server whose update runs."""

    def __init__(
        self,
        groups: Mapping[str, Group],
        updates: Mapping[str, "Future[None]"],
        patience_s: float,
    ) -> None:
        """`patience_s`: longest wait for a server to be ready for a message, and to take it."""
        self._groups = {url: groups[url] for url in updates}
        self._updates = updates
        self._patience_s = patience_s

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send a message to each group, and none any more to one that does not take it."""
        self._keep(Group.is_ready)
        for url, group in list(self._groups.items()):
            try:
                group.send(tensors)
            except RuntimeError:  # its connection is gone
                self._drop(url)
        self._keep(Group.is_sent)

    def _keep(self, condition: Callable[[Group], bool]) -> None:
        """Wait until the condition holds for each group; drop those for which it does not."""
        end = time.monotonic() + self._patience_s
        waiting = list(self._groups)
        while waiting:
            is_late = time.monotonic() > end
            still = []
            for url in waiting:
                update = self._updates[url]
                has_failed = update.done() and update.exception() is not None
                try:
                    holds = condition(self._groups[url])
                except RuntimeError:
                    holds, has_failed = False, True
                if not holds and (has_failed or is_late):
                    self._drop(url)
                elif not holds:
                    still.append(url)
            waiting = still
            if waiting:
                time.sleep(_POLL_S)

    def _drop(self, url: str) -> None:
        self._groups.pop(url).close()


def read_whole(received: Received, read: Callable[[Iterable[tuple[str, Tensor]]], Any]) -> None:
    """Have `read` take the tensors. Everything is received even where it raises."""
    try:
        read(received)
    except Exception:
        with suppress(Exception):
            received.finish()
        raise
    received.finish()
