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
from rlhf.models.templates import processor_of
from rlhf.models.turns import ids_of
from rlhf.process import parallel
from rlhf.process.pixels import PictureError, rgb
from rlhf.types import Picture, UserError

Signs = NDArray[np.uint64]  # [2], or [P, 2] of several pictures
Levels = NDArray[np.int16]  # [48], or [P, 48]
SHOWN = 24  # thumbnails on the page
_SIDE = 112  # pixels of a thumbnail's longer side
_MOST_SIGNS = 6  # places of 128 in which nearly equal pictures may differ
_MOST_LEVELS = 10.0  # of 255, by which their colours may, on average
_TOGETHER = 16  # pictures that a process opens at once
_MOST_SIZES = 500  # of pictures, whose tokens are counted
_MOST_COMPARED = 5_000  # different pictures; each is compared with all others
_BLOCK = 512  # pictures compared at once with all others


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture that some row shows, and the rows that do: (index, split)."""

    picture: Picture
    rows: list[tuple[int, str]]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.picture["width"], self.picture["height"]

    @property
    def kind(self) -> str:
        """The ending of its file."""
        ending = Path(self.picture["path"]).suffix
        return ending.lower().removeprefix(".") or "no ending"

    @property
    def trains(self) -> int | None:
        """The first training row that shows it."""
        for row, split in self.rows:
            if split == "train":
                return row
        return None

    @property
    def held(self) -> list[int]:
        """The held-out rows that show it."""
        return [row for row, split in self.rows if split == "eval"]


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
    some = found[:_MOST_COMPARED]
    looks = _looks([_path(one.picture, settings) for one in some])
    near = similar(looks)
    findings = (
        *_repeated(items, found, settings),
        *_similar(items, found, near, settings),
        *_across(items, found, near, settings),
    )
    figures = _figures(rows, found) | {"compared": len(some), "similar": len(near)}
    kinds = Table("Kinds of files", ("ending", "pictures"), tuple(_kinds(found)))
    tables = [_sizes(found), kinds]
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
        "kinds": dict(_kinds(found)),
    }


def _kinds(found: Sequence[Seen]) -> list[tuple[str, int]]:
    counts = Counter(one.kind for one in found)
    return counts.most_common()


def _sizes(found: Sequence[Seen]) -> Table:
    sizes = [one.size for one in found]
    widths = sorted(float(width) for width, _ in sizes)
    heights = sorted(float(height) for _, height in sizes)
    pixels = sorted(float(width * height) for width, height in sizes)
    heads = ("", "smallest", "5 %", "median", "95 %", "largest")
    lines: list[tuple[str | int, ...]] = []
    for name, values in (("width", widths), ("height", heights), ("pixels", pixels)):
        figures = [quantile(values, share) for share in (0.0, 0.05, 0.5, 0.95, 1.0)]
        lines.append((name, *map(int, figures)))
    return Table("Sizes of different pictures, in pixels", heads, tuple(lines))


def _tokens(found: Sequence[Seen], settings: Settings) -> dict[str, int]:
    """How many tokens the model reads for a picture of its size; nothing without a model that
    reads pictures. Of many sizes the first _MOST_SIZES are counted.
    """
    if settings.tokenizer is None or processor_of(settings.tokenizer) is None:
        return {}
    processor = processor_of(settings.tokenizer)
    by_size: dict[tuple[int, int], int] = {}
    for one in found:
        if one.size in by_size or len(by_size) == _MOST_SIZES:
            continue
        text = processor.text_of(one.picture)
        (ids,) = ids_of(settings.tokenizer, [text])
        by_size[one.size] = len(ids)
    known = [one.size for one in found if one.size in by_size]
    counts = sorted(float(by_size[size]) for size in known)
    return {
        "least": int(min(counts)),
        "median": int(quantile(counts, 0.5)),
        "most": int(max(counts)),
        "pictures": len(counts),
    }


# ---- alike ----


def _opened(path: Path) -> Any:
    try:
        return rgb(path)
    except (PictureError, OSError) as error:
        raise UserError(f"{path}: {error}") from error


def _look(path: Path) -> tuple[Signs, Levels]:
    """[2] 128 signs of differences, and [48] the colours of a grid of 4 x 4. Raises UserError."""
    from PIL import Image

    image = _opened(path)
    box = Image.Resampling.BOX
    # [8, 9] and [9, 8] grey levels
    grey = image.convert("L")
    wide = np.asarray(grey.resize((9, 8), box), dtype=np.int16)
    high = np.asarray(grey.resize((8, 9), box), dtype=np.int16)
    across = np.diff(wide, axis=1) > 0
    down = np.diff(high, axis=0) > 0
    signs = np.concatenate([across.ravel(), down.ravel()])
    colours = np.asarray(image.resize((4, 4), box), dtype=np.int16)
    return np.packbits(signs).view(np.uint64), colours.ravel()


def _look_at(paths: list[Path]) -> list[tuple[Signs, Levels]]:
    return list(map(_look, paths))


def _looks(paths: Sequence[Path]) -> tuple[Signs, Levels]:
    """[P, 2] signs and [P, 48] colours of pictures."""
    signs, colours = [], []
    for part in parallel.over_parts(_look_at, paths, _TOGETHER):
        signs += [one for one, _ in part]
        colours += [own for _, own in part]
    return np.stack(signs), np.stack(colours)


def similar(looks: tuple[Signs, Levels]) -> list[tuple[int, int]]:
    """(picture, the first earlier one that is nearly the same)."""
    signs, colours = looks
    out: dict[int, int] = {}
    for start in range(0, len(signs), _BLOCK):
        block = signs[start : start + _BLOCK]
        # [B, P]
        apart = np.zeros((len(block), len(signs)), dtype=np.int16)
        for half in (0, 1):
            apart += np.bitwise_count(np.bitwise_xor.outer(block[:, half], signs[:, half]))
        for first, differing in enumerate(apart, start):
            others = np.flatnonzero(differing <= _MOST_SIGNS)
            others = others[others > first]
            levels = np.abs(colours[others] - colours[first])
            for other in others[levels.mean(axis=1) <= _MOST_LEVELS].tolist():
                out.setdefault(other, first)
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
    same: dict[int, int] = {}
    for one in found:
        if one.trains is not None:
            same.update(dict.fromkeys(one.held, one.trains))
    like: dict[int, int] = {}
    other_way = [(second, first) for first, second in near]
    for first, second in [*near, *other_way]:
        trained = found[second].trains
        if trained is not None:
            like.update(dict.fromkeys(found[first].held, trained))
    close = [pair for pair in sorted(like.items()) if pair[0] not in same]
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
