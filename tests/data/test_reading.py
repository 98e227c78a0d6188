"""Data files: every format, every message, splits and tokenised prompts."""

import bz2
import csv
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from conf.data import DataFormat
from conf.schema import Config, DataConfig, RunConfig
from conf.stages import OnlineStage, RewardStage, SFTStage
from rlhf.data import files, formats, reading
from rlhf.data.formats import Use
from rlhf.models.loading import train_tokenizer
from rlhf.types import PreferencePair, UserError

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(tmp_path: Path, stage: Any, **data: Any) -> Config:
    return Config(
        stage=stage, run=RunConfig(dir=str(tmp_path / "runs"), name="r"), data=DataConfig(**data)
    )


def tokenizer(texts: list[str] | None = None) -> Any:
    return train_tokenizer(texts or ["the film is good", "a bad film"], 300, 64)


# ---- files ----


def test_the_five_kinds_of_files_hold_the_same_rows(tmp_path: Path) -> None:
    import openpyxl
    import pyarrow.parquet

    rows = [{"prompt": "Hi", "completion": 'a, "b"\nc'}, {"prompt": "Grüße", "completion": "d"}]
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    book = openpyxl.Workbook()
    for cells in (list(rows[0]), *(list(row.values()) for row in rows)):
        book.active.append(cells)
    book.save(tmp_path / "a.xlsx")
    for suffix in ("jsonl", "json", "csv", "parquet", "xlsx"):
        assert files.read_rows(tmp_path / f"a.{suffix}") == rows, suffix
        assert files.read_rows(tmp_path / f"a.{suffix}", max_rows=1) == rows[:1], suffix


def test_objects_per_line_in_a_json_file_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "x"}\n\n{"text": "y"}\n', encoding="utf-8")
    assert files.read_rows(tmp_path / "a.json") == [{"text": "x"}, {"text": "y"}]


PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (".jsonl", b'{"text": "x"}\n\n{"text": "y"}\n'),
        (".json", b'[{"text": "x"}, {"text": "y"}]'),
        (".csv", b"text\nx\ny\n"),
        (".txt", b"x\n\ny"),
    ],
)
def test_compressed_files(tmp_path: Path, suffix: str, kind: str, content: bytes) -> None:
    file = tmp_path / f"v1.2{kind}{suffix}"
    middle = content.index(b"\n") + 1 if b"\n" in content else len(content)
    # two streams, one after another, are one file
    file.write_bytes(PACKED[suffix](content[:middle]) + PACKED[suffix](content[middle:]))
    assert files.read_rows(file) == [{"text": "x"}, {"text": "y"}]
    assert files.count_rows(file) == 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_unpacks_to_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("rlhf.data.opening._MOST_UNPACKED", 2**20)
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(PACKED[suffix](b'{"text": "' + bytes(2**22)))
    with pytest.raises(UserError, match=r"a.jsonl.* unpack to .*bomb"):
        files.read_rows(file)
    with pytest.raises(UserError, match=r"a.jsonl.* unpack to .*bomb"):
        files.count_rows(file)


ROW = {"text": 'x } "{', "more": [1, {"a": []}]}
LAID_OUT = json.dumps(ROW, indent=2)
BROKEN = LAID_OUT.replace("1,", "1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LAID_OUT, [ROW]),
        (f"  {LAID_OUT}\n\n{LAID_OUT}{LAID_OUT}\n", [ROW, ROW, ROW]),
        ('{\n"a":\n{\n"b": 1}\n}\n{"c"\n:1}', [{"a": {"b": 1}}, {"c": 1}]),
        (f"{LAID_OUT}\n{BROKEN}\n{LAID_OUT}", [ROW, "line 14, .* begins at line 10 ", ROW]),
        (BROKEN, ["line 5, .* begins at line 1 "]),
        (LAID_OUT[:-2], ["begins at line 1 "]),
        # lines of which the first is cut off are lines still
        ('{"a": 1,\n{"a": 2}\n{"a": 3}\n', ["at line 1, ", {"a": 2}, {"a": 3}]),
        ('{"a": "x\n{"a": 2}\n', ["at line 1, ", {"a": 2}]),
        ('{"a": [\n', ["at line 1, column 8 "]),
    ],
)
def test_json_objects_over_several_lines(tmp_path: Path, content: str, expected: list[Any]) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        rows = list(files.scan(tmp_path / name))
        assert [row.number for row in rows] == list(range(1, len(expected) + 1))
        for row, wanted in zip(rows, expected, strict=True):
            if isinstance(wanted, str):
                assert re.search(wanted, row.problem or "") and row.raw
            else:
                assert row.columns == wanted and row.problem is None
        assert files.count_rows(tmp_path / name) == len(expected)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\nhello\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"text": "hello"}]')
    for suffix in ("csv", "jsonl", "json"):
        assert files.read_rows(tmp_path / f"a.{suffix}") == [{"text": "hello"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a.jsonl is empty \(0 bytes\): expected at least one row"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.doc", b"x", r"ends with .json, .*; found '?.doc"),
        ("a.parquet.gz", b"x", r"found '?.parquet.gz"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull"),
        ("a.jsonl", b"/annex/objects/MD5-s1--0", "git annex get"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"holds gzip .*\.gz"),
        ("a.csv", b"PK\x03\x04", r"holds a zip .*\.xlsx"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}', mtime=0)[:-9],
            r"a.jsonl.gz, .*readable as .gz",
        ),
        ("a.jsonl.zst", b"no such data", r"a.jsonl.zst, .*readable as .zst"),
        ("a.csv.gz", gzip.compress(b"text\n\xe9", mtime=0), "line 2, byte 1: .*found 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "row 2: not valid JSON at line 2, column"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n[1]\n',
            "row 2: expected an object of columns, found an array",
        ),
        ("a.json", b'[{"text": "x"},\n {"text" 1}]', "line 2, column 10: not valid JSON"),
        ("a.json", b'["x"]', r"row 1: expected an object of columns, found text \(.*\.txt"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "caf\xe9"}\n',
            "line 2, byte 14: expected UTF-8 text, found 0xe9. Save it as UTF-8",
        ),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "is UTF-16"),
        ("a.csv", b"text,label\nx,1\ny\n", "row 2: expected 2 cells as in the header, found 1"),
        ("a.csv", b"text,text\nx,1\n", "the header names 'text' more than once"),
        ("a.parquet", b"not parquet at all", "not a readable Parquet file"),
        ("a.parquet", b"PAR1" + bytes(64) + b"PAR1", "not a readable Parquet file"),
        ("a.xlsx", b"not a workbook", r"not a readable Excel file \(BadZipFile"),
        ("a.xlsx", b"PK\x05\x06" + bytes(18), "not a readable Excel file"),
        ("a.csv", b'text,label\nx,"1\ny,2\n', "row 1, line 3: not valid CSV"),
        ("a.csv", b'text,label\nx,"1"z\n', "row 1, line 2: not valid CSV"),
        ("a.csv", b"text\nx\n\xe9\n", "line 3, byte 1: expected UTF-8 text, found 0xe9"),
        ("a.jsonl", b"[" * 100000 + b"\n", "nested too deeply"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"n": ' + b"1" * 5000 + b"}\n",
            "row 2: not valid JSON at line 2",
        ),
        ("a.jsonl", b"[1]\n[2]\n", r"expected an array of rows \(a row a line wants objects"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        files.read_rows(tmp_path / name)


def test_cells_of_a_workbook_are_the_texts_that_csv_would_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import datetime

    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    for cells in (
        ["text", "n", "note", None],
        [42, 1.5, None, None],
        [None, None, None],
        ["=1+1", True, datetime.date(2026, 1, 2)],
        ["x"],
        ["y", 1, "", "beyond"],
    ):
        sheet.append(cells)
    book.create_sheet("more")
    book.save(tmp_path / "a.xlsx")
    rows = list(files.scan(tmp_path / "a.xlsx"))
    assert [row.columns for row in rows[:3:2]] == [
        {"text": "42", "n": "1.5", "note": ""},
        {"text": "x", "n": "", "note": ""},
    ]
    assert rows[1].columns["n"] == "true" and rows[1].columns["note"].startswith("2026-01-02")
    assert (
        rows[3].problem == "expected 3 cells as in the header, found 'beyond' beyond them"
        and rows[3].number == 4
    )
    assert "has the sheets Sheet, more: only the first is read" in caplog.text


def test_semicolons_and_tabs_separate_cells_where_the_header_has_no_comma(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "a.csv").write_text("prompt;note\na, b;c\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("prompt\tnote\na;b\tc\n", encoding="utf-8")
    (tmp_path / "c.csv").write_text("prompt,no;te\na,c\n", encoding="utf-8")
    assert files.read_rows(tmp_path / "a.csv") == [{"prompt": "a, b", "note": "c"}]
    assert files.read_rows(tmp_path / "b.csv") == [{"prompt": "a;b", "note": "c"}]
    assert files.read_rows(tmp_path / "c.csv") == [{"prompt": "a", "no;te": "c"}]
    assert "a.csv: " in caplog.text and "';'" in caplog.text


def test_a_byte_order_mark_inside_a_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftext\nx\n\ufeffy\n".encode())
    assert [row["text"] for row in files.read_rows(tmp_path / "a.csv")] == ["x", "\ufeffy"]


def test_a_directory_names_the_glob_that_reads_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"data.path='.*/\*' reads its files: a.jsonl\."):
        files.check_file(tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    with pytest.raises(UserError, match=r"data.path=.*prompt.jsonl: no such file.*prompts.jsonl"):
        files.check_file(tmp_path / "prompt.jsonl")
    with pytest.raises(UserError, match=r"There is no directory .*nowhere either"):
        files.check_file(tmp_path / "nowhere" / "prompt.jsonl")
    with pytest.raises(UserError, match=r"is a directory.*prompts.jsonl"):
        files.check_file(tmp_path)


# ---- formats ----

SFT = {
    "text": ({"text": "x"}, {"text": "x"}),
    "prompt_completion": ({"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " b"}),
    "messages": (
        {"messages": [user("Hi"), bot("Hello")]},
        {"messages": [user("Hi"), bot("Hello")]},
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "system": "S",
        },
        {"messages": [{"role": "system", "content": "S"}, user("Hi"), bot("Hello")]},
    ),
    "alpaca": (
        {
            "instruction": "Add",
            "input": "1 2",
            "output": "3",
            "system": "S",
            "history": [["q", "a"]],
        },
        {
            "prompt": [{"role": "system", "content": "S"}, user("q"), bot("a"), user("Add\n\n1 2")],
            "completion": [bot("3")],
        },
    ),
}


@pytest.mark.parametrize("name", SFT)
def test_sft_formats(name: str) -> None:
    row, expected = SFT[name]
    found = formats.detect(row, Use.sft)
    assert found is not None and found.name == name
    assert found.sft is not None and found.sft(row) == expected


HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
PAIRS = {
    "preference": (
        {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 0.5},
        PreferencePair("a", " b", " c", 0.5),
    ),
    "implicit_preference": ({"chosen": "a b", "rejected": "a c"}, PreferencePair("", "a b", "a c")),
    "ultrafeedback": (
        {
            "prompt": "Hi",
            "chosen": [user("Hi"), bot("Hello")],
            "rejected": [user("Hi"), bot("No")],
            "score_chosen": 8.5,
            "score_rejected": 6,
        },
        PreferencePair([user("Hi")], [bot("Hello")], [bot("No")], 2.5),
    ),
    "hh_rlhf": (
        {"chosen": HH + " Ciao", "rejected": HH + " No"},
        PreferencePair(HH, " Ciao", " No"),
    ),
    "alpaca_preference": (
        {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No"},
        PreferencePair([user("Hi")], [bot("Hello")], [bot("No")]),
    ),
    "sharegpt_preference": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        PreferencePair([user("Hi")], [bot("Hello")], [bot("No")]),
    ),
    "swift_preference": (
        {"messages": [user("Hi"), bot("Hello")], "rejected_response": "No", "margin": 0.5},
        PreferencePair([user("Hi")], [bot("Hello")], [bot("No")], 0.5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_formats(name: str) -> None:
    row, expected = PAIRS[name]
    found = formats.detect(row, Use.preference)
    assert found is not None and found.name == name
    assert found.pair is not None and found.pair(row) == expected


def test_trl_conversations_with_explicit_and_implicit_prompts() -> None:
    explicit = {"prompt": [user("Hi")], "chosen": [bot("Hello")], "rejected": [bot("No")]}
    implicit = {"chosen": [user("Hi"), bot("Hello")], "rejected": [user("Hi"), bot("No")]}
    for row, name in ((explicit, "preference"), (implicit, "implicit_preference")):
        found = formats.detect(row, Use.preference)
        assert found is not None and found.name == name
        assert found.pair is not None and found.pair(row) == PreferencePair(
            [user("Hi")], [bot("Hello")], [bot("No")]
        )


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": [user("Hi")]}, [user("Hi")]),
        (SFT["prompt_completion"][0], "a"),
        (SFT["messages"][0], [user("Hi")]),
        ({"messages": [user("Hi")]}, [user("Hi")]),
        (SFT["alpaca"][0], SFT["alpaca"][1]["prompt"]),
        (SFT["sharegpt"][0], [{"role": "system", "content": "S"}, user("Hi")]),
        *(
            (row, pair.prompt)
            for name, (row, pair) in PAIRS.items()
            if name != "implicit_preference"
        ),
    ],
)
def test_prompts_come_out_of_every_format_that_has_them(
    row: dict[str, Any], prompt: object
) -> None:
    found = formats.detect(row, Use.prompt)
    assert found is not None and found.prompt is not None
    assert found.prompt(row) == prompt


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("text", {"text": 3}, "key 'text': expected text, found a number 3"),
        ("text", {"text": ""}, "key 'text': expected text, found an empty one"),
        (
            "text",
            {"txt": "x"},
            "key 'text': expected, but missing; found keys: txt; nearest key: 'txt'",
        ),
        (
            "prompt_completion",
            {"prompt": "a", "completion": [bot("b")]},
            "key 'completion': expected what 'prompt' is (text 'a'), found a list of 1",
        ),
        (
            "prompt_completion",
            {"prompt": [user("a")], "completion": [user("b")]},
            "expected the last message to be an assistant's, found role 'user'",
        ),
        (
            "messages",
            {"messages": []},
            "key 'messages': expected a list of messages, found a list of 0",
        ),
        (
            "messages",
            {"messages": "[]"},
            "key 'messages': expected a list of messages, found a list of 0",
        ),
        (
            "messages",
            {"messages": ["x"]},
            "key 'messages[0]': expected an object with 'role' and 'content', found text 'x'",
        ),
        (
            "messages",
            {"messages": [user("a"), {"role": "asistant", "content": "b"}]},
            "messages[1]: key 'role': expected one of system, developer, user",
        ),
        (
            "messages",
            {"messages": [user("a"), {"role": "asistant", "content": "b"}]},
            "found 'asistant'; nearest: 'assistant'",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": None}]},
            "messages[0]: key 'content': expected text, found null",
        ),
        (
            "messages",
            {"messages": [user("a")]},
            "at least one assistant's message to train on, found none",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "humn", "value": "x"}]},
            "conversations[0]: key 'from': expected one of system, developer, user, human",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["q"]]},
            "key 'history[0]': expected [question, answer], found a list of 1",
        ),
    ],
)
def test_an_sft_row_that_does_not_fit(name: str, row: dict[str, Any], message: str) -> None:
    convert = formats.by_name(name).sft
    assert convert is not None
    with pytest.raises(formats.RowError, match=re.escape(message)):
        convert(row)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "expected two different answers, found the same twice",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": [bot("c")]},
            "key 'rejected': expected what 'chosen' is",
        ),
        (
            "preference",
            {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
            "key 'chosen': expected what 'prompt' is (a list of 1), found text 'b'",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "high"},
            "key 'margin': expected a finite number, found text 'high'",
        ),
        (
            "implicit_preference",
            {"chosen": [user("a"), bot("b")], "rejected": [user("A"), bot("c")]},
            "differ in the last message only, found another message 0",
        ),
        (
            "implicit_preference",
            {"chosen": [bot("b")], "rejected": [bot("c")]},
            "expected whole conversations, found the assistant's message alone",
        ),
        (
            "ultrafeedback",
            PAIRS["ultrafeedback"][0] | {"prompt": "Ho"},
            "key 'prompt': expected the conversation's user message text 'Hi', found text 'Ho'",
        ),
        (
            "hh_rlhf",
            {"chosen": HH + " x", "rejected": HH.replace("Hi", "Ho") + " y"},
            "the same transcript up to the last 'Assistant:', found a difference at",
        ),
        (
            "hh_rlhf",
            {"chosen": "x", "rejected": HH + " y"},
            "key 'chosen': expected a transcript with",
        ),
        (
            "sharegpt_preference",
            PAIRS["sharegpt_preference"][0] | {"chosen": {"from": "human", "value": "x"}},
            "expected the assistant's message, found messages of user",
        ),
        (
            "swift_preference",
            {"messages": [user("a")], "rejected_response": "c"},
            "expected a conversation that ends with the chosen answer",
        ),
    ],
)
def test_a_pair_that_does_not_fit(name: str, row: dict[str, Any], message: str) -> None:
    convert = formats.by_name(name).pair
    assert convert is not None
    with pytest.raises(formats.RowError, match=re.escape(message)):
        convert(row)


def test_every_format_of_the_schema_is_known() -> None:
    assert {f.name for f in formats.FORMATS} == {f.value for f in DataFormat} - {"auto"}


# ---- reading for a stage ----


def test_a_row_without_the_needed_keys_names_the_nearest_format_and_key(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "choosen": "b", "rejected": "c"}])
    with pytest.raises(UserError) as error:
        reading.preference_pairs(
            reading.DataRequest.of(config(tmp_path, RewardStage(), path=str(path)))
        )
    said = str(error.value)
    assert "p.jsonl, row 1: expected pairs of a chosen and a" in said
    assert "Nearest format: preference (prompt, chosen, rejected" in said
    assert "key 'chosen' (nearest key found: 'choosen')" in said


def test_whole_texts_cannot_be_prompts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"whole texts .* expected a column 'prompt'"):
        reading.prompts(
            reading.DataRequest.of(config(tmp_path, OnlineStage(), path=str(path))), tokenizer()
        )
    path = jsonl(
        tmp_path / "pairs.jsonl",
        [{"chosen": "a b", "rejected": "a c"}, {"chosen": "x", "rejected": "y"}],
    )
    with pytest.raises(UserError, match=r"row 1: .*expected a prompt .*found whole texts"):
        reading.prompts(
            reading.DataRequest.of(config(tmp_path, OnlineStage(), path=str(path))), tokenizer()
        )


def test_answers_that_are_judged_bad_are_not_trained_on_by_accident(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": str(i), "label": i % 2 == 0} for i in range(6)]
    path = str(jsonl(tmp_path / "kto.jsonl", rows))
    with pytest.raises(UserError, match="the column 'label' judges each answer"):
        reading.sft_rows(reading.DataRequest.of(config(tmp_path, SFTStage(), path=path)))
    train, held = reading.sft_rows(
        reading.DataRequest.of(
            config(tmp_path, SFTStage(), path=path, format=DataFormat.prompt_completion)
        )
    )
    assert len(train) + len(held) == 6


def test_a_chosen_format_that_the_stage_cannot_read(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "t.jsonl", [{"text": "a"}]))
    with pytest.raises(UserError, match=r"data.format=text .*pairs .*hh_rlhf"):
        reading.preference_pairs(
            reading.DataRequest.of(
                config(tmp_path, RewardStage(), path=path, format=DataFormat.text)
            )
        )


def test_rejected_rows_may_hold_any_line_end(tmp_path: Path) -> None:
    """A second reading keeps the first one's rejected rows, which JSON lines end with a line feed
    alone.
    """
    path = jsonl(
        tmp_path / "t.jsonl", [{"text": "good"}, {"text": "fine"}, {"prompt": "a\u2028b\x85c"}]
    )
    other = jsonl(tmp_path / "o.jsonl", [{"text": "good"}, {"text": "fine"}, {"text": 5}])
    for source in (path, other):
        reading.sft_rows(
            reading.DataRequest.of(config(tmp_path, SFTStage(), path=str(source), max_bad_rows=1))
        )
    lines = (
        (tmp_path / "runs" / "r" / "data_rejected.jsonl").read_text(encoding="utf-8").split("\n")
    )
    assert [json.loads(line)["content"] for line in lines if line] == [
        {"prompt": "a\u2028b\x85c"},
        {"text": 5},
    ]


def test_rejected_rows_stop_the_run_or_are_kept_aside(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"row {i}"} for i in range(10)]
    path = jsonl(tmp_path / "t.jsonl", [*rows, {"text": 5}])
    with path.open("a", encoding="utf-8") as out:
        out.write("{broken\n")
    kept = tmp_path / "runs" / "r" / "data_rejected.jsonl"
    with pytest.raises(
        UserError,
        match=r"2 of 12 rows don't fit format text \(text\): row 11: key 'text': expected text, "
        r"found a number 5; row 12: not valid",
    ):
        reading.sft_rows(
            reading.DataRequest.of(config(tmp_path, SFTStage(), path=str(path), max_bad_rows=1))
        )
    written = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [(w["row"], w["content"]) for w in written] == [(11, {"text": 5}), (12, "{broken")]
    assert all(w["file"] == str(path) and w["reason"] and w["set_aside"] is False for w in written)
    (tmp_path / "runs" / "r" / "sft").mkdir()
    cfg = config(tmp_path, SFTStage(), path=str(path), max_bad_rows=2)
    for _ in range(2):  # the second read replaces the first one's rows
        train, held = reading.sft_rows(reading.DataRequest.of(cfg))
    assert len(train) + len(held) == 10
    inside = tmp_path / "runs" / "r" / "sft" / "data_rejected.jsonl"
    assert len(inside.read_text(encoding="utf-8").splitlines()) == 2


def test_a_file_holds_texts_or_conversations_not_both(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": [user("b")]}])
    with pytest.raises(UserError, match=r"row 2: expected text .*row 1, found messages"):
        reading.prompts(
            reading.DataRequest.of(config(tmp_path, OnlineStage(), path=str(path))), tokenizer()
        )


def test_the_held_out_rows_are_drawn_by_the_seed_and_never_share_a_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 20}", "chosen": f"a{i}", "rejected": "b"} for i in range(60)]
    cfg = config(
        tmp_path, RewardStage(), path=str(jsonl(tmp_path / "p.jsonl", rows)), eval_fraction=0.2
    )
    train, held = reading.preference_pairs(reading.DataRequest.of(cfg))
    assert (len(train), len(held)) == (48, 12)
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert reading.preference_pairs(reading.DataRequest.of(cfg)) == (train, held)
    cfg.run.seed = 1
    assert reading.preference_pairs(reading.DataRequest.of(cfg))[1] != held


def test_eval_path_is_the_held_out_file(tmp_path: Path) -> None:
    train_file, eval_file = (
        str(jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(3)]))
        for n in ("train", "eval")
    )
    train, held = reading.sft_records(
        reading.DataRequest.of(config(tmp_path, SFTStage(), path=train_file, eval_path=eval_file))
    )
    assert [record.value["text"] for record in train] == ["train 0", "train 1", "train 2"]
    assert [record.value["text"] for record in held] == ["eval 0", "eval 1", "eval 2"]
    assert held[2].place == f"{eval_file}, row 3"


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "t.jsonl", [{"text": "a"}]))
    with pytest.raises(UserError, match=r"held out.*data.eval_path"):
        reading.sft_rows(reading.DataRequest.of(config(tmp_path, SFTStage(), path=path)))


def test_preference_columns_follow_the_rows(tmp_path: Path) -> None:
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
    train, _ = reading.preference_records(
        reading.DataRequest.of(
            config(tmp_path, RewardStage(), path=str(jsonl(tmp_path / "a.jsonl", rows)))
        )
    )
    assert list(train[0].value) == ["chosen", "rejected"]
    with_margin = [r | {"prompt": f"p{i}", "margin": i} for i, r in enumerate(rows)]
    path = str(jsonl(tmp_path / "b.jsonl", with_margin))
    train, _ = reading.preference_records(
        reading.DataRequest.of(config(tmp_path, RewardStage(margin=True), path=path))
    )
    assert list(train[0].value) == ["prompt", "chosen", "rejected", "margin"]
    del with_margin[2]["margin"]
    with pytest.raises(UserError, match=r"row 3: stage.margin=true.*no margin"):
        reading.preference_pairs(
            reading.DataRequest.of(
                config(
                    tmp_path,
                    RewardStage(margin=True),
                    path=str(jsonl(tmp_path / "c.jsonl", with_margin)),
                )
            )
        )


def test_csv_numbers_are_margins(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("chosen,rejected,margin\na,b,0.5\nc,d,1\n", encoding="utf-8")
    train, held = reading.preference_pairs(
        reading.DataRequest.of(
            config(tmp_path, RewardStage(margin=True), path=str(tmp_path / "p.csv"))
        )
    )
    assert sorted(p.margin for p in [*train, *held] if p.margin is not None) == [0.5, 1.0]


def test_text_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"the film {i}", "answer": i} for i in range(10)]
    cfg = config(tmp_path, OnlineStage(), path=str(jsonl(tmp_path / "p.jsonl", rows)))
    tok = tokenizer()
    train, held = (
        reading.prompts(reading.DataRequest.of(cfg), tok),
        reading.prompts(reading.DataRequest.of(cfg), tok, split="eval"),
    )
    assert len(train) == 9 and len(held) == 1
    assert {p.text for p in [*train, *held]} == {r["prompt"] for r in rows}
    for prompt in train:
        assert (
            tok.decode(prompt.token_ids) == prompt.text == prompt.source
            and tok.bos_token_id not in prompt.token_ids
        )
        assert prompt.fields == {"answer": int(prompt.text.split()[-1])}
    assert len({p.id for p in train}) == 9
    assert [p.id for p in reading.prompts(reading.DataRequest.of(cfg), tok)] == [
        p.id for p in train
    ]


def test_a_prompts_id_depends_on_its_content_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b"}, {"prompt": "a", "answer": 2}]
    cfg = config(
        tmp_path,
        OnlineStage(),
        path=str(jsonl(tmp_path / "p.jsonl", rows)),
        eval_path=str(jsonl(tmp_path / "e.jsonl", [{"prompt": "a"}])),
    )
    first, second, third = reading.prompts(reading.DataRequest.of(cfg), tokenizer())
    assert first.id == third.id != second.id
    assert reading.prompts(reading.DataRequest.of(cfg), tokenizer(), split="eval")[0].id == first.id


def test_chat_prompts_go_through_the_template_with_one_bos(tmp_path: Path) -> None:
    cfg = config(
        tmp_path,
        OnlineStage(),
        path=str(jsonl(tmp_path / "p.jsonl", [{"prompt": [user(f"Hi {i}")]} for i in range(3)])),
    )
    tok = tokenizer()
    with pytest.raises(UserError, match=r"Set data.chat_template"):
        reading.prompts(reading.DataRequest.of(cfg), tok)
    tok.chat_template = CHATML
    for prompt in reading.prompts(reading.DataRequest.of(cfg), tok):
        assert isinstance(prompt.source, list)
        assert prompt.text == f"{tok.bos_token}<user>{prompt.source[0]['content']}\n<assistant>"
        assert prompt.token_ids.count(tok.bos_token_id) == 1


def test_long_prompts_are_an_error_or_lose_their_beginning(tmp_path: Path) -> None:
    rows = [{"prompt": "the film"}, {"prompt": "the film " * 20}, {"prompt": "a"}]
    path = str(jsonl(tmp_path / "p.jsonl", rows))
    eval_path = str(jsonl(tmp_path / "e.jsonl", rows[:1]))
    tok = tokenizer()
    longest = len(tok(rows[1]["prompt"])["input_ids"])
    with pytest.raises(
        UserError,
        match=rf"1 of 3 prompts.*data.max_prompt_length=8 .*row 2 with {longest}",
    ):
        reading.prompts(
            reading.DataRequest.of(
                config(tmp_path, OnlineStage(), path=path, eval_path=eval_path, max_prompt_length=8)
            ),
            tok,
        )
    cut = reading.prompts(
        reading.DataRequest.of(
            config(
                tmp_path,
                OnlineStage(),
                path=path,
                eval_path=eval_path,
                max_prompt_length=8,
                truncate_prompts=True,
            )
        ),
        tok,
    )
    assert list(cut[1].token_ids) == tok(rows[1]["prompt"])["input_ids"][-8:]
    assert tok.decode(cut[1].token_ids) == cut[1].text


def test_an_empty_prompt_is_a_row_that_does_not_fit(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": ""}]))
    with pytest.raises(UserError, match="row 2: key 'prompt': expected text, found an empty one"):
        reading.prompts(
            reading.DataRequest.of(config(tmp_path, OnlineStage(), path=path)), tokenizer()
        )


def test_stage_texts_are_all_texts_and_nothing_else(tmp_path: Path) -> None:
    path = str(
        jsonl(
            tmp_path / "p.jsonl",
            [
                {
                    "prompt": [user("Hi")],
                    "chosen": [bot("Hello")],
                    "rejected": [bot("No")],
                    "note": "unread",
                }
            ],
        )
    )
    assert list(
        reading.stage_texts(reading.DataRequest.of(config(tmp_path, RewardStage(), path=path)))
    ) == [
        "Hi",
        "Hello",
        "No",
    ]


def test_the_detected_format_is_said_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = str(
        jsonl(
            tmp_path / "t.jsonl",
            [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}],
        )
    )
    reading.sft_rows(reading.DataRequest.of(config(tmp_path, SFTStage(), path=path)))
    assert "t.jsonl: 2 rows, read as alpaca" in caplog.text


def test_columns_that_the_stage_does_not_read_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": f"a{i}", "weight": 1.0, "id": i, "source": None} for i in range(6)]
    rows[0]["source"] = "web"
    path = jsonl(tmp_path / "a.jsonl", rows)
    caplog.set_level("INFO")
    reading.sft_rows(reading.DataRequest.of(config(tmp_path, SFTStage(), path=str(path))))
    told = [line for line in caplog.messages if "does not read" in line]
    assert len(told) == 1 and "'id' (6 rows), 'source' (1 rows)" in told[0]
    assert "a.jsonl" in told[0] and "stage=sft" in told[0] and "weight" not in told[0]


def test_data_path_not_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data.path is not set: stage=reward .*formats: .*hh_rlhf",
    ):
        reading.preference_pairs(reading.DataRequest.of(config(tmp_path, RewardStage())))
