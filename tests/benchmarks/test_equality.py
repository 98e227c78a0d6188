"""benchmarks.equality sees every value that differs, passes over times, and pins every option."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.equality import __main__ as equality
from benchmarks.equality.cases import CASES, Run, write_data
from benchmarks.equality.compare import compare_rows, compare_run, print_table
from rlhf.cli import config

RUN = Run("sft", (), files=("metrics.jsonl",))
METRICS = [{"step": 1, "loss": 0.5, "time/step_s": 1.0}, {"step": 2, "loss": float("nan")}]


@pytest.mark.parametrize(
    ("after", "difference"),
    [
        ([METRICS[0] | {"loss": 0.5000001}, METRICS[1]], "row 1, loss: 0.5 before"),
        ([METRICS[0], METRICS[1] | {"loss": 1.0}], "row 2, loss: nan before"),
        ([METRICS[0], {"step": 2}], "row 2, loss: only before"),
        ([METRICS[0] | {"new": 1}, METRICS[1]], "row 1, new: only after"),
        ([METRICS[0] | {"step": 1.0}, METRICS[1]], "row 1, step: 1 before, 1.0 after"),
        (METRICS[:1], "2 rows before, 1 after"),
        ([METRICS[0] | {"loss": {"a": 0.5}}, METRICS[1]], "row 1, loss.a: only after"),
    ],
)
def test_a_difference_is_seen(after: list[dict[str, Any]], difference: str) -> None:
    assert any(difference in found for found in compare_rows("x", "y", METRICS, after).differences)


@pytest.mark.parametrize(
    "key",
    [
        "time/step_s",
        "memory/rss_mb",
        "train/tokens_per_s",
        "eval_runtime",
        "train_steps_per_second",
        "nested.peak_rss_mb",
    ],
)
def test_times_and_memory_are_not_compared(key: str) -> None:
    row = {"loss": 0.5, key: 1.0}
    found = compare_rows("x", "y", [row], [row | {key: 2.0}])
    assert (found.differences, found.rows, found.keys) == ([], 1, 1)


def write_run(folder: Path, metrics: list[dict[str, Any]], weights: bytes) -> Path:
    directory = folder / "runs" / "equality" / "sft"
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "model.safetensors").write_bytes(weights)
    text = "".join(json.dumps(row) + "\n" for row in metrics)
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_runs_are_compared_to_the_bytes_of_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_run(tmp_path / "before", METRICS, b"weights")
    same = write_run(tmp_path / "same", METRICS, b"weights")
    other = write_run(tmp_path / "other", METRICS, b"Weights")
    empty = write_run(tmp_path / "empty", [], b"weights")
    assert not any(found.differences for found in compare_run("x", RUN, before, same))
    found = compare_run("x", RUN, before, other)
    assert [len(item.differences) for item in found] == [0, 1]
    print_table(found)
    assert "x sft/model: row 1, model.safetensors" in capsys.readouterr().out
    assert compare_run("x", RUN, empty, empty)[0].differences == ["nothing to compare"]


def test_every_option_is_given_explicitly(tmp_path: Path) -> None:
    """What is pinned composes to the configuration that it was taken from."""
    root = Path(equality.__file__).resolve().parents[2]
    write_data(tmp_path)
    side = equality.prepare(root, tmp_path)
    for run in (CASES["zero2"][0], CASES["data"][0]):
        options = equality.options_of(run, side.checkout, side.folder, ["stage.steps"])
        own = [f"stage={run.stage}", *run.overrides, "run.name=equality", "run.dir=runs"]
        own += ["run.overwrite=true", "tracking=none"]
        assert config.compose(options) == config.compose(own)
        keys = [option.split("=")[0] for option in options]
        assert len(set(keys)) == len(keys)
        assert "data.seed" in keys or "engine.micro_tokens" in keys


def test_another_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"was imported, expected a file of"):
        equality.prepare(tmp_path, tmp_path / "work")
