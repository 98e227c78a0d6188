"""Token ids of texts put together from those of their words, which are remembered: a text is mostly
words that were tokenised before, and looking them up takes a fraction of the time.

This gives the same tokens only where a tokenizer always begins anew at a word. Most byte-level ones
do: they cut a text by a regular expression (`_EXPRESSIONS`) before they tokenise each part by
itself. None of its parts goes on from a character that is no blank to a space, nor from a single
line end to a word, and what it takes of a text never depends on what stands before. So these places
end a part, whatever stands around them. Other tokenizers get whole texts.
"""

import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

# Letters and digits up to a space or a sign; or anything with the blanks before it, up to a space
# or a single line end (its own) before another word. What other blanks join stays together, and the
# last word has the blanks behind it.
_WORDS = re.compile(
    r" ?[A-Za-z0-9]+(?=[ .,;:!?)\"])"
    r"|\s*\S+(?:(?= \S)|(?:(?!\n[\w<\[])[^\S ]\s*\S+)*(?:\n(?=[\w<\[])|\s+\Z)?)"
)
_CUT = re.compile(r"\s\S|\S\s|[A-Za-z0-9][.,;:!?)\"]")  # of an added token
_OF_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
# what cuts a text before it is tokenised, of Llama 3 and GPT-4, Qwen 2 and 3, Qwen 3.5, and GPT-4o
_EXPRESSIONS = frozenset(
    (
        rf"{_OF_LETTERS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_BLANKS}",
        rf"{_OF_LETTERS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*|{_BLANKS}",
        rf"{_OF_LETTERS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_OF_LETTERS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_OF_LETTERS}?"
        rf"|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_BLANKS}",
    )
)
_MOST = 50_000  # words that are remembered, some 10 MB
_LONGEST = 40  # characters of one
_USUAL = 20  # characters of a word of a text that is made of words
_TRIED = 100_000  # words after which it is seen whether looking them up is worth it
_NEW = 0.2  # share of words that are new from which it is not


@dataclass(slots=True)
class Words:
    """The words that one tokenizer has tokenised. core: its tokenizer of the library tokenizers."""

    core: Any
    known: dict[str, list[int]] = field(default_factory=dict)
    looked_up: int = 0
    new: int = 0
    worth: bool = True

    def ids_of(self, text: str) -> list[int]:
        """The token ids of a text, as tokenising it whole gives them."""
        if not self.worth:
            return _whole(self.core, text)
        words = _WORDS.findall(text)
        if len(words) * _USUAL < len(text) or sum(map(len, words)) != len(text):
            return _whole(self.core, text)
        known = self.known
        try:
            return list(chain.from_iterable([known[word] for word in words]))
        except KeyError:
            return self._with_new(words)
        finally:
            self._count(len(words), 0)

    def _with_new(self, words: Sequence[str]) -> list[int]:
        new = list(dict.fromkeys(word for word in words if word not in self.known))
        found = self.core.encode_batch_fast(new, add_special_tokens=False)
        ids = {word: of_word.ids for word, of_word in zip(new, found, strict=True)}
        self._count(0, len(new))
        if len(self.known) < _MOST:
            self.known.update((word, ids[word]) for word in new if len(word) <= _LONGEST)
        out: list[int] = []
        for word in words:
            out += ids[word] if word in ids else self.known[word]
        return out

    def _count(self, looked_up: int, new: int) -> None:
        """Words that repeat themselves are worth it; code or numbers may not."""
        self.looked_up += looked_up
        self.new += new
        if self.looked_up >= _TRIED:
            self.worth = self.new < _NEW * self.looked_up
            self.looked_up = self.new = 0


def _whole(core: Any, text: str) -> list[int]:
    ids: list[int] = core.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


_OF: "weakref.WeakKeyDictionary[Any, tuple[Any, Words | None]]" = weakref.WeakKeyDictionary()


def forget(tokenizer: Any) -> None:
    """Remember no words of a tokenizer that may have been changed in ways that `words_of` doesn't
    see: a word of its vocabulary made an added token, another normalizer.
    """
    _OF.pop(tokenizer, None)


def words_of(tokenizer: Any, core: Any) -> Words | None:
    """The words of `tokenizer`, with `core` its tokenizer of the library tokenizers; None for one
    that need not begin anew at each. Forgotten when it gets a new token.
    """
    depends = (id(core), core.get_vocab_size(True), core.encode_special_tokens)
    kept = _OF.get(tokenizer)
    if kept is None or kept[0] != depends:
        kept = (depends, Words(core) if _begins_anew(core) else None)
        _OF[tokenizer] = kept
    return kept[1]


def _begins_anew(core: Any) -> bool:
    """Whether a tokenizer cuts every text at its words, added tokens included."""
    if type(core.model).__name__ != "BPE" or core.model.dropout:
        return False
    # composing characters (NFC) changes none across a space or a line end
    if core.normalizer is not None and _state(core.normalizer) != {"type": "NFC"}:
        return False
    if core.pre_tokenizer is None or not _cuts_at_words(_state(core.pre_tokenizer)):
        return False
    for token in core.get_added_tokens_decoder().values():
        if token.single_word or token.lstrip or token.rstrip or _CUT.search(token.content):
            return False
    return True


def _cuts_at_words(state: dict[str, Any]) -> bool:
    """Of a pre-tokenizer."""
    if state["type"] == "ByteLevel":
        return bool(state["use_regex"]) and not state["add_prefix_space"]
    if state["type"] != "Sequence" or len(state["pretokenizers"]) != 2:
        return False
    first, second = state["pretokenizers"]
    if first["type"] != "Split" or second["type"] != "ByteLevel":
        return False
    if second["use_regex"] or second["add_prefix_space"]:
        return False
    expression = first["pattern"].get("Regex")
    return first["behavior"] == "Isolated" and not first["invert"] and expression in _EXPRESSIONS


def _state(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer is, as its file says it."""
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state
