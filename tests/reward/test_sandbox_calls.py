"""Calls in the sandbox's supervisors that stay: each has a box of its own, of which nothing is left
for the next, and what breaks out or hangs is an answer.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from reward.sandbox import calls, run
from reward.sandbox.calls import Call, Result, Sandbox
from reward.sandbox.run import Limits, SandboxError
from tests.reward.test_sandbox import MODES, SHORT

SOURCE = """
import json, os, sys, time

def add(x, y=1):
    return x + y

def echo(value):
    return value

def say(text):
    print(text, end="")

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

def read(path):
    return open(path).read()

def listing():
    return sorted(os.listdir("."))

def given():
    return {name: open(os.path.join(FILES, name)).read() for name in sorted(os.listdir(FILES))}

def loop():
    while True:
        pass

def deaf():
    os.closerange(3, 256)
    time.sleep(1000)

def forge():
    for number in range(3, 64):
        try:
            os.write(number, b"!broken")
        except OSError:
            pass

def leave(code):
    os._exit(code)

def raising():
    raise ValueError("no such thing")

def shell(command):
    os.execve("/bin/sh", ["sh", "-c", command], {"PATH": "/usr/bin:/bin"})
"""


@pytest.fixture(params=MODES)
def sandbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sandbox]:
    """One that may read two files; any user can."""
    files = Path("/var/tmp") / f"rlhf-calls-{os.getpid()}"
    files.mkdir(exist_ok=True)
    (files / "a.txt").write_text("first\n")
    (files / "b.txt").write_text("second\n")
    box = Sandbox(SHORT, namespaces=request.param, files=str(files))
    yield box
    box.close()
    for file in files.iterdir():
        file.unlink()
    files.rmdir()


def call(sandbox: Sandbox, name: str, *, hook: bool = True, **arguments: object) -> Result:
    return sandbox.run(Call(SOURCE, name, arguments, wall_s=4.0, hook=hook))


def test_what_a_call_prints_and_returns_is_its_output(sandbox: Sandbox) -> None:
    assert call(sandbox, "add", x=2) == Result("passed", "", "3\n")
    assert call(sandbox, "echo", value={"a": [1, None, "ü"]}).output == '{"a": [1, null, "ü"]}\n'
    assert call(sandbox, "echo", value="two\nlines").output == "two\nlines\n"
    assert call(sandbox, "say", text="said") == Result("passed", "", "said")
    assert call(sandbox, "leave", code=0).status == "passed"


def test_a_failure_is_told_in_a_line(sandbox: Sandbox) -> None:
    assert call(sandbox, "raising") == Result("failed", "ValueError: no such thing", "")
    assert call(sandbox, "add", z=1).detail.startswith("TypeError")
    assert call(sandbox, "leave", code=3) == Result("failed", "exit code 3", "")
    broken = sandbox.run(Call("def f(:", "f", {}, 4.0))
    assert broken.status == "failed" and broken.detail.startswith("SyntaxError")


def test_files_are_shown_and_no_call_leaves_any(sandbox: Sandbox) -> None:
    assert call(sandbox, "given").output == '{"a.txt": "first\\n", "b.txt": "second\\n"}\n'
    assert call(sandbox, "write", path="mine", text="x").status == "passed"
    assert call(sandbox, "listing").output == "[]\n"
    refused = call(sandbox, "write", path=f"{sandbox._files}/c.txt", text="x")
    assert refused.status == "failed"
    assert call(sandbox, "read", path="/etc/shadow").status == "failed"


def test_hanging_and_forging_calls_are_answers(sandbox: Sandbox) -> None:
    began = time.monotonic()
    assert call(sandbox, "loop").status == "timeout"
    assert call(sandbox, "deaf") == Result("timeout", "no end after 4 s", "")
    assert call(sandbox, "forge").status == "failed"
    assert time.monotonic() - began < 20
    assert call(sandbox, "add", x=1).output == "2\n", "the supervisor serves on"
    assert len(sandbox._idle) == 1


def test_output_is_cut(sandbox: Sandbox) -> None:
    long = sandbox.run(Call(SOURCE, "say", {"text": "x" * 5000}, 4.0, output_bytes=100))
    assert long == Result("passed", "", "x" * 100)
    endless = call(sandbox, "say", text="x" * (2 << 20))
    assert endless.status == "failed" and len(endless.output) == 65536


def test_programs_start_without_the_hook_alone(sandbox: Sandbox) -> None:
    assert call(sandbox, "shell", command="echo hi").detail.startswith("PermissionError")
    ran = call(sandbox, "shell", hook=False, command="echo hi; exit 3")
    assert ran == Result("failed", "exit code 3", "hi\n")


def test_a_shell_reaches_neither_network_nor_files() -> None:
    if run._probe(True) is not None:
        pytest.skip("the kernel gives no namespaces here")
    sandbox = Sandbox(SHORT, namespaces=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        connected = call(sandbox, "shell", hook=False, command=f'python3 -c "{code}"')
    assert connected.status == "failed"
    listed = call(sandbox, "shell", hook=False, command="ls /; ls /proc /home /root")
    assert "home" not in listed.output.split("\n")[:8]
    left = call(sandbox, "shell", hook=False, command="sleep 60 & echo $!; ipcmk -M 1000")
    assert left.status == "passed"
    again = call(sandbox, "shell", hook=False, command="ipcs -m | grep -c 0x; ls")
    assert again.output.startswith("0\n")
    sandbox.close()


def test_threads_share_supervisors(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: call(sandbox, "add", x=x), range(40)))
    assert [result.output for result in results] == [f"{x + 1}\n" for x in range(40)]
    assert 1 <= len(sandbox._idle) <= 8


def test_a_killed_supervisor_is_replaced(sandbox: Sandbox) -> None:
    call(sandbox, "add", x=1)
    killed = sandbox._idle[0]._process
    os.killpg(killed.pid, 9)
    assert call(sandbox, "add", x=1).output == "2\n"
    assert sandbox._idle[0]._process is not killed


def test_a_sandbox_that_can_not_start_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_CHILD", Path("/no/such/file.py"))
    with pytest.raises(SandboxError):
        Sandbox(Limits(), namespaces=False).run(Call(SOURCE, "add", {"x": 1}, 1.0))


def test_supervisors_end_with_their_process() -> None:
    """Also where that is killed and can't tell them."""
    program = (
        "from tests.reward.test_sandbox_calls import *\n"
        "box = Sandbox(SHORT, namespaces=False)\n"
        "call(box, 'add', x=1)\n"
        "print(box._idle[0]._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_a_supervisor_outlives_the_thread_that_started_it(sandbox: Sandbox) -> None:
    thread = threading.Thread(target=call, args=(sandbox, "add"), kwargs={"x": 1})
    thread.start()
    thread.join()
    first = sandbox._idle[0]._process
    assert call(sandbox, "add", x=1).output == "2\n"
    assert sandbox._idle[0]._process is first
