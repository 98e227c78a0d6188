"""Which language texts are in, by py3langid's model, and which of its languages count as one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.process.libraries import require

# Languages that the model can't keep apart, or that people name by one code: the members of a
# macrolanguage (ISO 639-3), and the standards of one language. The first code is the group's; codes
# that the model doesn't know may be asked for all the same.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("zh", "cmn", "wuu", "yue"),  # Chinese in Han characters: short texts are told apart by chance
    ("no", "nb", "nn"),
    ("sr", "hr", "bs", "sh", "cnr"),  # Serbo-Croatian (hbs)
    ("ms", "id", "zsm", "in"),  # Malay (msa)
    ("ar", "arb", "ary", "arz"),
    ("fa", "pes", "prs"),
    ("ku", "kmr", "ckb", "sdh"),
    ("uz", "uzn", "uzs"),
    ("az", "azj", "azb"),
    ("lv", "lvs", "ltg"),
    ("el", "grc"),
    ("he", "iw", "hbo"),
    ("et", "ekk"),
    ("mn", "khk"),
    ("ne", "npi"),
    ("or", "ory"),
    ("ps", "pbt"),
    ("sq", "als"),
    ("sw", "swh"),
    ("tl", "fil"),
    ("jv", "jw"),
    ("ro", "mo"),
    ("qu", "quz"),
    ("mg", "plt"),
    ("dz", "bo"),  # Tibetan script: the model knows Dzongkha alone
    ("am", "ti"),  # Ethiopic script: the model knows Amharic alone
)
UNKNOWN = "und"
NOTHING = "zxx"  # the model's label of texts without linguistic content
_SEGMENT, _BEFORE = 128, 16  # bytes; no feature of the model is longer than the second
_BATCH_BYTES = 1 << 20  # of texts classified at once


@cache
def identifier() -> Any:
    """py3langid's model, whose `classify` gives (code, probability)."""
    langid = require("py3langid.langid", "data")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@dataclass(frozen=True, slots=True)
class _Model:
    """The model as arrays: a text's bytes walk through a state machine that gives features, whose
    weights are added up.
    """

    moves: NDArray[Any]  # next state by row of the state and byte
    rows: NDArray[np.int64]  # [S] where a state's row begins
    features: NDArray[np.int64]  # [S] the feature that a state gives; -1: none
    weights: NDArray[np.float32]  # [F, L]
    bias: NDArray[np.float32]  # [L]
    labels: list[str]  # [L] a label may come twice
    first: NDArray[np.int64]  # [L] where each label comes first


@cache
def _model() -> _Model:
    model = identifier()
    labels = list(model.nb_classes)
    return _Model(
        moves=np.asarray(model.tk_nextmove),
        rows=np.asarray(model.tk_row, dtype=np.int64) << 8,
        features=np.asarray(model.tk_output, dtype=np.int64),
        weights=np.asarray(model.nb_ptc, dtype=np.float32),
        bias=model.nb_pc,
        labels=labels,
        first=np.array([labels.index(label) for label in labels]),
    )


def group_of(code: str) -> str:
    """The code of a language's group; a language without one is its own."""
    return next((group[0] for group in GROUPS if code in group), code)


def known() -> list[str]:
    """Codes that can be asked for: the model's, and those of groups that it knows."""
    labels = set(_model().labels) - {NOTHING}
    groups = [group for group in GROUPS if labels & set(group)]
    return sorted(labels.union(*groups))


def _encoded(text: str) -> bytes:
    """A text's bytes as the model was trained on them."""
    encoded = identifier()._encode(text)
    assert isinstance(encoded, bytes)
    return encoded


def _segments(texts: Sequence[bytes]) -> tuple[NDArray[Any], ...]:
    """The texts cut into segments: [_BEFORE + _SEGMENT, S] their bytes, each with what stands
    before it; [S] the segment's own bytes, its text, and whether it begins one.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    data = np.frombuffer(b"".join(texts) or b"\0", dtype=np.uint8)
    pieces = -(-lengths // _SEGMENT)  # [N]
    owner = np.repeat(np.arange(len(texts)), pieces)  # [S]
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (np.cumsum(lengths) - lengths)[owner] + number * _SEGMENT
    own = np.minimum(_SEGMENT, lengths[owner] - number * _SEGMENT)
    at = starts + np.arange(-_BEFORE, _SEGMENT)[:, None]
    return data[np.clip(at, 0, len(data) - 1)], own, owner, number == 0


def _counts(texts: Sequence[bytes]) -> Any:
    """[N, F] how often each text gives each feature, sparse.

    All segments walk at once. A state depends on the last few bytes alone (the machine is Aho and
    Corasick's), so that a segment that walks through the _BEFORE bytes in front of it arrives in
    the state in which the whole text would be there.
    """
    from scipy.sparse import csr_array

    model = _model()
    columns, own, owner, first = _segments(texts)
    state = np.zeros(len(owner), dtype=np.int64)
    rows, features = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for position, column in enumerate(columns, start=-_BEFORE):
        if position == 0:
            state[first] = 0
        state = model.moves[model.rows[state] + column].astype(np.int64)
        if position >= 0:
            given = model.features[state]
            hits = np.flatnonzero((given >= 0) & (position < own))
            rows.append(owner[hits])
            features.append(given[hits])
    where, which = np.concatenate(rows), np.concatenate(features)
    shape = (len(texts), len(model.weights))
    return csr_array((np.ones(len(where), dtype=np.float32), (where, which)), shape=shape)


def probabilities(texts: Sequence[str]) -> NDArray[np.float32]:
    """[N, L] the probability of each of the model's labels, as py3langid's `classify` gives it to
    one text; a label that comes twice has all of it where it comes first.
    """
    model = _model()
    encoded = [_encoded(text) for text in texts]
    counts = _counts(encoded)
    counts.sum_duplicates()
    counts.data = np.log1p(counts.data)
    scores = counts @ model.weights + model.bias
    scores[np.diff(counts.indptr) == 0] = 0.0  # nothing to tell by: all are as likely
    scores *= np.array([[1.0 / math.sqrt(len(text) or 1)] for text in encoded], dtype=np.float32)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    out = np.zeros_like(scores)
    np.add.at(out.T, model.first, scores.T)
    return out


@dataclass(frozen=True, slots=True)
class Identified:
    """What language a text is most likely in."""

    code: str  # the likeliest label of the likeliest group
    group: str
    probability: float  # of the group


def identify(texts: Sequence[str], *, grouped: bool = True) -> list[Identified]:
    """[N] the language of each text: the likeliest group, whose probability is that of its members
    together. grouped=False: every label is a group by itself.
    """
    model = _model()
    groups = [group_of(label) if grouped else label for label in model.labels]
    names = list(dict.fromkeys(groups))
    member = np.array([names.index(group) for group in groups])  # [L]
    out: list[Identified] = []
    for batch in _batches(texts):
        shares = probabilities(batch)
        together = np.zeros((len(batch), len(names)), dtype=np.float32)
        np.add.at(together.T, member, shares.T)
        for row, best in enumerate(together.argmax(axis=1)):
            label = int(np.where(member == best, shares[row], -1.0).argmax())
            probability = min(1.0, float(together[row, best]))
            out.append(Identified(model.labels[label], names[best], probability))
    return out


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbouring texts of about _BATCH_BYTES together."""
    start = size = 0
    for index, text in enumerate(texts, start=1):
        size += len(text.encode("utf-8", "surrogatepass"))
        if size >= _BATCH_BYTES or index == len(texts):
            yield texts[start:index]
            start, size = index, 0
