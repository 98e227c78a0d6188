"""stage=data from the command line's side: files in, files out, what it refuses, resume."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.__main__ import execute
from rlhf.cli import config
from rlhf.data.prepare.store import FOLDER
from rlhf.types import UserError

WORDS = (
    "river",
    "stone",
    "cloud",
    "light",
    "tower",
    "garden",
    "winter",
    "letter",
    "silver",
    "market",
)


def text(i: int) -> str:
    return " ".join(WORDS[(i * k + k) % 10] + str(i % 7) for k in range(1, 9))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(
            (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
            for row in rows
        ),
        encoding="utf-8",
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def data(tmp_path: Path, source: Path, *overrides: str) -> Path:
    """Run the stage in this process; its run directory."""
    arguments = [
        "stage=data",
        f"data.path={source}",
        f"run.dir={tmp_path / 'runs'}",
        "run.name=t",
        "tracking=none",
        *overrides,
    ]
    execute(config.compose(arguments), arguments)
    return tmp_path / "runs" / "t" / "data"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows: list[Any] = [
        {"prompt": f"{i} {text(i)}?", "chosen": text(i + 1), "rejected": text(i + 2), "id": i}
        for i in range(40)
    ]
    rows[5]["chosen"] = "schÃ¶n  gesagt"
    rows[6]["rejected"] = ""
    rows.append(rows[3] | {"id": 99})
    return write(tmp_path / "pairs.jsonl", rows)


def test_rows_in_rows_out_with_everything_accounted_for(
    tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = "data.pipeline=[repair,exact_duplicates,{step: split, fraction: 0.25}]"
    folder = data(tmp_path, pairs, pipeline, "data.max_bad_rows=1")
    train, held, rejected = (
        read(folder / f"{name}.jsonl") for name in ("train", "eval", "rejected")
    )
    assert len(train) + len(held) == 39 and len(held) == 10
    assert [(row["step"], row["row"]) for row in rejected] == [
        ("read", 7),
        ("exact_duplicates", 41),
    ]
    assert "key 'rejected'" in rejected[0]["reason"] and rejected[0]["content"]["id"] == 6
    assert rejected[1]["reason"] == f"the same text as {pairs}, row 4" and rejected[1][
        "file"
    ] == str(pairs)
    assert sorted(row["id"] for row in train + held) == [i for i in range(40) if i != 6]
    assert next(row for row in train + held if row["id"] == 5)["chosen"] == "schön gesagt"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["model"] is None and summary["steps"] == 3
    assert (
        summary["metrics"]["data/rows_train"] == len(train)
        and summary["metrics"]["rejected/02-exact_duplicates"] == 1
    )
    steps = read(folder / "metrics.jsonl")
    assert [(s["step"], s["data/rows_in"], s["data/rows_out"]) for s in steps] == [
        (0, 41, 40),
        (1, 40, 40),
        (2, 40, 39),
        (3, 39, 39),
    ]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["split"]["eval"] == 10 and manifest["kind"] == "preference"
    assert [entry["path"] for entry in manifest["data"]] == [str(pairs)]
    outputs = {Path(entry["path"]).name: entry for entry in manifest["outputs"]}
    assert (
        outputs["train.jsonl"]["rows"] == len(train) and len(outputs["eval.jsonl"]["sha256"]) == 64
    )
    shown = capsys.readouterr().out
    assert "exact_duplicates" in shown and "python -m rlhf stage=reward" in shown
    assert not list(folder.rglob("*.tmp"))


def test_what_is_written_is_read_by_the_next_stage(tmp_path: Path, pairs: Path) -> None:
    from rlhf.data import reading

    folder = data(tmp_path, pairs, "data.pipeline=[split]", "data.max_bad_rows=1")
    cfg = config.compose(
        [
            "stage=dpo",
            f"data.path={folder / 'train.jsonl'}",
            f"data.eval_path={folder / 'eval.jsonl'}",
        ]
    )
    train, held = reading.preference_pairs(reading.DataRequest.of(cfg))
    assert len(train) + len(held) == 40


@pytest.mark.parametrize(
    ("rows", "overrides", "columns"),
    [
        ([{"text": "one"}], [], {"text"}),
        (
            [{"instruction": "q", "input": "", "output": "a", "topic": "t"}],
            [],
            {"prompt", "completion", "topic"},
        ),
        (
            [{"prompt": "q", "completion": "a", "label": True}],
            [],
            {"prompt", "completion", "label"},
        ),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            ["data.kind=unpaired"],
            {"prompt", "completion", "label"},
        ),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], ["data.kind=prompt"], {"prompt"}),
        ([{"chosen": "a", "rejected": "b"}], [], {"prompt", "chosen", "rejected"}),
    ],
)
def test_any_format_becomes_the_columns_of_its_kind(
    tmp_path: Path, rows: list[Any], overrides: list[str], columns: set[str]
) -> None:
    folder = data(tmp_path, write(tmp_path / "rows.jsonl", rows), *overrides)
    assert all(columns <= set(row) for row in read(folder / "train.jsonl"))
    assert (
        not (folder / "eval.jsonl").exists()
        and (folder / "rejected.jsonl").read_text(encoding="utf-8") == ""
    )


def test_held_out_rows_of_their_own_pass_the_same_steps(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": text(i)} for i in range(4)])
    held = write(tmp_path / "b.jsonl", [{"text": text(1)}, {"text": text(8)}, {"text": "x"}])
    folder = data(
        tmp_path,
        train,
        f"data.eval_path={held}",
        "data.pipeline=[{step: length, low: 5},near_duplicates]",
    )
    assert [row["text"] for row in read(folder / "eval.jsonl")] == [text(1), text(8)]
    assert [row["text"] for row in read(folder / "train.jsonl")] == [text(0), text(2), text(3)], (
        "the training row that leaks goes"
    )
    with pytest.raises(UserError, match=r"data\.eval_path .*held out"):
        data(
            tmp_path, train, f"data.eval_path={held}", "data.pipeline=[split]", "run.overwrite=true"
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.pipeline=[nearduplicates]"],
            "data.pipeline[0]: no such step 'nearduplicates'. Nearest: near_duplicates.",
        ),
        (["data.pipeline=[{step: length, min: 3}]"], "no such option 'min'"),
        (["data.kind=preference"], "expected pairs of a chosen and a rejected answer"),
        (["data.path=null"], "data.path is not set: stage=data needs a file"),
    ],
)
def test_what_cannot_run_is_refused_before_the_run_directory_is_made(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "one"}])
    with pytest.raises(UserError) as error:
        data(tmp_path, source, *overrides)
    assert message in str(error.value)
    assert not (tmp_path / "runs" / "t" / "data").exists()


def test_steps_belong_to_stage_data(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    arguments = [
        "stage=sft",
        "model=tiny",
        f"data.path={source}",
        "data=clean",
        f"run.dir={tmp_path}",
        "tracking=none",
        "run.dry_run=true",
    ]
    with pytest.raises(
        UserError,
        match=r"data\.pipeline holds 7 steps, which stage=sft doesn't run: run stage=data",
    ):
        execute(config.compose(arguments), arguments)


def test_too_many_bad_rows_end_the_run_and_are_kept(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        [{"text": "one"}, {"txt": "two"}, "{broken", {"text": "four"}, {"text": 5}],
    )
    with pytest.raises(UserError) as error:
        data(tmp_path, source, "data.max_bad_rows=1", "data.pipeline=[exact_duplicates]")
    assert "3 of 5 rows don't fit" in str(error.value) and f"{source}, row 2: key 'text'" in str(
        error.value
    )
    rejected = read(tmp_path / "runs" / "t" / "data" / "rejected.jsonl")
    assert [row["row"] for row in rejected] == [2, 3, 5] and rejected[1]["content"] == {
        "unread": "{broken"
    }
    assert not (tmp_path / "runs" / "t" / "data" / "train.jsonl").exists()


def test_a_pipeline_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(UserError, match="No row is left"):
        data(tmp_path, source, "data.pipeline=[{step: length, low: 10}]")
    assert len(read(tmp_path / "runs" / "t" / "data" / "rejected.jsonl")) == 2


def test_a_resumed_run_takes_the_steps_that_still_hold(tmp_path: Path, pairs: Path) -> None:
    common = ["data.max_bad_rows=1"]
    first = ["data.pipeline=[repair,exact_duplicates,{step: split, fraction: 0.25}]", *common]
    folder = data(tmp_path, pairs, *first)
    before = {
        name: (folder / name).read_bytes()
        for name in ("train.jsonl", "eval.jsonl", "rejected.jsonl")
    }
    data(tmp_path, pairs, *first, "run.resume=true")
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert [line["data/reused"] for line in read(folder / "metrics.jsonl")] == [1, 1, 1, 1]
    data(
        tmp_path,
        pairs,
        "data.pipeline=[repair,exact_duplicates,{step: split, fraction: 0.5}]",
        *common,
        "run.resume=true",
    )
    assert [line["data/reused"] for line in read(folder / "metrics.jsonl")] == [1, 1, 1, 0]
    assert len(read(folder / "eval.jsonl")) > 15
    write(pairs, [*read(pairs), {"prompt": "new", "chosen": "a", "rejected": "b", "id": 100}])
    data(tmp_path, pairs, *first, "run.resume=true")
    assert not any(line["data/reused"] for line in read(folder / "metrics.jsonl"))
    with pytest.raises(UserError, match=r"Continue it with run\.resume=true"):
        data(tmp_path, pairs, *first)


def test_without_a_cache_no_step_keeps_its_rows(tmp_path: Path, pairs: Path) -> None:
    folder = data(
        tmp_path, pairs, "data.pipeline=[repair]", "data.max_bad_rows=1", "data.cache=false"
    )
    assert not list((folder / FOLDER).rglob("items.jsonl"))


def test_from_the_command_line_the_clean_preset_prepares_and_no_model_library_loads(
    tmp_path: Path,
) -> None:
    rows = [
        {"text": f"{text(i)} {text(i + 3)} and write to me at me{i}@mail.org, number {i * 7919}."}
        for i in range(30)
    ]
    source = write(tmp_path / "rows.jsonl", [*rows, *rows[:4]])
    command = [
        "-X",
        "importtime",
        "-m",
        "rlhf",
        "stage=data",
        "data=clean",
        f"data.path={source}",
        f"run.dir={tmp_path}",
        "run.name=t",
        "tracking=none",
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "t" / "data"
    kept = read(folder / "train.jsonl") + read(folder / "eval.jsonl")
    assert len(kept) <= 30 and all("[EMAIL]" in row["text"] for row in kept)
    assert Counter(row["step"] for row in read(folder / "rejected.jsonl"))["exact_duplicates"] == 4
    loaded = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert not loaded & {
        "torch",
        "transformers",
        "trl",
        "datasets",
        "sentence_transformers",
        "vllm",
    }


def test_rows_go_out_in_other_formats_beside_those_that_stages_read(
    tmp_path: Path, pairs: Path
) -> None:
    folder = data(
        tmp_path,
        pairs,
        "data.max_bad_rows=1",
        "data.pipeline=[split]",
        "data.to=alpaca",
        "data.file=json",
    )
    train = json.loads((folder / "train.alpaca.json").read_text(encoding="utf-8"))
    assert len(train) == len(read(folder / "train.jsonl")) and {
        "instruction",
        "chosen",
        "rejected",
    } <= set(train[0])
    assert (folder / "eval.alpaca.json").is_file()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert "train.alpaca.json" in {Path(entry["path"]).name for entry in manifest["outputs"]}
    with pytest.raises(
        UserError,
        match=r"data\.to=hh_rlhf .*preference, .*sft",
    ):
        data(
            tmp_path,
            write(tmp_path / "texts.jsonl", [{"text": "a"}]),
            "data.to=hh_rlhf",
            "run.overwrite=true",
        )


def test_a_preview_shows_tokens_and_needs_a_tokenizer(
    tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str], tiny_model: Any
) -> None:
    data(tmp_path, pairs, "data.max_bad_rows=1", "data.preview=2", f"model.path={tiny_model()}")
    shown = capsys.readouterr().out
    assert (
        "shared prefix:" in shown
        and "train.jsonl, row 2" in shown
        and "train.jsonl, row 3" not in shown
    )
    with pytest.raises(
        UserError, match=r"data\.preview=1 shows tokens, but model\.path is not set"
    ):
        data(tmp_path, pairs, "data.max_bad_rows=1", "data.preview=1", "run.overwrite=true")
