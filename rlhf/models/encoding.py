"""Rows to token ids, in the one form that every stage uses: the prompt's tokens, then the
response's tokens, then the token that ends it.

Prompt and response are tokenised apart, because that is what a policy sees when it samples: its
response never merges with the prompt's last token. SFT, the reward model and its scorer share these
functions, so what is trained is what is scored.

In a conversation an answer is what the chat template writes after the prompt: its text as it is
under most templates, with other blanks under some, and under any template the tool calls and the
reasoning of a turn that holds them (rlhf/models/turns.py tries what a template does).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.models.templates import rendered
from rlhf.models.turns import (
    closing_id,
    end_ids,
    habits,
    is_blank,
    plain_ids,
    prompt_text,
    short_prompt_text,
    single_bos,
    text_ids,
    up_to_end,
)
from rlhf.types import Message, RowError, Tools, UserError

IGNORED = -100  # label of a token that is not trained, torch's cross-entropy convention
Chat = Sequence[Message]


class RewrittenTurn(ValueError):
    """A turn that the chat template renders otherwise when another one follows."""


# what a turn of text alone may hold; `train` changes labels only
_OF_TEXT = frozenset(("role", "content", "train"))


def is_chat(value: object) -> bool:
    """A list of messages rather than a string."""
    return isinstance(value, list)


def require_template(tokenizer: Any, what: str) -> None:
    """Chat rows need a chat template. Raises UserError."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{what}: the rows hold chat messages, but the tokenizer has no chat template. "
            "Set data.chat_template to a name (chatml, llama-3 ...) or a file with a Jinja "
            "template, or give plain text rows."
        )


def render(
    tokenizer: Any, messages: Chat, *, generation_prompt: bool, tools: Tools | None = None
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template, with one
    beginning-of-sequence token at most. Raises TemplateRefusal where the template refuses it.
    """
    text = rendered(tokenizer, messages, generation_prompt=generation_prompt, tools=tools)
    return single_bos(tokenizer, plain_ids(tokenizer, text))


def prompt_ids(tokenizer: Any, prompt: str | Chat, tools: Tools | None = None) -> list[int]:
    """What the policy reads before it writes: the template up to the assistant's turn, or the text
    behind the tokens that the tokenizer writes before it. Never the tokenizer's own end.
    """
    if isinstance(prompt, str):
        return _begun(tokenizer, text_ids(tokenizer, prompt))
    return single_bos(tokenizer, plain_ids(tokenizer, prompt_text(tokenizer, prompt, tools)))


def unexpanded_prompt_ids(
    tokenizer: Any, prompt: str | Chat, tools: Tools | None = None
) -> list[int]:
    """`prompt_ids` with one image token for each picture, as vLLM wants a prompt."""
    if isinstance(prompt, str):
        return prompt_ids(tokenizer, prompt)
    text = short_prompt_text(tokenizer, prompt, tools)
    return single_bos(tokenizer, plain_ids(tokenizer, text))


def _begun(tokenizer: Any, ids: list[int]) -> list[int]:
    """A text's ids behind the tokenizer's own first tokens, unless it holds them itself."""
    prefix = list(habits(tokenizer).prefix)
    if ids[: len(prefix)] != prefix:
        ids = [*prefix, *ids]
    return single_bos(tokenizer, ids)


def response_ids(
    tokenizer: Any, text: str, *, finished: bool = True, chat: bool = False
) -> list[int]:
    """What the policy writes: the text, and the token that ends it when it is `finished`: the
    text's own, or else `closing_id`. `chat`: after a conversation.
    """
    ids = text_ids(tokenizer, text)
    if ids and ids[-1] in end_ids(tokenizer):
        return ids if finished else ids[:-1]
    return [*ids, closing_id(tokenizer, chat=chat)] if finished else ids


def is_text_turn(message: Mapping[str, Any]) -> bool:
    """Whether a turn is nothing but its text, which `response_ids` tokenises."""
    return all(key in _OF_TEXT or value is None for key, value in message.items())


def answer_ids(
    tokenizer: Any,
    context: str | Chat,
    answer: str | Message,
    tools: Tools | None = None,
    *,
    finished: bool = True,
) -> list[int]:
    """What the policy writes after `context`, with the token that ends it where it is `finished`: a
    text, or an assistant's turn with its tool calls. Raises ValueError as `turn_ids`.
    """
    turn: Message
    turn = answer if not isinstance(answer, str) else {"role": "assistant", "content": answer}
    if turn.get("images"):
        raise RowError("the answer holds pictures, which a policy can't write: remove them")
    if isinstance(context, str):
        return _after_text(tokenizer, context, str(turn["content"]), finished=finished)
    if is_text_turn(turn) and _stays(tokenizer, turn["content"]):
        return response_ids(tokenizer, turn["content"], finished=finished, chat=True)
    whole = render(tokenizer, [*context, turn], generation_prompt=False, tools=tools)
    ids = turn_ids(tokenizer, whole, context, turn, tools)
    ends = end_ids(tokenizer)
    if ids and ids[-1] in ends:
        return ids if finished else ids[:-1]
    return [*ids, closing_id(tokenizer, chat=True)] if finished else ids


def _after_text(tokenizer: Any, context: str, text: str, *, finished: bool) -> list[int]:
    """A response to a text: it never begins with the token that begins a sequence, which stands
    before the prompt.
    """
    ids = response_ids(tokenizer, text, finished=finished)
    bos = tokenizer.bos_token_id
    if ids[:1] == [bos] and bos != tokenizer.eos_token_id and prompt_ids(tokenizer, context):
        return single_bos(tokenizer, ids)[1:]
    return ids


def _stays(tokenizer: Any, text: str) -> bool:
    """Whether the template writes an answer's text as it is, and tokenised by itself it gives the
    same tokens.
    """
    turn = habits(tokenizer).turn
    return turn.apart and not (turn.strips and text != text.strip())


def turn_ids(
    tokenizer: Any, whole: list[int], before: Chat, turn: Message, tools: Tools | None
) -> list[int]:
    """The tokens of an assistant's `turn` within `whole`, the rendered conversation: what rendering
    it adds to the conversation `before` it with a generation prompt, up to the token that ends it.

    Raises ValueError where the template changes earlier turns when later ones follow, and for a
    turn of which it writes nothing.
    """
    head = prompt_ids(tokenizer, before, tools) if before else []
    upto = render(tokenizer, [*before, turn], generation_prompt=False, tools=tools)
    span = up_to_end(tokenizer, upto[len(head) :])
    stop = len(head) + len(span)
    if upto[: len(head)] == head and whole[:stop] != head + span:
        raise _rewritten(before)
    if upto[: len(head)] != head:
        if whole == upto and _merges(tokenizer, before, turn, tools):
            return response_ids(tokenizer, turn["content"], chat=True)
        raise _not_told_apart(tokenizer, before, turn, tools)
    _refuse_unwritten(tokenizer, turn)
    return span


def last_turn_ids(
    tokenizer: Any, whole: list[int], head: list[int], messages: Chat, tools: Tools | None
) -> list[int]:
    """What the policy writes after `head`, the prompt's tokens: the last of `messages`. Raises
    ValueError as `turn_ids`.
    """
    *before, turn = messages
    if not (is_text_turn(turn) and _stays(tokenizer, turn["content"])):
        return turn_ids(tokenizer, whole, before, turn, tools)
    if whole[: len(head)] != head and not _merges(tokenizer, before, turn, tools):
        raise _not_told_apart(tokenizer, before, turn, tools)
    return response_ids(tokenizer, turn["content"], chat=True)


def _merges(tokenizer: Any, before: Chat, turn: Message, tools: Tools | None) -> bool:
    """Whether a turn of text begins with characters that become one token with the prompt's last,
    so that prompt and conversation begin alike as texts and not as tokens.
    """
    if not before or not is_text_turn(turn):
        return False
    text = rendered(tokenizer, [*before, turn], generation_prompt=False, tools=tools)
    return text.startswith(prompt_text(tokenizer, before, tools))


def _not_told_apart(tokenizer: Any, before: Chat, turn: Message, tools: Tools | None) -> ValueError:
    if _merges(tokenizer, before, turn, tools):
        return ValueError(
            f"message {len(before)}: it begins with {turn['content'][:10]!r}, which becomes one "
            "token with what the chat template writes before it, so it can't be told apart from "
            "the turns around it: remove the blanks that it begins with"
        )
    return _rewritten(before)


def _rewritten(before: Chat) -> RewrittenTurn:
    return RewrittenTurn(
        f"message {len(before)}: the chat template renders a turn differently when another "
        "follows, or otherwise than its generation prompt begins it, so assistant turns can't be "
        "told apart: mark the earlier ones with train: false, or set data.chat_template"
    )


def _refuse_unwritten(tokenizer: Any, turn: Message) -> None:
    """Raises ValueError for a turn that is nothing but calls, where the template writes none."""
    calls_alone = turn.get("tool_calls") and not turn["content"]
    if calls_alone and "tool_calls" in habits(tokenizer).unread:
        raise ValueError(
            "an assistant's turn holds 'tool_calls' alone, which the chat template never reads: "
            "set data.chat_template to a template that writes them"
        )


def split_turn(
    prompt: str | Chat | None, answer: str | Chat
) -> tuple[str | list[Message], str | Message]:
    """A row's prompt and one of its answers as context and response; the response of a conversation
    is its last assistant turn.

    Raises ValueError for a conversation that does not end with an assistant's turn, or has nothing
    before it.
    """
    if isinstance(answer, str):
        context: Any = prompt if prompt is not None else ""
        return context, answer
    messages = [*(prompt if isinstance(prompt, list) else []), *answer]
    if not messages or messages[-1].get("role") != "assistant":
        found = messages[-1].get("role") if messages else "no messages"
        raise ValueError(f"the conversation must end with an assistant turn, found {found!r}")
    if len(messages) == 1:
        raise ValueError(
            "the conversation holds an assistant turn only, with nothing that it answers"
        )
    return messages[:-1], messages[-1]


def split_answer(prompt: str | Chat | None, answer: str | Chat) -> tuple[str | list[Message], str]:
    """`split_turn` with the response's text alone, for people and scorers that read texts."""
    context, turn = split_turn(prompt, answer)
    return context, turn if isinstance(turn, str) else turn_text(turn)


def turn_text(message: Mapping[str, Any]) -> str:
    """All that a message says as one text, for people and scorers that read texts: its reasoning
    as <think>, its text, and each call as <tool_call>.
    """
    parts = []
    if message.get("reasoning_content"):
        parts.append(f"<think>\n{message['reasoning_content']}\n</think>")
    if message["content"]:
        parts.append(str(message["content"]))
    for call in message.get("tool_calls") or ():
        written = json.dumps(call.get("function", call), ensure_ascii=False)
        parts.append(f"<tool_call>\n{written}\n</tool_call>")
    return "\n".join(parts)


def encode_answer(
    tokenizer: Any, prompt: str | Chat | None, answer: str | Chat, tools: Tools | None = None
) -> list[int]:
    """Token ids of a prompt and a finished answer: what a reward model reads. Raises ValueError as
    `split_turn` and `turn_ids`.
    """
    context, turn = split_turn(prompt, answer)
    return prompt_ids(tokenizer, context, tools) + answer_ids(tokenizer, context, turn, tools)


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Plain text for SFT: token ids with an end token at their end, the text's own (blanks behind
    it are left out) or end-of-sequence, and labels that train all of them.
    """
    ids = _begun(tokenizer, text_ids(tokenizer, text))
    stop = len(ids)
    while stop and is_blank(tokenizer, ids[stop - 1]):
        stop -= 1
    if stop and ids[stop - 1] in end_ids(tokenizer):
        ids = ids[:stop]
    else:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, list(ids)


def encode_completion(
    tokenizer: Any,
    prompt: str | Chat,
    completion: str | Message,
    *,
    completion_only: bool,
    tools: Tools | None = None,
) -> tuple[list[int], list[int]]:
    """A prompt and its completion for SFT: token ids, and labels that leave the prompt out when
    `completion_only`.
    """
    context = prompt_ids(tokenizer, prompt, tools)
    answer = answer_ids(tokenizer, prompt, completion, tools)
    return context + answer, ([IGNORED] * len(context) if completion_only else context) + answer
