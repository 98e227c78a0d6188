"""Two hosts as network namespaces of this machine, joined by a link that can be cut and delayed.
They need root, iproute2 and /dev/net/tun.

The link is a pair of TUN devices with a thread between them that passes packets on: a pair of veth
devices can be delayed by the kernel's netem alone, which not every kernel has, and one that is set
down is noticed at once, other than a cable that is cut somewhere.
"""

import contextlib
import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

DEVICE = "link0"  # the link's end in each host
_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_MTU = 9000


def ip(*words: str) -> None:
    """A command of iproute2. Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with an address of its own."""

    name: str
    address: str

    @property
    def enter(self) -> list[str]:
        """What stands before a command that runs on the host."""
        return ["ip", "netns", "exec", self.name]


@dataclass(slots=True)
class Link:
    """Passes packets between two TUN devices, late or not at all."""

    ends: tuple[int, int]  # file descriptors
    delay_s: float = 0.0
    is_cut: bool = False
    _waiting: list[tuple[float, int, int, bytes]] = field(default_factory=list)

    def run(self, stop: int) -> None:
        """Pass packets on until the file descriptor `stop` can be read."""
        number = 0
        first, second = self.ends
        to = {first: second, second: first}
        while True:
            left = None
            if self._waiting:
                left = max(0.0, self._waiting[0][0] - time.monotonic())
            readable, _, _ = select.select([*self.ends, stop], [], [], left)
            if stop in readable:
                return
            for end in readable:
                packet = os.read(end, _MTU + 100)
                number += 1
                if not self.is_cut:
                    due = time.monotonic() + self.delay_s
                    heapq.heappush(self._waiting, (due, number, to[end], packet))
            self._deliver()

    def _deliver(self) -> None:
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(self._waiting)
            with contextlib.suppress(OSError):  # the kernel refuses what came from before a cut
                os.write(end, packet)


@dataclass(frozen=True, slots=True)
class Hosts:
    """Two hosts and their link."""

    first: Host
    second: Host
    link: Link


@contextlib.contextmanager
def _namespace(host: Host) -> Iterator[None]:
    ip("netns", "add", host.name)
    try:
        ip("-n", host.name, "link", "set", "lo", "up")
        yield
    finally:
        ip("netns", "del", host.name)


@contextlib.contextmanager
def _device(host: Host) -> Iterator[int]:
    """The host's end of the link; its packets are read from and written to the descriptor."""
    end = os.open(_TUN, os.O_RDWR)
    try:
        name = f"rlhf{end}"
        request = struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(end, _TUNSETIFF, request)
        ip("link", "set", name, "netns", host.name, "name", DEVICE)
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", DEVICE)
        ip("-n", host.name, "link", "set", DEVICE, "mtu", str(_MTU), "up")
        yield end
    finally:
        os.close(end)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts with a link between them. Raises CalledProcessError or OSError where this isn't
    allowed.
    """
    first = Host(f"rlhf-{os.getpid()}-a", "10.213.7.1")
    second = Host(f"rlhf-{os.getpid()}-b", "10.213.7.2")
    with contextlib.ExitStack() as stack:
        for host in (first, second):
            stack.enter_context(_namespace(host))
        ends = stack.enter_context(_device(first)), stack.enter_context(_device(second))
        link = Link(ends)
        stop, ring = os.pipe()
        thread = threading.Thread(target=link.run, args=(stop,), name="link", daemon=True)
        thread.start()
        try:
            yield Hosts(first, second, link)
        finally:
            os.write(ring, b"x")
            thread.join()
            os.close(stop)
            os.close(ring)


def why_not() -> str:
    """Why two hosts can't be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    try:
        with two_hosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    except OSError as error:
        return f"TUN devices are not allowed here: {error}"
