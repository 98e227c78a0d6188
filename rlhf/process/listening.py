"""What a process that serves HTTP needs: a port, its address, and an end in order."""

import contextlib
import signal
import socket
from collections.abc import Iterator

from rlhf.types import UserError


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is known before weights load. Raises
    UserError.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise UserError(
            f"stage.host={host}: can't be resolved ({error}). Expected an address of this "
            "machine, such as 127.0.0.1."
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(
            f"stage.host={host} stage.port={port}: can't listen there ({error}). Choose another "
            "stage.port (0: any free one) or stage.host."
        ) from error
    return listener


def address(listener: socket.socket) -> str:
    """``http://host:port`` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def ignoring_signals() -> Iterator[None]:
    """uvicorn ends in peace on SIGTERM and Ctrl-C and then raises them again, which would end the
    process before its summary is written.
    """
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
