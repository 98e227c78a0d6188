"""What a format is: the columns by which it is recognised, and the pure functions that turn its
rows into what stages use.

    sft         TRL columns: {"text"}, {"prompt", "completion"} or {"messages"}
    preference  rlhf.types.PreferencePair
    unpaired    rlhf.types.JudgedAnswer, or a PreferencePair that stands for two of them
    prompt      a string or a list of messages

A row that doesn't fit raises `RowError`, which says why. A row of judgements (ranks, several
annotators) gives any number of pairs, and a reason for each judgement that gives none, such as a
tie: such a row fits, but is set aside.

What every format's reader shares is here; what the writers share is in draft.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from rlhf.data.calls import missing, tools_of
from rlhf.data.formats.values import (
    has_pictures,
    replaced,
    require_messages,
    shows_tools,
    unread_inside,
)
from rlhf.data.media import picture_column, refuse_media
from rlhf.data.rows import (
    Chat,
    Row,
    RowError,
    margin_of,
    optional_text,
    text_or_chat,
    value_of,
)
from rlhf.process.wording import describe
from rlhf.types import JudgedAnswer, PreferencePair, Tools


class Use(Enum):
    """What a stage makes of a file."""

    sft = "sft"
    preference = "preference"
    unpaired = "unpaired"
    prompt = "prompt"


@dataclass(frozen=True, slots=True)
class Made:
    """One value that a row gives for a use, and the row's columns that are no part of it."""

    value: Any
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Several:
    """What a row of judgements gives: pairs, and the reason for each judgement that gives none."""

    pairs: list[Made] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on what was not read as it stands


@dataclass(frozen=True, slots=True)
class Format:
    """One format: its required columns, a further test of a row that has them, and a function for
    each use that its rows can be read for.
    """

    name: str  # as data.format names it
    keys: tuple[str, ...]  # required columns
    columns: str  # for messages
    sft: Callable[[Row], dict[str, Any]] | None = None
    pair: Callable[[Row], PreferencePair] | None = None
    pairs: Callable[[Row], Several] | None = None  # instead of `pair`
    unpaired: Callable[[Row], JudgedAnswer] | None = None
    prompt: Callable[[Row], str | Chat] | None = None
    test: Callable[[Row], bool] = field(default=lambda row: True)
    # columns that the prompt is made of: the others are a prompt's fields
    consumed: tuple[str, ...] = ()
    # columns that answers or texts are made of: no fields of a pair, an answer or a text
    answers: tuple[str, ...] = ()
    # a nested row as columns, before anything of it is read
    flatten: Callable[[Row], Row] = field(default=lambda row: row)
    # (consumed, answers) of a row, where they depend on its names
    find_columns: Callable[[Row], tuple[tuple[str, ...], tuple[str, ...]]] | None = None
    # columns that look like content and are known to be none, such as a reference answer
    not_content: Callable[[Row], tuple[str, ...]] = field(default=lambda row: ())
    # further fields of a prompt, such as a nested reference answer
    extra: Callable[[Row], dict[str, Any]] = field(default=lambda row: {})
    # keys that are read inside the prompt's and the answers' columns: paths, see `unread_inside`.
    # Without any their columns hold no objects
    read_inside: tuple[str, ...] = ()
    # of those columns the ones of which nothing is read
    ignored: tuple[str, ...] = ()
    # what of a row is taken, where a reader might expect otherwise; "" for nothing
    note: Callable[[Row], str] = field(default=lambda row: "")

    def taken(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns that a row's prompt is made of, and those of its answers."""
        return self.find_columns(row) if self.find_columns else (self.consumed, self.answers)

    def reads(self, use: Use) -> bool:
        """Whether its rows can be turned into `use`."""
        pairs = self.pair is not None or self.pairs is not None
        return {
            Use.sft: self.sft is not None,
            Use.preference: pairs,
            Use.unpaired: self.unpaired is not None or pairs,
            Use.prompt: self.prompt is not None,
        }[use]

    @property
    def natural_use(self) -> Use:
        """What its rows are by themselves: pairs, judged answers, texts, else prompts."""
        order = (Use.preference, Use.unpaired, Use.sft, Use.prompt)
        return next(use for use in order if self.reads(use))

    def read(self, row: Row, use: Use) -> Several:
        """What `row` gives for `use`, which `reads` must allow, the functions that its answers may
        call included. Raises RowError.
        """
        row = self.flatten(row)
        refuse_media(row)
        tools, column = tools_of(row)
        shown = picture_column(row)
        try:
            out = self._read({k: v for k, v in row.items() if k not in (column, shown)}, use)
        except KeyError as error:
            absent = [key for key in self.keys if key not in row]
            if not absent:
                raise
            raise missing(absent[0], list(row)) from error
        if shown is not None or any(has_pictures(made.value) for made in out.pairs):
            from rlhf.data.pictures import with_pictures

            pairs, notes = with_pictures(out.pairs, row, shown)
            out = replace(out, pairs=pairs, notes=[*out.notes, *notes])
        if tools is None:
            return out
        if any(shows_tools(made.value) for made in out.pairs):
            out.notes.append(f"the system message shows <tools>, so {column} is left out")
            return out
        for made in out.pairs:
            require_messages(made.value, str(column))
        return replace(out, pairs=[_with_tools(made, tools) for made in out.pairs])

    def unread_of(self, columns: Row) -> list[str]:
        """What of the prompt's and the answers' `columns` is not read: whole columns, and keys
        inside columns.
        """
        whole = [column for column in self.ignored if columns.get(column)]
        return [*whole, *unread_inside(columns, self.read_inside)]

    def _read(self, row: Row, use: Use) -> Several:
        single: Callable[[Row], Any] | None = {
            Use.sft: self.sft,
            Use.preference: self.pair,
            Use.unpaired: self.unpaired or self.pair,
            Use.prompt: self.prompt,
        }[use]
        consumed, answers = self.taken(row)
        used = consumed if use is Use.prompt else (*consumed, *answers)
        own = {key: value for key, value in row.items() if key not in used}
        held = {key: row[key] for key in used if key in row}
        notes = [f"{name} is not read" for name in self.unread_of(held)]
        if use is Use.prompt:
            own = {**self.extra(row), **own}
        if single is not None:
            return Several([Made(single(row), own)], notes=notes)
        assert self.pairs is not None
        out = self.pairs(row)
        pairs = [Made(made.value, own | made.fields) for made in out.pairs]
        notes += [note for made in pairs for note in replaced(own, made.fields)]
        return Several(pairs, out.set_aside, list(dict.fromkeys([*out.notes, *notes])))


def _with_tools(made: Made, tools: Tools) -> Made:
    """A value with the functions that its template shows; a prompt has them among its fields."""
    value = made.value
    if isinstance(value, (PreferencePair, JudgedAnswer)):
        return replace(made, value=replace(value, tools=tools))
    if isinstance(value, dict):
        return replace(made, value={**value, "tools": tools})
    return replace(made, fields={**made.fields, "tools": tools})


# ---- pairs ----


def make_pair(
    row: Row, prompt: str | Chat, chosen: str | Chat, rejected: str | Chat
) -> PreferencePair:
    """A pair with the margin of `row`. Raises RowError where the sides are the same, where prompt
    and sides are not all texts or all conversations, and for a side that shall not train.
    """
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        require_training(side, key)
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


def first_difference(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The index at which two sequences first differ; the shorter one's length when neither does."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def split_chats(
    chosen: Chat, rejected: Chat, keys: tuple[str, str] = ("chosen", "rejected")
) -> tuple[Chat, Chat, Chat]:
    """(shared prompt, chosen answer, rejected answer) of two whole conversations, found under
    `keys`. Raises RowError where they differ before their last message.
    """
    prompt, other = chosen[:-1], rejected[:-1]
    if prompt != other:
        raise RowError(
            f"keys {keys[0]!r} and {keys[1]!r}: expected conversations that differ in the last "
            f"message only, found another message {first_difference(prompt, other)}"
        )
    if not prompt:
        raise RowError(
            f"keys {keys[0]!r} and {keys[1]!r}: expected whole conversations, found the "
            "assistant's message alone and no prompt"
        )
    return prompt, chosen[-1:], rejected[-1:]


def prompt_of_pair(convert: Callable[[Row], PreferencePair]) -> Callable[[Row], str | Chat]:
    """A reader of prompts for rows whose prompt is known only once the pair is made."""

    def prompt(row: Row) -> str | Chat:
        shared = convert(row).prompt
        assert isinstance(shared, (str, list))
        if not shared:
            raise RowError(
                "keys 'chosen' and 'rejected': expected a prompt that the two answers share, "
                "found whole texts"
            )
        return shared

    return prompt


def both_sides(pair: PreferencePair) -> list[JudgedAnswer]:
    """A pair as a good answer and a bad one."""
    return [
        JudgedAnswer(pair.prompt, pair.chosen, True, pair.weight, pair.tools),
        JudgedAnswer(pair.prompt, pair.rejected, False, pair.weight, pair.tools),
    ]


def of_two(
    row: Row,
    prompt: str | Chat,
    first: str,
    second: str,
    choice: int,
    extra: Mapping[str, Any] | None = None,
) -> Made:
    """The pair of two answers of which number `choice` (1 or 2) was preferred, with the field
    `position` for it. Raises RowError.
    """
    chosen, rejected = (first, second) if choice == 1 else (second, first)
    pair = make_pair(row, prompt, answer_like(prompt, chosen), answer_like(prompt, rejected))
    return Made(pair, {**(extra or {}), "position": choice})


def ranked(
    prompt: str | Chat, answers: list[tuple[str, str, float]], extra: Mapping[str, Any]
) -> Several:
    """Every pair of differently ranked answers. `answers` are (name, text, rank), the smallest rank
    being the best; equal ranks are ties, which are set aside.

    A pair's fields are `extra`, rank_chosen and rank_rejected, and position: 1 where the chosen
    answer stands before the other. Raises RowError.
    """
    out = Several()
    for i, (name, text, rank) in enumerate(answers):
        for other_name, other_text, other_rank in answers[i + 1 :]:
            if rank == other_rank:
                out.set_aside.append(f"a tie: {name} and {other_name} share rank {rank:g}")
                continue
            if text == other_text:
                out.set_aside.append(
                    f"{name} and {other_name} are the same text with different ranks"
                )
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


# ---- prompts and answers ----


def assistant(text: str) -> Chat:
    """An answer as a conversation's turn."""
    return [{"role": "assistant", "content": text}]


def answer_like(prompt: str | Chat, text: str) -> str | Chat:
    """An answer in its prompt's form: a text after a text, a turn after a conversation."""
    if isinstance(prompt, list):
        return assistant(text)
    return text


def judged_chat(chat: Chat, key: str, good: bool) -> JudgedAnswer:
    """A conversation whose last turn is judged. Raises RowError."""
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise RowError(
            f"key {key!r}: expected a conversation that ends with the judged answer, found role "
            f"{chat[-1]['role']!r} at its end"
        )
    require_training(chat[-1:], key)
    return JudgedAnswer(prompt=chat[:-1], completion=chat[-1:], good=good)


def with_assistant(chat: Chat, key: str) -> Chat:
    """A conversation to train on. Raises RowError when it has no assistant's message, or none that
    trains.
    """
    turns = [m for m in chat if m["role"] == "assistant"]
    if not turns:
        raise RowError(
            f"key {key!r}: expected at least one assistant's message to train on, found none"
        )
    if not any(m.get("train", True) for m in turns):
        raise RowError(
            f"key {key!r}: expected at least one assistant's message to train on, found that each "
            "of them is marked not to be (weight 0, or loss, train or training false)"
        )
    return chat


def require_training(answer: str | Chat, key: str) -> None:
    """Raises RowError for an answer to compare or to judge that is marked not to be trained."""
    if isinstance(answer, list) and any(m.get("train") is False for m in answer):
        raise RowError(
            f"key {key!r}: expected an answer that trains, found one that is marked not to (weight "
            "0, or loss, train or training false)"
        )


def with_system(row: Row, chat: Chat, key: str, column: str = "system") -> Chat:
    """A conversation after the text of the column ``system`` (or `column`), where the row has one.
    Raises RowError where the conversation begins with another system message, or is empty.
    """
    if not chat:
        raise RowError(f"key {key!r}: expected a question, found none")
    system, first = optional_text(row, column), chat[0]
    if not system or (first["role"] == "system" and first["content"] == system):
        return chat
    if first["role"] == "system":
        raise RowError(
            f"keys {column!r} and {key!r}: expected one system message, found two that differ"
        )
    return [{"role": "system", "content": system}, *chat]


def has_chat(row: Row, key: str) -> bool:
    """Whether a column holds a list, as messages are."""
    return isinstance(row.get(key), list)


def prompt_or_nothing(row: Row, key: str) -> str | Chat:
    """A prompt that may be "", where the answers are whole texts. Raises RowError."""
    if value_of(row, key) == "":
        return ""
    return text_or_chat(row, key)
