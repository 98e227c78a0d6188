"""Where a run's servers come from: it starts them itself, or they are running already."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from conf.model import ServerConfig
from rlhf.process import supervision
from rlhf.process.files import write_json
from rollout.server.client import Server, ServerFault
from rollout.server.process import Child, Recipe, core_list, free_port, wait_until_ready

LOG = logging.getLogger("rollout.server")
HOST = "127.0.0.1"  # own servers listen where no other machine reaches them
PROBE_S = 60.0  # longest wait for one token of a server that does nothing else
_POLL_S = 1.0  # between two looks at a server that is away


@dataclass(frozen=True, slots=True)
class Connection:
    """How servers are reached."""

    token: str | None
    limit_s: float  # longest wait for an answer
    at_once: int  # requests that are open together at each

    def to(self, url: str) -> Server:
        return Server(url, self.token, limit_s=self.limit_s, at_once=self.at_once)


class RunningServers:
    """Servers that others started and restart."""

    def __init__(self, urls: Sequence[str], cfg: ServerConfig, connection: Connection) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._cfg, self._connection = cfg, connection

    def connect(self) -> list[Server]:
        return [self._connection.to(url) for url in self.urls]

    def again(self, url: str) -> Server:
        """A server that answers again, within the time that a start takes. Raises ServerFault."""
        server = self._connection.to(url)
        deadline = time.monotonic() + self._cfg.start_limit_s
        while True:
            try:
                server.probe(limit_s=PROBE_S)
                return server
            except ServerFault:
                if time.monotonic() > deadline:
                    server.close()
                    raise
            time.sleep(_POLL_S)

    def close(self) -> None:
        """They go on."""


class OwnServers:
    """Servers that are children of this process, each with a log and a description in `folder`."""

    def __init__(self, recipe: Recipe, folder: Path, connection: Connection) -> None:
        self._recipe, self._folder, self._connection = recipe, folder, connection
        count = recipe.server.count
        ports: list[int] = []
        while len(ports) < count:
            port = free_port(HOST)
            if port not in ports:
                ports.append(port)
        self.urls = [f"http://{HOST}:{port}" for port in ports]
        self._children: dict[str, Child] = {}
        self._restarts = dict.fromkeys(self.urls, 0)
        self._lock = threading.Lock()  # of the children: threads restart them
        self._closed = False

    def connect(self) -> list[Server]:
        """Start them all and wait for them. Raises ServerFault."""
        try:
            for url in self.urls:
                self._start(url)
            return [self._ready(url) for url in self.urls]
        except BaseException:
            self.close()
            raise

    def again(self, url: str) -> Server:
        """Restart a server, as often as rollout.server.restarts allows it. Raises ServerFault."""
        allowed = self._recipe.server.restarts
        while True:
            self._children[url].stop(at_once=True)
            if self._restarts[url] >= allowed:
                cause = f"it was restarted rollout.server.restarts={allowed} times"
                raise ServerFault(url, cause)
            self._restarts[url] += 1
            LOG.warning("restart %d of %d of %s", self._restarts[url], allowed, url)
            self._start(url)
            try:
                return self._ready(url)
            except ServerFault as fault:
                if self._closed:
                    raise
                LOG.warning("a rollout server does not start: %s", fault)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            children = list(self._children.values())
        for child in children:
            child.stop()

    def _start(self, url: str) -> None:
        index = self.urls.index(url)
        cores = self._recipe.server.cores
        port = urlsplit(url).port
        assert port is not None
        log = self._folder / f"{HOST}-{port}.log"
        with self._lock:
            if self._closed:
                raise ServerFault(url, "the run is over")
            self._children[url] = Child(
                self._recipe.command(HOST, port),
                self._recipe.environment(index),
                log,
                None if cores is None else core_list(cores[index]),
            )

    def _ready(self, url: str) -> Server:
        child, server = self._children[url], self._connection.to(url)
        wait_until_ready(server, child, self._recipe.server.start_limit_s, tell_progress)
        server.probe(limit_s=PROBE_S)
        describe(self._folder, url, child.server_pid(), self._recipe)
        return server


def tell_progress() -> None:
    """The phase goes on, where it is the main thread's."""
    if threading.current_thread() is threading.main_thread():
        supervision.alive()


def describe(folder: Path, url: str, pid: int, recipe: Recipe) -> None:
    """Write ``<host>-<port>.json``: what a server is and where."""
    parts = urlsplit(url)
    path = folder / f"{parts.hostname}-{parts.port}.json"
    folder.mkdir(parents=True, exist_ok=True)
    world = recipe.server.tensor_parallel * recipe.server.data_parallel
    dtype = recipe.flags["dtype"]
    write_json(path, {"url": url, "pid": pid, "dtype": dtype, "world_size": world})
