"""Rows of a question and what was answered, whatever their columns are called: the usual layout of
published data sets (OpenOrca, Dolly, GSM8K, MATH, Aya, Firefly, Orca's DPO pairs, BeaverTails,
ms-swift's query and response).

Which name is which part is in names.py. A text column called `prompt`, without a system message, a
history or a chain of thought beside it, stays a text as in TRL's columns; any other question
becomes a conversation, as Alpaca's instruction does.
"""

import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.formats.base import Format, assistant, make_pair, split_chats, with_system
from rlhf.data.formats.chats import history_turns
from rlhf.data.formats.names import Roles, holds_content, plain, roles_of
from rlhf.data.formats.unread import stands_in
from rlhf.data.rows import (
    Chat,
    Row,
    RowError,
    answer_of,
    chat_of,
    judgement_of,
    optional_text,
    text_of,
    text_or_chat,
)
from rlhf.process.wording import describe
from rlhf.types import JudgedAnswer, PreferencePair

_PICTURE = re.compile(r"<img>[^<\s]+</img>")

# ---- prompts ----


def prompt_of(row: Row) -> str | Chat:
    """system, history, then the question and, below a blank line, its context. Raises RowError."""
    roles = roles_of(row)
    before = _turns_before(row, roles)
    asked = _asked(row, roles)
    if isinstance(asked, str) and not before and _is_plain(roles):
        return asked
    turns = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    chat = with_system(row, [*before, *turns], roles.question, roles.system)
    if chat[-1]["role"] == "assistant":
        raise RowError(
            f"key {roles.question or roles.context!r}: expected messages that end before the "
            "assistant's turn, found an assistant's message last"
        )
    return chat


def _is_plain(roles: Roles) -> bool:
    """Whether a row of these columns is made of texts, as TRL's are."""
    return plain(roles.question) == "prompt" and not (roles.system or roles.history or roles.reason)


def _turns_before(row: Row, roles: Roles) -> Chat:
    """The history, or a context that is a conversation. Raises RowError."""
    if isinstance(row.get(roles.context), list):
        return chat_of(row, roles.context) if row[roles.context] else []
    history = row.get(roles.history)
    if isinstance(history, list) and history and isinstance(history[0], dict):
        return chat_of(row, roles.history)
    return history_turns(row, roles.history)


def _asked(row: Row, roles: Roles) -> str | Chat:
    """The question with a context that is text; no turn where a conversation is all there is.
    Raises RowError.
    """
    if not roles.question:
        return []
    question = row[roles.question]
    extra = ""
    if not isinstance(row.get(roles.context), list):
        extra = optional_text(row, roles.context)
    if isinstance(question, Mapping):
        # WebGPT's question is an object with its source
        return text_of(question, "full_text")
    if isinstance(question, list):
        if extra:
            raise RowError(
                f"key {roles.context!r}: expected nothing beside the messages of "
                f"{roles.question!r}, found {describe(extra)}"
            )
        return text_or_chat(row, roles.question)
    text = text_of(row, roles.question, empty=bool(extra))
    if _PICTURE.search(text):
        raise RowError(
            f"key {roles.question!r}: pictures are not read, found {describe(text)}, which names "
            "one as ms-swift does (<img>...</img>)"
        )
    return "\n\n".join(filter(None, (text, extra)))


def has_question(row: Row) -> bool:
    """Whether a row's prompt can be made of its columns."""
    roles = roles_of(row)
    if roles.question:
        value = row[roles.question]
        return isinstance(value, (str, list)) or (
            isinstance(value, Mapping) and "full_text" in value
        )
    return isinstance(row.get(roles.context), list)


# ---- answers ----


def _answer(row: Row, roles: Roles, key: str, prompt: str | Chat) -> str | Chat:
    """An answer in its prompt's form, the chain of thought beside it. Raises RowError."""
    value = answer_of(row, key)
    reason = optional_text(row, roles.reason)
    if not reason and (isinstance(value, list) or isinstance(prompt, str)):
        return value
    said: Any = assistant(value) if isinstance(value, str) else value
    if reason and said[-1].get("reasoning_content", reason) != reason:
        raise RowError(
            f"keys {key!r} and {roles.reason!r}: expected one reasoning, found two that differ"
        )
    if reason:
        said = [*said[:-1], {**said[-1], "reasoning_content": reason}]
    return said


def _sft(row: Row) -> dict[str, Any]:
    roles = roles_of(row)
    prompt = prompt_of(row)
    answer = _answer(row, roles, roles.answer, prompt)
    if isinstance(answer, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "completion": answer}


def _judged(row: Row) -> JudgedAnswer:
    columns = _sft(row)
    good = judgement_of(row, roles_of(row).judgement)
    return JudgedAnswer(columns["prompt"], columns["completion"], good)


def _pair(row: Row) -> PreferencePair:
    roles = roles_of(row)
    chosen, rejected = answer_of(row, roles.chosen), answer_of(row, roles.rejected)
    if isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1:
        return pair_of_conversations(row, roles, chosen, rejected)
    prompt = prompt_of(row)
    if isinstance(prompt, list):
        chosen, rejected = (
            assistant(side) if isinstance(side, str) else side for side in (chosen, rejected)
        )
    elif isinstance(chosen, list):
        prompt = [{"role": "user", "content": prompt}]
    return make_pair(row, prompt, chosen, rejected)


def pair_of_conversations(row: Row, roles: Roles, chosen: Chat, rejected: Chat) -> PreferencePair:
    """The pair of two whole conversations, which hold their prompt; a system message beside them
    is put before both. Raises RowError for a question beside them that they do not hold.
    """
    chosen = with_system(row, chosen, roles.chosen, roles.system)
    rejected = with_system(row, rejected, roles.rejected, roles.system)
    pair = make_pair(row, *split_chats(chosen, rejected))
    for key in roles.asked:
        value = row.get(key)
        if key != roles.system and holds_content(value) and not stands_in(key, value, pair):
            raise RowError(
                f"key {key!r}: expected what the two conversations begin with, found "
                f"{describe(value)}"
            )
    return pair


# ---- the formats ----


def _has_text(row: Row, key: str) -> bool:
    value = row.get(key)
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, dict) and "role" in part for part in value)
    return isinstance(value, str)


def _has_answer(row: Row) -> bool:
    roles = roles_of(row)
    return has_question(row) and _has_text(row, roles.answer) and roles.answer != roles.question


def _has_sides(row: Row) -> bool:
    roles = roles_of(row)
    sides = _has_text(row, roles.chosen) and _has_text(row, roles.rejected)
    return sides and has_question(row)


def _has_judgement(row: Row) -> bool:
    value = row.get(roles_of(row).judgement)
    return _has_answer(row) and (isinstance(value, bool) or value in (0, 1))


def _asked_and(*names: str) -> Any:
    """The columns of the prompt, and those of the roles `names`."""

    def columns(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        roles = roles_of(row)
        taken = (getattr(roles, name) for name in names)
        return roles.asked, tuple(filter(None, taken))

    return columns


def _reference(row: Row) -> tuple[str, ...]:
    """A final answer beside a whole solution: carried, no part of the text."""
    return tuple(filter(None, (roles_of(row).reference,)))


_RATINGS = ("helpfulness", "correctness", "rating", "score", "overall_rating")


def _note(row: Row) -> str:
    """Which of two answers was taken, and which ratings are not read."""
    roles = roles_of(row)
    out = []
    if roles.reference and holds_content(row.get(roles.reference)):
        out.append(
            f"{roles.answer!r} is the answer, {roles.reference!r} a reference that is carried"
        )
    if roles.reason and holds_content(row.get(roles.reason)):
        out.append(f"{roles.reason!r} is the answer's reasoning_content")
    ratings = [key for key in row if plain(str(key)) in _RATINGS]
    if ratings:
        out.append(f"every answer trains, whatever its {', '.join(ratings)} says")
    return "; ".join(out)


# the key that is read of a question that is an object
ASKED_INSIDE = ("question.full_text",)
QUESTION = Format(
    "question",
    (),
    "question, query, instruction or problem (and system, history, context, input)",
    prompt=prompt_of,
    test=has_question,
    find_columns=_asked_and(),
    read_inside=ASKED_INSIDE,
)
QUESTION_ANSWER = Format(
    "question_answer",
    (),
    "a question (prompt, question, query, instruction, problem, input) and its answer (response, "
    "answer, output, solution, target); system, history, context",
    sft=_sft,
    prompt=prompt_of,
    test=_has_answer,
    find_columns=_asked_and("answer", "reason"),
    read_inside=ASKED_INSIDE,
    not_content=_reference,
    note=_note,
)
QUESTION_JUDGED = Format(
    "question_judged",
    (),
    "a question and its answer, as question_answer, with a true or false is_safe, is_correct or "
    "label",
    unpaired=_judged,
    prompt=prompt_of,
    test=_has_judgement,
    find_columns=_asked_and("answer", "reason", "judgement"),
    read_inside=ASKED_INSIDE,
    not_content=_reference,
)
QUESTION_PREFERENCE = Format(
    "question_preference",
    (),
    "a question, as question_answer, with a chosen and a rejected answer (chosen_response, "
    "pos_resp and the like)",
    pair=_pair,
    prompt=prompt_of,
    test=_has_sides,
    find_columns=_asked_and("chosen", "rejected"),
    read_inside=ASKED_INSIDE,
)
