"""Two hosts for benchmarks.chaos: network namespaces with a link between them that can be cut
(Linux).

The run is on the near host, a vLLM server on the far one; neither reaches anything else. The hosts
end with the harness.
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared import environment, module

NEAR, FAR = "chaos-near", "chaos-far"  # the ends of the link
NEAR_ADDRESS, FAR_ADDRESS = "10.77.0.1", "10.77.0.2"
PORT = 8200
TOKEN = "RLHF_CHAOS_TOKEN"  # variable with the bearer token
_START_S = 240.0
_SECRET = "chaos"


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace, by the process that holds it."""

    process: int

    def prefix(self) -> list[str]:
        """Of a command that runs there."""
        return ["nsenter", f"--net=/proc/{self.process}/ns/net"]

    def run(self, *command: str) -> None:
        """Raises CalledProcessError, with what the command said."""
        done = [*self.prefix(), *command]
        subprocess.run(done, check=True, capture_output=True, text=True, timeout=30)


@dataclass(frozen=True, slots=True)
class Hosts:
    """Both ends of the link."""

    near: Host
    far: Host

    def join(self) -> None:
        """Make the link."""
        for host in (self.near, self.far):
            host.run("ip", "link", "set", "lo", "up")
        peer = ["peer", "name", FAR, "netns", str(self.far.process)]
        self.near.run("ip", "link", "add", NEAR, "type", "veth", *peer)
        for host, name, address in (
            (self.near, NEAR, NEAR_ADDRESS),
            (self.far, FAR, FAR_ADDRESS),
        ):
            host.run("ip", "address", "add", f"{address}/24", "dev", name)
            host.run("ip", "link", "set", name, "up")

    def cut(self) -> None:
        self.near.run("ip", "link", "set", NEAR, "down")

    def restore(self) -> None:
        self.near.run("ip", "link", "set", NEAR, "up")


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """Two hosts with a link while inside. Raises OSError or SubprocessError where this machine
    allows none.
    """
    holders = []
    try:
        for _ in range(2):
            holder = subprocess.Popen(
                ["unshare", "-n", "sh", "-c", "echo in; exec sleep infinity"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            holders.append(holder)
            assert holder.stdout is not None and holder.stderr is not None
            if not holder.stdout.readline():
                raise OSError(f"unshare -n: {holder.stderr.read().strip()}")
        both = Hosts(*(Host(holder.pid) for holder in holders))
        both.join()
        yield both
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def why_not() -> str:
    """Why no two hosts can be made here; nothing where they can."""
    try:
        with hosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def run_options() -> list[str]:
    """Of a run on the near host that uses the server on the far one."""
    return [
        f"rollout.servers=['http://{FAR_ADDRESS}:{PORT}']",
        f"rollout.server.token_env={TOKEN}",
        # it runs already: a server that is away so long is lost
        "rollout.server.start_limit_s=60",
    ]


def variables() -> dict[str, str]:
    """The environment of both programs."""
    return {TOKEN: _SECRET}


@contextlib.contextmanager
def served(host: Host, model: Path, options: Sequence[str], folder: Path) -> Iterator[None]:
    """A vLLM server of `model` on `host` while inside. Raises RuntimeError where it does not
    start.
    """
    command = module(
        "rlhf",
        "stage=serve_rollout",
        f"model.path={model}",
        f"run.dir={folder}",
        "run.name=served",
        "run.overwrite=true",
        f"stage.host={FAR_ADDRESS}",
        f"stage.port={PORT}",
        f"rollout.server.token_env={TOKEN}",
        *options,
    )
    log = folder / "served.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*host.prefix(), *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(extra=variables()),
        )
    try:
        _wait(host, process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(host: Host, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers."""
    url = f"http://{FAR_ADDRESS}:{PORT}/health"
    look = f"import urllib.request as r; r.urlopen({url!r}, timeout=2)"
    command = [*host.prefix(), *module("")[:1], "-S", "-c", look]
    deadline = time.monotonic() + _START_S
    while subprocess.run(command, check=False, capture_output=True).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise RuntimeError(f"the server on the far host did not start: {tail}")
        time.sleep(0.5)
