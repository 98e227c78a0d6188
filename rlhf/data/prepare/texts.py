"""Which texts of a row a step looks at, and what counts as the same text."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from conf.preparation.base import Part
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item, answers_of, joined, prompt_of, shown_in


def normalised(text: str) -> str:
    """A text in the form in which equal texts are the same: NFKC, case folded, white space as
    single spaces, none at the ends.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def texts_of(columns: dict[str, Any], part: Part) -> dict[str, str]:
    """The texts of a row that `part` means, by name. In a row without an answer part=answer is the
    prompt.
    """
    if part is Part.whole:
        return {"row": joined(columns)}
    answers = answers_of(columns) if part is Part.answer else {}
    return answers or {"prompt": prompt_of(columns)}


def text_of(columns: dict[str, Any], part: Part) -> str:
    """The texts of `texts_of` as one text: both sides of a pair, a line each."""
    return "\n".join(texts_of(columns, part).values())


def imitated(columns: dict[str, Any], part: Part, kind: Use) -> dict[str, str]:
    """`texts_of` without the answers that teach by being bad: a pair's rejected side, an answer
    judged bad (then nothing is left).
    """
    if part is Part.prompt:
        return texts_of(columns, part)
    if kind is Use.preference:
        return texts_of({k: v for k, v in columns.items() if k != "rejected"}, part)
    if kind is Use.unpaired and not columns["label"]:
        return {}
    return texts_of(columns, part)


def imitated_parts(columns: dict[str, Any], part: Part, kind: Use) -> Iterator[tuple[str, str]]:
    """(where, text) of what `imitated` gives, each turn of a conversation by itself: an assistant
    that comes back to what it said repeats nothing. Turns that are context only are left out, and
    calls, which are JSON.
    """
    for key, text in imitated(columns, part, kind).items():
        value = columns.get(key)
        if part is not Part.answer or not isinstance(value, list):
            yield key, text
            continue
        for i, message in enumerate(value):
            spoken = message["role"] == "assistant" or key != "messages"
            if not spoken or message.get("train") is False:
                continue
            for part_of, where in (("content", ""), ("reasoning_content", ".reasoning_content")):
                if message.get(part_of):
                    yield f"{key}[{i}]{where}", message[part_of]


def sides(columns: dict[str, Any], part: Part, kind: Use) -> tuple[str, str]:
    """What makes two rows the same: (the text, the text that is judged bad, "" without any). A pair
    with its sides exchanged, or an answer judged the other way, has the same words and the opposite
    meaning: it is no duplicate.
    """
    if part is Part.prompt or kind not in (Use.preference, Use.unpaired):
        return text_of(columns, part), ""
    bad = "rejected" if kind is Use.preference else "completion"
    if kind is Use.unpaired and columns["label"]:
        return text_of(columns, part), ""
    others = {k: v for k, v in columns.items() if k != bad}
    good = text_of(others, part) if part is Part.whole or answers_of(others) else ""
    return good, answers_of(columns)[bad]


def asked_about(columns: dict[str, Any], part: Part) -> tuple[str, ...]:
    """The pictures that make rows of the same text different ones: none where answers alone are
    compared.
    """
    if part is Part.answer:
        return ()
    return shown_in(columns)


def noting(items: Iterable[Item], part: Part, shown: list[tuple[str, ...]]) -> Iterator[Item]:
    """The items, each of whose pictures (`asked_about`) are added to `shown` as it passes."""
    for item in items:
        shown.append(asked_about(item.columns, part))
        yield item


def ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every sequence of `n` neighbouring tokens."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def emptied(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why changed columns are no row any more: a text that is gone, or two sides of a pair that
    became the same. None where they still are a row.
    """
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, str) and isinstance(old, str) and old.strip() and not value.strip():
            return f"nothing is left of key {key!r}"
        if isinstance(value, list) and isinstance(old, list):
            for i, (message, was) in enumerate(zip(value, old, strict=True)):
                if (
                    isinstance(message, dict)
                    and was.get("content", "").strip()
                    and not message.get("content", "").strip()
                ):
                    return f"nothing is left of key '{key}[{i}]'"
    if "chosen" in after and "rejected" in after and after["chosen"] == after["rejected"]:
        return "keys 'chosen' and 'rejected' have become the same"
    return None
