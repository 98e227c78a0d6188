"""How a picture's file becomes red, green and blue, and which files are no picture."""

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlhf.process.pixels import Measured, PictureError, measure, rgb

NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def first_pixel(image: Image.Image, form: str, **options: Any) -> tuple[int, ...]:
    read = rgb(io.BytesIO(encoded(image, form, **options)))
    assert read.mode == "RGB"
    return tuple(int(level) for level in np.asarray(read)[0, 0])


def test_an_orientation_is_applied() -> None:
    wide = Image.new("RGB", (4, 2), "black")
    wide.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    data = encoded(wide, "PNG", exif=exif)
    assert measure(io.BytesIO(data)) == Measured(2, 4, "PNG")
    turned = np.asarray(rgb(io.BytesIO(data)))
    assert turned.shape == (4, 2, 3)
    assert turned[0, 1].tolist() == [255] * 3 and turned.sum() == 3 * 255


def test_what_every_mode_becomes() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert first_pixel(clear, "PNG") == (255, 255, 255)
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert first_pixel(half, "PNG") == (255, 127, 127)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert first_pixel(palette, "PNG") == (10, 20, 30)
    assert first_pixel(palette, "PNG", transparency=1) == (255, 255, 255)
    assert first_pixel(palette, "GIF") == (10, 20, 30)
    assert first_pixel(Image.new("1", (2, 2), 1), "PNG") == (255, 255, 255)
    assert first_pixel(Image.new("L", (2, 2), 7), "PNG") == (7, 7, 7)
    assert first_pixel(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF") == (0, 0, 0)
    for level, expected in ((0, 0), (25_700, 100), (65_535, 255)):
        deep = Image.fromarray(np.full((2, 2), level, dtype=np.uint16))
        assert first_pixel(deep, "PNG") == (expected,) * 3


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_that_is_cut_off_is_no_picture(form: str) -> None:
    data = encoded(Image.fromarray(NOISE), form)
    assert measure(io.BytesIO(data)) == Measured(30, 40, form)
    for end in range(0, len(data) - 64, max(1, len(data) // 40)):
        with pytest.raises(PictureError):
            measure(io.BytesIO(data[:end]))


def test_what_is_refused_says_why() -> None:
    image = Image.fromarray(NOISE)
    other = Image.new("RGB", image.size)
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        moving = encoded(image, form, save_all=True, append_images=[other])
        with pytest.raises(PictureError, match="2 frames or pages"):
            measure(io.BytesIO(moving))
    with pytest.raises(PictureError, match=r"30 x 40 = 1,200 pixels, more than the 1,199"):
        measure(io.BytesIO(encoded(image, "PNG")), most=1199)
    with pytest.raises(PictureError, match="32 bits"):
        measure(io.BytesIO(encoded(Image.new("F", (2, 2)), "TIFF")))
    with pytest.raises(PictureError, match=r"no PNG, JPEG.*file"):
        measure(io.BytesIO(b"<svg/>"))


def test_a_second_view_behind_a_photograph_is_left_out() -> None:
    image = Image.fromarray(NOISE)
    data = encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert measure(io.BytesIO(data)) == Measured(30, 40, "JPEG")


def test_importing_it_imports_no_pillow() -> None:
    code = "import sys, rlhf.process.pixels; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
