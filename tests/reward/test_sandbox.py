"""Code that a policy wrote: what is right passes, what breaks out fails as a wrong answer, and what
fails by itself raises.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.choices import Isolation, TermKind
from conf.schema import RewardTerm
from reward.base import VerifierScorer
from reward.sandbox import run as sandbox
from reward.sandbox.run import Limits, Outcome, SandboxError, run_tests
from reward.terms import make_verifier
from reward.verifiers.evaluated import Code
from rlhf.types import UserError
from tests.reward.test_reward_terms import plain

SHORT = Limits(time_s=1.0, memory_mb=256)
MODES = [
    pytest.param(
        True,
        id="namespaces",
        marks=pytest.mark.skipif(
            sandbox._probe(True) is not None, reason="the kernel gives no namespaces here"
        ),
    ),
    pytest.param(False, id="limits"),
]
ROOT = os.getuid() == 0


def outcome(code: str, *, namespaces: bool, test: str = "pass", limits: Limits = SHORT) -> Outcome:
    """How one test after `code` ended; a sandbox that fails raises."""
    (only,) = run_tests(code, [test], limits, namespaces=namespaces)
    return only


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory that any user may write to."""
    place = Path("/var/tmp") / f"rlhf-test-{os.getpid()}"
    place.mkdir(exist_ok=True)
    place.chmod(0o777)
    yield place
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


@pytest.mark.parametrize("namespaces", MODES)
def test_right_code_passes_and_failures_say_why(namespaces: bool) -> None:
    code = (
        "import dataclasses, heapq\n@dataclasses.dataclass\nclass A:\n    x: int\ndef f(x):\n "
        "   print('noise')\n    return A(x).x * 2\n"
    )
    tests = [
        "assert f(2) == 4",
        "assert f(2) == 5, 'not five'",
        "f(None)",
        "import asyncio\nasync def g(): return f(1)\nassert asyncio.run(g()) == 2",
    ]
    found = run_tests(code, tests, SHORT, namespaces=namespaces)
    assert [o.status for o in found] == ["passed", "failed", "failed", "passed"]
    assert found[1].detail == "AssertionError: not five" and found[2].detail.startswith("TypeError")
    assert "SyntaxError" in outcome("def f(:", namespaces=namespaces).detail


@pytest.mark.parametrize("namespaces", MODES)
def test_tests_do_not_see_each_other(namespaces: bool) -> None:
    found = run_tests(
        "state = []", ["state.append(1); assert state == [1]"] * 2, SHORT, namespaces=namespaces
    )
    assert [o.passed for o in found] == [True, True]


@pytest.mark.parametrize("namespaces", MODES)
def test_the_standard_library_is_compiled_beforehand(namespaces: bool) -> None:
    """What a runner imports comes as byte code: compiling it would be charged to the response."""
    test = "import asyncio, os\nassert os.path.exists(asyncio.__cached__), asyncio.__cached__"
    assert outcome("", namespaces=namespaces, test=test).passed


BREAKERS = {
    "endless loop": ("while True: pass", "timeout"),
    "endless sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "endless output": ("while True: print('x' * 10000)", "failed"),
    "memory": ("a = [0]\nwhile True: a = a + a", "failed"),
    # this machine has it: only the limit of 256 MB refuses
    "one large allocation": ("a = bytearray(1 << 30)", "failed"),
    "endless recursion": ("def f(): f()\nf()", "failed"),
    "deep nesting": ("x = " + "(" * 5000 + ")" * 5000, "failed"),
    "early success": ("import sys\nsys.exit(0)", "failed"),
    "silent exit": ("import os\nos._exit(0)", "failed"),
    "fake report": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'P')\n    except OSError: "
        "pass\nos._exit(0)",
        "failed",
    ),
    "swallowed exception": ("class E(BaseException): pass\nraise E", "failed"),
    "crash": ("import faulthandler\nfaulthandler._sigsegv()", "failed"),
    "fork": ("import os\nos.fork()", "failed"),
    "subprocess": ("import subprocess\nsubprocess.run(['true'])", "failed"),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "failed"),
    "foreign function": ("import ctypes\nctypes.CDLL(None)", "failed"),
    "large file": ("open('a', 'w').write('x' * (4 << 20))", "failed"),
}


@pytest.mark.parametrize("namespaces", MODES)
@pytest.mark.parametrize("name", BREAKERS)
def test_what_breaks_a_limit_is_wrong(name: str, namespaces: bool) -> None:
    code, status = BREAKERS[name]
    began = time.monotonic()
    found = outcome(code, namespaces=namespaces)
    assert found.status == status, found
    assert time.monotonic() - began < 30


# fork_exec raises no audit event: what is left of the walls is what these tests see.
SPAWN = """
import _posixsubprocess, os
def spawn(*command):
    r, w = os.pipe()
    arguments = [c.encode() for c in command]
    none = (-1,) * 6
    rest = (r, w, False, True, -1, None, None, None, -1, None, True)
    return _posixsubprocess.fork_exec(
        arguments, arguments[:1], True, (w,), None, None, *none, *rest
    )
"""


def processes(word: str) -> list[int]:
    """Processes of the machine with `word` in their command line, this one's own left out."""
    out = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if word.encode() in (folder / "cmdline").read_bytes():
                    out.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile
    return out


@pytest.mark.parametrize("namespaces", MODES)
def test_fork_bomb_ends_and_leaves_nothing(namespaces: bool) -> None:
    """Past the audit hook: a shell that starts itself twice without end runs into the limit on
    processes, and all of it is ended.
    """
    mark = f"bomb-{os.getpid()}-{namespaces}"
    code = (
        SPAWN + f"import time\nspawn('/bin/sh', '-c', ': {mark}; f() {{ f | f & }}; f; sleep "
        "100')\ntime.sleep(0.5)\nassert False"
    )
    found = outcome(code, namespaces=namespaces)
    assert found.status == "failed"
    time.sleep(0.1)
    assert processes(mark) == []


@pytest.mark.parametrize("namespaces", MODES)
def test_the_number_of_processes_is_limited(namespaces: bool) -> None:
    """Past the audit hook: of 64 processes that would sleep side by side only as many start as the
    limit allows, this one included.
    """
    code = (
        SPAWN
        + "started = 0\ntry:\n    for _ in range(64):\n        spawn('/bin/sleep', '5')\n        "
        "started += 1\nexcept OSError: pass"
    )
    found = outcome(code, namespaces=namespaces, test="assert False, started")
    started = int(found.detail.removeprefix("AssertionError: "))
    assert started <= SHORT.processes - 1
    if namespaces or ROOT:
        assert started == SHORT.processes - 1, "fewer: something else than the limit was in the way"


@pytest.mark.parametrize("namespaces", MODES)
def test_a_process_left_behind_in_its_own_session_is_ended(namespaces: bool) -> None:
    if not namespaces and not ROOT:
        pytest.skip("without root and namespaces a response can start no process at all")
    mark = f"left-{os.getpid()}-{namespaces}"
    code = (
        SPAWN + f"import time\npid = spawn('/usr/bin/setsid', '/bin/sh', '-c', 'echo {mark} > "
        "/dev/null; sleep 1000')\ntime.sleep(0.3)"
    )
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.extend(processes(mark))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = outcome(code, namespaces=namespaces)
    done.set()
    watcher.join()
    assert found.passed, found
    assert seen, "the process was never there, so nothing was shown"
    time.sleep(0.1)
    assert processes(mark) == []


@pytest.mark.parametrize("namespaces", MODES)
def test_one_processor_is_enough(namespaces: bool) -> None:
    """The supervisor and what it ends share one: it must not wait for a process that each of its
    own rounds starts anew.
    """
    # the library is copied and compiled once, which takes its time
    assert sandbox._probe(namespaces) is None
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        began = time.monotonic()
        found = run_tests("x = 1", ["assert x == 1"] * 5, SHORT, namespaces=namespaces)
    finally:
        os.sched_setaffinity(0, before)
    assert [o.passed for o in found] == [True] * 5
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("namespaces", MODES)
def test_a_file_outside_is_not_written(namespaces: bool, outside: Path) -> None:
    target = outside / "written"
    for code in (
        f"open({str(target)!r}, 'w').write('x')",
        f"import os\nos.open({str(target)!r}, os.O_WRONLY | os.O_CREAT)",
        f"import os\nopen('a', 'w').close()\nos.rename('a', {str(target)!r})",
        f"import os\nos.symlink({str(outside)!r}, 'link')\nopen('link/written', 'w').write('x')",
        f"import shutil\nopen('a', 'w').close()\nshutil.copy('a', {str(target)!r})",
    ):
        assert outcome(code, namespaces=namespaces).status == "failed", code
    assert not target.exists()
    assert outcome(
        "open('mine', 'w').write('x')\nassert open('mine').read() == 'x'", namespaces=namespaces
    ).passed


@pytest.mark.skipif(sandbox._probe(True) is not None, reason="the kernel gives no namespaces here")
def test_past_the_audit_hook_the_namespaces_hold(outside: Path) -> None:
    """A shell instead of Python: no hook sees it. It finds neither the directory nor the
    interpreter's files writable.
    """
    shell = (
        f"echo x > {outside}/written; echo x > {os.path.dirname(os.__file__)}/written; ls / > seen"
    )
    found = outcome(
        SPAWN + f"import time\nspawn('/bin/sh', '-c', {shell!r})\ntime.sleep(0.5)\nassert False, "
        "open('seen').read()",
        namespaces=True,
    )
    assert (
        not (outside / "written").exists() and not (Path(os.__file__).parent / "written").exists()
    )
    names = set(found.detail.removeprefix("AssertionError: ").split())
    assert {"box", "usr", "dev"} <= names and not names & {"proc", "home", "work", "var"}


@pytest.mark.parametrize("namespaces", MODES)
def test_secrets_are_out_of_reach(
    namespaces: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    (tmp_path / "token").write_text("very-secret")
    (tmp_path / "token").chmod(0o600)
    for code in (
        "import os\nassert 'very-secret' in str(dict(os.environ))",
        "import os\nassert 'very-secret' in open(f'/proc/{os.getppid()}/environ').read()",
        f"assert open('/proc/{os.getpid()}/environ').read()",
        f"assert open({str(tmp_path / 'token')!r}).read()",
    ):
        assert outcome(code, namespaces=namespaces).status == "failed", code
    shell = f"cat /proc/{os.getpid()}/environ {tmp_path}/token > seen 2>/dev/null; true"
    if namespaces or ROOT:
        found = outcome(
            SPAWN + f"import time\nspawn('/bin/sh', '-c', {shell!r})\ntime.sleep(0.3)\nassert "
            "open('seen').read() == ''",
            namespaces=namespaces,
        )
        assert found.passed, found


@pytest.mark.parametrize("namespaces", MODES)
def test_no_connection_reaches_a_listener(namespaces: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for code in (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}))",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
            "import _socket\n_socket.socket(_socket.AF_INET, "
            f"_socket.SOCK_STREAM).connect(('127.0.0.1', {port}))",
        ):
            assert outcome(code, namespaces=namespaces).status == "failed", code
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(
    sandbox._probe(True) is not None or shutil.which("bash") is None,
    reason="needs namespaces, and bash to connect with",
)
def test_past_the_audit_hook_the_network_namespace_holds() -> None:
    """A shell that connects is stopped by the namespace alone; without it the same command arrives,
    as the sandbox's docstring says.
    """
    arrived = {}
    for namespaces in (True, False) if ROOT else (True,):
        with socket.create_server(("127.0.0.1", 0)) as server:
            shell = f"echo x > /dev/tcp/127.0.0.1/{server.getsockname()[1]}"
            outcome(
                SPAWN + f"import time\nspawn('/bin/bash', '-c', {shell!r})\ntime.sleep(0.5)",
                namespaces=namespaces,
            )
            server.settimeout(0.5)
            try:
                server.accept()[0].close()
                arrived[namespaces] = True
            except TimeoutError:
                arrived[namespaces] = False
    assert arrived == ({True: False, False: True} if ROOT else {True: False})


def test_nothing_is_left_in_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    tmp_path.chmod(0o755)
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path / "t"))
    for namespaces in (True, False) if sandbox._probe(True) is None else (False,):
        outcome("import os\nos.makedirs('a/b')\nos.chmod('a', 0)", namespaces=namespaces)
    assert list((tmp_path / "t").iterdir()) == []


def test_time_of_all_tests_together_is_bounded() -> None:
    began = time.monotonic()
    found = run_tests(
        "import time\ndef f(): time.sleep(50)",
        ["f()", "assert True", "f()"],
        Limits(time_s=0.5),
        namespaces=False,
    )
    assert [o.status for o in found] == ["timeout"] * 3 and time.monotonic() - began < 20


def test_a_sandbox_that_fails_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No error of the machine becomes a score."""
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr(sandbox, "_CHILD", broken)
    with pytest.raises(SandboxError, match=r"exit code 1 .*no such luck"):
        outcome("pass", namespaces=False)
    verifier = Code.__new__(Code)
    (
        verifier.columns,
        verifier.all_or_nothing,
        verifier.limits,
        verifier.namespaces,
        verifier.workers,
    ) = ("tests",), False, SHORT, False, 1
    with pytest.raises(
        UserError, match=r"reward\.terms\.code raised SandboxError: .*; for prompt 'p0'"
    ):
        VerifierScorer("code", verifier).score([plain("x = 1", tests=["assert x == 1"])])
    broken.write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(sandbox, "_MARGIN_S", 0.5)
    with pytest.raises(SandboxError, match="gave no answer within"):
        outcome("pass", namespaces=False, limits=Limits(time_s=0.1))


def test_a_runner_that_cannot_be_set_up_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The limits are part of the set-up: one that the kernel refuses stops the run."""
    with pytest.raises(SandboxError, match="set up"):
        outcome("pass", namespaces=False, limits=Limits(open_files=-5))


def test_without_namespaces_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        sandbox,
        "_probe",
        lambda namespaces: "unshare: Operation not permitted" if namespaces else None,
    )
    with pytest.raises(
        SandboxError, match=r"isolation=namespaces: unshare: .*isolation=limits does without"
    ):
        sandbox.isolation(Isolation.namespaces)
    assert sandbox.isolation(Isolation.auto) is False
    assert "(unshare: Operation not permitted)" in caplog.text
    monkeypatch.setattr(sandbox, "_probe", lambda namespaces: "nothing works")
    with pytest.raises(UserError, match=r"reward\.terms\.c \(kind=code\): nothing works"):
        make_verifier("c", RewardTerm(kind=TermKind.code))


def test_a_user_without_root_gets_the_namespaces_too() -> None:
    """A user namespace gives the right to the others: the same, run as an ordinary user where the
    tests are root.
    """
    interpreter = (
        sys.executable
        if sandbox._library() is None
        else shutil.which("python3.11", path="/usr/bin:/usr/local/bin")
    )
    if not ROOT or sandbox._probe(True) is not None or interpreter is None:
        pytest.skip(
            "needs root to become someone else, an interpreter that others may start, and "
            "namespaces"
        )
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import os; os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
        "from reward.sandbox import run as sandbox\n"
        "print(sandbox._probe(True), sandbox._probe(False))\n"
        'test = \'import os; assert (os.getuid(), sorted(os.listdir("/"))[:2]) == (12345, '
        '["bin", "box"])\'\n'
        "print(sandbox.run_tests('', [test], sandbox.Limits(), namespaces=True)[0].status)\n"
    )
    done = subprocess.run(
        [interpreter, "-B", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["None", "None", "passed"], done.stderr


# --- the verifier


def code_verifier(**options: object) -> Code:
    return Code(RewardTerm(kind=TermKind.code, time_limit_s=1.0, **options))  # type: ignore[arg-type]


def test_score_is_the_share_of_tests_or_all_of_them() -> None:
    tests = ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 8"]
    answer = "Here it is:\n```python\ndef f(x):\n    return x * x\n```\nIt squares."
    half = "```py\nf = lambda x: 1\n```\nno, rather\n```\nf = lambda x: 2 * x if x != 3 else 9\n```"
    verifier = code_verifier()
    rollouts = [
        plain(answer, "p0", tests=tests),
        plain(half, "p1", tests=tests),
        plain("I don't know.", "p2", tests=tests),
    ]
    assert VerifierScorer("code", verifier).score(rollouts).total == [0.75, 0.75, 0.0]
    assert VerifierScorer("code", code_verifier(all_or_nothing=True)).score(rollouts).total == [
        0.0,
        0.0,
        0.0,
    ]
    assert verifier.score("def f(x):\n    return x", ["assert f(1) == 1"]) == 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected a list of tests"),
        ("", "expected a list of tests"),
        ([1], "expected a list"),
        (["assert f(1) =="], "test 1 is no Python code"),
    ],
)
def test_broken_tests_are_the_data_s_fault(value: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"column 'tests' of prompt 'p0'.*{message}"):
        VerifierScorer("code", code_verifier()).score([plain("x", tests=value)])


def test_tests_as_text() -> None:
    verifier = code_verifier()
    assert verifier.reference('["assert x", "assert y"]') == ["assert x", "assert y"]
    assert verifier.reference("assert x\nassert y") == ["assert x\nassert y"]


@pytest.mark.parametrize("namespaces", MODES)
def test_a_response_that_closes_or_forges_its_report_is_wrong(namespaces: bool) -> None:
    """Neither hangs the supervisor nor stops the run."""
    began = time.monotonic()
    deaf = "import os, time\nos.closerange(3, 256)\ntime.sleep(1000)"
    assert outcome(deaf, namespaces=namespaces).status == "timeout"
    assert time.monotonic() - began < 4 * SHORT.time_s + 10
    forged = "import os\nfor number in range(3, 64):\n    try: os.write(number, b'!x')\n"
    forged += "    except OSError: pass\n"
    assert outcome(forged, namespaces=namespaces).status == "failed"
