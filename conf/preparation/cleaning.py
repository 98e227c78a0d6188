"""Steps of data.pipeline: text repair, language, lengths, quality, personal data."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from conf.options import MISSING, check, check_options, option
from conf.preparation.base import Part, StepOptions


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

    # the match is replaced: [EMAIL], [PHONE], [IP], [CREDIT_CARD], [IBAN], [WORD]
    redact = "redact"
    reject = "reject"  # the row is left out


@dataclass(slots=True, kw_only=True)
class Repair(StepOptions):
    """Repairs texts: mojibake and control characters (ftfy), Unicode form, white space, HTML. Code
    between ``` fences keeps its spaces and tags.
    """

    step: ClassVar[str] = "repair"
    streaming: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    encoding: bool = option(
        True,
        "Repair with ftfy: text that was decoded wrongly, control characters, lone surrogates, "
        "line ends; quotes and full-width signs stay.",
    )
    nfkc: bool = option(
        False,
        "NFKC instead of NFC: also changes meaning (10³ becomes 103) and full-width punctuation.",
    )
    whitespace: bool = option(
        True,
        "One space between words, no space at a line's end, at most one empty line; where prompt "
        "and answer meet, nothing changes.",
    )
    html: bool = option(
        False,
        "Remove tags, turn <br> and blocks into line ends and entities into characters; for text "
        "of web pages.",
    )


@dataclass(slots=True, kw_only=True)
class Language(StepOptions):
    """Keeps rows in some languages, as py3langid tells them. Languages that it can't keep apart
    count as one (rlhf/data/prepare/languages.py).
    """

    step: ClassVar[str] = "language"
    streaming: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    version: ClassVar[int] = 2

    keep: list[str] = option(["en"], "ISO 639 codes of the languages.", filled=True)
    variants: bool = option(
        True,
        "Languages that can't be kept apart count as one (zh, yue and wuu; sr, hr and bs; no, nb "
        "and nn; ms and id ...); false: exactly the codes in `keep`.",
    )
    min_probability: float = option(
        0.5,
        "Probability of the likeliest language below which a text is undecided.",
        at_least=0,
        at_most=1,
    )
    keep_undecided: bool = option(
        True, "Undecided texts are kept, and counted; false: they are left out."
    )
    min_characters: int = option(
        20,
        "Texts of fewer letters are kept, and counted. A Chinese character counts as three.",
        unit="letters",
        at_least=0,
    )
    part: Part = option(Part.whole, "Which texts of a row are looked at.")


@dataclass(slots=True, kw_only=True)
class Length(StepOptions):
    """Keeps rows whose texts are neither too short nor too long."""

    step: ClassVar[str] = "length"
    streaming: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    low: int | None = option(None, "Shortest length, in units; null: no limit.", at_least=0)
    high: int | None = option(None, "Longest length, in units; null: no limit.")
    unit: Unit = option(Unit.characters, "What lengths are counted in.")
    tokenizer: str | None = option(None, "Directory of a tokenizer; needed with unit=tokens.")
    part: Part = option(
        Part.whole, "Which texts of a row are counted; of answers each side by itself."
    )

    def __post_init__(self) -> None:
        check_options(self)
        check(
            self.low is not None or self.high is not None,
            "low",
            self.low,
            "a number here or in `high`: without both nothing is filtered",
        )
        low = self.low or 0
        check(self.high is None or self.high >= low, "high", self.high, f"at least low={low}")
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
    """Symbol and repetition ratios of Gopher's MassiveText (Rae et al. 2021, arXiv:2112.11446,
    A.1.1 and table A1), with limits for answers in any language.

    Gopher's are for web pages in English: at least 0.8 of the words with a letter, at most 0.9
    bullet lines, words of 3 to 10 letters, 0.3 of the lines and 0.2 of the characters in repeated
    lines, half of these shares of the commonest n-grams, a third of these of repeated n-grams.
    Answers are shorter, and hold lists, formulas and code. A word is what
    rlhf/data/prepare/words.py counts, in Chinese several characters.

    Looks at what is to be imitated: of a pair the chosen side, of judged answers the good ones, of
    a conversation each of the assistant's turns. null turns a rule off. Ratios over few words say
    little: repetition rules start at `min_words`, and limits of n-grams are 1 + 40 / words times
    as large.
    """

    step: ClassVar[str] = "quality"
    streaming: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    version: ClassVar[int] = 2

    part: Part = option(Part.answer, "Which texts of a row are looked at.")
    min_words: int = option(
        30,
        "With fewer words the repetition and word-length rules don't apply.",
        unit="words",
        at_least=1,
    )
    max_symbol_words: float | None = option(
        0.1,
        "Largest number of ellipses, and hash signs that don't begin a line, per word.",
        at_least=0,
    )
    min_alphabetic_words: float | None = option(
        0.25,
        "Smallest share of words with a letter; worked sums have 0.35 and more.",
        at_least=0,
        at_most=1,
    )
    max_bullet_lines: float | None = option(
        None,
        "Largest share of lines that begin with a bullet point; null: a list is an answer.",
        at_least=0,
        at_most=1,
    )
    max_ellipsis_lines: float | None = option(
        0.3, "Largest share of lines that end with an ellipsis.", at_least=0, at_most=1
    )
    max_symbol_characters: float | None = option(
        0.7,
        "Largest share of characters that are no letter, digit or space (ours, not Gopher's).",
        at_least=0,
        at_most=1,
    )
    low_word_length: float | None = option(
        2.0,
        "Smallest mean length of the words with a letter, in scripts with spaces.",
        unit="letters",
        at_least=0,
    )
    high_word_length: float | None = option(
        15.0,
        "Largest mean length of the words with a letter, in scripts with spaces; combining marks "
        "don't count.",
        unit="letters",
        at_least=0,
    )
    max_duplicate_lines: float | None = option(
        0.45, "Largest share of lines with words that occurred before.", at_least=0, at_most=1
    )
    max_duplicate_paragraphs: float | None = option(
        0.45, "Largest share of paragraphs that occurred before.", at_least=0, at_most=1
    )
    max_duplicate_line_characters: float | None = option(
        0.4, "Largest share of characters in lines that occurred before.", at_least=0, at_most=1
    )
    max_duplicate_paragraph_characters: float | None = option(
        0.4, "Largest share of characters in repeated paragraphs.", at_least=0, at_most=1
    )
    max_top_ngrams: list[float] = option(
        [0.40, 0.36, 0.32],
        "Largest shares of characters in the commonest 2-, 3- and 4-gram of words; []: no rule.",
    )
    max_duplicate_ngrams: list[float] = option(
        [0.45, 0.42, 0.39, 0.36, 0.33, 0.30],
        "Largest shares of characters in 5- to 10-grams of words that occur twice; []: no rule.",
    )

    def __post_init__(self) -> None:
        check_options(self)
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

    part: Part = option(
        Part.answer, "Which texts of a row: of a pair the chosen side, of judged answers the good."
    )
    low_share: float = option(
        0.01, "Share of the rows with the lowest scores that is left out.", at_least=0, below=1
    )
    high_share: float = option(
        0.01, "Share of the rows with the highest scores that is left out.", at_least=0, below=1
    )
    low: float | None = option(
        None, "A row with a smaller score is left out, whatever its rank; null: no limit."
    )
    high: float | None = option(
        None, "A row with a larger score is left out, whatever its rank; null: no limit."
    )
    column: str | None = option(None, "Column that the score is written into; null: none.")

    def __post_init__(self) -> None:
        check_options(self)
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
    without_pictures: ClassVar[str] = "its language model reads texts alone"
    torch: ClassVar[bool] = True

    model: str = option(
        MISSING,
        "Directory of a causal language model, such as runs/<run.name>/sft/model.",
    )
    part: Part = option(
        Part.answer, "Which texts of a row: of a pair the chosen side, of judged answers the good."
    )
    low: float | None = option(
        None,
        "Smallest perplexity that is kept (a certain text has 1); null: no limit.",
        at_least=1,
    )
    high: float | None = option(None, "Largest perplexity that is kept; null: no limit.")
    high_share: float = option(
        0.0,
        "Share of the rows with the highest perplexity that is left out.",
        at_least=0,
        below=1,
    )
    max_tokens: int = option(
        512,
        "Tokens of a text that are read (the first one is not predicted); the rest is ignored.",
        unit="tokens",
        at_least=2,
    )
    batch_tokens: int = option(
        4096, "Tokens of one forward pass, padding included; at least max_tokens.", unit="tokens"
    )
    column: str | None = option(None, "Column that the perplexity is written into; null: none.")

    def __post_init__(self) -> None:
        check_options(self)
        low = self.low or 1
        check(self.high is None or self.high >= low, "high", self.high, f"at least {low}")
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
    streaming: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    find: list[Personal] = option(list(Personal), "Kinds of personal data that are looked for.")
    found: Found = option(Found.redact, "What happens to a row that holds personal data.")
    words: str | None = option(
        None,
        "Text file with a word or phrase a line (profanity, names): whole words, in any case; # "
        "starts a comment.",
    )
    words_found: Found = option(Found.reject, "What happens to a row that holds such a word.")

    def __post_init__(self) -> None:
        check_options(self)
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
