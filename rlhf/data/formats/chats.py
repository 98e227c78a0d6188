"""Conversations as ShareGPT and Alpaca have them, with LLaMA-Factory's pairs and judged answers.

ShareGPT's speakers are human, gpt, system, function_call (its text is the call) and observation
(what a function gave back). A turn's other keys are a message's (rlhf/data/messages.py).
"""

import json
from collections.abc import Mapping
from typing import Any

from rlhf.data.formats.base import (
    Format,
    Use,
    assistant,
    judged_chat,
    make_pair,
    with_assistant,
    with_system,
)
from rlhf.data.formats.draft import (
    Draft,
    Writer,
    flags_as_weights,
    judged_turns,
    prompt_turns,
    single_text,
    single_turn,
    trained_turns,
    two_texts,
    whole_conversation,
)
from rlhf.data.rows import (
    Chat,
    Row,
    RowError,
    chat_of,
    judgement_of,
    optional_text,
    text_of,
    value_of,
    without_answer,
)
from rlhf.process.wording import describe
from rlhf.types import JudgedAnswer, PreferencePair

# ---- ShareGPT ----


def _sharegpt_chat(row: Row) -> Chat:
    chat = chat_of(row, "conversations", role="from", content="value")
    return with_system(row, chat, "conversations")


def _sft_sharegpt(row: Row) -> dict[str, Any]:
    return {"messages": with_assistant(_sharegpt_chat(row), "conversations")}


def _pair_sharegpt(row: Row) -> PreferencePair:
    def side(key: str) -> Chat:
        given = value_of(row, key)
        if isinstance(given, str):
            return assistant(text_of(row, key))
        turns = given if isinstance(given, list) else [given]
        chat = chat_of(row, key, turns, role="from", content="value")
        if len(chat) != 1 or chat[0]["role"] != "assistant":
            found = ", ".join(message["role"] for message in chat)
            raise RowError(
                f"key {key!r}: expected the assistant's message, found messages of {found}"
            )
        return chat

    return make_pair(row, _sharegpt_chat(row), side("chosen"), side("rejected"))


def _unpaired_sharegpt(row: Row) -> JudgedAnswer:
    return judged_chat(_sharegpt_chat(row), "conversations", judgement_of(row, "kto_tag"))


def _prompt_sharegpt(row: Row) -> Chat:
    return without_answer(_sharegpt_chat(row), "conversations")


_SHAREGPT = ("conversations", "system")
SHAREGPT_PREFERENCE = Format(
    "sharegpt_preference",
    ("conversations", "chosen", "rejected"),
    "conversations of {from, value}; chosen, rejected as {from, value} or texts",
    pair=_pair_sharegpt,
    prompt=_prompt_sharegpt,
    consumed=_SHAREGPT,
    answers=("chosen", "rejected", "margin"),
)
SHAREGPT_UNPAIRED = Format(
    "sharegpt_unpaired",
    ("conversations", "kto_tag"),
    "conversations of {from, value}, kto_tag (true: a good answer)",
    unpaired=_unpaired_sharegpt,
    prompt=_prompt_sharegpt,
    consumed=_SHAREGPT,
    answers=("kto_tag",),
)
SHAREGPT = Format(
    "sharegpt",
    ("conversations",),
    "conversations of {from, value}",
    sft=_sft_sharegpt,
    prompt=_prompt_sharegpt,
    consumed=_SHAREGPT,
)


_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_OF_CALL = {"name", "arguments"}


def _sharegpt_turns(draft: Draft, chat: Chat) -> list[dict[str, Any]]:
    """Messages as {from, value}, with what else they hold. Raises RowError for a role that ShareGPT
    has no word for.
    """
    return [_sharegpt_turn(draft, message) for message in flags_as_weights(chat)]


def _sharegpt_turn(draft: Draft, message: dict[str, Any]) -> dict[str, Any]:
    rest = dict(message)
    role, text = rest.pop("role"), rest.pop("content")
    if role not in _SPEAKERS:
        raise RowError(f"role {role!r}: ShareGPT has {', '.join(_SPEAKERS.values())} only")
    speaker, calls = _SPEAKERS[role], rest.get("tool_calls", [])
    # calls beside a text stay a key of the turn, for which ShareGPT has no word
    if calls and not text and all(call["function"].keys() == _OF_CALL for call in calls):
        flat = [{**call["function"], **_beside(call)} for call in rest.pop("tool_calls")]
        speaker = "function_call"
        text = json.dumps(flat[0] if len(flat) == 1 else flat, ensure_ascii=False)
    for key in rest.keys() & {"from", "value"}:
        draft.notes.append(f"{key} of a message is not carried: ShareGPT has its own {key}")
    return {**rest, "from": speaker, "value": text}


def _beside(call: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key not in ("type", "function")}


def _write_sft_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    return [{"conversations": _sharegpt_turns(draft, whole_conversation(draft))}]


def _write_pair_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    turns = _sharegpt_turns(draft, prompt_turns(draft))
    sides = {}
    for key in ("chosen", "rejected"):
        turn = single_turn(draft.columns[key], key, empty=True)
        sides[key] = _sharegpt_turns(draft, [turn])[0]
    return [{"conversations": turns, **sides, **draft.margin()}]


def _write_unpaired_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    turns = _sharegpt_turns(draft, judged_turns(draft))
    return [{"conversations": turns, "kto_tag": draft.columns["label"]}]


def _write_prompt_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    return [{"conversations": _sharegpt_turns(draft, prompt_turns(draft))}]


WRITE_SHAREGPT: dict[Use, Writer] = {
    Use.sft: _write_sft_sharegpt,
    Use.preference: _write_pair_sharegpt,
    Use.unpaired: _write_unpaired_sharegpt,
    Use.prompt: _write_prompt_sharegpt,
}

# ---- Alpaca ----


def alpaca_prompt(row: Row) -> Chat:
    """system, history as turns, then the instruction and, below a blank line, its input; an input
    without an instruction is the question itself. Raises RowError.
    """
    chat: Chat = []
    if system := optional_text(row, "system"):
        chat.append({"role": "system", "content": system})
    chat += history_turns(row, "history")
    extra = optional_text(row, "input")
    # LLaMA-Factory and ms-swift take an input alone as well
    instruction = text_of(row, "instruction", empty=bool(extra))
    return [*chat, {"role": "user", "content": "\n\n".join(filter(None, (instruction, extra)))}]


def history_turns(row: Row, key: str) -> Chat:
    """The turns of a list of [question, answer]; none where the row has none. Raises RowError."""
    history = row.get(key) or []
    if not isinstance(history, (list, tuple)):
        raise RowError(
            f"key {key!r}: expected a list of [question, answer], found {describe(history)}"
        )
    chat: Chat = []
    for i, turn in enumerate(history):
        if not (
            isinstance(turn, (list, tuple))
            and len(turn) == 2
            and all(isinstance(t, str) for t in turn)
        ):
            raise RowError(f"key '{key}[{i}]': expected [question, answer], found {describe(turn)}")
        chat += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return chat


def sft_alpaca(row: Row) -> dict[str, Any]:
    """The output as the answer. Raises RowError."""
    return {"prompt": alpaca_prompt(row), "completion": assistant(text_of(row, "output"))}


def _pair_alpaca(row: Row) -> PreferencePair:
    return make_pair(
        row,
        alpaca_prompt(row),
        assistant(text_of(row, "chosen")),
        assistant(text_of(row, "rejected")),
    )


def _unpaired_alpaca(row: Row) -> JudgedAnswer:
    return JudgedAnswer(
        alpaca_prompt(row), assistant(text_of(row, "output")), judgement_of(row, "kto_tag")
    )


ALPACA_COLUMNS = ("instruction", "input", "system", "history")
ALPACA_PREFERENCE = Format(
    "alpaca_preference",
    ("instruction", "chosen", "rejected"),
    "instruction, chosen, rejected (and input, system, history)",
    pair=_pair_alpaca,
    prompt=alpaca_prompt,
    test=lambda row: not isinstance(row["chosen"], list),  # conversations: question_preference
    consumed=ALPACA_COLUMNS,
    answers=("chosen", "rejected", "margin"),
)
ALPACA_UNPAIRED = Format(
    "alpaca_unpaired",
    ("instruction", "output", "kto_tag"),
    "instruction, output, kto_tag (true: a good answer; and input, system, history)",
    unpaired=_unpaired_alpaca,
    prompt=alpaca_prompt,
    consumed=ALPACA_COLUMNS,
    answers=("output", "kto_tag"),
)
ALPACA = Format(
    "alpaca",
    ("instruction", "output"),
    "instruction, output (and input, system, history)",
    sft=sft_alpaca,
    prompt=alpaca_prompt,
    consumed=ALPACA_COLUMNS,
    answers=("output",),
)


def alpaca_columns(chat: Chat) -> dict[str, Any]:
    """instruction, input, system and history of a conversation that ends with a user's message.
    Raises RowError for another order of roles.
    """
    system: dict[str, Any] = {}
    turns = list(chat)
    if turns and turns[0]["role"] == "system" and turns[0]["content"]:
        system = {"system": turns.pop(0)["content"]}
    roles = [m["role"] for m in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"] or not turns[-1]["content"]:
        raise RowError(
            "alpaca holds a system message, then turns of user and assistant, then an "
            f"instruction; found the roles {', '.join(roles)}"
        )
    out = {"instruction": turns[-1]["content"], "input": "", **system}
    history = [[turns[i]["content"], turns[i + 1]["content"]] for i in range(0, len(turns) - 1, 2)]
    if history:
        out["history"] = history
    return out


def write_sft_alpaca(draft: Draft) -> list[dict[str, Any]]:
    """The last answer as the output. Raises RowError."""
    context, answer = trained_turns(draft)
    if not answer:
        context, answer = context[:-1], context[-1:]
        draft.notes.append("of the conversation only the last answer trains")
    return [{**alpaca_columns(context), "output": single_text(answer, "completion")}]


def _write_pair_alpaca(draft: Draft) -> list[dict[str, Any]]:
    chosen, rejected = two_texts(draft)
    context = alpaca_columns(prompt_turns(draft))
    return [{**context, "chosen": chosen, "rejected": rejected, **draft.margin()}]


def _write_unpaired_alpaca(draft: Draft) -> list[dict[str, Any]]:
    output = single_text(draft.columns["completion"], "completion")
    context = alpaca_columns(prompt_turns(draft))
    return [{**context, "output": output, "kto_tag": draft.columns["label"]}]


def _write_prompt_alpaca(draft: Draft) -> list[dict[str, Any]]:
    return [{**alpaca_columns(prompt_turns(draft)), "output": ""}]


WRITE_ALPACA: dict[Use, Writer] = {
    Use.sft: write_sft_alpaca,
    Use.preference: _write_pair_alpaca,
    Use.unpaired: _write_unpaired_alpaca,
    Use.prompt: _write_prompt_alpaca,
}
