"""What stage=gateway adds to a request: the time of a stand-in server by itself, and through the
gateway, one request at a time on kept connections.

    python -m benchmarks.gateway                  400 requests each; fails above 10 ms
    python -m benchmarks.gateway --requests 50

The gateway is the real command in a process of its own, with its store on the disk of --folder.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.served import serving
from benchmarks.shared import environment, module

MOST_MS = 10.0
TOKEN = "key-of-a-harness"
_VARIABLE = "GATEWAY_KEY"
_MARK = "OPENAI_BASE_URL="
_START_S = 120.0


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway in a process of its own."""

    url: str  # without /v1
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def gateway(
    folder: Path, arms: Mapping[str, Mapping[str, Any]], *options: str
) -> Iterator[Running]:
    """stage=gateway with run.dir=`folder` and run.name=mine, ended at the end. Raises RuntimeError
    where it does not start.
    """
    command = module("rlhf", "stage=gateway", f"run.dir={folder}", "run.name=mine", "stage.port=0")
    command += [f"stage.token_env={_VARIABLE}", f"stage.operator_env={_VARIABLE}", *options]
    for name, fields in arms.items():
        command += [f"+stage.arms.{name}.{key}={value}" for key, value in fields.items()]
    log = folder / "gateway.log"  # a file: nobody reads a pipe while the gateway serves
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(extra={_VARIABLE: TOKEN}),
        )
    try:
        yield Running(_address(process, log), process)
    finally:
        process.terminate()
        process.wait(60)


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    until = time.monotonic() + _START_S
    shown = ""
    while _MARK not in shown or not shown.split(_MARK)[1].count("\n"):
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the gateway did not start: {shown}")
        time.sleep(0.1)
        shown = log.read_text(encoding="utf-8")
    return shown.split(_MARK)[1].split()[0].removesuffix("/v1")


def median_ms(url: str, body: Mapping[str, Any], count: int) -> float:
    """The median time of a request, in milliseconds; the first ten don't count."""
    taken = []
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
        for number in range(count + 10):
            began = time.perf_counter()
            answer = client.post("/v1/chat/completions", json=dict(body))
            taken.append(time.perf_counter() - began)
            assert answer.status_code == 200, f"request {number}: {answer.text}"
    return 1000 * statistics.median(taken[10:])


def measure(folder: Path, count: int) -> tuple[float, float]:
    """Medians in milliseconds: the server by itself, and through the gateway."""
    with serving({"m": lambda _: ["an answer of some words " * 20]}) as url:
        asked = [{"role": "user", "content": "a question of some words " * 20}]
        with gateway(folder, {"a": {"url": url, "model": "m"}}) as running:
            direct = median_ms(url, {"model": "m", "messages": asked}, count)
            body = {"model": "mine", "messages": asked, "user": "ann"}
            return direct, median_ms(running.url, body, count)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the gateway adds less than MOST_MS."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=None, help="of the run; a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as made:
        direct, through = measure(options.folder or Path(made), options.requests)
    added = through - direct
    print(
        f"median of {options.requests} requests: {direct:.2f} ms by itself, {through:.2f} ms "
        f"through the gateway: {added:.2f} ms added (at most {MOST_MS:g})"
    )
    return 0 if added < MOST_MS else 1


if __name__ == "__main__":
    sys.exit(main())
