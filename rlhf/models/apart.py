"""Conversations whose earlier turns a chat template renders otherwise once others follow: Qwen 3
and DeepSeek-R1 leave their reasoning out. In the whole conversation such an answer is not what a
policy writes, so each is encoded in a conversation that ends where the policy's did.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from conf.choices import RewrittenTurns
from rlhf.models.encoding import RewrittenTurn, encode_conversation, trained_turns
from rlhf.models.turns import prompt_text, rendered
from rlhf.types import Message, Tools


@dataclass(frozen=True, slots=True)
class Conversation:
    """An encoded conversation, and which of its messages train."""

    messages: list[Message]
    trained: list[int]  # their places
    ids: list[int]
    labels: list[int]


def encode_apart(
    tokenizer: object,
    messages: list[Message],
    how: RewrittenTurns,
    *,
    first: int = 0,
    tools: Tools | None = None,
) -> list[Conversation]:
    """The conversation with labels of every answer from message `first` on that trains: as it is
    under most templates, else several, each up to one of them. Raises ValueError as
    `encode_conversation`, also for RewrittenTurns.refuse.
    """
    trained = trained_turns(messages, first)
    try:
        return [_encoded(tokenizer, messages, trained, first, tools)]
    except RewrittenTurn:
        parts = _parts(tokenizer, messages, trained, tools)
        if how is RewrittenTurns.refuse or parts == [messages]:
            raise
    return [_encoded(tokenizer, part, trained_turns(part), 0, tools) for part in parts]


def _encoded(
    tokenizer: object,
    messages: list[Message],
    trained: list[int],
    first: int,
    tools: Tools | None,
) -> Conversation:
    ids, labels = encode_conversation(
        tokenizer, messages, completion_only=True, first=first, tools=tools
    )
    return Conversation(messages, trained, ids, labels)


def _parts(
    tokenizer: object, messages: list[Message], trained: Sequence[int], tools: Tools | None
) -> list[list[Message]]:
    """The conversation up to each answer that needs one of its own, the others in it marked not to
    train. Answers that a longer part shows as the policy wrote them train there.
    """
    out: list[list[Message]] = []
    left = list(trained)
    while left:
        part = messages[: left[-1] + 1]
        text = rendered(tokenizer, part, generation_prompt=False, tools=tools)
        shown = [i for i in left if i == left[-1] or _shown(tokenizer, text, part, i, tools)]
        out.insert(0, [_flagged(message, i in shown) for i, message in enumerate(part)])
        left = [i for i in left if i not in shown]
    return out


def _shown(
    tokenizer: object, text: str, messages: Sequence[Message], i: int, tools: Tools | None
) -> bool:
    """Whether a conversation's `text` begins as the policy's did that ended with turn `i`."""
    head = prompt_text(tokenizer, messages[:i], tools)
    upto = rendered(tokenizer, messages[: i + 1], generation_prompt=False, tools=tools)
    return text.startswith(head) and text.startswith(upto)


def _flagged(message: Message, trains: bool) -> Message:
    if message["role"] != "assistant" or trains:
        return message
    return {**message, "train": False}
