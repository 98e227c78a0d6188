"""The proof of the choice of pairs: its arithmetic, its bounds, its commands, and the rounds
themselves on a toy.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.proofs import label_rounds
from benchmarks.proofs import labels as proof_labels
from benchmarks.proofs.annotator import Annotator, judge
from benchmarks.proofs.common import MissingRun
from benchmarks.proofs.labels import Curves, check_curves, commands, labels_needed, read_curves
from conf.choices import ChoiceMethod
from rlhf.cli import config
from rlhf.labels.choice import Chosen
from rlhf.labels.records import Answer, Candidates, Judgement, Verdict
from rlhf.run.context import RunContext


@pytest.mark.parametrize(
    ("accuracy", "target", "expected"),
    [
        ([0.5, 0.6, 0.7, 0.8], 0.65, 250.0),  # half way between 200 and 300
        ([0.5, 0.6, 0.7, 0.8], 0.7, 300.0),
        ([0.5, 0.6, 0.7, 0.8], 0.72, 320.0),
        ([0.6, 0.7, 0.8, 0.9], 0.55, 100.0),  # there from the first round on
        ([0.5, 0.8, 0.6, 0.8], 0.7, 350.0),  # the lucky second round doesn't count
        ([0.5, 0.6, 0.7, 0.69], 0.7, math.inf),
        ([0.5, 0.6, 0.7, math.nan], 0.7, math.inf),
    ],
)
def test_labels_needed_by_hand(accuracy: list[float], target: float, expected: float) -> None:
    assert labels_needed([100, 200, 300, 400], accuracy, target) == pytest.approx(expected)


def test_curves_that_do_not_match_are_refused() -> None:
    for labels, accuracy in (([1, 2], [0.5]), ([], []), ([2, 1], [0.5, 0.6]), ([1, 1], [0.5, 0.6])):
        with pytest.raises(ValueError, match="expected rising labels"):
            labels_needed(labels, accuracy, 0.5)


def curves(random: tuple[float, ...], active: tuple[float, ...]) -> Curves:
    return Curves((100.0, 200.0, 300.0, 400.0), random, active, 10.0)


def test_each_bound_fails_by_itself() -> None:
    good = curves((0.6, 0.65, 0.68, 0.7), (0.6, 0.69, 0.72, 0.73))
    assert good.share == pytest.approx((200 + 100 / 3) / 400) and all(
        check.passed for check in check_curves(good)
    )

    def failed(found: Curves) -> list[str]:
        return [
            check.name.split(",")[0].split(":")[0]
            for check in check_curves(found)
            if not check.passed
        ]

    assert failed(curves((0.6, 0.65, 0.68, 0.7), (0.6, 0.65, 0.69, 0.71))) == [
        "labels that the choice needs"
    ], "87.5 %"
    assert failed(curves((0.69, 0.65, 0.68, 0.7), (0.69, 0.71, 0.72, 0.73))) == [
        "what random labels teach"
    ]
    assert failed(curves((0.6, 0.65, 0.68, 0.7), (0.6, 0.72, 0.72, 0.69))) == [
        "labels that the choice needs",
        "accuracy at the end",
    ]


def write_run(
    folder: Path,
    active: tuple[float, ...] = (0.6, 0.7, 0.75),
    labels: tuple[int, ...] = (10, 20, 30),
) -> None:
    place = folder / "label"
    place.mkdir(parents=True)
    (place / "summary.json").write_text(json.dumps({"steps": 3, "wall_s": 12.5, "metrics": {}}))
    rows = [
        {
            "step": i,
            "active/labels": n,
            "random/labels": 10 * (i + 1),
            "active/accuracy": a,
            "random/accuracy": r,
        }
        for i, (n, a, r) in enumerate(zip(labels, active, (0.6, 0.65, 0.7), strict=True))
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_check_only_reads_the_runs_and_writes_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "proof-labels-3")
    write_run(tmp_path / "proof-labels-4", active=(0.6, 0.62, 0.66))
    assert proof_labels.main(["--check-only", "--seeds", "3", "--runs", str(tmp_path)]) == 0
    assert proof_labels.main(["--check-only", "--seeds", "3", "4", "--runs", str(tmp_path)]) == 1, (
        "one seed that fails fails the proof"
    )
    found = json.loads((tmp_path / "proof_labels.json").read_text())
    assert found["3"]["share"] == pytest.approx(2 / 3) and found["4"]["share"] is None
    assert (tmp_path / "proof_labels.png").stat().st_size > 5000
    assert "0.750" in capsys.readouterr().out
    assert proof_labels.main(["--check-only", "--seeds", "5", "--runs", str(tmp_path)]) == 1
    assert "seed 5" in capsys.readouterr().err


def test_unequal_numbers_of_labels_prove_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, labels=(10, 20, 31))
    with pytest.raises(MissingRun, match="different numbers of labels"):
        read_curves(tmp_path)


def test_the_commands_of_a_seed_and_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, rounds = commands(7, tmp_path, ["label.budget=5", "engine.threads=2"])
    assert sft[1:4] == ["-m", "rlhf", "stage=sft"] and rounds[1:3] == [
        "-m",
        "benchmarks.proofs.label_rounds",
    ]
    for command in (sft, rounds):
        assert {
            "experiment=active_labels",
            "run.name=proof-labels-7",
            "run.seed=7",
            f"run.dir={tmp_path}",
            "engine.threads=2",
        } <= set(command)
    assert "label.budget=5" in rounds and "label.budget=5" not in sft
    seen: list[list[str]] = []

    class Failed:
        returncode = 3

    def fail(command: list[str], **_: object) -> Failed:
        seen.append(command)
        return Failed()

    monkeypatch.setattr("subprocess.run", fail)
    write_run(tmp_path / "proof-labels-7")
    assert proof_labels.main(["--seeds", "7", "--runs", str(tmp_path)]) == 1, (
        "whatever an earlier run left behind"
    )
    assert len(seen) == 1, "without a policy there is nothing to label"


def test_a_pair_goes_out_with_drawn_sides_and_comes_back_as_it_was_preferred() -> None:
    candidates = Candidates("p", (Answer("worse"), Answer("better"), Answer("other")))
    orders = set()
    for seed in range(20):
        task = label_rounds.as_task(candidates, Chosen(0, (0, 1), ChoiceMethod.random), 0, seed)
        orders.add(task.order)
        worth = [{"worse": 0.0, "better": 1.0}[answer.text] for answer in task.answers]
        row = label_rounds.preference_row(
            task, judge(Annotator("a", 0, temperature=1e-6), task, worth)
        )
        assert row == {"prompt": "p", "chosen": "better", "rejected": "worse"}
    assert orders == {(0, 1), (1, 0)}
    assert label_rounds.preference_row(task, Judgement(task.id, "a", Verdict.tie)) is None


def test_held_out_pairs_are_clear_and_right() -> None:
    worth = {"pa": 0.0, "pb": 0.4, "pc": 1.0}
    rows = label_rounds.held_out_rows(
        [Candidates("p", (Answer("a"), Answer("b"), Answer("c")))], worth, 0.5, 10, 0
    )
    assert sorted((row["chosen"], row["rejected"]) for row in rows) == [("c", "a"), ("c", "b")]
    assert (
        len(
            label_rounds.held_out_rows(
                [Candidates("p", (Answer("a"), Answer("b"), Answer("c")))], worth, 0.0, 2, 0
            )
        )
        == 2
    )


def test_members_scores_become_mean_and_spread_without_their_zeros() -> None:
    one = Candidates("p", (Answer("a"), Answer("b")))
    (found,) = label_rounds.with_scores([one], [[0.0, 2.0], [11.0, 11.0]])
    assert [(a.score, a.spread) for a in found.answers] == [
        (-0.5, pytest.approx(0.5**0.5)),
        (0.5, pytest.approx(0.5**0.5)),
    ]


@pytest.fixture
def toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> list[str]:
    """A world where "fox" is better than "dog", and options for it."""
    words = ["quick", "brown", "jumps", "over", "lazy"]
    pool = tuple(
        Candidates(f"the {w} {v}", (Answer(" fox"), Answer(" dog"), Answer(" the")))
        for w in words
        for v in words
    )
    worth = {
        one.prompt + answer.text: {" fox": 1.0, " dog": -1.0, " the": 0.0}[answer.text]
        for one in pool
        for answer in one.answers
    }
    rows = label_rounds.held_out_rows(pool, worth, 0.5, 20, 0)
    monkeypatch.setattr(
        label_rounds,
        "make_world",
        lambda cfg, folder: label_rounds.World(
            pool, label_rounds.write_rows(folder / "h.jsonl", rows), worth
        ),
    )
    for name, value in {"ROUNDS": 2, "MEMBERS": 2, "TEMPERATURE": 0.1, "FLIP": 0.0}.items():
        monkeypatch.setattr(label_rounds, name, value)
    model = [f"model.path={tiny_model()}", "data.recipe=none", "label.budget=8", "engine.threads=1"]
    return [
        "experiment=active_labels",
        f"run.dir={tmp_path}",
        "run.name=toy",
        "run.overwrite=true",
        *model,
    ]


def test_the_rounds_on_a_toy(toy: list[str], tmp_path: Path) -> None:
    cfg = config.compose(["stage=label", *toy])
    ctx = RunContext.open(cfg)
    with ctx.closing():
        label_rounds.run(ctx, [*toy])
    folder = tmp_path / "toy" / "label"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (
        [line["active/labels"] for line in lines]
        == [line["random/labels"] for line in lines]
        == [8.0, 16.0]
    )
    assert lines[0]["active/accuracy"] == lines[0]["random/accuracy"]
    assert lines[1]["active/right_labels"] == 1.0, "an annotator without noise"
    labelled = {
        arm: [json.loads(line) for line in (folder / f"{arm}.jsonl").read_text().splitlines()]
        for arm in ("active", "random")
    }
    assert (
        labelled["active"][:8] == labelled["random"][:8]
        and labelled["active"][8:] != labelled["random"][8:]
    )
    for rows in labelled.values():
        assert len({row["prompt"] for row in rows}) == 16, "no prompt is asked twice"
        assert all(row["chosen"] != " dog" and row["rejected"] != " fox" for row in rows)
    trained = sorted(run.name for run in (folder / "rounds").iterdir())
    assert trained == [
        ".encoded",
        "active-0-0",
        "active-0-1",
        "active-1-0",
        "active-1-1",
        "random-1-0",
        "random-1-1",
    ]
    assert read_curves(tmp_path / "toy").labels == (8.0, 16.0)
