"""The files of ``stage=eval_reward``: pairs, answers, and scores along a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.files import scan
from rlhf.data.rows import Row, answer_of, finite, number_of, text_or_chat
from rlhf.process.files import digest
from rlhf.types import RowError, UserError


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and an answer to it, as a reward model reads them."""

    place: str  # file and row
    prompt: Any  # a text, or messages
    answer: Any  # a text, or messages that end with the assistant's


@dataclass(frozen=True, slots=True)
class PairRow:
    """A judged pair."""

    chosen: Text
    rejected: Text
    subset: str  # "" without one

    @property
    def group(self) -> str:
        """The same for pairs of one prompt."""
        return digest(self.chosen.prompt)


@dataclass(frozen=True, slots=True)
class Sample:
    """One of several answers to a prompt, with the row's numbers by column."""

    text: Text
    numbers: dict[str, float]

    @property
    def group(self) -> str:
        return digest(self.text.prompt)


def read_pairs(path: str, first: int | None = None) -> list[PairRow]:
    """The pairs of ``stage.pairs``; `first`: so many rows only. Raises UserError naming the row
    that doesn't fit.
    """
    out = []
    for place, row in _rows(path, "stage.pairs", first):
        with _placing(place):
            prompt = text_or_chat(row, "prompt")
            sides = [Text(place, prompt, answer_of(row, key)) for key in ("chosen", "rejected")]
            subset = row.get("subset")
            if subset is not None and not isinstance(subset, str):
                raise RowError(f"key 'subset': expected a text, found {subset!r}")
            out.append(PairRow(sides[0], sides[1], subset or ""))
    return out


def read_samples(path: str, columns: Sequence[str], first: int | None = None) -> list[Sample]:
    """The answers of ``stage.samples``, with the numbers of `columns`. Raises UserError naming the
    row that doesn't fit.
    """
    out = []
    for place, row in _rows(path, "stage.samples", first):
        with _placing(place):
            text = Text(place, text_or_chat(row, "prompt"), answer_of(row, "response"))
            out.append(Sample(text, {name: number_of(row, name) for name in columns}))
    return out


def read_curve(path: str, columns: Sequence[str]) -> tuple[list[list[float]], int]:
    """The numbers of `columns` in the rows of ``stage.curve`` that have all of them, and how many
    rows have not. Raises UserError where a column is in no row.
    """
    found, skipped = [], 0
    seen: set[str] = set()
    for _, row in _rows(path, "stage.curve", None):
        seen |= row.keys()
        numbers = [finite(row.get(name)) for name in columns]
        if any(number is None for number in numbers):
            skipped += 1
            continue
        found.append([number for number in numbers if number is not None])
    missing = [name for name in columns if name not in seen]
    if missing:
        raise UserError(
            f"stage.curve={path}: no row has {' and '.join(missing)}. Name the columns with "
            "stage.curve_kl, stage.curve_proxy and stage.curve_judge; there are: "
            f"{', '.join(sorted(seen)) or 'none'}."
        )
    return found, skipped


class _placing:
    """Errors of a row become UserErrors that name it."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RowError):
            raise UserError(f"{self._place}: {error}.") from error


def _rows(path: str, key: str, first: int | None) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    for row in scan(path, first, key):
        if row.problem is not None:
            raise UserError(f"{row.place}: {row.problem}.")
        rows.append((row.place, row.columns))
    if not rows:
        raise UserError(f"{key}={path} holds no rows: expected at least one.")
    return rows
