"""Rows to token ids, in the one form that every stage uses: the prompt's tokens, then the
response's tokens, then end-of-sequence.

Prompt and response are tokenised apart, because that is what a policy sees when it samples: its
response never merges with the prompt's last token. SFT, the reward model and its scorer share these
functions, so what is trained is what is scored.

An assistant's turn that holds more than text (tool calls, reasoning) has no text of its own: its
tokens are those that the chat template adds to the conversation before it.
"""

import re
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


def template_reads(tokenizer: Any, key: str) -> bool:
    """Whether the tokenizer's chat template (one of them, where it has several) names `key`."""
    template = tokenizer.chat_template or ""
    templates = template.values() if isinstance(template, dict) else [template]
    return any(re.search(rf"\b{re.escape(key)}\b", text) for text in templates)


def render(
    tokenizer: Any, messages: Chat, *, generation_prompt: bool, tools: Tools | None = None
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template. Raises UserError where the
    template refuses it.
    """
    text = render_text(tokenizer, messages, generation_prompt=generation_prompt, tools=tools)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_text(
    tokenizer: Any, messages: Chat, *, generation_prompt: bool, tools: Tools | None = None
) -> str:
    """What `render` tokenises."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
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
    return _up_to_end(tokenizer, upto[len(head) :])


def _up_to_end(tokenizer: Any, span: list[int]) -> list[int]:
    """`span` up to its last end-of-sequence token, all of it without one."""
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
        if index >= first
        and message.get("role") == "assistant"
        and message.get("train") is not False
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
    skipped = first if completion_only else 0
    answers = [
        index
        for index, message in enumerate(messages)
        if index >= skipped and message.get("role") == "assistant"
    ]
    located = located_at_once(tokenizer, messages, answers, tools)
    if located is None:
        located = located_by_prefixes(tokenizer, messages, answers, tools)
    ids = located.ids
    trained = trained_turns(messages, first)
    if completion_only and not trained:
        raise ValueError("the conversation has no assistant turn, so there is nothing to train")
    labels = [IGNORED] * len(ids) if completion_only else list(ids)
    eos = tokenizer.eos_token_id
    for i, (start, stop) in located.turns.items():
        trains = i in trained
        labels[start:stop] = ids[start:stop] if trains else [IGNORED] * (stop - start)
        if i == len(messages) - 1:  # nothing follows: end where the policy would stop
            ids, labels = ids[:stop], labels[:stop]
            if ids[-1] != eos:
                ids, labels = [*ids, eos], [*labels, eos if trains else IGNORED]
    return ids, labels


# ---- where the assistant's turns are ----


@dataclass(frozen=True, slots=True)
class Located:
    """A conversation's token ids, and from which to which the turns of some messages go."""

    ids: list[int]
    turns: dict[int, tuple[int, int]]  # by message: first token, and the one after the last


def located_by_prefixes(
    tokenizer: Any, messages: list[Message], wanted: Sequence[int], tools: Tools | None
) -> Located:
    """By rendering and tokenising the conversation up to each turn. Raises ValueError as
    `turn_ids`.
    """
    ids = render(tokenizer, messages, generation_prompt=False, tools=tools)
    turns = {}
    for i in wanted:
        before = messages[:i]
        start = 0
        if before:
            start = len(render(tokenizer, before, generation_prompt=True, tools=tools))
        turn = turn_ids(tokenizer, ids, before, messages[i], tools)
        turns[i] = (start, start + len(turn))
    return Located(ids, turns)


def located_at_once(
    tokenizer: Any, messages: list[Message], wanted: Sequence[int], tools: Tools | None
) -> Located | None:
    """The same by tokenising the conversation once. None where it may differ, or be refused.

    Texts are rendered for each turn, which is cheap. A turn's tokens are those of the whole that
    lie between two beginnings of its text. That the tokens of a beginning are the first tokens of
    the whole is not assumed but checked, on the piece behind the last token at which the tokenizer
    splits every text (`_splitters`): what stands before that is the same text, split alike.
    """
    splitters = _splitters(tokenizer)
    if splitters is None or not wanted:
        return None
    try:
        text = render_text(tokenizer, messages, generation_prompt=False, tools=tools)
        ends = [len(text)]
        for i in wanted:
            head = ""
            if i > 0:
                head = render_text(tokenizer, messages[:i], generation_prompt=True, tools=tools)
            upto = text
            if i < len(messages) - 1:
                upto = render_text(
                    tokenizer, messages[: i + 1], generation_prompt=False, tools=tools
                )
            if not (upto.startswith(head) and text.startswith(upto)):
                return None
            ends += [len(head), len(upto)]
    except UserError:
        return None
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(whole["input_ids"])
    counts = _beginnings(tokenizer, text, ids, whole["offset_mapping"], splitters, ends)
    if counts is None:
        return None
    turns = {}
    for i in wanted:
        start, stop = counts[ends[1 + 2 * len(turns)]], counts[ends[2 + 2 * len(turns)]]
        turns[i] = (start, start + len(_up_to_end(tokenizer, ids[start:stop])))
    return Located(ids, turns)


def _beginnings(
    tokenizer: Any,
    text: str,
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
    splitters: dict[int, str],
    ends: Iterable[int],
) -> dict[int, int] | None:
    """How many tokens each beginning text[:end] has; None unless each beginning's tokens are the
    first of `ids`, the tokens of `text`.
    """
    splits = []
    for k, token in enumerate(ids):
        # not where the id stands for an unknown character
        if token in splitters and text[slice(*offsets[k])] == splitters[token]:
            splits.append(k)
    after = [offsets[k][1] for k in splits]
    counts, pieces = {0: 0, len(text): len(ids)}, {}
    for end in ends:
        if end not in counts:
            at = bisect_right(after, end) - 1
            pieces[end] = splits[at] if at >= 0 else 0
    if pieces:
        texts = [text[offsets[k][0] if k else 0 : end] for end, k in pieces.items()]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for (end, k), piece in zip(pieces.items(), found, strict=True):
            if ids[k : k + len(piece)] != piece:
                return None
            counts[end] = k + len(piece)
    return counts


_KNOWN_SPLITTERS: "weakref.WeakKeyDictionary[Any, dict[int, str]]" = weakref.WeakKeyDictionary()


def _splitters(tokenizer: Any) -> dict[int, str] | None:
    """Added tokens, with their texts, that a tokenizer of the library tokenizers finds before
    anything else, whatever stands beside them; None for other tokenizers.
    """
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "split_special_tokens", 0):
        return None
    if tokenizer not in _KNOWN_SPLITTERS:
        _KNOWN_SPLITTERS[tokenizer] = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if not (token.normalized or token.single_word or token.lstrip or token.rstrip)
        }
    return _KNOWN_SPLITTERS[tokenizer]
