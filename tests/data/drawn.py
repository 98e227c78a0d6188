"""Pictures for the tests of rows, drawn by the test itself, and rows that are read with them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from conf.schema import DataConfig
from rlhf.data.formats import Use
from rlhf.data.formats.values import pictures_in
from rlhf.data.loading import Loaded, convert
from rlhf.data.sources import train_sources
from rlhf.types import PICTURE_MARK

M = PICTURE_MARK


def encoded(number: int = 0, form: str = "PNG", size: tuple[int, int] | None = None) -> bytes:
    """The bytes of a picture of its own size and colour."""
    out = io.BytesIO()
    colour = (40 * number % 256, 90, 200 - number)
    Image.new("RGB", size or (8 + number, 6), colour).save(out, format=form)
    return out.getvalue()


def draw(folder: Path, count: int = 4, form: str = "PNG") -> list[str]:
    """`count` pictures in `folder`/pics; their paths below `folder`."""
    (folder / "pics").mkdir(parents=True, exist_ok=True)
    names = [f"pics/{number}.{form.lower()}" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(number, form))
    return names


def address(number: int = 0) -> str:
    """A picture as a data: address."""
    return f"data:image/png;base64,{base64.b64encode(encoded(number)).decode()}"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, use: Use = Use.sft, store: Path | None = None, **options: Any) -> Loaded:
    """The rows of a file with their pictures opened."""
    data = DataConfig(path=str(path), **options)
    return convert(train_sources(data), use, data, 0, None, store)


def widths(value: Any) -> list[int]:
    """Which pictures a value shows, in their order: a picture's width is 8 and its number."""
    return [picture["width"] - 8 for picture in pictures_in(value)]
