"""The cores of this machine, and ports that are free on it."""

import os
import re
import socket

from rlhf.types import UserError


def parse_cores(key: str, text: str) -> set[int]:
    """The numbers in a list of cores such as ``0-3,8``. Raises UserError that names `key`."""
    cores: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UserError(f"{key}={text!r}: expected cores such as '0-3,8'.")
        first = int(match[1])
        cores.update(range(first, int(match[2] or first) + 1))
    if not cores:
        raise UserError(f"{key}={text!r}: no cores. Expected cores such as '0-3,8'.")
    missing = cores - os.sched_getaffinity(0)
    if missing:
        usable = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise UserError(
            f"{key}={text!r}: this process may not use the cores {sorted(missing)}. Expected some "
            f"of {usable}."
        )
    return cores


class Ports:
    """Ports of this machine that are kept for processes that will listen on them.

    Each is bound but does not listen, so that no other program is given it, while a process that
    sets SO_REUSEADDR, as torch's store and uvicorn do, can bind it too.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def keep(self, key: str, wished: int = 0) -> int:
        """`wished`, or with 0 a free port. Raises UserError that names the option `key`."""
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", wished))
        except OSError as error:
            holder.close()
            raise UserError(
                f"{key}={wished}: can't be used on this machine ({error}). Choose another port, "
                "or 0 for a free one."
            ) from error
        self._held.append(holder)
        port: int = holder.getsockname()[1]
        return port

    def close(self) -> None:
        """The ports are no longer kept."""
        while self._held:
            self._held.pop().close()
