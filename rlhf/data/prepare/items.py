"""Rows on their way through a pipeline, in one form whatever file they came from.

Columns are TRL's, which every stage reads (rlhf/data/formats), followed by the row's own others:

    sft         text | prompt, completion | messages
    preference  prompt ("" when the texts are whole), chosen, rejected, margin where there is one
    unpaired    prompt, completion, label
    prompt      prompt

A prompt or an answer is a text or a list of messages; beside messages may stand `tools`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from conf.preparation.base import StepOptions
from rlhf.data.calls import is_nothing
from rlhf.data.formats.base import Use
from rlhf.data.formats.values import CONTENT
from rlhf.data.messages import texts_of_message, with_texts
from rlhf.types import Message, UserError

# (a reward model's directory, [(prompt, chosen, rejected, tools)]) -> [(score of chosen, score of
# rejected)]
ScorePairs = Callable[[str, Sequence[tuple[Any, Any, Any, Any]]], Sequence[tuple[float, float]]]
Options_contra = TypeVar("Options_contra", bound=StepOptions, contravariant=True)


@dataclass(slots=True)
class Item:
    """One row. A step may change `columns` of the item that it was given; `origin` and `number`
    stay what they are.
    """

    columns: dict[str, Any]
    origin: str  # file, or the name of the source
    number: int  # row in it, from 1
    split: str = "train"  # set by the split step: train, eval
    # the columns and their JSON, for as long as they stay what they are
    written: tuple[dict[str, Any], str] | None = field(default=None, compare=False, repr=False)
    # what the next step asks of single rows (steps.py, KEYS)
    key: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.origin}, row {self.number}"


@dataclass(slots=True)
class Context:
    """What a step is given beside its items, and where it records what it did."""

    kind: Use
    seed: int
    folder: Path  # the run directory: a step's own files go below it
    split_done: bool = False  # a split step came before
    # an item that is left out, and why: never drop one in silence
    rejected: Callable[[Item, str], None] = lambda item, reason: None
    # the step's own figures for the report, as JSON can hold them
    figures: dict[str, Any] = field(default_factory=dict)
    # what a step of single rows counts; its figures are made of it (steps.py, FIGURES)
    tallies: Counter[Any] = field(default_factory=Counter)
    score_pairs: ScorePairs | None = None  # the stage gives it: reward/ is not ours to import


class Step(Protocol[Options_contra]):
    """A step's function (steps.py). A streaming step yields as it reads, any other may hold all
    items. Items that are kept stay in their order.
    """

    def __call__(
        self, options: Options_contra, items: Iterator[Item], context: Context
    ) -> Iterator[Item]: ...


def require_free(items: Iterable[Item], column: str, step: str, cure: str = "") -> None:
    """Raises UserError where a row has a column of its own, `column`, that `step` is to write.
    `cure`: what else than renaming the column helps.
    """
    for item in items:
        if not is_nothing(item.columns.get(column)):
            raise UserError(
                f"step {step}: {item.place} has a column {column!r} already, which the step would "
                f"write over. data.columns='{{own_{column}: {column}}}' keeps a file's column "
                f"under that name{cure}."
            )


def parts(columns: dict[str, Any]) -> list[tuple[str, str]]:
    """(where, text) of every text in the content columns: ("prompt", ...), ("chosen[0]", ...) for a
    message, ("chosen[0].reasoning_content", ...) for what else it holds.
    """
    out: list[tuple[str, str]] = []

    def note(where: str, text: str) -> str:
        out.append((where, text))
        return text

    replace_texts(columns, note)
    return out


def replace_texts(columns: dict[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """New columns with every text of the content columns as `change(where, text)` gives it; the
    given ones stay as they are.
    """
    out = dict(columns)
    for key in CONTENT:
        value = columns.get(key)
        if isinstance(value, str):
            out[key] = change(key, value)
        elif isinstance(value, list):
            out[key] = [
                with_texts(message, f"{key}[{i}]", change) for i, message in enumerate(value)
            ]
    return out


def shown_in(columns: dict[str, Any]) -> tuple[str, ...]:
    """The hashes of the pictures that a row shows, in their order."""
    out: list[str] = []
    for key in CONTENT:
        value = columns.get(key)
        if not isinstance(value, list):
            continue
        for message in value:
            out += [picture["sha256"] for picture in message.get("images", ())]
    return tuple(out)


def _lines(messages: Iterable[Message]) -> str:
    """What messages say, their calls included, a line each."""
    return "\n".join(text for message in messages for text in texts_of_message(message))


def joined(columns: dict[str, Any]) -> str:
    """All texts of a row in one, a line each: what lengths, duplicates and clusters look at unless
    an option says otherwise.
    """
    values = [columns[key] for key in CONTENT if columns.get(key)]
    texts = [_lines(value) if isinstance(value, list) else value for value in values]
    return "\n".join(text for text in texts if text)


def prompt_of(columns: dict[str, Any]) -> str:
    """The texts of what is asked: the prompt, or a conversation's turns before the last answer; of
    a whole text the text itself.
    """
    value = columns.get("prompt") or columns.get("messages")
    if isinstance(value, list):
        turns = value[:-1] if "messages" in columns and value[-1]["role"] == "assistant" else value
        return _lines(turns)
    return value or joined(columns)


def answers_of(columns: dict[str, Any]) -> dict[str, str]:
    """The texts that answer, by column: chosen and rejected, a completion, a conversation's
    assistant turns, or a whole text.
    """
    out = {}
    for key in ("chosen", "rejected", "completion", "text"):
        value = columns.get(key)
        if isinstance(value, str):
            out[key] = value
        elif value is not None:
            out[key] = _lines(value)
    if not out and isinstance(columns.get("messages"), list):
        out["messages"] = _lines(m for m in columns["messages"] if m["role"] == "assistant")
    return out
