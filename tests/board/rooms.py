"""A board over a folder, for tests that ask its pages without a browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOST = "127.0.0.1:7860"
ORIGIN = {"origin": f"http://{HOST}"}
LARGEST = 1 << 16  # bytes of an upload


@contextmanager
def board(folder: Path, largest: int = LARGEST, *, models: Path | None = None) -> Iterator[Any]:
    """A client whose browser is let in. models: a further folder that the pages may name."""
    from starlette.testclient import TestClient

    from rlhf.board.app import Place, create_app
    from rlhf.board.guard import Doors
    from rlhf.board.pages import PAGES

    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    folders = () if models is None else (models,)
    place = Place(runs, folder / "uploads", largest, False, folders=folders)
    doors = Doors("word", str)
    app = create_app(place, doors, [HOST], PAGES)
    with TestClient(
        app, base_url=f"http://{HOST}", follow_redirects=False, raise_server_exceptions=False
    ) as client:
        client.get("/?token=word")
        client.headers.update(ORIGIN)
        yield client
