"""Messages of {role, content} and what goes with them: OpenAI's fine-tuning rows, ms-swift's and
LLaMA-Factory's pairs, and xLAM's calls. Their writers.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.data.calls import call_of, checked_text, parsed
from rlhf.data.formats.base import (
    Format,
    Use,
    assistant,
    judged_chat,
    make_pair,
    split_chats,
    with_assistant,
    with_system,
)
from rlhf.data.formats.draft import (
    Draft,
    Writer,
    flags_as_weights,
    is_plain,
    judged_turns,
    prompt_turns,
    single_turn,
    whole_conversation,
)
from rlhf.data.rows import (
    Chat,
    Row,
    RowError,
    chat_of,
    judgement_of,
    text_of,
    value_of,
    without_answer,
)
from rlhf.process.wording import describe
from rlhf.types import JudgedAnswer, Message, PreferencePair

# ---- conversations ----


def _messages(row: Row) -> Chat:
    return with_system(row, chat_of(row, "messages"), "messages")


def _sft_messages(row: Row) -> dict[str, Any]:
    return {"messages": with_assistant(_messages(row), "messages")}


def _unpaired_messages(row: Row) -> JudgedAnswer:
    return judged_chat(_messages(row), "messages", judgement_of(row, "label"))


def _prompt_messages(row: Row) -> Chat:
    return without_answer(_messages(row), "messages")


_CONVERSATION = ("messages", "system")
MESSAGES_UNPAIRED = Format(
    "messages_unpaired",
    ("messages", "label"),
    "messages of {role, content}, label (true: a good answer)",
    unpaired=_unpaired_messages,
    prompt=_prompt_messages,
    consumed=_CONVERSATION,
    answers=("label",),
)
MESSAGES = Format(
    "messages",
    ("messages",),
    "messages of {role, content} (and tools, system)",
    sft=_sft_messages,
    prompt=_prompt_messages,
    consumed=_CONVERSATION,
)

# ---- pairs ----


def _with_answer(row: Row) -> Chat:
    chat = _messages(row)
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise RowError(
            "key 'messages': expected a conversation that ends with the chosen answer, found "
            f"role {chat[-1]['role']!r} at its end"
        )
    return chat


def _pair_swift(row: Row) -> PreferencePair:
    chat = _with_answer(row)
    return make_pair(row, chat[:-1], chat[-1:], assistant(text_of(row, "rejected_response")))


def _pair_rejected_messages(row: Row) -> PreferencePair:
    """A whole conversation with the chosen answer, and one with the rejected (ms-swift)."""
    chosen = _with_answer(row)
    rejected = with_system(row, _ending(row, "rejected_messages"), "rejected_messages")
    return make_pair(row, *split_chats(chosen, rejected, ("messages", "rejected_messages")))


def _pair_chosen_messages(row: Row) -> PreferencePair:
    """Two whole conversations (LLaMA-Factory), or two answers beside the conversation that they
    follow.
    """
    keys = ("chosen_messages", "rejected_messages")
    chosen, rejected = _ending(row, keys[0]), _ending(row, keys[1])
    if row.get("messages"):
        prompt = _prompt_messages(row)
        chosen, rejected = (
            side if side[: len(prompt)] == prompt else [*prompt, *side]
            for side in (chosen, rejected)
        )
    else:
        chosen, rejected = with_system(row, chosen, keys[0]), with_system(row, rejected, keys[1])
    return make_pair(row, *split_chats(chosen, rejected, keys))


def _ending(row: Row, key: str) -> Chat:
    """A conversation that ends with an assistant's turn. Raises RowError."""
    chat = chat_of(row, key)
    if chat[-1]["role"] != "assistant":
        raise RowError(
            f"key {key!r}: expected the last message to be an assistant's, found role "
            f"{chat[-1]['role']!r}"
        )
    return chat


def _prompt_chosen_messages(row: Row) -> Chat:
    prompt = _pair_chosen_messages(row).prompt
    assert isinstance(prompt, list)
    return prompt


SWIFT_PREFERENCE = Format(
    "swift_preference",
    ("messages", "rejected_response"),
    "messages, rejected_response",
    pair=_pair_swift,
    prompt=_prompt_messages,
    consumed=_CONVERSATION,
    answers=("rejected_response", "margin"),
)
REJECTED_MESSAGES = Format(
    "rejected_messages",
    ("messages", "rejected_messages"),
    "messages, rejected_messages (whole conversations)",
    pair=_pair_rejected_messages,
    prompt=_prompt_messages,
    test=lambda row: "chosen_messages" not in row,
    consumed=_CONVERSATION,
    answers=("rejected_messages", "margin"),
)
CHOSEN_MESSAGES = Format(
    "chosen_messages",
    ("chosen_messages", "rejected_messages"),
    "chosen_messages, rejected_messages (whole conversations, or answers to messages)",
    pair=_pair_chosen_messages,
    prompt=_prompt_chosen_messages,
    consumed=(*_CONVERSATION, "chosen_messages", "rejected_messages"),
    answers=("margin",),
)

# ---- OpenAI's preferences ----


def _flatten_openai(row: Row) -> Row:
    """{"input": {"messages", "tools", ...}, ...} with the keys of `input` as columns."""
    given = value_of(row, "input")
    if not isinstance(given, Mapping):
        raise RowError(f"key 'input': expected an object with messages, found {describe(given)}")
    both = [key for key in given if key in row]
    if both:
        raise RowError(f"key {both[0]!r}: expected it once, found it in 'input' and beside it")
    return {**given, **{key: value for key, value in row.items() if key != "input"}}


def _pair_openai(row: Row) -> PreferencePair:
    prompt = _messages(row)
    preferred, other = _ending(row, "preferred_output"), _ending(row, "non_preferred_output")
    keys = ("preferred_output", "non_preferred_output")
    return make_pair(row, *split_chats([*prompt, *preferred], [*prompt, *other], keys))


OPENAI_PREFERENCE = Format(
    "openai_preference",
    ("input", "preferred_output", "non_preferred_output"),
    "input of {messages, tools}, preferred_output, non_preferred_output",
    pair=_pair_openai,
    prompt=_messages,
    test=lambda row: isinstance(row["input"], Mapping),
    consumed=_CONVERSATION,
    answers=("preferred_output", "non_preferred_output", "margin"),
    flatten=_flatten_openai,
)

# ---- xLAM's calls ----


def _sft_xlam(row: Row) -> dict[str, Any]:
    """A question and the calls that answer it."""
    given = value_of(row, "answers")
    calls = parsed(given, "answers", "a list of calls") if isinstance(given, str) else given
    if not isinstance(calls, list) or not calls:
        raise RowError(f"key 'answers': expected a list of calls, found {describe(calls)}")
    answer: Message = {"role": "assistant", "content": ""}
    answer["tool_calls"] = [call_of(call, f"answers[{i}]") for i, call in enumerate(calls)]
    return {"messages": [*_prompt_xlam(row), answer]}


def _prompt_xlam(row: Row) -> Chat:
    return with_system(row, [{"role": "user", "content": text_of(row, "query")}], "query")


XLAM = Format(
    "xlam",
    ("query", "answers", "tools"),
    "query, answers of {name, arguments}, tools (lists, or JSON texts of them)",
    sft=_sft_xlam,
    prompt=_prompt_xlam,
    consumed=("query", "system"),
    answers=("answers",),
)


# ---- writing ----


def _write_sft(draft: Draft) -> list[dict[str, Any]]:
    return [{"messages": flags_as_weights(whole_conversation(draft))}]


def _write_pair(draft: Draft) -> list[dict[str, Any]]:
    turns, columns = prompt_turns(draft), draft.columns
    chosen = single_turn(columns["chosen"], "chosen", empty=True)
    rejected = single_turn(columns["rejected"], "rejected", empty=True)
    row = {"messages": flags_as_weights([*turns, chosen]), **draft.margin()}
    if is_plain(rejected):
        text = checked_text(rejected["content"], "rejected")
        return [{**row, "rejected_response": text}]
    return [{**row, "rejected_messages": flags_as_weights([*turns, rejected])}]


def _write_unpaired(draft: Draft) -> list[dict[str, Any]]:
    return [{"messages": flags_as_weights(judged_turns(draft)), "label": draft.columns["label"]}]


def _write_prompt(draft: Draft) -> list[dict[str, Any]]:
    return [{"messages": flags_as_weights(prompt_turns(draft))}]


WRITE_MESSAGES: dict[Use, Writer] = {
    Use.sft: _write_sft,
    Use.preference: _write_pair,
    Use.unpaired: _write_unpaired,
    Use.prompt: _write_prompt,
}
