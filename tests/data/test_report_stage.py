"""stage=data data.report=true: the report is about what came out of the steps, by file, row and
format.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rlhf.cli import config
from rlhf.data.formats import Use
from rlhf.data.prepare.ingest import formats_read
from rlhf.data.report.schema import SCHEMA
from rlhf.run.context import RunContext
from rlhf.stages import data as stage
from rlhf.types import UserError
from tests.toys import write_jsonl


def prepare(folder: Path, *overrides: str) -> Path:
    """Run the stage on rows.jsonl and held.jsonl in `folder`; returns its run directory."""
    files = [f"data.path={folder / 'rows.jsonl'}", f"data.eval_path={folder / 'held.jsonl'}"]
    cfg = config.compose(
        [
            "stage=data",
            "tracking=none",
            f"run.dir={folder / 'runs'}",
            "run.overwrite=true",
            *files,
            *overrides,
        ]
    )
    ctx = RunContext.open(cfg)
    stage.run(ctx)
    return ctx.dir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows: list[dict[str, object]] = [
        {"prompt": "How was it", "chosen": "Good film", "rejected": "Bad film"},
        {"prompt": "How was it", "chosen": "good  film", "rejected": "bad film"},
        {"prompt": "And the end", "chosen": "A<br>fine end to a fine film", "rejected": "No end"},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(
        tmp_path / "held.jsonl",
        [{"prompt": "How was it", "chosen": "I forget", "rejected": "Ask me later"}],
    )
    return tmp_path


def named(directory: Path) -> dict[str, list[tuple[str, int]]]:
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, SCHEMA)
    return {
        f["check"]: [(Path(r["file"]).name, r["row"]) for r in f["rows"]]
        for f in report["findings"]
    }


def test_the_report_names_files_and_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = prepare(folder, "data.report=true", "data.task=simple")
    found = named(directory)
    assert found["exact_duplicates"] == [("rows.jsonl", 2)] and found["html"] == [("rows.jsonl", 3)]
    assert found["prompt_leakage_exact"] == [("held.jsonl", 1)]
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    assert report["kind"] == "preference" and report["rows"] == {"train": 3, "eval": 1}
    assert report["sections"]["rows"]["figures"]["by_format"] == {"preference": 4}
    assert report["standards"][2]["verdict"] == "fail" and "3" in report["standards"][2]["found"]
    assert "<script" not in (directory / "report.html").read_text(encoding="utf-8")
    assert "exact_duplicates" in capsys.readouterr().out
    outputs = json.loads((directory / "manifest.json").read_text())["outputs"]
    assert {Path(o["path"]).name for o in outputs} >= {"train.jsonl", "report.json", "report.html"}


def test_the_report_is_about_the_rows_after_the_steps(folder: Path) -> None:
    directory = prepare(
        folder, "data.report=true", "data.pipeline=[{step: repair, html: true},exact_duplicates]"
    )
    found = named(directory)
    assert "exact_duplicates" not in found and "html" not in found
    figures = json.loads((directory / "report.json").read_text(encoding="utf-8"))["sections"][
        "preparation"
    ]["figures"]["steps"]
    assert [(s["step"], s["rows_in"], s["rows_out"], s["rejected"]) for s in figures] == [
        ("read", 4, 4, 0),
        ("repair", 4, 4, 0),
        ("exact_duplicates", 4, 3, 1),
    ]


def test_no_report_unless_asked_for(folder: Path) -> None:
    assert not list(prepare(folder).glob("report.*"))


def test_options_of_the_report_reach_it(folder: Path, tiny_model: Any) -> None:
    model = tiny_model()
    directory = prepare(
        folder,
        "data.report=true",
        "data.report_rows=1",
        "data.report_limit=3",
        f"model.path={model}",
    )
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    truncated = next(f for f in report["findings"] if f["check"] == "truncated")
    assert truncated["total"] == 4 and len(truncated["rows"]) == 1
    assert (
        report["sections"]["lengths"]["figures"]["unit"] == "tokens"
        and report["sections"]["lengths"]["figures"]["limit"] == 3
    )


def test_formats_by_file(folder: Path) -> None:
    write_jsonl(
        folder / "held.jsonl",
        [
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes",
                "rejected": "\n\nHuman: Hi\n\nAssistant: No",
            }
        ],
    )
    cfg = config.compose(
        [
            "stage=data",
            f"data.path={folder / 'rows.jsonl'}",
            f"data.eval_path={folder / 'held.jsonl'}",
        ]
    )
    assert {Path(k).name: v for k, v in formats_read(cfg.data, Use.preference).items()} == {
        "rows.jsonl": "preference",
        "held.jsonl": "hh_rlhf",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.report_limit=1", "at least 2 tokens"),
        ("data.report_rows=0", "at least 1"),
        ("data.task=hard", "task"),
    ],
)
def test_bad_options_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.compose(["stage=data", override])
