"""LLaMA-Factory's dataset_info.json: its entries read as its users wrote them, and every message
for one that can't be.
"""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conf.data import DataFormat
from conf.schema import Config, DataConfig, RunConfig
from conf.stages import KTOStage, RewardStage, SFTStage
from rlhf.data import reading
from rlhf.data.formats import Use
from rlhf.data.prepare import ingest
from rlhf.types import JudgedAnswer, PreferencePair, UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def registry(folder: Path, rows: Any, /, **entry: Any) -> Config:
    """A registry with the entry `mine` over `rows`."""
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {"mine": {"file_name": "rows.json", **entry}, "other": {"file_name": "rows.json"}}
        ),
        encoding="utf-8",
    )
    data = DataConfig(registry=str(folder / "dataset_info.json"), dataset="mine")
    return Config(stage=SFTStage(), run=RunConfig(dir=str(folder / "runs"), name="r"), data=data)


def columns(cfg: Config, kind: Use) -> list[dict[str, Any]]:
    left: list[str] = []
    out = [
        item.columns
        for item in ingest.items(
            cfg.data,
            cfg.run.seed,
            kind,
            lambda row, reason: left.append(reason),
            lambda row, reason: left.append(reason),
        )
    ]
    assert not left
    return out


OPENAI = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


@pytest.mark.parametrize(
    ("kind", "row", "entry", "expected"),
    [
        (
            Use.sft,
            {"instruction": "Hi", "input": "you", "output": "Hello"},
            {},
            {"prompt": [user("Hi\nyou")], "completion": [bot("Hello")]},
        ),
        (
            Use.sft,
            {"instruction": "", "input": "you", "output": "Hello"},
            {},
            {"prompt": [user("you")], "completion": [bot("Hello")]},
        ),
        # an entry that names columns has those that it names, and no other
        (
            Use.sft,
            {"instruction": "Hi", "input": "NOT MEANT", "output": "Hello"},
            {"columns": {"prompt": "instruction", "query": None, "response": "output"}},
            {"prompt": [user("Hi")], "completion": [bot("Hello")]},
        ),
        (
            Use.sft,
            {"content": "A text.", "text": "another", "lang": "en"},
            {"columns": {"prompt": "content"}},
            {"text": "A text.", "lang": "en"},
        ),
        (
            Use.prompt,
            {"q": "Hi", "sys": "Be kind.", "past": []},
            {"columns": {"prompt": "q", "system": "sys", "history": "past"}},
            {"prompt": [{"role": "system", "content": "Be kind."}, user("Hi")]},
        ),
        (
            Use.sft,
            {"q": "Hi", "a": "Hello", "sys": "Be kind.", "past": [["x", "y"]], "topic": "t"},
            {
                "columns": {
                    "prompt": "q",
                    "query": "",
                    "response": "a",
                    "system": "sys",
                    "history": "past",
                }
            },
            # every answer of a history trains
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    user("x"),
                    bot("y"),
                    user("Hi"),
                    bot("Hello"),
                ],
                "topic": "t",
            },
        ),
        (
            Use.sft,
            {"instruction": "Hi", "output": "Hello", "system": "unused"},
            {},
            {"prompt": [user("Hi")], "completion": [bot("Hello")]},
        ),
        (
            Use.preference,
            {"instruction": "Hi", "input": "", "good": "Hello", "bad": "No"},
            {
                "ranking": True,
                "columns": {
                    "prompt": "instruction",
                    "query": "input",
                    "chosen": "good",
                    "rejected": "bad",
                },
            },
            {"prompt": [user("Hi")], "chosen": [bot("Hello")], "rejected": [bot("No")]},
        ),
        (
            Use.unpaired,
            {"instruction": "Hi", "output": "No", "ok": False},
            {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "ok"}},
            {"prompt": [user("Hi")], "completion": [bot("No")], "label": False},
        ),
        (
            Use.sft,
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            {"formatting": "sharegpt"},
            {"messages": [user("Hi"), bot("Hello")]},
        ),
        # a system message comes before the column; empty tools are none
        (
            Use.sft,
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "sys": "Be rude.",
                "functions": "[]",
            },
            {
                "formatting": "openai",
                "columns": {
                    "messages": "conversations",
                    "system": "sys",
                    "tools": "functions",
                },
            },
            {"messages": [{"role": "system", "content": "Be kind."}, user("Hi"), bot("Hello")]},
        ),
        (
            Use.sft,
            {
                "talk": [
                    {"who": "S", "said": "Be kind."},
                    {"who": "Q", "said": "Hi"},
                    {"who": "A", "said": "Hello"},
                ]
            },
            {
                "formatting": "sharegpt",
                "columns": {"messages": "talk"},
                "tags": {
                    "role_tag": "who",
                    "content_tag": "said",
                    "user_tag": "Q",
                    "assistant_tag": "A",
                    "system_tag": "S",
                },
            },
            {"messages": [{"role": "system", "content": "Be kind."}, user("Hi"), bot("Hello")]},
        ),
        (
            Use.sft,
            {"messages": [user("Hi"), bot("Hello")]},
            OPENAI,
            {"messages": [user("Hi"), bot("Hello")]},
        ),
        (
            Use.preference,
            {"messages": [user("Hi")], "chosen": bot("Hello"), "rejected": bot("No")},
            OPENAI
            | {
                "ranking": True,
                "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
            },
            {"prompt": [user("Hi")], "chosen": [bot("Hello")], "rejected": [bot("No")]},
        ),
        (
            Use.unpaired,
            {"messages": [user("Hi"), bot("No")], "label": True},
            OPENAI | {"columns": {"messages": "messages", "kto_tag": "label"}},
            {"prompt": [user("Hi")], "completion": [bot("No")], "label": True},
        ),
    ],
)
def test_entries(
    tmp_path: Path, kind: Use, row: dict[str, Any], entry: dict[str, Any], expected: dict[str, Any]
) -> None:
    cfg = registry(tmp_path, [row], **entry)
    assert columns(cfg, kind) == [expected]
    assert ingest.natural_use(cfg.data) is kind


def test_stages_read_a_registry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [{"instruction": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(8)]
    cfg = registry(tmp_path, rows, ranking=True)
    cfg.stage = RewardStage()
    train, held = reading.preference_pairs(reading.DataRequest.of(cfg))
    assert len(train) + len(held) == 8 and train[0].chosen == [bot("a")]
    assert isinstance(train[0], PreferencePair)
    said = next(line for line in caplog.messages if "entry 'mine'" in line)
    assert "alpaca_preference" in said and "prompt from 'instruction'" in said
    assert "chosen" in said and "wants them named" in said, "they assume no such column"
    judged = registry(
        tmp_path,
        [{"instruction": f"p{i}", "output": "a", "tag": i % 2 == 0} for i in range(8)],
        columns={"prompt": "instruction", "response": "output", "kto_tag": "tag"},
    )
    judged.stage = KTOStage()
    answers, others = reading.judged_answers(reading.DataRequest.of(judged))
    assert {type(answer) for answer in answers} == {JudgedAnswer} and len(answers) + len(
        others
    ) == 8


def test_num_samples_and_several_entries(tmp_path: Path) -> None:
    cfg = registry(
        tmp_path, [{"instruction": str(i), "output": "x"} for i in range(20)], num_samples=5
    )
    assert len(columns(cfg, Use.sft)) == 5
    content = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    (tmp_path / "more.jsonl").write_text('{"instruction": "z", "output": "x"}\n', encoding="utf-8")
    content["other"]["file_name"] = "more.jsonl"
    (tmp_path / "dataset_info.json").write_text(json.dumps(content), encoding="utf-8")
    cfg.data.dataset = "mine, other"
    assert len(columns(cfg, Use.sft)) == 6
    content["other"]["file_name"] = "rows.json"
    (tmp_path / "dataset_info.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"data.dataset=mine, other: .*rows.json is in more"):
        columns(cfg, Use.sft)


@pytest.mark.parametrize("count", [10, 25, 40])
def test_num_samples_above_the_rows_repeats_them(tmp_path: Path, count: int) -> None:
    rows = [{"instruction": str(i), "output": "x"} for i in range(10)]
    cfg = registry(tmp_path, rows, num_samples=count)
    read = Counter(row["prompt"][0]["content"] for row in columns(cfg, Use.sft))
    assert read.total() == count and len(read) == 10
    assert max(read.values()) - min(read.values()) <= 1


def test_the_hub_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_list([{"instruction": "Hi", "output": "Hello"}])

    cfg = registry(tmp_path, [], hf_hub_url="wiki_qa", folder="data", subset="a", split="dev")
    with pytest.raises(UserError, match=r"=wiki_qa: .*'hf_hub_url' out.*"):
        columns(cfg, Use.sft)  # the tests use no network
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: ["train", "dev"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert columns(cfg, Use.sft) == [{"prompt": [user("Hi")], "completion": [bot("Hello")]}]
    assert asked[0] == (("wiki_qa", "a"), {"split": "dev", "streaming": True, "data_dir": "data"})


def test_the_registry_is_found_in_its_directory(tmp_path: Path) -> None:
    cfg = registry(tmp_path, [], file_name="corpus.txt.gz", columns={"prompt": "text"})
    (tmp_path / "corpus.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    cfg.data.registry = str(tmp_path)
    assert columns(cfg, Use.sft) == [{"text": "one"}, {"text": "two"}]


def test_a_row_that_does_not_fit_is_told_in_the_words_of_its_file(tmp_path: Path) -> None:
    cfg = registry(tmp_path, [{"q": 3, "a": "b"}], columns={"prompt": "q", "response": "a"})
    with pytest.raises(UserError, match=r"rows.json, row 1: key 'q': expected text"):
        ingest.natural_use(cfg.data)
    cfg = registry(tmp_path, [{"a": "b"}], columns={"prompt": "q", "response": "a"})
    with pytest.raises(UserError, match=r"rows.json, row 1: key 'q': .*missing"):
        ingest.natural_use(cfg.data)


def test_a_key_that_nothing_reads_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [{"instruction": str(i), "output": "x"} for i in range(4)]
    cfg = registry(tmp_path, rows, file_sha1="abc")
    reading.sft_rows(reading.DataRequest.of(cfg))
    assert "file_sha1" in caplog.text


@pytest.mark.parametrize(
    ("row", "entry", "lost"),
    [
        (
            {"q": "Hi", "a": "yes", "input": "in"},
            {"columns": {"prompt": "q", "response": "a"}},
            "input",
        ),
        ({"t": "Hi", "f": [{"name": "n"}]}, {"columns": {"prompt": "t", "tools": "f"}}, "f"),
        (
            {"q": "Hi", "s": "Be kind.", "prompt": "old"},
            {"columns": {"prompt": "q", "system": "s"}},
            "prompt",
        ),
        (
            {"messages": [{"role": "system", "content": "A"}, user("q"), bot("a")], "s": "B"},
            {**OPENAI, "columns": {"messages": "messages", "system": "s"}},
            "s",
        ),
    ],
)
def test_a_column_that_an_entry_leaves_out_is_counted(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    row: dict[str, Any],
    entry: dict[str, Any],
    lost: str,
) -> None:
    cfg = registry(tmp_path, [row] * 2, **entry)
    kind = ingest.natural_use(cfg.data)
    columns(cfg, kind)
    assert re.search(rf"{lost!r}.*\(2 rows, the first .*rows.json, row 1\)", caplog.text)


def test_a_message_with_the_names_of_its_tags_and_ours_is_refused(tmp_path: Path) -> None:
    turns = [{**user("q"), "from": "a forum"}, bot("a")]
    cfg = registry(tmp_path, [{"messages": turns}], **OPENAI)
    with pytest.raises(UserError, match=r"key 'from' .*'role' and 'content'.*'a forum'"):
        reading.sft_rows(reading.DataRequest.of(cfg))


def test_a_directory_of_files(tmp_path: Path) -> None:
    cfg = registry(tmp_path, [], file_name="many")
    (tmp_path / "many").mkdir()
    with pytest.raises(UserError, match=r"directory .*many: .*none"):
        columns(cfg, Use.sft)
    for name in "ab":
        (tmp_path / "many" / f"{name}.json").write_text(
            json.dumps([{"instruction": name, "output": "x"}]), encoding="utf-8"
        )
    assert [row["prompt"][0]["content"] for row in columns(cfg, Use.sft)] == ["a", "b"]
    (tmp_path / "many" / "c.csv").write_text("instruction,output\nc,x\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"files of one kind .*\.csv, \.json"):
        columns(cfg, Use.sft)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"formating": "sharegpt"},
            r"entry 'mine': unknown key 'formating'; nearest: 'formatting'",
        ),
        (
            {"formatting": "share_gpt"},
            r"key 'formatting': .*alpaca.*sharegpt.*'share_gpt'; nearest: 'sharegpt'",
        ),
        ({"columns": {"response": "x"}}, r"key 'columns': .* 'prompt', found none"),
        (
            {"formatting": "sharegpt", "columns": {"system": "x"}},
            r"key 'columns': .* 'messages', found none",
        ),
        ({"script_url": "x"}, r"'script_url', a place .*not read. Leave 'script_url' out"),
        ({"columns": {"promt": "x"}}, r"key 'columns': unknown 'promt'; nearest: 'prompt'"),
        ({"columns": ["x"]}, r"key 'columns': expected an object of texts"),
        ({"tags": {"role": "x"}}, r"key 'tags': unknown 'role'; nearest: 'role_tag'"),
        (
            {"num_samples": 0},
            r"key 'num_samples': expected a number of rows of at least 1, found 0",
        ),
        (
            {"ranking": True, "columns": {"prompt": "p", "kto_tag": "x"}},
            r"expected ranking or a kto_tag, found both",
        ),
        ({"file_name": "../rows.json"}, "key 'file_name': ../rows.json is outside of"),
        ({"file_name": "/etc/passwd"}, "key 'file_name': /etc/passwd is outside of"),
        (
            {"file_name": "no.json"},
            r"data.dataset \(entry 'mine' of .*dataset_info.json\)=.*no.json: no such file",
        ),
    ],
)
def test_an_entry_that_cannot_be_read(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    cfg = registry(tmp_path, [{"instruction": "a", "output": "b"}], **entry)
    with pytest.raises(UserError, match=message):
        columns(cfg, Use.sft)


def test_a_place_that_is_not_read_and_rows_with_images(tmp_path: Path) -> None:
    cfg = registry(
        tmp_path,
        [{"instruction": "a", "output": "b", "pics": ["x.png"]}],
        columns={"prompt": "instruction", "response": "output", "images": "pics"},
    )
    left: list[str] = []
    assert (
        list(
            ingest.items(
                cfg.data, 0, Use.sft, lambda row, reason: left.append(reason), lambda *_: None
            )
        )
        == []
    )
    assert len(left) == 1 and "picture 1: no such file" in left[0] and "'x.png'" in left[0]
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"mine": {"ms_hub_url": "a/b"}}), encoding="utf-8"
    )
    with pytest.raises(
        UserError,
        match=r"expected rows of 'hf_hub_url' or 'file_name', found 'ms_hub_url'",
    ):
        columns(cfg, Use.sft)


def test_a_registry_that_cannot_be_read(tmp_path: Path) -> None:
    cfg = registry(tmp_path, [])
    cfg.data.dataset = "min"
    with pytest.raises(UserError, match=r"'min'; .*mine, other.*: mine"):
        columns(cfg, Use.sft)
    (tmp_path / "dataset_info.json").write_text('{"mine": \n}', encoding="utf-8")
    with pytest.raises(UserError, match=r"dataset_info.json, line 2, column 1: "):
        columns(cfg, Use.sft)
    (tmp_path / "dataset_info.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"expected an object .*found list"):
        columns(cfg, Use.sft)
    cfg.data.registry = str(tmp_path / "no.json")
    with pytest.raises(UserError, match=r"no.json: no such file"):
        columns(cfg, Use.sft)
    cfg = registry(tmp_path, [])
    cfg.data.format = DataFormat.alpaca
    with pytest.raises(UserError, match=r"registry .*data.format=alpaca"):
        columns(cfg, Use.sft)
