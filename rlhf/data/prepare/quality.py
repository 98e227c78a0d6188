"""Steps quality and tfidf: how much of a text is symbols or repetition, and how ordinary its words
are.

The ratios are those of Gopher's MassiveText (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1).
What stood before counts as repeated, its first occurrence doesn't.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from conf.preparation.cleaning import Quality, Tfidf
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.texts import imitated, ngrams, spaced_words, symbols, words

_BULLETS = ("•", "‣", "▪", "●", "◦", "·", "- ", "* ", "+ ")
_ELLIPSES = ("...", "…")


def symbol_words(text: str, tokens: Sequence[str]) -> float:
    """Hash signs and ellipses per word."""
    return (text.count("#") + text.count("...") + text.count("…")) / max(1, len(tokens))


def alphabetic_words(text: str) -> float:
    """Share of white-space separated words with a letter."""
    parts = text.split()
    return sum(any(map(str.isalpha, part)) for part in parts) / max(1, len(parts))


def symbol_characters(text: str) -> float:
    """Share of symbols among the characters that aren't white space."""
    return symbols(text) / max(1, sum(not c.isspace() for c in text))


def repeated(pieces: Sequence[str]) -> tuple[float, float]:
    """Shares of the pieces that came before in the text: by number, and by characters."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        seen.add(piece)
    return count / max(1, len(pieces)), characters / max(1, sum(map(len, pieces)))


def top_ngram(tokens: Sequence[str], n: int) -> float:
    """Share of the words' characters in the commonest n-gram, all its occurrences; 0 where none
    occurs twice.
    """
    counts = Counter(ngrams(tokens, n))
    if not counts:
        return 0.0
    most = max(counts.values())
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return min(1.0, longest * most / sum(map(len, tokens)))


def duplicate_ngrams(tokens: Sequence[str], n: int) -> float:
    """Share of the words' characters in n-grams that came before; a character in several of them
    counts once.
    """
    seen: set[tuple[str, ...]] = set()
    covered = [False] * len(tokens)
    for start, gram in enumerate(ngrams(tokens, n)):
        if gram in seen:
            covered[start : start + n] = [True] * n
        seen.add(gram)
    return sum(len(t) for t, c in zip(tokens, covered, strict=True) if c) / max(
        1, sum(map(len, tokens))
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _share(lines: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, lines)) / max(1, len(lines))


def verdict(text: str, options: Quality) -> str | None:
    """The first rule that a text breaks, with its figure and limit; None where it breaks none."""

    def above(what: str, value: float, limit: float | None) -> str | None:
        if limit is None or value <= limit:
            return None
        return f"{what} {value:.2f}, expected at most {limit:g}"

    reason = above("share of symbols", symbol_characters(text), options.max_symbol_characters)
    if reason is not None:
        return reason
    tokens = words(text)
    if len(tokens) < options.min_words:
        return None
    lines, paragraphs = _lines(text), _paragraphs(text)
    line_count, line_characters = repeated(lines)
    paragraph_count, paragraph_characters = repeated(paragraphs)
    checks = [
        above(
            "hash signs and ellipses per word", symbol_words(text, tokens), options.max_symbol_words
        ),
        above(
            "share of bullet lines",
            _share(lines, lambda line: line.startswith(_BULLETS)),
            options.max_bullet_lines,
        ),
        above(
            "share of lines that end with an ellipsis",
            _share(lines, lambda line: line.endswith(_ELLIPSES)),
            options.max_ellipsis_lines,
        ),
        above("share of repeated lines", line_count, options.max_duplicate_lines),
        above("share of repeated paragraphs", paragraph_count, options.max_duplicate_paragraphs),
        above(
            "share of characters in repeated lines",
            line_characters,
            options.max_duplicate_line_characters,
        ),
        above(
            "share of characters in repeated paragraphs",
            paragraph_characters,
            options.max_duplicate_paragraph_characters,
        ),
        _alphabetic(text, options),
        _word_length(text, options),
    ]
    lower = [token.lower() for token in tokens]
    checks += [
        above(f"share of the commonest {n}-gram", top_ngram(lower, n), limit)
        for n, limit in enumerate(options.max_top_ngrams, start=2)
    ]
    checks += [
        above(f"share of repeated {n}-grams", duplicate_ngrams(lower, n), at)
        for n, at in enumerate(options.max_duplicate_ngrams, start=5)
    ]
    return next((check for check in checks if check is not None), None)


def _alphabetic(text: str, options: Quality) -> str | None:
    limit, value = options.min_alphabetic_words, alphabetic_words(text)
    if limit is None or value >= limit:
        return None
    return f"share of words with a letter {value:.2f}, expected at least {limit:g}"


def _word_length(text: str, options: Quality) -> str | None:
    spaced = spaced_words(text)
    if len(spaced) < options.min_words:
        return None
    mean = sum(map(len, spaced)) / len(spaced)
    if options.low_word_length is not None and mean < options.low_word_length:
        return f"mean word length {mean:.2f}, expected at least {options.low_word_length:g}"
    if options.high_word_length is not None and mean > options.high_word_length:
        return f"mean word length {mean:.2f}, expected at most {options.high_word_length:g}"
    return None


def quality(options: Quality, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Leave out rows in which a text to be imitated breaks a rule."""
    for item in items:
        reason = None
        for where, text in imitated(item.columns, options.part, context.kind).items():
            broken = verdict(text, options)
            if broken is not None:
                reason = f"{where}: {broken}"
                break
        if reason is None:
            yield item
        else:
            context.rejected(item, reason)


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
    imitate pass.
    """
    rows = list(items)
    texts = [imitated(row.columns, options.part, context.kind) for row in rows]
    judged = [index for index, text in enumerate(texts) if text]
    scores = list(map(float, tfidf_scores(["\n".join(texts[i].values()) for i in judged])))
    shares = {"low_share": options.low_share, "high_share": options.high_share}
    reasons = extremes("TF-IDF score", scores, low=options.low, high=options.high, **shares)
    yield from filter_scored(rows, judged, scores, reasons, options.column, context)
