"""A server in OpenAI's format for tiny models, by transformers, for harnesses: starting vLLM for a
model of a few layers takes longer than all that is asked of it here.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = Callable[[Mapping[str, Any]], list[str]]  # a request's body -> its choices


class Models:
    """Models by the names that requests give. More can be added while it serves."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}

    def add(self, name: str, folder: Path, most_tokens: int) -> None:
        """A model's directory, whole weights."""
        self.answers[name] = generator(folder, most_tokens)


def generator(folder: Path, most_tokens: int) -> Answer:
    """Samples answers of at most so many tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    lock = threading.Lock()  # one core: two at once would only wait for each other

    def answer(body: Mapping[str, Any]) -> list[str]:
        count = int(body.get("n", 1))
        prompt = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with lock, torch.no_grad():
            out = model.generate(
                **prompt, do_sample=True, max_new_tokens=most_tokens, num_return_sequences=count
            )
        new = out[:, prompt["input_ids"].shape[1] :]
        texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    return answer


@contextlib.contextmanager
def serving(answers: Mapping[str, Answer]) -> Iterator[str]:
    """Serve them on a free port of this machine; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": name} for name in answers]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = answers.get(body["model"])
            if answer is None:
                self._send(404, {"error": f"no model {body['model']}"})
                return
            choices = []
            for index, text in enumerate(answer(body)):
                message = {"role": "assistant", "content": text}
                choices.append({"index": index, "message": message, "finish_reason": "stop"})
            self._send(200, {"id": "served", "model": body["model"], "choices": choices})

        def _send(self, status: int, content: Mapping[str, Any]) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
