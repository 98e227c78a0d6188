"""Stands in for the interpreter that runs ``-m rlhf``: a rank or a rollout server that does what
the environment says, and leaves a record of how it was started.

STAND_IN_OUT: directory of the records, started-<name>.json and what befell each.
STAND_IN_RANK_<n>: what rank n does: ``exit CODE``, ``fail MESSAGE``, ``wait`` (for a signal; then
it saves and ends by it), ``deaf`` (ignores SIGTERM), ``orphan`` (fails and leaves a child behind),
``ask`` (each server once), ``generate`` (asks the first server again and again, by the client that
the trainer uses, and notes each answer in answers-<n>.jsonl, until there is a file ``stop``).
Without it a rank exits with 0.
STAND_IN_SERVER: ``refuse`` exits with 3 at once.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType

OUT = Path(os.environ.get("STAND_IN_OUT", "."))
REQUEST_LIMIT_S = 1.0
_KEPT = ("RANK", "MASTER", "WORLD", "LOCAL", "CUDA_VISIBLE", "RLHF_", "SLURM_", "MARK")


def note(name: str, text: str = "") -> None:
    (OUT / name).write_text(text, encoding="utf-8")


def started(name: str) -> None:
    """Record how this process was started."""
    kept = {k: v for k, v in os.environ.items() if k.startswith(_KEPT)}
    record = {
        "arguments": sys.argv[1:],
        "environment": kept,
        "cores": sorted(os.sched_getaffinity(0)),
        "pid": os.getpid(),
        "folder": os.getcwd(),
    }
    part = OUT / f"started-{name}.part"
    part.write_text(json.dumps(record), encoding="utf-8")
    part.rename(OUT / f"started-{name}.json")


def options() -> dict[str, str]:
    pairs = [argument.partition("=") for argument in sys.argv[1:]]
    return {key: value for key, equals, value in pairs if equals}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        token = f"Bearer {os.environ['RLHF_ROLLOUT_TOKEN']}"
        allowed = self.path == "/health" or self.headers.get("Authorization") == token
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(b"answer" if allowed else b"no")

    def do_POST(self) -> None:
        """vLLM's answer of three tokens, to whatever prompt."""
        self.rfile.read(int(self.headers["Content-Length"]))
        tokens = [5, 6, 7]
        content = [{"token_id": token, "logprob": -1.0} for token in tokens]
        choice = {
            "token_ids": tokens,
            "finish_reason": "stop",
            "logprobs": {"content": content},
            "weight_versions": [{"start": 0, "end": 3, "version": "1"}],
        }
        body = json.dumps({"choices": [choice]}).encode()
        token = f"Bearer {os.environ['RLHF_ROLLOUT_TOKEN']}"
        self.send_response(200 if self.headers.get("Authorization") == token else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        print(format % args, flush=True)


def serve() -> None:
    given = options()
    host, port = given["stage.host"], int(given["stage.port"])
    started(f"server-{port}-{os.getpid()}")
    if os.environ.get("STAND_IN_SERVER") == "refuse":
        print("no model there", flush=True)
        sys.exit(3)
    ThreadingHTTPServer((host, port), Handler).serve_forever()


def ask() -> None:
    """Ask each server of rollout.servers with the token."""
    for url in options()["rollout.servers"].strip("[]").split(","):
        token = os.environ["RLHF_ROLLOUT_TOKEN"]
        request = urllib.request.Request(f"{url}/v1", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            note(f"asked-{os.environ['RANK']}-{url.rpartition(':')[2]}", response.read().decode())


def generate() -> None:
    """Ask the first server until told to stop; each answer, or why there was none, is a line."""
    from rollout.server.client import Request, Server, ServerFault

    url = options()["rollout.servers"].strip("[]").split(",")[0]
    server = Server(url, os.environ["RLHF_ROLLOUT_TOKEN"], limit_s=REQUEST_LIMIT_S)
    path = OUT / f"answers-{os.environ['RANK']}.jsonl"
    while not (OUT / "stop").exists():
        began, fault, tokens = time.monotonic(), "", []
        try:
            tokens = server.write(Request([1, 2], {})).token_ids
        except ServerFault as error:
            fault = str(error)
        line = {"took_s": time.monotonic() - began, "fault": fault, "tokens": tokens}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(0.1)
    server.close()


def fail(message: str) -> None:
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    path.write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    sys.exit(1)


def save_and_end(number: int, frame: FrameType | None) -> None:
    time.sleep(0.2)
    note(f"saved-{os.environ['RANK']}", signal.Signals(number).name)
    sys.exit(128 + number)


def rank() -> None:
    number = os.environ["RANK"]
    action, _, rest = os.environ.get(f"STAND_IN_RANK_{number}", "exit 0").partition(" ")
    if action == "wait":
        signal.signal(signal.SIGTERM, save_and_end)
        signal.signal(signal.SIGINT, save_and_end)
    if action == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started(f"rank-{number}")
    if action == "exit":
        sys.exit(int(rest))
    if action == "fail":
        fail(rest)
    if action == "ask":
        ask()
        return
    if action == "generate":
        generate()
        return
    if action == "orphan":
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note("orphan", str(left.pid))
        sys.exit(1)
    time.sleep(600)


if __name__ == "__main__":
    if options().get("stage") == "serve_rollout":
        serve()
    else:
        rank()
