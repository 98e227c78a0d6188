"""The recipe of questions about films: plain answers that name what is asked, praise and blame in
equal parts, held-out questions that no training row asks.
"""

import random
from typing import Any

import pytest

from rlhf.data.recipes import films
from rlhf.data.recipes.films import FILMS, SIDES, Answer
from rlhf.data.recipes.reviews import Review
from rlhf.data.recipes.smollm2 import Message

WORDS = {1: ("wonderful", "moving", "superb"), 0: ("awful", "dull", "boring")}
ADVERBS = ("truly", "simply", "quite", "mostly", "often", "always", "sadly", "oddly", "really")


def made_up(count: int) -> list[Review]:
    """Reviews whose one usable sentence says its verdict; every text is different."""
    rng = random.Random(3)
    out = []
    for i in range(count):
        side, film = rng.choice(list(SIDES.values()))[0], rng.choice(list(FILMS))
        how = " ".join(rng.sample(ADVERBS, 4))
        text = f"I saw this {film} at home. The {side} was {how} {rng.choice(WORDS[i % 2])}."
        out.append(Review(text, i % 2, "imdb"))
    return out


@pytest.fixture(scope="module")
def built() -> dict[str, list[dict[str, Any]]]:
    return films.rows(made_up(9000), seed=1)


def question(row: dict[str, Any]) -> str:
    turns: list[Message] = row["messages"] if "messages" in row else row["prompt"]
    return next(turn["content"] for turn in turns if turn["role"] == "user")


def texts(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [row["messages"][-1]["content"]]
    return [row[side][-1]["content"] for side in ("chosen", "rejected")]


def test_an_answer_is_a_plain_sentence_that_names_a_side() -> None:
    text = (
        "This western is old. The acting is wooden, and I was bored. But the story is good enough "
        "for me. The story by John Smith is good enough. The plot takes 90 minutes of your life. "
        "<br />The ending made me laugh, as the music did!"
    )
    found = list(films.answers(Review(text, 1, "imdb")))
    assert found == [
        Answer("The acting is wooden, and I was bored.", 1, "acting", "western"),
        Answer("The ending made me laugh, as the music did!", 1, "ending", "western"),
    ]
    assert not list(films.answers(Review(text, 1, "rotten_tomatoes")))
    (other,) = films.answers(Review("The acting was good from start to end.", 0, "imdb"))
    assert other.film == films.FILM and other.label == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", films.QUESTIONS)
def test_the_judge_reads_the_side_from_every_question(side: str, form: str) -> None:
    asked = films.prompt(films.worded(form, side, "war film"))
    right, wrong = f"The {SIDES[side][-1]} was fine.", "It was fine."
    answers = [right, [{"role": "assistant", "content": wrong}]]
    assert films.on_topic(prompts=[asked, asked], completions=answers) == [1.0, 0.0]


def test_praise_and_blame_are_equally_many(built: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("sft", "sft_eval"):
        rows = built[f"{name}.jsonl"]
        praised = [any(word in texts(row)[0] for word in WORDS[1]) for row in rows]
        assert len(rows) == films.ROWS[name] and sum(praised) * 2 == len(rows)


def test_pairs_prefer_praise_of_what_is_asked(built: dict[str, list[dict[str, Any]]]) -> None:
    """Against blame of it, and in each third pair against praise of something else."""
    for name in ("pairs", "pairs_eval"):
        for number, row in enumerate(built[f"{name}.jsonl"]):
            good, bad = texts(row)
            astray = number % films.ASTRAY == 0
            assert any(word in good for word in WORDS[1])
            assert any(word in bad for word in WORDS[int(astray)])
            assert films.side_of(good) == films.side_of_question(question(row))
            assert (films.side_of(bad) != films.side_of(good)) is astray
            assert abs(len(good.split()) - len(bad.split())) <= films.NEAR


@pytest.mark.parametrize("name", ["pairs", "pairs_eval"])
def test_a_sentence_is_in_one_pair(name: str, built: dict[str, list[dict[str, Any]]]) -> None:
    said = [text for row in built[f"{name}.jsonl"] for text in texts(row)]
    assert said and len(set(said)) == len(said)


def test_training_and_held_out_share_nothing(built: dict[str, list[dict[str, Any]]]) -> None:
    asked = {question(row) for row in built["prompts_eval.jsonl"]}
    assert len(asked) == films.HELD_OUT * len(films.QUESTIONS)
    for name in ("sft", "pairs", "prompts"):
        assert not asked & {question(row) for row in built[f"{name}.jsonl"]}
    learned = {
        text for name in ("sft", "pairs") for row in built[f"{name}.jsonl"] for text in texts(row)
    }
    judged = {row["text"] for row in built["judge.jsonl"]}
    held_out = {text for row in built["pairs_eval.jsonl"] for text in texts(row)}
    assert judged and not learned & held_out and not learned & judged and not held_out & judged


def test_same_seed_same_rows(built: dict[str, list[dict[str, Any]]]) -> None:
    assert films.rows(made_up(9000), seed=1) == built
    assert films.rows(made_up(9000), seed=2)["sft.jsonl"] != built["sft.jsonl"]


def test_too_few_sentences_are_said() -> None:
    with pytest.raises(ValueError, match="sft: expected 640 rows, found"):
        films.rows(made_up(200), seed=1)
