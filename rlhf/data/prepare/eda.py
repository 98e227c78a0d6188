"""Easy data augmentation (Wei and Zou 2019, EMNLP, "EDA"): the four operations on one text, for
English and Chinese.

A text is words and what stands between them; joined they are the text again. Words are what letters
and apostrophes make up, in Chinese what jieba's segmentation cuts. Stop words are not replaced and
give no synonyms to insert, as in the paper. Words with a digit are never touched, nor are those of
`keep`: a question with another number has another answer.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf.data.prepare.words import has_han, in_case_of, read_yaml, word_list
from rlhf.process.libraries import require
from rlhf.types import UserError

_WORD = r"[\p{L}\p{M}\p{N}_]+(?:['\u2019\-][\p{L}\p{M}\p{N}_]+)*"
# Words of grammar rather than of meaning. Short on purpose: what is missing here and has no synonym
# is never replaced anyway.
_ENGLISH = (
    "a an the and or but nor so yet if then than that this these those i you he she it we they "
    "me him her us them my your his its our their "
    "is am are was were be been being do does did have has had will would shall should can could "
    "may might must not no of to in on at by for "
    "with from as into about over under again there here when where why how what which who whom"
)
_CHINESE = (
    "的 了 着 过 和 与 或 但 而 也 都 就 在 是 有 不 没 没有 我 你 他 她 它 "
    "我们 你们 他们 这 那 这个 那个 个 吗 呢 吧 啊 把 被 给 对 从 到 为 "
    "以 之 其 什么 怎么"
)
_CLOSING = tuple(".,;:!?)]}")
STOP_WORDS = frozenset([*_ENGLISH.split(), *_CHINESE.split()])


@dataclass(frozen=True, slots=True)
class Words:
    """A text as words and the text between them: len(between) = len(words) + 1."""

    words: list[str]
    between: list[str]
    spaced: bool  # whether a new word takes a space


@cache
def _pattern() -> Any:
    import regex

    return regex.compile(_WORD)


@cache
def _jieba() -> Any:
    import logging

    jieba = require("jieba", "data")
    jieba.setLogLevel(logging.WARNING)  # it prints how long its dictionary took to load
    return jieba.Tokenizer()


def cut(text: str, language: str = "auto") -> Words:
    """Words of a text. `language`: zh, en, or auto, which is zh where there are Chinese
    characters.
    """
    chinese = language == "zh" or (language == "auto" and has_han(text))
    pieces = list(_jieba().cut(text)) if chinese else [text]
    words: list[str] = []
    between = [""]
    for piece in pieces:
        at = 0
        for match in _pattern().finditer(piece):
            between[-1] += piece[at : match.start()]
            words.append(match.group())
            between.append("")
            at = match.end()
        between[-1] += piece[at:]
    return Words(words, between, spaced=not chinese)


def joined(words: Sequence[str], between: Sequence[str]) -> str:
    """The text of words and what is between them."""
    return between[0] + "".join(
        word + after for word, after in zip(words, between[1:], strict=True)
    )


@dataclass(frozen=True, slots=True)
class Synonyms:
    """Synonyms of words in small letters; a word is never its own synonym."""

    of: Mapping[str, tuple[str, ...]]

    def __call__(self, word: str) -> tuple[str, ...]:
        return self.of.get(word.lower(), ())


def make_synonyms(content: Any, where: str) -> Synonyms:
    """Synonyms from a list of groups of equal words, or from a mapping word -> its synonyms (one
    way). Raises UserError for anything else.
    """
    synonyms: dict[str, list[str]] = {}

    def add(word: str, others: Sequence[str]) -> None:
        known = synonyms.setdefault(word.lower(), [])
        known.extend(
            other for other in others if other.lower() != word.lower() and other not in known
        )

    if isinstance(content, list):
        for number, group in enumerate(content, start=1):
            words = word_list(group, f"{where}, group {number}")
            if len(words) < 2:
                raise UserError(
                    f"{where}, group {number}: expected two words or more that mean the same, "
                    f"found {len(words)}."
                )
            for word in words:
                add(word, words)
    elif isinstance(content, dict):
        for word, others in content.items():
            add(word_list([word], where)[0], word_list(others, f"{where}, {word}"))
    else:
        raise UserError(
            f"{where}: expected a list of groups of words, or a mapping of words to lists; found "
            f"{type(content).__name__}."
        )
    return Synonyms({word: tuple(others) for word, others in synonyms.items() if others})


def read_synonyms(path: str) -> Synonyms:
    """The synonyms in a file. Raises UserError for a file that can't be read as synonyms."""
    return make_synonyms(
        read_yaml(path, "step augment: synonyms"), f"step augment: synonyms={path}"
    )


@dataclass(frozen=True, slots=True)
class Change:
    """What an operation is given beside the text: which words it may change, and how many."""

    rng: random.Random
    share: float  # of the words
    synonyms: Synonyms
    keep: frozenset[str]  # small letters

    def count(self, words: Sequence[str]) -> int:
        """How many words to change: the paper's n = alpha l, at least 1."""
        return max(1, round(self.share * len(words)))

    def free(self, words: Sequence[str]) -> list[int]:
        """Positions of the words that may be changed."""
        return [
            i
            for i, word in enumerate(words)
            if not any(map(str.isdigit, word)) and word.lower() not in self.keep
        ]

    def meaningful(self, words: Sequence[str]) -> list[int]:
        """Positions of the words that may be changed, are no stop words and have synonyms."""
        return [
            i
            for i in self.free(words)
            if words[i].lower() not in STOP_WORDS and self.synonyms(words[i])
        ]


def replace_synonyms(text: Words, change: Change) -> str:
    """Replace n words that are no stop words by one of their synonyms each."""
    words = list(text.words)
    indices = change.meaningful(words)
    for i in change.rng.sample(indices, min(change.count(words), len(indices))):
        words[i] = in_case_of(words[i], change.rng.choice(change.synonyms(words[i])))
    return joined(words, text.between)


def insert_synonyms(text: Words, change: Change) -> str:
    """Insert, n times, a synonym of a random word that is no stop word before a random word."""
    words, between = list(text.words), list(text.between)
    sources = [text.words[i] for i in change.meaningful(text.words)]
    for _ in range(change.count(text.words) if sources else 0):
        new = change.rng.choice(change.synonyms(change.rng.choice(sources)))
        at = change.rng.randrange(len(words))
        words.insert(at, new)
        between.insert(at + 1, " " if text.spaced else "")
    return joined(words, between)


def swap_words(text: Words, change: Change) -> str:
    """Exchange two random words, n times."""
    words = list(text.words)
    for _ in range(change.count(words)):
        indices = change.free(words)
        if len(indices) < 2:
            break
        i, j = change.rng.sample(indices, 2)
        words[i], words[j] = words[j], words[i]
    return joined(words, text.between)


def delete_words(text: Words, change: Change) -> str:
    """Delete each word with the probability `share`; at least one word is left, and at least one is
    deleted where there are two.
    """
    indices = change.free(text.words)
    if len(text.words) < 2 or not indices:
        return joined(text.words, text.between)
    gone = {i for i in indices if change.rng.random() < change.share} or {
        change.rng.choice(indices)
    }
    if len(gone) == len(text.words):
        gone.discard(change.rng.choice(sorted(gone)))
    words: list[str] = []
    between = [text.between[0]]
    for i, (word, after) in enumerate(zip(text.words, text.between[1:], strict=True)):
        if i not in gone:
            words.append(word)
            between.append(after)
        # of the spaces on its two sides one is left, and none before a full stop
        elif between[-1].endswith(" ") or not between[-1]:
            between[-1] = (
                between[-1].removesuffix(" ") if after[:1] in _CLOSING else between[-1]
            ) + after.removeprefix(" ")
        else:
            between[-1] += after
    if between[-1].endswith(" ") and not text.between[-1].endswith(" "):
        between[-1] = between[-1][:-1]
    return joined(words, between)


OPERATIONS: Mapping[str, Callable[[Words, Change], str]] = {
    "synonym": replace_synonyms,
    "insert": insert_synonyms,
    "swap": swap_words,
    "delete": delete_words,
}
