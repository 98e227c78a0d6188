"""What the files of a model say of its tokens: which ones end a response, and how many rows its
embedding has. A tokenizer carries both along (rlhf/models/turns.py), and a saved model keeps the
first.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.models.tokens import EMBEDDING_ROWS
from rlhf.models.turns import LISTED_ENDS, end_ids, special_ids
from rlhf.types import UserError

_MEDIA = ("image", "audio", "video", "boi", "eoi", "boa", "eoa")  # of names such as image_token


def attach_ends(tokenizer: Any, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Make known to `tokenizer` the end tokens that the model's generation_config.json names, or
    its config.json where the former names none.
    """
    ends = _ids(generation.get("eos_token_id"))
    if not ends:
        # A configuration has an end token by default, which need not be one of this tokenizer's.
        special = special_ids(tokenizer)
        ends = tuple(i for i in _ids(_of_text(config, "eos_token_id")) if i in special)
    vars(tokenizer)[LISTED_ENDS] = ends


def _of_text(config: Mapping[str, Any], name: str) -> Any:
    """A value of config.json, where several modalities have a part of their own that of text."""
    part = config.get("text_config")
    if name not in config and isinstance(part, dict):
        return part.get(name)
    return config.get(name)


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids of an ``eos_token_id``: one, or a list."""
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in values if isinstance(i, int) and not isinstance(i, bool))


def attach_rows(tokenizer: Any, config: Mapping[str, Any], what: str) -> None:
    """Every entry of the tokenizer has a row in the model's embedding, except those for images,
    sounds and videos, which checkpoints for text alone lack: encoding refuses texts that hold them.

    what: the model, for the message. Raises UserError.
    """
    rows = _of_text(config, "vocab_size")
    if not isinstance(rows, int):
        return
    surplus = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not surplus:
        return
    vars(tokenizer)[EMBEDDING_ROWS] = rows
    media = set()
    for name, token in tokenizer.special_tokens_map.items():
        if name.partition("_")[0] in _MEDIA:
            media.add(str(token))
    tokens = [token for _, token in sorted(surplus.items()) if token not in media]
    if tokens:
        raise UserError(
            f"{what}: its tokenizer has {max(surplus) + 1} entries, but its embedding has {rows} "
            f"rows (vocab_size in config.json), so {', '.join(map(repr, tokens[:5]))} can't be "
            "read. Give the model its own tokenizer, or resize it "
            "(model.resize_token_embeddings(len(tokenizer)) of transformers, then save both)."
        )


def set_ends(model: Any, tokenizer: Any) -> None:
    """Make the model's generation_config name every token that ends a response."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        ends = end_ids(tokenizer)
        settings.eos_token_id = ends[0] if len(ends) == 1 else list(ends)


def make_savable(settings: Any) -> None:
    """transformers reads sampling settings beside ``do_sample=false`` and refuses to write them,
    which would be at the end of a training: then they are taken as meant. Raises ValueError for
    settings that can't be saved either way.
    """
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
    settings.validate(strict=True)
