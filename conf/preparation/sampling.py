"""Steps of data.pipeline: balance and split."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from conf.options import check, check_options, option
from conf.preparation.base import Part, StepOptions, Vectors, check_embedding


class Grouping(Enum):
    column = "column"  # the values of `column`
    kmeans = "kmeans"  # `clusters` clusters of the texts' vectors
    hdbscan = "hdbscan"  # dense regions; rows in none of them are left as they are


class Balancing(Enum):
    over = "over"  # rows of small groups again, drawn at random
    under = "under"  # of large groups the rows nearest to their centre
    weight = "weight"  # all rows, with a number in column `weight`


class SplitBy(Enum):
    prompt = "prompt"  # near-duplicate prompts stay on one side; of whole texts the texts
    row = "row"  # rows one by one: for data with one prompt for all


@dataclass(slots=True, kw_only=True)
class Balance(StepOptions):
    """Evens out the groups of the training rows; held-out rows pass.

    over, under: no group is more than `ratio` times as large as another. weight: rows / (groups x
    rows of the group), times a constant that makes the mean 1, so that a weighted loss keeps its
    size.
    """

    step: ClassVar[str] = "balance"
    torch: ClassVar[bool] = True

    by: Grouping = option(Grouping.column, "What makes the groups.")
    column: str | None = option(None, "Column whose values are the groups, with by=column.")
    how: Balancing = option(Balancing.under, "How the groups are evened out.")
    ratio: float = option(
        1.0, "Ratio of the largest to the smallest group that may remain.", at_least=1
    )
    clusters: int = option(8, "Number of clusters, with by=kmeans.", at_least=2)
    min_cluster: int = option(5, "Smallest cluster, with by=hdbscan.", unit="rows", at_least=2)
    part: Part = option(Part.whole, "Which texts of a row are clustered and measured.")
    vectors: Vectors = option(Vectors.tfidf, "What texts are compared as.")
    model: str | None = option(
        None, "Directory of a sentence-embedding model; needed with vectors=embedding."
    )

    def __post_init__(self) -> None:
        check_options(self)
        check(
            (self.by is Grouping.column) == (self.column is not None),
            "column",
            self.column,
            "a column's name with by=column, else null",
        )
        check_embedding(self.vectors, self.model)

    def files(self) -> dict[str, str]:
        return {} if self.model is None else {"model": self.model}


@dataclass(slots=True, kw_only=True)
class Split(StepOptions):
    """Holds out a share of the rows. Rows whose prompts are near duplicates stay together, so that
    nothing leaks.
    """

    step: ClassVar[str] = "split"
    splits: ClassVar[bool] = True
    passes: ClassVar[bool] = True

    fraction: float = option(0.1, "Share of the rows that is held out.", above=0, below=1)
    by: SplitBy = option(SplitBy.prompt, "Which rows stay on one side.")
    threshold: float = option(
        0.8,
        "Jaccard similarity from which two prompts stay on one side; 1: equal ones only.",
        above=0,
        at_most=1,
    )
    stratify: str | None = option(
        None, "Column whose values are to be as frequent on both sides; null: none."
    )
    ngram: int = option(
        5, "Length of the n-grams that prompts are compared by.", unit="characters", at_least=1
    )
    permutations: int = option(
        128, "Permutations of MinHash: more miss fewer pairs and need more memory.", at_least=16
    )


STEPS: tuple[type[StepOptions], ...] = (Balance, Split)
