"""SFT, the reward model and DPO beside bare TRL: both sides train the same rows, to the same
losses.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.shared import write_rows
from benchmarks.speed import offline
from benchmarks.speed import turns as turns_module
from benchmarks.speed.offline import OfflineCase
from benchmarks.speed.turns import Contestant, cores_here, take_turns

WORDS = ("alpha", "beta", "gamma", "delta")


def rows_of(stage: str) -> list[dict[str, str]]:
    """Rows of unequal length, so that another order gives other losses."""
    out = []
    for number in range(24):
        text = " ".join(WORDS[(number + place) % 4] for place in range(1 + number % 7))
        if stage == "sft":
            out.append({"text": f"{number} {text}"})
        else:
            out.append({"prompt": f"{number}", "chosen": f" {text}", "rejected": f" {text[::-1]}"})
    return out


@pytest.mark.parametrize(
    "stage",
    ["sft", *(pytest.param(name, marks=pytest.mark.full) for name in ("reward", "dpo"))],
)
def test_both_sides_train_the_same_rows_to_the_same_losses(
    stage: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns_module, "PAUSE_S", 0.0)
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(stage))
    (core,) = cores_here(1)
    contestants = {}
    for side in offline.SIDES:
        case = OfflineCase(
            stage=stage,
            side=side,
            model=str(tiny_model()),
            train=str(rows),
            held_out=str(rows),
            folder=str(tmp_path / side),
            turn_steps=2,
            batch=4,
            max_length=48,
            learning_rate=1e-2,
        )
        path = tmp_path / f"{side}.json"
        case.dump(path)
        assert OfflineCase.load(path) == case
        contestants[side] = Contestant(offline.WORKER, path, core)
    turns = take_turns(stage, contestants, 4, tmp_path)
    ours, trl = turns["ours"], turns["trl"]
    assert offline.check_same(stage, ours, trl) <= offline.SAME
    losses = [row["loss"] for row in ours]
    assert len(set(losses)) == len(losses), "each turn trains other rows"
    assert all(row["step_s"] >= row["cpu_s"] * 0.5 > 0 for row in [*ours, *trl])
    log = tmp_path / "ours" / "default" / stage / "metrics.jsonl"
    metrics = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    # all but the last step of the last turn, which is logged when the next one is asked for
    assert sum("loss" in row for row in metrics) == 2 * 5 - 1
