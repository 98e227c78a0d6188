"""Steps repair, language and length: one row at a time."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any, Literal

from conf.preparation.cleaning import Language, Length, Repair, Unit
from rlhf.data.prepare import languages
from rlhf.data.prepare.items import Context, Item, replace_texts
from rlhf.data.prepare.texts import emptied, texts_of
from rlhf.data.prepare.words import changed_at, is_plain, letters, words
from rlhf.process import parallel
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
# Not the joiners, which emoji and Persian need, and not the space without width between letters of
# Thai, Lao, Burmese and Khmer, where it is how words are parted.
_PARTED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
_NO_WIDTH = re.compile(f"[\u2060\ufeff]|(?<!{_PARTED})\u200b|\u200b(?!{_PARTED})")
_MOST_PASSES = 8  # of a repair; two do but for texts that are made for it
_RUN = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")
_LINE_END = re.compile(r"[ \t]+(?=\n)")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_SEQUENCE = 7  # characters: no sequence of ftfy's heuristic is longer, and each has one of these
_FEW = 16  # characters of a text for each run of those, from which looking at each is worth it
_EMPTY_LINES = re.compile(r"\n{3,}")
# texts, not messages, that stand side by side: the space between them is part of one
_TOUCHING = ("prompt", "chosen", "rejected", "completion")


def strip_html(text: str) -> str:
    """`text` without comments, scripts and HTML's own tags (<T> and a < b stay). Breaks and blocks
    become line ends, entities their characters.
    """
    if "<" in text:
        text = _TAG.sub("", _BREAK.sub("\n", _COMMENT.sub("", text)))
    return html.unescape(text)


def tidy_spaces(text: str) -> str:
    """`text` with single spaces between words, no space at a line's end and at most one empty line;
    indentation stays.
    """
    if not text.isascii():
        text = _NO_WIDTH.sub("", _ODD_SPACE.sub(" ", text))
    if "  " in text or "\t" in text:
        text = _RUN.sub(" ", text)
    if " \n" in text or "\t\n" in text:
        text = _LINE_END.sub("", text)
    return _EMPTY_LINES.sub("\n\n", text) if "\n\n\n" in text else text


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


@cache
def _touched() -> re.Pattern[str]:
    """The characters that ftfy changes wherever they stand."""
    data = require("ftfy.chardata", "data")
    codes = {*data.LIGATURES, *data.CONTROL_CHARS, *map(ord, "\r\x85\u2028\u2029")}
    inside = "".join(f"\\U{code:08x}" for code in sorted(codes))
    return re.compile(f"[{inside}\x80-\x9f\ud800-\udfff]")


def _untouched(text: str, form: Form) -> bool:
    """Whether it is certain that ftfy leaves a text as it is: no such character, normalised, and no
    sequence of its heuristic for wrong encodings, which is slow, where it can be.
    """
    if _touched().search(text) or not unicodedata.is_normalized(form, text):
        return False
    if "\u00c3 " in text or "\u00c2 " in text:  # what its heuristic finds at a line's beginning
        return False
    is_bad = require("ftfy.badness", "data").is_bad
    runs = list(_BEYOND_ASCII.finditer(text))
    if _FEW * len(runs) > len(text):
        return not is_bad(text)
    for run in runs:
        first = max(0, run.start() - _SEQUENCE)
        last = run.end() + _SEQUENCE
        if is_bad(text[first:last]):
            return False
    return True


def repaired(text: str, options: Repair, *, touching: bool) -> str:
    """A text as step repair leaves it: a further repair would change nothing. With `touching` the
    ends stay as they are, since another text begins there.
    """
    for _ in range(_MOST_PASSES):
        before, text = text, _repaired_once(text, options, touching=touching)
        if text == before:
            break
    return text


def _repaired_once(text: str, options: Repair, *, touching: bool) -> str:
    """What ftfy makes of a text depends on the blanks around it, which go afterwards."""
    form: Form = "NFKC" if options.nfkc else "NFC"
    if is_plain(text, b"\t\n"):
        pass  # nothing that ftfy or normalisation changes, and both cost more than this look
    elif options.encoding and not _untouched(text, form):
        text = require("ftfy", "data").fix_text(text, _ftfy_config(form))
    elif options.nfkc and not options.encoding:
        text = unicodedata.normalize(form, text)
    core = text.strip()
    if not core:
        if touching:
            return text
        return ""
    # strip() takes white space only, so the first character of the core is its first occurrence
    start = text.index(core[0])
    lead, tail = text[:start], text[start + len(core) :]
    pieces = _FENCED.split(core) if "```" in core else [core]
    pieces[::2] = [_prose(piece, options) for piece in pieces[::2]]
    out = "".join(pieces)
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

    def change(where: str, text: str) -> str:
        return repaired(text, options, touching=where in _TOUCHING)

    for item in items:
        columns = replace_texts(item.columns, change)
        if columns == item.columns:
            yield item
            continue
        reason = emptied(item.columns, columns)
        if reason is not None:
            context.rejected(item, f"{reason} after the repair")
            continue
        context.tallies["changed"] += 1
        item.columns = columns
        yield item


def repair_figures(options: Repair, tallies: Counter[str]) -> dict[str, int]:
    return {"changed": tallies["changed"]}


# ---- language ----

_TOGETHER = 256  # rows whose texts are identified at once
_SHORT, _UNDECIDED, _IN = "short_texts_kept", "undecided_texts_kept", "in"


def language(options: Language, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Keep rows whose texts are in one of `keep`; short and undecided texts are kept, and counted.
    Raises UserError for a language that can't be told.
    """
    _check_languages(options.keep)
    wanted = {languages.group_of(code) if options.variants else code for code in options.keep}
    for batch in parallel.parts(items, _TOGETHER):
        texts = [texts_of(item.columns, options.part) for item in batch]
        telling = [
            text
            for row in texts
            for text in row.values()
            if letters(text) >= options.min_characters
        ]
        found = dict(
            zip(telling, languages.identify(telling, grouped=options.variants), strict=True)
        )
        for item, row in zip(batch, texts, strict=True):
            reason = None
            for where, text in row.items():
                if text not in found:
                    context.tallies[_SHORT] += 1
                    continue
                context.tallies[_IN, found[text].code] += 1
                reason = _other_language(found[text], wanted, options, context.tallies)
                if reason is not None:
                    reason = f"{where}: {reason}"
                    break
            if reason is None:
                yield item
            else:
                context.rejected(item, reason)


def language_figures(options: Language, tallies: Counter[Any]) -> dict[str, Any]:
    """Texts by language, and those that were kept untold."""
    counts = Counter({key[1]: n for key, n in tallies.items() if isinstance(key, tuple)})
    kept = (_SHORT, _UNDECIDED) if options.keep_undecided else (_SHORT,)
    return {"languages": dict(counts.most_common()), **{name: tallies[name] for name in kept}}


def _check_languages(keep: Sequence[str]) -> None:
    """Raises UserError for a code that can't be asked for."""
    known = languages.known()
    for code in keep:
        if code not in known:
            raise UserError(
                f"step language: keep={code}: no such language code; nearest: "
                f"{nearest(code, known)!r}. Known: {', '.join(known)}."
            )


def _other_language(
    found: languages.Identified, wanted: Set[str], options: Language, tallies: Counter[Any]
) -> str | None:
    """Why a text is not in one of the wanted languages; None where it is, or may be."""
    likeliest = f"probability {found.probability:.2f}"
    if found.probability < options.min_probability or found.code == languages.NOTHING:
        if options.keep_undecided:
            tallies[_UNDECIDED] += 1
            return None
        return f"language undecided ({found.code} is the likeliest, {likeliest})"
    if found.group in wanted:
        return None
    return f"language {found.code} ({likeliest}), expected {', '.join(options.keep)}"


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


@cache
def _loaded_tokenizer(path: str, changed: int) -> Callable[[str], int]:
    """`load_tokenizer`, once for all parts of the rows; `changed`: when its file did."""
    return load_tokenizer(path)


def _measure(options: Length) -> Callable[[str], int]:
    if options.unit is Unit.tokens:
        return _loaded_tokenizer(str(options.tokenizer), changed_at(str(options.tokenizer)))
    if options.unit is Unit.characters:
        return len
    return lambda text: len(words(text))


def length(options: Length, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Keep rows whose texts have `low` to `high` units."""
    measure = _measure(options)
    for item in items:
        reason = None
        for where, text in texts_of(item.columns, options.part).items():
            size = measure(text)
            context.tallies.update(units=size, texts=1)
            if options.low is not None and size < options.low:
                reason = f"{where}: {size} {options.unit.value}, expected at least {options.low}"
            elif options.high is not None and size > options.high:
                reason = f"{where}: {size} {options.unit.value}, expected at most {options.high}"
        if reason is None:
            yield item
        else:
            context.rejected(item, reason)


def length_figures(options: Length, tallies: Counter[str]) -> dict[str, float | None]:
    mean = round(tallies["units"] / tallies["texts"], 2) if tallies["texts"] else None
    return {f"mean_{options.unit.value}": mean}
