"""What a format is: the columns that tell it, and the pure functions that turn its rows into what
stages use.

    sft         TRL columns: {"text"}, {"prompt", "completion"} or {"messages"}
    preference  rlhf.types.PreferencePair
    unpaired    rlhf.types.JudgedAnswer, or a PreferencePair that stands for two of them
    prompt      a string or a list of messages

A row that doesn't fit raises `RowError`, which says why. A row of judgements (ranks, several
annotators) gives any number of pairs, and a reason for each judgement that gives none, such as a
tie: it fits, but is set aside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.data.rows import Chat, Row, RowError, margin_of, text_or_chat, value_of
from rlhf.process.wording import describe
from rlhf.types import JudgedAnswer, PreferencePair


class Use(Enum):
    """What a stage makes of a file."""

    sft = "sft"
    preference = "preference"
    unpaired = "unpaired"
    prompt = "prompt"


@dataclass(frozen=True, slots=True)
class Made:
    """What a row gives: a value of the use, and what else is known of it (the columns that are no
    part of the value).
    """

    value: Any
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Several:
    """What a row of judgements gives: pairs, and why a judgement gives none."""

    pairs: list[Made] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Format:
    """One format: the columns that tell it, a further test of a row that has them, and what it can
    be turned into.
    """

    name: str  # as data.format names it
    keys: tuple[str, ...]  # required columns
    columns: str  # for messages
    sft: Callable[[Row], dict[str, Any]] | None = None
    pair: Callable[[Row], PreferencePair] | None = None
    pairs: Callable[[Row], Several] | None = None  # in place of `pair`
    unpaired: Callable[[Row], JudgedAnswer] | None = None
    prompt: Callable[[Row], str | Chat] | None = None
    test: Callable[[Row], bool] = field(default=lambda row: True)
    consumed: tuple[str, ...] = ()  # columns that make the prompt; the others are a prompt's fields
    # columns that make the rest: no longer a row's own once it is turned into pairs, answers or
    # texts
    answers: tuple[str, ...] = ()

    def reads(self, use: Use) -> bool:
        """Whether its rows can be turned into `use`."""
        pairs = self.pair is not None or self.pairs is not None
        return {
            Use.sft: self.sft is not None,
            Use.preference: pairs,
            Use.unpaired: self.unpaired is not None or pairs,
            Use.prompt: self.prompt is not None,
        }[use]

    def read(self, row: Row, use: Use) -> Several:
        """What `row` gives for `use`, which `reads` allows. Raises RowError."""
        single: Callable[[Row], Any] | None = {
            Use.sft: self.sft,
            Use.preference: self.pair,
            Use.unpaired: self.unpaired or self.pair,
            Use.prompt: self.prompt,
        }[use]
        used = self.consumed if use is Use.prompt else (*self.consumed, *self.answers)
        own = {key: value for key, value in row.items() if key not in used}
        if single is not None:
            return Several([Made(single(row), own)])
        assert self.pairs is not None
        out = self.pairs(row)
        return Several([Made(made.value, own | made.fields) for made in out.pairs], out.aside)


def make_pair(
    row: Row, prompt: str | Chat, chosen: str | Chat, rejected: str | Chat
) -> PreferencePair:
    """A pair whose sides differ and are of one kind. Raises RowError."""
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise RowError(
            f"key 'rejected': expected what 'chosen' is ({describe(chosen)}), found "
            f"{describe(rejected)}"
        )
    if prompt and isinstance(prompt, list) != isinstance(chosen, list):
        raise RowError(
            f"key 'chosen': expected what 'prompt' is ({describe(prompt)}), found "
            f"{describe(chosen)}"
        )
    if chosen == rejected:
        raise RowError(
            "keys 'chosen' and 'rejected': expected two different answers, found the same twice"
        )
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin_of(row))


def split_chats(chosen: Chat, rejected: Chat) -> tuple[Chat, Chat, Chat]:
    """Two whole conversations as the prompt that they share and the two last turns. Raises RowError
    where they part earlier.
    """
    prompt, other = chosen[:-1], rejected[:-1]
    if prompt != other:
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b),
            min(len(prompt), len(other)),
        )
        raise RowError(
            "keys 'chosen' and 'rejected': expected conversations that differ in the last "
            f"message only, found another message {at}"
        )
    if not prompt:
        raise RowError(
            "keys 'chosen' and 'rejected': expected whole conversations, found the assistant's "
            "message alone and no 'prompt'"
        )
    return prompt, chosen[-1:], rejected[-1:]


def assistant(text: str) -> Chat:
    """An answer as a conversation's turn."""
    return [{"role": "assistant", "content": text}]


def answer_like(prompt: str | Chat, text: str) -> str | Chat:
    """An answer in its prompt's form: a text after a text, a turn after a conversation."""
    return assistant(text) if isinstance(prompt, list) else text


def judged_chat(chat: Chat, key: str, good: bool) -> JudgedAnswer:
    """A conversation whose last turn is judged. Raises RowError."""
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise RowError(
            f"key {key!r}: expected a conversation that ends with the judged answer, found role "
            f"{chat[-1]['role']!r} at its end"
        )
    return JudgedAnswer(prompt=chat[:-1], completion=chat[-1:], good=good)


def prompt_of_pair(convert: Callable[[Row], PreferencePair]) -> Callable[[Row], str | Chat]:
    """The prompt of rows whose prompt is known only once the pair is made."""

    def prompt(row: Row) -> str | Chat:
        found = convert(row).prompt
        assert isinstance(found, (str, list))
        if not found:
            raise RowError(
                "keys 'chosen' and 'rejected': expected a prompt that the two answers share, "
                "found whole texts"
            )
        return found

    return prompt


def with_assistant(chat: Chat, key: str) -> Chat:
    """A conversation to train on. Raises RowError."""
    if not any(m["role"] == "assistant" for m in chat):
        raise RowError(
            f"key {key!r}: expected at least one assistant's message to train on, found none"
        )
    return chat


def has_chat(row: Row, key: str) -> bool:
    """Whether a column holds a list, which messages are."""
    return isinstance(row.get(key), list)


def prompt_or_nothing(row: Row, key: str) -> str | Chat:
    """A prompt that may be "", where the answers are whole texts. Raises RowError."""
    return "" if value_of(row, key) == "" else text_or_chat(row, key)


def ranked(
    prompt: str | Chat, answers: list[tuple[str, str, float]], extra: Mapping[str, Any]
) -> Several:
    """Every pair of differently ranked answers: (name, text, rank), the smallest rank being the
    best. Equal ranks are ties, set aside.

    A pair's fields are `extra`, rank_chosen and rank_rejected, and position: 1 where the chosen one
    stood before the other. Raises RowError.
    """
    out = Several()
    for i, (name, text, rank) in enumerate(answers):
        for other_name, other_text, other_rank in answers[i + 1 :]:
            if rank == other_rank:
                out.aside.append(f"a tie: {name} and {other_name} share rank {rank:g}")
                continue
            if text == other_text:
                out.aside.append(f"{name} and {other_name} are the same text with different ranks")
                continue
            first = rank < other_rank
            chosen, rejected = (text, other_text) if first else (other_text, text)
            pair = PreferencePair(
                prompt, answer_like(prompt, chosen), answer_like(prompt, rejected)
            )
            fields = {
                "rank_chosen": min(rank, other_rank),
                "rank_rejected": max(rank, other_rank),
                "position": 1 if first else 2,
            }
            out.pairs.append(Made(pair, {**extra, **fields}))
    return out


def of_two(
    row: Row,
    prompt: str | Chat,
    first: str,
    second: str,
    choice: int,
    extra: Mapping[str, Any] | None = None,
) -> Made:
    """The pair of two answers of which the one at place `choice` (1 or 2) was preferred; its field
    `position` says so. Raises RowError.
    """
    chosen, rejected = (first, second) if choice == 1 else (second, first)
    pair = make_pair(row, prompt, answer_like(prompt, chosen), answer_like(prompt, rejected))
    return Made(pair, {**(extra or {}), "position": choice})
