"""Real preference pairs with defects planted on purpose, and which rows have which: the ground
truth of `make proof-data`.

Pairs are made of the movie reviews' sentences, each sentence used once: a positive one chosen, a
negative one rejected. What the data has by nature is set aside first (rows that repeat another, or
are too much alike), so that a row that a detector names is either planted or an error. Every defect
is planted in rows of its own. Copies stand behind what they copy.
"""

import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.recipes.reviews import Review, verdict_sentences

Row = dict[str, Any]
Place = tuple[str, int]  # file name, row from 1

NGRAM = 5  # characters: what step near_duplicates and the report compare
THRESHOLD = 0.8  # Jaccard similarity of near-duplicates
APART = 0.5  # the most that two rows may be alike by nature
MIN_WORDS = 12  # of a sentence
LONG = 8  # sentences of a side that is too long
# words of a side; a sentence has at most 22 and, punctuation left out, seldom fewer than 9
LIMIT = 50
TRAIN, HELD = "train.jsonl", "held.jsonl"

_OTHER = 0xE000  # to private characters
_BLOCK = 256  # rows compared with all others at once


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of each kind."""

    train: int = 3000  # without defects, the originals of copies among them
    held: int = 500
    exact: int = 200
    near: int = 200
    # pairs that get a second row with the sides exchanged: twice as many rows contradict another
    contradictions: int = 100
    equal: int = 60
    html: int = 120
    encoding: int = 120
    garbled: int = 120
    long: int = 80
    swapped: int = 150  # sides exchanged: label noise
    leaked: int = 60  # held-out rows that repeat a training row
    leaked_near: int = 60

    def pairs(self) -> int:
        """Rows that need sentences of their own, without the long ones."""
        return (
            self.train
            + self.held
            + self.equal
            + self.html
            + self.encoding
            + self.garbled
            + self.swapped
        )


@dataclass(slots=True)
class Planted:
    """The two files' rows, and by check the rows that have its defect."""

    train: list[Row] = field(default_factory=list)
    held: list[Row] = field(default_factory=list)
    truth: dict[str, set[Place]] = field(default_factory=dict)
    natural: dict[str, int] = field(default_factory=dict)  # what was set aside

    def add(self, row: Row, *checks: str, held: bool = False) -> None:
        rows, name = (self.held, HELD) if held else (self.train, TRAIN)
        rows.append(row)
        for check in checks:
            self.truth.setdefault(check, set()).add((name, len(rows)))


# ---- likeness, by code of its own: the definition, not the detector ----


def grams(row: Row) -> set[str]:
    """Character n-grams of both sides one after the other, the rejected side in an alphabet of its
    own; case and white space as in the step.
    """
    chosen, rejected = (
        " ".join(str(row[side]).casefold().split()) for side in ("chosen", "rejected")
    )
    text = chosen + "".join(chr(ord(c) + _OTHER) for c in rejected)
    return {text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)}


def likeness(a: Row, b: Row) -> float:
    """Jaccard similarity of two rows' n-grams."""
    one, other = grams(a), grams(b)
    return len(one & other) / len(one | other)


def apart(rows: Sequence[Row], most: float) -> list[int]:
    """The rows that are at most `most` alike to every row before them; every pair is compared."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer

    matrix = CountVectorizer(analyzer=grams, binary=True, dtype=np.int32).fit_transform(rows)
    sizes = np.asarray(matrix.sum(axis=1)).ravel()
    kept = []
    for start in range(0, len(rows), _BLOCK):
        common = (matrix[start : start + _BLOCK] @ matrix.T).toarray()
        similar = common / (sizes[start : start + _BLOCK, None] + sizes[None, :] - common)
        kept += [start + i for i, row in enumerate(similar) if not (row[: start + i] > most).any()]
    return kept


# ---- what is planted ----


def edit(text: str, vocabulary: Sequence[str], rng: random.Random) -> str:
    """One word taken out, or another one in its place. Raises ValueError for fewer than MIN_WORDS
    words.
    """
    words = text.split()
    if len(words) < MIN_WORDS:
        raise ValueError(f"expected at least {MIN_WORDS} words, found {len(words)}")
    at = rng.randrange(len(words))
    other = rng.choice([w for w in vocabulary if w != words[at]])
    return " ".join([*words[:at], *([] if rng.random() < 0.5 else [other]), *words[at + 1 :]])


def near_copy(row: Row, vocabulary: Sequence[str], rng: random.Random) -> Row:
    """The row with one word of one side edited, so that it is at least THRESHOLD alike and not the
    same.
    """
    while True:
        side = rng.choice(("chosen", "rejected"))
        out = {**row, side: edit(row[side], vocabulary, rng)}
        if THRESHOLD <= likeness(row, out) < 1.0:
            return out


def recased(row: Row, rng: random.Random) -> Row:
    """The same row with other case and white space, half of the time."""
    if rng.random() < 0.5:
        return dict(row)
    return {
        **row,
        "chosen": row["chosen"].capitalize(),
        "rejected": "  " + row["rejected"].replace(" ", "  "),
    }


def with_html(text: str, rng: random.Random) -> str:
    """Text out of a web page: a tag pair around words, a line break, or an entity."""
    words = text.split()
    at = rng.randrange(1, len(words) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return " ".join([*words[:at], f"<i>{words[at]}</i>", *words[at + 1 :]])
    return " ".join([*words[:at], "<br /><br />" if kind == 1 else "&quot;", *words[at:]])


def mojibake(text: str, rng: random.Random) -> str:
    """Typographic quotes around a word, in UTF-8 that was read as Latin-1 or Windows-1252."""
    words = text.split()
    at = rng.randrange(len(words))
    words[at] = (
        f"\u201c{words[at]}\u2014\u2018" if rng.random() < 0.5 else f"\u2018{words[at]}\u2019s"
    )
    whole = " ".join(words).encode()
    return whole.decode("latin-1") if rng.random() < 0.5 else whole.decode("windows-1252")


def garble(text: str, rng: random.Random) -> str:
    """As many characters, 70 % of them symbols and the others letters by chance."""
    visible = sum(not c.isspace() for c in text)
    count = round(0.7 * visible)
    noise = [rng.choice("#$%^*@~|{}[]=+_/\\") for _ in range(count)] + [
        rng.choice(string.ascii_lowercase) for _ in range(visible - count)
    ]
    rng.shuffle(noise)
    return "".join(c if c.isspace() else noise.pop() for c in text)


def one_side(row: Row, change: Callable[[str, random.Random], str], rng: random.Random) -> Row:
    """The row with one of its sides changed."""
    side = rng.choice(("chosen", "rejected"))
    return {**row, side: change(row[side], rng)}


def exchanged(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


# ---- the data set ----


def sentences(reviews: Iterable[Review], rng: random.Random) -> tuple[list[str], list[str]]:
    """Different positive and negative sentences of at least MIN_WORDS words, shuffled."""
    labels: dict[str, int] = {}
    for review in reviews:
        for sentence in verdict_sentences(review):
            if len(sentence.text.split()) >= MIN_WORDS:
                labels.setdefault(sentence.text, sentence.label)
    texts = sorted(labels)
    rng.shuffle(texts)
    return [t for t in texts if labels[t]], [t for t in texts if not labels[t]]


def plant(reviews: Sequence[Review], seed: int, sizes: Sizes) -> Planted:
    """The two files. Raises ValueError where the reviews have too few sentences."""
    rng = random.Random(f"{seed}:defects")
    good, bad = sentences(reviews, rng)
    spare = sizes.long * LONG
    wanted = sizes.pairs() + sizes.pairs() // 10 + spare
    if min(len(good), len(bad)) < wanted:
        raise ValueError(
            f"expected at least {wanted} sentences of each label, found {len(good)} and {len(bad)}"
        )
    candidates = [
        {"chosen": a, "rejected": b}
        for a, b in zip(good[spare:wanted], bad[spare:wanted], strict=True)
    ]
    kept = apart(candidates, APART)
    rows = [candidates[i] for i in kept]
    out = Planted(
        natural={
            f"pairs more than {APART} alike to another, set aside": len(candidates) - len(rows)
        }
    )
    if len(rows) < sizes.pairs():
        raise ValueError(f"expected {sizes.pairs()} pairs that differ, found {len(rows)}")
    vocabulary = sorted({w for text in good[:500] + bad[:500] for w in text.split() if w.isalpha()})
    pool = iter(rows)
    clean = [next(pool) for _ in range(sizes.train)]
    _in_place(out, pool, sizes, rng)
    for i in range(sizes.long):
        here = slice(i * LONG, (i + 1) * LONG)
        out.add({"chosen": " ".join(good[here]), "rejected": " ".join(bad[here])}, "truncated")
    first = len(out.train) + 1
    for row in clean:
        out.add(row)
    _copies(out, clean, first, vocabulary, sizes, rng)
    for _ in range(sizes.held):
        out.add(next(pool), held=True)
    # rows at the start that have a copy already
    copied = sizes.near + sizes.exact + sizes.contradictions
    originals = rng.sample(range(copied, len(clean)), sizes.leaked + sizes.leaked_near)
    for i in originals[: sizes.leaked]:
        out.add(recased(clean[i], rng), "row_leakage_exact", held=True)
    for i in originals[sizes.leaked :]:
        out.add(near_copy(clean[i], vocabulary, rng), "row_leakage_near", held=True)
        # what step near_duplicates leaves out instead
        out.truth.setdefault("leaked_near_originals", set()).add((TRAIN, first + i))
    return out


def _in_place(out: Planted, pool: Iterator[Row], sizes: Sizes, rng: random.Random) -> None:
    """Rows with a defect of their own."""
    for _ in range(sizes.equal):
        row = next(pool)
        out.add(
            {"chosen": row["chosen"], "rejected": row["chosen"].capitalize() + " "}, "equal_sides"
        )
    for check, count, change in (
        ("html", sizes.html, with_html),
        ("encoding", sizes.encoding, mojibake),
        ("garbled", sizes.garbled, garble),
    ):
        for _ in range(count):
            out.add(one_side(next(pool), change, rng), check)
    for _ in range(sizes.swapped):
        out.add(exchanged(next(pool)), "suspect_labels")


def _copies(
    out: Planted,
    clean: Sequence[Row],
    first: int,
    vocabulary: Sequence[str],
    sizes: Sizes,
    rng: random.Random,
) -> None:
    """Copies of clean rows, of which the first stands in row `first`; each original is
    copied once.
    """
    start = 0
    for check, count in (("near_duplicates", sizes.near), ("exact_duplicates", sizes.exact)):
        for row in clean[start : start + count]:
            out.add(
                near_copy(row, vocabulary, rng)
                if check == "near_duplicates"
                else recased(row, rng),
                check,
            )
        start += count
    for i in range(start, start + sizes.contradictions):
        out.truth.setdefault("contradictions", set()).add((TRAIN, first + i))
        out.add(exchanged(clean[i]), "contradictions")


def judged(
    good: Sequence[str], bad: Sequence[str], seed: int, rows: int, share: float
) -> list[Row]:
    """Answers judged by themselves, of which `share` are good, drawn from good and bad
    sentences.
    """
    rng = random.Random(f"{seed}:judged")
    count = round(share * rows)
    drawn = [(text, True) for text in rng.sample(good, count)] + [
        (text, False) for text in rng.sample(bad, rows - count)
    ]
    rng.shuffle(drawn)
    return [
        {"prompt": "Write about a film.", "completion": text, "label": label}
        for text, label in drawn
    ]
