"""NaN, infinities and spikes in a reward, a loss and a gradient: the run stops, leaves the update
out, or goes back to its last checkpoint.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.choices import OnNonFinite
from conf.stages import OnlineStage
from policy.engines.base import Brake, NonFinite
from policy.engines.torch import TorchEngine
from policy.model import PolicyModule
from rlhf.checks import launch
from rlhf.cli import config
from rlhf.online import loop as online
from rlhf.types import TrainingDiverged, UserError
from tests import toys
from tests.online.test_online import metrics, run_ppo

pytestmark = pytest.mark.usefixtures("one_thread")
BAD_STEP = 3
SHORT = [
    "stage.steps=4",
    "stage.save_steps=1",
    "stage.epochs=1",
    "stage.prompts_per_step=4",
    "rollout.max_response_length=3",
]
SHORT += [
    "run.keep_checkpoints=0",
    "reward.function=tests.online.test_nonfinite:sometimes",
    "stage.reward_normalise=true",
]
CALLS: Counter[str] = Counter()
BAD_CALLS: set[int] = set()  # of the reward


def sometimes(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that is no number at the calls in BAD_CALLS."""
    CALLS["reward"] += 1
    scores = toys.even_tokens(completion_ids)
    return [math.nan, *scores[1:]] if CALLS["reward"] in BAD_CALLS else scores


@pytest.fixture(autouse=True)
def fresh() -> None:
    CALLS.clear()
    BAD_CALLS.clear()


def break_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    BAD_CALLS.add(BAD_STEP)


def break_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's loss of one step."""
    real = online.prepare

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        batch = real(*args, **kwargs)
        CALLS["prepare"] += 1
        if CALLS["prepare"] == BAD_STEP:
            batch.returns[0, 0] = math.nan
        return batch

    monkeypatch.setattr(online, "prepare", poisoned)


def scale_gradient(monkeypatch: pytest.MonkeyPatch, factor: float, update: int) -> None:
    """The policy's gradient of one update, times `factor`."""
    real = TorchEngine.clip

    def changed(engine: TorchEngine) -> float | None:
        if isinstance(engine.module, PolicyModule) and engine._norm is None:
            CALLS["clip"] += 1
            if CALLS["clip"] == update:
                for param in engine.params:
                    if param.grad is not None:
                        param.grad.mul_(factor)
        return real(engine)

    monkeypatch.setattr(TorchEngine, "clip", changed)


def break_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradient(monkeypatch, math.inf, BAD_STEP)


FAULTS = {"reward": break_reward, "loss": break_loss, "gradient": break_gradient}
SAID = {
    "reward": "returned nan",
    "loss": "loss/value=nan",
    "gradient": r"policy/grad_norm is (nan|inf)",
}


def state(run: Path, step: int) -> dict[str, Any]:
    place = run / "checkpoints" / f"step-{step}"
    return {
        name: torch.load(place / name / "engine.pt", weights_only=True)
        for name in ("policy", "critic")
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    "fault",
    [
        "gradient",
        pytest.param("reward", marks=pytest.mark.slow),
        pytest.param("loss", marks=pytest.mark.slow),
    ],
)
def test_stop_saves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(TrainingDiverged, match=rf"step 3: .*{SAID[fault]}.*diverged-step-3-rank-0"):
        run_ppo(tmp_path, *SHORT)
    run = tmp_path / "default" / "ppo"
    assert (
        len(
            (run / "diverged-step-3-rank-0" / "rollouts.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        == 4
    )
    assert [row["step"] for row in metrics(run)] == [1, 2] and not (run / "summary.json").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_skip_leaves_the_update_out_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    FAULTS[fault](monkeypatch)
    run = run_ppo(tmp_path, *SHORT, "stage.on_nonfinite=skip")
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("train/skipped", 0) + row.get("policy/skipped", 0) for row in rows] == [
        0,
        0,
        1,
        0,
    ]
    assert same(state(run, 3), state(run, 2)), (
        "neither weights nor optimizer of policy or critic moved"
    )
    assert not same(state(run, 2), state(run, 1)) and not same(state(run, 4), state(run, 3)), (
        "the comparison sees an update"
    )
    assert (run / "diverged-step-3-rank-0" / "rollouts.jsonl").exists()
    assert (
        json.loads((run / "summary.json").read_text(encoding="utf-8"))["metrics"][
            "train/skipped_total"
        ]
        == 1.0
    )


@pytest.mark.parametrize(
    "fault", ["reward", "gradient", pytest.param("loss", marks=pytest.mark.slow)]
)
def test_rewind_goes_on_from_the_last_checkpoint_with_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    FAULTS[fault](monkeypatch)
    run = run_ppo(tmp_path, *SHORT, "stage.save_steps=2", "stage.on_nonfinite=rewind")
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    tried = [
        json.loads(line)["prompt"]
        for line in (run / "diverged-step-3-rank-0" / "rollouts.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    samples = [
        json.loads(line)
        for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert Counter(row["step"] for row in samples) == {1: 4, 2: 4, 3: 4, 4: 4}
    assert {row["prompt"] for row in samples if row["step"] == 3}.isdisjoint(tried)
    assert (
        json.loads((run / "summary.json").read_text(encoding="utf-8"))["metrics"]["train/rewinds"]
        == 1.0
    )
    loop = json.loads((run / "checkpoints" / "step-4" / "loop.json").read_text(encoding="utf-8"))
    assert loop["moments"]["count"] == 16 and loop["draws"] >= 5 and loop["rewinds"] == 1, (
        "what the failed step saw is forgotten"
    )


def test_rewinds_come_to_an_end(tmp_path: Path) -> None:
    BAD_CALLS.update(range(2, 100))
    with pytest.raises(
        TrainingDiverged,
        match=r"stage.on_nonfinite=rewind: stage.rewinds=2 times it was tried already",
    ):
        run_ppo(tmp_path, *SHORT, "stage.on_nonfinite=rewind", "stage.rewinds=2")
    assert CALLS["reward"] == 4, "the first failure and two more"


def test_a_rewind_needs_a_checkpoint(tmp_path: Path) -> None:
    BAD_CALLS.add(1)
    with pytest.raises(TrainingDiverged, match="no whole checkpoint"):
        run_ppo(tmp_path, *SHORT, "stage.on_nonfinite=rewind")


def test_a_run_of_nothing_but_skipped_steps_is_an_error(tmp_path: Path) -> None:
    BAD_CALLS.update(range(1, 100))
    with pytest.raises(TrainingDiverged, match="none of the 4 steps"):
        run_ppo(tmp_path, *SHORT, "stage.on_nonfinite=skip")


def test_a_spike_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradient(monkeypatch, 1e4, update=4)
    run = run_ppo(
        tmp_path,
        *SHORT,
        "stage.on_nonfinite=skip",
        "stage.spike_grad_norm=100",
        "stage.spike_window=3",
    )
    assert [row["policy/skipped"] for row in metrics(run)] == [0, 0, 0, 1]
    assert same(state(run, 4), state(run, 3))


def test_the_brake_by_hand() -> None:
    brake = Brake(loss=None, grad_norm=3.0, window=3)
    for norm in (1.0, 2.0, 9.0):  # no limit before three were seen
        brake.check("grad_norm", {"a": norm})
    brake.check("grad_norm", {"a": 6.0})  # 3 x the median 2 is not above
    with pytest.raises(
        NonFinite,
        match=r"a is 18.1, above stage.spike_grad_norm=3 times 6, .*last 3 updates",
    ):
        brake.check("grad_norm", {"a": 18.1})
    brake.check("grad_norm", {"a": 17.9})  # the refused one is not among the last
    brake.check("loss", {"b": 1e9})
    with pytest.raises(NonFinite, match="b is nan"):
        brake.check("loss", {"b": math.nan})
    again = Brake(loss=None, grad_norm=3.0, window=3)
    again.load_state_dict(json.loads(json.dumps(brake.state_dict())))
    assert again.state_dict() == brake.state_dict() == {"a": [9.0, 6.0, 17.9]}


def test_settings_that_can_not_work_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"stage.save_steps=0 is out of range: expected above 0 with on_nonfinite=rewind",
    ):
        OnlineStage(on_nonfinite=OnNonFinite.rewind, save_steps=0)
    cfg = config.compose(
        ["stage=ppo", "model=tiny", "engine=zero2", "stage.on_nonfinite=skip", "data.path=x"]
    )
    with pytest.raises(
        UserError,
        match=r"stage.on_nonfinite=skip needs engine=torch.*Set stage.on_nonfinite=rewind",
    ):
        launch.check_nonfinite(cfg.stage.on_nonfinite, cfg.engine, cfg.model.dtype)
