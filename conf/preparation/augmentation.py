"""Steps of data.pipeline: new rows from old ones, after the split.

Only what is asked is changed, never an answer: a prompt, the users' messages of a conversation, or
a whole text.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from conf.options import check, check_options, names, option
from conf.preparation.base import StepOptions


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
    without_pictures: ClassVar[str] = "its operations know words alone"
    streaming: ClassVar[bool] = True
    after_split: ClassVar[bool] = True

    copies: int = option(
        4, "New rows for each row; the operations take turns.", unit="rows", at_least=1
    )
    operations: list[Operation] = option(list(Operation), "The operations, each once.")
    share: float = option(
        0.1,
        "Share of a text's words that an operation changes, at least one word; the paper's alpha.",
        above=0,
        at_most=1,
    )
    synonyms: str | None = option(
        None,
        "YAML file for synonym and insert: a list of groups of words that mean the same, or "
        "word -> list of words.",
    )
    language: WordLanguage = option(WordLanguage.auto, "How words are separated.")
    keep: list[str] = option([], "Words that stay as they are, as words with digits always do.")

    def __post_init__(self) -> None:
        check_options(self)
        once = len(self.operations) > 0 and len(set(self.operations)) == len(self.operations)
        check(once, "operations", names(self.operations), "at least one, each once")
        needed = {Operation.synonym, Operation.insert} & set(self.operations)
        check(
            self.synonyms is not None or not needed,
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
    without_pictures: ClassVar[str] = "a translator sees texts alone"
    torch: ClassVar[bool] = True
    after_split: ClassVar[bool] = True

    source: str = option("en", "Language of the rows.")
    pivot: str = option("de", "Language in between.")
    there: str | None = option(
        None,
        "Directory of a model from source to pivot: Marian or another sequence-to-sequence model.",
    )
    back: str | None = option(None, "Directory of a model from pivot to source.")
    translator: str = option(
        "model",
        "model: the two directories; argos: the installed packages of argostranslate; or "
        "pkg.module:function.",
    )
    batch_size: int = option(16, "Texts translated together.", unit="texts", at_least=1)
    max_new_tokens: int = option(512, "Longest translation.", unit="tokens", at_least=1)
    beams: int = option(1, "Beams of the search; 1: greedy.", at_least=1)

    def __post_init__(self) -> None:
        check_options(self)
        self._check_translator()
        check(
            self.source != self.pivot,
            "pivot",
            self.pivot,
            f"another language than source={self.source}",
        )

    def _check_translator(self) -> None:
        if self.translator == "model":
            check(
                self.there is not None and self.back is not None,
                "translator",
                self.translator,
                "the model directories `there` and `back`, or another translator",
            )
            return
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

    def files(self) -> dict[str, str]:
        directories = {"there": self.there, "back": self.back}
        return {name: path for name, path in directories.items() if path is not None}


STEPS: tuple[type[StepOptions], ...] = (Augment, BackTranslate)
