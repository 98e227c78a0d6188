"""Rows to token ids, in the one form that every stage uses: the prompt's tokens, then the
response's tokens, then end-of-sequence.

Prompt and response are tokenised apart, because that is what a policy sees when it samples: its
response never merges with the prompt's last token. SFT, the reward model and its scorer share these
functions, so what is trained is what is scored.

An assistant's turn that holds more than text (tool calls, reasoning) has no text of its own: its
tokens are those that the chat template adds to the conversation before it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.types import Message, Tools, UserError

IGNORED = -100  # label of a token that is not trained, torch's cross-entropy convention
Chat = Sequence[Message]
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
    """Token ids of a conversation under the tokenizer's chat template. Raises UserError where the
    template refuses it.
    """
    from jinja2 import TemplateError

    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                tokenize=True,
                add_generation_prompt=generation_prompt,
                return_dict=True,
            )["input_ids"]
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses a conversation of {len(messages)} messages: {error}"
        ) from error


def prompt_ids(tokenizer: Any, prompt: str | Chat, tools: Tools | None = None) -> list[int]:
    """What the policy reads before it writes: the template up to the assistant's turn, or the text
    with its leading special tokens.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return render(tokenizer, prompt, generation_prompt=True, tools=tools)


def response_ids(tokenizer: Any, text: str, *, finished: bool = True) -> list[int]:
    """What the policy writes: the text, and the end-of-sequence token when it is `finished`."""
    ids = list(
        tokenizer(text.removesuffix(tokenizer.eos_token), add_special_tokens=False)["input_ids"]
    )
    return [*ids, tokenizer.eos_token_id] if finished else ids


def is_text_turn(message: Mapping[str, Any]) -> bool:
    """Whether a turn is nothing but its text, which `response_ids` tokenises."""
    return all(key in _OF_TEXT or value is None for key, value in message.items())


def answer_ids(
    tokenizer: Any, context: str | Chat, answer: str | Message, tools: Tools | None = None
) -> list[int]:
    """What the policy writes after `context`, end-of-sequence included: a text, or an assistant's
    turn with its tool calls. Raises ValueError as `turn_ids`.
    """
    if isinstance(answer, str):
        return response_ids(tokenizer, answer)
    if is_text_turn(answer):
        return response_ids(tokenizer, answer["content"])
    before = [] if isinstance(context, str) else list(context)
    whole = render(tokenizer, [*before, answer], generation_prompt=False, tools=tools)
    turn = turn_ids(tokenizer, whole, before, answer, tools)
    eos = tokenizer.eos_token_id
    return turn if turn and turn[-1] == eos else [*turn, eos]


def turn_ids(
    tokenizer: Any, whole: list[int], before: Chat, turn: Message, tools: Tools | None
) -> list[int]:
    """The tokens of an assistant's `turn` within `whole`, the rendered conversation: what rendering
    it adds to the conversation `before` it with a generation prompt, up to its last end-of-sequence
    token.

    Raises ValueError where the template changes earlier turns when later ones follow.
    """
    head = []
    if before:
        head = render(tokenizer, before, generation_prompt=True, tools=tools)
    upto = render(tokenizer, [*before, turn], generation_prompt=False, tools=tools)
    if whole[: len(head)] != head or whole[: len(upto)] != upto:
        raise ValueError(
            "the chat template renders a turn differently when another follows, so assistant "
            "turns can't be told apart"
        )
    span = upto[len(head) :]
    eos = tokenizer.eos_token_id
    if eos not in span:
        return span
    return span[: len(span) - span[::-1].index(eos)]


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
    return context, turn if isinstance(turn, str) else str(turn["content"])


def encode_answer(
    tokenizer: Any, prompt: str | Chat | None, answer: str | Chat, tools: Tools | None = None
) -> list[int]:
    """Token ids of a prompt and a finished answer: what a reward model reads. Raises ValueError as
    `split_turn` and `turn_ids`.
    """
    context, turn = split_turn(prompt, answer)
    return prompt_ids(tokenizer, context, tools) + answer_ids(tokenizer, context, turn, tools)


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Plain text for SFT: token ids ending with end-of-sequence, and labels that train all
    of them.
    """
    ids = [*tokenizer(text.removesuffix(tokenizer.eos_token))["input_ids"], tokenizer.eos_token_id]
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


def trained_turns(messages: Chat, first: int = 0) -> list[int]:
    """Indices of the assistant's turns from `first` on that train: all but those with
    ``train: false``.
    """
    return [
        index
        for index, message in enumerate(messages)
        if index >= first and message.get("role") == "assistant" and message.get("train", True)
    ]


def encode_conversation(
    tokenizer: Any,
    messages: list[Message],
    *,
    completion_only: bool,
    first: int = 0,
    tools: Tools | None = None,
) -> tuple[list[int], list[int]]:
    """A whole conversation for SFT: token ids, and labels of every assistant turn from message
    `first` on that trains (of all tokens unless `completion_only`).

    Raises ValueError as `turn_ids`, and for a conversation without an assistant turn to train.
    """
    ids = render(tokenizer, messages, generation_prompt=False, tools=tools)
    turns = trained_turns(messages, first)
    if completion_only and not turns:
        raise ValueError("the conversation has no assistant turn, so there is nothing to train")
    labels = [IGNORED] * len(ids) if completion_only else list(ids)
    eos = tokenizer.eos_token_id
    for i, message in enumerate(messages):
        if message.get("role") != "assistant" or (i < first and completion_only):
            continue
        before = messages[:i]
        start = 0
        if before:
            start = len(render(tokenizer, before, generation_prompt=True, tools=tools))
        turn = turn_ids(tokenizer, ids, before, message, tools)
        stop = start + len(turn)
        trains = i in turns
        labels[start:stop] = turn if trains else [IGNORED] * len(turn)
        if i == len(messages) - 1:  # nothing follows: end where the policy would stop
            ids, labels = ids[:stop], labels[:stop]
            if ids[-1] != eos:
                ids, labels = [*ids, eos], [*labels, eos if trains else IGNORED]
    return ids, labels
