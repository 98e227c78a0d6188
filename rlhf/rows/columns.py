"""What all kinds of encoded rows share: templates that are there, weights over their mean, and
lengths in tokens.

Tokens come from `rlhf.models.encoding`, as in every stage; `rlhf.data.encoded` makes them once and
keeps them in a file. Rows with a column ``weight`` keep it, divided by its mean over all rows
(SFT: over the tokens that train), so that the weights' scale means nothing and equal weights change
nothing. The mean is not a batch's, which would make a row's weight depend on the rows beside it.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf.data.converting import Record
from rlhf.data.encoded import Encoded, Store
from rlhf.models import encoding
from rlhf.models.templates import pictures_of, processor_of
from rlhf.types import PICTURES, WEIGHT, Picture, UserError

LOG = logging.getLogger("rlhf.stages")
Ids = list[int]
Row = dict[str, Any]
NOWHERE = Store()
SAMPLES = 4  # held-out rows that the trained policy continues
_BATCH = 1000  # rows that are looked at together


def require_template(
    tokenizer: Any, records: Sequence[Record], keys: Sequence[str], what: str
) -> None:
    """Raises UserError where some row is a conversation and the tokenizer has no template."""
    for record in records:
        if any(encoding.is_chat(record.value.get(key)) for key in keys):
            encoding.require_template(tokenizer, what)
            return


def with_weights(rows: Encoded, sizes: Sequence[int] | None = None) -> datasets.Dataset:
    """The rows with their weights over the mean in which row i counts `sizes[i]` times."""
    data = rows.data
    if WEIGHT not in data.column_names:
        return data
    weights = normalised(data[WEIGHT][:], sizes)
    return data.remove_columns(WEIGHT).add_column(WEIGHT, weights)


def weight_column(records: Sequence[Record]) -> dict[str, str]:
    """The column of weights, where the rows have them."""
    return {WEIGHT: "number"} if WEIGHT in records[0].value else {}


def picture_column(tokenizer: Any) -> dict[str, str]:
    """The column of the rows' pictures, where the model reads some."""
    return {PICTURES: "text"} if processor_of(tokenizer) is not None else {}


def shown_in(tokenizer: Any, *parts: Any) -> Row:
    """`picture_column` of a row that shows these conversations one after the other; texts among
    them hold no pictures.
    """
    if processor_of(tokenizer) is None:
        return {}
    found: list[Picture] = []
    for part in parts:
        if encoding.is_chat(part):
            found += pictures_of(part)
    return {PICTURES: json.dumps(found)}


def batches(rows: datasets.Dataset) -> Iterator[pa.Table]:
    yield from rows.with_format("arrow").iter(batch_size=_BATCH)


def read_batches(rows: datasets.Dataset) -> Iterator[pa.RecordBatch | pa.Table]:
    """All rows as they are in their file, read rather than mapped: whoever looks at every token
    would have the whole file counted as the process's memory. Rows of no file come from memory.
    """
    files = [file["filename"] for file in rows.cache_files]
    if not files:
        yield from batches(rows)
    for file in files:
        with pa.OSFile(file) as source, pa.ipc.open_stream(source) as reader:
            yield from reader


def lengths(rows: datasets.Dataset, column: str) -> np.ndarray:
    """How many tokens each row has in `column`, [N]."""
    parts = [pc.list_value_length(batch[column]).to_numpy() for batch in batches(rows)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def longest(rows: datasets.Dataset, *columns: str) -> int:
    """Tokens of the longest list in any of the `columns`."""
    return max(int(lengths(rows, column).max()) for column in columns)


def parts_of(
    train: datasets.Dataset, held_out: datasets.Dataset | None
) -> tuple[datasets.Dataset, ...]:
    """Training and held-out rows, where there are some."""
    return (train,) if held_out is None else (train, held_out)


def normalised(weights: Sequence[float], sizes: Sequence[int] | None = None) -> list[float]:
    """`weights` divided by their mean, in which row i counts `sizes[i]` times (once without sizes).

    Raises UserError when the mean is 0.
    """
    if len(set(weights)) == 1 and weights[0] > 0:
        return [1.0] * len(weights)
    counts = [1] * len(weights) if sizes is None else sizes
    mean = math.fsum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts)
    if mean <= 0:
        raise UserError(
            "data.weight_column: the weights of all rows that are short enough are 0, so nothing "
            "would be trained."
        )
    return [w / mean for w in weights]


def carried_of(value: Row, encode: Any) -> Row:
    return {name: value[name] for name in encode.carried}


def _warn_of_long(name: str, kept: int, total: int, max_length: int, rows: str) -> None:
    if kept < total:
        LOG.warning(
            "%s: %d of %d %s are longer than stage.max_length=%d tokens and are left out",
            name,
            total - kept,
            total,
            rows,
            max_length,
        )


def _none_left(name: str, total: int, max_length: int, rows: str) -> UserError:
    return UserError(
        f"{name}: each of the {total} {rows} is longer than stage.max_length={max_length} tokens."
    )


def short_enough(
    rows: Encoded, total: int, name: str, max_length: int, what: str
) -> datasets.Dataset:
    """The rows that were kept, with a warning of those that were too long. Raises UserError."""
    total -= rows.bad
    if not len(rows.data):
        raise _none_left(name, total, max_length, what)
    _warn_of_long(name, len(rows.data), total, max_length, what)
    return with_weights(rows)
