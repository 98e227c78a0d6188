"""Pictures in conversations: from a file and a place in the text to the tokens and tensors that a
picture model reads (rlhf/models/processors.py knows transformers' processors).

A picture stays a file until a batch is made. Its width and height decide how many tokens it takes,
so encoding opens none.
"""

import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.models.processors import (
    TEXT_KEYS,
    Processor,
    is_picture_model,
    load_processor,
    processor_of,
    replacement,
    save_processor,
    token_types,
)
from rlhf.models.turns import ids_of
from rlhf.types import PICTURE_MARK, Message, Picture, RowError, UserError

__all__ = [
    "Processor",
    "as_parts",
    "check_text",
    "collapsed",
    "expanded",
    "is_picture_model",
    "load_processor",
    "opened",
    "picture_inputs",
    "pictures_of",
    "processor_of",
    "save_processor",
]
_OPENED = 256  # pictures that are kept as pixels
_WORD = "Zanzibar"  # that no template writes by itself


def pictures_of(messages: Iterable[Message]) -> list[Picture]:
    """The pictures of a conversation, in the order of their places."""
    return [picture for message in messages for picture in message.get("images") or ()]


# ---- in the text ----


def as_parts(tokenizer: Any, messages: Sequence[Any]) -> list[Any]:
    """Messages for a picture model's chat template: one with pictures as a list of parts, texts and
    pictures in turn. So are texts under a template that writes nothing of texts. Raises RowError.
    """
    processor = _needed(tokenizer)
    return [_parts(tokenizer, processor, number, one) for number, one in enumerate(messages)]


def _needed(tokenizer: Any) -> Processor:
    processor = processor_of(tokenizer)
    if processor is None:
        raise RowError(
            "the conversation holds pictures, but the model reads text alone: give model.path a "
            "model that reads pictures, or remove the rows that hold some"
        )
    return processor


def _parts(tokenizer: Any, processor: Processor, number: int, message: Any) -> Any:
    content, images = message["content"], message.get("images")
    if not images:
        if _writes_texts(tokenizer, processor):
            return message
        return {**message, "content": [{"type": "text", "text": content}]}
    texts = content.split(PICTURE_MARK)
    if len(texts) != len(images) + 1:
        raise RowError(
            f"message {number}: its text has {len(texts) - 1} places for pictures, but it holds "
            f"{len(images)}"
        )
    parts: list[dict[str, str]] = []
    for place, text in enumerate(texts):
        if place > 0:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    shown = {key: value for key, value in message.items() if key != "images"}
    return {**shown, "content": parts}


def _writes_texts(tokenizer: Any, processor: Processor) -> bool:
    """Whether the chat template writes a content that is a text, rather than a list of parts."""
    template = str(tokenizer.chat_template)
    if template not in processor.writes_texts:
        chat = [
            {"role": "user", "content": f"{_WORD} 1"},
            {"role": "assistant", "content": f"{_WORD} 2"},
        ]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            found = f"{_WORD} 1" in text and f"{_WORD} 2" in text
        except Exception:  # a template is a program, and this one was not written for texts
            found = False
        processor.writes_texts[template] = found
    return processor.writes_texts[template]


def expanded(tokenizer: Any, text: str, pictures: Sequence[Picture]) -> str:
    """A rendered text with each image token replaced by its picture's tokens. Raises RowError where
    it has another number of them.
    """
    processor = _needed(tokenizer)
    pieces = text.split(processor.image_token)
    _refuse_spelled(processor, pieces)
    if len(pieces) != len(pictures) + 1:
        raise RowError(
            f"the chat template writes {len(pieces) - 1} image tokens ({processor.image_token}) "
            f"for {len(pictures)} pictures. Expected one for each: a text that spells the token "
            "counts as one, and some templates have no place for pictures, or none in some roles"
        )
    out = [pieces[0]]
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        out += [_text_of(processor, picture), piece]
    return "".join(out)


def _text_of(processor: Processor, picture: Picture) -> str:
    try:
        return replacement(processor, (picture["width"], picture["height"]))
    except ValueError as error:
        raise RowError(
            f"the picture {picture['path']} ({picture['width']} x {picture['height']} pixels): "
            f"{error}"
        ) from error


def _refuse_spelled(processor: Processor, texts: Sequence[str]) -> None:
    for token in processor.reserved:
        if any(token in text for text in texts):
            raise RowError(
                f"the text spells {token!r}, which stands for a picture: remove it, or write it "
                "otherwise"
            )


def check_text(tokenizer: Any, text: str) -> None:
    """Raises RowError for a text that spells a token that stands for a picture."""
    _refuse_spelled(_needed(tokenizer), [text])


def collapsed(processor: Processor, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
    """`ids` with one image token in place of each picture's tokens, as vLLM wants a prompt. Raises
    ValueError where a picture's tokens are not found in their order.
    """
    tokenizer = processor.inner.tokenizer
    place = int(tokenizer.convert_tokens_to_ids(processor.image_token))
    out: list[int] = []
    left = list(ids)
    for picture in pictures:
        own = ids_of(tokenizer, [_text_of(processor, picture)])[0]
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
    """A picture as PIL's, upright and in RGB, on white where it is transparent. Raises UserError
    where its file is not what it was when its row was read.
    """
    return _opened(picture["path"], picture["sha256"], picture["width"], picture["height"])


@functools.lru_cache(maxsize=_OPENED)
def _opened(path: str, sha256: str, width: int, height: int) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        content = Path(path).read_bytes()
        changed = hashlib.sha256(content).hexdigest() != sha256
        if changed:
            raise UserError(
                f"the picture {path} has changed since its row was read (its sha256 is another). "
                "Restore the file, or start the run anew."
            )
        image: Any = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        image = _on_white(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(
            f"the picture {path} can't be read ({type(error).__name__}: {error}). Restore the file."
        ) from error
    if image.size != (width, height):
        raise UserError(
            f"the picture {path} is {image.size[0]} x {image.size[1]} pixels, but its row says "
            f"{width} x {height}. Read the rows anew."
        )
    return image


def _on_white(image: Any) -> Any:
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


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
