"""Which rows are the same, and which are nearly the same."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf.data.prepare.items import Item, parts
from rlhf.data.report.texts import words

SHINGLE = 3  # words
_PERMUTATIONS = 128

Shingles = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Near:
    """Two texts, by their places in the sequence, and how alike they are."""

    first: int
    second: int  # above first
    similarity: float  # Jaccard, of word shingles


def exact_key(text: str) -> str:
    """Texts with the same key are the same: NFKC, case folded, white space in one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> Shingles:
    """The runs of SHINGLE words of a text; of a shorter text all its words in one."""
    found = words(text)
    return frozenset(tuple(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))) if found else frozenset()


def row_shingles(item: Item) -> Shingles:
    """The shingles of all of a row's texts, each with its column, so that a pair is not like the same pair with its sides exchanged."""
    return frozenset((where.split("[")[0], *s) for where, text in parts(item.columns) for s in shingles(text))


def jaccard(a: Shingles, b: Shingles) -> float:
    """Shared / all; 0 when both are empty."""
    both = len(a & b)
    return both / (len(a) + len(b) - both) if both else 0.0


def near(sets: Sequence[Shingles], threshold: float, seed: int) -> list[Near]:
    """Pairs at least `threshold` alike, sorted by place; candidates by MinHash-LSH (Broder 1997), each verified by its exact similarity."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))  # a candidate costs little: it is verified
    out = []
    for i, found in enumerate(sets):
        if not found:
            continue
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=seed)
        sketch.update_batch([" ".join(s).encode("utf-8", "surrogatepass") for s in found])
        for other in index.query(sketch):
            similarity = jaccard(sets[other], found)
            if similarity >= threshold:
                out.append(Near(other, i, similarity))
        index.insert(i, sketch)
    return sorted(out, key=lambda pair: (pair.first, pair.second))


def clusters(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected places (union-find), each cluster and their list sorted."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        parent.setdefault(i, i)
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    found: dict[int, list[int]] = defaultdict(list)
    for i in sorted(parent):
        found[root(i)].append(i)
    return list(found.values())
