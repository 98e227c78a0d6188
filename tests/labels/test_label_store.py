"""labels.jsonl: each label once, however often and in however many pieces it comes; a later
judgement counts; a kill loses and doubles nothing.
"""

import dataclasses
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.labels.checking import Checked, Outcome, Refused
from rlhf.labels.store import Added, Store, identity, keep_refused
from rlhf.types import UserError
from tests.labels.labels import label, pairs

EXPORT = pairs(4)
# the first two are the same moment
TIMES = ["2026-01-01T10:00:00+00:00", "2026-01-01T12:00:00+02:00", "2026-01-02T00:00:00Z"]


def labels_in(folder: Path) -> list[Checked]:
    with Store(folder) as store:
        return store.labels


def imported(folder: Path, *batches: list[Checked]) -> list[Added]:
    out = []
    for number, batch in enumerate(batches, start=1):
        with Store(folder) as store:
            out.append(store.add(batch, number))
    return out


@st.composite
def histories(draw: st.DrawFn) -> list[Checked]:
    """Labels of several annotators, some of them given more than once, at different times."""
    rows = []
    for annotator in ("ann", "bob", "c\ud800\u2028"):
        for task in EXPORT.tasks:
            said = draw(
                st.lists(
                    st.sampled_from([Outcome.first, Outcome.second, Outcome.tie, Outcome.skip]),
                    max_size=3,
                )
            )
            rows += [
                label(task, outcome, annotator, time=f"2026-01-0{day}", comment="c")
                for day, outcome in enumerate(said, start=1)
            ]
    return draw(st.permutations(rows))


@settings(deadline=None, max_examples=60)
@given(histories(), st.integers(0, 10**6))
def test_any_split_and_any_repetition_give_the_same_labels(rows: list[Checked], seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as at:
        once, split = Path(at) / "once", Path(at) / "split"
        [added] = imported(once, rows)
        assert (added.new + added.revised, added.known) == (len(rows), 0)
        bag = rows + [row for row in rows if rng.random() < 0.5]
        rng.shuffle(bag)
        cuts = sorted(rng.randrange(len(bag) + 1) for _ in range(3))
        batches = [bag[a:b] for a, b in zip([0, *cuts], [*cuts, len(bag)], strict=True)]
        imported(split, *batches)
        assert labels_in(split) == labels_in(once)
        before = (split / "labels.jsonl").read_bytes()
        again = imported(split, *batches, rows)
        assert sum(one.new + one.revised for one in again) == 0
        assert (split / "labels.jsonl").read_bytes() == before
        last: dict[tuple[str, str, str], Checked] = {}
        for row in sorted(rows, key=lambda row: str(row.time)):
            last[row.key] = row
        assert labels_in(split) == [last[key] for key in sorted(last)]


def test_a_file_cut_off_at_any_byte_is_made_whole_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand times, it takes most of the test
    rows = [
        label(task, Outcome.first, name, comment="\u00e9\u2028", time=TIMES[0])
        for name in ("ann", "bob")
        for task in EXPORT.tasks[:2]
    ]
    rows.append(label(EXPORT.tasks[0], Outcome.tie, "ann", time=TIMES[2]))
    imported(tmp_path / "whole", rows)
    whole = (tmp_path / "whole" / "labels.jsonl").read_bytes()
    torn = tmp_path / "torn"
    torn.mkdir()
    for cut in range(len(whole) + 1):
        (torn / "labels.jsonl").write_bytes(whole[:cut])
        with Store(torn) as store:
            assert len(store.stored) == whole[:cut].count(b"\n")
            store.add(rows, 1)
        assert (torn / "labels.jsonl").read_bytes() == whole


def test_the_later_judgement_counts_and_the_earlier_stays(tmp_path: Path) -> None:
    task = EXPORT.tasks[0]
    early, late = (
        label(task, Outcome.first, time=TIMES[0]),
        label(task, Outcome.second, time=TIMES[2]),
    )
    for name, order in (("forth", [early, late]), ("back", [late, early])):
        [added] = imported(tmp_path / name, order)
        assert (added.new, added.revised) == (1, 1)
        assert labels_in(tmp_path / name) == [late]
        with Store(tmp_path / name) as store:
            assert [(one.label, one.counts) for one in store.stored] == [
                (row, row is late) for row in order
            ]
    timeless = [dataclasses.replace(early, time=None), dataclasses.replace(late, time=None)]
    imported(tmp_path / "timeless", timeless[:1], timeless[1:], timeless[:1])
    assert labels_in(tmp_path / "timeless") == timeless[1:], (
        "read again, the first is not a third judgement"
    )
    back = label(task, Outcome.first, time="2026-02-01")
    assert imported(tmp_path / "forth", [back])[0].revised == 1
    assert labels_in(tmp_path / "forth") == [back], "the annotator came back to the first verdict"


def test_the_same_label_out_of_another_tool_is_the_same(tmp_path: Path) -> None:
    task = EXPORT.tasks[0]
    rich = label(
        task,
        Outcome.first,
        time=TIMES[0],
        ratings=(5, 1),
        comment="c",
        seconds=3.0,
        annotation="7",
        place="a.json, row 1",
    )
    for changes in (
        {"time": None},
        {"time": TIMES[1]},
        {"ratings": ()},
        {"ratings": (None, None)},
        {"comment": ""},
        {"seconds": 9.0},
        {"annotation": ""},
    ):
        assert imported(
            tmp_path, [rich], [dataclasses.replace(rich, place="b.csv, row 9", **changes)]
        )[1] == Added(known=1)
    for changes in (
        {"time": TIMES[2]},
        {"ratings": (5, 2)},
        {"comment": "d"},
        {"outcome": Outcome.tie},
    ):
        assert imported(tmp_path / str(changes), [rich], [dataclasses.replace(rich, **changes)])[
            1
        ] == Added(revised=1)
    for changes in ({"annotator": "bob"}, {"task": EXPORT.tasks[1].id}, {"export": "other"}):
        assert imported(tmp_path / str(changes), [rich], [dataclasses.replace(rich, **changes)])[
            1
        ] == Added(new=1)


def test_what_the_labels_say_is_one_whatever_file_they_came_from() -> None:
    row = label(EXPORT.tasks[0], Outcome.first, place="a")
    assert identity([row]) == identity([dataclasses.replace(row, place="b")])
    assert identity([row]) != identity([dataclasses.replace(row, outcome=Outcome.tie)])


def test_a_file_that_imports_did_not_write_is_refused(tmp_path: Path) -> None:
    imported(tmp_path, [label(task, Outcome.tie) for task in EXPORT.tasks])
    file = tmp_path / "labels.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for bad, message in (
        ("{\n", "line 2 can't be read"),
        ("[]\n", "line 2: expected an object"),
        ('{"export": 1}\n', "line 2: KeyError"),
    ):
        file.write_text(lines[0] + bad + "".join(lines[1:]))
        with pytest.raises(UserError, match=message):
            Store(tmp_path)
    file.write_text("".join(lines))
    assert len(labels_in(tmp_path)) == 4, "the refused opening left no lock"


def test_one_import_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(UserError, match="another import is writing it"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_refused_rows_are_kept_once(tmp_path: Path) -> None:
    rows = [
        Refused("f, row 1", "t-1", "edited", {"task": "t-1", "place": "f, row 1"}),
        Refused("f, row 2", "", "no id"),
    ]
    assert keep_refused(tmp_path, rows, 1) == 2
    assert (
        keep_refused(
            tmp_path, [*rows, Refused("f, row 1", "t-1", "other reason", {"task": "t-1"})], 2
        )
        == 1
    )
    kept = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [(row["place"], row["reason"], row["import"]) for row in kept] == [
        ("f, row 1", "edited", 1),
        ("f, row 2", "no id", 1),
        ("f, row 1", "other reason", 2),
    ]
