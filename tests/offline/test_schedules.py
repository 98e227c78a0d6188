"""Learning rates of runs on TRL's trainers are those of our own function, stalls included, and a
resumed run goes on with them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import Scheduler
from conf.schedule import PlateauConfig, ScheduleConfig
from conf.schema import RunConfig
from conf.stages import SFTStage
from policy.engines.base import OptimSettings
from tests.offline import trl_tools
from tests.stages.test_sft_stage import STAGE, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schedules")


def logged_rates(place: Path) -> list[float]:
    lines = trl_tools.metric_lines(place)
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_the_logged_rates_are_those_of_the_function(folder: Path) -> None:
    options = {
        "scheduler": Scheduler.cosine_restarts,
        "schedule": ScheduleConfig(cycles=2, cycle_growth=1.5),
        "warmup_ratio": 0.2,
        "min_rate": 0.1,
    }
    place = run(folder, "restarts", stage={**options, "eval_steps": 6})
    schedule = OptimSettings.from_stage(
        SFTStage(**STAGE | options), total_steps=6, learning_rate=5e-3, from_zero=True
    )
    assert logged_rates(place) == [schedule.rate(step) for step in range(6)]
    assert logged_rates(place)[:3] == [0.0, 2.5e-3, 5e-3]


def test_a_resumed_run_knows_how_long_the_loss_has_stalled(folder: Path) -> None:
    """No loss improves by 10 nats: the rate falls after every second evaluation from the one
    before the first step on, and the run stops once five have followed that of step 1.
    """
    options: dict[str, Any] = {
        "eval_steps": 1,
        "scheduler": Scheduler.plateau,
        "plateau": PlateauConfig(factor=0.5, patience=2),
        "min_improvement": 10.0,
        "patience": 5,
        "steps": 9,
    }
    straight = run(folder, "straight", stage=options)
    run(folder, "broken", stage={**options, "steps": 3})
    again = RunConfig(dir=str(folder / "runs"), name="broken", resume=True)
    broken = run(folder, "broken", stage=options, run=again)
    expected = [5e-3, 5e-3, 2.5e-3, 2.5e-3, 1.25e-3, 1.25e-3]
    for place in (straight, broken):
        assert logged_rates(place) == expected
        assert json.loads((place / "summary.json").read_text())["steps"] == 6
    weights = [load_file(place / "model" / "model.safetensors") for place in (straight, broken)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
