"""What the doctor says of 70B: it fits on one node of 8 devices of 80 GiB, and on two."""

import functools
from dataclasses import replace

import pytest

from conf.choices import RolloutBackend
from rlhf.checks.memory import shapes
from rlhf.checks.memory.fit import Row, recommended, rows
from rlhf.checks.memory.moments import Machine
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import Shapes
from rlhf.checks.memory.tables import answers
from rlhf.cli import config
from tests.checks.test_memory import made

BIG = functools.cache(lambda: shapes.assumed_shape(7e10))


@functools.cache
def of_70b(devices: int) -> tuple[list[Row], Machine]:
    """GRPO with a reward that takes no memory, the policy in 70B."""
    machine = Machine(devices, True, 80.0, None, node_ranks=8)
    cfg = made("grpo", rollout={"max_response_length": 1024})
    return rows(cfg, Shapes(BIG()), machine), machine


@pytest.mark.parametrize("devices", [8, 16])
@pytest.mark.parametrize("way", ["all", "LoRA", "QLoRA"])
def test_70b_fits_on_one_node_and_on_two_with_a_setting_that_composes(
    devices: int, way: str
) -> None:
    found, machine = of_70b(devices)
    best = recommended(found, way)
    assert best is not None and best.place
    lengths = ("data.max_prompt_length=256", "rollout.max_response_length=1024")
    again = config.compose(["stage=grpo", "model.params=7e10", *lengths, *best.overrides])
    assert again.rollout.backend is RolloutBackend.server
    ranks = again.engine.gpus or devices
    server = again.rollout.server
    if server.devices is not None or again.launch.server_nodes:
        assert ranks + server.count * server.tensor_parallel == devices
    repeated = plan(again, Shapes(BIG()), replace(machine, ranks=ranks, node_ranks=min(8, ranks)))
    assert repeated.fits
    assert repeated.device_gib == pytest.approx(best.plan.device_gib)
    text = next(line for line in answers(found, machine) if line.startswith(best.way.text))
    assert f"fits on {devices} devices of 80 GiB" in text and "rollout=server" in text
