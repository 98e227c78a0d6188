"""Steps of data.pipeline: terms, labels of several annotators, label noise."""

from dataclasses import dataclass, field
from typing import ClassVar

from conf.preparation.base import StepOptions
from conf.schema import check

CONTENT = ("prompt", "text", "completion", "messages", "chosen", "rejected")
METHODS = ("majority", "dawid_skene")
LEVELS = ("nominal", "ordinal", "interval")
REPEATS = ("error", "last")
ACTIONS = ("reject", "flag", "weight")
FILTERS = ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given")


def check_choice(value: str, key: str, choices: tuple[str, ...]) -> None:
    """One of `choices`. Raises ValueError."""
    check(value in choices, f"data.pipeline: {key}", value, f"one of {', '.join(choices)}")


@dataclass(slots=True, kw_only=True)
class TermsOptions(StepOptions):
    """Other words for one thing become its canonical term, by a dictionary in YAML: canonical term -> list of other words."""

    step: ClassVar[str] = "terms"
    apply: ClassVar[str] = "rlhf.data.prepare.terms:terms"
    streaming: ClassVar[bool] = True

    dictionary: str  # YAML file; an entry without other words protects its term
    columns: list[str] = field(default_factory=list)  # which content columns; none: all of them

    def __post_init__(self) -> None:
        check(set(self.columns) <= set(CONTENT), "data.pipeline: terms.columns", self.columns, f"some of {', '.join(CONTENT)}")


@dataclass(slots=True, kw_only=True)
class JudgedOptions(StepOptions):
    """How several annotators' labels lie in the rows: one row for each label."""

    item: str | None = None  # column that says which rows judge the same thing; None: rows with the same texts (of a pair, in either order)
    annotator: str = "annotator"  # column that names who judged
    label: str | None = None  # column with the judgement; None: of a pair which side is chosen, of a judged answer the column label
    repeats: str = "error"  # one annotator judges an item twice and differs: error, or last (the later row counts)

    def __post_init__(self) -> None:
        check_choice(self.repeats, f"{self.step}.repeats", REPEATS)
        check(bool(self.annotator), f"data.pipeline: {self.step}.annotator", self.annotator, "a column's name")


@dataclass(slots=True, kw_only=True)
class AggregateOptions(JudgedOptions):
    """Rows that judge one item become one row with the label that they give together."""

    step: ClassVar[str] = "aggregate"
    apply: ClassVar[str] = "rlhf.data.prepare.aggregate:aggregate"

    method: str = "majority"  # majority, dawid_skene
    tie_label: str | None = None  # the label of an item whose annotators tie; None: the item is rejected
    min_labels: int = 1  # items with fewer labels are rejected
    min_confidence: float = 0.0  # items below it are rejected; share of the votes, or Dawid-Skene's probability
    confidence: str = "confidence"  # column for it
    level: str = "nominal"  # for Krippendorff's alpha: nominal, ordinal, interval
    order: list[str] = field(default_factory=list)  # ordinal labels from lowest to highest; none: numbers by size
    resamples: int = 1000  # bootstrap of the agreement figures

    def __post_init__(self) -> None:
        JudgedOptions.__post_init__(self)
        check_choice(self.method, "aggregate.method", METHODS)
        check_choice(self.level, "aggregate.level", LEVELS)
        check(self.min_labels >= 1, "data.pipeline: aggregate.min_labels", self.min_labels, "at least 1")
        check(0 <= self.min_confidence <= 1, "data.pipeline: aggregate.min_confidence", self.min_confidence, "in [0, 1]")
        check(bool(self.confidence), "data.pipeline: aggregate.confidence", self.confidence, "a column's name")
        check(self.resamples >= 1, "data.pipeline: aggregate.resamples", self.resamples, "at least 1")


@dataclass(slots=True, kw_only=True)
class ReviewOptions(JudgedOptions):
    """A queue file of the items that annotators disagree on, for a person to decide; read back with `decisions`."""

    step: ClassVar[str] = "review"
    apply: ClassVar[str] = "rlhf.data.prepare.review:review"

    decisions: str | None = None  # a queue file (CSV or JSONL) with its decision column filled in; None: only write the queue
    queue: str = "review"  # name of the queue files below the run directory, without suffix
    agreed: float = 1.0  # items whose most frequent label has a smaller share of the labels than this are queued

    def __post_init__(self) -> None:
        JudgedOptions.__post_init__(self)
        check(0 < self.agreed <= 1, "data.pipeline: review.agreed", self.agreed, "in (0, 1]")
        plain = bool(self.queue) and not set(self.queue) & set("/\\") and self.queue not in (".", "..")
        check(plain, "data.pipeline: review.queue", self.queue, "a file name without a folder")


@dataclass(slots=True, kw_only=True)
class LabelNoiseOptions(StepOptions):
    """Labels that a model contradicts with confidence (confident learning), from scores of a model that has not seen the rows."""

    step: ClassVar[str] = "label_noise"
    apply: ClassVar[str] = "rlhf.data.prepare.label_noise:label_noise"
    kinds: ClassVar[frozenset[str]] = frozenset({"preference", "unpaired"})

    reward_model: str | None = None  # directory of a reward model that scores the pairs; {fold} in it stands for the row's fold
    fold: str | None = None  # column of a row's fold: its model was trained without the rows of that fold
    seen: bool = False  # the model may have been trained on these rows: scores then say less than they seem to
    score_chosen: str = "score_chosen"  # columns with scores of a pair's sides, where no reward model is given
    score_rejected: str = "score_rejected"
    probability: str | None = None  # column with the probability that the answer is good, for judged answers
    method: str = "prune_by_noise_rate"  # cleanlab's filter_by
    action: str = "reject"  # reject; flag: columns label_noise and label_quality; weight: the column weight times label_quality

    def __post_init__(self) -> None:
        check_choice(self.method, "label_noise.method", FILTERS)
        check_choice(self.action, "label_noise.action", ACTIONS)
        named = self.reward_model is not None and "{fold}" in self.reward_model
        check(named == (self.fold is not None), "data.pipeline: label_noise.fold", self.fold, "a column where reward_model holds {fold}, else null")
        both = self.reward_model is None or self.probability is None
        check(both, "data.pipeline: label_noise.probability", self.probability, "null beside a reward model")


STEPS: tuple[type[StepOptions], ...] = (TermsOptions, AggregateOptions, ReviewOptions, LabelNoiseOptions)
