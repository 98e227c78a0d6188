"""Conversations in the layouts of the tools that train on them: OpenAI's messages (ms-swift's
pairs), ShareGPT and Alpaca (LLaMA-Factory's pairs).
"""

from typing import Any

from rlhf.data.formats.base import Format, Use, assistant, judged_chat, make_pair, with_assistant
from rlhf.data.formats.draft import (
    Draft,
    Writer,
    judged_turns,
    prompt_turns,
    single_text,
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

# ---- messages ----


def _sft_messages(row: Row) -> dict[str, Any]:
    return {"messages": with_assistant(chat_of(row, "messages"), "messages")}


def _pair_swift(row: Row) -> PreferencePair:
    chat = chat_of(row, "messages")
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise RowError(
            "key 'messages': expected a conversation that ends with the chosen answer, found "
            f"role {chat[-1]['role']!r} at its end"
        )
    return make_pair(row, chat[:-1], chat[-1:], assistant(text_of(row, "rejected_response")))


def _unpaired_messages(row: Row) -> JudgedAnswer:
    return judged_chat(chat_of(row, "messages"), "messages", judgement_of(row, "label"))


def _prompt_messages(row: Row) -> Chat:
    return without_answer(chat_of(row, "messages"), "messages")


SWIFT_PREFERENCE = Format(
    "swift_preference",
    ("messages", "rejected_response"),
    "messages, rejected_response",
    pair=_pair_swift,
    prompt=_prompt_messages,
    consumed=("messages",),
    answers=("rejected_response", "margin"),
)
MESSAGES_UNPAIRED = Format(
    "messages_unpaired",
    ("messages", "label"),
    "messages of {role, content}, label (true: a good answer)",
    unpaired=_unpaired_messages,
    prompt=_prompt_messages,
    consumed=("messages",),
    answers=("label",),
)
MESSAGES = Format(
    "messages",
    ("messages",),
    "messages of {role, content}",
    sft=_sft_messages,
    prompt=_prompt_messages,
    consumed=("messages",),
)


def _write_sft_messages(draft: Draft) -> list[dict[str, Any]]:
    return [{"messages": whole_conversation(draft)}]


def _write_pair_messages(draft: Draft) -> list[dict[str, Any]]:
    columns = draft.columns
    turns = prompt_turns(draft)
    chosen = single_text(columns["chosen"], "chosen", empty=True)
    rejected = single_text(columns["rejected"], "rejected")
    chat = [*turns, *assistant(chosen)]
    return [{"messages": chat, "rejected_response": rejected, **draft.margin()}]


def _write_unpaired_messages(draft: Draft) -> list[dict[str, Any]]:
    return [{"messages": judged_turns(draft), "label": draft.columns["label"]}]


def _write_prompt_messages(draft: Draft) -> list[dict[str, Any]]:
    return [{"messages": prompt_turns(draft)}]


WRITE_MESSAGES: dict[Use, Writer] = {
    Use.sft: _write_sft_messages,
    Use.preference: _write_pair_messages,
    Use.unpaired: _write_unpaired_messages,
    Use.prompt: _write_prompt_messages,
}

# ---- ShareGPT ----


def _sharegpt_chat(row: Row) -> Chat:
    chat = chat_of(row, "conversations", role="from", content="value")
    system = optional_text(row, "system")
    if system:
        return [{"role": "system", "content": system}, *chat]
    return chat


def _sft_sharegpt(row: Row) -> dict[str, Any]:
    return {"messages": with_assistant(_sharegpt_chat(row), "conversations")}


def _pair_sharegpt(row: Row) -> PreferencePair:
    def side(key: str) -> Chat:
        message = value_of(row, key)
        chat = chat_of(row, key, [message], role="from", content="value")
        if chat[0]["role"] != "assistant":
            raise RowError(
                f"key {key!r}: expected the assistant's message, found one of {message['from']!r}"
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
    "conversations of {from, value}; chosen, rejected as {from, value}",
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


_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def _sharegpt_turns(chat: Chat) -> list[dict[str, Any]]:
    """Messages as {from, value}. Raises RowError for a role that ShareGPT has no word for."""
    unknown = next((m["role"] for m in chat if m["role"] not in _SPEAKERS), None)
    if unknown is not None:
        raise RowError(f"role {unknown!r}: ShareGPT has {', '.join(_SPEAKERS.values())} only")
    return [{"from": _SPEAKERS[m["role"]], "value": m["content"]} for m in chat]


def _write_sft_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    return [{"conversations": _sharegpt_turns(whole_conversation(draft))}]


def _write_pair_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    turns = _sharegpt_turns(prompt_turns(draft))
    chosen, rejected = two_texts(draft, empty=True)
    sides = {
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }
    return [{"conversations": turns, **sides, **draft.margin()}]


def _write_unpaired_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    turns = _sharegpt_turns(judged_turns(draft))
    return [{"conversations": turns, "kto_tag": draft.columns["label"]}]


def _write_prompt_sharegpt(draft: Draft) -> list[dict[str, Any]]:
    return [{"conversations": _sharegpt_turns(prompt_turns(draft))}]


WRITE_SHAREGPT: dict[Use, Writer] = {
    Use.sft: _write_sft_sharegpt,
    Use.preference: _write_pair_sharegpt,
    Use.unpaired: _write_unpaired_sharegpt,
    Use.prompt: _write_prompt_sharegpt,
}

# ---- Alpaca ----


def alpaca_prompt(row: Row) -> Chat:
    """system, history as turns, then the instruction and, below a blank line, its input. Raises
    RowError.
    """
    chat: Chat = []
    if system := optional_text(row, "system"):
        chat.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, (list, tuple)):
        raise RowError(
            f"key 'history': expected a list of [question, answer], found {describe(history)}"
        )
    for i, turn in enumerate(history):
        if not (
            isinstance(turn, (list, tuple))
            and len(turn) == 2
            and all(isinstance(t, str) for t in turn)
        ):
            raise RowError(
                f"key 'history[{i}]': expected [question, answer], found {describe(turn)}"
            )
        chat += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    extra = optional_text(row, "input")
    instruction = text_of(row, "instruction")
    return [
        *chat,
        {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction},
    ]


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
