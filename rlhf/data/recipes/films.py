"""Questions about films and their answers, for the chain with a pretrained chat model whose answers
read as English.

The user asks how one side of a film was ("How was the acting in the western?"); the assistant
answers in a sentence. Answers are sentences of IMDB reviews that name that side, half of them
praise and half blame: so the policy starts with both. Preference pairs hold a question with a
sentence of praise (chosen) and one about as long (rejected): blame of the same side, and in every
third pair praise of another, so that an answer has to be warm and to the point.

A sentence is kept only where its review's label and the words that it uses agree; which words speak
is counted on reviews of a role of their own, as in rlhf/data/recipes/reviews.py. So pairs are
clearer than pairs of any two sentences would be, the held-out ones too. The sentences that train
the judge come from reviews that nothing else is made of.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.recipes.reviews import (
    SPEAKS,
    Lexicon,
    Review,
    Row,
    assign_roles,
    count_lexicon,
    normalise,
)

FORMAT_VERSION = 2  # raised whenever the same seed would give other rows

# short: the template's own system message would cost more tokens than the answer
SYSTEM = "You have seen the film."
QUESTIONS = (
    "How {was} the {side} in the {film}?",
    "What did you think of the {side} in the {film}?",
)

# What is asked about, and the words of which an answer has one.
SIDES: Mapping[str, tuple[str, ...]] = {
    "acting": ("acting", "performance", "performances"),
    "story": ("story", "plot", "storyline"),
    "cast": ("cast",),
    "music": ("music", "soundtrack", "score"),
    "ending": ("ending",),
    "camera work": ("camera", "cinematography", "photography"),
    "humour": ("humor", "humour", "jokes"),
    "characters": ("characters",),
}

PLURAL = frozenset({"characters"})

# What kind of film a review is about: the first of these words that it uses.
FILMS: Mapping[str, str] = {
    "comedy": "comedy",
    "horror": "horror film",
    "western": "western",
    "thriller": "thriller",
    "drama": "drama",
    "romance": "love story",
    "romantic": "love story",
    "documentary": "documentary",
    "musical": "musical",
    "war": "war film",
    "animated": "animated film",
    "animation": "animated film",
    "sci-fi": "science fiction film",
    "mystery": "mystery",
    "action": "action film",
}

FILM = "film"  # where a review does not say

MIN_WORDS, MAX_WORDS = 5, 18  # of an answer
POINT = 5  # first words of a demonstration, among which the side is
HELD_OUT = 40  # pairs of side and kind of film that no training row asks about
ASTRAY = 3  # of so many pairs one rejects praise of another side
NEAR = 1  # words by which the two answers of a pair may differ in length
ROWS = {"sft": 640, "sft_eval": 64, "pairs": 512, "pairs_eval": 100}

_TAG = re.compile(r"<[^>]*>")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
# One plain sentence. Names, numbers, quotes and brackets stay out: a small model makes them up.
_PLAIN = re.compile(r"[A-Z][a-z']*(?:[,;:]?(?: -+)? (?:[a-z][a-z'-]*|I|I'[a-z]+))+[.!]")
# words that only make sense behind another sentence
_CARRIED_ON = frozenset(
    {"and", "but", "or", "so", "because", "which", "also", "then", "however", "yet", "nor"}
)

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """A sentence of a review about one side of a film; `label` 1 is the review's praise."""

    text: str
    label: int
    side: str
    film: str

    @property
    def topic(self) -> tuple[str, str]:
        return self.side, self.film

    @property
    def words(self) -> int:
        return len(self.text.split())


def answers(review: Review) -> Iterator[Answer]:
    """A review's sentences that can answer a question."""
    film = film_of(review.text)
    for text in plain_sentences(review):
        side = side_of(text)
        if side is not None:
            yield Answer(text, review.label, side, film)


def plain_sentences(review: Review) -> Iterator[str]:
    """A review's sentences that can stand alone; none of Rotten Tomatoes, which are cut to
    pieces.
    """
    if review.source == "rotten_tomatoes":
        return
    for part in _SENTENCE_END.split(" ".join(_TAG.sub(" ", review.text).split())):
        if not MIN_WORDS <= len(part.split()) <= MAX_WORDS:
            continue
        if _PLAIN.fullmatch(part) and part.split()[0].lower() not in _CARRIED_ON:
            yield part


def film_of(text: str) -> str:
    """The kind of film that a review is about, by the first word that says so; else just a
    film."""
    for word in re.findall(r"[a-z-]+", text.lower()):
        if word in FILMS:
            return FILMS[word]
    return FILM


def side_of(text: str) -> str | None:
    """The side of the film that a sentence names first."""
    sides = {word: side for side, named in SIDES.items() for word in named}
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in sides:
            return sides[word]
    return None


def prompt(question: str) -> list[Message]:
    """What the policy answers."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def on_topic(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """1 for an answer that names the side that the question asks about, else 0: a judge with TRL's
    reward signature. Prompts and completions are strings or lists of messages.
    """
    return [
        float(side_of(_text(answer)) == side_of_question(_text(question)))
        for question, answer in zip(prompts, completions, strict=True)
    ]


def side_of_question(question: str) -> str | None:
    """The side that a question of QUESTIONS asks about."""
    for side in SIDES:
        if f"the {side} in the" in question:
            return side
    return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value[-1]["content"])


def rows(reviews: Sequence[Review], seed: int) -> dict[str, list[Row]]:
    """All files of the recipe. The same reviews and seed give the same rows; a review is in one
    role only, and no training row asks a held-out question. Raises ValueError where there are too
    few sentences.
    """
    roles = assign_roles([r for r in reviews if r.source != "rotten_tomatoes"], seed)
    lexicon = count_lexicon(roles["lexicon"])
    rng = random.Random(f"{seed}:films")
    topics = [(side, film) for side in SIDES for film in dict.fromkeys(FILMS.values())]
    rng.shuffle(topics)
    held_out = topics[:HELD_OUT]
    asked = topics[HELD_OUT:] + [(side, FILM) for side in SIDES]
    train, apart, judged = (
        [review for role in names for review in roles[role]]
        for names in (("train",), ("pairs_eval", "prompts"), ("judge", "prompts_eval"))
    )
    learned = _shuffled(train, lexicon, rng)
    known = [answer for answer in learned if answer.topic not in set(held_out)]
    seen = {answer.text for answer in learned}
    unseen = [answer for answer in _shuffled(apart, lexicon, rng) if answer.text not in seen]
    seen |= {answer.text for answer in unseen}
    out: dict[str, list[Row]] = {
        "sft.jsonl": _demonstrations(known, ROWS["sft"], rng),
        "sft_eval.jsonl": _demonstrations(unseen, ROWS["sft_eval"], rng),
        "pairs.jsonl": _pairs(known, ROWS["pairs"], rng),
        "pairs_eval.jsonl": _pairs(unseen, ROWS["pairs_eval"], rng),
        "prompts.jsonl": _questions(asked, rng),
        "prompts_eval.jsonl": _questions(held_out, rng),
        "judge.jsonl": [row for row in _judged(judged, lexicon) if row["text"] not in seen],
    }
    for name, count in ROWS.items():
        if len(out[f"{name}.jsonl"]) < count:
            raise ValueError(f"{name}: expected {count} rows, found {len(out[f'{name}.jsonl'])}")
    return out


def _agrees(text: str, label: int, lexicon: Lexicon) -> bool:
    """Whether the words of a sentence say clearly what its review's label says."""
    opinion = lexicon.opinion(normalise(text))
    return (opinion if label else -opinion) >= SPEAKS


def _shuffled(reviews: Iterable[Review], lexicon: Lexicon, rng: random.Random) -> list[Answer]:
    """The reviews' different answers of which label and words agree, in random order."""
    found: dict[str, Answer] = {}
    for review in reviews:
        for answer in answers(review):
            if _agrees(answer.text, answer.label, lexicon):
                found.setdefault(answer.text, answer)
    out = list(found.values())
    rng.shuffle(out)
    return out


def _judged(reviews: Iterable[Review], lexicon: Lexicon) -> list[Row]:
    """Labelled sentences for the classifier that judges: about anything, not the sides alone."""
    return [
        {"text": text, "label": review.label}
        for review in reviews
        for text in plain_sentences(review)
        if _agrees(text, review.label, lexicon)
    ]


def _demonstrations(known: Sequence[Answer], count: int, rng: random.Random) -> list[Row]:
    """Answers that come to the point, praise and blame in turn, so that the policy starts with as
    much of either.
    """
    direct = [a for a in known if side_of(" ".join(a.text.split()[:POINT])) == a.side]
    praise = [answer for answer in direct if answer.label == 1]
    blame = [answer for answer in direct if answer.label == 0]
    out: list[Row] = []
    for pair in zip(praise, blame, strict=False):
        out += [{"messages": prompt(_question(a.topic, rng)) + _turn(a)} for a in pair]
    return out[:count]


def _pairs(known: Sequence[Answer], count: int, rng: random.Random) -> list[Row]:
    """Praise of what the question asks about, against a sentence about as long: blame, or in one
    pair of ASTRAY praise of another side. Each sentence once.
    """
    praise = [answer for answer in known if answer.label == 1]
    blame = [answer for answer in known if answer.label == 0]
    out: list[Row] = []
    while praise and len(out) < count:
        chosen = praise.pop()
        astray = len(out) % ASTRAY == 0
        rejected = _take(praise if astray else blame, chosen, same_side=not astray)
        if rejected is not None:
            question = prompt(_question(chosen.topic, rng))
            out.append({"prompt": question, "chosen": _turn(chosen), "rejected": _turn(rejected)})
    return out


def _take(answers: list[Answer], chosen: Answer, *, same_side: bool) -> Answer | None:
    """Take out of `answers` one that is about as long as `chosen`, on the same side or another."""
    for place, answer in enumerate(answers):
        if (answer.side == chosen.side) == same_side and abs(answer.words - chosen.words) <= NEAR:
            return answers.pop(place)
    return None


def _questions(topics: Iterable[tuple[str, str]], rng: random.Random) -> list[Row]:
    asked = [worded(form, side, film) for side, film in topics for form in QUESTIONS]
    rng.shuffle(asked)
    return [{"prompt": prompt(question)} for question in asked]


def _question(topic: tuple[str, str], rng: random.Random) -> str:
    return worded(rng.choice(QUESTIONS), *topic)


def worded(form: str, side: str, film: str) -> str:
    """A question of QUESTIONS about one side of a kind of film."""
    was = "were" if side in PLURAL else "was"
    return form.format(was=was, side=side, film=film)


def _turn(answer: Answer) -> list[Message]:
    return [{"role": "assistant", "content": answer.text}]
