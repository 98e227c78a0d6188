"""A server with vLLM's routes that needs no model: what it writes follows from the seed alone, and
it fails on demand. In a thread of a test, or as a process that takes vLLM's options:

    python -m tests.rollout.server.fake_vllm ... --host HOST --port PORT --max-model-len N
"""

import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "token-of-the-test"
VOCABULARY = 300
Change = Callable[[dict[str, Any]], Any]


def interpreter(folder: Path, monkeypatch: Any) -> Path:
    """A program for rollout.server.python that starts this server in vLLM's place; it leaves what
    it notes in `folder`.
    """
    path = folder / "python"
    fake = f'exec {sys.executable} -m tests.rollout.server.fake_vllm "$@"'
    path.write_text(f"#!/bin/sh\n{fake}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("FAKE_FOLDER", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return path


@dataclass
class Fake:
    """What a server holds, and how it answers."""

    token: str | None = TOKEN
    longest: int = 64
    version: str = "default"
    adapters: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)  # routes, and methods of the workers
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of requests to write
    change: Change | None = None  # of a response
    refused: dict[str, int] = field(default_factory=dict)  # route or method -> status
    delay_s: float = 0.0  # of each response
    hangs: bool = False
    gone: threading.Event = field(default_factory=threading.Event)  # closes what is open
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, body: dict[str, Any]) -> Any:
        """A response of tokens drawn by the seed."""
        params = body["sampling_params"]
        prompt = body["token_ids"]
        if "logprob_token_ids" in params:
            return self._known(prompt, params["logprob_token_ids"][0])
        digest = hashlib.blake2b(f"{params.get('seed')}/{prompt}".encode()).digest()
        tokens = [3 + byte for byte in digest[: params["max_tokens"]]]
        content = [
            {"token_id": token, "logprob": _logprob(token), "top_logprobs": []} for token in tokens
        ]
        versions = [{"version": self.version, "start": 0, "end": len(tokens)}]
        choice = {
            "index": 0,
            "token_ids": tokens,
            "logprobs": {"content": content},
            "finish_reason": "length",
            "weight_versions": versions,
        }
        answer = {"choices": [choice]}
        return answer if self.change is None else self.change(answer)

    def _known(self, prompt: list[int], last: int) -> Any:
        positions = [None, *({str(t): {"logprob": _logprob(t)}} for t in prompt[1:])]
        told = [{"token_id": t, "logprob": _logprob(t)} for t in (0, last)]
        drawn = {"token_id": 0, "logprob": _logprob(0), "top_logprobs": told}
        choice = {"token_ids": [0], "logprobs": {"content": [drawn]}, "finish_reason": "length"}
        return {"prompt_logprobs": positions, "choices": [choice]}

    def method(self, name: str, given: dict[str, Any]) -> list[Any]:
        """A method of the worker extension, in one worker."""
        self.calls.append(name)
        if name == "rlhf_prepare":
            return [{"workers": 1, "has_head": True}]
        if name == "rlhf_checksums":
            return [self.checksums]
        return [None]


def _logprob(token: int) -> float:
    return -math.log(VOCABULARY) - token / 1000


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        size = int(self.headers.get("content-length", "0"))
        self._answer(json.loads(self.rfile.read(size) or b"{}"))

    def _answer(self, body: dict[str, Any]) -> None:
        fake, route = self.fake, self.path.partition("?")[0]
        if fake.hangs and route != "/health":
            fake.gone.wait(30)
        given = self.headers.get("authorization")
        if fake.token is not None and given != f"Bearer {fake.token}" and route != "/health":
            self._send(401, {"error": "no token"})
            return
        name = body.get("method", route)
        fake.calls.append(route)
        if name in fake.refused:
            self._send(fake.refused[name], {"error": "refused by the test"})
            return
        answer = self._routed(route, body)
        if fake.gone.is_set():
            self.close_connection = True
            self.connection.close()
            return
        self._send(404 if answer is None else 200, answer)

    def _routed(self, route: str, body: dict[str, Any]) -> Any:
        fake = self.fake
        if route == "/inference/v1/generate":
            if body.get("model") is not None and body["model"] not in fake.adapters:
                return None
            with fake.lock:
                fake.asked.append(body)
            fake.gone.wait(fake.delay_s)
            return fake.write(body)
        if route == "/v1/models":
            models = [{"id": "base", "max_model_len": fake.longest}]
            return {"data": models + [{"id": name} for name in fake.adapters]}
        if route == "/weight_info":
            return {"weight_version": fake.version}
        if route == "/get_world_size":
            return {"world_size": 1}
        if route == "/update_weight_version":
            fake.version = body["new_version"]
        if route == "/collective_rpc":
            return {"results": fake.method(body["method"], body.get("kwargs", {}))}
        if route == "/v1/load_lora_adapter":
            if body["lora_name"] in fake.adapters:
                return None
            assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
            fake.adapters.append(body["lora_name"])
            return "Success"
        if route == "/v1/unload_lora_adapter":
            fake.adapters.remove(body["lora_name"])
        return {}

    def _send(self, status: int, answer: Any) -> None:
        is_text = isinstance(answer, str)
        data = answer.encode() if is_text else json.dumps(answer).encode()
        self.send_response(status)
        if not is_text:
            self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that went away."""


class Running:
    """A fake server in threads of this process; `stop` and `start` again at the same address."""

    def __init__(self, fake: Fake, host: str = "127.0.0.1", port: int = 0) -> None:
        self.fake = fake
        self._host, self._port = host, port
        self.start()

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def start(self) -> None:
        self.fake.gone.clear()
        handler = type("Handler", (_Handler,), {"fake": self.fake})
        self._server = _Listening((self._host, self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """As a process that is killed: what is open breaks."""
        self.fake.gone.set()
        self._server.shutdown()
        self._server.server_close()


def _main(arguments: list[str]) -> None:
    """A server of its own, which writes what it was started with beside its log."""
    given = dict(itertools.pairwise(arguments))
    fake = Fake(os.environ.get("RLHF_ROLLOUT_TOKEN"), int(given["--max-model-len"]))
    time.sleep(float(os.environ.get("FAKE_START_S", "0")))
    print("started", flush=True)
    if os.environ.get("FAKE_FAILS"):
        sys.exit("RuntimeError: no memory on this device")
    server = Running(fake, given["--host"], int(given["--port"]))
    Path(os.environ["FAKE_FOLDER"], given["--port"]).write_text(
        json.dumps({"pid": os.getpid(), "arguments": arguments, "url": server.url})
    )
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    _main(sys.argv[1:])
