"""The step label_noise: planted wrong labels are found, whatever the scores' order, and a model
that has seen the rows is refused.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.preparation.annotation import Contradicted, LabelNoise, NoiseFilter
from conf.stages import RewardStage
from rlhf.data.formats import Use
from rlhf.data.prepare.label_noise import label_noise, pair_issues, sigmoid
from rlhf.process.files import sha256
from rlhf.run.context import RunContext
from rlhf.stages import reward
from rlhf.stages import rows as stage_rows
from rlhf.stages.pair_scores import pair_scorer
from rlhf.types import UserError
from tests import steps
from tests.offline import trl_tools

Row = dict[str, Any]


def scored(count: int, noise: float, spread: float, seed: int = 0) -> tuple[list[Row], np.ndarray]:
    """Pairs whose better side scores N(2, spread) more, of which a share `noise` has its sides
    exchanged.
    """
    rng = np.random.default_rng(seed)
    wrong = rng.random(count) < noise
    margins = np.where(wrong, -1, 1) * rng.normal(2.0, spread, count)
    offset = rng.normal(0, 3, count)
    rows = [
        {
            "prompt": f"p{i}",
            "chosen": "x",
            "rejected": "y",
            "score_chosen": float(o + m),
            "score_rejected": float(o),
        }
        for i, (m, o) in enumerate(zip(margins, offset, strict=True))
    ]
    return rows, wrong


def quality(found: set[int], wrong: np.ndarray) -> tuple[float, float]:
    """(recall, precision) of row numbers against planted ones."""
    planted = {int(i) + 1 for i in np.flatnonzero(wrong)}
    return len(found & planted) / len(planted), len(found & planted) / max(1, len(found))


def test_sigmoid_is_exact_and_never_overflows() -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        values = sigmoid(np.array([-800.0, -1.0, 0.0, 1.0, 800.0]))
    assert values.tolist() == pytest.approx([0.0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1.0])


@pytest.mark.parametrize("method", NoiseFilter)
def test_planted_noise_is_found(tmp_path: Path, method: NoiseFilter) -> None:
    rows, wrong = scored(2000, 0.1, 0.7)
    ran = steps.run(label_noise, LabelNoise(method=method), rows, tmp_path)
    recall, precision = quality(set(ran.left_out), wrong)
    # confident_learning flags only what is above the mean confidence in the other label; the others
    # all that is on its side
    assert (
        recall > (0.7 if method is NoiseFilter.confident_learning else 0.9) and precision > 0.95
    ), (recall, precision)
    assert ran.figures["found"] == len(ran.rejected) and len(ran.rows) + len(ran.rejected) == 2000
    assert "to which it gives the probability 0." in ran.rejected[0][1]


def test_clean_labels_are_left_alone(tmp_path: Path) -> None:
    rows, _ = scored(2000, 0.0, 0.7)
    assert len(steps.run(label_noise, LabelNoise(), rows, tmp_path).rejected) < 15


def test_the_sides_order_means_nothing() -> None:
    """Exchanging chosen and rejected of every pair, scores and all, is another labelling; shuffling
    the rows and shifting scores is none.
    """
    rows, _ = scored(500, 0.15, 1.0)
    right = sigmoid(np.array([row["score_chosen"] - row["score_rejected"] for row in rows]))
    for method in (filter_.value for filter_ in NoiseFilter):
        whole = pair_issues(right, method)
        order = np.random.default_rng(1).permutation(len(right))
        assert (pair_issues(right[order], method) == whole[order]).all()
        assert not whole[right > 0.5].any(), (
            "a label that the model finds the likelier one is never contradicted"
        )


def test_flags_and_weights_keep_every_row(tmp_path: Path) -> None:
    rows, wrong = scored(600, 0.1, 0.7)
    flagged = steps.run(label_noise, LabelNoise(action=Contradicted.flag), rows, tmp_path).rows
    assert len(flagged) == 600 and {type(row["label_noise"]) for row in flagged} == {bool}
    found = {i + 1 for i, row in enumerate(flagged) if row["label_noise"]}
    assert found == set(steps.run(label_noise, LabelNoise(), rows, tmp_path).left_out)
    rows[0]["weight"] = "2"
    weighed = steps.run(label_noise, LabelNoise(action=Contradicted.weight), rows, tmp_path).rows
    assert weighed[0]["weight"] == pytest.approx(2 * flagged[0]["label_quality"])
    assert (
        weighed[1]["weight"] == pytest.approx(flagged[1]["label_quality"])
        and "label_noise" not in weighed[1]
    )
    weights = np.array([row["weight"] for row in weighed])
    assert weights[1:][wrong[1:]].mean() < 0.3 and weights[1:][~wrong[1:]].mean() > 0.7


def test_judged_answers_by_a_probability(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(1000) < 0.7
    wrong = rng.random(1000) < 0.1
    good = np.clip(np.where(truth, 0.85, 0.15) + rng.normal(0, 0.08, 1000), 0.01, 0.99)
    rows = [
        {"prompt": "p", "completion": "c", "label": bool(t != w), "p_good": float(p)}
        for t, w, p in zip(truth, wrong, good, strict=True)
    ]
    ran = steps.run(label_noise, LabelNoise(probability="p_good"), rows, tmp_path, Use.unpaired)
    recall, precision = quality(set(ran.left_out), wrong)
    assert recall > 0.75 and precision > 0.95


@pytest.mark.parametrize(
    ("options", "kind", "change", "message"),
    [
        (
            {},
            Use.preference,
            {"score_chosen": None},
            r"row 2: column 'score_chosen': expected a finite number, found None",
        ),
        (
            {},
            Use.preference,
            {"score_rejected": "nan"},
            r"row 2: column 'score_rejected': expected a finite number, found 'nan'",
        ),
        (
            {"score_chosen": "rm"},
            Use.preference,
            {},
            r"row 1: column 'rm': expected a finite number, found no such column",
        ),
        ({"reward_model": "x"}, Use.preference, {}, r"needs a stage that can load it"),
        ({}, Use.unpaired, {}, r"step label_noise: probability is not set"),
        (
            {"probability": "score_chosen"},
            Use.unpaired,
            {"score_chosen": 1.5},
            r"row 2: column 'score_chosen': expected a number in \[0, 1\]",
        ),
        (
            {"probability": "score_chosen"},
            Use.unpaired,
            {},
            r"expected at least 2 good and 2 bad answers, found 3 good of 3",
        ),
    ],
)
def test_missing_scores_are_refused(
    tmp_path: Path, options: dict[str, Any], kind: Use, change: Row, message: str
) -> None:
    rows = [
        {
            "prompt": "p",
            "chosen": "x",
            "rejected": "y",
            "label": True,
            "score_chosen": 0.5,
            "score_rejected": 0.1,
        }
        for _ in range(3)
    ]
    rows[1] |= change
    with pytest.raises(UserError, match=message):
        steps.run(label_noise, LabelNoise(**options), rows, tmp_path, kind)


def test_options_that_contradict_each_other_are_refused() -> None:
    for wrong in (
        {"reward_model": "runs/{fold}"},
        {"fold": "fold"},
        {"reward_model": "x", "probability": "p"},
    ):
        with pytest.raises(ValueError, match="is out of range"):
            LabelNoise(**wrong)


# ---- a reward model of the project's own ----

STAGE = {
    "steps": 16,
    "batch_size": 8,
    "eval_steps": 8,
    "max_length": 40,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
    "bootstrap": 10,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small reward model's directory, and the file it was trained on."""
    folder = tmp_path_factory.mktemp("noise")
    cfg = trl_tools.config(RewardStage(**STAGE), folder, "rm", trl_tools.pair_rows(80))
    ctx = RunContext.open(cfg)
    reward.run(ctx, stage_rows)
    return ctx.model_dir, Path(str(cfg.data.path))


def fresh_pairs(count: int) -> tuple[list[Row], np.ndarray]:
    """Pairs that the model has not seen, every eighth with its sides exchanged."""
    rows = trl_tools.pair_rows(80 + count)[80:]
    wrong = np.arange(count) % 8 == 0
    for row, bad in zip(rows, wrong, strict=True):
        if bad:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows, wrong


def test_the_runs_own_reward_model_finds_exchanged_sides(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    rows, wrong = fresh_pairs(120)
    options = LabelNoise(reward_model=str(trained[0]))
    ran = steps.run(label_noise, options, rows, tmp_path, score_pairs=pair_scorer(2048))
    recall, precision = quality(set(ran.left_out), wrong)
    assert recall >= 0.9 and precision >= 0.9, (recall, precision)


def test_a_model_that_was_trained_on_the_rows_is_refused(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = trained
    rows, _ = fresh_pairs(16)
    options = LabelNoise(reward_model=str(model))
    with pytest.raises(UserError, match="was trained on"):
        steps.run(
            label_noise,
            options,
            steps.items(rows, str(data)),
            tmp_path,
            score_pairs=pair_scorer(2048),
        )
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(data.read_bytes())
    with pytest.raises(UserError, match="was trained on"):  # by content, not by name
        steps.run(
            label_noise,
            LabelNoise(reward_model=str(model)),
            steps.items(rows, str(copy)),
            tmp_path,
            score_pairs=pair_scorer(2048),
        )
    allowed = LabelNoise(reward_model=str(model), seen=True)
    assert steps.run(
        label_noise, allowed, steps.items(rows, str(data)), tmp_path, score_pairs=pair_scorer(2048)
    ).kept


def test_folds_are_scored_by_their_own_models(tmp_path: Path) -> None:
    rows, _ = scored(400, 0.1, 0.5)
    for i, row in enumerate(rows):
        row["fold"] = i % 2
    seen: dict[str, int] = {}

    def score(directory: str, pairs: Any) -> list[tuple[float, float]]:
        seen[directory] = len(pairs)
        numbers = [int(prompt[1:]) for prompt, _, _, _ in pairs]
        assert {number % 2 for number in numbers} == {int(directory[-1])}
        return [(rows[n]["score_chosen"], rows[n]["score_rejected"]) for n in numbers]

    options = LabelNoise(reward_model=str(tmp_path / "without_{fold}"), fold="fold")
    ran = steps.run(label_noise, options, rows, tmp_path, score_pairs=score)
    assert seen == {str(tmp_path / "without_0"): 200, str(tmp_path / "without_1"): 200}
    assert set(ran.left_out) == set(steps.run(label_noise, LabelNoise(), rows, tmp_path).left_out)
    del rows[7]["fold"]
    with pytest.raises(
        UserError, match=r"row 8: column 'fold': expected the row's fold, found nothing"
    ):
        steps.run(label_noise, options, rows, tmp_path, score_pairs=score)


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    rows, _ = scored(3, 0.0, 0.1)
    with pytest.raises(UserError, match=r"row 1: the reward model's scores are \[nan, 0.0\]"):
        steps.run(
            label_noise,
            LabelNoise(reward_model="x"),
            rows,
            tmp_path,
            score_pairs=lambda d, p: [(float("nan"), 0.0)] * len(p),
        )


def test_the_manifest_is_read_as_runs_write_it(trained: tuple[Path, Path]) -> None:
    model, data = trained
    manifest = json.loads((model.parent / "manifest.json").read_text(encoding="utf-8"))
    assert sha256(data) in [entry["sha256"] for entry in manifest["data"]]
