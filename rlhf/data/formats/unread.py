"""Columns that belong to a row's content and that its format does not read: a question beside a
pair, an answer beside a prompt. A row's format is never guessed past them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.formats.base import Format, Use
from rlhf.data.formats.names import (
    HISTORIES,
    SYSTEMS,
    TURNS,
    Roles,
    holds_content,
    is_answer,
    is_question,
    plain,
    roles_of,
)
from rlhf.data.messages import texts_of_message
from rlhf.data.rows import Row
from rlhf.types import JudgedAnswer, PreferencePair

_MOST = 3  # remedies that a message names


def unread_columns(format_: Format, row: Row, use: Use | None) -> list[str]:
    """The columns of `row` that look like its content, and whose texts are no part of what
    `format_` reads. Where prompts are asked for, answers are their fields, which verifiers read;
    for rows of any kind (None) they are not. Raises RowError for a row that the format can't read.
    """
    columns = format_.flatten(row)
    out = [key for key in may_be_unread(format_, row, use) if _is_content(key, columns[key])]
    if not out:
        return []
    values = [made.value for made in format_.read(row, use or format_.natural_use).pairs]
    asked_only = use is None and format_.natural_use is Use.prompt
    return [
        key
        for key in out
        if (asked_only and not is_question(key))
        or not any(stands_in(key, columns[key], value) for value in values)
    ]


def may_be_unread(format_: Format, row: Row, use: Use | None) -> list[str]:
    """The columns that `format_` does not read and whose names are those of content."""
    row = format_.flatten(row)
    consumed, answers = format_.taken(row)
    known = {*consumed, *answers, *format_.not_content(row)}
    return [
        key
        for key in row
        if isinstance(key, str)
        and key not in known
        and (is_question(key) or (use is not Use.prompt and (is_answer(key) or _is_label(key))))
    ]


def _is_label(key: str) -> bool:
    return plain(key) in ("label", "labels")


def _is_content(key: str, value: Any) -> bool:
    if _is_label(key):
        # a sentence is an answer, a word is a class
        parts = value if isinstance(value, list) else [value]
        return any(isinstance(part, str) and len(part.split()) > 2 for part in parts)
    return holds_content(value)


def stands_in(key: str, column: Any, value: Any) -> bool:
    """Whether the texts of a column stand in what was read, or all of that in the column: a copy
    of the question or of an answer, the row rendered as one text, a list of the candidates.
    """
    texts = [text.strip() for text in texts_in(column)]
    if _all_within(texts, _part(key, value)):
        return True
    whole = value
    if isinstance(value, PreferencePair):
        whole = [value.chosen, value.rejected]
    # a format may join an instruction and its input otherwise than the text does
    pieces = [piece.strip() for text in texts_in(whole) for piece in text.split("\n\n")]
    return _all_within([piece for piece in pieces if piece], texts)


def _part(key: str, value: Any) -> list[str]:
    """The texts among which a copy of the column `key` may stand: the prompt's for a question, the
    answers' for an answer, all for a conversation.
    """
    if plain(key) in TURNS:
        return texts_in(value)
    question = is_question(key)
    if isinstance(value, PreferencePair):
        # of whole texts it is not known where the question ends
        return texts_in(value.prompt if question else [value.chosen, value.rejected])
    if isinstance(value, JudgedAnswer):
        return texts_in(value.prompt if question else value.completion)
    if isinstance(value, Mapping) and "completion" in value:
        return texts_in(value["prompt" if question else "completion"])
    return texts_in(value)


def _all_within(texts: Sequence[str], others: Sequence[str]) -> bool:
    return bool(texts) and all(any(_within(text, other) for other in others) for text in texts)


def _within(text: str, other: str) -> bool:
    """Whether `text` stands in `other`, not as a piece of a word."""
    at = other.find(text)
    if at < 0:
        return False
    before, after = other[at - 1 : at], other[at + len(text) : at + len(text) + 1]
    return not any(char.isascii() and char.isalnum() for char in before + after)


def texts_in(value: Any) -> list[str]:
    """Every text of a converted record: strings, and the contents of messages."""
    if isinstance(value, str):
        if value:
            return [value]
        return []
    if isinstance(value, PreferencePair):
        return texts_in([value.prompt, value.chosen, value.rejected, value.tools])
    if isinstance(value, JudgedAnswer):
        return texts_in([value.prompt, value.completion, value.tools])
    if isinstance(value, Mapping):
        if isinstance(value.get("content"), str) and "role" in value:
            return texts_of_message(value)
        if "value" in value and "from" in value:
            return texts_in(value["value"])
        return texts_in(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in texts_in(part)]
    return []


# ---- remedies ----


def remedies(row: Row, use: Use | None) -> list[str]:
    """The settings of data.columns that would make a row of these columns one of `use` (of any
    kind for None), the likeliest first.
    """
    roles = roles_of(row)
    out: list[str] = []
    for one in (use,) if use is not None else (Use.preference, Use.sft, Use.prompt):
        for columns in _mappings(row, roles, one):
            named = [f"{ours}: {theirs}" for ours, theirs in columns.items() if ours != theirs]
            setting = f"data.columns='{{{', '.join(named)}}}'"
            if named and setting not in out:
                out.append(setting)
    return out[:_MOST]


def _mappings(row: Row, roles: Roles, use: Use) -> Iterator[dict[str, str]]:
    """Our columns by the row's own, for the plainest format of a use."""
    texts = [key for key in row if isinstance(key, str) and _is_text(row[key])]
    asked = [key for key in texts if _may_ask(key) and key != roles.context] or [
        key for key in texts if key == roles.context
    ]
    answers = [key for key in texts if is_answer(key) and key not in asked]
    if not asked and not answers:
        # unknown words: the columns in their order
        longer = [key for key in texts if isinstance(row[key], str) and " " in row[key].strip()]
        asked, answers = longer[:1], longer[1:]
    for question in asked or [""]:
        said = answers or [key for key in asked if key != question]
        if use is Use.prompt and question:
            yield {"prompt": question}
        if use is Use.sft:
            for answer in said:
                if answer != roles.rejected:
                    yield _sft_columns(row, question, answer, roles)
        if use is Use.unpaired and said:
            flags = [key for key in row if isinstance(row[key], bool)]
            judgement = roles.judgement or next(iter(flags), "")
            if not judgement:  # nothing says whether an answer is good
                continue
            yield {**_prompt(row, question), "completion": said[0], "label": judgement}
        if use is Use.preference:
            chosen = roles.chosen or next((key for key in said if key != roles.rejected), "")
            rejected = roles.rejected or next((key for key in said if key != chosen), "")
            # a solution and its final answer are no two sides: names must say so, or be alike
            named = bool(roles.chosen or roles.rejected)
            if chosen and rejected and (named or plain(chosen)[:-1] == plain(rejected)[:-1]):
                yield {**_prompt(row, question), "chosen": chosen, "rejected": rejected}


def _is_text(value: Any) -> bool:
    """A text, or a list of messages."""
    if isinstance(value, list):
        return (
            bool(value) and isinstance(value[0], Mapping) and bool({"role", "from"} & set(value[0]))
        )
    listed = isinstance(value, str) and value.startswith('["')  # turns, as arenas have them
    return isinstance(value, str) and holds_content(value) and not listed


def _may_ask(key: str) -> bool:
    """Whether a column may be the question itself."""
    return is_question(key) and plain(key) not in (*SYSTEMS, *HISTORIES, *TURNS)


def _prompt(row: Row, question: str) -> dict[str, str]:
    """The column of the prompt; a conversation in ShareGPT's way where that is all there is."""
    if question:
        return {"prompt": question}
    turns = next((key for key in row if plain(str(key)) in TURNS and row[key]), None)
    if turns is None:
        return {}
    first = row[turns][0] if isinstance(row[turns], list) else {}
    return {"conversations" if "from" in first else "prompt": turns}


def _sft_columns(row: Row, question: str, answer: str, roles: Roles) -> dict[str, str]:
    """prompt and completion, or Alpaca's columns where more than a question is asked."""
    further = {"system": roles.system, "history": roles.history}
    if roles.context != question:
        further["input"] = roles.context
    further = {ours: theirs for ours, theirs in further.items() if theirs}
    if not question:
        return {"messages" if isinstance(row[answer], list) else "text": answer}
    if further:
        return {"instruction": question, "output": answer, **further}
    return {"prompt": question, "completion": answer}
