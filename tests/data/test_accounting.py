"""Nothing of a row is dropped in silence: whatever keys, nulls and types stand in a row of any
format, each key is carried, or its row is refused, or the key is counted aloud by name.
"""

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from conf.schema import DataConfig
from rlhf.data.formats.values import unread
from rlhf.data.prepare import ingest
from rlhf.types import UserError
from tests.data.format_rows import all_rows, drawn
from tests.selection import marked_full

NULLS_AND_TYPES: list[Any] = [None, "", 0, 1.5, True, [], {}, ["x"], {"x": "y"}, [None], "x"]
Row = dict[str, Any]


def objects(value: Any) -> Iterator[Row]:
    """Every object within a row, itself included."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from objects(inner)


def with_extra_keys(row: Row, rng: random.Random) -> dict[str, str]:
    """Put one to three keys that no format knows anywhere into `row`, with texts that occur nowhere
    else. Returns the texts by key.
    """
    added = {}
    for number in range(rng.randint(1, 3)):
        holder = rng.choice(list(objects(row)))
        key, text = f"zz{number}_note", f"SENTINEL{number}x"
        holder[key] = rng.choice([text, {"inner": text}, [text]])
        added[key] = text
    return added


def with_other_types(row: Row, rng: random.Random) -> None:
    """Put a null, or a value of another type, under a key of `row`."""
    holder = rng.choice([found for found in objects(row) if found])
    holder[rng.choice(list(holder))] = rng.choice(NULLS_AND_TYPES)


def read(row: Row, path: Path, caplog: pytest.LogCaptureFixture) -> str | None:
    """All that stage=data makes of a file with this row, and says of it; None where it is refused
    or set aside with a reason.
    """
    path.write_text(json.dumps(row) + "\n")
    caplog.clear()
    reasons: list[str] = []
    data = DataConfig(path=str(path), max_bad_rows=1)
    try:
        kind = ingest.natural_use(data)
        items = list(
            ingest.items(
                data,
                0,
                kind,
                lambda _, reason: reasons.append(reason),
                lambda _, reason: reasons.append(reason),
            )
        )
    except UserError as error:
        reasons.append(str(error))
        items = []
    assert all(reason.strip() for reason in reasons)
    if not items:
        assert reasons
        return None
    written = json.dumps([item.columns for item in items], default=str)
    return "\n".join([written, *reasons, *(record.getMessage() for record in caplog.records)])


def account(
    seed: int, rows: dict[str, Row], path: Path, caplog: pytest.LogCaptureFixture
) -> Counter[str]:
    """Read each of `rows`, changed; counts those that were read and those that were refused."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for name, original in rows.items():
        row = json.loads(json.dumps(original))
        other_types = rng.random() < 0.5
        if other_types:
            with_other_types(row, rng)
        added = with_extra_keys(row, rng)
        told = read(row, path, caplog)
        counts["refused" if told is None else "read"] += 1
        if told is None:
            continue
        for key, text in added.items():
            assert text in told or key in told or _counted_above(key, row, told), (
                f"{name}: {key} is gone from {json.dumps(row)}"
            )
    return counts


def _counted_above(key: str, row: Row, told: str) -> bool:
    """Whether a value that holds `key` was counted as a whole."""
    counted = {path.split(".")[-1] for path in re.findall(r"(\S+) is not read", told)}
    holders = [found[name] for found in objects(row) for name in counted & found.keys()]
    return any(key in json.dumps(value) for value in holders)


@pytest.mark.parametrize("examples", marked_full([12, 160], keep=[12]))
def test_every_key_of_a_row_is_accounted_for(
    examples: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """About 30 formats for each example: 160 examples are some 5,000 rows (make test-full)."""
    caplog.set_level(logging.INFO, logger="rlhf.data")
    counts: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(drawn())
    def run(d: Any) -> None:
        rows = all_rows(d)
        counts.update(account(len(counts) + counts.total(), rows, tmp_path / "r.jsonl", caplog))

    run()
    print(f"{counts.total()} rows: {dict(counts)}")
    assert counts.total() >= 30 * examples
    assert counts["read"] > counts.total() / 3 and counts["refused"] > examples


def test_keys_inside_a_column_are_named_by_their_path() -> None:
    columns = {"answers": [{"answer": "a", "rank": 1, "why": "x"}, {"answer": "b", "rank": 2}]}
    assert unread("nectar", columns) == ["answers[].why"]
    columns["answers"][1]["why"] = None
    columns["answers"][0]["why"] = ""
    assert unread("nectar", columns) == []
    assert unread("preference", {"chosen": [{"zz": 1}]}) == []
