"""Steps of data.pipeline: new rows from old ones, after the split.

Only what is asked is changed, never an answer: a prompt, the users' messages of a conversation, or
a whole text.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from conf.preparation.base import StepOptions
from conf.schema import check


class Operation(Enum):
    """What one new row has of its original's words (Wei and Zou 2019)."""

    synonym = "synonym"  # some are replaced by a synonym
    insert = "insert"  # synonyms of some are put in
    swap = "swap"  # some exchange their places
    delete = "delete"  # some are gone


class WordLanguage(Enum):
    auto = "auto"  # zh where a text has Chinese characters
    en = "en"  # words between spaces
    zh = "zh"  # jieba's words


@dataclass(slots=True, kw_only=True)
class Augment(StepOptions):
    """Easy data augmentation (Wei and Zou 2019): each new row is its original with one operation on
    a share of its words.
    """

    step: ClassVar[str] = "augment"
    apply: ClassVar[str] = "rlhf.data.prepare.augment:augment"
    streaming: ClassVar[bool] = True
    after_split: ClassVar[bool] = True

    copies: int = 4  # new rows for each row; the operations take turns
    operations: list[Operation] = field(default_factory=lambda: list(Operation))
    # of a text's words that an operation changes, one word at least; the paper's alpha
    share: float = 0.1
    # YAML file: list of groups of words that mean the same, or word -> list of words; for synonym
    # and insert
    synonyms: str | None = None
    language: WordLanguage = WordLanguage.auto
    # words that stay as they are, as words with digits always do
    keep: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.copies >= 1, "copies", self.copies, "at least 1")
        check(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        once = len(self.operations) > 0 and len(set(self.operations)) == len(self.operations)
        check(once, "operations", [o.value for o in self.operations], "at least one, each once")
        words = self.synonyms is not None or not {Operation.synonym, Operation.insert} & set(
            self.operations
        )
        check(
            words,
            "synonyms",
            self.synonyms,
            "a YAML file, or operations without synonym and insert",
        )

    def files(self) -> dict[str, str]:
        return {} if self.synonyms is None else {"synonyms": self.synonyms}


@dataclass(slots=True, kw_only=True)
class BackTranslate(StepOptions):
    """A new row for each row, its text translated into another language and back."""

    step: ClassVar[str] = "back_translate"
    apply: ClassVar[str] = "rlhf.data.prepare.translate:back_translate"
    after_split: ClassVar[bool] = True

    source: str = "en"  # language of the rows
    pivot: str = "de"  # language in between
    # model directory (Marian or another sequence-to-sequence model) from source to pivot
    there: str | None = None
    back: str | None = None  # model directory from pivot to source
    # model: the two directories; argos: argostranslate's installed packages; or pkg.module:function
    translator: str = "model"
    batch_size: int = 16  # texts translated together
    max_new_tokens: int = 512  # of a translation
    beams: int = 1

    def __post_init__(self) -> None:
        models = self.there is not None and self.back is not None
        if self.translator == "model":
            check(
                models,
                "translator",
                self.translator,
                "the model directories `there` and `back`, or another translator",
            )
        else:
            check(
                self.translator == "argos" or ":" in self.translator,
                "translator",
                self.translator,
                "model, argos or pkg.module:function",
            )
            check(
                self.there is None and self.back is None,
                "translator",
                self.translator,
                "model where model directories are given",
            )
        check(
            self.source != self.pivot,
            "pivot",
            self.pivot,
            f"another language than source={self.source}",
        )
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        check(self.beams >= 1, "beams", self.beams, "at least 1")

    def files(self) -> dict[str, str]:
        return {
            key: path
            for key, path in (("there", self.there), ("back", self.back))
            if path is not None
        }


STEPS: tuple[type[StepOptions], ...] = (Augment, BackTranslate)
