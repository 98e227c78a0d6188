"""A real Label Studio server of the tests' own: SQLite in a temporary directory, loopback only,
stopped by its process id.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START = 600.0  # seconds: it makes its database first, 85 s on an idle machine
OWNER = "owner@example.com"


@dataclass
class Person:
    """Somebody who is logged in, as a browser is: by session, with the form token in every request
    that changes something.
    """

    http: httpx.Client

    def send(self, path: str, body: Any = None) -> Any:
        """What the server answers. Raises httpx.HTTPStatusError."""
        headers = {
            "X-CSRFToken": self.http.cookies["csrftoken"],
            "Referer": str(self.http.base_url),
        }
        answer = self.http.post(path, json=body, headers=headers)
        answer.raise_for_status()
        return answer.json()

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        answer.raise_for_status()
        return answer.json()

    def annotate(self, task: int, project: int, results: list[dict[str, Any]], **more: Any) -> int:
        """Submit an annotation; its number."""
        body = {"result": results, "lead_time": 4.25, "was_cancelled": False} | more
        return int(self.send(f"/api/tasks/{task}/annotations/?project={project}", body)["id"])


@dataclass
class Site:
    """A running server and its owner."""

    url: str
    password: str
    process: subprocess.Popen[bytes]
    log: Path
    started_s: float = 0.0
    people: list[httpx.Client] = field(default_factory=list)
    token: str = ""
    owner: Person = field(init=False)

    def enter(self, path: str, email: str, password: str) -> Person:
        """Log in, or sign up with an invitation's path."""
        http = httpx.Client(base_url=self.url, follow_redirects=True, timeout=120)
        self.people.append(http)
        http.get(path)
        form = {
            "email": email,
            "password": password,
            "csrfmiddlewaretoken": http.cookies["csrftoken"],
        }
        http.post(path, data=form, headers={"Referer": self.url + path}).raise_for_status()
        person = Person(http)
        assert person.get("/api/current-user/whoami")["email"] == email
        return person

    def invite(self, email: str) -> Person:
        """A second annotator, who signs up."""
        return self.enter(
            self.owner.get("/api/invite")["invite_url"].removeprefix(self.url),
            email,
            secrets.token_urlsafe(),
        )

    def numbers(self, project: int) -> dict[str, int]:
        """The tasks' numbers on the server by the ids that they were exported with."""
        return {
            task["data"]["pair_id"]: task["id"]
            for task in self.owner.get(f"/api/tasks?project={project}&page_size=1000")["tasks"]
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Linux: the server is told to end when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def running(program: str, folder: Path) -> Iterator[Site]:
    """A server until the block ends, however it ends. It calls nobody: no telemetry, no crash
    reports, no look-up of versions.
    """
    port, password = _free_port(), secrets.token_urlsafe()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"),
        "LABEL_STUDIO_USERNAME": OWNER,
        "LABEL_STUDIO_PASSWORD": password,
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "PYTHONUNBUFFERED": "1",
    }
    (folder / "data").mkdir()
    log = folder / "server.log"
    begin = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)],
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,  # noqa: PLW1509
        )
    site = Site(f"http://127.0.0.1:{port}", password, process, log)
    try:
        _await_health(site, begin)
        site.started_s = time.monotonic() - begin
        site.owner = site.enter("/user/login", OWNER, password)
        site.token = site.owner.send("/api/token/")["token"]
        yield site
    finally:
        for http in site.people:
            http.close()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(site: Site, begin: float) -> None:
    while time.monotonic() - begin < START:
        if site.process.poll() is not None:
            raise RuntimeError(
                f"the server ended with {site.process.returncode}:\n{site.log.read_text()[-3000:]}"
            )
        try:
            if httpx.get(site.url + "/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise RuntimeError(
        f"the server did not come up in {START:.0f} s:\n{site.log.read_text()[-3000:]}"
    )
