"""The benchmark of preparation finds what it planted, at a size that takes seconds."""

import random
from pathlib import Path

import pytest

from benchmarks import answers, shared
from benchmarks import data as bench

POOL = [
    f"Sentence number {i} of the pool, with {i * 7919 % 1000} more words behind it {i * 104729}."
    for i in range(800)
]


def test_planted_copies_are_near_duplicates_and_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "sentences", lambda: POOL)
    data = bench.corpus(POOL, 500)
    assert len(data.texts) == 500 and len(data.planted) == 50
    assert all(data.texts[copy] != data.texts[original] for copy, original in data.planted)
    near = bench.measure_near(500, tmp_path)
    assert near.due > 40 and near.found == near.due
    assert bench.similar(bench.grams("abcdef"), bench.grams("abcdeg")) == 1 / 3
    with pytest.raises(ValueError, match="800 sentences, expected at least 900"):
        bench.corpus(POOL, 1000)


def test_the_stream_finds_exactly_what_was_written(tmp_path: Path) -> None:
    written = bench.write_file(tmp_path / "rows.jsonl", 0.0004, POOL)
    assert written.short > 20 and written.repeated > 40 and written.rows > 800
    streamed = bench.measure_stream(tmp_path / "rows.jsonl", tmp_path / "runs")
    checks = bench.stream_checks(written, streamed)
    assert [check.name for check in checks if not check.passed] == []
    worse = bench.Streamed(1.0, 1.5, streamed.train - 1, streamed.rejected | {"length": 0})
    assert [check.passed for check in bench.stream_checks(written, worse)] == [
        False,
        False,
        True,
        False,
    ]


def test_answers_go_through_the_preset_and_the_report(tmp_path: Path) -> None:
    answers.write(tmp_path / "rows.jsonl", 60, POOL)
    command = shared.module(
        "rlhf",
        "stage=data",
        f"data.path={tmp_path / 'rows.jsonl'}",
        *(option for options in answers.MEASURED.values() for option in options),
        "tracking=none",
    )
    run = shared.run_stage(command, tmp_path / "runs")
    assert run.summary["data/rows_read"] == 60 and run.summary["rejected/03-quality"] == 0
    results = {"data=clean": [shared.StageRun(2.0, 0.5, {}), shared.StageRun(5.0, 0.9, {})]}
    assert "(1000 rows/s after the start)" in next(answers.lines(4000, results))
    assert not answers.checks(results)[0].passed


def test_edits_change_a_text_a_little() -> None:
    rng = random.Random(0)
    text = "one two three four five six seven eight."
    assert {len(bench.edited(text, rng).split()) for _ in range(50)} == {7, 9}
