"""Texts as the report looks at them and shows them. Pure functions."""

import math
import unicodedata
from collections.abc import Iterable

from rlhf.data.prepare.words import Counted, counted
from rlhf.data.prepare.words import words as split_words

EXCERPT = 160  # characters
_KEPT = 1 << 21  # characters of texts whose words are kept


def words(text: str) -> list[str]:
    """Lower-case words; a Chinese, Japanese, Thai, Lao, Khmer or Burmese character counts as one.
    Punctuation is left out.
    """
    return split_words(text.lower())


class _Kept:
    """The words of the last texts, since several detectors ask for them one after the other."""

    def __init__(self) -> None:
        self._words: dict[str, Counted] = {}
        self._size = 0

    def __call__(self, text: str) -> Counted:
        known = self._words.get(text)
        if known is None:
            if self._size > _KEPT:
                self._words.clear()
                self._size = 0
            known = self._words[text] = counted(text.lower())
            self._size += len(text)
        return known


# (text) -> its lower-case words, counted as rules count them
counted_words = _Kept()


def safe(text: str) -> str:
    """`text` on one line and fit for any file or screen: white space in one blank, control, format
    and lone surrogate characters as \ufffd.
    """
    flat = " ".join(text.split())
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in flat
    )


# they would reorder what stands beside the text
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def excerpt(text: str, length: int = EXCERPT) -> str:
    """The start of a text, by `safe`; cut texts end with an ellipsis."""
    start = safe(text[: 4 * length])
    if len(start) <= length and len(text) <= 4 * length:
        return start
    return start[: length - 1] + "…"


def quantile(ordered: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, between neighbours linearly. Raises
    ValueError without values.
    """
    if not ordered:
        raise ValueError("expected at least one value")
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def wilson(successes: float, total: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927, JASA 22). (0, 1) for a total of 0."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def entropy(counts: Iterable[float]) -> float:
    """Shannon entropy in nats of a distribution given by counts; 0 for none."""
    values = [c for c in counts if c > 0]
    total = sum(values)
    if total:
        return -sum(c / total * math.log(c / total) for c in values)
    return 0.0
