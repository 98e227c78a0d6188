"""A browser that came by the link, for the tests of the forms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1:7860"
ORIGIN = {"origin": f"http://{HOST}"}


def place_in(folder: Path, **values: Any) -> Any:
    """A place below `folder`."""
    from rlhf.board.app import Place

    runs, uploads = folder / "runs", folder / "uploads"
    runs.mkdir(exist_ok=True)
    uploads.mkdir(exist_ok=True)
    given: dict[str, Any] = {"upload_bytes": 1 << 20, "remote_code": False, **values}
    return Place(runs, uploads, **given)


def client_of(place: Any, pages: Sequence[Any]) -> Any:
    """Starlette's client, let in."""
    from starlette.testclient import TestClient

    from rlhf.board.app import create_app
    from rlhf.board.guard import Doors

    words: list[str] = []
    doors = Doors(announce=words.append)
    app = create_app(place, doors, [HOST], pages)
    made = TestClient(app, base_url=f"http://{HOST}", follow_redirects=False)
    assert made.get(f"/?token={doors.word}").status_code == 303
    return made


def post(client: Any, path: str, data: Mapping[str, Any], **headers: str) -> Any:
    """A form of this page, sent."""
    return client.post(path, data=dict(data), headers={**ORIGIN, **headers})
