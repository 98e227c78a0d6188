"""Weights in buckets, and over a gloo group of threads."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from rollout.server.stream import (
    Broadcast,
    Group,
    Received,
    SenderGaveUp,
    buckets,
    last_message,
    message,
    own_address,
    read_whole,
    unpacked,
)
from rollout.server.updates import in_background
from rollout.weights import Spec

LIMIT_S = 20.0


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "odd": torch.randn(7, generator=generator),
        "matrix": torch.randn(33, 5, generator=generator).t(),  # not contiguous
        "large": torch.randn(64, 64, generator=generator),
        "last": torch.randn(3, generator=generator),
    }


def specs(dtype: torch.dtype = torch.float32) -> dict[str, Spec]:
    return {name: Spec(tuple(tensor.shape), dtype) for name, tensor in tensors().items()}


def same(found: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    expected = tensors()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype is dtype
        assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("limit", [1, 64, 1000, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_hold_every_tensor_in_the_dtype_of_its_spec(limit: int, dtype: torch.dtype) -> None:
    found: dict[str, Tensor] = {}
    sizes = []
    for bucket in buckets(tensors().items(), specs(dtype), limit):
        # a copy: the next bucket may have the same bytes
        found |= {name: tensor.clone() for name, tensor in unpacked(bucket)}
        sizes.append((len(bucket.entries), len(bucket.payload)))
    same(found, dtype)
    rounded = -(-limit // 64) * 64
    assert all(size <= rounded or count == 1 for count, size in sizes)
    assert (len(sizes) == 1) is (limit == 2**20)


def test_a_gathered_tensor_may_vanish_once_the_next_comes() -> None:
    """As under ZeRO-3."""

    def vanishing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors().items():
            gathered = tensor.clone()
            yield name, gathered
            gathered.fill_(torch.nan)

    (bucket,) = buckets(vanishing(), specs(), 2**20)
    same(dict(unpacked(bucket)))


@pytest.fixture
def pair() -> Iterator[tuple[Group, Group]]:
    """The trainer's end of a group, and a worker's."""
    store = HashStore()

    def join(rank: int) -> Callable[[], Group]:
        return lambda: Group(store, rank, 2, address="127.0.0.1", limit_s=LIMIT_S)

    worker = in_background(join(1))
    trainer = join(0)()
    yield trainer, worker.result(LIMIT_S)
    trainer.close()
    worker.result().close()


def reading(
    group: Group, read: Callable[[Iterable[tuple[str, Tensor]]], Any]
) -> tuple[Received, "Future[None]"]:
    received = Received(group)
    return received, in_background(lambda: read_whole(received, read))


def sender(group: Group, update: "Future[None]", patience_s: float = LIMIT_S) -> Broadcast:
    return Broadcast({"server": group}, {"server": update}, patience_s)


def test_tensors_arrive_as_they_were_sent(pair: tuple[Group, Group]) -> None:
    trainer, worker = pair
    for limit in (100, 2**20):  # twice in one group
        found: dict[str, Tensor] = {}
        received, update = reading(worker, found.update)
        broadcast = sender(trainer, update)
        for bucket in buckets(tensors().items(), specs(), limit):
            broadcast.send(message(bucket))
        broadcast.send(last_message(None))
        update.result(LIMIT_S)
        same(found)
        assert not received.failed


def test_a_worker_knows_when_the_trainer_gave_up(pair: tuple[Group, Group]) -> None:
    trainer, worker = pair
    found: dict[str, Tensor] = {}
    received, update = reading(worker, found.update)
    broadcast = sender(trainer, update)
    (bucket,) = buckets(tensors().items(), specs(), 2**20)
    broadcast.send(message(bucket))
    broadcast.send(last_message("SyncError: x is missing"))
    with pytest.raises(SenderGaveUp, match="x is missing"):
        update.result(LIMIT_S)
    assert received.failed


def test_a_worker_that_can_not_load_takes_the_rest_of_the_transfer(
    pair: tuple[Group, Group],
) -> None:
    trainer, worker = pair

    def refuse(arriving: Iterable[tuple[str, Tensor]]) -> None:
        next(iter(arriving))
        raise KeyError("no such layer")

    received, update = reading(worker, refuse)
    broadcast = sender(trainer, update)
    for bucket in buckets(tensors().items(), specs(), 64):
        broadcast.send(message(bucket))
    broadcast.send(last_message(None))
    with pytest.raises(KeyError, match="no such layer"):
        update.result(LIMIT_S)
    assert not received.failed, "the way of the weights was sound"


LARGE = torch.zeros(2**22)  # more than a connection holds


@pytest.mark.parametrize("cause", ["failed", "late"])
@pytest.mark.parametrize("place", ["before a message", "within one"])
def test_the_trainer_does_not_wait_for_a_worker_that_takes_nothing(
    pair: tuple[Group, Group], cause: str, place: str
) -> None:
    trainer, worker = pair
    if place == "within one":
        worker.expect()
    update: Future[None] = Future()
    if cause == "failed":
        update.set_exception(RuntimeError("HTTP 500"))
    start = time.monotonic()
    broadcast = sender(trainer, update, 0.3 if cause == "late" else LIMIT_S)
    for _ in range(3):
        broadcast.send([LARGE])
    assert time.monotonic() - start < LIMIT_S / 4


def test_a_process_ends_although_a_worker_hangs_within_a_message() -> None:
    """torch's group would wait for it."""
    script = """
import torch
from torch.distributed import HashStore
from rollout.server.stream import Group
from rollout.server.updates import in_background

store = HashStore()
join = lambda rank: Group(store, rank, 2, address="127.0.0.1", limit_s=600.0)
worker = in_background(lambda: join(1))
trainer = join(0)
worker = worker.result()
trainer.send([torch.zeros(2**22)])
assert not trainer.is_sent()
trainer.close()
print("closed", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("closed\n", 0), done.stderr


def test_a_cut_connection_ends_the_transfer_on_both_sides(pair: tuple[Group, Group]) -> None:
    trainer, worker = pair
    received, update = reading(worker, dict)
    broadcast = sender(trainer, update)
    (bucket,) = buckets(tensors().items(), specs(), 2**20)
    broadcast.send(message(bucket))
    trainer.close()
    with pytest.raises(RuntimeError):
        update.result(LIMIT_S)
    assert received.failed
    broadcast.send(message(bucket))


def test_own_address_of_a_loopback() -> None:
    assert own_address("127.0.0.1", 80) == "127.0.0.1"
    with pytest.raises(socket.gaierror):
        own_address("no-such-host.invalid", 80)
