"""Rows to token ids, in the one form that every stage uses: the prompt's tokens, then the
response's tokens, then end-of-sequence.

Prompt and response are tokenised apart, because that is what a policy sees when it samples: its
response never merges with the prompt's last token. SFT, the reward model and its scorer share these
functions, so what is trained is what is scored.

Not handled: models whose turns end with a token other than the tokenizer's end-of-sequence token;
theirs gets added.
"""

from collections.abc import Sequence
from typing import Any

from rlhf.types import UserError

Message = dict[str, Any]
IGNORED = -100  # label of a token that is not trained, torch's cross-entropy convention


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


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template. Raises UserError where the
    template refuses it.
    """
    from jinja2 import TemplateError

    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=True,
                add_generation_prompt=generation_prompt,
                return_dict=True,
            )["input_ids"]
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses a conversation of {len(messages)} messages: {error}"
        ) from error


def prompt_ids(tokenizer: Any, prompt: str | list[Message]) -> list[int]:
    """What the policy reads before it writes: the template up to the assistant's turn, or the text
    with its leading special tokens.
    """
    if isinstance(prompt, list):
        return render(tokenizer, prompt, generation_prompt=True)
    return list(tokenizer(prompt)["input_ids"])


def response_ids(tokenizer: Any, text: str, *, finished: bool = True) -> list[int]:
    """What the policy writes: the text, and the end-of-sequence token when it is `finished`."""
    ids = list(
        tokenizer(text.removesuffix(tokenizer.eos_token), add_special_tokens=False)["input_ids"]
    )
    return [*ids, tokenizer.eos_token_id] if finished else ids


def split_answer(
    prompt: str | list[Message] | None, answer: str | list[Message]
) -> tuple[str | list[Message], str]:
    """A row's prompt and one of its answers as context and response text; the response of a
    conversation is its last assistant turn.

    Raises ValueError for a conversation that does not end with an assistant's turn, or has nothing
    before it.
    """
    if isinstance(answer, str):
        return prompt if prompt is not None else "", answer
    messages = [*(prompt if isinstance(prompt, list) else []), *answer]
    if not messages or messages[-1].get("role") != "assistant":
        found = messages[-1].get("role") if messages else "no messages"
        raise ValueError(f"the conversation must end with an assistant turn, found {found!r}")
    if len(messages) == 1:
        raise ValueError(
            "the conversation holds an assistant turn only, with nothing that it answers"
        )
    return messages[:-1], str(messages[-1]["content"])


def encode_answer(
    tokenizer: Any, prompt: str | list[Message] | None, answer: str | list[Message]
) -> list[int]:
    """Token ids of a prompt and a finished answer: what a reward model reads. Raises ValueError as
    `split_answer`.
    """
    context, text = split_answer(prompt, answer)
    return prompt_ids(tokenizer, context) + response_ids(tokenizer, text)


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Plain text for SFT: token ids ending with end-of-sequence, and labels that train all
    of them.
    """
    ids = [*tokenizer(text.removesuffix(tokenizer.eos_token))["input_ids"], tokenizer.eos_token_id]
    return ids, list(ids)


def encode_completion(
    tokenizer: Any, prompt: str | list[Message], completion: str, *, completion_only: bool
) -> tuple[list[int], list[int]]:
    """A prompt and its completion for SFT: token ids, and labels that leave the prompt out when
    `completion_only`.
    """
    context, answer = prompt_ids(tokenizer, prompt), response_ids(tokenizer, completion)
    return context + answer, ([IGNORED] * len(context) if completion_only else context) + answer


def encode_conversation(
    tokenizer: Any, messages: list[Message], *, completion_only: bool, first: int = 0
) -> tuple[list[int], list[int]]:
    """A whole conversation for SFT: token ids, and labels of every assistant turn from message
    `first` on (of all tokens unless `completion_only`).

    An assistant's turn is what rendering it adds to the conversation before it with a generation
    prompt, up to its last end-of-sequence token. Raises ValueError where the template changes
    earlier turns when later ones follow, so that no turn can be told apart, and for a conversation
    without an assistant turn to train.
    """
    ids = render(tokenizer, messages, generation_prompt=False)
    turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i >= first]
    if completion_only and not turns:
        raise ValueError("the conversation has no assistant turn, so there is nothing to train")
    labels = [IGNORED] * len(ids) if completion_only else list(ids)
    eos = tokenizer.eos_token_id
    for i in turns:
        before = render(tokenizer, messages[:i], generation_prompt=True) if i else []
        after = render(tokenizer, messages[: i + 1], generation_prompt=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ValueError(
                "the chat template renders a turn differently when another follows, so assistant "
                "turns can't be told apart"
            )
        span = after[len(before) :]
        stop = len(span) - span[::-1].index(eos) if eos in span else len(span)
        labels[len(before) : len(before) + stop] = span[:stop]
        if i == len(messages) - 1:  # nothing follows: end where the policy would stop
            ids, labels = ids[: len(before) + stop], labels[: len(before) + stop]
            if ids[-1] != eos:
                ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels
