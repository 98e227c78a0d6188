"""What every preparation step has."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from conf.options import check, check_options


class Part(Enum):
    """Which texts of a row a step looks at (rlhf/data/prepare/texts.py)."""

    whole = "whole"  # all of them as one
    prompt = "prompt"  # what is asked; of a whole text the text itself
    answer = "answer"  # what answers it: both sides of a pair


class Keep(Enum):
    """Which row of a cluster of duplicates stays."""

    first = "first"  # in the order of the rows
    longest = "longest"  # most characters in all its texts; of equals the first
    best = "best"  # highest number in `column`; of equals the first


class Vectors(Enum):
    """What texts are compared as."""

    tfidf = "tfidf"  # words and pairs of words, weighted by rarity
    embedding = "embedding"  # a sentence-embedding model's directory, `model`


@dataclass(slots=True, kw_only=True)
class StepOptions:
    """One step of data.pipeline. What it does is in rlhf/data/prepare/steps.py, under its name.

    A file or directory that an option names belongs into `files`: it is checked before a row is
    read, and a change of its content makes the step run again.
    """

    step: ClassVar[str]  # its name in data.pipeline
    # takes one item at a time; else it holds all of them in memory
    streaming: ClassVar[bool] = False
    # looks at each row by itself: parts of the rows are shared out among processes
    rowwise: ClassVar[bool] = False
    # rows that it can take
    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "preference", "unpaired", "prompt"})
    passes: ClassVar[bool] = False  # changes no row: columns go out as they came in
    after_split: ClassVar[bool] = False  # refused before a split step
    torch: ClassVar[bool] = False  # it may load a model: torch is imported and set up
    splits: ClassVar[bool] = False  # it sets Item.split: one such step a pipeline
    # why rows that show pictures are refused; "": it takes them
    without_pictures: ClassVar[str] = ""
    # raised whenever the same rows and options give another result: a run that resumes then does
    # the step again
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_options(self)

    def files(self) -> dict[str, str]:
        """Option -> the file or directory that it names."""
        return {}


def check_embedding(vectors: Vectors, model: str | None) -> None:
    """Raise ValueError unless a model's directory is given exactly with vectors=embedding."""
    check(
        (vectors is Vectors.embedding) == (model is not None),
        "model",
        model,
        "a directory with vectors=embedding, else null",
    )
