"""Steps of data.pipeline: exact and near duplicates."""

from dataclasses import dataclass
from typing import ClassVar

from conf.options import check, check_options, option
from conf.preparation.base import Keep, Part, StepOptions, Vectors, check_embedding


@dataclass(slots=True, kw_only=True)
class ExactDuplicates(StepOptions):
    """Keeps the first row of each text. Streams: some 50 bytes a row in memory."""

    step: ClassVar[str] = "exact_duplicates"
    streaming: ClassVar[bool] = True
    passes: ClassVar[bool] = True

    part: Part = option(Part.whole, "Which texts of a row are compared.")
    normalise: bool = option(True, "NFKC, case and white space make no difference.")


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
    passes: ClassVar[bool] = True
    version: ClassVar[int] = 2

    part: Part = option(Part.whole, "Which texts of a row are compared.")
    threshold: float = option(
        0.8, "Jaccard similarity from which two texts are near duplicates.", above=0, at_most=1
    )
    ngram: int = option(5, "Length of the n-grams.", unit="characters", at_least=1)
    permutations: int = option(
        128, "Permutations of MinHash: more miss fewer pairs and need more memory.", at_least=16
    )
    numbers: bool = option(
        True,
        "Whether two texts of which each has a number that the other lacks are different: one "
        "problem asked with other numbers.",
    )
    keep: Keep = option(Keep.first, "Which row of a cluster is kept.")
    column: str | None = option(None, "Column of numbers; needed with keep=best.")

    def __post_init__(self) -> None:
        check_options(self)
        _check_keep(self.keep, self.column)


@dataclass(slots=True, kw_only=True)
class CosineDuplicates(StepOptions):
    """Keeps one row of each cluster of texts whose vectors point the same way: every pair is
    compared, so none is missed.

    Clusters are the connected components of pairs with a cosine of at least `threshold`.
    """

    step: ClassVar[str] = "cosine_duplicates"
    torch: ClassVar[bool] = True

    part: Part = option(Part.whole, "Which texts of a row are compared.")
    threshold: float = option(
        0.95, "Cosine from which two texts are duplicates.", above=0, at_most=1
    )
    vectors: Vectors = option(Vectors.tfidf, "What texts are compared as.")
    model: str | None = option(
        None, "Directory of a sentence-embedding model; needed with vectors=embedding."
    )
    keep: Keep = option(Keep.first, "Which row of a cluster is kept.")
    column: str | None = option(None, "Column of numbers; needed with keep=best.")

    def __post_init__(self) -> None:
        check_options(self)
        check_embedding(self.vectors, self.model)
        _check_keep(self.keep, self.column)

    def files(self) -> dict[str, str]:
        return {} if self.model is None else {"model": self.model}


STEPS: tuple[type[StepOptions], ...] = (ExactDuplicates, NearDuplicates, CosineDuplicates)
