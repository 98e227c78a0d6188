"""Steps of data.pipeline: exact and near duplicates."""

from dataclasses import dataclass
from typing import ClassVar

from conf.preparation.base import Keep, Part, StepOptions, Vectors
from conf.schema import check


@dataclass(slots=True, kw_only=True)
class ExactDuplicates(StepOptions):
    """Keeps the first row of each text. Streams: some 50 bytes a row in memory."""

    step: ClassVar[str] = "exact_duplicates"
    apply: ClassVar[str] = "rlhf.data.prepare.exact:exact_duplicates"
    streaming: ClassVar[bool] = True

    part: Part = Part.whole
    normalise: bool = True  # NFKC, case and white space make no difference


def _check_keep(keep: Keep, column: str | None) -> None:
    check(
        (keep is Keep.best) == (column is not None),
        "column",
        column,
        "a column of numbers with keep=best, else null",
    )


@dataclass(slots=True, kw_only=True)
class NearDuplicates(StepOptions):
    """Keeps one row of each cluster of texts that share most of their character n-grams.

    Two texts are near duplicates when the Jaccard similarity of their sets of n-grams, after
    normalisation, is at least `threshold`. MinHash with banding (Broder 1997; datasketch) proposes
    pairs, and each pair is checked exactly; so none is wrong, and a few near the threshold are
    missed. Clusters are the connected components. Holds all rows, and 4 x permutations bytes a row.
    """

    step: ClassVar[str] = "near_duplicates"
    apply: ClassVar[str] = "rlhf.data.prepare.near:near_duplicates"

    part: Part = Part.whole
    threshold: float = 0.8
    ngram: int = 5  # characters
    permutations: int = 128
    keep: Keep = Keep.first
    column: str | None = None  # numbers, with keep=best

    def __post_init__(self) -> None:
        check(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")
        check(self.ngram >= 1, "ngram", self.ngram, "at least 1 character")
        check(self.permutations >= 16, "permutations", self.permutations, "at least 16")
        _check_keep(self.keep, self.column)


@dataclass(slots=True, kw_only=True)
class CosineDuplicates(StepOptions):
    """Keeps one row of each cluster of texts whose vectors point the same way: every pair is
    compared, so none is missed.

    Clusters are the connected components of pairs with a cosine of at least `threshold`.
    """

    step: ClassVar[str] = "cosine_duplicates"
    apply: ClassVar[str] = "rlhf.data.prepare.cosine:cosine_duplicates"

    part: Part = Part.whole
    threshold: float = 0.95
    vectors: Vectors = Vectors.tfidf
    model: str | None = None  # directory of a sentence-embedding model, with vectors=embedding
    keep: Keep = Keep.first
    column: str | None = None  # numbers, with keep=best

    def __post_init__(self) -> None:
        check(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")
        check(
            (self.vectors is Vectors.embedding) == (self.model is not None),
            "model",
            self.model,
            "a directory with vectors=embedding, else null",
        )
        _check_keep(self.keep, self.column)

    def files(self) -> dict[str, str]:
        return {} if self.model is None else {"model": self.model}


STEPS: tuple[type[StepOptions], ...] = (ExactDuplicates, NearDuplicates, CosineDuplicates)
