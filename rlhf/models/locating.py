"""Where the assistant's turns stand in a conversation's tokens, found by tokenising it once."""

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.models.turns import (
    check_rows,
    habits,
    prompt_text,
    rendered,
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
        text = rendered(tokenizer, messages, generation_prompt=False, tools=tools)
        ends = [len(text)]
        for i in wanted:
            head = ""
            if i > 0:
                head = prompt_text(tokenizer, messages[:i], tools)
            upto = text
            if i < len(messages) - 1:
                upto = rendered(tokenizer, messages[: i + 1], generation_prompt=False, tools=tools)
            if not (upto.startswith(head) and text.startswith(upto)):
                return None
            ends += [len(head), len(upto)]
    except UserError:
        return None
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(whole["input_ids"])
    check_rows(tokenizer, ids)
    if single_bos(tokenizer, ids) != ids:
        return None
    counts = _beginnings(tokenizer, text, ids, whole["offset_mapping"], splitters, ends)
    if counts is None:
        return None
    turns: dict[int, tuple[int, int]] = {}
    for i in wanted:
        start, stop = counts[ends[1 + 2 * len(turns)]], counts[ends[2 + 2 * len(turns)]]
        turns[i] = (start, start + len(up_to_end(tokenizer, ids[start:stop])))
    if wanted[-1] == len(messages) - 1:
        ids = ids[: turns[wanted[-1]][1]]
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
    if not getattr(tokenizer, "is_fast", False) or getattr(
        tokenizer, "split_special_tokens", False
    ):
        return None
    if tokenizer not in _KNOWN_SPLITTERS:
        _KNOWN_SPLITTERS[tokenizer] = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if not (token.normalized or token.single_word or token.lstrip or token.rstrip)
        }
    return _KNOWN_SPLITTERS[tokenizer]
