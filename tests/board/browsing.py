"""A real board in a process of its own, and a browser that looks at it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which(os.environ.get("CHROMIUM") or "chromium")
NO_CHROMIUM = "no Chromium: install Debian's package chromium, or name a program with CHROMIUM"
ROOT = Path(__file__).resolve().parents[2]
_QUIET = [
    f"--disable-{name}"
    for name in ("gpu", "quic", "background-networking", "component-update", "sync")
]
_LINK = re.compile(r"board: (http://\S+)/\?token=(\S+)")
_WORD = "BOARD_TEST_WORD"


class Served:
    """A board: its address, the link that lets a browser in, its process."""

    def __init__(self, process: subprocess.Popen[str], url: str, word: str, ready_s: float) -> None:
        self.process, self.url, self.ready_s = process, url, ready_s
        self.link = f"{url}/?token={word}"


@contextmanager
def served(runs: Path, *options: str) -> Iterator[Served]:
    """A board over `runs`, until the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), _WORD: "word"}
    command = [sys.executable, "-m", "rlhf", "stage=board", "stage.port=0"]
    command += [f"run.dir={runs}", f"stage.token_env={_WORD}", *options]
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            match = _LINK.search(line)
            if match is not None:
                yield Served(process, match[1], "word", time.monotonic() - start)
                return
        raise AssertionError("".join(said))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--no-first-run", *_QUIET]
        )
        yield running
        running.close()


class Visitor:
    """A page of a browser that was let in. `noise`: what it should not have done: messages on the
    console (violations of the policy are there), errors, requests to another host.
    """

    def __init__(self, browser: Any, board: Served, language: str = "en", **options: Any) -> None:
        self.board = board
        size = {"viewport": {"width": 1280, "height": 900}}
        self.context = browser.new_context(**size | options)
        self.context.add_cookies([{"name": "board_language", "value": language, "url": board.url}])
        self.context.set_default_timeout(20_000)
        self.noise: list[str] = []
        self.page = self.context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.noise.append(f"error: {error}"))
        self.page.on("request", self._asked)
        self.page.goto(board.link)

    def _heard(self, message: Any) -> None:
        expected = "status of 4" in message.text  # a refusal is told so, too
        if not expected:
            self.noise.append(f"console: {message.text}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.board.url + "/", "blob:", "data:")):
            self.noise.append(f"request: {request.url}")

    def open(self, path: str) -> Any:
        """The page at a path of the board."""
        self.page.goto(self.board.url + path)
        return self.page

    def close(self) -> None:
        """Leave."""
        self.context.close()


def violations(page: Any) -> list[str]:
    """What axe-core finds, a line each."""
    script = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(script + "\n;0")
    found = page.evaluate("axe.run()")
    return [
        f"{page.url}: {rule['id']}: {node['html'][:200]}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]
