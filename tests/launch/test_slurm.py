"""The job script of launch=slurm, run by stand-ins of sbatch, srun and scontrol that start its
tasks on this machine: bash reads it, ranks and servers start as planned, and it ends as they do.

No SLURM has run it: its own part (components, steps, devices) is as its manual says.
"""

import json
import re
import signal
import stat
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.launch.fake_slurm import slurm_here
from tests.launch.launching import PPO, SFT, TOKEN, is_gone, record, run, start, until

SLURM = ["launch=slurm", "launch.ranks_per_node=2"]
SERVED = [*PPO, *SLURM, "rollout=server"]
WAIT = "launch.slurm.wait=true"


def script(folder: Path, arguments: list[str]) -> str:
    """The script that is written for a command line."""
    code, out, errors = run(folder, [*arguments, "launch.start=false"])
    assert code == 0, errors
    path = Path(out.strip().rpartition(" ")[2])
    assert path.is_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    return path.read_text(encoding="utf-8")


def sbatch_options(text: str) -> list[list[str]]:
    """The #SBATCH options of each component."""
    components: list[list[str]] = [[]]
    for line in text.splitlines():
        word = line.removeprefix("#SBATCH ")
        if word == "hetjob" and word != line:
            components.append([])
        elif word != line:
            components[-1].append(word)
    return components


def test_one_component_where_servers_share_the_nodes(tmp_path: Path) -> None:
    text = script(
        tmp_path,
        [
            *(*SERVED, "launch.nodes=2", "launch.slurm.time=12:00:00"),
            *("launch.slurm.partition=long", "launch.slurm.account=us", "launch.slurm.qos=high"),
            *("launch.slurm.cpus_per_server=16", "launch.slurm.extra=[--exclusive]"),
            *("launch.slurm.setup=[module load cuda]", "launch.env.MARK='a b'"),
        ],
    )
    (options,) = sbatch_options(text)
    assert {
        *("--nodes=2", "--ntasks-per-node=3", "--cpus-per-task=16", "--gpus-per-node=3"),
        *("--time=12:00:00", "--partition=long", "--account=us", "--qos=high", "--exclusive"),
        "--signal=B:TERM@300",
    } <= set(options)
    assert "\nmodule load cuda\n" in text
    assert "export MARK='a b'" in text
    assert "srun --overlap --nodes=2 --ntasks=4 --ntasks-per-node=2" in text


def test_two_components_where_servers_have_nodes_of_their_own(tmp_path: Path) -> None:
    text = script(
        tmp_path,
        [
            *(*SERVED, "launch.nodes=2", "launch.server_nodes=2", "rollout.server.count=4"),
            *("rollout.server.tensor_parallel=2", "launch.slurm.partition=long"),
        ],
    )
    ranks, servers = sbatch_options(text)
    assert {"--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"} <= set(ranks)
    assert {"--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=4"} <= set(servers)
    assert "--partition=long" in ranks and "--partition=long" in servers
    assert "--het-group=0" in text and "--het-group=1" in text


def test_on_cpus_no_devices_are_asked_for(tmp_path: Path) -> None:
    text = script(tmp_path, [*SERVED, "launch.slurm.gpus=false"])
    assert "gpus" not in text
    assert "CUDA_VISIBLE_DEVICES" not in text


def test_a_stage_of_one_process_is_a_job_of_one_task(tmp_path: Path) -> None:
    stage = ["stage=eval", "launch=slurm", "launch.ranks_per_node=4", "engine.gpus=4"]
    text = script(tmp_path, stage)
    assert "--ntasks=1 " in text
    assert "WORLD_SIZE=1" in text


@pytest.mark.parametrize("apart", [0, 1])
def test_the_job_starts_servers_then_ranks_and_ends_with_them(tmp_path: Path, apart: int) -> None:
    actions = {"STAND_IN_RANK_0": "ask", "STAND_IN_RANK_1": "ask", "CUDA_VISIBLE_DEVICES": "4,5,6"}
    job = [*SERVED, WAIT, f"launch.server_nodes={apart}"]
    code, out, errors = run(tmp_path, job, slurm_here(tmp_path) | actions)
    assert code == 0, errors
    assert "Submitted batch job 77" in out
    first, second = record(tmp_path, "rank-0"), record(tmp_path, "rank-1")
    assert first["environment"]["MASTER_ADDR"] == "localhost"
    assert first["environment"]["MASTER_PORT"] == "10077"
    assert second["environment"]["LOCAL_RANK"] == second["environment"]["RANK"] == "1"
    assert second["environment"]["WORLD_SIZE"] == "2"
    assert "rollout.servers=[http://localhost:20077]" in first["arguments"]
    (path,) = tmp_path.glob("started-server-*.json")
    server = json.loads(path.read_text())
    assert "stage.port=20077" in server["arguments"]
    assert "run.name=default/server-0" in server["arguments"]
    devices = [started["environment"]["CUDA_VISIBLE_DEVICES"] for started in (first, server)]
    assert devices == (["4,5,6", "4"] if apart else ["4,5", "6"])
    assert (tmp_path / "asked-0-20077").read_text() == "answer"
    token = first["environment"][TOKEN]
    assert token == server["environment"][TOKEN]
    assert token not in (tmp_path / "submitted.sh").read_text()
    until(lambda: is_gone(server["pid"]))


def test_the_job_ends_with_the_ranks_code(tmp_path: Path) -> None:
    job = [*SFT, "engine=zero2", *SLURM, WAIT]
    code, _, _ = run(tmp_path, job, slurm_here(tmp_path) | {"STAND_IN_RANK_1": "exit 3"})
    assert code == 3


def test_a_server_that_ends_ends_the_job_before_any_rank_starts(tmp_path: Path) -> None:
    refusing = slurm_here(tmp_path) | {"STAND_IN_SERVER": "refuse"}
    code, _, errors = run(tmp_path, [*SERVED, WAIT], refusing)
    assert code != 0
    assert "http://localhost:20077" in errors
    assert not list(tmp_path.glob("started-rank-*"))


def test_the_signal_before_the_time_limit_lets_ranks_save(tmp_path: Path) -> None:
    waiting = {"STAND_IN_RANK_0": "wait", "STAND_IN_RANK_1": "wait"}
    environment = slurm_here(tmp_path) | waiting
    with start(tmp_path, [*SERVED, WAIT], environment) as process:
        until(lambda: len(list(tmp_path.glob("started-rank-*.json"))) == 2)
        _tell_script(process.pid)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "saved-0").is_file() and (tmp_path / "saved-1").is_file()


def _tell_script(launcher: int) -> None:
    """SIGTERM to the process that runs the script, as SLURM does: sbatch has become it."""
    (script,) = psutil.Process(launcher).children()
    script.send_signal(signal.SIGTERM)


def test_without_sbatch_the_message_says_where_the_script_is(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, errors = run(tmp_path, [*SFT, "engine=zero2", *SLURM], {"PATH": str(empty)})
    assert code == 1
    path = re.search(r"\S+/launch/sft\.sh", errors)
    assert path is not None and Path(path[0]).is_file()
    assert "sbatch" in errors


def test_submitting_returns_at_once(tmp_path: Path) -> None:
    code, out, errors = run(tmp_path, [*SFT, "engine=zero2", *SLURM], slurm_here(tmp_path))
    assert code == 0, errors
    assert "Submitted batch job 77" in out
    assert not list(tmp_path.glob("started-*"))
