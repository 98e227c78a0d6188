"""The memory plan of rollouts by servers, of engines that sleep, and of several nodes."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from conf.choices import Offload, RolloutBackend
from conf.model import ServerConfig, Transfer
from conf.run import LaunchConfig, LaunchKind
from conf.schema import RolloutConfig
from rlhf.checks.memory import activations, shapes
from rlhf.checks.memory.fit import places, rows
from rlhf.checks.memory.generator import (
    BUCKET,
    SERVER_GIB,
    WORKER_GIB,
    asked_of,
    part_of,
    share_of,
)
from rlhf.checks.memory.moments import HEADROOM, Machine, Phase, Plan, machine_of
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import Shapes
from rlhf.checks.memory.states import GIB
from tests import toys
from tests.checks.test_memory import GPU, SHAPE, made, planned

CPU = Machine(ranks=2, cuda=False, device_gib=12.0, host_gib=24.0)
BIG = functools.cache(lambda: shapes.assumed_shape(7e10))


def by_servers(share: float = 0.9, **options: Any) -> dict[str, Any]:
    """Options of rollout; those of rollout.server are `options`."""
    server = ServerConfig(**options)
    return {"backend": RolloutBackend.server, "server": server, "gpu_memory_utilization": share}


def generator(found: Plan, phase: Phase) -> float:
    """Bytes of a rank's device that the generator holds where the phase takes most."""
    return found.peak(phase).roles["generator"].device


def moment(found: Plan, phase: Phase, name: str) -> Any:
    return next(one for one in found.moments if (one.phase, one.name) == (phase, name))


# ---- engines that sleep ----


def test_an_engine_that_sleeps_is_not_there_while_the_trainer_steps() -> None:
    awake = planned(made("grpo", rollout={"gpu_memory_utilization": 0.5}))
    asleep = planned(made("grpo", rollout={"gpu_memory_utilization": 0.5, "sleep": True}))
    share, own = 0.5 * GPU.device_gib * GIB, activations.VLLM_OVERHEAD_GIB * GIB
    for phase in (Phase.update, Phase.score):
        assert generator(awake, phase) == share
        assert generator(asleep, phase) == own
        saved = awake.peak(phase).total.device - asleep.peak(phase).total.device
        assert saved == pytest.approx(share - own)
    assert generator(asleep, Phase.rollout) == share
    # the larger of both phases
    updating = asleep.peak(Phase.update).total.device
    assert updating < asleep.device_gib * GIB < updating + share - own
    assert awake.device_gib * GIB == pytest.approx(updating + share - own)


def test_the_host_holds_the_weights_of_an_engine_that_sleeps() -> None:
    hosts = []
    for sleep in (False, True):
        found = planned(made("grpo", rollout={"sleep": sleep}))
        hosts.append(moment(found, Phase.update, "policy's step").total.host)
    assert hosts[1] - hosts[0] == pytest.approx(2 * SHAPE().parameters)


def test_on_waking_the_weights_come_before_the_cache() -> None:
    found = planned(made("grpo", rollout={"gpu_memory_utilization": 0.5, "sleep": True}))
    taking = moment(found, Phase.sync, "weights").roles["generator"].device
    own = activations.VLLM_OVERHEAD_GIB * GIB
    assert taking == pytest.approx(2 * SHAPE().parameters + own)
    probe = moment(found, Phase.sync, "probe").roles["generator"].device
    assert taking < probe == pytest.approx(0.5 * GPU.device_gib * GIB)


def test_sleep_is_among_the_changes_that_make_a_run_fit() -> None:
    cfg = made("grpo", 2, rollout={"gpu_memory_utilization": 0.5})
    machine = replace(GPU, ranks=2)
    found = rows(cfg, Shapes(SHAPE()), replace(machine, device_gib=24.0))
    slept = [row for row in found if "rollout.sleep=true" in row.changes and row.plan.fits]
    assert slept
    for row in slept:
        assert row.cfg.rollout.sleep
        awake = replace(row.cfg, rollout=replace(row.cfg.rollout, sleep=False))
        again = plan(awake, Shapes(SHAPE()), row.plan.machine)
        assert again.device_gib > row.plan.device_gib


# ---- servers ----


def test_servers_of_their_own_devices_leave_the_trainers_to_the_trainer() -> None:
    own = by_servers(tensor_parallel=4, count=2, devices=["8,9,10,11", "12,13,14,15"])
    found = planned(made("grpo", rollout=own))
    assert {generator(found, phase) for phase in Phase} == {BUCKET}
    assert found.servers is not None
    assert (found.servers.count, found.servers.devices) == (2, 4)
    parts = {name: part.device for name, part in found.servers.parts.items()}
    assert parts["weights"] == pytest.approx(2 * SHAPE().parameters / 4, rel=1e-6)
    assert sum(parts.values()) == pytest.approx(0.9 * GPU.device_gib * GIB)
    inside = planned(made("grpo", rollout={"gpu_memory_utilization": 0.9}))
    assert found.device_gib < inside.device_gib
    assert any("2 x 4" in note for note in found.notes)


def test_servers_on_the_trainers_devices_hold_their_share_there() -> None:
    for devices in (None, ["0,1,2,3"]):
        shared = by_servers(0.25, tensor_parallel=4, devices=devices)
        found = planned(made("grpo", rollout=shared))
        assert found.servers is not None and not found.servers.parts
        held = 0.25 * GPU.device_gib * GIB + BUCKET
        assert generator(found, Phase.update) == pytest.approx(held)


def test_a_device_holds_its_part_of_the_heads() -> None:
    shape = shapes.assumed_shape(8_030_261_248)  # 8 heads for keys
    per_token = activations.kv_bytes_per_token(shape, 2)
    for parallel, share in ((1, 1), (4, 4), (8, 8), (16, 8)):
        part = part_of(shape, parallel)
        assert part.parameters == pytest.approx(shape.parameters / parallel, abs=1)
        # above 8 each has a whole head of keys
        assert activations.kv_bytes_per_token(part, 2) == per_token / share


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tensor_parallel": 3}, "rollout.server.tensor_parallel=3"),
        ({"share": 0.01}, "rollout.gpu_memory_utilization=0.01"),
    ],
)
def test_servers_that_can_not_hold_the_model_say_why(options: dict[str, Any], named: str) -> None:
    found = planned(made("grpo", rollout=by_servers(**options)))
    assert found.problem is not None and named in found.problem and not found.fits


def test_running_servers_are_nobodys_devices_here() -> None:
    found = planned(made("grpo", rollout={**by_servers(), "servers": ["http://10.0.0.2:8200"]}))
    assert found.servers is None and {generator(found, phase) for phase in Phase} == {0.0}
    assert any("rollout.servers" in note for note in found.notes)


def test_without_a_gpu_servers_take_from_the_hosts_memory() -> None:
    options = by_servers(count=2, tensor_parallel=2)
    found = planned(made("grpo", 2, rollout=options), CPU)
    assert found.servers is not None
    weights, cache = 4 * SHAPE().parameters, RolloutConfig().kv_cache_gib * GIB
    process = WORKER_GIB * GIB
    expected = 2 * (2 * (cache + process) + SERVER_GIB * GIB + weights)
    assert found.servers.total == pytest.approx(expected, rel=1e-6)
    expected += weights  # those that are kept
    assert found.servers.on_host == pytest.approx(expected, rel=1e-6)
    usable = HEADROOM * CPU.device_gib - expected / CPU.ranks / GIB
    assert found.usable_gib == pytest.approx(usable, rel=1e-6)
    inside = planned(made("grpo", 2), CPU)
    assert inside.usable_gib == pytest.approx(HEADROOM * CPU.device_gib)
    # the engine and its libraries are not in the trainer's process
    assert found.peak(Phase.rollout).total.device < inside.peak(Phase.rollout).total.device


def test_servers_on_nodes_of_their_own_take_nothing_of_the_trainers_host() -> None:
    options = by_servers(count=2, tensor_parallel=2)
    cfg = made("grpo", 2, rollout=options)
    beside = planned(cfg, CPU)
    launch = LaunchConfig(kind=LaunchKind.slurm, nodes=1, server_nodes=2)
    apart = planned(replace(cfg, launch=launch), CPU)
    assert beside.servers is not None and apart.servers is not None
    assert apart.servers.total == beside.servers.total > 0
    weights = 4 * SHAPE().parameters  # those that the trainer keeps to send
    assert apart.servers.on_host == pytest.approx(weights)
    usable = HEADROOM * CPU.device_gib - weights / CPU.ranks / GIB
    assert apart.usable_gib == pytest.approx(usable, rel=1e-6)
    assert apart.usable_gib > beside.usable_gib


def test_servers_take_from_their_own_host_among_several() -> None:
    cfg = made("grpo", 2, rollout=by_servers())
    one = planned(cfg, CPU)
    two = planned(cfg, replace(CPU, ranks=4, node_ranks=2))
    assert two.usable_gib == pytest.approx(one.usable_gib)


@pytest.mark.parametrize(("transfer", "kept"), [("file", True), ("gloo", True), ("nccl", False)])
@pytest.mark.parametrize("lora", [False, True])
def test_whole_weights_stay_on_the_host_for_servers_that_restart(
    transfer: str, kept: bool, lora: bool
) -> None:
    options = by_servers(transfer=Transfer(transfer), devices=["8"])
    found = planned(made("grpo", lora=lora, rollout=options))
    assert found.servers is not None
    whole = kept and not lora
    assert found.servers.kept == (2 * SHAPE().parameters if whole else 0)
    ranks = GPU.ranks * max(one.total.host for one in found.moments)
    assert found.host_gib * GIB == pytest.approx(ranks + found.servers.kept)


# ---- several nodes ----


def test_a_host_holds_the_ranks_of_its_node() -> None:
    cfg = made("grpo", offload=Offload.cpu)
    one = planned(cfg, replace(GPU, ranks=16))
    two = planned(cfg, replace(GPU, ranks=16, node_ranks=8))
    assert two.host_gib == pytest.approx(one.host_gib / 2)
    assert two.device_gib == one.device_gib


def test_nodes_are_those_that_are_asked_for_or_of_8_devices() -> None:
    engine = made("grpo", gpus=16).engine
    assumed = machine_of(engine, 7e9, all_devices=True)
    assert assumed.of_a_node == 8 and any("nodes of 8" in note for note in assumed.notes)
    assert machine_of(engine, 7e9, all_devices=True, nodes=4).of_a_node == 4
    small = machine_of(replace(engine, gpus=4), 7e9, all_devices=True)
    assert small.of_a_node == 4 and not any("nodes of" in note for note in small.notes)


# ---- where servers are proposed ----


def test_what_fits_inside_needs_no_servers() -> None:
    found = rows(made("grpo"), Shapes(SHAPE()), GPU)
    assert all(row.plan.fits and not row.place for row in found)


def test_servers_take_as_few_devices_as_hold_the_model_and_divide_the_prompts() -> None:
    machine = Machine(16, True, 80.0, None, node_ranks=8)
    cfg, lengths = made("grpo"), (toys.PROMPT_LENGTH, toys.RESPONSE_LENGTH)
    for size, devices in ((8, [4, 8]), (16, [8, 8])):
        sizes = []
        of_size = replace(machine, ranks=size)
        for place in places(cfg, BIG(), of_size):
            server = place.cfg.rollout.server
            if place.cfg.rollout.backend is not RolloutBackend.server:
                continue
            asked = asked_of(cfg.stage, cfg.rollout, cfg.adapter, *lengths, half=True)
            assert not cfg.stage.prompts_per_step % place.machine.ranks
            part = part_of(BIG(), server.tensor_parallel)
            assert share_of(part, of_size, asked, server.count) < 1
            sizes.append(server.count * server.tensor_parallel)
        assert sizes == devices
