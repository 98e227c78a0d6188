"""A judge over HTTP whose tastes are known: chat completions of OpenAI's shape on loopback."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], "str | tuple[int, dict[str, str], str] | None"]
SCALE = 300.0  # characters


@contextmanager
def judge_server(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the requests that came. `reply` gets the question and gives the message's
    content (None: null, cut), or a status with headers and a body.
    """
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append({"path": self.path, "token": self.headers.get("authorization"), **body})
            said = reply(body["messages"][-1]["content"])
            status, headers, text = 200, {"content-type": "application/json"}, ""
            if isinstance(said, tuple):
                status, headers, text = said
            else:
                choice = {"message": {"content": said}, "finish_reason": "stop"}
                if said is None:
                    choice["finish_reason"] = "length"
                text = json.dumps({"choices": [choice]})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answers_in(question: str) -> tuple[str, str]:
    """The two answers in a question of the default template, in their order."""
    found = re.search(
        r"\[Answer A\]\n(.*)\n\[End of answer A\]\n\n\[Answer B\]\n(.*)\n\[End of answer B\]",
        question,
        re.DOTALL,
    )
    assert found is not None
    return found[1], found[2]


def quality(answer: str) -> float:
    """The log-odds that an answer of these tests states."""
    return float(answer.split(maxsplit=1)[0])


def biased(place: float, length: float) -> Callable[[str], str]:
    """A judge that chooses the first answer with the log-odds of the answers' qualities, plus
    `place`, plus `length` for each SCALE characters more, flattening out. Its dice are numbers of
    the prompt that fill (0, 1) evenly, others for each order.
    """

    def reply(question: str) -> str:
        first, second = answers_in(question)
        number = int(re.search(r"prompt (\d+)", question)[1])  # type: ignore[index]
        longer = math.tanh((len(first) - len(second)) / SCALE)
        odds = quality(first) - quality(second) + place + length * longer
        turned = first.split()[1] > second.split()[1]
        dice = (number * 0.6180339887 + 0.5 * turned) % 1
        return "[[A]]" if dice < 1 / (1 + math.exp(-odds)) else "[[B]]"

    return reply
