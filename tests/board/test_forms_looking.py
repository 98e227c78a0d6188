"""The dry run in a process of its own, and what comes back of it."""

import json
from pathlib import Path

import pytest

from rlhf.board.forms.looking import _error, _warnings, look
from rlhf.board.said import said

_TINY = ["stage=sft", "model=tiny", "tracking=none", "stage.max_length=64", "model.tiny.layers=1"]


def test_facts_of_a_stage_that_trains(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "What is <b>1</b>?", "completion": " It is 1."}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(64)))
    found = look([*_TINY, f"run.dir={tmp_path}", f"data.path={rows}", "stage.learning_rate=1"])
    assert found.error is None
    assert any("stage.learning_rate=1 is outside" in text for text in found.warnings)
    assert "stage.batch_size" in found.facts["figures"]["rows of a step"]
    (first, _) = found.facts["previews"]
    texts = "".join(token["text"] for token in first["sides"][0]["tokens"])
    assert texts.startswith("What is <b>1</b>?")
    assert first["sides"][0]["tokens"][-1]["part"] == "special"
    memory = found.facts["memory"]
    assert memory["fits"] and 0 < memory["peak_gib"] < memory["usable_gib"]
    assert set(memory["roles"]) == {"policy", "process"} and memory["remedies"] == []
    assert list(tmp_path.iterdir()) == [rows]  # nothing was written
    work = found.facts["work"]
    assert (work["stage"], work["rows"], work["steps"]) == ("sft", 32, 1)
    assert work["parameters"] > 10_000
    figures = found.facts["figures"]
    texts = [*found.warnings, *figures, *figures.values(), *memory["roles"], *memory["notes"]]
    assert [text for text in (*texts, memory["phase"]) if said(text, "zh").language] == []


def test_a_refusal_is_the_message(tmp_path: Path) -> None:
    found = look([*_TINY, f"run.dir={tmp_path}", f"data.path={tmp_path}/none.jsonl"])
    assert found.error is not None and "data.path" in found.error and not found.facts
    assert "Traceback" not in found.error and not found.error.startswith("error:")


def test_a_look_that_takes_too_long_is_ended() -> None:
    found = look(_TINY, limit_s=0.01)
    assert found.error is not None and "0.01 s" in found.error


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("WARNING rlhf: learning rate: high", ["learning rate: high"]),
        ("WARNING rlhf.data: x", ["x"]),
        ("WARNING transformers: x", []),
        ("INFO rlhf: x", []),
        ("x WARNING rlhf: x", []),
        ("WARNING rlhfx: x", []),
    ],
)
def test_warnings_of_our_own_log(line: str, expected: list[str]) -> None:
    assert _warnings([line, line]) == expected


def test_errors_of_several_lines_and_crashes() -> None:
    assert _error(["INFO x", "error: a.b=1: no.", "  more"], 1) == "a.b=1: no.\n  more"
    assert "exit code 9" in _error(["Traceback", "KeyError: 3"], 9)
