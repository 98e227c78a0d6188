"""Steps that have more and more rows: their sizes and number, the order of rows, and runs."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import AdapterKind, Dtype, EngineKind, ModelKind, Offload, RateCoupling
from conf.schedule import BatchGrowthConfig
from conf.schema import AdapterConfig, Config, EngineConfig, ModelConfig, RunConfig
from conf.stages import OnlineStage, SFTStage
from rlhf.checks import launch
from rlhf.checks.arithmetic import offline_arithmetic, online_arithmetic
from rlhf.offline.setup import check_noise
from rlhf.offline.step_rows import GrowingBatches, WholeBatches
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.stages import sft
from rlhf.types import UserError
from tests.offline import trl_tools
from tests.offline.test_schedules import logged_rates
from tests.stages.test_sft_stage import STAGE, run


def growing(at: list[int], sizes: list[int] | None = None, **options: Any) -> SFTStage:
    rate = options.pop("rate", RateCoupling.none)
    growth = BatchGrowthConfig(steps=at, sizes=sizes or [], rate=rate)
    return SFTStage(batch_size=4, batch_growth=growth, **options)


def test_sizes_are_those_written_by_hand() -> None:
    doubling, listed = growing([2, 5]), growing([1, 3], [6, 10])
    assert [doubling.step_size(step) for step in range(7)] == [4, 4, 8, 8, 8, 16, 16]
    assert [listed.step_size(step) for step in range(5)] == [4, 6, 6, 10, 10]
    assert (doubling.step_sizes(), listed.step_sizes()) == ([4, 8, 16], [4, 6, 10])
    assert SFTStage(batch_size=4).step_sizes() == [4]
    scales = {
        RateCoupling.none: [1, 1, 1],
        RateCoupling.linear: [1, 2, 4],
        RateCoupling.square_root: [1, 2**0.5, 2],
    }
    for rate, expected in scales.items():
        growth = growing([2, 5], rate=rate).batch_growth
        assert [growth.rate_scale(4, step) for step in (0, 2, 5)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [3, 3]}, "steps=.* each above the last"),
        ({"steps": [0]}, "steps=.* above 0"),
        ({"steps": [3], "sizes": [8, 16]}, r"sizes=.* a size for each"),
        ({"steps": [1, 2], "sizes": [8, 6]}, "sizes=.* each above the last"),
        ({"rate": RateCoupling.linear}, r"steps=\[\] .* steps after which it grows"),
        ({"factor": 3}, r"steps=\[\] .* steps after which it grows"),
    ],
)
def test_growth_that_says_nothing_clear_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"stage\.batch_growth\.{message}"):
        BatchGrowthConfig(**options)


def test_sizes_begin_above_the_first() -> None:
    with pytest.raises(ValueError, match="sizes above the 4 of the first step"):
        growing([2], [4])
    growth = BatchGrowthConfig(steps=[1], sizes=[9])
    with pytest.raises(ValueError, match=r"stage\.minibatches=2 .* = 8 and 9"):
        OnlineStage(prompts_per_step=8, batch_growth=growth, minibatches=2)


@pytest.mark.parametrize(
    ("epochs", "rows", "expected"),
    [
        (1.0, 22, 3),  # 4 4 8, and six left over
        (1.0, 24, 4),  # 4 4 8 8
        (2.0, 24, 7),  # the second pass has three steps of 8
        (1.5, 24, 6),  # half of these three, rounded to even
        (0.5, 24, 2),
        (0.01, 24, 1),
    ],
)
def test_epochs_become_steps(epochs: float, rows: int, expected: int) -> None:
    assert launch.count_steps(growing([2], epochs=epochs), rows) == expected


def test_more_rows_than_there_are_is_refused() -> None:
    assert launch.count_steps(growing([2], steps=2), 4) == 2, "it ends before it grows"
    for stage in (growing([2], steps=3), growing([1], epochs=2.0)):
        with pytest.raises(UserError, match=r"a step of 8 rows .* but 5 train"):
            launch.count_steps(stage, 5)


def test_growth_after_the_end_is_told() -> None:
    assert launch.growth_note(growing([2, 4]), 5) == []
    assert "5 steps, so it doesn't grow at [5, 7]" in launch.growth_note(growing([2, 5, 7]), 5)[0]


def test_micro_batches_divide_every_size() -> None:
    stage = growing([2], [6])
    launch.check_growth(stage, EngineConfig(micro_batch_size=2), 1)
    launch.check_growth(stage, EngineConfig(micro_batch_tokens=64), 2)
    with pytest.raises(UserError, match="rows=6 doesn't divide by 1 rank x 4 rows"):
        launch.check_growth(stage, EngineConfig(), 1)
    with pytest.raises(UserError, match="rows=6 doesn't divide by 2 ranks x 2 rows"):
        launch.check_growth(stage, EngineConfig(micro_batch_size=2), 2)
    offloaded = EngineConfig(kind=EngineKind.deepspeed, zero_stage=2, offload=Offload.cpu)
    with pytest.raises(UserError, match=r"stage\.batch_growth.*number of micro-batches, which"):
        launch.check_growth(growing([2]), offloaded, 1)
    online = OnlineStage(
        prompts_per_step=4, batch_growth=BatchGrowthConfig(steps=[1], sizes=[6]), kl_coef=0.0
    )
    launch.check_prompts_per_step(online, 2)
    with pytest.raises(UserError, match="prompts=6 doesn't divide by 4 ranks"):
        launch.check_prompts_per_step(online, 4)


def test_a_dry_run_counts_what_grows() -> None:
    stage = growing([2], steps=5)
    plan = launch.plan_batches(4, EngineConfig(), 1)
    figures = offline_arithmetic(stage, plan, 40, 40)
    assert figures["rows of a step"].endswith("= 4 (stage.batch_size), 8 rows after 2 steps")
    assert figures["data"] == "40 training rows, 32 trained: 0.8 passes"
    online = OnlineStage(
        steps=3, prompts_per_step=4, samples_per_prompt=2, batch_growth=BatchGrowthConfig(steps=[1])
    )
    figures = online_arithmetic(online, 64, 8, 1, 40)
    assert figures["responses of a step"].endswith("all on one rank, 8 prompts after 1 steps")
    assert figures["data"] == "20 prompts drawn from 40: 0.5 passes"
    assert figures["steps"].endswith("40 responses")


def test_passes_hold_whole_steps_and_a_resume_begins_where_it_stopped() -> None:
    sizes = [4, 4, 8, 8, 8]
    done = 0
    sampler = GrowingBatches(21, sizes, 3, 2, lambda: done)
    order = list(sampler)
    assert len(order) == len(sampler) == 32
    ends = [0, *itertools.accumulate(sizes)]
    steps = [order[a:b] for a, b in itertools.pairwise(ends)]
    first, second = steps[0] + steps[1] + steps[2], steps[3] + steps[4]
    assert len(set(first)) == 16 and len(set(second)) == 16 and set(first) < set(range(21))
    assert first == list(WholeBatches(21, 8, 3, lambda: 0)), "the order of a run that doesn't grow"
    for done in range(1, 5):
        # transformers leaves out a batch of two rows for each step done
        assert list(sampler)[2 * done :] == order[ends[done] :]


GROWING: dict[str, Any] = {
    "batch_size": 4,
    "steps": 6,
    "eval_steps": 3,
    "batch_growth": BatchGrowthConfig(steps=[2, 4], sizes=[8, 12], rate=RateCoupling.linear),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growth")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    return run(folder, "straight", stage=GROWING, engine=EngineConfig(micro_batch_size=2))


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model" / "model.safetensors")


def test_a_run_grows(straight: Path) -> None:
    lines = [line for line in trl_tools.metric_lines(straight) if "loss" in line]
    assert [line["train/batch_rows"] for line in lines] == [4, 4, 8, 8, 12, 12]
    rows = 38  # of 48 a fifth is held out
    assert [line["epoch"] for line in lines] == pytest.approx(
        [trained / rows for trained in (4, 8, 16, 24, 36, 48)], abs=0.01
    )
    factors = logged_rates(straight)
    cosine = [5e-3 * (1 + torch.cos(torch.tensor(torch.pi * k / 6))) / 2 for k in range(6)]
    expected = [float(rate) * k for rate, k in zip(cosine, (1, 1, 2, 2, 3, 3), strict=True)]
    assert factors == pytest.approx(expected, rel=1e-5)


def test_a_grown_run_resumes_to_the_bit(folder: Path) -> None:
    """Its adapter's dropout draws from torch's generator in every forward pass."""
    groups: dict[str, Any] = {
        "stage": {**GROWING, "save_steps": 1, "noise_scale": 0.9},
        "engine": EngineConfig(micro_batch_size=2),
        "adapter": AdapterConfig(kind=AdapterKind.lora, rank=4, dropout=0.2),
    }
    whole = run(folder, "whole", **groups)
    stage = SFTStage(**STAGE | groups.pop("stage"))
    ctx = RunContext.open(trl_tools.config(stage, folder, "broken", trl_tools.sft_rows(), **groups))
    log = ctx.tracker.log

    def stop_at_four(step: int, metrics: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        log(step, metrics)

    ctx.tracker.log = stop_at_four  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sft.run(ctx, stage_rows)
    again = RunConfig(dir=str(folder / "runs"), name="broken", resume=True)
    options = {**GROWING, "save_steps": 1, "noise_scale": 0.9}
    broken = run(folder, "broken", stage=options, run=again, **groups)
    assert trl_tools.losses(broken) == trl_tools.losses(whole)
    last = [trl_tools.metric_lines(place)[-2]["train/noise_trace"] for place in (whole, broken)]
    assert last[0] == last[1]
    expected, found = weights(whole), weights(broken)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("split", [{"micro_batch_size": 4}, {"micro_batch_tokens": 48}, {}])
def test_how_a_step_is_split_changes_nothing(
    straight: Path, folder: Path, split: dict[str, int]
) -> None:
    place = run(folder, f"split{len(split)}{split}", stage=GROWING, engine=EngineConfig(**split))
    assert trl_tools.losses(place) == pytest.approx(trl_tools.losses(straight), abs=1e-5)
    for name, tensor in weights(straight).items():
        torch.testing.assert_close(weights(place)[name], tensor, atol=1e-5, rtol=0)


NOISE = ("train/noise_scale", "train/noise_trace", "train/noise_square")


def test_the_noise_is_measured_and_changes_nothing(straight: Path, folder: Path) -> None:
    """In micro-batches of 2 rows and of 4: other estimates of the same noise, and the run is that
    without them, to the bit.
    """
    places = {
        rows: run(
            folder,
            f"noise{rows}",
            stage={**GROWING, "noise_scale": 0.9},
            engine=EngineConfig(micro_batch_size=rows),
        )
        for rows in (2, 4)
    }
    expected, found = weights(straight), weights(places[2])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    figures = {
        rows: [line for line in trl_tools.metric_lines(place) if "loss" in line]
        for rows, place in places.items()
    }
    # a step of four rows is one micro-batch of four
    assert [NOISE[1] in line for line in figures[4]] == [False, False, True, True, True, True]
    assert all(set(NOISE) & line.keys() for line in figures[2])
    assert figures[2][-1][NOISE[1]] > 0 and figures[2][-1][NOISE[2]] > 0
    for name in NOISE[1:]:
        assert figures[4][-1][name] == pytest.approx(figures[2][-1][name], rel=0.8), name


def noisy_config(folder: Path, **groups: Any) -> Config:
    stage = SFTStage(**STAGE, noise_scale=0.9)
    return trl_tools.config(stage, folder, "noisy", trl_tools.sft_rows(), **groups)


def check(cfg: Config, plan: launch.BatchPlan) -> None:
    check_noise(cfg.stage, cfg.engine, cfg.model.dtype, plan)


def test_noise_that_cannot_be_seen_is_refused(folder: Path) -> None:
    plan = launch.BatchPlan(1, 4, 2)
    half = ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY, dtype=Dtype.float16)
    with pytest.raises(UserError, match=r"stage\.noise_scale=0\.9 with model\.dtype=float16"):
        check(noisy_config(folder, model=half), plan)
    zero = EngineConfig(kind=EngineKind.deepspeed, zero_stage=0)
    with pytest.raises(UserError, match="engine=zero0 tells TRL's trainers no gradient's norm"):
        check(noisy_config(folder, engine=zero), plan)
    check(noisy_config(folder), plan)


def test_noise_needs_two_micro_batches(folder: Path) -> None:
    cfg = noisy_config(folder)
    with pytest.raises(UserError, match=r"a step is one of 8 rows\. Set engine\.micro_batch_size"):
        check(cfg, launch.plan_batches(8, EngineConfig(), 1))
    check(cfg, launch.plan_batches(8, EngineConfig(micro_batch_size=4), 1))
    check(cfg, launch.plan_batches(8, EngineConfig(), 2))
