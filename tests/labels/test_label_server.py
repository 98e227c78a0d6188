"""What a Label Studio server may answer, by a small one of the tests' own; a real one is in
test_labelstudio_server.py.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conf.choices import LabelKind
from rlhf.labels import server
from rlhf.types import UserError
from tests.labels.label_exports import export, task

pytest.importorskip("label_studio_sdk")
TOKEN = "secret-token-of-ours"


@contextmanager
def answering(status: int, body: str) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything alike: its address, and what it was asked ("METHOD path
    authorization").
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            asked.append(f"{self.command} {self.path} {self.headers['Authorization']}")
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", asked
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            401,
            json.dumps({"detail": f"bad {TOKEN}"}),
            r"refuses the access token \(bad \[token\]\).*personal access token",
        ),
        (403, json.dumps({"detail": "no"}), r"the token's user.*\(no\)"),
        (404, json.dumps({"detail": "none"}), r"no such project.*\(none\).*label\.project"),
        (
            400,
            json.dumps({"validation_errors": {"title": ["too long"]}}),
            r"the server answers 400: .*too long",
        ),
        (
            200,
            "<html>",
            r"Label Studio server.*: <html>",
        ),
    ],
)
def test_what_is_refused(status: int, body: str, message: str, tmp_path: Path) -> None:
    """As a message with the address and the remedy, without the token, and without a traceback that
    holds it.
    """
    out = export(LabelKind.pair, [task(1, "p", ["a", "b"])])
    with answering(status, body) as (url, asked):
        for call in (
            lambda: server.push(out, url=f"{url}/under/a/path/", token=TOKEN),
            lambda: server.pull(url=f"{url}/under/a/path", token=TOKEN, project=7, folder=tmp_path),
        ):
            with pytest.raises(UserError, match=f"(?is)label.url={url}.*{message}") as error:
                call()
            assert (
                TOKEN not in str(error.value)
                and error.value.__suppress_context__
                and error.value.__cause__ is None
            )
    assert (
        all(" /under/a/path/api/" in one and one.endswith(f"Token {TOKEN}") for one in asked)
        and len(asked) == 2
    )
    assert list(tmp_path.iterdir()) == []


def test_nobody_there(tmp_path: Path) -> None:
    with answering(200, "") as (url, _):
        pass
    with pytest.raises(UserError, match="the server can't be reached"):
        server.pull(url=url, token=TOKEN, project=1, folder=tmp_path)
    with pytest.raises(UserError, match=r"no access token.*label\.token_env"):
        server.pull(url=url, token=" ", project=1, folder=tmp_path)
    with pytest.raises(UserError, match=r"label\.url=nowhere"):
        server.pull(url="nowhere", token=TOKEN, project=1, folder=tmp_path)
