"""1,000 calls that a policy might write, most of them broken or hostile: each is answered, counted
and contained, and the run feels none of them.
"""

import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind
from reward.sandbox import run
from reward.sandbox.run import FIRST_UID, UIDS
from rlhf.environments import factory
from rlhf.types import Step

ROOT = Path(__file__).resolve().parents[2]
CALLS = 1000
SECRET = "the-secret-of-the-run"
BUILT_IN = ["calculator", "python", "lookup", "shell"]


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def broken_json(rng: random.Random) -> str:
    """A call of which something is missing, doubled or exchanged."""
    text = call("calculator", expression="1 + 1").removesuffix("\n</tool_call>")
    at = rng.randrange(13, len(text))
    cut = text[:at]
    if rng.random() < 0.5:
        cut = text[:at] + rng.choice('{}[]",:\\\n\x00é') + text[at + 1 :]
    if rng.random() < 0.7:
        cut += "\n</tool_call>"
    return cut


def unknown(rng: random.Random) -> str:
    names = ["calc", "", "os.system", "python\n", "__import__", "Ω" * 500, "<|im_end|>", "shell;ls"]
    return call(rng.choice(names), command="ls")


def misfit(rng: random.Random) -> str:
    arguments = [{}, {"code": 3}, {"code": None}, {"kode": "1"}, {"code": "1", "x": [[]]}]
    return call(rng.choice(["python", "shell", "lookup"]), **rng.choice(arguments))


def arithmetic(rng: random.Random) -> str:
    pieces = [str(rng.randint(0, 99)), "+", "*", "(", ")", "/ 0", "**", "sqrt", "e", "x", "'"]
    return call("calculator", expression=" ".join(rng.choices(pieces, k=rng.randint(1, 9))))


def snippet(rng: random.Random) -> str:
    pieces = [
        "x = 1",
        "print(x)",
        "1 / 0",
        "raise SystemExit(3)",
        "x",
        "import math",
        "def f(",
        "print('\\ud800')",
        "exit()",
        "import os; os._exit(7)",
        "[].pop()",
        "yield",
    ]
    return call("python", code="\n".join(rng.choices(pieces, k=rng.randint(1, 4))))


def huge(rng: random.Random) -> str:
    codes = [
        "print('x' * 10**7)",
        "'y' * 10**6",
        "x = 'z' * 10**10",
        "print(list(range(10**6)))",
        "[0] * 10**9",
        "10 ** 10 ** 4",
    ]
    return call("python", code=rng.choice(codes))


def files(rng: random.Random) -> str:
    target = os.environ["FUZZ_TARGET"]
    codes = [
        f"open({target!r}, 'w').write('broken in')",
        f"import os; os.remove({target!r})",
        f"print(open({target!r}).read())",
        "print(open('/etc/shadow').read())",
        "import os; os.symlink('/etc', 'etc'); print(os.listdir('etc'))",
        "import shutil; shutil.rmtree('/', ignore_errors=True)",
        "for n in range(10**4): open(f'{n}', 'w').write('x' * 10**4)",
        "print(open('/proc/self/environ').read())",
    ]
    commands = [
        f"cat {target}",
        f"rm -rf {target} /",
        "cat /etc/shadow",
        "ls / > /etc/x",
        "echo x > a; cat a; env",
        "dd if=/dev/zero of=big bs=1M count=100",
        "cat /proc/1/environ",
    ]
    if rng.random() < 0.5:
        return call("python", code=rng.choice(codes))
    return call("shell", command=rng.choice(commands))


def sockets(rng: random.Random) -> str:
    port = os.environ["FUZZ_PORT"]
    connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
    codes = [
        connect,
        "import socket; socket.socket().bind(('0.0.0.0', 8080))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
        "import ctypes; ctypes.CDLL(None).system(b'ls')",
    ]
    if rng.random() < 0.5:
        return call("python", code=rng.choice(codes))
    return call("shell", command=f'python3 -c "{connect}"')


def bombs(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return call("python", code="import os\nwhile True: os.fork()")
    return call("shell", command="f() { f | f & }; f; sleep 0.2; exit 1")


def loops(rng: random.Random) -> str:
    codes = [
        "while True: pass",
        "import time; time.sleep(10**6)",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "9 ** 9 ** 9",
    ]
    return call("python", code=rng.choice(codes))


# how many of each; None of the last four may pass
KINDS: dict[Callable[[random.Random], str], int] = {
    broken_json: 420,
    unknown: 130,
    misfit: 130,
    arithmetic: 110,
    snippet: 110,
    huge: 30,
    files: 40,
    sockets: 16,
    bombs: 6,
    loops: 8,
}


def test_kinds_add_up() -> None:
    assert sum(KINDS.values()) == CALLS


def test_a_thousand_calls_are_contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if run._probe(True) is not None:
        pytest.skip("the kernel gives no namespaces here")
    target = tmp_path / "target"
    target.write_text(SECRET)
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "a.txt").write_text("nothing\n")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    monkeypatch.setenv("FUZZ_TARGET", str(target))
    monkeypatch.setenv("FUZZ_PORT", str(server.getsockname()[1]))
    monkeypatch.setenv("RUN_TOKEN", SECRET)
    rng = random.Random(17)
    texts = [(make, make(rng)) for make, number in KINDS.items() for _ in range(number)]
    rng.shuffle(texts)
    config = EnvironmentConfig(
        kind=EnvironmentKind.tools, tools=BUILT_IN, files=str(shown), tool_limit_s=1.0
    )
    make_environment = factory.make_factory(config)

    def play(item: tuple[Callable[[random.Random], str], str]) -> tuple[str, str, Step]:
        environment = make_environment()
        environment.reset({}, 1)
        step = environment.step(item[1])
        assert isinstance(step, Step)
        return item[0].__name__, item[1], step

    with ThreadPoolExecutor(6) as pool:
        played = list(pool.map(play, texts))
    totals: Counter[str] = Counter()
    for kind, text, step in played:
        assert step.info["calls"] == 1.0 and not step.done, text
        assert isinstance(step.observation, list) and len(step.observation) == 1
        content = step.observation[0]["content"]
        bad = step.info["broken_calls"] == 1.0 or step.info["failed_calls"] == 1.0
        totals[kind] += 1
        totals[f"{kind} bad"] += bad
        assert len(content) < 2600 and SECRET not in content, text
        assert not bad or "error: " in content, text
        assert f'File "{ROOT}' not in content and "calls_child" not in content, content
    print(totals)
    for kind in ("unknown", "misfit", "sockets", "bombs", "loops"):
        assert totals[f"{kind} bad"] == totals[kind], kind
    assert totals["broken_json bad"] > 0.8 * totals["broken_json"]
    assert target.read_text() == SECRET and (shown / "a.txt").read_text() == "nothing\n"
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()
    theirs = [
        process
        for process in psutil.process_iter(["uids"])
        if process.info["uids"] and FIRST_UID <= process.info["uids"].real < FIRST_UID + UIDS
    ]
    # a test beside this one may have a sandbox of its own, which its limit ends
    _, left = psutil.wait_procs(theirs, timeout=20)
    assert left == []
    environment = make_environment()
    environment.reset({}, 1)
    after = environment.step(call("calculator", expression="6 * 7"))
    assert isinstance(after, Step) and isinstance(after.observation, list)
    assert after.observation[0]["content"] == "42"
