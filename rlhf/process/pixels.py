"""Pictures as pixels: the one place that opens a picture's file, and says how it becomes red, green
and blue.

    upright       turned as its EXIF orientation says; width and height are those of the turned one
    transparent   laid on white (alpha channels, and palettes with a transparent colour)
    16-bit grey   divided by 257, so that white stays white
    anything else as Pillow converts it: palettes, black and white, grey, CMYK, YCbCr, LAB
    profiles      not applied, as no processor of a model applies them

Several frames (GIF, WebP, PNG) or pages (TIFF) are no picture; of a camera's MPO, a JPEG with a
second view behind it, the first view is. Every pixel is decoded, so that a file that is cut off is
found when it is read, and not in the middle of a training run. Pillow is imported when the first
picture is opened.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

# Pillow's own bound of a suspicious size; it refuses what has twice as many
MOST_PIXELS = 89_478_485
# Pillow's name: the ending of a file
FORMATS = {
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
}
_NAMES = "PNG, JPEG, WebP, GIF, BMP or TIFF"
_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
_PER_LEVEL = 257  # 65535 / 255


class PictureError(ValueError):
    """What is wrong with a picture, as the end of a sentence that names it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A picture that can be opened."""

    width: int  # pixels, of the upright picture
    height: int
    format: str  # of FORMATS


def measure(source: Path | BinaryIO, most: int = MOST_PIXELS) -> Measured:
    """Decode a picture of at most `most` pixels. Raises PictureError for anything else."""
    image = _decoded(source, most)
    form = "JPEG" if image.format == "MPO" else str(image.format)
    turned = _upright(image)
    return Measured(turned.width, turned.height, form)


def rgb(source: Path | BinaryIO, most: int = 2 * MOST_PIXELS) -> "Image.Image":
    """A picture as a model sees it: upright, of mode RGB. Raises PictureError as `measure`."""
    return _as_rgb(_upright(_decoded(source, most)))


def _decoded(source: Path | BinaryIO, most: int) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # `most` decides what is too large, and damaged metadata harms no pixel
            warnings.simplefilter("ignore")
            image = Image.open(source, formats=tuple(FORMATS))
            _check_size(image, most)
            _check_frames(image)
            _check_numbers(image)
            image.load()
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"it is no {_NAMES} file, or its first bytes are damaged") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"it has more than the {most:,} pixels that may be opened") from error
    # of a damaged file Pillow raises whatever its decoders, zlib, struct and memory raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise PictureError(f"it is damaged or cut off ({said})") from error
    return image


def _check_size(image: "Image.Image", most: int) -> None:
    pixels = image.width * image.height
    if pixels > most:
        raise PictureError(
            f"it has {image.width} x {image.height} = {pixels:,} pixels, more than the {most:,} "
            "that may be opened"
        )
    if not pixels:
        raise PictureError(f"it has {image.width} x {image.height} pixels, so nothing is in it")


def _check_frames(image: "Image.Image") -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise PictureError(f"it has {frames} frames or pages: expected a single picture")


def _check_numbers(image: "Image.Image") -> None:
    grey = image.mode == "I" and image.format == "PNG"
    if image.mode in ("I", "F") and not grey:
        raise PictureError(
            f"its pixels are numbers of 32 bits (Pillow's mode {image.mode}), of which nothing "
            "says what is white"
        )


def _upright(image: "Image.Image") -> "Image.Image":
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned: Any = ImageOps.exif_transpose(image)
    # metadata that can't be read turns nothing; Pillow raises what its parsers raise
    except Exception:  # noqa: BLE001
        return image
    return image if turned is None else turned


def _as_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode in _GREY_16 or image.mode == "I":
        grey = image.convert("I").point(lambda level: level * (1 / _PER_LEVEL))
        return grey.convert("L").convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        paper = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(paper, over).convert("RGB")
    return image.convert("RGB")
