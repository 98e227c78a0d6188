"""Steps of data.pipeline: balance and split."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from conf.preparation.base import Part, StepOptions, Vectors
from conf.schema import check


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
    apply: ClassVar[str] = "rlhf.data.prepare.balance:balance"

    by: Grouping = Grouping.column
    column: str | None = None  # with by=column
    how: Balancing = Balancing.under
    ratio: float = 1.0  # of the largest to the smallest group that may remain
    clusters: int = 8  # with by=kmeans
    min_cluster: int = 5  # rows, with by=hdbscan
    part: Part = Part.whole  # whose vectors are clustered and measured
    vectors: Vectors = Vectors.tfidf
    model: str | None = None  # directory of a sentence-embedding model, with vectors=embedding

    def __post_init__(self) -> None:
        check(
            (self.by is Grouping.column) == (self.column is not None),
            "column",
            self.column,
            "a column's name with by=column, else null",
        )
        check(self.ratio >= 1, "ratio", self.ratio, "at least 1")
        check(self.clusters >= 2, "clusters", self.clusters, "at least 2")
        check(self.min_cluster >= 2, "min_cluster", self.min_cluster, "at least 2")
        check(
            (self.vectors is Vectors.embedding) == (self.model is not None),
            "model",
            self.model,
            "a directory with vectors=embedding, else null",
        )

    def files(self) -> dict[str, str]:
        return {} if self.model is None else {"model": self.model}


@dataclass(slots=True, kw_only=True)
class Split(StepOptions):
    """Holds out a share of the rows. Rows whose prompts are near duplicates stay together, so that
    nothing leaks.
    """

    step: ClassVar[str] = "split"
    apply: ClassVar[str] = "rlhf.data.prepare.splitting:split"
    splits: ClassVar[bool] = True

    fraction: float = 0.1  # of the rows, held out
    by: SplitBy = SplitBy.prompt
    # Jaccard similarity from which two prompts are one (step near_duplicates); 1: only equal ones
    threshold: float = 0.8
    stratify: str | None = None  # column whose values are to be as frequent on both sides
    ngram: int = 5
    permutations: int = 128

    def __post_init__(self) -> None:
        check(0 < self.fraction < 1, "fraction", self.fraction, "in (0, 1)")
        check(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")
        check(self.ngram >= 1, "ngram", self.ngram, "at least 1 character")
        check(self.permutations >= 16, "permutations", self.permutations, "at least 16")


STEPS: tuple[type[StepOptions], ...] = (Balance, Split)
