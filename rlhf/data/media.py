"""Pictures, videos and sounds as rows and messages name them: the columns, keys and parts of a
content that hold some. Pictures are read; videos and sounds are refused by name.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.data.calls import is_nothing, parsed
from rlhf.process.wording import describe
from rlhf.types import PICTURE_MARK, RowError

_MEDIA = tuple(
    f"{kind}{ending}"
    for kind in ("image", "video", "audio")
    for ending in ("", "s", "_url", "_urls")
)
_NAMES_OF_MEDIA = frozenset(_MEDIA)
PICTURES = ("images", "image")  # columns, and keys of messages, that hold pictures
IMAGE_TEXT = "<image>"  # where one stands in a text
PARTS_OF_PICTURES = ("image", "image_url", "input_image")
PARTS_OF_MEDIA = (*_MEDIA, "input_video", "input_audio", "input_file", "file")
# keys of a part that name its picture, and the keys beside them that belong to it
_SOURCES = ("image", "image_url", "input_image", "bytes", "base64", "url", "path")


def refuse_media(holder: Mapping[Any, Any], where: str = "") -> None:
    """Raises RowError for a key, of a row or a message, that holds videos or sounds, or addresses
    of pictures.
    """
    if _NAMES_OF_MEDIA.isdisjoint(holder):
        return
    for key in _MEDIA:
        value = holder.get(key)
        if key in PICTURES or is_nothing(value) or value is False:
            continue
        if key.startswith("image"):
            raise RowError(
                f"{where}key {key!r}: pictures are read from images or image, found "
                f"{describe(value)}. data.columns='{{images: {key}}}' reads such a column"
            )
        raise RowError(
            f"{where}key {key!r}: videos and sounds are not read, found {describe(value)}. A "
            "column that holds something else can be renamed by data.columns"
        )


def picture_column(row: Mapping[Any, Any]) -> str | None:
    """The column of a row's pictures, images or image, in any case of letters; None without any.
    Raises RowError for two of them.
    """
    found = [key for key in row if isinstance(key, str) and key.lower() in PICTURES]
    held = [key for key in found if not is_nothing(row[key]) and row[key] is not False]
    if len(held) > 1:
        raise RowError(f"keys {held[0]!r} and {held[1]!r}: expected pictures in one of them")
    return held[0] if held else None


def given_pictures(value: Any, key: str) -> list[Any]:
    """What a column or a key of pictures gives for each: a list, a JSON text of one, or a single
    one. Raises RowError.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, key, "a list of pictures")
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    for i, one in enumerate(given):
        if is_nothing(one) and one != b"":
            raise RowError(f"key '{key}[{i}]': expected a picture, found {describe(one)}")
    return given


def picture_of_part(held: dict[str, Any], kind: str, name: str) -> Any:
    """What a part names as its picture; None for one whose picture is in the row's column."""
    if held.get("detail") == "auto":  # OpenAI's: the model's own size
        del held["detail"]
    sources = [key for key in _SOURCES if key in held]
    if sources == ["bytes", "path"]:  # the path is but the name that the bytes had
        sources = ["bytes"]
        del held["path"]
    beside = held.keys() - set(sources[:1])
    if beside:
        raise RowError(
            f"key {name!r}: expected a part of type {kind!r} with its picture alone, found "
            f"{', '.join(map(repr, sorted(beside)))} too, which nothing reads"
        )
    if not sources:
        return None
    value = held[sources[0]]
    return {sources[0]: value} if sources[0] in ("bytes", "base64") else value


def pictures_of_message(rest: dict[str, Any], shown: list[Any], text: str) -> dict[str, Any]:
    """The content with marks and images of a message that shows pictures: those `shown` by its
    parts, or those of its key images, taken out of `rest`, whose marks stand in its text. Raises
    RowError.
    """
    key = picture_column(rest)
    if key is None:
        if shown and text.count(PICTURE_MARK) != len(shown):
            raise RowError("expected texts without the character U+FFFC beside pictures")
        return {"images": shown} if shown else {}
    if shown:
        raise RowError(f"key {key!r}: expected pictures there or in parts, found both")
    given = given_pictures(rest.pop(key), key)
    mark = PICTURE_MARK if PICTURE_MARK in text else IMAGE_TEXT
    marks = text.count(mark)
    if not marks:
        text = mark * len(given) + text
    elif marks != len(given):
        raise RowError(
            f"key {key!r}: expected as many pictures as marks in the text, found {len(given)} "
            f"pictures and {marks} marks"
        )
    return {"content": text.replace(mark, PICTURE_MARK), "images": given}
