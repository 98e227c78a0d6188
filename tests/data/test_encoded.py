"""Rows encoded once: the same for any number of processes and ranks, kept by content, made anew
where they are damaged.
"""

import fcntl
import json
import logging
import multiprocessing
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config, DataConfig, RunConfig
from conf.stages import SFTStage
from rlhf.data import encoded as store_module
from rlhf.data.converting import Record
from rlhf.data.encoded import ABOUT_FILE, LOCK_FILE, ROWS_FILE, Store, content_key, encoded
from rlhf.data.loading import DataRequest
from rlhf.models.turns import LISTED_ENDS
from rlhf.process import distributed, parallel
from rlhf.types import UserError
from tests.models import families
from tests.offline.trl_tools import tiny_tokenizer


@dataclass(frozen=True)
class Letters:
    """A row's length and letters; counts rows with an x, leaves out those with a y, refuses a z."""

    tokenizer: Any
    most: int = 9

    def options(self) -> dict[str, Any]:
        return {"most": self.most}

    def columns(self) -> dict[str, str]:
        return {"ids": "ids", "size": "count", "text": "text"}

    def __call__(self, value: Any, counts: Counter[str]) -> dict[str, Any] | None:
        if "z" in value:
            raise ValueError(f"{value!r} has a z")
        counts["x"] += "x" in value
        if "y" in value:
            return None
        return {"ids": list(value.encode()), "size": len(value), "text": None if counts else value}


def rows(count: int, **changed: str) -> list[Record]:
    texts = [f"{i}{'x' * (i % 3 == 0)}{'y' * (i % 7 == 0)}" for i in range(count)]
    for number, text in changed.items():
        texts[int(number[1:])] = text
    return [Record(i, text, {}, "rows.jsonl") for i, text in enumerate(texts, 1)]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes are worth their start."""
    monkeypatch.setattr(parallel, "_WORTH_S", 0.0)


def entry(store: Store, encode: Any, records: list[Record]) -> Path:
    assert store.folder is not None
    return store.folder / content_key(encode, records)


@pytest.mark.usefixtures("at_once")
def test_any_number_of_processes_writes_the_same_file(tmp_path: Path) -> None:
    encode, records = Letters(tiny_tokenizer()), rows(5 * store_module.CHUNK + 3)
    files, results = set(), []
    for processes in (1, 2, 3):
        store = Store(tmp_path / str(processes), 0, processes)
        results.append(encoded(encode, records, store, "training"))
        files.add((entry(store, encode, records) / ROWS_FILE).read_bytes())
    assert len(files) == 1
    kept = [number for number, record in enumerate(records) if "y" not in record.value]
    for result in results:
        assert result.numbers == kept
        assert result.counts["x"] == sum("x" in record.value for record in records)
        first = result.data[0]
        assert list(result.data.features) == ["ids", "size", "text"]
        assert bytes(first["ids"]).decode() == records[kept[0]].value
        assert result.data[len(kept) - 1]["ids"] == list(records[kept[-1]].value.encode())


def test_the_same_rows_are_read_and_others_are_not(tmp_path: Path) -> None:
    store, tokenizer = Store(tmp_path), tiny_tokenizer()
    encode, records = Letters(tokenizer), rows(9)
    encoded(encode, records, store, "training")
    file = entry(store, encode, records) / ROWS_FILE
    made = file.stat().st_mtime_ns
    again = encoded(encode, records, store, "training")
    assert file.stat().st_mtime_ns == made and len(again.data) == 7
    moved = [Record(9, record.value, {}, "other.jsonl") for record in records]
    assert content_key(encode, moved) == file.parent.name, "names of files are no content"
    templated = tiny_tokenizer("{{ messages }}")
    wider, listed = tiny_tokenizer(), tiny_tokenizer()
    wider.add_tokens(["<new>"])
    vars(listed)[LISTED_ENDS] = (5,)  # as the model's files name it
    keys = {
        content_key(encode, records),
        content_key(encode, records[::-1]),
        content_key(encode, rows(9, r3="other")),
        content_key(Letters(tokenizer, 8), records),
        content_key(Letters(templated), records),
        content_key(Letters(wider), records),
        content_key(Letters(listed), records),
    }
    assert len(keys) == 7
    tokenizer("a b c", truncation=True, max_length=2)
    assert content_key(encode, records) in keys, "an earlier call changes nothing"
    tools = [Record(1, {"tools": keys}, {}, "") for keys in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    assert content_key(encode, tools[:1]) != content_key(encode, tools[1:]), "templates show order"


@pytest.mark.parametrize("damage", ["cut", "changed", "no rows", "no about", "bad about"])
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, encode, records = Store(tmp_path), Letters(tiny_tokenizer()), rows(9)
    whole = list(encoded(encode, records, store, "training").data)
    folder = entry(store, encode, records)
    content = (folder / ROWS_FILE).read_bytes()
    if damage == "cut":
        (folder / ROWS_FILE).write_bytes(content[:-9])
    elif damage == "changed":
        half = len(content) // 2
        (folder / ROWS_FILE).write_bytes(content[:half] + b"\xff" + content[half + 1 :])
    elif damage == "bad about":
        (folder / ABOUT_FILE).write_text('{"bytes"', encoding="utf-8")
    else:
        (folder / (ROWS_FILE if damage == "no rows" else ABOUT_FILE)).unlink()
    assert list(encoded(encode, records, store, "training").data) == whole
    assert (folder / ROWS_FILE).read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == [ABOUT_FILE, LOCK_FILE, ROWS_FILE]
    warned = " ".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert (str(folder) in warned) is (damage != "no about")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_row_is_named_by_file_and_row(
    tmp_path: Path, processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    encode, count = Letters(tiny_tokenizer()), 3 * store_module.CHUNK
    records = rows(count, r3="z first", **{f"r{count - 2}": "z last"})
    with pytest.raises(UserError, match=r"^rows.jsonl, row 4: 'z first' has a z\.$"):
        encoded(encode, records, Store(tmp_path, 0, processes), "training")
    with pytest.raises(UserError, match=rf"row {count - 1}: .*data.max_bad_rows=1"):
        encoded(encode, records, Store(tmp_path, 1, processes), "training")
    assert not list(tmp_path.rglob("*.arrow*")), "nothing is kept of rows that are refused"
    result = encoded(encode, records, Store(tmp_path, 2, processes), "training")
    assert result.bad == 2 and 3 not in result.numbers
    assert "rows.jsonl, row 4" in caplog.text and f"rows.jsonl, row {count - 1}" in caplog.text
    with pytest.raises(UserError, match="row"):  # also where they were encoded before
        encoded(encode, records, Store(tmp_path, 0, processes), "training")


def test_an_error_of_ours_names_the_row() -> None:
    with pytest.raises(TypeError) as caught:
        encoded(Letters(tiny_tokenizer()), [Record(5, 7, {}, "f.jsonl")], Store(), "training")
    assert caught.value.__notes__ == ["while encoding f.jsonl, row 5"]


@pytest.mark.usefixtures("at_once")
def test_a_killed_worker_ends_the_work(tmp_path: Path) -> None:
    import os

    class Dies(Letters):
        def __call__(self, value: Any, counts: Counter[str]) -> dict[str, Any] | None:
            if value == "dies":
                os._exit(9)
            return super().__call__(value, counts)

    count = 4 * store_module.CHUNK
    records = rows(count, **{f"r{count - 5}": "dies"})
    with pytest.raises(UserError, match="a process that worked on rows has ended"):
        encoded(Dies(tiny_tokenizer()), records, Store(tmp_path, 0, 2), "training")


# ---- several runs ----


class Slow(Letters):
    """Writes a letter into `log` for each row, and takes its time; for ever at the row `hangs`."""

    log: Path
    hangs = ""

    def __call__(self, value: Any, counts: Counter[str]) -> dict[str, Any] | None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write("r")
        time.sleep(60 if value == self.hangs else 0.002)
        return super().__call__(value, counts)


def started(encode: Any, records: list[Record], store: Store) -> Any:
    """A process that encodes the rows."""
    work = multiprocessing.get_context("fork").Process(
        target=encoded, args=(encode, records, store, "training")
    )
    work.start()
    return work


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_leaves_neither_half_a_file_nor_a_lock(tmp_path: Path, processes: int) -> None:
    class Encoder(Slow):
        log = tmp_path / "log"
        hangs = "hangs"

    count = 3 * store_module.CHUNK
    records = rows(count, **{f"r{count - 5}": "hangs"})
    store, encode = Store(tmp_path / "kept", 0, processes), Encoder(tiny_tokenizer())
    folder = entry(store, encode, records)
    work = started(encode, records, store)
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        if encode.log.exists() and encode.log.stat().st_size >= count - 4:
            break
        time.sleep(0.05)
    work.kill()
    work.join()
    left = {path.name for path in folder.iterdir()}
    assert ROWS_FILE not in left and ABOUT_FILE not in left and len(left) == 2
    Encoder.hangs = ""
    result = encoded(encode, records, store, "training")
    whole = encoded(Letters(tiny_tokenizer()), records, Store(), "training")
    assert list(result.data) == list(whole.data) and result.numbers == whole.numbers
    assert {path.name for path in folder.iterdir()} == {ABOUT_FILE, ROWS_FILE, LOCK_FILE}


def test_of_two_runs_one_encodes(tmp_path: Path) -> None:
    class Encoder(Slow):
        log = tmp_path / "log"

    records, store = rows(store_module.CHUNK), Store(tmp_path / "kept", 0, 1)
    encode = Encoder(tiny_tokenizer())
    other = started(encode, records, store)
    result = encoded(encode, records, store, "training")
    other.join()
    assert other.exitcode == 0 and len(encode.log.read_text(encoding="utf-8")) == len(records)
    whole = encoded(Letters(tiny_tokenizer()), records, Store(), "training")
    assert list(result.data) == list(whole.data)


def test_a_file_system_without_locks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    result = encoded(Letters(tiny_tokenizer()), rows(9), Store(tmp_path), "training")
    assert len(result.data) == 7 and LOCK_FILE in caplog.text


def test_where_rows_are_kept(tmp_path: Path) -> None:
    def store(dry_run: bool = False, **data: Any) -> Store:
        run = RunConfig(dir=str(tmp_path), name="r", dry_run=dry_run)
        return Store.of(DataRequest.of(Config(stage=SFTStage(), data=DataConfig(**data), run=run)))

    assert store().folder == tmp_path / ".encoded"
    assert store(cache_dir=str(tmp_path / "own")).folder == tmp_path / "own"
    assert store(cache=False).folder is None and store(dry_run=True).folder is None
    assert store(max_bad_rows=3).max_bad_rows == 3
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"file.*data.cache_dir.*data.cache=false"):
        encoded(Letters(tiny_tokenizer()), rows(3), Store(blocked / "in"), "training")


# ---- ranks ----


class Ranks:
    """Ranks as threads: what `distributed` exchanges goes through a barrier."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.mine = count, threading.local()
        self.values: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)
        monkeypatch.setattr(distributed, "_process_group", lambda: self)
        monkeypatch.setattr(distributed, "rank", lambda: self.mine.rank)
        monkeypatch.setattr(distributed, "local_rank", lambda: self.mine.rank)
        monkeypatch.setattr(distributed, "gather", self.gather)
        monkeypatch.setattr(distributed, "_BEAT_S", 0.0)

    def gather(self, value: Any) -> list[Any]:
        self.values[self.mine.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def run(self, work: Any) -> list[Any]:
        """What `work` of each rank returns or raises."""
        out: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            self.mine.rank = rank
            try:
                out[rank] = work(rank)
            except (UserError, KeyError) as error:
                out[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out


@pytest.mark.parametrize("kept", [True, False])
def test_one_rank_encodes_and_all_read(
    tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, calls = Ranks(3, monkeypatch), []

    class Counting(Letters):
        def __call__(self, value: Any, counts: Counter[str]) -> dict[str, Any] | None:
            calls.append(ranks.mine.rank)
            return super().__call__(value, counts)

    encode, records = Counting(tiny_tokenizer()), rows(2 * store_module.CHUNK)
    store = Store(tmp_path if kept else None, 0, 1)
    out = ranks.run(lambda rank: list(encoded(encode, records, store, "training").data))
    assert out[0] == out[1] == out[2] and len(out[0]) > store_module.CHUNK
    assert set(calls) == {0} and len(calls) == len(records)


def test_ranks_with_other_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, encode = Ranks(2, monkeypatch), Letters(tiny_tokenizer())
    store = Store(tmp_path)
    out = ranks.run(lambda rank: encoded(encode, rows(9 + rank), store, "training"))
    for error in out:
        assert isinstance(error, UserError) and "data.path" in str(error)


@pytest.mark.parametrize("failure", [UserError("row 3 is bad"), KeyError("of ours")])
def test_a_rank_that_fails_fails_all(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(3, monkeypatch)
    alive: list[int] = []

    def work(beat: Any) -> None:
        beat()
        beat()
        raise failure

    def one(rank: int) -> None:
        distributed.once_per_node(work, lambda: alive.append(rank))

    out = ranks.run(one)
    assert out[0] is failure
    assert all(isinstance(e, UserError) and str(failure) in str(e) for e in out[1:])
    assert Counter(alive) == {0: 3, 1: 3, 2: 3}, "each round is a sign of life"


def test_what_is_written_about_a_file(tmp_path: Path) -> None:
    store, encode, records = Store(tmp_path), Letters(tiny_tokenizer()), rows(9)
    encoded(encode, records, store, "training")
    folder = entry(store, encode, records)
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    assert about["rows"] == 9 and about["bytes"] == (folder / ROWS_FILE).stat().st_size
    assert about["counts"] == {"x": 3} and about["bad"] == []


def test_what_a_tokenizer_does_to_rows_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = families.made(("<s>", "</s>"), eos="</s>", bos="<s>", around="<s> $A")
    encoded(Letters(tokenizer), rows(8, _3="<s>a", _5="<s>b"), Store(), "training")
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    for part in ("training", "2 rows", "rows.jsonl, row 4", "'<s>'"):
        assert part in line
