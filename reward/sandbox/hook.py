"""The audit hook of the processes that run what a policy wrote. Standard library only: the sandbox
loads this file inside the box.
"""

import os
import sys
from collections.abc import Callable

AF_UNIX = 1  # socket.AF_UNIX, without importing socket

# names of audit events
PROCESSES = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "os.kill",
    "os.killpg",
}
NETWORK = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethost",
    "socket.sendto",
    "socket.sendmsg",
)
PATH_FIRST = {
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "shutil.rmtree",
}
PATH_TWICE = {"os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"}
OTHER = {
    "resource.setrlimit",
    "resource.prlimit",
    "gc.get_objects",
    "gc.get_referrers",
    "gc.get_referents",
    "os.unshare",
}


def make_hook(box: str, files: str | None = None) -> Callable[[str, tuple], None]:
    """The audit hook (PEP 578) of a process that may write in the directory `box` only.

    It refuses sockets, other processes, foreign functions, and files outside `box` except for
    reading those of the interpreter and of the directory `files`. What it refuses raises
    PermissionError.
    """
    # The response can't replace these functions: the hook holds its own references.
    realpath, fspath, fsdecode, join = os.path.realpath, os.fspath, os.fsdecode, os.path.join
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    libraries = {
        sys.base_prefix,
        sys.base_exec_prefix,
        "/usr/lib",
        "/usr/share",
        "/lib",
        *sys.path,
    }
    if files is not None:
        libraries.add(files)
    readable = tuple(join(realpath(path), "") for path in libraries)
    single = ("/dev/null", "/dev/urandom", "/dev/zero", realpath("/etc/localtime"))
    home, home_itself = join(realpath(box), ""), realpath(box)

    def inside(path: object, directories: tuple[str, ...]) -> bool:
        if isinstance(path, int) or path is None:
            return True  # a file that is open already
        real = realpath(fsdecode(fspath(path)))  # type: ignore[call-overload]
        return real == home_itself or real in single or real.startswith(directories)

    def refuses(event: str, arguments: tuple) -> bool:
        if event == "open":
            path, _, flags = arguments
            return not inside(path, (home,) if flags & writing else (home, *readable))
        if event == "socket.__new__":
            return bool(arguments[1] != AF_UNIX)  # asyncio needs a pair of Unix sockets
        if event == "import":
            return arguments[0] in ("ctypes", "_ctypes")
        if event in PATH_FIRST:
            return not inside(arguments[0], (home,))
        if event in PATH_TWICE:
            return not (inside(arguments[0], (home,)) and inside(arguments[1], (home,)))
        return event in PROCESSES or event in OTHER or event.startswith(("ctypes.", *NETWORK))

    def hook(event: str, arguments: tuple) -> None:
        if refuses(event, arguments):
            raise PermissionError(f"the sandbox refuses {event} {arguments[:1]!r}")

    return hook
