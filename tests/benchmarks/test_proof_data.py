"""The proof of the data report: its defects are what they are said to be, and one figure below its
bound fails it.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.proofs import data as proof_data
from benchmarks.proofs import defects
from benchmarks.proofs.data import (
    EXACT,
    MENDED,
    detectors,
    imbalance,
    left,
    measure,
    named_rows,
    rejected_rows,
    steps,
)
from benchmarks.proofs.defects import (
    HELD,
    TRAIN,
    Planted,
    Sizes,
    apart,
    edit,
    exchanged,
    garble,
    grams,
    likeness,
    mojibake,
    near_copy,
    plant,
    with_html,
)
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.recipes.reviews import Review
from rlhf.data.report.making import make
from rlhf.data.report.writing import as_json

SMALL = Sizes(
    train=150,
    held=30,
    exact=20,
    near=20,
    contradictions=10,
    equal=8,
    html=8,
    encoding=8,
    garbled=8,
    long=4,
    swapped=10,
    leaked=8,
    leaked_near=8,
)
_FIRST = (
    "film plot actor scene story end music light camera voice joke song fight dance love "
    "war river house dog child mother street winter"
)
_MORE = (
    "summer night morning letter secret money crime doctor teacher train island dream memory "
    "laughter silence hero villain"
)
WORDS = f"{_FIRST} {_MORE}".split()


def reviews(count: int = 900) -> list[Review]:
    """Sentences of 14 words, no two alike."""
    rng = random.Random(2)
    return [Review(" ".join(rng.sample(WORDS, 14)), i % 2, "rotten_tomatoes") for i in range(count)]


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(reviews(), 0, SMALL)


def items_of(planted: Planted) -> tuple[list[Item], list[Item]]:
    train = [Item({"prompt": "", **row}, TRAIN, n) for n, row in enumerate(planted.train, start=1)]
    return train, [
        Item({"prompt": "", **row}, HELD, n, "eval") for n, row in enumerate(planted.held, start=1)
    ]


def row_at(planted: Planted, place: tuple[str, int]) -> dict[str, Any]:
    return (planted.train if place[0] == TRAIN else planted.held)[place[1] - 1]


def test_as_many_rows_are_planted_as_were_asked_for(planted: Planted) -> None:
    assert {check: len(places) for check, places in planted.truth.items()} == {
        "equal_sides": 8,
        "html": 8,
        "encoding": 8,
        "garbled": 8,
        "suspect_labels": 10,
        "truncated": 4,
        "near_duplicates": 20,
        "exact_duplicates": 20,
        "contradictions": 20,
        "row_leakage_exact": 8,
        "row_leakage_near": 8,
        "leaked_near_originals": 8,
    }
    assert (
        len(planted.train) == 150 + 20 + 20 + 10 + 8 + 8 + 8 + 8 + 4 + 10
        and len(planted.held) == 30 + 16
    )
    assert (
        plant(reviews(), 0, SMALL) == planted and plant(reviews(), 1, SMALL).train != planted.train
    )


def test_copies_stand_behind_one_row_that_they_copy(planted: Planted) -> None:
    for check, least, most in (
        ("exact_duplicates", 1.0, 1.0),
        ("near_duplicates", defects.THRESHOLD, 0.9999),
    ):
        for name, number in planted.truth[check]:
            alike = [
                n
                for n, row in enumerate(planted.train, start=1)
                if n != number
                and likeness(row, row_at(planted, (name, number))) >= defects.THRESHOLD
            ]
            assert len(alike) == 1 and alike[0] < number
            assert (
                least
                <= likeness(planted.train[alike[0] - 1], row_at(planted, (name, number)))
                <= most
            )


def test_leaked_rows_have_one_original_that_trains(planted: Planted) -> None:
    for check in ("row_leakage_exact", "row_leakage_near"):
        for place in planted.truth[check]:
            assert place[0] == HELD
            best = max(likeness(row, row_at(planted, place)) for row in planted.train)
            assert best == 1.0 if check == "row_leakage_exact" else defects.THRESHOLD <= best < 1.0


def test_rows_without_a_defect_repeat_nothing(planted: Planted) -> None:
    touched = set().union(*planted.truth.values())
    clean = [row for n, row in enumerate(planted.train, start=1) if (TRAIN, n) not in touched]
    assert apart(clean, defects.APART) == list(range(len(clean)))
    assert all(max(len(row["chosen"].split()), len(row["rejected"].split())) <= 22 for row in clean)


def test_contradicting_rows_come_in_twos(planted: Planted) -> None:
    rows = [row_at(planted, place) for place in planted.truth["contradictions"]]
    assert (
        all(exchanged(row) in rows for row in rows)
        and len({tuple(row.values()) for row in rows}) == 20
    )


def test_the_report_finds_what_was_planted_and_the_measure_agrees(planted: Planted) -> None:
    train, held = items_of(planted)
    found = as_json(make(train, held, Use.preference, None, limit=defects.LIMIT, named=10_000))
    by_name = {m.name.removeprefix("report: "): m for m in detectors(found, planted.truth)}
    for check in EXACT:
        assert by_name[check].recall >= 0.95 and by_name[check].precision >= 0.95, by_name[check]


# ---- each defect ----


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_edits_change_one_word(seed: int) -> None:
    rng = random.Random(seed)
    text = " ".join(rng.sample(WORDS, 13))
    before, after = text.split(), edit(text, WORDS, rng).split()
    assert len(after) in (12, 13) and before != after
    if len(after) == 13:
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    else:
        assert any(before[:i] + before[i + 1 :] == after for i in range(13))


def test_short_texts_are_not_edited() -> None:
    with pytest.raises(ValueError, match="at least 12 words, found 11"):
        edit("w " * 11, WORDS, random.Random(0))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_noise_is_noise_by_its_definition(seed: int) -> None:
    rng = random.Random(seed)
    text = " ".join(rng.sample(WORDS, 14))
    html, wrong, noise = with_html(text, rng), mojibake(text, rng), garble(text, rng)
    assert any(mark in html for mark in ("<i>", "<br />", "&quot;"))
    original = wrong.encode(
        "latin-1" if all(ord(c) < 256 for c in wrong) else "windows-1252"
    ).decode("utf-8")
    assert "\u2018" in original and wrong != original
    letters = sum(c.isalpha() for c in noise)
    assert letters < 0.5 * sum(not c.isspace() for c in noise) and not set(noise) & set("<>&")
    row = {"chosen": text, "rejected": " ".join(rng.sample(WORDS, 14))}
    assert defects.THRESHOLD <= likeness(row, near_copy(row, WORDS, rng)) < 1.0


def test_likeness_by_hand() -> None:
    # one letter more: the n-grams abcde of the chosen side, and the two that it makes with x
    assert grams({"chosen": "ABCDE", "rejected": ""}) == {"abcde"}
    a, b = {"chosen": "abcdef", "rejected": ""}, {"chosen": "abcde ", "rejected": ""}
    assert likeness(a, b) == 0.5 and likeness(a, {"chosen": "", "rejected": "abcdef"}) == 0.0


def test_apart_keeps_the_first_of_rows_that_are_alike() -> None:
    rows = [
        {"chosen": "one text of words", "rejected": "x"},
        {"chosen": "one text of words", "rejected": "y"},
        {"chosen": "quite different here", "rejected": "z"},
    ]
    assert apart(rows, 0.5) == [0, 2]


# ---- the measure ----


def test_recall_and_precision_by_hand() -> None:
    measured = measure(
        "m",
        {("a", 1), ("a", 2), ("a", 3), ("a", 4)},
        {("a", 1), ("a", 2), ("a", 3), ("a", 9), ("b", 4)},
    )
    assert (measured.recall, measured.precision) == (0.75, 0.6)
    assert [c.passed for c in measured.checks()] == [False, False]
    nothing = measure("m", {("a", 1)}, set())
    assert (nothing.recall, nothing.precision) == (0.0, 0.0), (
        "a detector that is silent has no precision to be proud of"
    )


def finding(check: str, *rows: tuple[str, int], total: int | None = None) -> dict[str, Any]:
    named = [
        {"file": f"somewhere/{name}", "row": row, "split": "train", "note": "", "excerpt": ""}
        for name, row in rows
    ]
    return {
        "check": check,
        "severity": "warn",
        "message": "",
        "remedy": "",
        "total": len(rows) if total is None else total,
        "rows": named,
    }


def test_named_rows_are_read_by_file_name_and_must_be_all() -> None:
    found = {
        "findings": [
            finding("html", ("train.jsonl", 3)),
            finding("html", ("held.jsonl", 1)),
            finding("garbled", ("train.jsonl", 4)),
        ]
    }
    assert (
        named_rows(found, "html") == {(TRAIN, 3), (HELD, 1)} and named_rows(found, "none") == set()
    )
    with pytest.raises(ValueError, match=r"1 of 2 rows are named; raise data\.report_rows"):
        named_rows({"findings": [finding("html", ("train.jsonl", 3), total=2)]}, "html")


def test_what_is_left_after_mending_fails() -> None:
    assert all(
        c.passed for c in left({"findings": [finding("suspect_labels", ("train.jsonl", 1))]})
    )
    assert [
        c.name for c in left({"findings": [finding("html", ("train.jsonl", 1))]}) if not c.passed
    ] == ["rows left with html"]


def test_imbalance_is_measured_over_data_sets() -> None:
    measured = imbalance(reviews(2000), 0)
    assert (measured.planted, measured.named, measured.right) == (5, 5, 5)


# ---- the command ----


def write_runs(
    runs: Path, planted: Planted, without: str = "", extra: str = "", remains: str = ""
) -> None:
    """Runs as stage=data leaves them, by detectors that are right but for `without` (finds
    nothing), `extra` (names a row too many for 20).
    """

    def named(check: str) -> list[tuple[str, int]]:
        places = sorted(planted.truth[check])
        return (
            []
            if check == without
            else places + [(TRAIN, 100_000 + i) for i in range(1 + len(places) // 10)]
            if check == extra
            else places
        )

    found = {"findings": [finding(check, *named(check)) for check in planted.truth]}
    mended = {"findings": [finding(remains, (TRAIN, 1))] if remains else []}
    truth = planted.truth
    left_out = {
        "length": truth["truncated"],
        "exact_duplicates": truth["exact_duplicates"] | truth["row_leakage_exact"],
        "near_duplicates": truth["near_duplicates"] | truth["leaked_near_originals"],
    }
    for name, content in ((proof_data.RAW, found), (proof_data.REPAIRED, mended)):
        folder = runs / name / "data"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(content))
        lines = [
            {"step": step, "reason": "", "file": f"x/{file}", "row": row}
            for step, places in left_out.items()
            for file, row in sorted(places)
        ]
        (folder / "rejected.jsonl").write_text(
            "".join(
                json.dumps(line) + "\n"
                for line in lines
                if line["step"] != without.removeprefix("step: ")
            )
        )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """proof_data.main on small data, its runs made by hand."""
    monkeypatch.setattr(proof_data, "read_reviews", lambda path: reviews(2000))
    monkeypatch.setattr(proof_data, "package_file", lambda *names: Path())
    # measured above
    monkeypatch.setattr(
        proof_data,
        "imbalance",
        lambda reviews, seed: measure("report: imbalance", {("a", 0)}, {("a", 0)}),
    )
    planted = plant(reviews(2000), 0, SMALL)

    def run(**changes: str) -> int:
        write_runs(tmp_path, planted, **changes)
        return proof_data.main(["--check-only", "--runs", str(tmp_path)], SMALL)

    return run


def test_detectors_that_are_right_pass(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == 0
    out = capsys.readouterr().out
    assert (
        all(check in out for check in EXACT)
        and "suspect_labels is no exact detector" in out
        and "FAIL" not in out
    )


@pytest.mark.parametrize("check", EXACT)
def test_a_detector_that_finds_nothing_fails(command: Any, check: str) -> None:
    assert command(without=check) == 1


@pytest.mark.parametrize("check", EXACT)
def test_a_detector_that_names_too_much_fails(command: Any, check: str) -> None:
    assert command(extra=check) == 1


@pytest.mark.parametrize(
    "step", ["step: length", "step: exact_duplicates", "step: near_duplicates"]
)
def test_a_step_that_leaves_nothing_out_fails(command: Any, step: str) -> None:
    assert command(without=step) == 1


@pytest.mark.parametrize("check", MENDED)
def test_a_defect_that_outlives_its_step_fails(command: Any, check: str) -> None:
    assert command(remains=check) == 1


def test_label_noise_may_be_found_badly(command: Any) -> None:
    assert command(extra="suspect_labels") == 0


def test_a_stage_that_fails_fails_the_proof(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proof_data, "read_reviews", lambda path: reviews())
    monkeypatch.setattr(proof_data, "package_file", lambda *names: Path())
    monkeypatch.setattr(proof_data, "prepare", lambda *arguments: 3)
    assert proof_data.main(["--runs", str(tmp_path)], SMALL) == 1
    assert "ended with exit code 3" in capsys.readouterr().err
    assert len((tmp_path / "proof-data" / TRAIN).read_text().splitlines()) == len(
        plant(reviews(), 0, SMALL).train
    )


def test_rejected_rows_are_those_of_the_step(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    path.write_text(
        '{"step": "length", "file": "a/train.jsonl", "row": 4}\n{"step": "repair", "file": '
        '"a/train.jsonl", "row": 5}\n'
    )
    assert rejected_rows(path, "length") == {(TRAIN, 4)}
    truth = {
        "truncated": {(TRAIN, 4)},
        "exact_duplicates": set(),
        "row_leakage_exact": set(),
        "near_duplicates": set(),
        "leaked_near_originals": set(),
    }
    assert steps(path, truth)[0].recall == 1.0
