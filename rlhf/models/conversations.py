"""Conversations for SFT as token ids, with labels of the answers that train.

Some chat templates render earlier turns otherwise once others follow: those of Qwen 3 and
DeepSeek-R1 leave their reasoning out. In the whole conversation such an answer is not what a policy
writes, so each is encoded in a conversation that ends where the policy's did.
"""

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from conf.choices import RewrittenTurns
from rlhf.models.encoding import (
    IGNORED,
    Chat,
    RewrittenTurn,
    last_turn_ids,
    prompt_ids,
    render,
    turn_ids,
)
from rlhf.models.templates import beginnings_rendered, rendered
from rlhf.models.turns import (
    check_rows,
    closing_id,
    end_ids,
    habits,
    ids_of,
    prompt_text,
    single_bos,
    up_to_end,
)
from rlhf.types import Message, Tools, UserError


@dataclass(frozen=True, slots=True)
class Located:
    """A conversation's token ids, up to the end of its last turn where that is the assistant's, and
    from which to which the turns of some messages go.
    """

    ids: list[int]
    turns: dict[int, tuple[int, int]]  # by message: first token, and the one after the last


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
    trained, last = trained_turns(messages, first), len(messages) - 1
    if completion_only and not trained:
        raise ValueError("the conversation has no assistant turn, so there is nothing to train")
    wanted = []
    for i, message in enumerate(messages):
        needed = i in trained or i == last or not completion_only
        if message.get("role") == "assistant" and needed:
            wanted.append(i)
    located = located_at_once(tokenizer, messages, wanted, tools)
    if located is None:
        located = located_by_prefixes(tokenizer, messages, wanted, tools)
    ids = located.ids
    labels = [IGNORED] * len(ids) if completion_only else list(ids)
    for i, (start, stop) in located.turns.items():
        trains = i in trained
        labels[start:stop] = ids[start:stop] if trains else [IGNORED] * (stop - start)
        if i == last and ids[-1] not in end_ids(tokenizer):
            end = closing_id(tokenizer, chat=True)
            ids, labels = [*ids, end], [*labels, end if trains else IGNORED]
    return ids, labels


def located_by_prefixes(
    tokenizer: Any, messages: list[Message], wanted: Sequence[int], tools: Tools | None
) -> Located:
    """Where the turns of the messages `wanted` stand, by rendering and tokenising the conversation
    up to each. Raises ValueError as `turn_ids`.
    """
    ids = render(tokenizer, messages, generation_prompt=False, tools=tools)
    turns = {}
    for i in wanted:
        head = prompt_ids(tokenizer, messages[:i], tools) if i else []
        if i < len(messages) - 1:
            turn = turn_ids(tokenizer, ids, messages[:i], messages[i], tools)
        else:  # it stands behind the prompt that a policy would continue
            turn = last_turn_ids(tokenizer, ids, head, messages, tools)
            ids = [*head, *turn]
        turns[i] = (len(head), len(head) + len(turn))
    return Located(ids, turns)


# ---- answers that are rendered otherwise later ----


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


# ---- where turns stand in the tokens, found by tokenising once ----


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
    if habits(tokenizer).turn.end is None and wanted[-1] == len(messages) - 1:
        return None  # blanks behind the last turn are the template's, and no token tells them
    try:
        heads, uptos = _texts(tokenizer, messages, wanted, tools)
    except UserError:
        return None
    text = uptos[-1]
    ends = [len(text)]
    for head, upto in zip(heads, uptos, strict=False):  # one more where the last turn is a user's
        if not (upto.startswith(head) and text.startswith(upto)):
            return None
        ends += [len(head), len(upto)]
    ids = ids_of(tokenizer, [text])[0]
    check_rows(tokenizer, ids)
    if single_bos(tokenizer, ids) != ids:
        return None
    splits = _splits(text, ids, splitters)
    if splits is None:
        return None
    counts = _beginnings(tokenizer, text, ids, splits, ends)
    if counts is None:
        return None
    turns: dict[int, tuple[int, int]] = {}
    for i in wanted:
        start, stop = counts[ends[1 + 2 * len(turns)]], counts[ends[2 + 2 * len(turns)]]
        turns[i] = (start, start + len(up_to_end(tokenizer, ids[start:stop])))
    if wanted[-1] == len(messages) - 1:
        ids = ids[: turns[wanted[-1]][1]]
    return Located(ids, turns)


def _texts(
    tokenizer: Any, messages: list[Message], wanted: Sequence[int], tools: Tools | None
) -> tuple[list[str], list[str]]:
    """The texts of the conversation up to each turn of `wanted`, and those with the turn; the last
    of these is the whole text. Raises TemplateRefusal.
    """
    opening = habits(tokenizer).turn.opening
    starts = [i for i in wanted if i > 0]
    prompts = beginnings_rendered(tokenizer, messages, starts, generation_prompt=True, tools=tools)
    heads = [text + opening for text in prompts]
    if len(starts) < len(wanted):
        heads.insert(0, "")
    stops = [i + 1 for i in wanted if i + 1 < len(messages)]
    texts = beginnings_rendered(
        tokenizer, messages, [*stops, len(messages)], generation_prompt=False, tools=tools
    )
    return heads, texts


@dataclass(frozen=True, slots=True)
class _Split:
    """A token at which the text is split."""

    index: int  # among the text's tokens
    start: int  # of its characters
    stop: int


def _splits(text: str, ids: list[int], splitters: dict[int, str]) -> list[_Split] | None:
    """The splitters among `ids`, the tokens of `text`. None unless the text holds their texts in
    the same order, and no more of them.
    """
    indices = [index for index, token in enumerate(ids) if token in splitters]
    places: list[tuple[int, int]] = []  # first character, token
    for token in {ids[index] for index in indices}:
        places += [(start, token) for start in _places(text, splitters[token])]
    places.sort()
    if [token for _, token in places] != [ids[index] for index in indices]:
        return None
    return [
        _Split(index, start, start + len(splitters[token]))
        for index, (start, token) in zip(indices, places, strict=True)
    ]


def _places(text: str, part: str) -> Iterator[int]:
    """Where `part` begins in a text."""
    start = text.find(part)
    while start >= 0:
        yield start
        start = text.find(part, start + len(part))


def _beginnings(
    tokenizer: Any, text: str, ids: list[int], splits: list[_Split], ends: Iterable[int]
) -> dict[int, int] | None:
    """How many tokens each beginning text[:end] has; None unless each beginning's tokens are the
    first of `ids`, the tokens of `text`.
    """
    after = [split.stop for split in splits]
    counts = {0: 0, len(text): len(ids)}
    pieces: dict[int, tuple[int, str]] = {}  # by end: the piece's first token, and its text
    for end in ends:
        if end in counts:
            continue
        at = bisect_right(after, end) - 1
        if at < 0:
            pieces[end] = (0, text[:end])
        else:
            pieces[end] = (splits[at].index, text[splits[at].start : end])
    texts = list(dict.fromkeys(piece for _, piece in pieces.values()))
    tokens = dict(zip(texts, ids_of(tokenizer, texts), strict=True))
    for end, (first, piece) in pieces.items():
        stop = first + len(tokens[piece])
        if ids[first:stop] != tokens[piece]:
            return None
        counts[end] = stop
    return counts


_KNOWN_SPLITTERS: "weakref.WeakKeyDictionary[Any, dict[int, str]]" = weakref.WeakKeyDictionary()


def _splitters(tokenizer: Any) -> dict[int, str] | None:
    """Added tokens, with their texts, that a tokenizer of the library tokenizers finds before
    anything else, whatever stands beside them; None for other tokenizers.
    """
    if not getattr(tokenizer, "is_fast", False) or getattr(
        tokenizer, "split_special_tokens", False
    ):
        return None
    if tokenizer not in _KNOWN_SPLITTERS:
        # not the one that stands for unknown characters, which comes without its text
        _KNOWN_SPLITTERS[tokenizer] = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if number != tokenizer.unk_token_id
            and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
        }
    return _KNOWN_SPLITTERS[tokenizer]
