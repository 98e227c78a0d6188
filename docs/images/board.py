"""Draws docs/images/board/*.png: every page of stage=board, in English and Chinese, in Chromium.

PYTHONPATH=. python docs/images/board.py
"""

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from tests.board.browsing import Visitor, browser, served
from tests.board.furnished import furnish
from tests.board.test_browser import PAGES, dry_run

HERE = Path(__file__).resolve().parent
COLOURS = 64
SIZE = {"width": 1100, "height": 760}
SCROLLED = {"tokens": 620, "stage": 420}  # pixels to scroll down first


def main(names: list[str]) -> None:
    """The pages of these names, or all: a palette picture each."""
    folder = HERE / "board"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="board-") as place, browser() as running:
        runs = furnish(Path(place))
        model = runs / "demo" / "sft" / "model"
        with served(runs) as board:
            for language in ("en", "zh"):
                visitor = Visitor(running, board, language, viewport=SIZE)
                for name, path in PAGES.items():
                    if names and name not in names:
                        continue
                    page = visitor.open(path.format(model=model))
                    page.evaluate(f"scrollTo(0, {SCROLLED.get(name, 0)})")
                    draw(page, folder / f"{name}.{language}.png")
                if not names or "checked" in names:
                    draw(dry_run(visitor, runs, "looked"), folder / f"checked.{language}.png")
                visitor.close()


def draw(page: Any, path: Path) -> None:
    """A palette picture of what the window shows."""
    picture = Image.open(io.BytesIO(page.screenshot()))
    small = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=COLOURS)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
