"""What `make chaos` does to servers: they are found, hang, die, and are cut off."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import child as chaos_child
from benchmarks.chaos import compare, network
from benchmarks.chaos import harness as chaos
from benchmarks.chaos.faults import FAULTS


def test_a_server_is_found_and_its_guard_is_not() -> None:
    inner = "import time; print('in', flush=True); time.sleep(60)"
    server = [sys.executable, "-S", "-c", inner, "vllm.entrypoints.openai.api_server"]
    guard = (
        f"import subprocess; server = subprocess.Popen({server!r}); "
        "server.wait(); 'rollout.server.guard openai.api_server'"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", guard], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        (found,) = chaos_child.server_processes()
        assert found != process.pid
        chaos_child.ACTIONS["stop_server"]("")
        assert state_of(found) == "T", "it hangs"
        chaos_child.ACTIONS["kill_server"]("")
        assert process.wait(timeout=10) == 0
    with pytest.raises(chaos_child.Broken, match="no vLLM server"):
        chaos_child.server_processes()


def state_of(process: int) -> str:
    """By its letter in /proc."""
    stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii")
    return stat.rpartition(")")[2].split()[0]


ANSWER = """
import socket, sys
with socket.create_server(("10.77.0.2", 8200)) as server:
    print("in", flush=True)
    while True:
        server.accept()[0].close()
"""
ASK = "import socket; socket.create_connection(('10.77.0.2', 8200), 2).close()"


def test_a_link_between_two_hosts_is_cut_and_restored() -> None:
    why = network.why_not()
    if why:
        pytest.skip(f"no hosts can be made here: {why}")
    with network.hosts() as hosts:
        command = [*hosts.far.prefix(), sys.executable, "-S", "-c", ANSWER]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None and server.stdout.readline() == b"in\n"
            ask = [*hosts.near.prefix(), sys.executable, "-S", "-c", ASK]
            answered = []
            for change in (None, hosts.cut, hosts.restore):
                if change is not None:
                    change()
                answered.append(subprocess.run(ask, check=False, capture_output=True).returncode)
            server.kill()
    assert answered == [0, 1, 0]


def test_where_no_hosts_can_be_made_the_fault_is_not_tried(tmp_path: Path) -> None:
    straight = compare.Straight(tmp_path, [], [])
    fault = next(fault for fault in FAULTS if fault.link)
    outcome = chaos.try_fault(fault, tmp_path, straight, "", "unshare: not allowed")
    assert outcome.code is None and outcome.not_tried == "unshare: not allowed"
