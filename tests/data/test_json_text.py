"""A key that stands twice in one object is refused with its row, however the file lies; all else is
read as json.loads reads it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import reading
from rlhf.data.calls import parsed, tools_of
from rlhf.data.files import scan
from rlhf.data.formats import Use
from rlhf.data.json_text import Repeated, decoder, repeated_key
from rlhf.types import RowError, UserError
from tests.labels.test_label_tools import request

TWICE = '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}'
INSIDE = (
    '{"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "", "role": "y"}]}'
)
GOOD = '{"prompt": "q", "chosen": "a", "rejected": "b"}'
SEVERAL_LINES = [text.replace(", ", ",\n") for text in (GOOD, TWICE, GOOD, INSIDE, GOOD)]
FILES = {
    "lines.jsonl": "\n".join([GOOD, TWICE, GOOD, INSIDE, GOOD]) + "\n",
    "array.json": f"[{','.join([GOOD, TWICE, GOOD, INSIDE, GOOD])}]",
    "objects.json": "\n".join(SEVERAL_LINES),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
)


@pytest.mark.parametrize("name", FILES)
def test_the_row_and_the_key_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    rows = list(scan(path))
    assert [row.problem for row in rows] == [
        None,
        "key 'chosen': it stands twice in one object, expected each key once",
        None,
        "key 'messages[1].role': it stands twice in one object, expected each key once",
        None,
    ]
    assert [row.columns for row in rows] == [
        json.loads(GOOD),
        {},
        json.loads(GOOD),
        {},
        rows[0].columns,
    ]
    with pytest.raises(UserError, match=r"2 of 5 rows.*row 2: key 'chosen': it stands twice"):
        reading.preference_pairs(request(path))


def test_a_broken_line_leaves_nothing_behind(tmp_path: Path) -> None:
    """What an unreadable row had read twice is not told of the next row."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{TWICE[:-1]}, {{"a": 1, "a": 2}}\n{GOOD}\n', encoding="utf-8")
    first, second = scan(path)
    assert "not valid JSON" in str(first.problem) and second.problem is None


@given(value=JSON)
def test_all_else_is_as_json_reads_it(value: Any) -> None:
    found: list[Repeated] = []
    text = json.dumps(value)
    assert decoder(found).decode(text) == json.loads(text) and found == []
    assert repeated_key(value) is None


def test_depth_is_no_trouble() -> None:
    found: list[Repeated] = []
    value = decoder(found).decode('{"a":' * 400 + '{"b":1,"b":2}' + "}" * 400)
    assert found == [{"b": 2}]
    assert repeated_key(value) == (
        f"key {'.'.join(['a'] * 400 + ['b'])!r}: it stands twice in one object, expected each key "
        "once"
    )


def test_texts_inside_a_row_are_read_alike() -> None:
    with pytest.raises(RowError, match=r"key 'tools': .*key 'name' stands twice in one object"):
        tools_of({"tools": '[{"name": "a", "name": "b"}]'})
    with pytest.raises(RowError, match=r"key 'k': expected an object, .*key 'x' stands twice"):
        parsed('{"x": 1, "x": 1}', "k", "an object")
    assert parsed('{"x": {"x": 1}}', "k", "an object") == {"x": {"x": 1}}


def test_a_row_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(FILES["lines.jsonl"], encoding="utf-8")
    asked = request(path)
    asked.data.max_bad_rows = 2
    loaded = reading.load(asked, reading.required_sources(asked), Use.preference)
    assert len(loaded.records) == 3
    rejected = next(tmp_path.rglob("*rejected.jsonl")).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["content"] for line in rejected] == [TWICE, INSIDE]
