"""Two hundred rows with broken pictures, of a fixed seed: each is left out with its row and a
reason, and nothing is raised but that.
"""

import base64
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.data import DataFormat
from conf.schema import DataConfig
from conf.stages import SFTStage
from rlhf.data.formats import Use
from rlhf.data.loading import DataRequest, convert, load
from rlhf.data.sources import train_sources
from rlhf.types import UserError
from tests.data.drawn import address, bot, draw, encoded, read, user, write

KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
COUNT = 200
Row = dict[str, Any]


def noise(rng: random.Random, form: str) -> bytes:
    """A picture that no decoder can guess the rest of."""
    levels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (24, 20, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, format=form)
    return out.getvalue()


def cut_off(rng: random.Random) -> bytes:
    data = noise(rng, rng.choice(KINDS))
    return data[: rng.randrange(len(data) * 9 // 10)]


def wrong_beginning(rng: random.Random) -> bytes:
    data = bytearray(noise(rng, rng.choice(KINDS)))
    data[:4] = rng.randbytes(4)
    return bytes(data)


def of_another_kind(rng: random.Random) -> bytes:
    """The beginning of one kind, the rest of another."""
    first, other = rng.sample(KINDS[:4], 2)
    return noise(rng, first)[:16] + noise(rng, other)[16:]


def without_a_size(rng: random.Random) -> bytes:
    data = bytearray(noise(rng, "PNG"))
    start = 16 + 4 * rng.randrange(2)
    data[start : start + 4] = bytes(4)
    return bytes(data)


def enormous(rng: random.Random) -> bytes:
    """A size that no memory holds, in a header of a few bytes."""
    data = bytearray(noise(rng, "PNG"))
    data[16:24] = rng.randrange(2**20, 2**31).to_bytes(4, "big") * 2
    return bytes(data)


def anything(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 200))


BYTES: tuple[Callable[[random.Random], bytes], ...] = (
    cut_off,
    wrong_beginning,
    of_another_kind,
    without_a_size,
    enormous,
    anything,
)


def beside(images: Any, prompt: str = "<image>What?") -> Row:
    return {"prompt": prompt, "completion": "A", "images": images}


def in_a_file(rng: random.Random, folder: Path, number: int) -> Row:
    name = f"broken/{number}.{rng.choice(KINDS).lower()}"
    (folder / "broken").mkdir(exist_ok=True)
    (folder / name).write_bytes(rng.choice(BYTES)(rng))
    return beside([name])


def in_an_address(rng: random.Random, folder: Path, number: int) -> Row:
    text = base64.b64encode(rng.choice(BYTES)(rng)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    return {"messages": [user([part, {"type": "text", "text": "What?"}]), bot("A")]}


def broken_base64(rng: random.Random, folder: Path, number: int) -> Row:
    text = address(rng.randrange(3))
    at = rng.randrange(22, len(text) // 2)
    broken = text[:at] + rng.choice("$#%&\u00e9\u4f60*") + text[at + 1 :]
    return beside([rng.choice([broken, text[:at] + "=", text.replace(";base64", "")])])


def no_such_file(rng: random.Random, folder: Path, number: int) -> Row:
    names = [
        f"pics/{number}-missing.png",
        "pics",
        ".",
        "../outside.png",
        str(folder.parent / "outside.png"),
        "pics/link.png",
        "pics/../../outside.png",
        "~/a.png",
        "a" * rng.randrange(300, 3000),
        "a\0.png",
        "https://example.org/a.png",
        "s3://bucket/a.png",
        "file://elsewhere/a.png",
        "file:///etc/hostname",
    ]
    return beside([rng.choice(names)])


def wrong_count(rng: random.Random, folder: Path, number: int) -> Row:
    marks, count = rng.sample(range(1, 6), 2)
    row = beside(["pics/1.png"] * count, "<image>" * marks + "What?")
    if rng.random() < 0.5:
        parts = [{"type": "image"}] * marks
        row = {"messages": [user(parts), bot("A")], "images": ["pics/1.png"] * count}
    return row


def wrong_type(rng: random.Random, folder: Path, number: int) -> Row:
    given: list[Any] = [
        [7],
        [True],
        [1.5],
        [["pics/1.png"]],
        [{}],
        [{"bytes": "text"}],
        [{"bytes": [1, 2]}],
        [{"path": 3}],
        [{"url": ["pics/1.png"]}],
        [{"file_name": "pics/1.png"}],
        [{"path": "pics/1.png", "width": 3}],
        [{"path": "pics/1.png", "sha256": "0"}],
        [None],
        [""],
        7,
        {"a": "pics/1.png"},
        "[1",
    ]
    return beside(rng.choice(given))


MAKERS = (in_a_file, in_an_address, broken_base64, no_such_file, wrong_count, wrong_type)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of all rows."""
    rng = random.Random(20)
    folder = tmp_path_factory.mktemp("broken") / "data"
    draw(folder)
    (folder.parent / "outside.png").write_bytes(encoded())
    os.symlink(folder.parent / "outside.png", folder / "pics/link.png")
    made = [MAKERS[number % len(MAKERS)](rng, folder, number) for number in range(COUNT)]
    return write(folder / "rows.jsonl", *made)


def test_each_of_200_broken_rows_is_left_out_with_a_reason(rows: Path, tmp_path: Path) -> None:
    for use, form in ((Use.sft, "prompt_completion"), (Use.sft, "messages")):
        # each file by itself: one has prompts and completions, the other messages
        own = [
            json.loads(line)
            for line in rows.read_text(encoding="utf-8").splitlines()
            if (form == "messages") == ("messages" in json.loads(line))
        ]
        path = write(rows.with_name(f"{form}.jsonl"), *own)
        loaded = read(path, use, tmp_path / "store", format=DataFormat(form))
        assert list(loaded.records) == []
        assert [row.number for row, _ in loaded.rejected] == list(range(1, len(own) + 1))
        for row, reason in loaded.rejected:
            assert row.place == f"{path}, row {row.number}"
            assert reason and "Traceback" not in reason and "\n" not in reason
            assert len(reason) < 600, reason
    assert not (tmp_path / "store").exists()


def test_a_run_ends_with_the_first_of_them(rows: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(rows))
    request = DataRequest(data, SFTStage(), 0, tmp_path / "runs" / "run")
    with pytest.raises(
        UserError, match=r"200 of 200 rows don't fit .*row 1: .*data.max_bad_rows=0"
    ):
        load(request, train_sources(data), Use.sft)


def test_a_broken_picture_among_good_ones_is_one_row_less(tmp_path: Path) -> None:
    draw(tmp_path)
    rng = random.Random(3)
    (tmp_path / "pics/bad.jpg").write_bytes(cut_off(rng))
    given = [beside([name]) for name in ("pics/0.png", "pics/bad.jpg", "pics/1.png")]
    path = write(tmp_path / "rows.jsonl", *given)
    data = DataConfig(path=str(path), max_bad_rows=1)
    loaded = convert(train_sources(data), Use.sft, data, 0, None)
    assert [record.number for record in loaded.records] == [1, 3]
    ((row, reason),) = loaded.rejected
    assert row.number == 2 and "pics/bad.jpg" in reason
