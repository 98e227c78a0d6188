"""What targets refuse, change and say of it, and the files that rows are written to."""

import csv
from pathlib import Path
from typing import Any

import pytest

from conf.choices import FileKind
from conf.data import DataTarget
from rlhf.data import files
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.rows import RowError
from rlhf.data.writing import Written, check_target, convert, file_kind, write_items, write_rows
from rlhf.types import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


MEANT = "is not carried: it would be read as part of the row's content"
PAIR: dict[str, Any] = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
CHATS: dict[str, Any] = {"prompt": [user("Hi")], "chosen": [bot("Hello")], "rejected": [bot("No")]}


def write(
    rows: list[dict[str, Any]],
    path: Path,
    to: DataTarget,
    file: FileKind | None = None,
    kind: Use = Use.preference,
) -> tuple[Written, list[str]]:
    rejected: list[str] = []
    items = [Item(row, "in.jsonl", number) for number, row in enumerate(rows, start=1)]
    return write_items(
        iter(items),
        kind,
        to,
        path,
        lambda item, reason: rejected.append(f"{item.number}: {reason}"),
        file,
    ), rejected


def test_a_target_that_cannot_hold_the_kind_names_those_that_can() -> None:
    with pytest.raises(UserError) as error:
        check_target(DataTarget.hh_rlhf, Use.sft)
    message = str(error.value)
    assert message.startswith("data.to=hh_rlhf ") and "preference" in message
    assert message.endswith("trl, messages, sharegpt, alpaca, alpaca_eval, csv, xlsx.")


@pytest.mark.parametrize(
    ("kind", "columns", "to", "message"),
    [
        (
            Use.sft,
            {"text": "x"},
            DataTarget.messages,
            "a whole text has no turns, so it is no conversation",
        ),
        (
            Use.preference,
            {**PAIR, "prompt": ""},
            DataTarget.alpaca,
            "begins with what is asked, but this row's texts are whole",
        ),
        (
            Use.preference,
            {**PAIR, "prompt": ""},
            DataTarget.hh_rlhf,
            "wants a transcript before the answers",
        ),
        (
            Use.preference,
            {**PAIR, "chosen": "a\n\nAssistant: b"},
            DataTarget.hh_rlhf,
            "an answer holds '\\n\\nAssistant:'",
        ),
        (
            Use.preference,
            {**CHATS, "chosen": [bot("a"), user("b"), bot("c")]},
            DataTarget.sharegpt,
            "expected one message of the assistant's, found 3",
        ),
        (
            Use.preference,
            {**CHATS, "rejected": [bot("")]},
            DataTarget.label_studio,
            "key 'rejected': expected text, found an empty one",
        ),
        (
            Use.preference,
            {**PAIR, "prompt": "", "chosen": [user("x"), bot("y")]},
            DataTarget.label_studio,
            "expected one message of the assistant's",
        ),
        (
            Use.sft,
            {"messages": [user("a"), user("b"), bot("c")]},
            DataTarget.alpaca,
            "turns of user and assistant, then an instruction; found the roles user, user",
        ),
        (
            Use.sft,
            {"messages": [user("a"), {"role": "developer", "content": "x"}, bot("c")]},
            DataTarget.sharegpt,
            "role 'developer': ShareGPT has system, human, gpt",
        ),
        (
            Use.prompt,
            {"prompt": [user("Hi")]},
            DataTarget.csv,
            "key 'prompt': expected text, found a list of 1 messages",
        ),
    ],
)
def test_a_row_that_a_target_cannot_hold(
    kind: Use, columns: dict[str, Any], to: DataTarget, message: str
) -> None:
    with pytest.raises(RowError) as error:
        convert(kind, columns, to)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "columns", "to", "notes"),
    [
        (
            Use.preference,
            {**PAIR, "margin": 2.0},
            DataTarget.kto,
            [
                "margin is not carried: each answer is judged by itself",
                "a pair becomes two judged answers",
            ],
        ),
        (
            Use.preference,
            {**CHATS, "margin": 2.0},
            DataTarget.nectar,
            ["margin is not carried: Nectar has ranks"],
        ),
        (
            Use.preference,
            PAIR,
            DataTarget.ultrafeedback,
            ["texts become messages of a conversation"],
        ),
        (
            Use.preference,
            CHATS,
            DataTarget.hh_rlhf,
            ["prompt and answers become a transcript, read again as text"],
        ),
        (
            Use.preference,
            {**CHATS, "rank_chosen": 2, "rank_rejected": 5},
            DataTarget.label_studio_ranker,
            ["ranks become 1 and 2"],
        ),
        (
            Use.sft,
            {"messages": [user("a"), bot("b")]},
            DataTarget.alpaca,
            ["of the conversation only the last answer trains"],
        ),
        (
            Use.sft,
            {"prompt": "a", "completion": "b", "label": 3},
            DataTarget.trl,
            [f"label {MEANT}"],
        ),
        (
            Use.sft,
            {"prompt": "a", "completion": "b", "kto_tag": True},
            DataTarget.trl,
            [f"kto_tag {MEANT}"],
        ),
        (
            Use.preference,
            {**PAIR, "score_chosen": 5, "score_rejected": 1},
            DataTarget.trl,
            [f"score_chosen {MEANT}", f"score_rejected {MEANT}"],
        ),
        (
            Use.prompt,
            {"prompt": "a", "data": {"answer1": "x"}, "system": "Be brief."},
            DataTarget.trl,
            ["system is not carried: with it the row would look like another format"],
        ),
        (
            Use.sft,
            {"prompt": [user("a")], "completion": [bot("b")], "input": "more"},
            DataTarget.alpaca,
            [f"input {MEANT}"],
        ),
        (Use.preference, {**PAIR, "fields": "own", "prompt_id": "7"}, DataTarget.trl, []),
        (
            Use.preference,
            {**PAIR, "answer1": "own", "annotator": "x"},
            DataTarget.label_studio,
            ["answer1 is not carried: the format has its own answer1"],
        ),
    ],
)
def test_what_is_changed_or_left_out_is_noted(
    kind: Use, columns: dict[str, Any], to: DataTarget, notes: list[str]
) -> None:
    assert convert(kind, columns, to)[1] == notes


def test_rows_as_the_tools_want_them() -> None:
    at_left = {**PAIR, "position": 1, "annotator": "7", "pair_id": "p", "margin": 0.5}
    task = convert(Use.preference, at_left, DataTarget.label_studio)[0][0]
    assert task["data"] == {
        "pair_id": "p",
        "prompt": "Hi",
        "answer1": "Hello",
        "answer2": "No",
        "swapped": False,
        "margin": 0.5,
    }
    assert (
        task["annotations"][0]["completed_by"] == 7
        and task["annotations"][0]["was_cancelled"] is False
    )
    assert task["annotations"][0]["result"][0]["to_name"] == "pw" and task["annotations"][0][
        "result"
    ][0]["value"] == {"selected": "left"}
    at_right = convert(Use.preference, {**PAIR, "position": 2}, DataTarget.label_studio)[0][0]
    assert (at_right["data"]["answer1"], at_right["data"]["swapped"]) == ("No", True)
    assert at_right["annotations"][0]["result"][0]["value"] == {"selected": "right"}
    assert convert(Use.preference, {**PAIR, "position": 2}, DataTarget.argilla)[0][0][
        "responses"
    ] == {"preference": [{"value": "response-1", "status": "submitted"}]}
    sheet = convert(Use.preference, at_left, DataTarget.csv)[0][0]
    assert sheet == {
        "pair_id": "p",
        "prompt": "Hi",
        "response_a": "Hello",
        "response_b": "No",
        "preference": "a",
        "annotator": "7",
        "comment": "",
        "margin": "0.5",
    }
    said = convert(
        Use.unpaired,
        {"prompt": [user("Hi")], "completion": [bot("No")], "label": False},
        DataTarget.sharegpt,
    )[0][0]
    assert said == {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}],
        "kto_tag": False,
    }
    turns = [{"role": "system", "content": "S"}, user("a"), bot("b"), user("c")]
    assert convert(Use.sft, {"prompt": turns, "completion": [bot("d")]}, DataTarget.alpaca)[0][
        0
    ] == {
        "instruction": "c",
        "input": "",
        "system": "S",
        "history": [["a", "b"]],
        "output": "d",
    }


def test_neither_side_is_always_first() -> None:
    sides = [
        convert(Use.preference, {**PAIR, "prompt": str(i)}, DataTarget.csv)[0][0]["preference"]
        for i in range(200)
    ]
    assert 60 < sides.count("a") < 140


# ---- files ----


def test_the_file_follows_the_target_unless_it_is_said() -> None:
    assert (
        file_kind(DataTarget.alpaca, None) is FileKind.jsonl
        and file_kind(DataTarget.csv, None) is FileKind.csv
    )
    assert (
        file_kind(DataTarget.xlsx, None) is FileKind.xlsx
        and file_kind(DataTarget.csv, FileKind.parquet) is FileKind.parquet
    )


def test_items_are_written_with_counted_notes_and_the_rest_rejected(tmp_path: Path) -> None:
    rows = [{**PAIR, "tags": ["x"], "n": 3}, {**PAIR, "prompt": "Ho", "n": 4}, CHATS]
    out, rejected = write(rows, tmp_path / "out" / "sheet.csv", DataTarget.csv)
    assert out.rows == 2 and out.notes == {
        "tags is not carried: a csv cell holds text": 1,
        "n becomes text": 2,
    }
    assert len(rejected) == 1
    for part in ("3: data.to=csv:", "'prompt'", "a list of 1"):
        assert part in rejected[0]
    assert [row["n"] for row in files.read_rows(out.path)] == ["3", "4"]
    assert [p.name for p in out.path.parent.iterdir()] == ["sheet.csv"], "nothing else is left"
    out, rejected = write([CHATS, PAIR], tmp_path / "trl.csv", DataTarget.trl, FileKind.csv)
    assert (
        out.rows == 1
        and "1: data.to=trl: key 'prompt': " in str(rejected)
        and "data.file=jsonl or parquet" in str(rejected)
    )


def test_tables_have_every_column_that_some_row_has(tmp_path: Path) -> None:
    rows = [{"a": "1"}, {"b": "2", "a": ""}]
    for kind in (FileKind.csv, FileKind.xlsx):
        write_rows(rows, tmp_path / f"t.{kind.value}", kind)
        assert files.read_rows(tmp_path / f"t.{kind.value}") == [
            {"a": "1", "b": ""},
            {"a": "", "b": "2"},
        ]
    write_rows(rows, tmp_path / "t.parquet", FileKind.parquet)
    assert files.read_rows(tmp_path / "t.parquet") == [{"a": "1", "b": None}, {"a": "", "b": "2"}]


def test_excel_cells_are_texts(tmp_path: Path) -> None:
    texts = [
        "=1+1",
        "#N/A",
        "_x000D_",
        "_x005F_x000D_",
        "a\rb",
        "\x00",
        "00123",
        "2026-01-02",
        " x ",
    ]
    write_rows([{"text": text} for text in texts], tmp_path / "t.xlsx", FileKind.xlsx)
    assert [row["text"] for row in files.read_rows(tmp_path / "t.xlsx")] == texts
    _, rejected = write([{**PAIR, "chosen": "x" * 40000}], tmp_path / "u.xlsx", DataTarget.xlsx)
    for part in ("Excel cell", "32767", "40000", "data.file=csv"):
        assert part in rejected[0]


def test_a_parquet_column_of_two_types_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"t.parquet: .*column 'n': .*data.file=jsonl",
    ):
        write_rows(
            [{"text": "a", "n": 1}, {"text": "b", "n": "one"}],
            tmp_path / "t.parquet",
            FileKind.parquet,
        )


def test_parquet_types_are_those_of_the_whole_file(tmp_path: Path) -> None:
    """A column that is empty in the first row group and a text in the next, and messages in
    each.
    """
    rows: list[dict[str, Any]] = [{"messages": [user("a")], "note": None} for _ in range(1100)] + [
        {"messages": [bot("b")], "note": "x", "more": 1}
    ]
    write_rows(rows, tmp_path / "t.parquet", FileKind.parquet)
    back = files.read_rows(tmp_path / "t.parquet")
    assert (
        len(back) == 1101
        and back[0] == {"messages": [user("a")], "note": None, "more": None}
        and back[-1] == rows[-1]
    )


def test_csv_is_plain(tmp_path: Path) -> None:
    write_rows([{"prompt": 'a "b"\n', "note": "c;d"}], tmp_path / "t.csv", FileKind.csv)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as source:
        assert list(csv.reader(source)) == [["prompt", "note"], ['a "b"\n', "c;d"]]
