"""Pictures in conversations: from a file and a place in the text to the tokens and tensors that a
picture model reads (rlhf/models/processors.py knows transformers' processors).

A picture stays a file until a batch is made. Its width and height decide how many tokens it takes,
so encoding opens none.
"""

import functools
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.models.facts import is_picture_model
from rlhf.models.processors import (
    TEXT_KEYS,
    Processor,
    load_processor,
    token_types,
)
from rlhf.models.templates import pictures_of, processor_of
from rlhf.models.turns import ids_of
from rlhf.process.pixels import PictureError, rgb
from rlhf.types import Picture, UserError

__all__ = [
    "Processor",
    "collapsed",
    "is_picture_model",
    "load_processor",
    "opened",
    "picture_inputs",
    "pictures_of",
    "processor_of",
]
_OPENED = 256  # pictures that are kept as pixels


# ---- in the tokens ----


def collapsed(processor: Processor, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
    """`ids` with one image token in place of each picture's tokens, as vLLM wants a prompt. Raises
    ValueError where a picture's tokens are not found in their order.
    """
    tokenizer = processor.inner.tokenizer
    place = int(tokenizer.convert_tokens_to_ids(processor.image_token))
    out: list[int] = []
    left = list(ids)
    for picture in pictures:
        own = ids_of(tokenizer, [processor.text_of(picture)])[0]
        start = _found(left, own)
        if start is None:
            raise ValueError(f"the tokens of the picture {picture['path']} are not in the prompt")
        out += [*left[:start], place]
        left = left[start + len(own) :]
    return out + left


def _found(ids: list[int], part: list[int]) -> int | None:
    """Where `part` begins in `ids`."""
    for start in range(len(ids) - len(part) + 1):
        if ids[start] == part[0] and ids[start : start + len(part)] == part:
            return start
    return None


# ---- as tensors ----


def opened(picture: Picture) -> Any:
    """A picture as PIL's, as rlhf/process/pixels.py makes it red, green and blue. Raises UserError
    where its file is not what it was when its row was read.
    """
    return _opened(picture["path"], picture["sha256"], picture["width"], picture["height"])


@functools.lru_cache(maxsize=_OPENED)
def _opened(path: str, sha256: str, width: int, height: int) -> Any:
    try:
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(
                f"the picture {path} has changed since its row was read (its sha256 is another). "
                "Restore the file, or start the run anew."
            )
        image = rgb(io.BytesIO(content))
    except (OSError, PictureError) as error:
        raise UserError(f"the picture {path} can't be read: {error}. Restore the file.") from error
    if image.size != (width, height):
        raise UserError(
            f"the picture {path} is {image.size[0]} x {image.size[1]} pixels, but its row says "
            f"{width} x {height}. Read the rows anew."
        )
    return image


def picture_inputs(
    processor: Processor, rows: Sequence[Sequence[Picture]], input_ids: Tensor | None = None
) -> dict[str, Tensor]:
    """What a picture model's forward takes beside the token ids, for the pictures of a batch: pixel
    values and sizes, one row's pictures after another's; and with `input_ids` [B, L], where the
    family takes it, which tokens are pictures'. Rows may hold different numbers of pictures.
    """
    images = [opened(picture) for row in rows for picture in row]
    out: dict[str, Tensor] = {}
    if images:
        text = processor.image_token * len(images)
        given = processor.called(text, images, return_tensors="pt")
        out = {key: value for key, value in given.items() if key not in TEXT_KEYS}
    if input_ids is not None:
        out |= token_types(processor, input_ids)
    assert all(isinstance(value, torch.Tensor) for value in out.values()), sorted(out)
    return out
