"""Formats of data files: told apart by their columns, turned into the three things that stages use.

    sft         TRL columns: {"text"}, {"prompt", "completion"} or {"messages"}
    preference  rlhf.types.PreferencePair
    unpaired    rlhf.types.JudgedAnswer, or a PreferencePair that stands for two of them
    prompt      a string or a list of messages

Pure functions: a row (a dictionary) in, a record out; a row that doesn't fit raises `RowError`, which says why. Not read: tool
calls, images, and files whose pairs must be made first (ranks, labels, ratings).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.data.rows import (
    Chat,
    Row,
    RowError,
    answer_of,
    chat_of,
    describe,
    judgement_of,
    margin_of,
    nearest,
    optional_text,
    text_of,
    text_or_chat,
    value_of,
    without_answer,
)
from rlhf.types import JudgedAnswer, PreferencePair

HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"


class Use(Enum):
    """What a stage makes of a file."""

    sft = "sft"
    preference = "preference"
    unpaired = "unpaired"
    prompt = "prompt"


def make_pair(row: Row, prompt: str | Chat, chosen: str | Chat, rejected: str | Chat) -> PreferencePair:
    """A pair whose sides differ and are of one kind. Raises RowError."""
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise RowError(f"key 'rejected': expected what 'chosen' is ({describe(chosen)}), found {describe(rejected)}")
    if prompt and isinstance(prompt, list) != isinstance(chosen, list):
        raise RowError(f"key 'chosen': expected what 'prompt' is ({describe(prompt)}), found {describe(chosen)}")
    if chosen == rejected:
        raise RowError("keys 'chosen' and 'rejected': expected two different answers, found the same twice")
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin_of(row))


def split_chats(chosen: Chat, rejected: Chat) -> tuple[Chat, Chat, Chat]:
    """Two whole conversations as the prompt that they share and the two last turns. Raises RowError where they part earlier."""
    prompt, other = chosen[:-1], rejected[:-1]
    if prompt != other:
        at = next((i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other)))
        raise RowError(f"keys 'chosen' and 'rejected': expected conversations that differ in the last message only, found another message {at}")
    if not prompt:
        raise RowError("keys 'chosen' and 'rejected': expected whole conversations, found the assistant's message alone and no 'prompt'")
    return prompt, chosen[-1:], rejected[-1:]


# ---- one function per format and use ----


def _sft_text(row: Row) -> dict[str, Any]:
    return {"text": text_of(row, "text")}


def _sft_prompt_completion(row: Row) -> dict[str, Any]:
    prompt, completion = text_or_chat(row, "prompt"), answer_of(row, "completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(f"key 'completion': expected what 'prompt' is ({describe(prompt)}), found {describe(completion)}")
    return {"prompt": prompt, "completion": completion}


def _with_assistant(chat: Chat, key: str) -> Chat:
    if not any(m["role"] == "assistant" for m in chat):
        raise RowError(f"key {key!r}: expected at least one assistant's message to train on, found none")
    return chat


def _sft_messages(row: Row) -> dict[str, Any]:
    return {"messages": _with_assistant(chat_of(row, "messages"), "messages")}


def _alpaca_prompt(row: Row) -> Chat:
    """system, history as turns, then the instruction and, below a blank line, its input."""
    chat: Chat = []
    if system := optional_text(row, "system"):
        chat.append({"role": "system", "content": system})
    history = row.get("history") or []
    for i, turn in enumerate(history):
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise RowError(f"key 'history[{i}]': expected [question, answer], found {describe(turn)}")
        chat += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    extra = optional_text(row, "input")
    instruction = text_of(row, "instruction")
    return [*chat, {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}]


def _assistant(text: str) -> Chat:
    return [{"role": "assistant", "content": text}]


def _sft_alpaca(row: Row) -> dict[str, Any]:
    return {"prompt": _alpaca_prompt(row), "completion": _assistant(text_of(row, "output"))}


def _sharegpt_chat(row: Row) -> Chat:
    chat = chat_of(row, "conversations", role="from", content="value")
    system = optional_text(row, "system")
    return [{"role": "system", "content": system}, *chat] if system else chat


def _sft_sharegpt(row: Row) -> dict[str, Any]:
    return {"messages": _with_assistant(_sharegpt_chat(row), "conversations")}


def _pair_explicit(row: Row) -> PreferencePair:
    prompt = text_or_chat(row, "prompt") if value_of(row, "prompt") != "" else ""
    return make_pair(row, prompt, answer_of(row, "chosen"), answer_of(row, "rejected"))


def _pair_implicit(row: Row) -> PreferencePair:
    chosen, rejected = answer_of(row, "chosen"), answer_of(row, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if chosen == rejected:
            return make_pair(row, "", chosen, rejected)  # raises
        return make_pair(row, *split_chats(chosen, rejected))
    return make_pair(row, "", chosen, rejected)


def _pair_ultrafeedback(row: Row) -> PreferencePair:
    prompt, pair = text_of(row, "prompt"), _pair_implicit(row)
    assert isinstance(pair.prompt, list)
    last = pair.prompt[-1]
    first_user = next((m["content"] for m in pair.prompt if m["role"] == "user"), None)
    if prompt not in (last["content"], first_user):
        raise RowError(f"key 'prompt': expected the conversation's user message {describe(first_user)}, found {describe(prompt)}")
    return pair


def _split_transcript(row: Row, key: str) -> tuple[str, str]:
    """Everything up to and with the last "Assistant:", and what follows. Raises RowError."""
    text = text_of(row, key)
    before, mark, after = text.rpartition(ASSISTANT_TURN)
    if not mark:
        raise RowError(f"key {key!r}: expected a transcript with {ASSISTANT_TURN!r}, found {describe(text)}")
    return before + mark, after


def _pair_hh(row: Row) -> PreferencePair:
    prompt, chosen = _split_transcript(row, "chosen")
    other, rejected = _split_transcript(row, "rejected")
    if prompt != other:
        at = next((i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other)))
        raise RowError(
            f"keys 'chosen' and 'rejected': expected the same transcript up to the last 'Assistant:', found a difference at character {at}: "
            f"{describe(prompt[at : at + 30])} against {describe(other[at : at + 30])}"
        )
    return make_pair(row, prompt, chosen, rejected)


def _pair_alpaca(row: Row) -> PreferencePair:
    return make_pair(row, _alpaca_prompt(row), _assistant(text_of(row, "chosen")), _assistant(text_of(row, "rejected")))


def _pair_sharegpt(row: Row) -> PreferencePair:
    def side(key: str) -> Chat:
        message = value_of(row, key)
        chat = chat_of(row, key, [message], role="from", content="value")
        if chat[0]["role"] != "assistant":
            raise RowError(f"key {key!r}: expected the assistant's message, found one of {message['from']!r}")
        return chat

    return make_pair(row, _sharegpt_chat(row), side("chosen"), side("rejected"))


def _pair_swift(row: Row) -> PreferencePair:
    chat = chat_of(row, "messages")
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise RowError(f"key 'messages': expected a conversation that ends with the chosen answer, found role {chat[-1]['role']!r} at its end")
    return make_pair(row, chat[:-1], chat[-1:], _assistant(text_of(row, "rejected_response")))


def _unpaired_plain(row: Row) -> JudgedAnswer:
    prompt, completion = text_or_chat(row, "prompt") if value_of(row, "prompt") != "" else "", answer_of(row, "completion")
    if prompt and isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(f"key 'completion': expected what 'prompt' is ({describe(prompt)}), found {describe(completion)}")
    return JudgedAnswer(prompt=prompt, completion=completion, good=judgement_of(row, "label"))


def _unpaired_chat(chat: Chat, key: str, good: bool) -> JudgedAnswer:
    if chat[-1]["role"] != "assistant" or len(chat) < 2:
        raise RowError(f"key {key!r}: expected a conversation that ends with the judged answer, found role {chat[-1]['role']!r} at its end")
    return JudgedAnswer(prompt=chat[:-1], completion=chat[-1:], good=good)


def _unpaired_sharegpt(row: Row) -> JudgedAnswer:
    return _unpaired_chat(_sharegpt_chat(row), "conversations", judgement_of(row, "kto_tag"))


def _unpaired_messages(row: Row) -> JudgedAnswer:
    return _unpaired_chat(chat_of(row, "messages"), "messages", judgement_of(row, "label"))


def _prompt_plain(row: Row) -> str | Chat:
    prompt = text_or_chat(row, "prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise RowError("key 'prompt': expected messages that end before the assistant's turn, found an assistant's message last")
    return prompt


def _prompt_of_pair(convert: Callable[[Row], PreferencePair]) -> Callable[[Row], str | Chat]:
    def prompt(row: Row) -> str | Chat:
        found = convert(row).prompt
        assert isinstance(found, (str, list))
        if not found:
            raise RowError("keys 'chosen' and 'rejected': expected a prompt that the two answers share, found whole texts")
        return found

    return prompt


@dataclass(frozen=True, slots=True)
class Format:
    """One format: the columns that tell it, a further test of the first row, and what it can be turned into."""

    name: str  # as data.format names it
    keys: tuple[str, ...]  # required columns
    columns: str  # for messages
    sft: Callable[[Row], dict[str, Any]] | None = None
    pair: Callable[[Row], PreferencePair] | None = None
    unpaired: Callable[[Row], JudgedAnswer] | None = None
    prompt: Callable[[Row], str | Chat] | None = None
    test: Callable[[Row], bool] = field(default=lambda row: True)
    consumed: tuple[str, ...] = ()  # columns that make the prompt; the others are a prompt's fields

    def converter(self, use: Use) -> Callable[[Row], Any] | None:
        return {Use.sft: self.sft, Use.preference: self.pair, Use.unpaired: self.unpaired or self.pair, Use.prompt: self.prompt}[use]


def _is_chat(row: Row, key: str) -> bool:
    return isinstance(row[key], list)


# The most particular first: the first one that fits a row names the file.
FORMATS: tuple[Format, ...] = (
    Format(
        "hh_rlhf",
        ("chosen", "rejected"),
        "chosen, rejected (transcripts of Human: and Assistant: turns)",
        pair=_pair_hh,
        prompt=_prompt_of_pair(_pair_hh),
        test=lambda row: "prompt" not in row and all(isinstance(row[k], str) and ASSISTANT_TURN in row[k] for k in ("chosen", "rejected")),
        consumed=("chosen", "rejected"),
    ),
    Format(
        "alpaca_preference",
        ("instruction", "chosen", "rejected"),
        "instruction, chosen, rejected (and input, system, history)",
        pair=_pair_alpaca,
        prompt=_alpaca_prompt,
        consumed=("instruction", "input", "system", "history"),
    ),
    Format(
        "sharegpt_preference",
        ("conversations", "chosen", "rejected"),
        "conversations of {from, value}; chosen, rejected as {from, value}",
        pair=_pair_sharegpt,
        prompt=lambda row: without_answer(_sharegpt_chat(row), "conversations"),
        consumed=("conversations", "system"),
    ),
    Format(
        "swift_preference",
        ("messages", "rejected_response"),
        "messages, rejected_response",
        pair=_pair_swift,
        prompt=lambda row: without_answer(chat_of(row, "messages"), "messages"),
        consumed=("messages",),
    ),
    Format(
        "ultrafeedback",
        ("prompt", "chosen", "rejected"),
        "prompt (text); chosen, rejected (whole conversations)",
        pair=_pair_ultrafeedback,
        prompt=_prompt_of_pair(_pair_ultrafeedback),
        test=lambda row: isinstance(row["prompt"], str) and _is_chat(row, "chosen") and _is_chat(row, "rejected"),
        consumed=("prompt",),
    ),
    Format(
        "preference",
        ("prompt", "chosen", "rejected"),
        "prompt, chosen, rejected (texts or lists of messages)",
        pair=_pair_explicit,
        prompt=_prompt_plain,
        consumed=("prompt",),
    ),
    Format(
        "implicit_preference",
        ("chosen", "rejected"),
        "chosen, rejected (whole texts or whole conversations)",
        pair=_pair_implicit,
        prompt=_prompt_of_pair(_pair_implicit),
        consumed=("chosen", "rejected"),
    ),
    Format(
        "unpaired",
        ("prompt", "completion", "label"),
        "prompt, completion (texts or lists of messages), label (true: a good answer)",
        unpaired=_unpaired_plain,
        prompt=_prompt_plain,
        consumed=("prompt",),
    ),
    Format(
        "messages_unpaired",
        ("messages", "label"),
        "messages of {role, content}, label (true: a good answer)",
        unpaired=_unpaired_messages,
        prompt=lambda row: without_answer(chat_of(row, "messages"), "messages"),
        consumed=("messages",),
    ),
    Format(
        "sharegpt_unpaired",
        ("conversations", "kto_tag"),
        "conversations of {from, value}, kto_tag (true: a good answer)",
        unpaired=_unpaired_sharegpt,
        prompt=lambda row: without_answer(_sharegpt_chat(row), "conversations"),
        consumed=("conversations", "system"),
    ),
    Format(
        "prompt_completion",
        ("prompt", "completion"),
        "prompt, completion (texts or lists of messages)",
        sft=_sft_prompt_completion,
        prompt=_prompt_plain,
        consumed=("prompt",),
    ),
    Format(
        "messages",
        ("messages",),
        "messages of {role, content}",
        sft=_sft_messages,
        prompt=lambda row: without_answer(chat_of(row, "messages"), "messages"),
        consumed=("messages",),
    ),
    Format(
        "sharegpt",
        ("conversations",),
        "conversations of {from, value}",
        sft=_sft_sharegpt,
        prompt=lambda row: without_answer(_sharegpt_chat(row), "conversations"),
        consumed=("conversations", "system"),
    ),
    Format(
        "alpaca",
        ("instruction", "output"),
        "instruction, output (and input, system, history)",
        sft=_sft_alpaca,
        prompt=_alpaca_prompt,
        consumed=("instruction", "input", "system", "history"),
    ),
    Format("prompt", ("prompt",), "prompt (text or a list of messages)", prompt=_prompt_plain, consumed=("prompt",)),
    Format("text", ("text",), "text", sft=_sft_text),
)


def by_name(name: str) -> Format:
    return next(f for f in FORMATS if f.name == name)


def reading(use: Use) -> list[Format]:
    """The formats that can be turned into `use`."""
    return [f for f in FORMATS if f.converter(use) is not None]


def detect(row: Row, use: Use | None = None) -> Format | None:
    """The format that a row's columns show, among those for `use` when it is given; None when none fits."""
    known = FORMATS if use is None else reading(use)
    return next((f for f in known if all(k in row for k in f.keys) and f.test(row)), None)


def nearest_format(row: Row, use: Use) -> tuple[Format, str]:
    """The format for `use` that lacks the fewest columns, and the first column that it lacks."""

    def lacking(format_: Format) -> list[str]:
        return [k for k in format_.keys if k not in row]

    def distance(format_: Format) -> tuple[float, int, int]:
        # a column that is there under a misspelt name counts half
        cost = sum(0.5 if nearest(k, [c for c in row if c not in format_.keys]) else 1.0 for k in lacking(format_))
        return cost / len(format_.keys), -len(format_.keys), -FORMATS.index(format_)  # the plainer one of equals

    best = min(reading(use), key=distance)
    return best, (lacking(best) or [""])[0]


def judging_key(row: Row) -> str | None:
    """The true/false column by which an unpaired preference row says whether its answer is good; None for other rows."""
    if not any(k in row for k in ("completion", "conversations", "messages")):
        return None
    return next((k for k in ("label", "kto_tag") if isinstance(row.get(k), bool)), None)


def texts_in(value: Any) -> list[str]:
    """Every text of a converted record: strings, and the contents of messages."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, PreferencePair):
        return texts_in([value.prompt, value.chosen, value.rejected])
    if isinstance(value, JudgedAnswer):
        return texts_in([value.prompt, value.completion])
    if isinstance(value, Mapping):
        return texts_in(value["content"]) if set(value) == {"role", "content"} else texts_in(list(value.values()))
    return [t for v in value for t in texts_in(v)] if isinstance(value, (list, tuple)) else []
