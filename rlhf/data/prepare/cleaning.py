"""Steps repair, language and length: one row at a time."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from conf.preparation.cleaning import Language, Length, Repair, Unit
from rlhf.data.prepare.items import Context, Item, replace_texts
from rlhf.data.prepare.texts import emptied, texts_of, words
from rlhf.process.libraries import require
from rlhf.process.wording import nearest
from rlhf.types import UserError

Form = Literal["NFC", "NFKC"]

# ---- repair ----

_FENCED = re.compile(r"(```.*?(?:```|\Z))", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK = (
    "address|article|aside|blockquote|center|dd|div|dl|dt|figure|footer|form|h[1-6]|header|"
    "hr|li|main|nav|ol|p|pre|section|table|tbody|td|th|tr|ul"
)
_INLINE = (
    "a|abbr|acronym|b|big|body|button|cite|code|col|colgroup|del|em|font|head|html|i|iframe|img|"
    "input|ins|kbd|label|link|mark|meta|option|q|s|samp|"
    "select|small|span|strike|strong|sub|sup|tfoot|thead|time|title|tt|u|var|wbr"
)
_BREAK = re.compile(rf"\s*</?(?:br|{_BLOCK})(?:\s[^<>]*)?/?>\s*", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]*)?/?>", re.IGNORECASE)
# no-break, en, em ...; not the ideographic one, which indents
_ODD_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_NO_WIDTH = re.compile("[\u200b\u2060\ufeff]")  # not the joiners, which emoji and Persian need
_RUN = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")
_LINE_END = re.compile(r"[ \t]+(?=\n)")
_EMPTY_LINES = re.compile(r"\n{3,}")
# texts, not messages, that stand side by side: the space between them is part of one
_TOUCHING = ("prompt", "chosen", "rejected", "completion")


def strip_html(text: str) -> str:
    """`text` without comments, scripts and HTML's own tags (<T> and a < b stay). Breaks and blocks
    become line ends, entities their characters.
    """
    text = _COMMENT.sub("", text)
    return html.unescape(_TAG.sub("", _BREAK.sub("\n", text)))


def tidy_spaces(text: str) -> str:
    """`text` with single spaces between words, no space at a line's end and at most one empty line;
    indentation stays.
    """
    text = _NO_WIDTH.sub("", _ODD_SPACE.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", _LINE_END.sub("", _RUN.sub(" ", text)))


@cache
def _ftfy_config(form: Form) -> Any:
    ftfy = require("ftfy", "data")
    # Quotes and full-width signs are how people write, in Chinese above all: not defects. HTML has
    # an option of its own.
    return ftfy.TextFixerConfig(
        unescape_html=False,
        uncurl_quotes=False,
        fix_character_width=False,
        normalization=form,
        explain=False,
    )


def repaired(text: str, options: Repair, *, touching: bool) -> str:
    """A text as step repair leaves it. With `touching` the ends stay as they are, since another
    text begins there.
    """
    form: Form = "NFKC" if options.nfkc else "NFC"
    if options.encoding:
        text = require("ftfy", "data").fix_text(text, _ftfy_config(form))
    elif options.nfkc:
        text = unicodedata.normalize(form, text)
    core = text.strip()
    if not core:
        if touching:
            return text
        return ""
    # strip() takes white space only, so the first character of the core is its first occurrence
    start = text.index(core[0])
    lead, tail = text[:start], text[start + len(core) :]
    prose = [
        _prose(piece, options) if i % 2 == 0 else piece
        for i, piece in enumerate(_FENCED.split(core))
    ]
    out = "".join(prose)
    if not options.whitespace or touching:
        return lead + out + tail
    return out.strip()


def _prose(text: str, options: Repair) -> str:
    if options.html:
        text = strip_html(text)
    if options.whitespace:
        return tidy_spaces(text)
    return text


def repair(options: Repair, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Repair every text; a row that is empty afterwards is rejected."""
    changed = 0

    def change(where: str, text: str) -> str:
        return repaired(text, options, touching=where in _TOUCHING)

    for item in items:
        columns = replace_texts(item.columns, change)
        reason = emptied(item.columns, columns)
        if reason is not None:
            context.rejected(item, f"{reason} after the repair")
            continue
        changed += columns != item.columns
        item.columns = columns
        yield item
    context.figures["changed"] = changed


# ---- language ----


@cache
def language_identifier() -> Any:
    """py3langid's model, whose `classify` gives (ISO 639-1 code, probability)."""
    langid = require("py3langid.langid", "data")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language(options: Language, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Keep rows whose texts are in one of `keep`; short texts are kept. Raises UserError for a
    language that py3langid doesn't know.
    """
    identifier = language_identifier()
    for code in options.keep:
        if code not in identifier.labels:
            known = sorted(identifier.labels)
            raise UserError(
                f"step language: keep={code}: no such language code; nearest: "
                f"{nearest(code, known)!r}. Known: {', '.join(known)}."
            )
    languages: Counter[str] = Counter()
    short = 0
    wanted = ", ".join(options.keep)
    for item in items:
        reason = None
        for where, text in texts_of(item.columns, options.part).items():
            if len(text.strip()) < options.min_characters:
                short += 1
                continue
            code, probability = identifier.classify(text)
            languages[code] += 1
            if probability < options.min_probability:
                reason = (
                    f"{where}: language undecided ({code} is the likeliest, probability "
                    f"{probability:.2f})"
                )
            elif code not in options.keep:
                reason = (
                    f"{where}: language {code} (probability {probability:.2f}), expected {wanted}"
                )
        if reason is None:
            yield item
        else:
            context.rejected(item, reason)
    context.figures.update(languages=dict(languages.most_common()), short_texts_kept=short)


# ---- length ----


def load_tokenizer(path: str) -> Callable[[str], int]:
    """A function that counts a text's tokens, without special tokens. Raises UserError for a
    directory without a tokenizer.
    """
    folder = Path(path).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"step length: tokenizer={path}: expected a directory with tokenizer.json, found "
            "none there."
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # what the file may have stored
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _measure(options: Length) -> Callable[[str], int]:
    if options.unit is Unit.tokens:
        return load_tokenizer(str(options.tokenizer))
    if options.unit is Unit.characters:
        return len
    return lambda text: len(words(text))


def length(options: Length, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Keep rows whose texts have `low` to `high` units."""
    measure = _measure(options)
    total = texts = 0
    for item in items:
        reason = None
        for where, text in texts_of(item.columns, options.part).items():
            size = measure(text)
            total, texts = total + size, texts + 1
            if options.low is not None and size < options.low:
                reason = f"{where}: {size} {options.unit.value}, expected at least {options.low}"
            elif options.high is not None and size > options.high:
                reason = f"{where}: {size} {options.unit.value}, expected at most {options.high}"
        if reason is None:
            yield item
        else:
            context.rejected(item, reason)
    context.figures[f"mean_{options.unit.value}"] = round(total / texts, 2) if texts else None
