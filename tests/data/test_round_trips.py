"""Every format read, written and read again gives the same rows; a canonical row written without a
note comes back as it was.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.choices import FileKind
from conf.data import DataTarget
from rlhf.data import files, formats
from rlhf.data.formats import FORMATS, Use
from rlhf.data.formats.base import both_sides
from rlhf.data.formats.values import columns_of
from rlhf.data.rows import RowError
from rlhf.data.targets import TARGETS
from rlhf.data.writing import convert, write_rows
from rlhf.types import PreferencePair
from tests.data.format_rows import ANY_TEXT, TEXT, canonical, format_row

PAIRS_OF = [(target, kind) for target, kinds in TARGETS.items() for kind in kinds]
TEXTS_ONLY = (DataTarget.shp, DataTarget.csv, DataTarget.xlsx)


def read(row: dict[str, Any], kind: Use) -> list[dict[str, Any]]:
    """A file's row in canonical columns, its format detected by them."""
    found = formats.detect(row, kind)
    assert found is not None, f"no format for {row}"
    several = found.read(row, kind)
    assert not several.set_aside
    values = []
    for made in several.pairs:
        both = kind is Use.unpaired and isinstance(made.value, PreferencePair)
        values += [
            columns_of(value, made.fields, found.answers)
            for value in (both_sides(made.value) if both else [made.value])
        ]
    return values


def content(columns: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in columns.items()
        if k
        in ("text", "prompt", "completion", "messages", "chosen", "rejected", "margin", "label")
    }


def unheld(target: DataTarget, row: dict[str, Any]) -> str | None:
    """Why a target has no place for a row of the strategies; None where it has."""
    chat = isinstance(row["prompt"], list)
    if chat and target in TEXTS_ONLY:
        return "expected text"
    if chat and target is DataTarget.hh_rlhf and row["prompt"][0]["role"] == "system":
        return "role 'system': hh-rlhf has"
    margin = row.get("margin") or 0.0
    if target is DataTarget.alpaca_eval and 0 < margin <= 1 and 1.5 - margin / 2 == 1.5:
        return "too small for a preference beside a tie"
    return None


def test_every_target_has_a_writer() -> None:
    assert set(TARGETS) == set(DataTarget)
    assert all(kinds for kinds in TARGETS.values())


@pytest.mark.parametrize(("target", "kind"), PAIRS_OF, ids=lambda value: value.value)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
@given(data=st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_canonical_rows_come_back(
    target: DataTarget, kind: Use, chat: bool, data: st.DataObject
) -> None:
    """Without a note: the same row, own columns included. With one: what is read again is written
    and read without change.
    """
    row = data.draw(canonical(kind, chat))
    if (reason := unheld(target, row)) is not None:
        with pytest.raises(RowError, match=reason):
            convert(kind, row, target)
        return
    written, notes = convert(kind, row, target)
    again_kind = Use.unpaired if target is DataTarget.kto else kind
    back = [one for out in written for one in read(out, again_kind)]
    assert len(back) == (2 if target is DataTarget.kto and kind is Use.preference else 1)
    if not notes:
        assert content(back[0]) == content(row)
        assert {k: back[0].get(k) for k in row} == row
        return
    second = [
        one
        for columns in back
        for out in convert(again_kind, columns, target)[0]
        for one in read(out, again_kind)
    ]
    assert [content(one) for one in second] == [content(one) for one in back]


@pytest.mark.parametrize(("target", "kind"), PAIRS_OF, ids=lambda value: value.value)
def test_rows_that_a_target_is_made_for_need_no_note(target: DataTarget, kind: Use) -> None:
    """The property above isn't met by noting everything: a plain row of the target's own shape is
    held whole.
    """
    chat = target in (
        DataTarget.messages,
        DataTarget.sharegpt,
        DataTarget.alpaca,
        DataTarget.ultrafeedback,
        DataTarget.alpaca_eval,
    )
    prompt: Any = [{"role": "user", "content": "Hi"}] if chat else "Hi"
    if target is DataTarget.hh_rlhf:
        prompt = "\n\nHuman: Hi\n\nAssistant:"
    say: Any = (lambda text: [{"role": "assistant", "content": text}]) if chat else str
    row: dict[str, Any] = {
        Use.sft: {"prompt": prompt, "completion": say("Hello")},
        Use.preference: {"prompt": prompt, "chosen": say("Hello"), "rejected": say("No")},
        Use.unpaired: {"prompt": prompt, "completion": say("Hello"), "label": True},
        Use.prompt: {"prompt": prompt},
    }[kind]
    if kind is Use.sft and target in (DataTarget.messages, DataTarget.sharegpt):
        row = {"messages": [*prompt, *say("Hello")]}
    if target is DataTarget.alpaca_eval and kind is Use.preference:
        row["margin"] = 0.5
    _, notes = convert(kind, row, target)
    assert notes == (
        ["a pair becomes two judged answers"]
        if target is DataTarget.kto and kind is Use.preference
        else []
    )


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
@given(data=st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_every_format_read_written_and_read_again(
    format_: formats.Format, data: st.DataObject
) -> None:
    row = data.draw(format_row(format_.name))
    if format_.name != "hh_rlhf_messages":  # only where data.format asks for it
        assert formats.detect(row) is format_, "the columns tell the format"
    for kind in (kind for kind in Use if format_.reads(kind)):
        if (
            kind is Use.prompt
            and isinstance(row.get("chosen"), str)
            and format_.name == "implicit_preference"
        ):
            continue  # whole texts share no prompt
        first = [
            columns_of(made.value, made.fields, format_.answers)
            for made in format_.read(row, kind).pairs
        ]
        if kind is Use.unpaired and format_.unpaired is None:
            continue  # pairs, which the next kind covers
        assert first
        for columns in first:
            written, notes = convert(kind, columns, DataTarget.trl)
            assert not notes
            assert [read(out, kind) for out in written] == [[columns]], (
                "TRL's columns hold every row whole, own columns included"
            )
        for target in own_targets(format_.name, kind):
            for columns in first:
                written, notes = convert(kind, columns, target)
                back = [one for out in written for one in read(out, kind)]
                assert [content(one) for one in back] == [content(columns)], (target, notes)


def own_targets(name: str, kind: Use) -> list[DataTarget]:
    """The targets that write rows of the format `name`."""
    by_name = {
        "messages": DataTarget.messages,
        "swift_preference": DataTarget.messages,
        "messages_unpaired": DataTarget.messages,
        "sharegpt": DataTarget.sharegpt,
        "sharegpt_preference": DataTarget.sharegpt,
        "sharegpt_unpaired": DataTarget.sharegpt,
        "alpaca": DataTarget.alpaca,
        "alpaca_preference": DataTarget.alpaca,
        "alpaca_unpaired": DataTarget.alpaca,
        "unpaired": DataTarget.kto,
        "label_sheet": DataTarget.csv,
    }
    target = by_name.get(name, DataTarget[name] if name in DataTarget.__members__ else None)
    target = DataTarget.alpaca_eval if name == "alpaca_eval_annotation" else target
    return [target] if target is not None and kind in TARGETS[target] else []


@pytest.mark.parametrize("kind", FileKind, ids=lambda kind: kind.value)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"prompt": TEXT, "chosen": TEXT, "rejected": ANY_TEXT, "note": ANY_TEXT}
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_files_of_every_kind_hold_every_text(
    tmp_path: Path, kind: FileKind, rows: list[dict[str, str]]
) -> None:
    path = tmp_path / f"rows.{kind.value}"
    assert write_rows(rows, path, kind) == len(rows)
    assert files.read_rows(path) == rows
    assert files.count_rows(path) == len(rows)


@pytest.mark.parametrize(
    "kind", [FileKind.jsonl, FileKind.json, FileKind.parquet], ids=lambda kind: kind.value
)
@given(rows=st.lists(canonical(Use.preference, True), min_size=1, max_size=4))
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_files_that_nest_hold_conversations(
    tmp_path: Path, kind: FileKind, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / f"rows.{kind.value}"
    write_rows(rows, path, kind)
    back = [{k: v for k, v in row.items() if v is not None} for row in files.read_rows(path)]
    assert back == rows
