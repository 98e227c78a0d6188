"""Votes, results and preference rows."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from conf.choices import LabelKind, Strength
from conf.labelling import LabelAggregate
from rlhf.labels.bradley_terry import Comparison, fit, loss_and_gradient
from rlhf.labels.checking import Checked, Ledgers, Outcome
from rlhf.labels.pairs import (
    Aggregated,
    Fate,
    PairResult,
    aggregate,
    collect,
    fate,
    held_out,
    preference_row,
)
from rlhf.labels.records import Answer
from tests.labels.labels import export_of, label, ledgers_of, pairs


def voted(
    *votes: dict[str, str | Outcome], count: int | None = None
) -> tuple[Ledgers, list[Checked]]:
    """One task for each dictionary of annotator -> better answer's kind: good, bad or an
    Outcome.
    """
    export = pairs(count or len(votes))
    labels = []
    for number, (task, said) in enumerate(zip(export.tasks, votes, strict=False)):
        names = {"good": f"good answer {number}", "bad": f"bad {number}"}
        labels += [
            label(task, names.get(v, v) if isinstance(v, str) else v, who)
            for who, v in said.items()
        ]
    return ledgers_of(export), labels


def results(method: LabelAggregate, *votes: dict[str, str | Outcome]) -> Aggregated:
    return aggregate(method, collect(*voted(*votes)))


def winner(result: PairResult) -> str | None:
    """The kind of the better answer."""
    if result.outcome not in (Outcome.first, Outcome.second):
        return None if result.outcome is None else result.outcome.value
    return result.pair.answers[0 if result.outcome is Outcome.first else 1].text.split()[0]


def better(result: PairResult) -> float:
    """Probability that the good answer is better."""
    return (
        result.first_better
        if result.pair.answers[0].text.startswith("good")
        else 1 - result.first_better
    )


def test_majority_by_hand() -> None:
    tie = Outcome.tie
    found = results(
        LabelAggregate.majority,
        {"a": "good"},
        {"a": "good", "b": "good", "c": "bad"},
        {"a": "good", "b": "bad"},
        {"a": tie, "b": tie, "c": "good"},
        {"a": Outcome.skip, "b": Outcome.cancelled},
    )
    by_prompt = {result.pair.prompt: result for result in found.results}
    assert set(by_prompt) == {f"prompt {n}" for n in range(4)}, "a skip is no vote"
    one, two, split, tied = (by_prompt[f"prompt {n}"] for n in range(4))
    # (1 + 1) / (1 + 2)
    assert (winner(one), one.confidence, better(one)) == ("good", 1.0, pytest.approx(2 / 3))
    assert (winner(two), two.confidence, better(two)) == (
        "good",
        pytest.approx(2 / 3),
        pytest.approx(3 / 5),
    )
    assert (winner(split), split.confidence, better(split)) == (None, 0.5, pytest.approx(0.5))
    # (2 + 1) / (3 + 2)
    assert (winner(tied), tied.confidence, better(tied)) == (
        "tie",
        pytest.approx(2 / 3),
        pytest.approx(3 / 5),
    )
    assert [v.disputed for v in (one, two, split, tied)] == [False, True, True, True]


def careless(seed: int, pairs_: int = 80) -> list[dict[str, str | Outcome]]:
    """Three who find the good answer nine times in ten, and one who guesses."""
    rng = np.random.default_rng(seed)
    accuracy = {"ann": 0.9, "bob": 0.9, "cy": 0.9, "guess": 0.5}
    return [
        {name: "good" if rng.random() < p else "bad" for name, p in accuracy.items()}
        for _ in range(pairs_)
    ]


@pytest.mark.parametrize("method", LabelAggregate)
def test_who_guesses_is_found_out_and_counts_less(method: LabelAggregate) -> None:
    found = results(method, *careless(0))
    reliability = {name: value for name, value in found.reliability.items() if value is not None}
    assert set(reliability) == {"ann", "bob", "cy", "guess"}
    assert reliability["guess"] + 0.2 < min(reliability[name] for name in ("ann", "bob", "cy"))
    decided = [winner(v) for v in found.results if v.outcome is not None]
    assert np.mean([name == "good" for name in decided]) > 0.95
    assert len(decided) == len(found.results) or method is LabelAggregate.majority, (
        "only the majority can be split"
    )


def simulated(
    reliability: dict[str, float], side: dict[str, float], seed: int = 0
) -> tuple[np.ndarray, list[Comparison]]:
    rng = np.random.default_rng(seed)
    strength = rng.normal(0, 1.5, 30)
    out = []
    for _ in range(300):
        i, j = rng.choice(len(strength), 2, replace=False)
        for who, r in reliability.items():
            first, second = (i, j) if rng.random() < 0.5 else (j, i)
            p = r / (1 + math.exp(strength[second] - strength[first])) + (1 - r) * side[who]
            out.append(Comparison(who, f"{first:02d}", f"{second:02d}", float(rng.random() < p)))
    return strength, out


def test_bradley_terry_recovers_order_reliability_and_side() -> None:
    true = {"ann": 0.95, "bob": 0.95, "cy": 0.9, "left": 0.1}
    strength, comparisons = simulated(true, {"ann": 0.5, "bob": 0.5, "cy": 0.5, "left": 0.9})
    found = fit(comparisons)
    assert found.converged
    assert found.reliability["left"] < 0.35
    assert min(found.reliability[name] for name in ("ann", "bob", "cy")) > 0.8
    assert found.first_side["left"] > 0.8
    assert np.corrcoef(strength, [found.strength[f"{i:02d}"] for i in range(30)])[0, 1] > 0.93
    assert fit(comparisons[::-1]).strength == pytest.approx(found.strength, abs=1e-3), (
        "nothing is drawn"
    )


def test_bradley_terry_gradient() -> None:
    _, comparisons = simulated({"a": 0.9, "b": 0.3}, {"a": 0.5, "b": 0.8})
    rng = np.random.default_rng(1)
    first, second = (
        np.array([int(getattr(c, side)) for c in comparisons]) for side in ("first", "second")
    )
    who = np.array(["ab".index(c.annotator) for c in comparisons])
    chosen = rng.choice([0.0, 0.5, 1.0], len(comparisons))
    x = rng.normal(size=34)
    arguments = (first, second, who, chosen, 30, 2)
    numeric = approx_fprime(x, lambda y: loss_and_gradient(y, *arguments)[0], 1e-7)
    np.testing.assert_allclose(loss_and_gradient(x, *arguments)[1], numeric, rtol=1e-4, atol=1e-4)


def test_bradley_terry_of_few_labels() -> None:
    tie = Outcome.tie
    found = {
        v.pair.prompt: v
        for v in results(
            LabelAggregate.bradley_terry,
            {"a": "good"},
            {"a": tie},
            {"a": "good", "b": "bad"},
            {"a": "good", "b": "good"},
        ).results
    }
    one, tied, split, two = (found[f"prompt {n}"] for n in range(4))
    assert 0.6 < better(one) < 0.8, "a vote of one is not certainty"
    assert better(one) < better(two) < 0.95
    assert winner(tied) == "tie"
    assert 0.4 < better(split) < 0.6
    with pytest.raises(ValueError, match="no comparisons"):
        fit([])


RANKED = export_of(
    [{"prompt": "p", "answers": [Answer(t) for t in "abcd"]}], kind=LabelKind.ranking
)


def test_a_ranking_is_its_pairs() -> None:
    [task] = RANKED.tasks
    place = {answer.text: i for i, answer in enumerate(task.answers)}
    tied = aggregate(
        LabelAggregate.majority, collect(ledgers_of(RANKED), [label(task, Outcome.tie)])
    )
    assert [result.outcome for result in tied.results] == [Outcome.tie] * 6
    said = Checked(
        RANKED.id,
        task.id,
        "ann",
        Outcome.ranked,
        ranking=((place["c"],), tuple(sorted((place["a"], place["b"])))),
    )
    found = aggregate(LabelAggregate.majority, collect(ledgers_of(RANKED), [said]))
    rows = set()
    for result in found.results:
        names = [answer.text for answer in result.pair.answers]
        rows.add(
            "=".join(sorted(names))
            if result.outcome is Outcome.tie
            else ">".join(names if result.outcome is Outcome.first else names[::-1])
        )
    assert rows == {"c>a", "c>b", "a=b"}, "d is unranked: it says nothing"


def test_one_vote_an_annotator_and_pair() -> None:
    answers = ["x", "y"]
    first = export_of(
        [
            {"prompt": "p", "answers": answers},
            {"prompt": "p", "answers": answers, "role": "repeat", "repeats": 0},
            {"prompt": "g", "answers": answers, "role": "gold", "best": "x"},
        ]
    )
    again = export_of(
        [{"prompt": "p", "answers": answers}], created="2026-02-02T00:00:00+00:00", seed=1
    )
    main, repeat, gold = first.tasks
    ledgers = ledgers_of(again, first)

    def votes(*labels: Checked) -> list[tuple[str, str]]:
        found = collect(ledgers, labels)
        return [
            (v.annotator, found.pairs[v.pair].answers[0 if v.outcome is Outcome.first else 1].text)
            for v in found.votes
        ]

    assert votes(label(main, "x"), label(repeat, "y"), label(gold, "x")) == [("ann", "x")], (
        "the repetition is for self-agreement, gold is no vote"
    )
    assert votes(label(main, Outcome.skip), label(repeat, "y")) == [("ann", "y")]
    assert votes(label(again.tasks[0], "y"), label(main, "x"), label(main, "x", "bob")) == [
        ("ann", "y"),
        ("bob", "x"),
    ], "pairs are pooled, the newest export counts"
    found = collect(ledgers, [label(main, "x"), label(again.tasks[0], "x", "bob")])
    [pair] = found.pairs.values()
    assert (pair.export, pair.task, found.asked[pair.id]) == (again.id, again.tasks[0].id, 2)
    assert not collect(ledgers, [label(main, "x")], without=frozenset({"ann"})).votes


def test_a_pair_is_the_same_in_whatever_order_an_export_keeps_its_answers() -> None:
    export = export_of([{"prompt": "p", "answers": ["x", "y"]}])
    [task] = export.tasks
    other = dataclasses.replace(
        export,
        id="other",
        tasks=(dataclasses.replace(task, id="other-0", answers=task.answers[::-1]),),
    )
    found = collect(
        ledgers_of(export, other), [label(task, "x"), label(other.tasks[0], "x", "bob")]
    )
    [result] = aggregate(LabelAggregate.majority, found).results
    assert (
        preference_row(result, Strength.none)["chosen"],
        result.confidence,
        result.labels,
    ) == ("x", 1.0, 2)


@pytest.mark.parametrize(
    ("said", "options", "expected"),
    [
        ({"a": "good"}, {}, Fate.used),
        ({"a": "good"}, {"min_labels": 2}, Fate.few_labels),
        ({"a": "good", "b": "bad"}, {}, Fate.split),
        ({"a": "good", "b": "good", "c": "bad"}, {"min_confidence": 0.7}, Fate.unsure),
        ({"a": "good", "b": "good", "c": "bad"}, {"min_confidence": 0.6}, Fate.used),
        ({"a": Outcome.tie}, {}, Fate.tie),
        ({"a": Outcome.tie}, {"strength": Strength.margin}, Fate.tie),
        ({"a": Outcome.tie}, {"strength": Strength.soft_label}, Fate.used),
    ],
)
def test_what_becomes_of_a_pair(
    said: dict[str, str | Outcome], options: dict[str, Any], expected: Fate
) -> None:
    [result] = results(LabelAggregate.majority, said).results
    assert (
        fate(
            result,
            **{"min_labels": 1, "min_confidence": 0.0, "strength": Strength.none, **options},
        )
        is expected
    )


def test_rows_of_both_strengths() -> None:
    [sure] = results(LabelAggregate.majority, {"a": "bad", "b": "bad"}).results
    row = preference_row(sure, Strength.soft_label)
    assert row == {
        "prompt": "prompt 0",
        "chosen": "bad 0",
        "rejected": "good answer 0",
        "soft_label": 3 / 4,
        "confidence": 1.0,
        "annotators": 2,
        "task": sure.pair.task,
        "export": sure.pair.export,
    }
    assert preference_row(sure, Strength.margin)["margin"] == pytest.approx(math.log(3))
    assert not {"margin", "soft_label"} & set(preference_row(sure, Strength.none))
    [tie] = results(
        LabelAggregate.majority, {"a": Outcome.tie, "b": Outcome.tie, "c": "good"}
    ).results
    assert preference_row(tie, Strength.soft_label)["soft_label"] == 0.5
    chat = export_of([{"prompt": [{"role": "user", "content": "Hi"}], "answers": ["", "y"]}])
    [found] = aggregate(
        LabelAggregate.majority, collect(ledgers_of(chat), [label(chat.tasks[0], "y")])
    ).results
    assert preference_row(found, Strength.none)["chosen"] == [{"role": "assistant", "content": "y"}]
    plain = export_of([{"prompt": "Hi", "answers": ["", "y"]}])
    [found] = aggregate(
        LabelAggregate.majority, collect(ledgers_of(plain), [label(plain.tasks[0], "y")])
    ).results
    assert fate(found, min_labels=1, min_confidence=0, strength=Strength.none) is Fate.empty, (
        "no stage reads an empty text as an answer"
    )
    judged = export_of([{"prompt": "Hi", "answers": ["x", "y"]}])
    [found] = aggregate(
        LabelAggregate.majority, collect(ledgers_of(judged), [label(judged.tasks[0], "y")])
    ).results
    options: dict[str, Any] = {"min_labels": 1, "min_confidence": 0, "strength": Strength.none}
    assert fate(found, **options) is Fate.used
    answers = (found.pair.answers[0], dataclasses.replace(found.pair.answers[1], episode=True))
    played = dataclasses.replace(found, pair=dataclasses.replace(found.pair, answers=answers))
    assert fate(played, **options) is Fate.episode, "no policy may learn its environment's words"


@pytest.mark.parametrize("method", LabelAggregate)
def test_the_order_of_the_answers_says_nothing(method: LabelAggregate) -> None:
    """Swapping the sides of every task changes no row."""
    votes = careless(3, 20)

    def rows(flip: bool) -> list[dict[str, Any]]:
        export = pairs(20)
        questions = [
            {"prompt": t.prompt, "answers": t.answers, "order": t.order[::-1] if flip else t.order}
            for t in export.tasks
        ]
        asked = export_of(questions)
        labels = [
            label(task, f"good answer {n}" if v == "good" else f"bad {n}", who)
            for n, (task, said) in enumerate(zip(asked.tasks, votes, strict=True))
            for who, v in said.items()
        ]
        found = aggregate(method, collect(ledgers_of(asked), labels)).results
        return [
            {**preference_row(v, Strength.none), "task": "", "export": "", "confidence": 0}
            for v in found
        ]

    if method is LabelAggregate.bradley_terry:  # knows of sides, but only as far as they matter
        assert (
            sum(a["chosen"] == b["chosen"] for a, b in zip(rows(False), rows(True), strict=True))
            >= 18
        )
    else:
        assert rows(False) == rows(True)


def test_held_out_prompts_stay_held_out() -> None:
    prompts = [f"prompt {n}" for n in range(4000)]
    tenth, third = ({p for p in prompts if held_out(p, fraction)} for fraction in (0.1, 0.3))
    assert tenth < third
    assert 0.08 < len(tenth) / len(prompts) < 0.12
    assert not any(held_out(p, 0.0) for p in prompts)
