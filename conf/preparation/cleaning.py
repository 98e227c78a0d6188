"""Steps of data.pipeline: text repair, language, lengths, quality, personal data."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from conf.preparation.base import Part, StepOptions
from conf.schema import MISSING, check


class Unit(Enum):
    characters = "characters"
    words = "words"  # a character of a script without spaces counts as one
    tokens = "tokens"  # of `tokenizer`, without special tokens


class Personal(Enum):
    """What step `patterns` looks for; how each is recognised is in
    rlhf/data/prepare/personal.py.
    """

    email = "email"
    phone = "phone"
    ip = "ip"
    credit_card = "credit_card"
    iban = "iban"


class Found(Enum):
    """What happens to a row with a pattern in it."""

    # the place is replaced: [EMAIL], [PHONE], [IP], [CREDIT_CARD], [IBAN], [WORD]
    redact = "redact"
    reject = "reject"  # the row is left out


@dataclass(slots=True, kw_only=True)
class Repair(StepOptions):
    """Mends texts: mojibake and control characters (ftfy), Unicode form, white space, HTML. Code
    between ``` fences keeps its spaces and tags.
    """

    step: ClassVar[str] = "repair"
    apply: ClassVar[str] = "rlhf.data.prepare.cleaning:repair"
    streaming: ClassVar[bool] = True

    # ftfy: text decoded wrongly, control characters, lone surrogates, line ends; quotes and
    # full-width signs stay
    encoding: bool = True
    # NFKC instead of NFC: also changes meaning (10³ becomes 103) and full-width punctuation
    nfkc: bool = False
    # one space between words, no space at a line's end, at most one empty line; where prompt and
    # answer meet, nothing
    whitespace: bool = True
    # tags go, <br> and blocks become line ends, entities characters; for text out of web pages
    html: bool = False


@dataclass(slots=True, kw_only=True)
class Language(StepOptions):
    """Keeps rows in some languages, as py3langid tells them."""

    step: ClassVar[str] = "language"
    apply: ClassVar[str] = "rlhf.data.prepare.cleaning:language"
    streaming: ClassVar[bool] = True

    keep: list[str] = field(default_factory=lambda: ["en"])  # ISO 639-1 codes
    # of the likeliest language; below it the row is left out as undecided
    min_probability: float = 0.5
    min_characters: int = 20  # shorter texts tell too little: they are kept, and counted
    part: Part = Part.whole

    def __post_init__(self) -> None:
        check(len(self.keep) > 0, "keep", self.keep, "at least one language, such as [en]")
        check(0 <= self.min_probability <= 1, "min_probability", self.min_probability, "in [0, 1]")
        check(self.min_characters >= 0, "min_characters", self.min_characters, "at least 0")


@dataclass(slots=True, kw_only=True)
class Length(StepOptions):
    """Keeps rows whose texts are neither too short nor too long."""

    step: ClassVar[str] = "length"
    apply: ClassVar[str] = "rlhf.data.prepare.cleaning:length"
    streaming: ClassVar[bool] = True

    low: int | None = None  # at least so many units
    high: int | None = None  # at most
    unit: Unit = Unit.characters
    tokenizer: str | None = None  # directory, with unit=tokens
    part: Part = Part.whole  # answer: each side by itself

    def __post_init__(self) -> None:
        check(
            self.low is not None or self.high is not None,
            "low",
            self.low,
            "a number here or in `high`: without both nothing is filtered",
        )
        check(self.low is None or self.low >= 0, "low", self.low, "at least 0")
        check(
            self.high is None or self.high >= (self.low or 0),
            "high",
            self.high,
            f"at least low={self.low or 0}",
        )
        check(
            (self.unit is Unit.tokens) == (self.tokenizer is not None),
            "tokenizer",
            self.tokenizer,
            "a directory with unit=tokens, else null",
        )

    def files(self) -> dict[str, str]:
        return {} if self.tokenizer is None else {"tokenizer": self.tokenizer}


@dataclass(slots=True, kw_only=True)
class Quality(StepOptions):
    """Symbol and repetition ratios with the thresholds of Gopher's MassiveText (Rae et al. 2021,
    arXiv:2112.11446, A.1.1 and table A1).

    Looks at what is to be imitated: of a pair the chosen side, of judged answers the good ones.
    null turns a rule off. Ratios over few words say little, so the repetition rules start at
    `min_words`.
    """

    step: ClassVar[str] = "quality"
    apply: ClassVar[str] = "rlhf.data.prepare.quality:quality"
    streaming: ClassVar[bool] = True

    part: Part = Part.answer
    min_words: int = 30  # fewer: the repetition and word-length rules don't apply
    max_symbol_words: float | None = 0.1  # hash signs and ellipses per word
    min_alphabetic_words: float | None = 0.8  # share of words with a letter
    max_bullet_lines: float | None = 0.9  # share of lines that begin with a bullet point
    max_ellipsis_lines: float | None = 0.3  # share of lines that end with an ellipsis
    # share of characters that are no letter, digit or space (ours, not Gopher's)
    max_symbol_characters: float | None = 0.7
    low_word_length: float | None = 3.0  # mean characters a word, in scripts with spaces
    high_word_length: float | None = 10.0
    max_duplicate_lines: float | None = 0.3  # share of lines that stood before
    max_duplicate_paragraphs: float | None = 0.3
    # share of characters in lines that stood before
    max_duplicate_line_characters: float | None = 0.2
    max_duplicate_paragraph_characters: float | None = 0.2
    # share of characters in the commonest 2-, 3-, 4-gram of words
    max_top_ngrams: list[float] = field(default_factory=lambda: [0.20, 0.18, 0.16])
    # in 5- to 10-grams that occur twice
    max_duplicate_ngrams: list[float] = field(
        default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    )

    def __post_init__(self) -> None:
        check(self.min_words >= 1, "min_words", self.min_words, "at least 1")
        for name in ("max_symbol_words", "low_word_length", "high_word_length"):
            check(
                getattr(self, name) is None or getattr(self, name) >= 0,
                name,
                getattr(self, name),
                "at least 0, or null",
            )
        for name in (
            "min_alphabetic_words",
            "max_bullet_lines",
            "max_ellipsis_lines",
            "max_symbol_characters",
            "max_duplicate_lines",
            "max_duplicate_paragraphs",
            "max_duplicate_line_characters",
            "max_duplicate_paragraph_characters",
        ):
            check(
                getattr(self, name) is None or 0 <= getattr(self, name) <= 1,
                name,
                getattr(self, name),
                "in [0, 1], or null",
            )
        check(
            len(self.max_top_ngrams) in (0, 3),
            "max_top_ngrams",
            self.max_top_ngrams,
            "three shares (2-, 3-, 4-grams), or [] for none",
        )
        check(
            len(self.max_duplicate_ngrams) in (0, 6),
            "max_duplicate_ngrams",
            self.max_duplicate_ngrams,
            "six shares (5- to 10-grams), or []",
        )


@dataclass(slots=True, kw_only=True)
class Tfidf(StepOptions):
    """Leaves out texts whose mean TF-IDF weight is among the lowest or the highest: stock phrases,
    or words that nobody else uses.

    score(d) = sum over words t of tf(t, d) idf(t), with tf the word's share of the text and idf(t)
    = ln((1 + N) / (1 + df(t))) + 1, the smoothed form that scikit-learn uses of Salton and Buckley
    1988 (Information Processing & Management 24(5)). N texts, df(t) of them with t.
    """

    step: ClassVar[str] = "tfidf"
    apply: ClassVar[str] = "rlhf.data.prepare.quality:tfidf"

    part: Part = Part.answer  # of a pair the chosen side, of judged answers the good ones
    low_share: float = 0.01  # share of the rows with the lowest scores that goes
    high_share: float = 0.01  # share with the highest scores
    low: float | None = None  # a score below it goes, whatever its rank
    high: float | None = None
    column: str | None = None  # column that the score is written into

    def __post_init__(self) -> None:
        for name in ("low_share", "high_share"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        check(
            self.low_share + self.high_share < 1,
            "high_share",
            self.high_share,
            "less than 1 together with low_share",
        )
        check(
            self.low is None or self.high is None or self.low <= self.high,
            "high",
            self.high,
            f"at least low={self.low}",
        )


@dataclass(slots=True, kw_only=True)
class Perplexity(StepOptions):
    """Leaves out texts that a causal language model finds too likely or too unlikely, as CCNet does
    (Wenzek et al. 2019, arXiv:1911.00359).

    exp of the mean negative log-likelihood per token, each text by itself after the tokenizer's own
    special tokens.
    """

    step: ClassVar[str] = "perplexity"
    apply: ClassVar[str] = "rlhf.data.prepare.perplexity:perplexity"

    model: str = MISSING  # directory of a causal language model, such as runs/<run.name>/sft/model
    part: Part = Part.answer  # of a pair the chosen side, of judged answers the good ones
    low: float | None = None
    high: float | None = None
    high_share: float = 0.0  # share of the rows with the highest perplexity that goes
    max_tokens: int = 512  # of a text; what follows is not looked at
    batch_tokens: int = 4096  # padded tokens a forward pass
    column: str | None = None  # column that the perplexity is written into

    def __post_init__(self) -> None:
        check(
            self.low is None or self.low >= 1,
            "low",
            self.low,
            "at least 1, the perplexity of a certain text",
        )
        check(
            self.high is None or self.high >= (self.low or 1),
            "high",
            self.high,
            f"at least {self.low or 1}",
        )
        check(0 <= self.high_share < 1, "high_share", self.high_share, "in [0, 1)")
        acts = (
            self.low is not None
            or self.high is not None
            or self.high_share > 0
            or self.column is not None
        )
        check(
            acts,
            "high",
            self.high,
            "a number here, in `low` or `high_share`, or a `column`: without any nothing is done",
        )
        check(
            self.max_tokens >= 2,
            "max_tokens",
            self.max_tokens,
            "at least 2: the first token is not predicted",
        )
        check(
            self.batch_tokens >= self.max_tokens,
            "batch_tokens",
            self.batch_tokens,
            f"at least max_tokens={self.max_tokens}",
        )

    def files(self) -> dict[str, str]:
        return {"model": self.model}


@dataclass(slots=True, kw_only=True)
class Patterns(StepOptions):
    """Personal data and words of a list: replaced by what they are, or reason enough to leave the
    row out.
    """

    step: ClassVar[str] = "patterns"
    apply: ClassVar[str] = "rlhf.data.prepare.personal:patterns"
    streaming: ClassVar[bool] = True

    find: list[Personal] = field(default_factory=lambda: list(Personal))
    found: Found = Found.redact
    # text file, a word or phrase a line (profanity, names); case doesn't matter, whole words only;
    # # starts a comment
    words: str | None = None
    words_found: Found = Found.reject

    def __post_init__(self) -> None:
        check(
            len(self.find) > 0 or self.words is not None,
            "find",
            self.find,
            "at least one pattern, or a file of `words`",
        )

    def files(self) -> dict[str, str]:
        return {} if self.words is None else {"words": self.words}


STEPS: tuple[type[StepOptions], ...] = (
    Repair,
    Language,
    Length,
    Quality,
    Tfidf,
    Perplexity,
    Patterns,
)
