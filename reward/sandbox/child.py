"""The inside of the code sandbox (reward/sandbox/run.py starts it as a script). It reads a job as
JSON on stdin and writes a report as JSON on stdout.

    supervisor (trusted; init of a process namespace where there is one)
      runner, one per test: gives up its rights, takes its limits, executes the response and then
      the test

The supervisor never executes a line of the response. It believes a test's success only together
with a random number that it drew for that runner.
"""

import contextlib
import json
import math
import os
import resource
import secrets
import select
import signal
import struct
import sys
import time
import types
from typing import NoReturn

# The interpreter starts without the toolkit on its path. These two files are loaded here, before
# any response runs, and then the path is as before.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from reward.sandbox.hook import make_hook
from reward.sandbox.linux import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    SYS_CAPSET,
    call,
    leave_namespaces,
    libc,
    own_root,
)

sys.path.pop(0)

DETAIL = 400  # bytes of a failure's text
REAP_SECONDS = 10.0

# --- the runner: after `become` it is in the hands of the response


def become(job: dict, uid: int, gid: int) -> None:
    """Give up every right and take the job's limits."""
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
    cpu_s = max(1, math.ceil(job["cpu_s"]))
    limit(resource.RLIMIT_CORE, 0)
    # Beyond the soft limit comes SIGXCPU, which says what happened; SIGKILL a second later.
    limit(resource.RLIMIT_CPU, cpu_s, hard=cpu_s + 1)
    limit(resource.RLIMIT_FSIZE, job["file_mb"] * mega)
    limit(resource.RLIMIT_NOFILE, job["open_files"])
    limit(resource.RLIMIT_NPROC, job["processes"])
    limit(resource.RLIMIT_AS, job["memory_mb"] * mega)


def limit(resource_id: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit of this process, never above the hard limit that it has."""
    if hard is None:
        hard = soft
    existing = resource.getrlimit(resource_id)[1]
    if existing != resource.RLIM_INFINITY:
        soft, hard = min(soft, existing), min(hard, existing)
    resource.setrlimit(resource_id, (soft, hard))


def close_files(keep: int, out: int | None = None) -> None:
    """Keep no file of the supervisor's but the pipe `keep`: standard input is empty, output goes
    into the open file `out`, else into a file of the box, where the limit on files holds.
    """
    null = os.open("/dev/null", os.O_RDONLY)
    if out is None:
        out = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for target, source in ((0, null), (1, out), (2, out)):
        os.dup2(source, target)
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)


def forget_modules() -> None:
    """Leave nothing of ours, and no way to foreign functions, among the loaded modules."""
    for name in list(sys.modules):
        if name in ("ctypes", "_ctypes") or name.split(".")[0] == "reward":
            del sys.modules[name]


def run_one(code: str, test: str, box: str, token: bytes, pipe: int) -> NoReturn:
    """Execute the response, then the test, and report through `pipe`: the token and "P" for passed,
    or the token, "F" and the error. Does not return.
    """
    # The response may replace functions of modules and builtins, not these references.
    write, leave, run, build = os.write, os._exit, exec, compile
    try:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        forget_modules()
        sys.addaudithook(make_hook(box))
        run(build(code, "response", "exec"), module.__dict__)
        run(build(test, "test", "exec"), module.__dict__)
        write(pipe, token + b"P")
    except BaseException as error:  # noqa: BLE001 - whatever the response raises is its failure
        with contextlib.suppress(BaseException):
            detail = f"{type(error).__name__}: {error}".encode(errors="replace")[:DETAIL]
            write(pipe, token + b"F" + detail)
    leave(0)


# --- the supervisor


def kill_all(uid: int, alone: bool) -> None:
    """End every process that the runner left behind, whatever session it moved to, and wait until
    they are gone.

    `alone`: this process is the init of a namespace, so that every other process in it is the
    runner's. Raises RuntimeError when processes are still there after REAP_SECONDS.
    """
    deadline = time.monotonic() + REAP_SECONDS
    while True:
        if alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # everything in the namespace but its init
        elif os.getuid() == 0:
            kill_as(uid)
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


def kill_as(uid: int) -> None:
    """As the runner's user, which nobody else on the machine is, end all processes of that user."""
    helper = os.fork()
    if helper == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    # Wait for the helper: on a busy machine it would else still be alive in the next round, and the
    # one after. WUNTRACED, because a response of the same user may stop it.
    os.waitpid(helper, os.WUNTRACED)


def children() -> list[int]:
    """Processes whose parent this process is; it inherits the orphans of a runner. Empty without
    /proc: there the namespace is killed as a whole.
    """
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def start_runner(
    job: dict, test: str, box: str, uid: int, gid: int, token: bytes
) -> tuple[int, int]:
    """Fork a runner for one test: its process id, and the pipe that it reports through."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            become(job, uid, gid)
            close_files(writer)
        except BaseException as error:  # noqa: BLE001 - a fault of the machine, not of the response
            os.write(writer, token + b"!" + str(error).encode()[:DETAIL])
            os._exit(1)
        run_one(job["code"], test, box, token, writer)
    os.close(writer)
    return pid, reader


def await_report(pid: int, reader: int, deadline: float) -> tuple[bytes, int | None, bool]:
    """Wait until a runner reports or ends: its report, its exit status (None where it has not
    ended), and whether the time was over before.
    """
    handle = os.pidfd_open(pid)
    report, waiting = b"", [reader, handle]
    try:
        while not report:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select(waiting, [], [], left)
            if not ready:
                return b"", None, True
            if reader in ready:
                report = os.read(reader, 4096)
                waiting = [handle]  # where it closed the pipe, only its end tells more
            elif handle in ready:
                break
        done, status = os.waitpid(pid, os.WNOHANG if report else 0)
    finally:
        os.close(handle)
    return report, status if done else None, False


def report_of(report: bytes, token: bytes) -> list[str] | None:
    """[status, detail] of a runner's report; None where the response forged it, or there is none.
    Raises RuntimeError where the runner could not be set up.
    """
    word, detail = report[len(token) :][:1], report[len(token) + 1 :].decode(errors="replace")
    if not report.startswith(token):
        return None
    if word == b"!":
        raise RuntimeError(f"a runner could not be set up: {detail}")
    return ["passed", ""] if word == b"P" else ["failed", detail]


def judge(
    job: dict, test: str, box: str, uid: int, gid: int, deadline: float, alone: bool
) -> list[str]:
    """Run one test in a runner of its own: [status, detail], status being passed, failed or
    timeout. Raises RuntimeError where the runner could not be set up.
    """
    token = secrets.token_hex(16).encode()
    pid, reader = start_runner(job, test, box, uid, gid, token)
    report, exit_status, late = await_report(pid, reader, deadline)
    kill_all(uid, alone)
    os.close(reader)
    told = report_of(report, token)
    if told is not None:
        return told
    if late:
        return ["timeout", f"no end after {job['wall_s']} s"]
    return without_report(exit_status, job["cpu_s"])


def without_report(exit_status: int | None, cpu_s: float) -> list[str]:
    """The outcome of a runner that ended without a report."""
    if exit_status is None or not os.WIFSIGNALED(exit_status):
        return ["failed", "ended before the test did"]
    number = os.WTERMSIG(exit_status)
    if number == signal.SIGXCPU:
        return ["timeout", f"more than {cpu_s} s of CPU"]
    return ["failed", f"ended by signal {number}"]


def supervise(job: dict, box: str, uid: int, gid: int, alone: bool) -> list[list[str]]:
    """The outcomes of all tests within one time limit; a test that starts too late is a timeout."""
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # a runner of the same user can't read its memory
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
        results = supervise(job, box, uid, gid, alone=job["namespaces"])
        report: dict[str, object] = {"results": results}
    except BaseException as error:  # noqa: BLE001 - it is reported, and raises in the trainer
        report = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
