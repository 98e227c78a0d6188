"""Steps of data.pipeline: terms, labels of several annotators, label noise."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from conf.options import MISSING, check, check_options, option
from conf.preparation.base import StepOptions

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
    streaming: ClassVar[bool] = True

    dictionary: str = option(MISSING, "YAML file; an entry without other words protects its term.")
    columns: list[str] = option([], "Content columns that are changed; []: all of them.")

    def __post_init__(self) -> None:
        check_options(self)
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

    item: str | None = option(
        None,
        "Column that says which rows judge the same thing; null: rows with the same texts (of a "
        "pair, in either order).",
    )
    annotator: str = option("annotator", "Column that names who judged.", filled=True)
    label: str | None = option(
        None,
        "Column with the judgement; null: of a pair which side is chosen, of a judged answer the "
        "column label.",
    )
    repeats: Repeats = option(
        Repeats.error, "What becomes of an annotator's second, different judgement of an item."
    )


@dataclass(slots=True, kw_only=True)
class Aggregate(JudgedOptions):
    """Rows that judge one item become one row with the label that they give together."""

    step: ClassVar[str] = "aggregate"
    without_pictures: ClassVar[str] = (
        "judgements of one text about two pictures would count as of one"
    )

    method: Method = option(Method.majority, "How several labels become one.")
    tie_label: str | None = option(
        None, "Label of an item whose annotators tie; null: the item is left out."
    )
    min_labels: int = option(1, "Items with fewer labels are left out.", unit="labels", at_least=1)
    min_confidence: float = option(
        0.0,
        "Items with a smaller confidence (share of the votes, or Dawid-Skene's probability) are "
        "left out.",
        at_least=0,
        at_most=1,
    )
    confidence: str = option("confidence", "Column that gets the confidence.", filled=True)
    level: Scale = option(
        Scale.nominal, "What the difference of two labels means to Krippendorff's alpha."
    )
    order: list[str] = option(
        [], "Ordinal labels from lowest to highest; []: numbers, by their size."
    )
    resamples: int = option(
        1000, "Resamples for the intervals of the agreement figures.", unit="resamples", at_least=1
    )

    def __post_init__(self) -> None:
        check_options(self)
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
    without_pictures: ClassVar[str] = "its queue file shows texts alone"

    decisions: str | None = option(
        None,
        "A queue file (CSV or JSON lines) with its column decision filled in; null: only write the "
        "queue.",
    )
    queue: str = option("review", "Name of the queue files in the run directory, without a suffix.")
    agreed: float = option(
        1.0,
        "Items whose most frequent label has a smaller share of the labels are queued.",
        above=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check_options(self)
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
    without_pictures: ClassVar[str] = "its reward model reads texts alone"
    torch: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"preference", "unpaired"})

    reward_model: str | None = option(
        None,
        "Directory of a reward model that scores the pairs; {fold} in it stands for the row's "
        "fold.",
    )
    fold: str | None = option(
        None, "Column of a row's fold: its model was trained without the rows of that fold."
    )
    seen: bool = option(
        False,
        "Accept a model that may have been trained on these rows: its scores then say less than "
        "they seem to.",
    )
    score_chosen: str = option(
        "score_chosen", "Column with the chosen side's score, without a reward model."
    )
    score_rejected: str = option(
        "score_rejected", "Column with the rejected side's score, without a reward model."
    )
    probability: str | None = option(
        None, "Column with the probability that the answer is good, for judged answers."
    )
    method: NoiseFilter = option(NoiseFilter.prune_by_noise_rate, "How labels are picked.")
    action: Contradicted = option(
        Contradicted.reject, "What becomes of a row whose label the model contradicts."
    )

    def __post_init__(self) -> None:
        check_options(self)
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
        if self.reward_model is None or self.fold is not None:
            return {}
        return {"reward_model": self.reward_model}


STEPS: tuple[type[StepOptions], ...] = (Terms, Aggregate, Review, LabelNoise)
