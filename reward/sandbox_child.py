"""The inside of reward/sandbox.py: a script of its own that imports nothing of the toolkit. Reads a
job on stdin, writes a report on stdout.

    supervisor (trusted; init of its own process namespace where there is one)
      runner, one per test: loses its rights, takes its limits, executes the response and then the
      test

The supervisor never executes a line of the response. It believes a test's success only with a
number that it drew for that runner.
"""

import contextlib
import ctypes
import json
import os
import resource
import secrets
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, -1)
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}.get(os.uname().machine, -1)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE = 1, 38, 36, 4
AF_UNIX = 1
DETAIL = 400  # bytes of a failure's text
REAP_SECONDS = 10.0

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A libc function that returns -1 on failure. Raises OSError naming it."""
    if getattr(libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def text(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def mount(
    source: str | None,
    target: str,
    kind: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    call("mount", text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))


def protect(path: str, *, recursive: bool) -> None:
    """Make a mount read-only, without setuid programs and devices; flags that it has stay."""
    attributes = struct.pack(
        "QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0
    )
    call(
        "syscall",
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        text(path),
        AT_RECURSIVE if recursive else 0,
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


# --- namespaces


def leave_namespaces() -> None:
    """New network (without interfaces), mount, process, IPC and host name namespaces; without root
    also a user namespace that gives the right to.
    """
    flags = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        call("unshare", CLONE_NEWUSER | flags)
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    else:
        call("unshare", flags)


def own_root(box: str, uid: int, gid: int, size_mb: int) -> None:
    """A file system of the interpreter's files (read-only), three devices and an empty /box of
    `size_mb`; the rest of the machine's is gone.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", box, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    wanted = [
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/etc/localtime",
        "/etc/ld.so.cache",
        "/dev/null",
        "/dev/zero",
        "/dev/urandom",
    ]
    wanted += [
        prefix
        for prefix in {sys.base_prefix, sys.base_exec_prefix}
        if not prefix.startswith("/usr/") and prefix != "/usr"
    ]
    for path in wanted:
        inside = box + path
        if not os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            target = os.path.realpath(path)
            if os.path.isdir(path):
                os.symlink(target, inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
        mount(path, inside, None, MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            protect(inside, recursive=True)
    os.makedirs(f"{box}/box")
    os.makedirs(f"{box}/old")
    os.symlink("/box", f"{box}/tmp")
    mount(
        "tmpfs",
        f"{box}/box",
        "tmpfs",
        MS_NOSUID | MS_NODEV,
        f"size={size_mb}m,mode=0700,uid={uid},gid={gid}",
    )
    os.chdir(box)
    call("syscall", SYS_PIVOT_ROOT, text("."), text("old"))
    os.chdir("/")
    call("umount2", text("/old"), MNT_DETACH)
    os.rmdir("/old")
    protect("/", recursive=False)
    os.chdir("/box")


# --- the runner: everything below `become` is in the hands of the response


def become(job: dict, uid: int, gid: int) -> None:
    """Lose every right, take the limits."""
    os.setsid()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    call(
        "syscall",
        SYS_CAPSET,
        struct.pack("Ii", 0x20080522, 0),
        struct.pack("IIIIII", 0, 0, 0, 0, 0, 0),
    )
    # after the change of user, which clears it
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    mega = 1 << 20
    for which, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, max(1, -int(-job["cpu_s"] // 1))),
        (resource.RLIMIT_FSIZE, job["file_mb"] * mega),
        (resource.RLIMIT_NOFILE, job["open_files"]),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_AS, job["memory_mb"] * mega),
    ):
        hard = resource.getrlimit(which)[1]
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # a second later, so that SIGXCPU says what it was before SIGKILL doesn't
        late = 1 if which == resource.RLIMIT_CPU else 0
        resource.setrlimit(
            which, (soft, soft + late if hard == resource.RLIM_INFINITY else min(soft + late, hard))
        )


def close_files(keep: int) -> None:
    """Standard input empty, output into a file of the box under the file limit, nothing else of the
    supervisor's.
    """
    null, out = (
        os.open("/dev/null", os.O_RDONLY),
        os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    )
    for target, source in ((0, null), (1, out), (2, out)):
        os.dup2(source, target)
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)


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
ONE_PATH = {
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
TWO_PATHS = {"os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"}
OTHER = {
    "resource.setrlimit",
    "resource.prlimit",
    "gc.get_objects",
    "gc.get_referrers",
    "gc.get_referents",
    "os.unshare",
}


def make_hook(box: str) -> Callable[[str, tuple], None]:
    """The audit hook (PEP 578): refuses sockets, processes, foreign functions, and files outside of
    the box but for reading the interpreter's.
    """
    realpath, fspath, fsdecode, join = os.path.realpath, os.fspath, os.fsdecode, os.path.join
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    readable = tuple(
        join(realpath(p), "")
        for p in {
            sys.base_prefix,
            sys.base_exec_prefix,
            "/usr/lib",
            "/usr/share",
            "/lib",
            *sys.path,
        }
    )
    single = ("/dev/null", "/dev/urandom", "/dev/zero", realpath("/etc/localtime"))
    home = (join(realpath(box), ""), realpath(box))

    def inside(path: object, places: tuple[str, ...]) -> bool:
        if isinstance(path, int) or path is None:
            return True  # a file that is open already
        real = realpath(fsdecode(fspath(path)))  # type: ignore[call-overload]
        return real == home[1] or real in single or any(real.startswith(place) for place in places)

    def refuses(event: str, arguments: tuple) -> bool:
        if event == "open":
            path, _, flags = arguments
            return not inside(path, (home[0],) if flags & writing else (home[0], *readable))
        if event == "socket.__new__":
            return bool(arguments[1] != AF_UNIX)  # asyncio needs a pair of them
        if event == "import":
            return arguments[0] in ("ctypes", "_ctypes")
        if event in ONE_PATH:
            return not inside(arguments[0], home[:1])
        if event in TWO_PATHS:
            return not (inside(arguments[0], home[:1]) and inside(arguments[1], home[:1]))
        return event in PROCESSES or event in OTHER or event.startswith(("ctypes.", *NETWORK))

    def hook(event: str, arguments: tuple) -> None:
        if refuses(event, arguments):
            raise PermissionError(f"the sandbox refuses {event} {arguments[:1]!r}")

    return hook


def run_one(code: str, test: str, box: str, token: bytes, pipe: int) -> NoReturn:
    """Execute the response, then the test, and say how it went. Does not return."""
    write, leave, run, build = os.write, os._exit, exec, compile
    try:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        for name in ("ctypes", "_ctypes"):
            sys.modules.pop(name, None)
        sys.addaudithook(make_hook(box))
        run(build(code, "response", "exec"), module.__dict__)
        run(build(test, "test", "exec"), module.__dict__)
        write(pipe, token + b"P")
    except BaseException as error:  # noqa: BLE001 - whatever the response raises is its failure
        with contextlib.suppress(BaseException):
            write(
                pipe,
                token + b"F" + f"{type(error).__name__}: {error}".encode(errors="replace")[:DETAIL],
            )
    leave(0)


# --- the supervisor


def kill_all(uid: int, alone: bool) -> None:
    """End every process that the runner may have left behind, whatever session it moved to, and
    wait until they are gone.
    """
    deadline = time.monotonic() + REAP_SECONDS
    while True:
        if alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of the namespace but its init, which this is
        elif os.getuid() == 0:
            helper = os.fork()
            # as the runner's user, whom nobody else on the machine is: one call ends all of its
            # processes
            if helper == 0:
                try:
                    os.setresuid(uid, uid, uid)
                    os.kill(-1, signal.SIGKILL)
                finally:
                    os._exit(0)
            # Waited for, or the reaping below would find it alive on a busy machine, round after
            # round; a response may stop it, as the same user.
            os.waitpid(helper, os.WUNTRACED)
        for pid in children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"processes of a response are still there {REAP_SECONDS} s after they were killed"
            )
        time.sleep(0.002)


def children() -> list[int]:
    """Processes whose parent this is (orphans of a runner come to it): where /proc is gone, the
    namespace's kill has seen to them.
    """
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def judge(
    job: dict, test: str, box: str, uid: int, gid: int, deadline: float, alone: bool
) -> list[str]:
    """One test in a runner of its own: [outcome, detail]."""
    token = secrets.token_hex(16).encode()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            become(job, uid, gid)
            close_files(writer)
        except BaseException as error:  # noqa: BLE001 - the machine's fault, which must not be taken for the response's
            os.write(writer, b"!" + str(error).encode()[:DETAIL])
            os._exit(1)
        run_one(job["code"], test, box, token, writer)
    os.close(writer)
    handle = os.pidfd_open(pid)
    ready, _, _ = select.select([reader, handle], [], [], max(0.0, deadline - time.monotonic()))
    said = os.read(reader, 4096) if reader in select.select([reader], [], [], 0)[0] else b""
    status = None
    if ready:
        # It spoke or ended. Its exit tells why it ended when it said nothing.
        done, code = os.waitpid(pid, 0 if not said else os.WNOHANG)
        status = code if done else None
    kill_all(uid, alone)
    os.close(reader)
    os.close(handle)
    if said.startswith(b"!"):
        raise RuntimeError(f"a runner could not be set up: {said[1:].decode(errors='replace')}")
    if said == token + b"P":
        return ["passed", ""]
    if said.startswith(token + b"F"):
        return ["failed", said[len(token) + 1 :].decode(errors="replace")]
    if not ready:
        return ["timeout", f"no end after {job['wall_s']} s"]
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            ["timeout", f"more than {job['cpu_s']} s of CPU"]
            if number == signal.SIGXCPU
            else ["failed", f"ended by signal {number}"]
        )
    return ["failed", "ended before the test did"]


def supervise(job: dict, box: str, uid: int, gid: int, alone: bool) -> list[list[str]]:
    """All tests, within one time limit; those that the limit leaves no time for are timeouts."""
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # a runner of the same user can't look into it
    if not alone:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    deadline = time.monotonic() + job["wall_s"]
    results = []
    for test in job["tests"]:
        if time.monotonic() >= deadline:
            results.append(["timeout", "no time was left"])
            continue
        results.append(judge(job, test, box, uid, gid, deadline, alone))
    return results


def main() -> NoReturn:
    job = json.load(sys.stdin)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    box, uid, gid = job["box"], os.getuid(), os.getgid()
    if uid == 0:
        uid = gid = job["uid"]
    try:
        if job["namespaces"]:
            leave_namespaces()
            pid = os.fork()
            if pid != 0:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            own_root(box, uid, gid, job["box_mb"])
            box = "/box"
        else:
            if os.getuid() == 0:
                os.chown(box, uid, gid)
            os.chdir(box)
        report: dict[str, object] = {
            "results": supervise(job, box, uid, gid, alone=job["namespaces"])
        }
    except BaseException as error:  # noqa: BLE001 - it is reported, and raises in the trainer
        report = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
