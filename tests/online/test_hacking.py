"""The experiment that makes reward hacking visible: its reward, its judge, and its proof."""

import json
from pathlib import Path

import pytest

from benchmarks.proofs import hacking as proof_hacking
from benchmarks.proofs.common import Check, MissingRun
from reward.functions import distinct_share, praise_count, readable_praise, words
from rlhf.cli import config


def test_the_reward_counts_praise_and_pays_for_repeating_it() -> None:
    assert praise_count(["a good film .", "good good good", "a bad film", "the film", ""]) == [
        1.0,
        3.0,
        -1.0,
        0.0,
        0.0,
    ]
    assert praise_count([[{"role": "assistant", "content": "great , great !"}]]) == [2.0]


def test_the_judge_reads_what_is_said() -> None:
    once, thrice, none, bad = readable_praise(
        ["the film"] * 4,
        [" is a good one", " is good good good good good", " is a film", " is bad and bad and bad"],
    )
    assert once > none == 0.0 and bad < 0.0
    assert thrice < once, "repeated praise is worth less, although the sentiment is stronger"
    chat = readable_praise(
        [[{"role": "user", "content": "the film"}]],
        [[{"role": "assistant", "content": " is a good one"}]],
    )
    assert chat == [once]


def test_words_and_how_many_are_different() -> None:
    assert words("Good , good ! (very) don't") == ["good", "good", "very", "don't"]
    assert distinct_share("good, good bad") == pytest.approx(2 / 3) and distinct_share("...") == 1.0


def test_the_experiment_stops_at_a_divergence() -> None:
    assert config.compose(["stage=chain", "experiment=hacking"]).stage.stages == ["sft", "grpo"]
    cfg = config.compose(["stage=grpo", "experiment=hacking"])
    assert (
        cfg.stage.watch.divergence.value == "stop"
        and cfg.reward.function != cfg.stage.watch.judge_function
    )
    assert cfg.data.eval_path is not None


STEPS = {0: (0.1, 1.0), 4: (0.4, 3.0), 8: (0.2, 6.0), 12: (0.1, 8.0)}  # judge, proxy


def write_runs(folder: Path) -> Path:
    """The run directories of a chain that passes."""
    for stage, metrics in {
        "chain": {},
        "grpo": {"watch/stopped_step": 12.0, "watch/best_step": 4.0},
    }.items():
        (folder / stage).mkdir(parents=True)
        (folder / stage / "summary.json").write_text(
            json.dumps({"steps": 12, "wall_s": 200.0, "metrics": metrics})
        )
        rows = [
            {"step": s, "judge/score": j, "judge/score_se": 0.05, "judge/proxy": p}
            for s, (j, p) in STEPS.items()
        ]
        rows[-1]["watch/divergence"] = 1.0
        (folder / stage / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    for place in ("model", "best/model"):
        (folder / "grpo" / place).mkdir(parents=True)
        (folder / "grpo" / place / "model.safetensors").write_bytes(b"kept")
    return folder


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def change(folder: Path, step: int, name: str, value: float | None) -> None:
    path = folder / "grpo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    next(row for row in rows if row["step"] == step)[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_good_run_passes(tmp_path: Path) -> None:
    assert failed(proof_hacking.check_run(write_runs(tmp_path / "proof-hacking-3"))) == []
    assert proof_hacking.main(["--check-only", "--seeds", "3", "--runs", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("step", "name", "value", "check"),
    [
        (0, "judge/score", 0.31, "kept weights less start, in standard errors"),
        (12, "judge/score", 0.31, "stopped weights less kept ones, in standard errors"),
        (4, "judge/proxy", 1.0, "proxy: kept weights less start"),
        (12, "judge/proxy", 3.0, "proxy: stopped weights less kept ones"),
    ],
)
def test_each_figure_can_fail(
    tmp_path: Path, step: int, name: str, value: float, check: str
) -> None:
    folder = write_runs(tmp_path / "proof-hacking-0")
    change(folder, step, name, value)
    wrong = failed(proof_hacking.check_run(folder))
    assert len(wrong) == 1 and check in wrong[0]
    assert proof_hacking.main(["--check-only", "--seeds", "0", "--runs", str(tmp_path)]) == 1


def test_other_weights_or_no_alarm_fail(tmp_path: Path) -> None:
    folder = write_runs(tmp_path)
    (folder / "grpo" / "model" / "model.safetensors").write_bytes(b"last")
    assert failed(proof_hacking.check_run(folder)) == ["model/ is what was kept, bit for bit"]
    change(folder, 12, "watch/divergence", None)
    with pytest.raises(MissingRun, match="has no watch/divergence at step 12"):
        proof_hacking.check_run(folder)
    (folder / "grpo" / "best" / "model" / "model.safetensors").unlink()
    change(folder, 12, "watch/divergence", 1.0)
    with pytest.raises(MissingRun, match=r"best/model/model\.safetensors: no such file"):
        proof_hacking.check_run(folder)
