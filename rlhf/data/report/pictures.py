"""The pictures that rows show: a contact sheet, sizes and kinds, which are the same and nearly the
same, and which of held-out rows train as well.

The same pictures have the same bytes. Nearly the same are those whose differences between
neighbouring grey levels have the same signs in all but a few of 128 places (dHash, both ways), and
whose colours are about the same in a grid of 4 x 4: plain surfaces, whose signs say nothing, are
told apart by their colours.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.formats.values import CONTENT, pictures_in
from rlhf.data.prepare.items import Item
from rlhf.data.report.looked import over
from rlhf.data.report.records import (
    Finding,
    Marked,
    Section,
    Settings,
    Severity,
    Table,
    Thumbnail,
    finding,
)
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import quantile
from rlhf.models.turns import PROCESSOR, ids_of
from rlhf.process import parallel
from rlhf.process.pixels import PictureError, rgb
from rlhf.types import Picture, UserError

SHOWN = 24  # thumbnails on the page
_SIDE = 112  # pixels of a thumbnail's longer side
_MOST_SIGNS = 6  # places of 128 in which nearly equal pictures may differ
_MOST_LEVELS = 10.0  # of 255, by which their colours may, on average
_TOGETHER = 16  # pictures that a process opens at once
_MOST_SIZES = 500  # of pictures, whose tokens are counted
_BLOCK = 512  # pictures compared at once with all others


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture that some row shows, and the rows that do: (index, split)."""

    picture: Picture
    rows: list[tuple[int, str]]


def shown_pictures(items: list[Item]) -> list[tuple[str, list[Picture]]]:
    """Of each row its split and the pictures that it shows."""
    out = []
    for item in items:
        content = {key: value for key, value in item.columns.items() if key in CONTENT}
        out.append((item.split, list(pictures_in(content))))
    return out


def pictures(items: Sequence[Item], settings: Settings) -> Section:
    """What the rows show, some of which show pictures. Raises UserError for a file that is gone."""
    rows: list[list[Picture]] = []
    seen: dict[str, Seen] = {}
    for part in over(shown_pictures, items):
        for split, own in part:
            for picture in own:
                known = seen.setdefault(picture["sha256"], Seen(picture, []))
                known.rows.append((len(rows), split))
            rows.append(own)
    found = list(seen.values())
    some = found[: settings.sample]
    looks = _looks([_path(one.picture, settings) for one in some])
    near = similar(looks)
    findings = (
        *_repeated(items, found, settings),
        *_similar(items, found, near, settings),
        *_across(items, found, near, settings),
    )
    figures = _figures(rows, found) | {"compared": len(some), "similar": len(near)}
    tables = [_sizes(found), _kinds(found)]
    tokens = _tokens(found, settings)
    if tokens:
        figures["tokens"] = tokens
        tables.append(Table("Tokens a picture", tuple(tokens), (tuple(tokens.values()),)))
    return Section(
        "pictures",
        "Pictures",
        figures,
        findings,
        tuple(tables),
        thumbnails=tuple(_sheet(items, found, settings)),
    )


def _path(picture: Picture, settings: Settings) -> Path:
    """Where a picture's file is: named below the run directory, or anywhere."""
    return (settings.folder or Path()) / picture["path"]


# ---- figures ----


def _figures(rows: Sequence[Sequence[Picture]], found: Sequence[Seen]) -> dict[str, Any]:
    counts = [len(own) for own in rows if own]
    return {
        "rows": len(counts),
        "pictures": sum(counts),
        "different": len(found),
        "most_in_a_row": max(counts),
        "kinds": dict(Counter(_kind(one.picture) for one in found).most_common()),
    }


def _kind(picture: Picture) -> str:
    return Path(picture["path"]).suffix.lower().removeprefix(".") or "no ending"


def _sizes(found: Sequence[Seen]) -> Table:
    widths = sorted(float(one.picture["width"]) for one in found)
    heights = sorted(float(one.picture["height"]) for one in found)
    pixels = sorted(float(one.picture["width"] * one.picture["height"]) for one in found)
    heads = ("", "smallest", "5 %", "median", "95 %", "largest")
    lines: list[tuple[str | int, ...]] = []
    for name, values in (("width", widths), ("height", heights), ("pixels", pixels)):
        figures = [quantile(values, share) for share in (0.0, 0.05, 0.5, 0.95, 1.0)]
        lines.append((name, *map(int, figures)))
    return Table("Sizes of different pictures, in pixels", heads, tuple(lines))


def _kinds(found: Sequence[Seen]) -> Table:
    counts = Counter(_kind(one.picture) for one in found)
    return Table("Kinds of files", ("ending", "pictures"), tuple(counts.most_common()))


def _tokens(found: Sequence[Seen], settings: Settings) -> dict[str, int]:
    """How many tokens the model reads for a picture of its size; nothing without a model that
    reads pictures. Of many sizes the first _MOST_SIZES are counted.
    """
    if settings.tokenizer is None or PROCESSOR not in vars(settings.tokenizer):
        return {}
    processor = vars(settings.tokenizer)[PROCESSOR]
    by_size: dict[tuple[int, int], int] = {}
    for one in found:
        size = one.picture["width"], one.picture["height"]
        if size not in by_size and len(by_size) < _MOST_SIZES:
            text = processor.text_of(one.picture)
            by_size[size] = len(ids_of(settings.tokenizer, [text])[0])
    sizes = ((one.picture["width"], one.picture["height"]) for one in found)
    counts = sorted(float(by_size[size]) for size in sizes if size in by_size)
    return {
        "least": int(counts[0]),
        "median": int(quantile(counts, 0.5)),
        "most": int(counts[-1]),
        "pictures": len(counts),
    }


# ---- alike ----


def _opened(path: Path) -> Any:
    try:
        return rgb(path)
    except (PictureError, OSError) as error:
        raise UserError(f"{path}: {error}") from error


def _look(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """[16] 128 signs of differences, and [48] the colours of a grid of 4 x 4. Raises UserError."""
    from PIL import Image

    image = _opened(path)
    box = Image.Resampling.BOX
    # [8, 9] and [9, 8] grey levels
    wide = np.asarray(image.convert("L").resize((9, 8), box), dtype=np.int16)
    high = np.asarray(image.convert("L").resize((8, 9), box), dtype=np.int16)
    across, down = np.diff(wide, axis=1) > 0, np.diff(high, axis=0) > 0
    signs = np.concatenate([across.ravel(), down.ravel()])
    colours = np.asarray(image.resize((4, 4), box), dtype=np.int16).ravel()
    return np.packbits(signs), colours


def _look_at(paths: list[Path]) -> list[tuple[NDArray[np.uint8], NDArray[np.int16]]]:
    return list(map(_look, paths))


def _looks(paths: Sequence[Path]) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """[P, 2] signs and [P, 48] colours of pictures."""
    signs, colours = [], []
    for part in parallel.over_parts(_look_at, paths, _TOGETHER):
        signs += [one for one, _ in part]
        colours += [own for _, own in part]
    return np.stack(signs).view(np.uint64), np.stack(colours)


def similar(looks: tuple[NDArray[np.uint64], NDArray[np.int16]]) -> list[tuple[int, int]]:
    """(picture, the first earlier one that is nearly the same)."""
    signs, colours = looks
    out: dict[int, int] = {}
    for start in range(0, len(signs), _BLOCK):
        block = signs[start : start + _BLOCK]
        # [B, P]
        apart = np.bitwise_count(block[:, None, 0] ^ signs[None, :, 0]).astype(np.int16)
        apart += np.bitwise_count(block[:, None, 1] ^ signs[None, :, 1])
        first, other = np.nonzero(apart <= _MOST_SIGNS)
        first += start
        later = other > first
        first, other = first[later], other[later]
        levels = np.abs(colours[first] - colours[other]).mean(axis=1)
        close = levels <= _MOST_LEVELS
        for one, two in zip(first[close], other[close], strict=True):
            out.setdefault(int(two), int(one))
    return sorted(out.items())


# ---- findings ----


def _repeated(
    items: Sequence[Item], found: Sequence[Seen], settings: Settings
) -> tuple[Finding, ...]:
    """Rows that show a picture which an earlier row of their split shows."""
    again: dict[int, int] = {}
    for one in found:
        first: dict[str, int] = {}
        for row, split in one.rows:
            earlier = first.setdefault(split, row)
            if earlier != row:
                again.setdefault(row, earlier)
    rows = _marked(items, sorted(again.items()), "shows the same picture as", settings)
    message = f"{len(rows)} rows show a picture that an earlier row of their split shows"
    return finding("same_pictures", Severity.info, message, REMEDIES["same_pictures"], rows)


def _similar(
    items: Sequence[Item],
    found: Sequence[Seen],
    near: Sequence[tuple[int, int]],
    settings: Settings,
) -> tuple[Finding, ...]:
    pairs = [(found[one].rows[0][0], found[other].rows[0][0]) for one, other in near]
    rows = _marked(items, pairs, "shows nearly the same picture as", settings)
    message = f"{len(rows)} different pictures are nearly the same as an earlier one"
    return finding("similar_pictures", Severity.info, message, REMEDIES["similar_pictures"], rows)


def _across(
    items: Sequence[Item],
    found: Sequence[Seen],
    near: Sequence[tuple[int, int]],
    settings: Settings,
) -> tuple[Finding, ...]:
    """Held-out rows whose picture, or one that is nearly the same, training rows show as well."""
    same = {}
    for one in found:
        trains = next((row for row, split in one.rows if split == "train"), None)
        if trains is not None:
            same.update({row: trains for row, split in one.rows if split == "eval"})
    like = {}
    for first, second in [*near, *((other, one) for one, other in near)]:
        trains = next((row for row, split in found[second].rows if split == "train"), None)
        if trains is not None:
            like.update({row: trains for row, split in found[first].rows if split == "eval"})
    close = [(row, other) for row, other in sorted(like.items()) if row not in same]
    exact = _marked(items, sorted(same.items()), "shows the same picture as", settings)
    near_ones = _marked(items, close, "shows nearly the same picture as", settings)
    check, other_check = "held_out_pictures", "similar_held_out_pictures"
    message = f"{len(exact)} held-out rows show a picture that a training row shows"
    said = f"{len(near_ones)} held-out rows show nearly the same picture as a training row"
    return (
        *finding(check, Severity.warn, message, REMEDIES["held_out_pictures"], exact),
        *finding(
            other_check, Severity.warn, said, REMEDIES["similar_held_out_pictures"], near_ones
        ),
    )


def _marked(
    items: Sequence[Item], pairs: Iterable[tuple[int, int]], note: str, settings: Settings
) -> Marked:
    """The first row of each pair, with the place of the second."""
    told = ((items[row], f"{note} {items[other].place}") for row, other in pairs)
    return Marked(settings.named, told)


# ---- the contact sheet ----


def _sheet(items: Sequence[Item], found: Sequence[Seen], settings: Settings) -> Iterator[Thumbnail]:
    for one in found[:SHOWN]:
        row, split = one.rows[0]
        image = _opened(_path(one.picture, settings))
        image.thumbnail((_SIDE, _SIDE))
        out = io.BytesIO()
        image.save(out, format="JPEG", quality=80)
        size = f"{one.picture['width']} x {one.picture['height']}"
        yield Thumbnail(out.getvalue(), image.width, image.height, items[row].place, split, size)
