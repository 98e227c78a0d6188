"""What is done once for several: rows read in parts where they are, what detectors ask of single
rows, a row's JSON, words without a pattern, ftfy only where it can change a text.
"""

import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.preparation.duplicates import ExactDuplicates
from rlhf.data.formats import Use
from rlhf.data.prepare import cleaning, held, words
from rlhf.data.prepare.exact import row_key
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.pipeline import run
from rlhf.data.prepare.steps import STEPS
from rlhf.data.prepare.store import columns_line, item_line, line, read_items
from rlhf.data.report.looked import Looked, over
from rlhf.process import parallel
from rlhf.process.libraries import require
from rlhf.types import UserError
from tests.data.preparation import sft

# ---- rows where they are ----

SLICES = [slice(None), slice(3, 90), slice(100, 170), slice(160, 400), slice(5, 50, 7), slice(9, 2)]


def test_parts_of_rows_on_disk_are_those_of_a_list(tmp_path: Path) -> None:
    everything = list(range(300))
    rows = held.OnDisk(iter(everything), tmp_path)
    some, far = [i for i in everything if i % 10], [0, 299, 5, 150]
    for kept, expected in [
        (rows, everything),
        (held.picked(rows, some), some),
        (held.picked(rows, far), far),
        (held.together(held.picked(rows, some[:150]), held.picked(rows, some[150:])), some),
        (held.Mapped(lambda row: -row, rows), [-row for row in everything]),
    ]:
        assert list(kept) == expected and len(kept) == len(expected)
        assert [list(kept[part]) for part in SLICES] == [expected[part] for part in SLICES]
        assert kept[-1] == expected[-1]
        with pytest.raises(IndexError):
            kept[len(expected)]


# ---- processes ----


def test_a_process_beside_gives_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.getpid()
    for cores in (1, 2):
        monkeypatch.setattr(parallel, "cores", lambda cores=cores: cores)
        result, process = parallel.beside(lambda: (6 * 7, os.getpid()))()
        assert result == 42 and (process == here) is (cores == 1)

        def refusing() -> int:
            raise UserError("not here")

        with pytest.raises(UserError, match="not here"):
            parallel.beside(refusing)()


def test_a_process_beside_that_was_killed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    with pytest.raises(UserError, match="ended before its work"):
        parallel.beside(lambda: os._exit(9))()


AFTER_THREADS = """
import numpy as np
from sklearn.cluster import KMeans
from rlhf.data.prepare.items import Item
from rlhf.data.report.content import cluster
from rlhf.data.report.numbered import number
from rlhf.process import parallel

KMeans(8, n_init=1).fit(np.random.rand(3000, 20))
texts = (f"{word} {word} {i % 7}" for word in ("sea", "bread", "goal") for i in range(400))
rows = number([Item({"text": text}, "a.jsonl", i) for i, text in enumerate(texts, 1)])
print(len(parallel.beside(lambda: cluster(rows, 0), processes=2)().members))
"""


def test_clusters_beside_are_found_after_threads_of_openmp() -> None:
    """Step balance clusters in the process that the report forks: a fork has no threads."""
    program = [sys.executable, "-c", AFTER_THREADS]
    threads = os.environ | {"OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        program, env=threads, capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "1200\n"


# ---- one pass ----


def lengths(items: Sequence[Item]) -> list[int]:
    return [len(item.columns["text"]) for item in items]


def refusing(items: Sequence[Item]) -> int:
    raise UserError("the package is not installed")


def test_one_pass_gives_what_each_function_gives_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.data.report.looked.PART", 4)
    rows = sft(*("x" * n for n in range(10)))
    both = Looked(rows, [lengths, refusing])
    assert list(both) == rows and both[2:4] == rows[2:4] and len(both) == 10
    for items in (both, both, rows):  # handed out once, then asked again
        assert [*over(lengths, items)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        with pytest.raises(UserError, match="not installed"):
            list(over(refusing, items))


# ---- a row's JSON ----

ODD = ["plain", "é \u2028 你好", 'a "b"\n\\', "lone \ud800", ""]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("origin", ["a.jsonl", 'ä/"b".jsonl', "\udcff.jsonl"])
def test_lines_are_those_of_the_whole_row(text: str, origin: str) -> None:
    item = Item({"text": text, "n": [1.5, None, {"k": True}]}, origin, 3, "eval")
    for _ in range(2):
        assert item_line(item) == line([origin, 3, "eval", item.columns])
        assert columns_line(item) == line(item.columns)


def test_a_step_that_changes_rows_where_they_are_has_them_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def balance(options: object, items: Sequence[Item], context: Context) -> Sequence[Item]:
        for item in items:
            item.columns["weight"] = 0.5 * item.number
            yield item

    monkeypatch.setitem(STEPS, "balance", balance)
    rows = sft(*(f"row  {number} {chr(97 + number) * 9}" for number in range(8)))
    balancing = {"step": "balance", "column": "text"}
    steps = ["repair", "exact_duplicates", balancing, {"step": "split", "by": "row"}]
    out = run(rows, steps, kind="sft", folder=tmp_path, identity="x")
    assert [row.columns["weight"] for row in out.items] == [0.5 * n for n in range(1, 9)]
    for folder in ("03-balance", "04-split"):
        kept = list(read_items(tmp_path / "steps" / folder))
        assert [row.columns for row in kept] == [row.columns for row in out.items]
    for row in out.items:
        assert json.loads(columns_line(row)) == row.columns


def test_keys_of_equal_texts_are_equal_whoever_makes_them(tmp_path: Path) -> None:
    rows = sft("One text.", "one  TEXT.", "another one", "One text.")
    keys = [row_key(ExactDuplicates(), row.columns, Use.sft) for row in rows]
    assert keys[0] == keys[1] == keys[3] != keys[2]
    found = []
    for steps in (["exact_duplicates"], ["repair", "exact_duplicates"]):
        own = sft("One text.", "one  TEXT.", "another one", "One text.")
        out = run(own, steps, kind="sft", folder=tmp_path)
        found.append([row.number for row in out.items])
        assert all(row.key is None for row in out.items)
    assert found == [[1, 3], [1, 3]]


# ---- words and characters ----


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abC9'-. \n_\t\x1c\x0b\x00\x7f,", max_size=90))
def test_ascii_words_are_those_of_the_pattern(text: str) -> None:
    tokens = words.words(text)
    assert tokens == words._ASCII_WORD.findall(text)
    for own in (tokens, [token.lower() for token in tokens]):
        assert words.lettered(own) == [t for t in own if re.search("[A-Za-z]", t)]
    assert words.visible(text) == len("".join(text.split()))


def test_plain_texts_hold_printed_ascii_only() -> None:
    plain = [chr(code) for code in range(0x200) if words.is_plain(chr(code), b"\t\n")]
    assert plain == ["\t", "\n", *map(chr, range(0x20, 0x7F))]


# ---- ftfy ----


def test_no_sequence_of_ftfys_heuristic_is_longer_than_what_is_looked_at() -> None:
    from re import _parser  # type: ignore[attr-defined]

    pattern = require("ftfy.badness", "data").BADNESS_RE
    assert _parser.parse(pattern.pattern, re.VERBOSE).getwidth()[1] <= cleaning._SEQUENCE
    assert not any(pattern.search(chr(a) + chr(b)) for a in range(128) for b in range(128))


def test_ftfy_is_left_out_only_where_it_changes_nothing() -> None:
    ftfy = require("ftfy", "data")
    rng = random.Random(3)
    said = [
        "café naïve",
        "“quoted”",
        "it\u2019s — fine",
        "你好世界",
        "Grüße",
        "привет",
        "the film",
        "x.",
    ]
    wrong = ["Ã©tÃ©", "â€œhi", "Â£5", "\nÂ  x", "Ã  la", "e\u0301", "ﬁne", "\x85", "\r\n", "\ud800"]
    odd = [chr(c) for c in (*range(0x80, 0x250), *range(0x2000, 0x2070), *range(0x390, 0x480))]
    left_out = 0
    for number in range(4000):
        pool = said if number % 4 else [*said, *wrong, *odd]
        text = " ".join(rng.choice(pool) for _ in range(rng.randint(1, 30)))
        for form in ("NFC", "NFKC"):
            if cleaning._untouched(text, form):
                left_out += 1
                assert ftfy.fix_text(text, cleaning._ftfy_config(form)) == text
                assert unicodedata.normalize(form, text) == text
    assert left_out > 3000
    assert not any(cleaning._untouched(f"so {text} it is", "NFC") for text in wrong[:4] + wrong[6:])
