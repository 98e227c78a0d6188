"""Where rows come from: files, globs, data sets on disk, hub names, mixtures, registries; streamed,
each with its origin.
"""

import gzip
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.data import DataFormat
from conf.schema import Config, DataConfig, RunConfig, SourceConfig
from conf.stages import OnlineStage, RewardStage, SFTStage
from rlhf.cli import config as composing
from rlhf.data import files, mixture, reading, sources
from rlhf.data.files import SourceRow
from rlhf.data.formats import Use
from rlhf.data.prepare import ingest, outputs
from rlhf.data.prepare.items import Item
from rlhf.types import PreferencePair, UserError


def jsonl(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(name: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {i}"} for i in range(count)]


def config(folder: Path, stage: Any = None, *, seed: int = 0, **data: Any) -> Config:
    return Config(
        stage=stage or SFTStage(),
        run=RunConfig(dir=str(folder / "runs"), name="r", seed=seed),
        data=DataConfig(**data),
    )


def read(cfg: Config, split: str = "train") -> list[str]:
    return [row.columns["text"] for row in ingest.source_rows(cfg.data, cfg.run.seed, split)]


def items(
    cfg: Config, kind: Use
) -> tuple[list[Item], list[tuple[int, str]], list[tuple[int, str]]]:
    rejected: list[tuple[int, str]] = []
    set_aside: list[tuple[int, str]] = []
    out = list(
        ingest.items(
            cfg.data,
            cfg.run.seed,
            kind,
            lambda row, reason: rejected.append((row.number, reason)),
            lambda row, reason: set_aside.append((row.number, reason)),
        )
    )
    return out, rejected, set_aside


# ---- files and globs ----


def test_a_glob_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / "in" / f"{name}.jsonl", texts(name, 2))
    (tmp_path / "in" / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "in" / "c.csv").write_text("text\nc 0\n", encoding="utf-8")
    cfg = config(tmp_path, path=f"{tmp_path}/in/*")
    assert read(cfg) == ["a 0", "a 1", "b 0", "b 1", "c 0"]
    assert [
        (Path(row.origin).name, row.number) for row in ingest.source_rows(cfg.data, cfg.run.seed)
    ][:3] == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.jsonl", 1),
    ]
    assert [p.name for p in sources.data_files(cfg.data)] == ["a.jsonl", "b.jsonl", "c.csv"]
    assert read(config(tmp_path, path=f"{tmp_path}/**/[ab].jsonl")) == ["a 0", "a 1", "b 0", "b 1"]
    with pytest.raises(
        UserError,
        match=r"data.path=.*/x\*.jsonl: .*\.json, .*in\.",
    ):
        read(config(tmp_path, path=f"{tmp_path}/in/x*.jsonl"))
    with pytest.raises(UserError, match=r"1 .*notes.txt"):
        read(config(tmp_path, path=f"{tmp_path}/in/n*"))
    (tmp_path / "in" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d 0"}'))
    assert read(config(tmp_path, path=f"{tmp_path}/in/*"))[-1] == "d 0"
    assert read(config(tmp_path, path=f"{tmp_path}/in/*.txt")) == ["x"], "it is named"


def test_matches_of_a_glob_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl(tmp_path / "a.jsonl", texts("a", 4))
    for name in ("README.txt", "LICENSE"):
        (tmp_path / name).write_text("words", encoding="utf-8")
    caplog.set_level("INFO")
    reading.sft_rows(reading.DataRequest.of(config(tmp_path, path=f"{tmp_path}/*")))
    assert "LICENSE, README.txt" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\nsize 100\n", "git lfs pull"),
        ('"a text"\n"another"\n', r"a.jsonl, row 1: .*object of columns, found text"),
        ("{'text': 1}\n", r"a.jsonl, row 1: not valid JSON at line 1"),
        ("\n", r"a.jsonl holds no rows"),
    ],
)
def test_a_file_that_is_unreadable_shows_its_own_trouble(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        ingest.natural_use(DataConfig(path=str(tmp_path / "a.jsonl")))


def test_files_of_two_kinds_are_named_with_their_kinds(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", texts("a", 1))
    jsonl(tmp_path / "b.jsonl", [{"chosen": "x", "rejected": "y"}])
    with pytest.raises(UserError, match=r"a.jsonl: sft; .*b.jsonl: preference.*data.kind"):
        ingest.natural_use(DataConfig(path=f"{tmp_path}/*"))


def test_a_file_whose_name_looks_like_a_glob_or_a_cap_is_that_file(tmp_path: Path) -> None:
    assert read(config(tmp_path, path=jsonl(tmp_path / "a[1]#2.jsonl", texts("a", 3)))) == [
        "a 0",
        "a 1",
        "a 2",
    ]


def test_streaming_reads_no_further_than_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = files.scan

    def watched(*arguments: Any, **named: Any) -> Iterator[SourceRow]:
        for row in plain(*arguments, **named):
            seen.append(row.number)
            yield row

    monkeypatch.setattr("rlhf.data.mixture.scan", watched)
    paths = [jsonl(tmp_path / f"{i}.jsonl", texts(str(i), 200)) for i in range(2)]
    stream = ingest.source_rows(DataConfig(path=f"{tmp_path}/*.jsonl"), 0)
    assert next(stream).columns == {"text": "0 0"} and len(seen) == 1
    assert len(paths) == 2 and read(config(tmp_path, path=f"{tmp_path}/*.jsonl", max_rows=3)) == [
        "0 0",
        "0 1",
        "0 2",
    ]
    seen.clear()
    data = DataConfig(path=paths[0])
    rows = ingest.items(data, 0, Use.sft, lambda *a: None, lambda *a: None)
    next(rows)
    assert len(seen) <= 22, "the format is looked for in the first rows alone"


def test_a_cap_draws_rows_by_the_seed_and_keeps_their_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts("a", 50))
    some = read(config(tmp_path, path=f"{path}#10"))
    numbers = [int(text.split()[1]) for text in some]
    assert (
        len(numbers) == 10 == len(set(numbers))
        and numbers == sorted(numbers)
        and numbers != list(range(10))
    )
    assert read(config(tmp_path, path=f"{path}#10")) == some
    assert read(config(tmp_path, path=f"{path}#10", seed=1)) != some
    assert len(read(config(tmp_path, path=f"{path}#80"))) == 50
    with pytest.raises(UserError, match=r"expected .*'#', found 0"):
        read(config(tmp_path, path=f"{path}#0"))


@given(total=st.integers(1, 40), count=st.integers(0, 45), seed=st.integers(0, 5))
@settings(deadline=None)
def test_drawing_gives_exactly_the_count_in_order(total: int, count: int, seed: int) -> None:
    import random

    out = list(mixture.draw(iter(range(total)), total, count, random.Random(seed)))
    assert len(out) == min(count, total) and out == sorted(set(out))


def test_drawing_is_even() -> None:
    import random

    rng = random.Random(0)
    counts = Counter(
        value for _ in range(4000) for value in mixture.draw(iter(range(8)), 8, 2, rng)
    )
    assert all(abs(counts[i] - 1000) < 5 * (1000 * 0.75) ** 0.5 for i in range(8)), counts


# ---- mixtures ----


def two(folder: Path, **more: Any) -> dict[str, SourceConfig]:
    return {
        "a": SourceConfig(path=jsonl(folder / "a.jsonl", texts("a", 30)), **more.get("a", {})),
        "b": SourceConfig(path=jsonl(folder / "b.jsonl", texts("b", 40)), **more.get("b", {})),
    }


def test_without_weights_the_sources_follow_one_another(tmp_path: Path) -> None:
    out = read(config(tmp_path, sources=two(tmp_path, b={"cap": 5})))
    assert [text[0] for text in out] == ["a"] * 30 + ["b"] * 5


def test_weights_are_proportions_of_the_whole_and_of_every_first_part(tmp_path: Path) -> None:
    out = [
        text[0]
        for text in read(config(tmp_path, sources=two(tmp_path, a={"weight": 3}, b={"weight": 1})))
    ]
    assert Counter(out) == {"a": 30, "b": 10}, "the largest mixture that repeats no row"
    for end in range(1, len(out) + 1):
        assert abs(out[:end].count("a") - 0.75 * end) <= 1
    assert (
        len(set(read(config(tmp_path, sources=two(tmp_path, a={"weight": 3}, b={"weight": 1})))))
        == 40
    )
    capped = read(
        config(tmp_path, sources=two(tmp_path, a={"weight": 0.5, "cap": 4}, b={"weight": 0.5}))
    )
    assert Counter(text[0] for text in capped) == {"a": 4, "b": 4}


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=5), data=st.data())
def test_proportions_never_exceed_a_source_and_use_one_whole(
    sizes: list[int], data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.01, 10)) for _ in sizes]
    counts = mixture.proportions(sizes, weights)
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    assert all(
        abs(count - weight * scale) <= 1 for count, weight in zip(counts, weights, strict=True)
    )


def test_sources_have_their_own_formats_and_columns(tmp_path: Path) -> None:
    pairs = {
        "a": SourceConfig(
            path=jsonl(tmp_path / "a.jsonl", [{"q": "p", "good": "x", "bad": "y"}]),
            columns={"prompt": "q", "chosen": "good", "rejected": "bad"},
        )
    }
    pairs["b"] = SourceConfig(
        path=jsonl(
            tmp_path / "b.jsonl",
            [{"history": "h", "human_ref_A": "m", "human_ref_B": "n", "labels": 0}],
        )
    )
    out, rejected, set_aside = items(config(tmp_path, RewardStage(), sources=pairs), Use.preference)
    assert [item.columns for item in out] == [
        {"prompt": "p", "chosen": "x", "rejected": "y"},
        {"prompt": "h", "chosen": "n", "rejected": "m", "position": 2},
    ]
    assert (
        [(Path(item.origin).name, item.number) for item in out] == [("a.jsonl", 1), ("b.jsonl", 1)]
        and not rejected
        and not set_aside
    )
    train, held = reading.preference_pairs(
        reading.DataRequest.of(config(tmp_path, RewardStage(), sources=pairs))
    )
    assert sorted([*train, *held], key=str) == sorted(
        [PreferencePair("p", "x", "y"), PreferencePair("h", "n", "m")], key=str
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"path": "x.jsonl", "sources": {"a": SourceConfig(path="y")}},
            "one of path, sources and dataset",
        ),
        (
            {"sources": {"a": SourceConfig(path="y", weight=1.0), "b": SourceConfig(path="z")}},
            "a weight for every source or for none",
        ),
        (
            {"sources": {"a": SourceConfig(path="y", weight=0.0)}},
            "data.sources.a.weight=0.0 is out of range: expected above 0",
        ),
        ({"sources": {"a": SourceConfig(path="y", cap=0)}}, "data.sources.a.cap=0 is out of range"),
        ({"columns": {"prompt": "q", "chosen": "q"}}, "a different column's name for each"),
        ({"dataset": "x"}, "set where data.registry is"),
    ],
)
def test_settings_that_contradict_each_other(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**data)


def test_one_file_in_two_sources_and_a_cap_twice(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts("a", 3))
    with pytest.raises(UserError, match=r"a.jsonl is in more than one"):
        read(config(tmp_path, sources={"a": SourceConfig(path=path), "b": SourceConfig(path=path)}))
    with pytest.raises(UserError, match=r"cap .*twice, .*#2 .*data.sources.a.cap=1"):
        read(config(tmp_path, sources={"a": SourceConfig(path=f"{path}#2", cap=1)}))


def test_options_of_mixtures_and_caps_compose() -> None:
    cfg = composing.compose(
        [
            "stage=sft",
            "data.sources.a.path=rows.jsonl#500",
            "+data.sources.a.weight=0.5",
            "data.sources.a.columns.prompt=question",
            "data.sources.b.path=in/[ab]*.jsonl",
            "data.sources.b.weight=1.5",
        ]
    )
    assert {name: (s.path, s.weight, s.columns) for name, s in cfg.data.sources.items()} == {
        "a": ("rows.jsonl#500", 0.5, {"prompt": "question"}),
        "b": ("in/[ab]*.jsonl", 1.5, {}),
    }
    assert composing.compose(
        ["stage=sft", "data.path=rows.jsonl#500", "+data.columns.text=body"]
    ).data.columns == {"text": "body"}
    assert (
        composing.compose(
            ["stage=reward", "data=ultrafeedback", "data.path=mine.parquet", "data.split=null"]
        ).data.format
        is DataFormat.ultrafeedback
    )
    with pytest.raises(
        UserError,
        match=r"data.sources.a.wieght: .*stage=sft. .*data.sources.a.weight",
    ):
        composing.compose(["stage=sft", "data.sources.a.wieght=1"])


# ---- layouts ----


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CHATS = [{"messages": [user(f"q {i}"), bot(f"a {i}")]} for i in range(4)]
TURNS = [
    {"prompt": [user("x"), bot("y"), user(f"z {i}")], "completion": [bot(f"b {i}")]}
    for i in range(4)
]
ALPACA = [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(4)]


def several(folder: Path, *files: list[dict[str, Any]]) -> Config:
    named = {
        name: SourceConfig(path=jsonl(folder / f"{name}.jsonl", rows))
        for name, rows in zip("abc", files, strict=False)
    }
    return config(folder, sources=named)


@pytest.mark.parametrize("turn", [1, -1])
def test_prompts_with_completions_are_written_as_conversations_beside_such(
    tmp_path: Path, turn: int
) -> None:
    """Of the prompt no answer trains, and what is written is read back by the next command."""
    cfg = several(tmp_path, *[CHATS, ALPACA, TURNS][::turn])
    out, rejected, _ = items(cfg, Use.sft)
    assert len(out) == 12 and not rejected and all(set(i.columns) == {"messages"} for i in out)
    by_file = {Path(item.origin).name: item.columns["messages"] for item in reversed(out)}
    first, last = ("a.jsonl", "c.jsonl")[::turn]
    assert by_file["b.jsonl"] == [user("do 0"), bot("done 0")]
    assert by_file[first] == CHATS[0]["messages"]
    assert by_file[last] == [user("x"), bot("y") | {"train": False}, user("z 0"), bot("b 0")]
    written = jsonl(tmp_path / "train.jsonl", [item.columns for item in out])
    train, held = reading.sft_rows(reading.DataRequest.of(config(tmp_path, path=written)))
    assert len(train) + len(held) == 12


def test_texts_and_conversations_are_refused_before_anything_loads(tmp_path: Path) -> None:
    cfg = several(tmp_path, CHATS, [{"prompt": "p", "completion": "c"}] * 3)
    cfg.data.max_bad_rows = 50
    for check in (
        lambda: reading.check_first_rows(reading.DataRequest.of(cfg)),
        lambda: ingest.check(cfg),
    ):
        with pytest.raises(UserError, match=r"b.jsonl .*prompt_completion.*a.jsonl .*messages"):
            check()


def test_texts_of_two_layouts_train_together_and_are_not_written_into_one_file(
    tmp_path: Path,
) -> None:
    cfg = several(tmp_path, texts("t", 4), [{"prompt": "p", "completion": f"c{i}"} for i in "abcd"])
    reading.check_first_rows(reading.DataRequest.of(cfg))
    with pytest.raises(UserError, match=r"a.jsonl holds .*b.jsonl holds "):
        ingest.check(cfg)


def test_the_format_of_each_file_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    items(several(tmp_path, CHATS, ALPACA), Use.sft)
    assert re.search(r"a.jsonl: 4 rows, read as messages ", caplog.text)
    assert re.search(r"b.jsonl: 4 rows, read as alpaca ", caplog.text)


@pytest.mark.parametrize(
    ("kind", "row", "named"),
    [
        (Use.sft, {"text": "x"}, None),
        (Use.sft, {"prompt": "p", "completion": "c"}, None),
        (Use.sft, {"text": "x", "messages": CHATS[0]["messages"]}, "text"),
        (Use.preference, {"prompt": "p", "chosen": "a", "rejected": "b"}, None),
        (
            Use.preference,
            {"prompt": "p", "chosen": "a", "rejected": "b", "instruction": "i"},
            "preference",
        ),
    ],
)
def test_the_next_command_reads_what_was_written(
    tmp_path: Path, kind: Use, row: dict[str, Any], named: str | None
) -> None:
    path = Path(jsonl(tmp_path / "my rows" / "train.jsonl", [row] * 3))
    data = DataConfig(chat_template="chatml", weight_column="value")
    words = shlex.split(outputs.next_command(kind, {"train": path}, data, [row]))
    assert words[:3] == ["python", "-m", "rlhf"]
    cfg = composing.compose(words[3:])
    assert cfg.data.path == str(path) and cfg.data.weight_column == "value"
    assert cfg.data.format.value == (named or "auto") and cfg.data.chat_template == "chatml"
    use = reading.DataRequest.of(cfg).use
    assert use is kind
    reading.check_first_rows(reading.DataRequest.of(cfg))


@pytest.mark.parametrize(
    ("kind", "row", "later", "named"),
    [
        (Use.sft, {"text": "x"}, {"answer": "y"}, "data.format=text"),
        (Use.sft, {"prompt": "p", "completion": "c"}, {"question": "q"}, "prompt_completion"),
        (Use.preference, {"prompt": "p", "chosen": "a", "rejected": "b"}, {"system": "s"}, "=pref"),
        (Use.prompt, {"prompt": "p"}, {"question": "q"}, "data.format=prompt"),
        (Use.prompt, {"prompt": "p"}, {"weight": 1.0}, ""),
        (Use.sft, {"text": "x"}, {"weight": 1.0}, "data.weight_column=null"),
        (Use.sft, {"text": "x"}, {"notes": "n"}, ""),
    ],
)
def test_the_next_command_reads_columns_that_only_later_rows_have(
    tmp_path: Path, kind: Use, row: dict[str, Any], later: dict[str, Any], named: str
) -> None:
    """A file is recognised by its first 20 rows; each of the others has to be read too."""
    rows = [{key: f"{value} {i}" for key, value in row.items()} for i in range(30)]
    rows[-1] |= later
    (tmp_path / "out").mkdir()
    written = outputs.Outputs(tmp_path / "out")
    for number, columns in enumerate(rows):
        written.write(Item(columns, "a.jsonl", number))
    files = written.close(held_out=False)
    assert len(written.examples) == 2
    command = outputs.next_command(kind, files, DataConfig(), written.examples)
    assert named in command and ("data.format" in command or "column" in command) == bool(named)
    cfg = composing.compose(shlex.split(command)[3:])
    request = reading.DataRequest.of(cfg)
    assert request.use is kind
    loaded = reading.load(request, reading.required_sources(request), kind)
    assert len(loaded.records) == 30


# ---- renaming ----


def test_columns_are_renamed_before_the_format_is_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "q", "text": "an aside", "answer": "a"}])
    cfg = config(tmp_path, path=path, columns={"prompt": "question", "completion": "answer"})
    out, _, _ = items(cfg, Use.sft)
    assert [item.columns for item in out] == [{"prompt": "q", "completion": "a"}], (
        "text has a meaning of its own, so it doesn't stay"
    )
    assert re.search(r"'text'.*\(1 rows, the first .*a.jsonl, row 1\)", caplog.text)


@pytest.mark.parametrize(
    ("row", "columns", "expected", "lost"),
    [
        ({"a": 1, "b": 2}, {"a": "b"}, {"a": 2}, ["a"]),
        ({"b": 2, "a": 1}, {"a": "b"}, {"a": 2}, ["a"]),
        ({"a": 2, "b": 2}, {"a": "b"}, {"a": 2}, []),
        ({"a": "", "b": 2}, {"a": "b"}, {"a": 2}, []),
        ({"a": 1, "b": 2}, {"a": "b", "own_a": "a"}, {"a": 2, "own_a": 1}, []),
        ({"a": 1, "b": 2}, {"a": "b", "b": "a"}, {"b": 1, "a": 2}, []),
        ({"a": 1}, {"x": "missing"}, {"a": 1}, []),
        ({"a": 1}, {"a": "missing"}, {"a": 1}, []),
    ],
)
def test_a_column_whose_name_another_one_gets_is_noted(
    row: dict[str, Any], columns: dict[str, str], expected: dict[str, Any], lost: list[str]
) -> None:
    notes: list[str] = []
    assert sources.renamer(columns)(row, notes) == expected
    assert len(notes) == len(lost)
    for name, note in zip(lost, notes, strict=True):
        assert repr(name) in note and f"'own_{name}: {name}'" in note


YES = {"role": "assistant", "content": "yes"}


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings: whether information is logged, too, depends on the tests before."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_column_that_is_not_carried_is_counted_with_its_first_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "p", "q": "is it?", "completion": "c"}] * 2
    path = jsonl(tmp_path / "a.jsonl", [{**rows[0], "prompt": "is it?"}, *rows])
    cfg = config(tmp_path, path=path, columns={"prompt": "q"})
    out, _, _ = items(cfg, Use.sft)
    assert [item.columns["prompt"] for item in out] == ["is it?"] * 3
    assert re.search(r"'prompt'.*'q'.*\(2 rows, the first .*a.jsonl, row 2\)", caplog.text)
    caplog.clear()
    carried = config(tmp_path, path=path, columns={"prompt": "q", "own_prompt": "prompt"})
    out, _, _ = items(carried, Use.sft)
    assert [item.columns["own_prompt"] for item in out] == ["is it?", "p", "p"]
    assert not warned(caplog)
    copies = [{"prompt": "is it?", "messages": [{"role": "user", "content": "is it?"}, YES]}]
    cfg = config(tmp_path, path=jsonl(tmp_path / "c.jsonl", copies))
    out, _, _ = items(cfg, Use.sft)
    assert [list(item.columns) for item in out] == [["messages"]]
    assert not warned(caplog), "a question that stands in the conversation is not lost"
    classes = [{"text": "a b", "label": "sports"}, {"text": "c d", "label": None}]
    cfg = config(tmp_path, path=jsonl(tmp_path / "b.jsonl", classes))
    out, _, _ = items(cfg, Use.sft)
    assert [item.columns for item in out] == [{"text": "a b"}, {"text": "c d"}]
    assert re.search(r"'label'.*\(1 rows, the first .*b.jsonl, row 1\)", caplog.text)


# ---- data sets ----


def test_a_directory_that_datasets_saved(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(texts("a", 3)).save_to_disk(str(tmp_path / "one"))
    DatasetDict(
        {"train": Dataset.from_list(texts("t", 2)), "test": Dataset.from_list(texts("e", 1))}
    ).save_to_disk(str(tmp_path / "many"))
    DatasetDict(
        {"x": Dataset.from_list(texts("t", 2)), "y": Dataset.from_list(texts("e", 1))}
    ).save_to_disk(str(tmp_path / "odd"))
    cfg = config(tmp_path, path=str(tmp_path / "one"))
    assert read(cfg) == ["a 0", "a 1", "a 2"]
    assert [p.suffix for p in sources.data_files(cfg.data)] == [".arrow"]
    assert read(config(tmp_path, path=str(tmp_path / "many"))) == ["t 0", "t 1"]
    assert read(config(tmp_path, path=str(tmp_path / "many"), split="test")) == ["e 0"]
    assert len(read(config(tmp_path, path=f"{tmp_path / 'one'}#2"))) == 2
    train, held = reading.sft_rows(
        reading.DataRequest.of(
            config(tmp_path, path=str(tmp_path / "one"), eval_path=str(tmp_path / "many"))
        )
    )
    assert (len(train), len(held)) == (3, 2)
    with pytest.raises(UserError, match=r"splits are x, y: .*data.split"):
        read(config(tmp_path, path=str(tmp_path / "odd")))
    with pytest.raises(UserError, match=r"splits are train, test: .*'dev'"):
        read(config(tmp_path, path=str(tmp_path / "many"), split="dev"))
    with pytest.raises(UserError, match=r"expected no split, found 'train'"):
        read(config(tmp_path, path=str(tmp_path / "one"), split="train"))
    (tmp_path / "one" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"not a readable datasets directory"):
        read(config(tmp_path, path=str(tmp_path / "one")))


def test_a_hub_name_that_cannot_be_reached_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    assert datasets.config.HF_HUB_OFFLINE, "the tests use no network"
    with pytest.raises(
        UserError,
        match=r"data.path=owner/name: .*hub",
    ):
        read(config(tmp_path, path="owner/name"))
    with pytest.raises(UserError, match=r"data.path=rows.jsonl: no such file"):
        read(config(tmp_path, path="rows.jsonl"))
    path = jsonl(tmp_path / "a.jsonl", texts("a", 1))
    with pytest.raises(
        UserError,
        match=r"expected no split, found 'train'",
    ):
        read(config(tmp_path, path=path, split="train"))


def test_a_hub_name_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's side is played by data on disk: which calls are made, with what, and what becomes
    of the rows.
    """
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, subset, split, streaming))
        return datasets.Dataset.from_list(texts("h", 4)).to_iterable_dataset()

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(config(tmp_path, path="owner/name", subset="en", split="test")) == [
        "h 0",
        "h 1",
        "h 2",
        "h 3",
    ]
    assert calls == [("owner/name", "en", "test", True)]
    assert len(read(config(tmp_path, path="owner/name#3"))) == 3


# ---- MT-Bench ----


def test_judgments_are_joined_with_their_texts(tmp_path: Path) -> None:
    questions = jsonl(
        tmp_path / "question.jsonl", [{"question_id": 81, "category": "w", "turns": ["q", "r"]}]
    )
    answers = [
        {
            "question_id": 81,
            "answer_id": m,
            "model_id": m,
            "choices": [{"index": 0, "turns": [f"{m}1", f"{m}2"]}],
        }
        for m in "mn"
    ]
    jsonl(tmp_path / "answers" / "m.jsonl", answers[:1])
    jsonl(tmp_path / "answers" / "n.jsonl", answers[1:])
    game = {
        "question_id": 81,
        "model_1": "m",
        "model_2": "n",
        "g1_winner": "model_2",
        "g2_winner": "model_2",
        "judge": ["j", "pair-v2"],
        "turn": 1,
    }
    path = jsonl(tmp_path / "judgments.jsonl", [game, game | {"g2_winner": "tie"}])
    cfg = config(
        tmp_path, RewardStage(), path=path, join=[questions, f"{tmp_path}/answers/*.jsonl"]
    )
    out, rejected, set_aside = items(cfg, Use.preference)
    assert [(i.columns["prompt"], i.columns["chosen"], i.columns["rejected"]) for i in out] == [
        (
            [{"role": "user", "content": "q"}],
            [{"role": "assistant", "content": "n1"}],
            [{"role": "assistant", "content": "m1"}],
        )
    ]
    assert not rejected and set_aside == [(2, "a tie: game 1 says model_2, game 2 tie")]
    assert len(sources.data_files(cfg.data)) == 4
    _, rejected, _ = items(config(tmp_path, RewardStage(), path=path), Use.preference)
    for part in ("question", "data.join=[questions, answers]"):
        assert part in rejected[0][1]
    _, rejected, _ = items(
        config(tmp_path, RewardStage(), path=path, join=[questions]), Use.preference
    )
    for part in ("answers", "data.join=[questions, answers]"):
        assert part in rejected[0][1]
    twice = jsonl(tmp_path / "more.jsonl", [{"question_id": 81, "turns": ["another"]}])
    with pytest.raises(UserError, match=r"more.jsonl, row 1: 81 .*second time"):
        items(config(tmp_path, RewardStage(), path=path, join=[questions, twice]), Use.preference)
    with pytest.raises(UserError, match=r"judgments.jsonl, row 1: data.join expects"):
        items(config(tmp_path, RewardStage(), path=path, join=[path]), Use.preference)


# ---- what is set aside ----


def test_ties_do_not_count_as_bad_rows_but_are_kept_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {
            "pair_id": str(i),
            "prompt": f"p{i}",
            "response_a": "x",
            "response_b": "y",
            "preference": ("a", "tie", "skip")[i % 3],
        }
        for i in range(9)
    ]
    cfg = config(tmp_path, RewardStage(), path=jsonl(tmp_path / "sheet.jsonl", rows))
    train, held = reading.preference_pairs(reading.DataRequest.of(cfg))
    assert len(train) + len(held) == 3
    assert (
        "6 judgements give no pair" in caplog.text and "row 2: a tie; row 3: a skip" in caplog.text
    )
    kept = [
        json.loads(line)
        for line in (tmp_path / "runs" / "r" / "data_rejected.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert [(k["row"], k["reason"], k["set_aside"]) for k in kept][:2] == [
        (2, "a tie", True),
        (3, "a skip", True),
    ] and len(kept) == 6
    _, rejected, set_aside = items(cfg, Use.preference)
    assert not rejected and len(set_aside) == 6


def test_a_bad_judgement_is_still_a_bad_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response_a": "x", "response_b": "y", "preference": said}
        for said in ("a", "tie", "c")
    ]
    with pytest.raises(
        UserError,
        match=r"1 of 3 .*label_sheet .*row 3: key 'preference': expected a, b, tie or skip",
    ):
        reading.preference_pairs(
            reading.DataRequest.of(
                config(tmp_path, RewardStage(), path=jsonl(tmp_path / "sheet.jsonl", rows))
            )
        )


def test_only_ties_leave_nothing_to_train(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", "preference": "tie"}]
    with pytest.raises(UserError, match=r"holds no row that fits"):
        reading.preference_pairs(
            reading.DataRequest.of(
                config(tmp_path, RewardStage(), path=jsonl(tmp_path / "sheet.jsonl", rows))
            )
        )


# ---- items ----


def test_items_have_canonical_columns_and_their_own_others(tmp_path: Path) -> None:
    row = {
        "instruction": "Hi",
        "input": "",
        "output": "Hello",
        "topic": "greeting",
        "label": 3,
        "system": "Be kind.",
    }
    out, _, _ = items(config(tmp_path, path=jsonl(tmp_path / "a.jsonl", [row])), Use.sft)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert [item.columns for item in out] == [
        {
            "prompt": chat,
            "completion": [{"role": "assistant", "content": "Hello"}],
            "topic": "greeting",
        }
    ]
    assert out[0].place == f"{tmp_path}/a.jsonl, row 1"


def test_a_pair_is_two_items_where_answers_are_judged_alone(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y", "margin": 2}]
    )
    out, _, _ = items(config(tmp_path, path=path), Use.unpaired)
    assert [item.columns for item in out] == [
        {"prompt": "p", "completion": "x", "label": True},
        {"prompt": "p", "completion": "y", "label": False},
    ]


def test_rejected_rows_go_to_the_callback_and_texts_do_not_mix_with_conversations(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": "p"}, {"prompt": 3}, {"prompt": [{"role": "user", "content": "x"}]}]
    path = Path(jsonl(tmp_path / "a.jsonl", rows))
    with path.open("a", encoding="utf-8") as out:
        out.write("{\n")
    found, rejected, _ = items(config(tmp_path, OnlineStage(), path=str(path)), Use.prompt)
    assert [item.columns for item in found] == [{"prompt": "p"}]
    assert [number for number, _ in rejected] == [2, 3, 4]
    assert (
        rejected[1][1] == "expected text as in row 1, found messages"
        and "not valid JSON at line 4" in rejected[2][1]
    )


@pytest.mark.parametrize(
    ("row", "use"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Use.preference),
        ({"data": {"prompt": "p", "answer1": "a", "answer2": "b"}}, Use.preference),
        ({"prompt": "p", "completion": "a", "label": True}, Use.unpaired),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            Use.sft,
        ),
        ({"prompt": "p"}, Use.prompt),
    ],
)
def test_what_rows_are_by_themselves(tmp_path: Path, row: dict[str, Any], use: Use) -> None:
    assert ingest.natural_use(DataConfig(path=jsonl(tmp_path / "a.jsonl", [row]))) is use


def test_rows_of_two_kinds_or_none(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p"}])
    jsonl(tmp_path / "b.jsonl", texts("b", 1))
    with pytest.raises(UserError, match=r"expected .*one kind, found prompt, sft"):
        ingest.natural_use(DataConfig(path=f"{tmp_path}/*.jsonl"))
    with pytest.raises(UserError, match=r"a.jsonl, row 1: .*Nearest format: text"):
        ingest.natural_use(DataConfig(path=jsonl(tmp_path / "a.jsonl", [{"txt": "p"}])))


def test_nothing_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.path is not set"):
        read(config(tmp_path))
    with pytest.raises(UserError, match=r"data.eval_path is not set"):
        read(config(tmp_path), "eval")
