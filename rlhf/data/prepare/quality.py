"""Steps quality and tfidf: how much of a text is symbols or repetition, and how ordinary its words
are.

The ratios are those of Gopher's MassiveText (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1),
over words as rlhf/data/prepare/words.py counts them in any script. What stood before counts as
repeated, its first occurrence doesn't.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from conf.preparation.cleaning import Quality, Tfidf
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Context, Item, require_free
from rlhf.data.prepare.texts import imitated, imitated_parts, ngrams
from rlhf.data.prepare.words import (
    MARKS,
    Counted,
    counted,
    is_spaced,
    lettered,
    ranges,
    symbol_share,
    words,
)

_BULLETS = ("•", "‣", "▪", "●", "◦", "·", "- ", "* ", "+ ")
_ELLIPSES = ("...", "…")
# at the start of a line they mark a heading, a comment or an answer (GSM8K's ####)
_HASHES = re.compile(r"(?<=[^\n#])#+")
_MOSTLY = 0.8  # share of the words that have to be measurable for their mean length to say much
_SHORT = 40.0  # words: a text of so many may repeat twice the share that a long one may


def symbol_words(text: str, number: float) -> float:
    """Hash signs inside lines, and ellipses, per word. `number`: of words."""
    hashes = len(_HASHES.findall(text)) if "#" in text else 0
    return (hashes + text.count("...") + text.count("…")) / max(1.0, number)


def alphabetic_words(tokens: Sequence[str], spoken: Sequence[str]) -> float:
    """Share of words with a letter. spoken: the `lettered` ones."""
    return len(spoken) / max(1, len(tokens))


def word_length(spoken: Sequence[str]) -> tuple[float, int]:
    """Mean length of the words in scripts with spaces, without combining marks, and how many they
    are. spoken: the words with a letter (`lettered`).
    """
    joined = "".join(spoken)
    if joined.isascii():
        return len(joined) / max(1, len(spoken)), len(spoken)
    spaced = list(filter(is_spaced, spoken))
    joined = "".join(spaced)
    size = len(joined) - len(_marks().findall(joined))
    return size / max(1, len(spaced)), len(spaced)


@cache
def _marks() -> re.Pattern[str]:
    return re.compile(f"[{ranges(MARKS)}]")


def repeated(pieces: Sequence[str]) -> tuple[float, float]:
    """Shares of the pieces that came before in the text: by number, and by characters."""
    if len(set(pieces)) == len(pieces):
        return 0.0, 0.0
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        seen.add(piece)
    return count / max(1, len(pieces)), characters / max(1, sum(map(len, pieces)))


Gram = tuple[str, ...]


def repeats(
    tokens: Sequence[str], n: int, among: Sequence[tuple[int, Gram]] | None = None
) -> list[tuple[int, Gram]]:
    """(where it begins, n-gram) of those that occur more than once, in order. among: the repeats of
    a smaller n, since what comes again begins with something shorter that does.
    """
    if among is None:
        grams = list(ngrams(tokens, n))
        counts = Counter(grams)
        if len(counts) == len(grams):
            return []
        return [(at, gram) for at, gram in enumerate(grams) if counts[gram] > 1]
    last = len(tokens) - n
    found = [(at, tuple(tokens[at : at + n])) for at, _ in among if at <= last]
    counts = Counter([gram for _, gram in found])
    if len(counts) == len(found):
        return []
    return [place for place in found if counts[place[1]] > 1]


def top_ngram(tokens: Sequence[str], again: Sequence[tuple[int, Gram]]) -> float:
    """Share of the words' characters in the commonest n-gram, all its occurrences; 0 where none
    occurs twice. again: `repeats` of the tokens.
    """
    counts = Counter([gram for _, gram in again])
    if not counts:
        return 0.0
    most = max(counts.values())
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return min(1.0, longest * most / sum(map(len, tokens)))


def duplicate_ngrams(tokens: Sequence[str], again: Sequence[tuple[int, Gram]]) -> float:
    """Share of the words' characters in n-grams that came before; a character in several of them
    counts once. again: `repeats` of the tokens.
    """
    seen: set[Gram] = set()
    covered = [False] * len(tokens)
    for start, gram in again:
        if gram in seen:
            covered[start : start + len(gram)] = [True] * len(gram)
        seen.add(gram)
    inside = sum(len(t) for t, c in zip(tokens, covered, strict=True) if c)
    return inside / max(1, sum(map(len, tokens)))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _worded(pieces: Sequence[str]) -> list[str]:
    """The pieces with a letter or digit: brackets and rules that come again repeat nothing."""
    return [piece for piece in pieces if any(map(str.isalnum, piece))]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _share(lines: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, lines)) / max(1, len(lines))


def verdict(text: str, options: Quality) -> str | None:
    """The first rule that a text breaks, with its figure and limit; None where it breaks none."""
    return next(filter(None, _broken(text, options)), None)


def _above(what: str, value: float, limit: float | None) -> str | None:
    if limit is None or value <= limit:
        return None
    return f"{what} {value:.2f}, expected at most {round(limit, 4):g}"


def _broken(text: str, options: Quality) -> Iterator[str | None]:
    """Why each rule is broken, one rule after the other: what a text breaks first is the last
    that is computed.
    """
    small = text
    if text.isascii():  # has the same words in small letters; no rule asks for a word's case
        small = text.lower()
    content = counted(small)
    share = symbol_share(text, content.tokens)
    yield _above("share of symbols", share, options.max_symbol_characters)
    if content.number < options.min_words:
        return
    symbolic = symbol_words(text, content.number)
    yield _above("hash signs and ellipses per word", symbolic, options.max_symbol_words)
    yield from _broken_by_lines(text, options)
    spoken = lettered(content.tokens)
    yield _alphabetic(content, spoken, options)
    yield _word_length(content, spoken, options)
    lower = content.tokens
    if small is text:
        lower = list(map(str.lower, lower))
    yield from _broken_by_ngrams(content, lower, options)


def _broken_by_lines(text: str, options: Quality) -> Iterator[str | None]:
    lines = _lines(text)
    bullets = _share(lines, lambda line: line.startswith(_BULLETS))
    yield _above("share of bullet lines", bullets, options.max_bullet_lines)
    ellipses = _share(lines, lambda line: line.endswith(_ELLIPSES))
    yield _above("share of lines that end with an ellipsis", ellipses, options.max_ellipsis_lines)
    count, characters = repeated(_worded(lines))
    paragraphs, in_paragraphs = repeated(_worded(_paragraphs(text)))
    yield _above("share of repeated lines", count, options.max_duplicate_lines)
    yield _above("share of repeated paragraphs", paragraphs, options.max_duplicate_paragraphs)
    limit = options.max_duplicate_line_characters
    yield _above("share of characters in repeated lines", characters, limit)
    limit = options.max_duplicate_paragraph_characters
    yield _above("share of characters in repeated paragraphs", in_paragraphs, limit)


def _broken_by_ngrams(
    content: Counted, lower: Sequence[str], options: Quality
) -> Iterator[str | None]:
    """A longer n-gram can't occur twice where a shorter one doesn't, so most texts end early.
    lower: the words in small letters.
    """
    slack = 1 + _SHORT / max(1.0, content.number)
    again = None
    for n, limit in enumerate(options.max_top_ngrams, start=2):
        again = repeats(lower, content.span(n), again)
        if not again:
            return
        share = top_ngram(lower, again)
        yield _above(f"share of the commonest {n}-gram", share, limit * slack)
    again = None
    for n, limit in enumerate(options.max_duplicate_ngrams, start=5):
        again = repeats(lower, content.span(n), again)
        if not again:
            return
        share = duplicate_ngrams(lower, again)
        yield _above(f"share of repeated {n}-grams", share, limit * slack)


def _alphabetic(text_words: Counted, spoken: Sequence[str], options: Quality) -> str | None:
    limit = options.min_alphabetic_words
    if limit is None:
        return None
    value = alphabetic_words(text_words.tokens, spoken)
    if value >= limit:
        return None
    return f"share of words with a letter {value:.2f}, expected at least {limit:g}"


def _word_length(text_words: Counted, spoken: Sequence[str], options: Quality) -> str | None:
    if options.low_word_length is None and options.high_word_length is None:
        return None
    mean, number = word_length(spoken)
    # beside many numbers, or a script without spaces, they are names and variables
    if number < max(options.min_words, _MOSTLY * text_words.number):
        return None
    if options.low_word_length is not None and mean < options.low_word_length:
        return f"mean word length {mean:.2f}, expected at least {options.low_word_length:g}"
    if options.high_word_length is not None and mean > options.high_word_length:
        return f"mean word length {mean:.2f}, expected at most {options.high_word_length:g}"
    return None


def quality(options: Quality, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Leave out rows in which a text to be imitated breaks a rule."""
    for item in items:
        reason = _first_broken(item, options, context.kind)
        if reason is None:
            yield item
        else:
            context.rejected(item, reason)


def _first_broken(item: Item, options: Quality, kind: Use) -> str | None:
    """The first rule that a text of a row breaks; of a conversation each turn is a text."""
    for where, text in imitated_parts(item.columns, options.part, kind):
        broken = verdict(text, options)
        if broken is not None:
            return f"{where}: {broken}"
    return None


def tfidf_scores(texts: Sequence[str]) -> Any:
    """[N] mean TF-IDF weight of each text's words, as conf.preparation.cleaning.Tfidf defines it; 0
    for a text without words.
    """
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer

    try:
        # [N, V]
        counts = CountVectorizer(
            analyzer=lambda text: words(text.lower()), dtype=np.float64
        ).fit_transform(texts)
    except ValueError:  # no text holds a word
        return np.zeros(len(texts))
    documents = np.bincount(counts.indices, minlength=counts.shape[1])  # [V] texts with the word
    idf = np.log((1 + len(texts)) / (1 + documents)) + 1
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    return np.asarray(counts @ idf).ravel() / np.maximum(lengths, 1)


def extremes(
    what: str,
    scores: Sequence[float],
    *,
    low: float | None,
    high: float | None,
    low_share: float = 0.0,
    high_share: float = 0.0,
) -> list[str | None]:
    """[N] why a score is too low or too high, by its rank (equal scores in the order of the rows)
    or by its value; None for a score in between.
    """
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    lowest, highest = int(low_share * len(scores)), int(high_share * len(scores))
    out: list[str | None] = [None] * len(scores)
    for rank, index in enumerate(order):
        score = f"{what} {scores[index]:.3f}"
        if rank < lowest:
            out[index] = f"{score}: among the lowest {lowest} of {len(scores)}"
        elif rank >= len(scores) - highest:
            out[index] = f"{score}: among the highest {highest} of {len(scores)}"
        elif low is not None and scores[index] < low:
            out[index] = f"{score}, expected at least {low:g}"
        elif high is not None and scores[index] > high:
            out[index] = f"{score}, expected at most {high:g}"
    return out


def filter_scored(
    rows: Sequence[Item],
    judged: Sequence[int],
    scores: Sequence[float],
    reasons: Sequence[str | None],
    column: str | None,
    context: Context,
) -> Iterator[Item]:
    """Yield the rows without a reason, in order. Those at `judged` have a score, which is written
    into `column` where one is named.
    """
    verdicts = dict(zip(judged, zip(scores, reasons, strict=True), strict=True))
    for index, row in enumerate(rows):
        score, reason = verdicts.get(index, (None, None))
        if column is not None and score is not None:
            row.columns[column] = round(score, 6)
        if reason is None:
            yield row
        else:
            context.rejected(row, reason)
    if scores:
        context.figures.update(
            mean=round(sum(scores) / len(scores), 4),
            lowest=round(min(scores), 4),
            highest=round(max(scores), 4),
        )


def tfidf(options: Tfidf, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Leave out the rows with the lowest and the highest scores; rows with nothing to
    imitate pass. Raises UserError where rows have the score's column already.
    """
    rows = list(items)
    if options.column is not None:
        require_free(rows, options.column, "tfidf", "; or name another by column")
    texts = [imitated(row.columns, options.part, context.kind) for row in rows]
    judged = [index for index, text in enumerate(texts) if text]
    scores = list(map(float, tfidf_scores(["\n".join(texts[i].values()) for i in judged])))
    shares = {"low_share": options.low_share, "high_share": options.high_share}
    reasons = extremes("TF-IDF score", scores, low=options.low, high=options.high, **shares)
    yield from filter_scored(rows, judged, scores, reasons, options.column, context)
