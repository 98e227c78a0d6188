"""Texts as token ids, by the shortest way that a tokenizer has."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

# Attribute that `rlhf.models.loading.load_tokenizer` sets: the rows of the model's embedding where
# the tokenizer has more entries.
EMBEDDING_ROWS = "embedding_rows"
# where transformers' class around the library tokenizers has these methods from
_USUAL = {
    "__call__": "transformers.tokenization_utils_base",
    "_encode_plus": "transformers.tokenization_utils_tokenizers",
}
_BLANKS: "weakref.WeakKeyDictionary[Any, dict[int, bool]]" = weakref.WeakKeyDictionary()


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone. Raises ValueError for a token without a row in the embedding."""
    ids = ids_of(tokenizer, [text])[0]
    check_rows(tokenizer, ids)
    return ids


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text alone, whether or not the embedding has rows for them."""
    core = _core(tokenizer)
    if core is None or not all(isinstance(text, str) for text in texts):
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [found.ids for found in core.encode_batch_fast(texts, add_special_tokens=False)]


def _core(tokenizer: Any) -> Any | None:
    """The tokenizer of the library tokenizers, where calling it gives what calling `tokenizer`
    does: it is asked without masks and places of tokens, which takes half as long again.
    """
    if not _is_usual(type(tokenizer)):
        return None
    core = tokenizer.backend_tokenizer
    # what an earlier call, or the tokenizer's file, has left: a call through transformers ends it
    if core.truncation is not None or core.padding is not None:
        return None
    if core.encode_special_tokens != tokenizer.split_special_tokens:
        return None
    return core


@functools.lru_cache(maxsize=32)
def _is_usual(kind: type) -> bool:
    """Whether a class of tokenizers tokenises as transformers' own class does."""
    return all(
        getattr(getattr(kind, name, None), "__module__", None) == module
        for name, module in _USUAL.items()
    )


def check_rows(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raises ValueError for a token without a row in the model's embedding."""
    rows = vars(tokenizer).get(EMBEDDING_ROWS)
    if rows is not None and ids and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(
            f"the text holds {token!r}, token {max(ids)}, but the model's embedding has {rows} rows"
        )


def single_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` with one beginning-of-sequence token where several begin it."""
    if len(ids) < 2 or ids[0] != ids[1]:
        return ids
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return ids
    start = 0
    while ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


def is_blank(tokenizer: Any, token: int) -> bool:
    """Whether a token says nothing but blanks."""
    known = _BLANKS.setdefault(tokenizer, {})
    if token not in known:
        known[token] = not tokenizer.decode([token]).strip()
    return known[token]
