"""launch=ray on a cluster of this machine, with stand-ins for ranks and servers."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.launch.launching import PPO, SFT, TOKEN, is_gone, record, run, start, until

HAS_RAY = importlib.util.find_spec("ray") is not None
with_ray = pytest.mark.skipif(not HAS_RAY, reason="ray is not installed (the extra ray)")
# a cluster starts in 10 s and has 7 processes
pytestmark = pytest.mark.timeout(240)

TWO = [*SFT, "engine=zero2", "launch=ray", "launch.ranks_per_node=2"]
SERVED = [*PPO, "launch=ray", "launch.ranks_per_node=1", "rollout=server"]
FEW_CORES = ["launch.ray.cpus_per_rank=0.1", "launch.ray.cpus_per_server=0.1"]
LIMIT_S = 200.0


@pytest.mark.skipif(HAS_RAY, reason="ray is installed")
def test_without_ray_the_message_has_the_extra(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, TWO)
    assert code == 1
    assert "ray" in errors and "rlhf-toolkit[ray]" in errors


@with_ray
@pytest.mark.full
def test_ranks_and_servers_of_several_nodes(tmp_path: Path) -> None:
    nodes = ["launch.nodes=2", "launch.server_nodes=1", "rollout.server.count=2"]
    asking = {"STAND_IN_RANK_0": "ask", "STAND_IN_RANK_1": "ask"}
    code, _, errors = run(tmp_path, [*SERVED, *nodes, *FEW_CORES], asking, LIMIT_S)
    assert code == 0, errors
    first, second = record(tmp_path, "rank-0"), record(tmp_path, "rank-1")
    for started in (first, second):
        assert started["environment"]["WORLD_SIZE"] == "2"
        assert started["environment"]["LOCAL_RANK"] == "0"
        assert started["folder"] == str(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", TOKEN):
        assert first["environment"][name] == second["environment"][name]
    servers = [json.loads(path.read_text()) for path in tmp_path.glob("started-server-*.json")]
    assert len(servers) == 2
    assert len(list(tmp_path.glob("asked-*"))) == 4
    for started in (first, second, *servers):
        assert is_gone(started["pid"])


@with_ray
@pytest.mark.full
def test_the_first_failure_is_the_cause_and_ends_the_rest(tmp_path: Path) -> None:
    actions = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "fail data.path=d: no such file"}
    nodes = ["launch.nodes=2", "launch.ranks_per_node=1"]
    code, _, errors = run(tmp_path, [*TWO[:-1], *nodes, *FEW_CORES], actions, LIMIT_S)
    assert code == 1
    assert "rank 1 failed first: data.path=d: no such file" in errors
    assert is_gone(record(tmp_path, "rank-1")["pid"])


@with_ray
@pytest.mark.full
def test_a_signal_reaches_ranks_on_all_nodes(tmp_path: Path) -> None:
    waiting = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "wait"}
    nodes = ["launch.nodes=2", "launch.ranks_per_node=1"]
    with start(tmp_path, [*TWO[:-1], *nodes, *FEW_CORES], waiting) as process:
        until(lambda: len(list(tmp_path.glob("started-rank-*.json"))) == 2, LIMIT_S)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "saved-0").is_file() and (tmp_path / "saved-1").is_file()


@with_ray
@pytest.mark.full
def test_a_lost_node_starts_the_run_again_where_it_was_saved(tmp_path: Path) -> None:
    """The actor's process is killed, as a node that is lost takes it away."""
    waiting = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "wait"}
    again = [*TWO, "launch.ray.restarts=1", *FEW_CORES]
    saved = tmp_path / "runs/default/sft"
    saved.mkdir(parents=True)
    with start(tmp_path, again, waiting) as process:
        until(lambda: len(list(tmp_path.glob("started-rank-*.json"))) == 2, LIMIT_S)
        first = [record(tmp_path, f"rank-{rank}")["pid"] for rank in (0, 1)]
        os.kill(psutil.Process(first[0]).ppid(), signal.SIGKILL)
        until(lambda: all(is_gone(pid) for pid in first), LIMIT_S)
        until(lambda: record(tmp_path, "rank-1")["pid"] not in first, LIMIT_S)
        until(lambda: record(tmp_path, "rank-0")["pid"] not in first, LIMIT_S)
        assert "run.resume=true" in record(tmp_path, "rank-0")["arguments"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGTERM


@with_ray
@pytest.mark.full
def test_a_cluster_without_room_is_a_message(tmp_path: Path) -> None:
    huge = ["launch.ray.cpus_per_rank=1000", "launch.ray.wait_s=2"]
    code, _, errors = run(tmp_path, [*TWO, *huge], limit_s=LIMIT_S)
    assert code == 1
    assert "launch.ray.wait_s" in errors and "launch.ray.cpus_per_rank" in errors
    assert not list(tmp_path.glob("started-*"))
