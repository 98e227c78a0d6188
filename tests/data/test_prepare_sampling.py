"""Steps balance and split, and SMOTE for classifier heads."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.formats import Use
from rlhf.data.prepare import balance, splitting
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.smote import smote
from rlhf.types import UserError
from tests.data.preparation import apply, numbers, pairs, sft

TOPICS = {
    "food": [
        "bread and butter with cheese",
        "fresh bread and cheese",
        "butter on warm bread",
        "cheese and bread for supper",
    ],
    "ships": [
        "the old ship left the harbour",
        "a ship sails out of the harbour",
        "harbour ships and sails",
        "ships sail from harbour to harbour",
    ],
}


def labelled(counts: dict[str, int]) -> list[Item]:
    """`counts[topic]` rows of each topic, interleaved by their numbers, with the topic in column
    `topic`.
    """
    rows = [
        (topic, TOPICS[topic][i % 4] + f" {i}")
        for topic, count in counts.items()
        for i in range(count)
    ]
    return [
        Item({"text": text, "topic": topic}, "rows.jsonl", number)
        for number, (topic, text) in enumerate(rows, start=1)
    ]


def topics(items: list[Item]) -> dict[str, int]:
    return dict(Counter(item.columns["topic"] for item in items))


# ---- balance ----


def test_under_sampling_keeps_the_rows_nearest_to_the_centre() -> None:
    rows = [
        *labelled({"food": 3, "ships": 2}),
        Item({"text": "quantum chromodynamics lattice", "topic": "food"}, "rows.jsonl", 6),
    ]
    kept, reasons, report = apply(rows, "balance", column="topic", how="under")
    assert topics(kept) == {"food": 2, "ships": 2} and 6 in reasons
    assert "group 'food' has more than 2 rows" in reasons[6]
    assert report.figures == {"before": {"food": 4, "ships": 2}, "after": {"food": 2, "ships": 2}}
    assert numbers(kept) == sorted(numbers(kept))
    assert topics(apply(rows, "balance", column="topic", how="under", ratio=1.5)[0]) == {
        "food": 3,
        "ships": 2,
    }


def test_central_rows_are_nearest_to_the_mean() -> None:
    matrix = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], dtype=np.float32)
    assert balance.central(matrix, [0, 1, 2, 3], 2) == [1, 2]
    assert balance.central(matrix, [0, 1, 3], 1) == [1]


def test_over_sampling_takes_every_row_before_any_twice() -> None:
    kept, reasons, report = apply(
        labelled({"food": 7, "ships": 3}), "balance", column="topic", how="over"
    )
    assert not reasons and topics(kept) == {"food": 7, "ships": 7} == report.figures["after"]
    assert numbers(kept)[:10] == list(range(1, 11)), "copies follow after all rows"
    copies = Counter(numbers(kept)[10:])
    assert set(copies) == {8, 9, 10} and max(copies.values()) == 2
    originals = {item.number: item for item in kept[:10]}
    assert all(
        item.columns is not originals[item.number].columns
        and item.columns == originals[item.number].columns
        for item in kept[10:]
    )
    assert topics(
        apply(labelled({"food": 7, "ships": 3}), "balance", column="topic", how="over", ratio=2)[0]
    ) == {"food": 7, "ships": 4}


def test_weights_make_groups_equal_and_keep_the_mean() -> None:
    kept, _, report = apply(
        labelled({"food": 6, "ships": 2}), "balance", column="topic", how="weight"
    )
    weights = [item.columns["weight"] for item in kept]
    assert weights == pytest.approx([8 / 12] * 6 + [8 / 4] * 2, abs=1e-6)
    assert sum(weights) == pytest.approx(8) and report.figures == {
        "before": {"food": 6, "ships": 2}
    }
    assert balance.weights(["a", None, "b", "b", "b"]) == pytest.approx([2, 1, 2 / 3, 2 / 3, 2 / 3])


def test_balance_leaves_held_out_rows_alone() -> None:
    rows = labelled({"food": 4, "ships": 2})
    for row in rows[:2]:
        row.split = "eval"
    kept, _, report = apply(rows, "balance", column="topic", how="under")
    assert topics([item for item in kept if item.split == "train"]) == {
        "food": 2,
        "ships": 2,
    } and numbers(kept)[:2] == [1, 2]
    assert report.figures["before"] == {"food": 2, "ships": 2}


def spoken(counts: dict[str, int], seed: int = 0) -> list[Item]:
    """`counts[topic]` rows of random words of each topic, which is in column `topic`."""
    rng = random.Random(seed)
    words = {topic: " ".join(texts).split() for topic, texts in TOPICS.items()}
    rows = [
        (topic, " ".join(rng.choices(words[topic], k=12)))
        for topic, count in counts.items()
        for _ in range(count)
    ]
    return [
        Item({"text": text, "topic": topic}, "rows.jsonl", number)
        for number, (topic, text) in enumerate(rows, start=1)
    ]


@pytest.mark.parametrize("by", ["kmeans", "hdbscan"])
def test_balance_by_what_texts_say(by: str) -> None:
    options = {"clusters": 2} if by == "kmeans" else {"min_cluster": 6}
    kept, _, report = apply(
        spoken({"food": 60, "ships": 20}), "balance", by=by, how="weight", **options
    )
    mean = {
        topic: np.mean([item.columns["weight"] for item in kept if item.columns["topic"] == topic])
        for topic in TOPICS
    }
    assert mean["ships"] > 1.5 * mean["food"]
    assert sum(report.figures["before"].values()) == 80


def test_a_missing_label_is_named_with_the_nearest() -> None:
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl, row 1: step balance .*column 'topics', .*nearest: 'topic'",
    ):
        apply(labelled({"food": 1}), "balance", column="topics")
    with pytest.raises(UserError, match="clusters=8, but there are 2 training rows"):
        apply(sft("a", "b"), "balance", by="kmeans", how="weight")


# ---- SMOTE ----


def test_smote_makes_vectors_between_neighbours_of_the_small_class() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(0, 1, (20, 4)), rng.normal(9, 1, (5, 4))])
    labels = np.array([0] * 20 + [1] * 5)
    more, names = smote(vectors, labels, seed=1)
    assert np.array_equal(more[:25], vectors) and Counter(names.tolist()) == {0: 20, 1: 20}
    assert (more[25:] >= vectors[20:].min(axis=0)).all() and (
        more[25:] <= vectors[20:].max(axis=0)
    ).all()
    with pytest.raises(UserError, match=r"class .*1.* has 1 vector: expected at least 2"):
        smote(vectors[:21], labels[:21])
    with pytest.raises(UserError, match="expected vectors"):
        smote(vectors, labels[:3])


# ---- split ----


def prompts(*texts: str) -> list[Item]:
    return [
        Item({"prompt": text}, "prompts.jsonl", number)
        for number, text in enumerate(texts, start=1)
    ]


QUESTION = "How long does it take to boil an egg until the yolk is firm"


def test_near_duplicate_prompts_never_straddle_the_split() -> None:
    others = [
        f"Question {i}: "
        + " ".join(f"{w}{i}" for w in ("river", "stone", "cloud", "light", "tower"))
        for i in range(30)
    ]
    family = [QUESTION + end for end in ("", "?", "!", " ?", " .")]
    for seed in range(8):
        kept, _, report = apply(
            prompts(*others, *family), "split", Use.prompt, seed=seed, fraction=0.3
        )
        held = {item.number for item in kept if item.split == "eval"}
        assert held & set(range(31, 36)) in (set(), set(range(31, 36)))
        assert (
            report.figures["eval"] == len(held)
            and abs(len(held) - 0.3 * 35) <= 2.5
            and report.figures["largest_group"] == 5
        )
        assert numbers(kept) == list(range(1, 36))
    assert (
        apply(prompts(*others, *family), "split", Use.prompt, threshold=1)[2].figures["groups"]
        == 35
    )


def test_pairs_split_by_their_prompts() -> None:
    rows = pairs(
        *((f"{QUESTION} number {'abcdefghij'[i // 3] * 9}", f"answer {i}", "no") for i in range(30))
    )
    kept, _, _ = apply(rows, "split", Use.preference, fraction=0.2, threshold=0.95)
    sides = {}
    for item in kept:
        sides.setdefault(item.columns["prompt"], set()).add(item.split)
    assert all(len(found) == 1 for found in sides.values()) and {"train", "eval"} == set().union(
        *sides.values()
    )


def test_the_split_is_fixed_by_its_seed() -> None:
    rows = prompts(
        *(f"{i} " + " ".join("wxyz"[int(d) % 4] * 3 + d for d in str(7919 * i)) for i in range(60))
    )
    held = [
        [
            item.number
            for item in apply(rows, "split", Use.prompt, seed=seed)[0]
            if item.split == "eval"
        ]
        for seed in (0, 0, 1)
    ]
    digests = [
        apply(rows, "split", Use.prompt, seed=seed)[2].figures["eval_rows_sha256"]
        for seed in (0, 0, 1)
    ]
    assert held[0] == held[1] != held[2] and digests[0] == digests[1] != digests[2]


def test_a_split_is_stratified_by_a_column() -> None:
    rows = labelled({"food": 80, "ships": 20})
    for row in rows:
        row.columns["text"] = f"{row.columns['text']} {row.number} {hex(row.number * 2654435761)}"
    kept, _, report = apply(rows, "split", fraction=0.2, stratify="topic", threshold=1)
    assert topics([item for item in kept if item.split == "eval"]) == {"food": 16, "ships": 4}
    assert report.figures["held_out_share"] == {"food": 0.2, "ships": 0.2}


def test_one_prompt_for_all_can_be_split_by_rows_only() -> None:
    rows = pairs(*((QUESTION, f"answer {i}", "no") for i in range(10)))
    with pytest.raises(UserError, match=r"10 prompts.*by=row"):
        apply(rows, "split", Use.preference)
    kept, _, _ = apply(rows, "split", Use.preference, by="row", fraction=0.3)
    assert sum(item.split == "eval" for item in kept) == 3
    with pytest.raises(UserError, match="1 rows can't be split"):
        apply(rows[:1], "split", Use.preference)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=25),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
    st.data(),
)
def test_a_draw_takes_whole_groups_of_both_sides(
    sizes: list[int], fraction: float, seed: int, data: st.DataObject
) -> None:
    ends = np.cumsum(sizes)
    groups = [list(range(end - size, end)) for end, size in zip(ends.tolist(), sizes, strict=True)]
    total = int(ends[-1])
    strata = data.draw(st.lists(st.sampled_from("ab"), min_size=total, max_size=total))
    held = set(splitting.draw(groups, strata, fraction, seed))
    assert all(set(group) <= held or not set(group) & held for group in groups)
    assert 0 < len(held) < total
    plain = set(splitting.draw(groups, [""] * total, fraction, seed))
    taken = [group for group in groups if set(group) <= plain]
    assert len(plain) <= fraction * total + max(sizes) / 2 or len(taken) == 1
