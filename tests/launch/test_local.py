"""launch=local with stand-ins for ranks and servers: what they are started with, which end they
come to, and that nothing is left of them.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launching import PPO, ROOT, SFT, TOKEN, is_gone, record, run, start, until

TWO = [*SFT, "engine=zero2", "launch=local", "launch.ranks_per_node=2"]
SERVED = [*PPO, "launch=local", "launch.ranks_per_node=2", "rollout=server"]


def test_ranks_get_torchruns_variables_and_the_same_options(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, [*TWO, "stage.steps=3", "launch.env.MARK=here"])
    assert code == 0, errors
    first, second = record(tmp_path, "rank-0"), record(tmp_path, "rank-1")
    assert first["arguments"] == second["arguments"]
    assert first["arguments"][:3] == ["-m", "rlhf", "stage=sft"]
    assert "stage.steps=3" in first["arguments"]
    about_launch = [word for word in first["arguments"] if word.startswith("launch")]
    assert about_launch == ["launch.kind=none"]
    for number, started in enumerate((first, second)):
        environment = started["environment"]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(number)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["MARK"] == "here"
        assert TOKEN not in environment, "no server is started"
    assert first["environment"]["MASTER_PORT"] == second["environment"]["MASTER_PORT"]
    assert first["folder"] == str(tmp_path)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_ranks_run_on_their_cores_with_a_thread_for_each(tmp_path: Path) -> None:
    one, other = sorted(os.sched_getaffinity(0))[:2]
    cores = f"launch.cores=['{one}','{other}']"
    code, _, errors = run(tmp_path, [*TWO[:-1], cores])
    assert code == 0, errors
    for number, core in ((0, one), (1, other)):
        started = record(tmp_path, f"rank-{number}")
        assert started["cores"] == [core]
        assert "engine.threads=1" in started["arguments"]


def test_servers_answer_before_ranks_start_and_end_after_them(tmp_path: Path) -> None:
    asking = {"STAND_IN_RANK_0": "ask", "STAND_IN_RANK_1": "ask"}
    code, _, errors = run(tmp_path, [*SERVED, "rollout.server.count=2"], asking)
    assert code == 0, errors
    asked = sorted(path.name for path in tmp_path.glob("asked-*"))
    assert len(asked) == 4, "both ranks asked both servers"
    assert {path.read_text() for path in tmp_path.glob("asked-*")} == {"answer"}
    servers = [json.loads(path.read_text()) for path in tmp_path.glob("started-server-*")]
    assert len({_run_name(server) for server in servers}) == 2, "each has a directory"
    token = record(tmp_path, "rank-0")["environment"][TOKEN]
    assert len(token) >= 32
    for server in servers:
        assert server["environment"][TOKEN] == token
        assert "stage=serve_rollout" in server["arguments"]
        assert "run.overwrite=true" in server["arguments"]
        assert "RANK" not in server["environment"]
        assert token not in " ".join(server["arguments"])
        assert is_gone(server["pid"])
    logs = list((tmp_path / "runs/default/launch").glob("ppo-server-*.log"))
    assert len(logs) == 2


def _run_name(server: dict[str, list[str]]) -> str:
    (name,) = (word for word in server["arguments"] if word.startswith("run.name="))
    return name


def test_servers_that_are_named_are_used_as_they_are(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, [*SERVED, "rollout.servers=[http://there:1]"])
    assert code == 0, errors
    assert "rollout.servers=[http://there:1]" in record(tmp_path, "rank-0")["arguments"]
    assert not list(tmp_path.glob("started-server-*"))


def test_the_end_of_a_server_is_told_and_ranks_go_on(tmp_path: Path) -> None:
    waiting = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "wait"}
    with start(tmp_path, SERVED, waiting) as process:
        until(lambda: len(list(tmp_path.glob("started-rank-*.json"))) == 2)
        (server,) = tmp_path.glob("started-server-*.json")
        pid = json.loads(server.read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: is_gone(pid))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.count("server 0: it ended with exit code 137") == 1
    assert (tmp_path / "saved-0").is_file(), "it went on until the signal"


def test_a_server_that_does_not_start_ends_the_launch_with_its_log(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, SERVED, {"STAND_IN_SERVER": "refuse"})
    assert code == 1
    assert "server 0" in errors and "exit code 3" in errors and "no model there" in errors
    assert not list(tmp_path.glob("started-rank-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_which_save(tmp_path: Path, number: signal.Signals) -> None:
    waiting = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "wait"}
    with start(tmp_path, TWO, waiting) as process:
        until(lambda: len(list(tmp_path.glob("started-rank-*.json"))) == 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text() == number.name
    assert "failed first" not in errors
    for rank in (0, 1):
        assert is_gone(record(tmp_path, f"rank-{rank}")["pid"])


def test_the_first_failure_ends_the_others_and_is_the_cause(tmp_path: Path) -> None:
    actions = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "fail data.path=d: no such file"}
    code, _, errors = run(tmp_path, TWO, actions)
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert "rank 1" in last and "data.path=d: no such file" in last
    if (tmp_path / "started-rank-0.json").is_file():
        assert is_gone(record(tmp_path, "rank-0")["pid"])


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [("exit 124", 124, "exit code 124"), ("exit 3", 3, "exit code 3")],
)
def test_the_exit_code_is_the_first_failures(
    tmp_path: Path, action: str, code: int, words: str
) -> None:
    got, _, errors = run(tmp_path, TWO, {"STAND_IN_RANK_0": action, "STAND_IN_RANK_1": "wait"})
    assert got == code
    assert "rank 0" in errors and words in errors


def test_a_rank_that_does_not_end_is_killed_after_the_grace(tmp_path: Path) -> None:
    actions = {"STAND_IN_RANK_0": "deaf", "STAND_IN_RANK_1": "wait"}
    with start(tmp_path, [*TWO, "launch.grace_s=0.5"], actions) as process:
        until(lambda: len(list(tmp_path.glob("started-rank-*.json"))) == 2)
        os.kill(record(tmp_path, "rank-1")["pid"], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1" in errors and "SIGKILL" in errors
    assert is_gone(record(tmp_path, "rank-0")["pid"])


def test_what_a_rank_leaves_behind_is_killed(tmp_path: Path) -> None:
    code, _, _ = run(tmp_path, TWO, {"STAND_IN_RANK_0": "orphan"})
    assert code == 1
    until(lambda: _has_ended(int((tmp_path / "orphan").read_text())))


def _has_ended(pid: int) -> bool:
    """Gone, or a zombie of whatever adopts orphans here."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or re.search(r"State:\tZ", status.read_text()) is not None


def test_ranks_and_servers_end_with_a_launcher_that_was_killed(tmp_path: Path) -> None:
    waiting = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "wait"}
    with start(tmp_path, SERVED, waiting) as process:
        until(lambda: len(list(tmp_path.glob("started-rank-*.json"))) == 2)
        (server,) = tmp_path.glob("started-server-*.json")
        process.kill()
        process.communicate(timeout=60)
    until(lambda: (tmp_path / "saved-0").is_file() and (tmp_path / "saved-1").is_file())
    for path in (server, *tmp_path.glob("started-rank-*.json")):
        pid = json.loads(path.read_text())["pid"]
        until(lambda pid=pid: _has_ended(pid))


def test_a_rank_may_not_launch_ranks(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, TWO, {"RANK": "1"})
    assert code == 1
    assert "launch=local" in errors and "launch=none" in errors


def test_the_launcher_loads_no_torch(tmp_path: Path) -> None:
    text = (
        "import sys\nfrom rlhf.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "print(code, [name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o700)
    command = [sys.executable, "-c", text, *TWO, f"launch.python={python}"]
    env = {k: v for k, v in os.environ.items() if k != "RANK"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "0 []", done.stderr


def test_a_secret_on_the_command_line_is_refused(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 24
    code, _, errors = run(tmp_path, [*TWO, f"launch.env.HF_TOKEN={secret}"])
    assert code == 1
    assert "launch.env" in errors and secret not in errors
