"""Nothing of a row is dropped in silence: whatever keys, nulls and types stand in a row of any
format, each key is carried, or its row is refused, or the key is counted aloud by name.
"""

import copy
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
from rlhf.data.formats import FORMATS, by_name
from rlhf.data.prepare import ingest
from rlhf.types import UserError
from tests.data.format_rows import all_rows, drawn
from tests.selection import marked_full

# names that rows, messages and judgements of ours have, as columns of somebody else's
OUR_NAMES = (
    "label",
    "margin",
    "text",
    "completion",
    "messages",
    "prompt",
    "system",
    "position",
    "annotator",
    "rank_chosen",
    "lead_time",
    "role",
    "name",
    "reasoning",
    "question",
    "context",
    "history",
)
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
    """Put one to three keys anywhere into `row`, with texts that occur nowhere else: keys that no
    format knows, or names of ours that are free there. Returns the texts by key.
    """
    added: dict[str, str] = {}
    for number in range(rng.randint(1, 3)):
        holder = rng.choice([row, *objects(row)])
        key, text = f"zz{number}_note", f"SENTINEL{number}x"
        if rng.random() < 0.3:
            key = rng.choice(OUR_NAMES)
        if key in holder or key in added:
            continue
        holder[key] = rng.choice([text, {"inner": text}, [text]])
        added[key] = text
    return added


def with_renames(row: Row, rng: random.Random) -> dict[str, str]:
    """One or two columns of `row` under names of ours or of its other columns (data.columns)."""
    sources = rng.sample(list(row), min(len(row), rng.randint(1, 2)))
    names = rng.sample([*row, "own", "instruction", "question"], len(sources))
    return dict(zip(names, sources, strict=True))


def with_other_types(row: Row, rng: random.Random) -> None:
    """Put a null, or a value of another type, under a key of `row`."""
    holder = rng.choice([found for found in objects(row) if found])
    holder[rng.choice(list(holder))] = copy.deepcopy(rng.choice(NULLS_AND_TYPES))


def read(data: DataConfig, caplog: pytest.LogCaptureFixture) -> str | None:
    """All that stage=data makes of a file with one row, and says of it; None where it is refused or
    set aside with a reason.
    """
    caplog.clear()
    reasons: list[str] = []
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
        columns = with_renames(row, rng) if rng.random() < 0.5 else {}
        path.write_text(json.dumps(row) + "\n")
        told = read(DataConfig(path=str(path), max_bad_rows=1, columns=columns), caplog)
        outcome = "refused" if told is None else "read"
        counts[f"{outcome}, renamed" if columns else outcome] += 1
        if told is None:
            continue
        for key, text in added.items():
            assert (
                text in told
                or _named(key, columns, told)
                or _counted_above(key, row, columns, told)
            ), f"{name}: {key} is gone from {json.dumps(row)} with data.columns={columns}"
    return counts


def _named(key: str, columns: dict[str, str], told: str) -> bool:
    """Whether a message names the key, or the column that it was called."""
    names = [key, *(ours for ours, theirs in columns.items() if theirs == key)]
    if key.startswith("zz"):
        return any(name in told for name in (key, *(f"'{name}'" for name in names)))
    return any(f"'{name}'" in told or f".{name} is not read" in told for name in names)


def _counted_above(key: str, row: Row, columns: dict[str, str], told: str) -> bool:
    """Whether a value that holds `key` was counted as a whole."""
    named = re.findall(r"(\S+) is not (?:read|carried)", told)
    named += re.findall(r"does not read (\S+)", told)
    counted = {path.split(".")[-1].strip("'") for path in named}
    counted |= {theirs for ours, theirs in columns.items() if ours in counted}
    holders = [found[name] for found in objects(row) for name in counted & found.keys()]
    return any(key in json.dumps(value) for value in holders)


@pytest.mark.parametrize("examples", marked_full([12, 160], keep=[12]))
def test_every_key_of_a_row_is_accounted_for(
    examples: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row of each format for each example: 160 examples are some 6,900 rows (make test-full)."""
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
    assert counts.total() == len(FORMATS) * examples
    assert counts["read"] > counts.total() / 6 and counts["refused"] > examples
    assert counts["read, renamed"] > counts.total() / 6 and counts["refused, renamed"] > examples


def test_keys_inside_a_column_are_named_by_their_path() -> None:
    columns = {"answers": [{"answer": "a", "rank": 1, "why": "x"}, {"answer": "b", "rank": 2}]}
    assert by_name("nectar").unread_of(columns) == ["answers[].why"]
    columns["answers"][1]["why"] = None
    columns["answers"][0]["why"] = ""
    assert by_name("nectar").unread_of(columns) == []
    assert by_name("preference").unread_of({"chosen": [{"zz": 1}]}) == []
