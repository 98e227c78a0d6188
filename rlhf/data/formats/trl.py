"""TRL's own columns: whole texts, prompts, prompts with completions, pairs with an explicit or an
implicit prompt, judged answers; and UltraFeedback's pairs, which have the prompt beside them.
"""

import hashlib
from typing import Any

from rlhf.data.formats.base import (
    Format,
    Use,
    both_sides,
    has_chat,
    make_pair,
    prompt_of_pair,
    prompt_or_nothing,
    require_training,
    split_chats,
    with_assistant,
)
from rlhf.data.formats.draft import Draft, Writer, prompt_turns, single_turn
from rlhf.data.formats.values import columns_of
from rlhf.data.rows import Chat, Row, RowError, answer_of, judgement_of, text_of, text_or_chat
from rlhf.process.wording import describe
from rlhf.types import JudgedAnswer, PreferencePair


def _sft_text(row: Row) -> dict[str, Any]:
    return {"text": text_of(row, "text")}


def _sft_prompt_completion(row: Row) -> dict[str, Any]:
    prompt, completion = text_or_chat(row, "prompt"), answer_of(row, "completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            f"key 'completion': expected what 'prompt' is ({describe(prompt)}), found "
            f"{describe(completion)}"
        )
    if isinstance(completion, list):
        with_assistant(completion, "completion")
    return {"prompt": prompt, "completion": completion}


def pair_explicit(row: Row) -> PreferencePair:
    """prompt, chosen and rejected as they stand. Raises RowError."""
    prompt = prompt_or_nothing(row, "prompt")
    return make_pair(row, prompt, answer_of(row, "chosen"), answer_of(row, "rejected"))


def pair_implicit(row: Row) -> PreferencePair:
    """chosen and rejected with their prompt inside: conversations are split, texts stay whole.
    Raises RowError.
    """
    chosen, rejected = answer_of(row, "chosen"), answer_of(row, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if chosen == rejected:
            return make_pair(row, "", chosen, rejected)  # raises
        return make_pair(row, *split_chats(chosen, rejected))
    return make_pair(row, "", chosen, rejected)


def _unpaired(row: Row) -> JudgedAnswer:
    prompt, completion = prompt_or_nothing(row, "prompt"), answer_of(row, "completion")
    if prompt and isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            f"key 'completion': expected what 'prompt' is ({describe(prompt)}), found "
            f"{describe(completion)}"
        )
    require_training(completion, "completion")
    return JudgedAnswer(prompt=prompt, completion=completion, good=judgement_of(row, "label"))


def prompt_plain(row: Row) -> str | Chat:
    """The column prompt, which ends before the assistant's turn. Raises RowError."""
    prompt = text_or_chat(row, "prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise RowError(
            "key 'prompt': expected messages that end before the assistant's turn, found an "
            "assistant's message last"
        )
    return prompt


def _pair_ultrafeedback(row: Row) -> PreferencePair:
    prompt, pair = text_of(row, "prompt"), pair_implicit(row)
    assert isinstance(pair.prompt, list)
    last = pair.prompt[-1]
    first_user = next((m["content"] for m in pair.prompt if m["role"] == "user"), None)
    if prompt not in (last["content"], first_user):
        raise RowError(
            f"key 'prompt': expected the conversation's user message {describe(first_user)}, "
            f"found {describe(prompt)}"
        )
    return pair


ULTRAFEEDBACK = Format(
    "ultrafeedback",
    ("prompt", "chosen", "rejected"),
    "prompt (text); chosen, rejected (whole conversations)",
    pair=_pair_ultrafeedback,
    prompt=prompt_of_pair(_pair_ultrafeedback),
    test=lambda row: (
        isinstance(row["prompt"], str) and has_chat(row, "chosen") and has_chat(row, "rejected")
    ),
    consumed=("prompt",),
    answers=("chosen", "rejected", "margin"),
)
PREFERENCE = Format(
    "preference",
    ("prompt", "chosen", "rejected"),
    "prompt, chosen, rejected (texts or lists of messages)",
    pair=pair_explicit,
    prompt=prompt_plain,
    consumed=("prompt",),
    answers=("chosen", "rejected", "margin"),
)
IMPLICIT = Format(
    "implicit_preference",
    ("chosen", "rejected"),
    "chosen, rejected (whole texts or whole conversations)",
    pair=pair_implicit,
    prompt=prompt_of_pair(pair_implicit),
    consumed=("chosen", "rejected"),
    answers=("margin",),
)
UNPAIRED = Format(
    "unpaired",
    ("prompt", "completion", "label"),
    "prompt, completion (texts or lists of messages), label (true: a good answer)",
    unpaired=_unpaired,
    prompt=prompt_plain,
    consumed=("prompt",),
    answers=("completion", "label"),
)
PROMPT_COMPLETION = Format(
    "prompt_completion",
    ("prompt", "completion"),
    "prompt, completion (texts or lists of messages)",
    sft=_sft_prompt_completion,
    prompt=prompt_plain,
    consumed=("prompt",),
    answers=("completion",),
)
PROMPT = Format(
    "prompt",
    ("prompt",),
    "prompt (text or a list of messages)",
    prompt=prompt_plain,
    consumed=("prompt",),
)


def _classes(row: Row) -> str:
    """A text's classes, which no stage learns."""
    key = next((key for key in ("label", "labels") if row.get(key) is not None), None)
    return "" if key is None else f"every text trains, whatever its {key!r} says"


TEXT = Format("text", ("text",), "text", sft=_sft_text, answers=("text",), note=_classes)


# ---- writing ----


def _write_columns(draft: Draft) -> list[dict[str, Any]]:
    return [dict(draft.columns)]


def _write_judged(draft: Draft) -> list[dict[str, Any]]:
    """A pair as two judged answers."""
    draft.lose("margin", "each answer is judged by itself")
    draft.notes.append("a pair becomes two judged answers")
    columns = draft.columns
    pair = PreferencePair(columns["prompt"], columns["chosen"], columns["rejected"])
    return [columns_of(answer, {}) for answer in both_sides(pair)]


def _write_ultrafeedback(draft: Draft) -> list[dict[str, Any]]:
    turns = prompt_turns(draft)
    # the reader accepts the first user's message or the last message as the prompt
    prompt = next((m["content"] for m in turns if m["role"] == "user"), "") or turns[-1]["content"]
    if not prompt:
        raise RowError(
            "key 'prompt': expected text in the first user's or the last message, found none"
        )
    sides = {
        key: [*turns, single_turn(draft.columns[key], key, empty=True)]
        for key in ("chosen", "rejected")
    }
    prompt_id = draft.take("prompt_id", hashlib.sha256(prompt.encode()).hexdigest())
    return [{"prompt": prompt, "prompt_id": prompt_id, **sides, **draft.margin()}]


WRITE_TRL: dict[Use, Writer] = dict.fromkeys(Use, _write_columns)
WRITE_KTO: dict[Use, Writer] = {Use.unpaired: _write_columns, Use.preference: _write_judged}
WRITE_ULTRAFEEDBACK: dict[Use, Writer] = {Use.preference: _write_ultrafeedback}
