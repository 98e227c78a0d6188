"""Steps of data.pipeline: terms, labels of several annotators, label noise."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from conf.preparation.base import StepOptions
from conf.schema import MISSING, check

_CONTENT = ("prompt", "text", "completion", "messages", "chosen", "rejected")


class Method(Enum):
    majority = "majority"  # the most frequent label; a tie stays a tie
    # each annotator's confusion matrix and each item's label, estimated together
    dawid_skene = "dawid_skene"


class Scale(Enum):
    """What the difference of two labels means to Krippendorff's alpha."""

    nominal = "nominal"
    ordinal = "ordinal"
    interval = "interval"


class Repeats(Enum):
    """What becomes of an annotator's second, different judgement of an item."""

    error = "error"
    last = "last"  # the later row counts


class Contradicted(Enum):
    """What becomes of a row whose label the model contradicts."""

    reject = "reject"
    flag = "flag"  # every row stays, with the columns label_noise and label_quality
    weight = "weight"  # every row stays, its column weight times its label_quality


class NoiseFilter(Enum):
    """How labels are picked: cleanlab's filter_by."""

    # as many as the estimated noise, those that the model contradicts the most
    prune_by_noise_rate = "prune_by_noise_rate"
    prune_by_class = "prune_by_class"
    both = "both"
    confident_learning = "confident_learning"
    # each one that the model finds less likely than another
    predicted_neq_given = "predicted_neq_given"


@dataclass(slots=True, kw_only=True)
class Terms(StepOptions):
    """Other words for one thing become its canonical term, by a dictionary in YAML: canonical term
    -> list of other words.
    """

    step: ClassVar[str] = "terms"
    apply: ClassVar[str] = "rlhf.data.prepare.terms:terms"
    streaming: ClassVar[bool] = True

    dictionary: str = MISSING  # YAML file; an entry without other words protects its term
    columns: list[str] = field(default_factory=list)  # which content columns; []: all of them

    def __post_init__(self) -> None:
        check(
            set(self.columns) <= set(_CONTENT),
            "columns",
            self.columns,
            f"some of {', '.join(_CONTENT)}",
        )

    def files(self) -> dict[str, str]:
        return {"dictionary": self.dictionary}


@dataclass(slots=True, kw_only=True)
class JudgedOptions(StepOptions):
    """How several annotators' labels lie in the rows: one row for each label."""

    # column that says which rows judge the same thing; None: rows with the same texts (of a pair,
    # in either order)
    item: str | None = None
    annotator: str = "annotator"  # column that names who judged
    # column with the judgement; None: of a pair which side is chosen, of a judged answer the column
    # label
    label: str | None = None
    repeats: Repeats = Repeats.error

    def __post_init__(self) -> None:
        check(bool(self.annotator), "annotator", self.annotator, "a column's name")


@dataclass(slots=True, kw_only=True)
class Aggregate(JudgedOptions):
    """Rows that judge one item become one row with the label that they give together."""

    step: ClassVar[str] = "aggregate"
    apply: ClassVar[str] = "rlhf.data.prepare.aggregate:aggregate"

    method: Method = Method.majority
    # the label of an item whose annotators tie; None: the item is left out
    tie_label: str | None = None
    min_labels: int = 1  # items with fewer labels are left out
    # items below it are left out; share of the votes, or Dawid-Skene's probability
    min_confidence: float = 0.0
    confidence: str = "confidence"  # column for it
    level: Scale = Scale.nominal
    # ordinal labels from lowest to highest; []: numbers by size
    order: list[str] = field(default_factory=list)
    resamples: int = 1000  # bootstrap of the agreement figures

    def __post_init__(self) -> None:
        JudgedOptions.__post_init__(self)
        check(self.min_labels >= 1, "min_labels", self.min_labels, "at least 1")
        check(0 <= self.min_confidence <= 1, "min_confidence", self.min_confidence, "in [0, 1]")
        check(bool(self.confidence), "confidence", self.confidence, "a column's name")
        check(self.resamples >= 1, "resamples", self.resamples, "at least 1")
        check(
            not self.order or self.level is Scale.ordinal,
            "order",
            self.order,
            "[] unless level=ordinal",
        )


@dataclass(slots=True, kw_only=True)
class Review(JudgedOptions):
    """A queue file of the items that annotators disagree on, for a person to decide; read back with
    `decisions`.
    """

    step: ClassVar[str] = "review"
    apply: ClassVar[str] = "rlhf.data.prepare.review:review"

    # a queue file (CSV or JSON lines) with its decision column filled in; None: only write the
    # queue
    decisions: str | None = None
    queue: str = "review"  # name of the queue files in the run directory, without suffix
    # items whose most frequent label has a smaller share of the labels than this are queued
    agreed: float = 1.0

    def __post_init__(self) -> None:
        JudgedOptions.__post_init__(self)
        check(0 < self.agreed <= 1, "agreed", self.agreed, "in (0, 1]")
        plain = (
            bool(self.queue) and not set(self.queue) & set("/\\") and self.queue not in (".", "..")
        )
        check(plain, "queue", self.queue, "a file name without a folder")

    def files(self) -> dict[str, str]:
        return {} if self.decisions is None else {"decisions": self.decisions}


@dataclass(slots=True, kw_only=True)
class LabelNoise(StepOptions):
    """Labels that a model contradicts with confidence (confident learning), from scores of a model
    that has not seen the rows.
    """

    step: ClassVar[str] = "label_noise"
    apply: ClassVar[str] = "rlhf.data.prepare.label_noise:label_noise"
    kinds: ClassVar[frozenset[str]] = frozenset({"preference", "unpaired"})

    # directory of a reward model that scores the pairs; {fold} in it stands for the row's fold
    reward_model: str | None = None
    # column of a row's fold: its model was trained without the rows of that fold
    fold: str | None = None
    # the model may have been trained on these rows: scores then say less than they seem to
    seen: bool = False
    # columns with scores of a pair's sides, where no reward model is given
    score_chosen: str = "score_chosen"
    score_rejected: str = "score_rejected"
    # column with the probability that the answer is good, for judged answers
    probability: str | None = None
    method: NoiseFilter = NoiseFilter.prune_by_noise_rate
    action: Contradicted = Contradicted.reject

    def __post_init__(self) -> None:
        named = self.reward_model is not None and "{fold}" in self.reward_model
        check(
            named == (self.fold is not None),
            "fold",
            self.fold,
            "a column where reward_model holds {fold}, else null",
        )
        check(
            self.reward_model is None or self.probability is None,
            "probability",
            self.probability,
            "null beside a reward model",
        )

    def files(self) -> dict[str, str]:
        return (
            {}
            if self.reward_model is None or self.fold is not None
            else {"reward_model": self.reward_model}
        )


STEPS: tuple[type[StepOptions], ...] = (Terms, Aggregate, Review, LabelNoise)
