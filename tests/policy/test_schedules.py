"""Learning-rate schedules: values written by hand, and torch's and transformers' own schedules."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import get_scheduler

from conf.choices import DecayShape, Scheduler
from conf.schedule import PlateauConfig, ScheduleConfig
from conf.stages import SFTStage
from policy.engines.base import OptimSettings, Plateau

RATE = 3e-4


def settings(
    scheduler: Scheduler,
    warmup: int,
    total: int,
    *,
    min_rate: float = 0.0,
    from_zero: bool = False,
    learning_rate: float = 1.0,
    **schedule: Any,
) -> OptimSettings:
    return OptimSettings(
        learning_rate=learning_rate,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        max_grad_norm=1.0,
        scheduler=scheduler,
        warmup_steps=warmup,
        total_steps=total,
        min_rate=min_rate,
        schedule=ScheduleConfig(**schedule),
        from_zero=from_zero,
    )


def rates(made: OptimSettings, steps: int) -> list[float]:
    return [made.rate(step) for step in range(steps)]


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (settings(Scheduler.constant, 2, 5), [0.5, 1, 1, 1, 1, 1]),
        (settings(Scheduler.plateau, 2, 5, min_rate=0.5), [0.5, 1, 1, 1, 1, 1]),
        (settings(Scheduler.linear, 1, 5), [1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (settings(Scheduler.linear, 1, 5, min_rate=0.2), [1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (settings(Scheduler.linear, 2, 4, from_zero=True), [0, 0.5, 1, 0.5, 0]),
        (
            settings(Scheduler.cosine, 0, 4, min_rate=0.1),
            [1, 0.1 + 0.45 * (1 + HALF), 0.55, 0.1 + 0.45 * (1 - HALF), 0.1, 0.1],
        ),
        (settings(Scheduler.cosine_restarts, 0, 4), [1, 0.5, 1, 0.5, 0]),
        (
            settings(Scheduler.cosine_restarts, 1, 7, cycle_growth=2.0),
            [1, 1, 0.5, 1, 0.5 * (1 + HALF), 0.5, 0.5 * (1 - HALF), 0],
        ),
        (settings(Scheduler.cosine_restarts, 0, 2, cycles=4), [1, 1, 0]),
        (settings(Scheduler.polynomial, 0, 4, power=2.0), [1, 0.5625, 0.25, 0.0625, 0]),
        (settings(Scheduler.polynomial, 0, 2, power=2.0, min_rate=0.5), [1, 0.625, 0.5]),
        (settings(Scheduler.inverse_sqrt, 4, 20), [0.25, 0.5, 0.75, 1, 1, math.sqrt(4 / 5)]),
        (settings(Scheduler.inverse_sqrt, 1, 20, min_rate=0.6), [1, 1, HALF, 0.6, 0.6]),
        (
            settings(Scheduler.warmup_stable_decay, 1, 8, decay_share=0.5),
            [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0],
        ),
        (
            settings(
                Scheduler.warmup_stable_decay,
                0,
                8,
                decay_share=0.5,
                decay_shape=DecayShape.square_root,
                min_rate=0.2,
            ),
            [1, 1, 1, 1, 1, 0.6, 1 - 0.8 * HALF, 1 - 0.8 * math.sqrt(0.75), 0.2],
        ),
    ],
)
def test_rates_are_those_written_by_hand(made: OptimSettings, expected: list[float]) -> None:
    assert rates(made, len(expected)) == pytest.approx(expected, abs=1e-12)


def theirs(name: str, warmup: int, total: int, **kwargs: Any) -> list[float]:
    """What transformers' schedule gives to each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    schedule = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=kwargs,
    )
    return stepped(optimizer, lambda _: schedule.step(), total)


def stepped(
    optimizer: torch.optim.Optimizer, step: Callable[[int], None], count: int
) -> list[float]:
    found = []
    for number in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        step(number)
    return found


@pytest.mark.parametrize("warmup", [0, 1, 3, 7])
@pytest.mark.parametrize("total", [7, 10, 23, 97])
@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (Scheduler.constant, "constant_with_warmup"),
        (Scheduler.linear, "linear"),
        (Scheduler.cosine, "cosine"),
    ],
)
def test_runs_on_trls_trainers_keep_their_rates_to_the_bit(
    scheduler: Scheduler, name: str, total: int, warmup: int
) -> None:
    made = settings(scheduler, warmup, total, from_zero=True, learning_rate=RATE)
    assert rates(made, total) == theirs(name, warmup, total)


@pytest.mark.parametrize("warmup", [0, 1, 3, 7])
@pytest.mark.parametrize("total", [7, 10, 23, 97])
def test_the_online_loop_keeps_its_rates_to_the_bit(total: int, warmup: int) -> None:
    """The formula of the loop from before there were other schedules."""

    def before(scheduler: Scheduler, step: int) -> float:
        if step < warmup:
            return RATE * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        factors = {
            Scheduler.constant: 1.0,
            Scheduler.linear: 1.0 - share,
            Scheduler.cosine: 0.5 * (1.0 + math.cos(math.pi * share)),
        }
        return RATE * factors[scheduler]

    for scheduler in (Scheduler.constant, Scheduler.linear, Scheduler.cosine):
        made = settings(scheduler, warmup, total, learning_rate=RATE)
        expected = [before(scheduler, step) for step in range(total + 2)]
        assert rates(made, total + 2) == expected


@pytest.mark.parametrize(
    ("made", "name", "kwargs"),
    [
        (
            settings(Scheduler.cosine, 4, 44, min_rate=0.1),
            "cosine_with_min_lr",
            {"min_lr_rate": 0.1},
        ),
        (
            settings(Scheduler.cosine_restarts, 4, 44, cycles=4),
            "cosine_with_restarts",
            {"num_cycles": 4},
        ),
        (
            settings(Scheduler.polynomial, 4, 44, power=3.0, min_rate=0.1),
            "polynomial",
            {"power": 3.0, "lr_end": 0.1 * RATE},
        ),
        (settings(Scheduler.inverse_sqrt, 4, 44), "inverse_sqrt", {}),
        (
            settings(Scheduler.warmup_stable_decay, 4, 44, decay_share=0.25, min_rate=0.1),
            "warmup_stable_decay",
            {"num_decay_steps": 11, "decay_type": "linear", "min_lr_ratio": 0.1},
        ),
        (
            settings(
                Scheduler.warmup_stable_decay,
                4,
                44,
                decay_share=0.25,
                decay_shape=DecayShape.square_root,
            ),
            "warmup_stable_decay",
            {"num_decay_steps": 11, "decay_type": "1-sqrt"},
        ),
    ],
)
def test_transformers_has_the_same_rates(
    made: OptimSettings, name: str, kwargs: dict[str, Any]
) -> None:
    """Second opinion after the warm-up, whose first step differs."""
    assert [RATE * rate for rate in rates(made, 44)[4:]] == pytest.approx(
        theirs(name, 4, 44, **kwargs)[4:], rel=1e-9
    )


def test_torch_has_the_same_restarts() -> None:
    """Cycles of 5, 10 and 20 steps, each down to a tenth."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, 2, eta_min=0.1)
    made = settings(Scheduler.cosine_restarts, 0, 35, cycles=3, cycle_growth=2.0, min_rate=0.1)
    assert rates(made, 35) == pytest.approx(stepped(optimizer, lambda _: schedule.step(), 35))


def plateau_stage(patience: int, factor: float, least: float, floor: float) -> SFTStage:
    return SFTStage(
        scheduler=Scheduler.plateau,
        plateau=PlateauConfig(patience=patience, factor=factor),
        min_improvement=least,
        min_rate=floor,
    )


def test_a_plateau_lowers_the_rate_by_hand() -> None:
    stage = plateau_stage(2, 0.5, 0.1, 0.3)
    figures = [1.0, 0.95, 0.8, 0.8, math.nan, 0.71, 0.75, 0.6]
    seen = []
    plateau = Plateau(stage, higher_is_better=False)
    for figure in figures:
        seen.append((plateau.look(figure), plateau.scale))
    # 0.95 is no improvement of more than 0.1; 0.8 is; NaN is none; the second cut stops at 0.3
    assert seen == [
        (False, 1.0),
        (False, 1.0),
        (False, 1.0),
        (False, 1.0),
        (True, 0.5),
        (False, 0.5),
        (True, 0.3),
        (False, 0.3),
    ]
    mirrored = Plateau(stage, higher_is_better=True)
    assert [mirrored.look(-figure) for figure in figures] == [fell for fell, _ in seen]


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_torch_has_the_same_plateaus(patience: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=0.5,
        patience=patience - 1,
        threshold=0.05,
        threshold_mode="abs",
        min_lr=0.1,
    )
    values = (torch.randn(60, generator=torch.Generator().manual_seed(patience)) * 0.2).tolist()
    losses = [value - number / 40 for number, value in enumerate(values)]
    plateau = Plateau(plateau_stage(patience, 0.5, 0.05, 0.1), higher_is_better=False)
    ours = []
    for loss in losses:
        ours.append(plateau.scale)
        plateau.look(loss)
    assert ours == stepped(optimizer, lambda number: schedule.step(losses[number]), 60)
    assert len(set(ours)) > 2


def test_a_plateau_goes_on_from_its_state() -> None:
    stage = plateau_stage(3, 0.7, 0.0, 0.0)
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first = (Plateau(stage, higher_is_better=True) for _ in range(2))
    second = Plateau(stage, higher_is_better=True)
    fell = [whole.look(value) for value in values]
    parts = [first.look(value) for value in values[:17]]
    second.load_state_dict(first.state_dict())
    assert parts + [second.look(value) for value in values[17:]] == fell
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": ScheduleConfig(power=3.0)}, "stage.schedule.power=3.0 .* only polynomial"),
        ({"plateau": PlateauConfig(factor=0.1)}, "only plateau reads it"),
        ({"scheduler": Scheduler.constant, "min_rate": 0.1}, "stage.min_rate=0.1"),
        ({"scheduler": Scheduler.inverse_sqrt, "warmup_ratio": 0.0}, "stage.warmup_ratio"),
        (
            {
                "scheduler": Scheduler.warmup_stable_decay,
                "warmup_ratio": 0.2,
                "schedule": ScheduleConfig(decay_share=0.9),
            },
            "stage.schedule.decay_share=0.9",
        ),
    ],
)
def test_options_that_no_schedule_reads_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTStage(**options)
