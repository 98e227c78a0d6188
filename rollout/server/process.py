"""A vLLM server that this process starts and ends: its command, its environment, its log."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from conf.model import ServerConfig
from rlhf.process import distributed
from rollout.server.client import Server, ServerFault
from rollout.server.guard import ANY_CORE, AT_ONCE
from rollout.server.middleware import TOKEN_VARIABLE

GRACE_S = 10.0  # that a server gets to end before it is killed
_MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` looks for a package named vllm
_LOOK_S = 0.25  # between two looks at a server that starts
_SHOWN = 12  # last lines of a log in a message
# The launcher's variables, by which vLLM would take a server for one of the trainer's ranks, and
# those that an engine in this process sets or that would win over the configuration.
_UNSET = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_ERROR_FILE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_API_KEY",
    "VLLM_SERVER_DEV_MODE",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What every server of a run is started with."""

    model_path: str
    flags: Mapping[str, Any]  # vLLM's options, with underscores; True: a flag without a value
    server: ServerConfig
    token: str
    lora: bool = False
    handles: bool = False  # whether weights come as handles of a device's memory
    developer: bool = True  # vLLM's routes by which a trainer gives it weights

    def command(self, host: str, port: int) -> list[str]:
        python = self.server.python or sys.executable
        command = [python, "-m", _MODULE, "--model", self.model_path]
        given = {"host": host, "port": port, **self.flags}
        given["tensor_parallel_size"] = self.server.tensor_parallel
        given["data_parallel_size"] = self.server.data_parallel
        for name, value in given.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                command.append(flag)
            elif isinstance(value, list):
                command += [flag, *map(str, value)]
            elif value is not False and value is not None:
                command += [flag, str(value)]
        return command

    def environment(self, index: int) -> dict[str, str]:
        """The variables of server number `index`."""
        names = {name: value for name, value in os.environ.items() if name not in _UNSET}
        names |= {"VLLM_NO_USAGE_STATS": "1", TOKEN_VARIABLE: self.token}
        if self.developer:
            names["VLLM_SERVER_DEV_MODE"] = "1"
        if self.lora:
            names["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.handles:
            names["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # vLLM takes them as pickles
        if self.server.devices is not None:
            names["CUDA_VISIBLE_DEVICES"] = self.server.devices[index]
        return names | self._threads(index)

    def _threads(self, index: int) -> dict[str, str]:
        """Where a server's threads run, and how many there are of each copy of the model."""
        world = self.server.tensor_parallel * self.server.data_parallel
        if self.server.cores is None:
            share = max(1, distributed.cores() // (self.server.count * world))
            threads = self.server.threads or share
            return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        cores = core_list(self.server.cores[index])
        each = max(1, len(cores) // world)
        wanted = min(each, self.server.threads or each)
        parts = [cores[each * i : each * i + wanted] or cores[:wanted] for i in range(world)]
        bound = "|".join(",".join(map(str, part)) for part in parts)
        return {"VLLM_CPU_OMP_THREADS_BIND": bound, "OMP_NUM_THREADS": str(wanted)}


def core_list(text: str) -> list[int]:
    """``0-3,6`` -> [0, 1, 2, 3, 6]. Raises ValueError."""
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        named = range(int(first), int(last if dash else first) + 1)
        if not named:
            raise ValueError(f"{part} names no core")
        cores += named
    return cores


class Child:
    """A server's process, under a guard that ends it with this process."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        cores: Sequence[int] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """`log`: gets what it prints, behind what is there. `cores`: None: any."""
        self.log = log
        self._grace_s = grace_s
        log.parent.mkdir(parents=True, exist_ok=True)
        taken = ANY_CORE if cores is None else ",".join(map(str, cores))
        guard = [sys.executable, "-m", "rollout.server.guard"]
        guard += [str(os.getpid()), str(grace_s), taken]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*guard, *command],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for the trainer, which ends its servers
            )

    def server_pid(self) -> int:
        """The process that listens, or its guard's where the system does not tell."""
        guard = self._process.pid
        try:
            children = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
        except OSError:
            children = []
        return int(children[0]) if children else guard

    def is_running(self) -> bool:
        """Whether the server's process is there; it may hang all the same."""
        return self._process.poll() is None

    def tail(self) -> str:
        """The end of its log, for a message."""
        with self.log.open(encoding="utf-8", errors="replace") as file:
            lines = deque((line.strip() for line in file if line.strip()), _SHOWN)
        telling = [line for line in lines if "rror" in line] or list(lines)
        return shorten(" / ".join(telling[-2:]), 400, placeholder=" ...")

    def stop(self, *, at_once: bool = False) -> None:
        """End the server and all that it started, and wait for it. `at_once`: without time to end
        by itself.
        """
        told = self._process.stdin
        if told is not None and not told.closed:
            with contextlib.suppress(BrokenPipeError):
                told.write(AT_ONCE if at_once else b"")
                told.close()
        try:
            self._process.wait(3 * self._grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def wait_until_ready(
    server: Server, child: Child, limit_s: float, alive: Callable[[], None]
) -> None:
    """Return once the server answers. `alive` is called now and then. Raises ServerFault where its
    process ends or `limit_s` passes.
    """
    deadline = time.monotonic() + limit_s
    while True:
        alive()
        if not child.is_running():
            cause = f"it ended while it started ({child.tail()}; its log: {child.log})"
            raise ServerFault(server.url, cause)
        try:
            server.get("/health", limit_s=_LOOK_S * 8)
            server.longest()
            return
        except ServerFault as fault:
            last = fault.cause
        if time.monotonic() > deadline:
            cause = (
                f"it did not start within rollout.server.start_limit_s={limit_s:g} "
                f"({last}; its log: {child.log})"
            )
            raise ServerFault(server.url, cause)
        time.sleep(_LOOK_S)


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        taken.bind((host, 0))
        port: int = taken.getsockname()[1]
        return port


def is_free(host: str, port: int) -> bool:
    """Whether a server can listen there now."""
    try:
        with socket.create_server((host, port)):
            return True
    except OSError:
        return False


def new_token() -> str:
    return secrets.token_urlsafe(32)


@contextlib.contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
