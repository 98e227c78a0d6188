"""The inside of the sandbox for calls of functions (reward/sandbox/calls.py starts it as a script).
It reads a job as a line of JSON on stdin, then a call a line, and writes a line of JSON for each:

    {"ready": true}, or {"error": why the sandbox can't be set up}
    {"status": passed, failed or timeout, "detail": ..., "output": what the call printed}

The processes are those of reward/sandbox/child.py: a supervisor, which never executes a line of the
policy's, and a runner for each call. Unlike there the supervisor stays; each call gets an empty
box. It ends with its standard input.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
import types
from typing import NoReturn

# As in child.py: these files are loaded before any call runs, and then the path is as before.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from reward.sandbox.child import (
    DETAIL,
    await_report,
    become,
    close_files,
    forget_modules,
    kill_all,
    report_of,
    without_report,
)
from reward.sandbox.hook import make_hook
from reward.sandbox.linux import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    clear_box,
    leave_namespaces,
    libc,
    own_ipc,
    own_root,
)

sys.path.pop(0)

SIGKILL = 9

# --- the runner: after `become` it is in the hands of the policy


def run_call(request: dict, box: str, files: str | None, token: bytes, pipe: int) -> NoReturn:
    """Execute the function's source, call it, print what it returns, and report through `pipe` as
    `child.run_one` does. Does not return.
    """
    # The call may replace functions of modules and builtins, not these references.
    write, leave, run, build, flush = os.write, os._exit, exec, compile, sys.stdout.flush
    try:
        module = types.ModuleType("tool")
        sys.modules["tool"] = module
        forget_modules()
        if request["hook"]:
            sys.addaudithook(make_hook(box, files))
        run(build(request["source"], "tool", "exec"), module.__dict__)
        module.FILES = files  # type: ignore[attr-defined]
        result = getattr(module, request["name"])(**request["arguments"])
        if result is not None:
            text = isinstance(result, str)
            print(result if text else json.dumps(result, ensure_ascii=False, default=str))
        flush()
        write(pipe, token + b"P")
    except BaseException as error:  # noqa: BLE001 - whatever the call raises is its failure
        with contextlib.suppress(BaseException):
            flush()
        with contextlib.suppress(BaseException):
            detail = f"{type(error).__name__}: {error}".encode(errors="replace")[:DETAIL]
            write(pipe, token + b"F" + detail)
    leave(0)


# --- the supervisor


class Supervisor:
    """Runs one call after another."""

    def __init__(self, job: dict) -> None:
        self.job, self.box, self.files = job, job["box"], job["files"]
        self.alone = bool(job["namespaces"])
        self.uid, self.gid = os.getuid(), os.getgid()
        if self.uid == 0:
            self.uid = self.gid = job["uid"]

    def enter(self) -> None:
        """Go into the box for good."""
        if self.alone:
            leave_namespaces()
            pid = os.fork()
            if pid != 0:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
            libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
            own_root(self.box, self.uid, self.gid, self.job["box_mb"], self.files)
            self.box = "/box"
            self.files = None if self.files is None else "/files"
        else:
            os.chmod(self.box, 0o755)
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # a runner of the same user can't read its memory

    def call(self, request: dict) -> dict[str, object]:
        """How a call ended. Raises RuntimeError and OSError for what is no fault of the call."""
        deadline = time.monotonic() + request["wall_s"]
        box = self._empty_box()
        token = secrets.token_hex(16).encode()
        out = os.memfd_create("output")
        pid, reader = self._start(request, box, token, out)
        report, exit_status, late = await_report(pid, reader, deadline)
        kill_all(self.uid, self.alone)
        os.close(reader)
        output = os.pread(out, request["output_bytes"], 0)
        os.close(out)
        told = report_of(report, token)
        if told is None and late:
            told = ["timeout", f"no end after {request['wall_s']:g} s"]
        if told is None and exit_status is not None and os.WIFEXITED(exit_status):
            code = os.WEXITSTATUS(exit_status)
            told = ["failed", f"exit code {code}"] if code else ["passed", ""]
        if told is None:
            told = without_report(exit_status, self.job["cpu_s"])
        text = output.decode(errors="replace")
        return {"status": told[0], "detail": told[1], "output": text}

    def _empty_box(self) -> str:
        """The directory of the next call, which is the working directory now."""
        if self.alone:
            clear_box(self.uid, self.gid, self.job["box_mb"])
            return "/box"
        box = os.path.join(self.box, "call")
        os.chdir(self.box)
        shutil.rmtree(box, ignore_errors=True)
        if os.path.exists(box):  # its owner took the right to look into it
            box = os.path.join(self.box, f"call-{secrets.token_hex(4)}")
        os.mkdir(box, 0o700)
        if os.getuid() == 0:
            os.chown(box, self.uid, self.gid)
        os.chdir(box)
        return box

    def _start(self, request: dict, box: str, token: bytes, out: int) -> tuple[int, int]:
        """Fork the runner of a call: its process id, and the pipe that it reports through."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                if self.alone:
                    own_ipc()
                become(self.job, self.uid, self.gid)
                close_files(writer, out)
            except BaseException as error:  # noqa: BLE001 - a fault of the machine, not of the call
                os.write(writer, token + b"!" + str(error).encode()[:DETAIL])
                os._exit(1)
            run_call(request, box, self.files, token, writer)
        os.close(writer)
        return pid, reader


def say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> NoReturn:
    try:
        supervisor = Supervisor(json.loads(sys.stdin.buffer.readline()))
        supervisor.enter()
        say({"ready": True})
        for line in iter(sys.stdin.buffer.readline, b""):
            say(supervisor.call(json.loads(line)))
    except BaseException as error:  # noqa: BLE001 - it is reported, and raises in the trainer
        with contextlib.suppress(OSError):
            say({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


if __name__ == "__main__":
    main()
