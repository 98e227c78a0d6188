"""Two hosts, ranks on one and a server on the other: what launch=slurm starts there, and what its
ranks see while the link between them is cut, delayed and restored.

The hosts are network namespaces (tests/launch/hosts.py), srun is a stand-in that starts the tasks
of each node in its namespace, and the ranks ask by the trainer's own client.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.run.tracking.files import read_jsonl
from tests.launch.fake_slurm import fake_slurm
from tests.launch.hosts import DEVICE, Hosts, two_hosts, why_not
from tests.launch.launching import (
    PPO,
    TOKEN,
    figures,
    finish,
    is_gone,
    record,
    start,
    start_whole,
    until,
)
from tests.launch.stand_in import REQUEST_LIMIT_S
from tests.stages.test_resume import options, write_data

DELAY_S = 0.15  # of each packet, both ways
CUT_S = 15.0  # longer than the run below waits for an answer
RUNS = ("one", "two")
GRPO = [
    *("stage=grpo", "stage.steps=6", "stage.prompts_per_step=4", "stage.samples_per_prompt=4"),
    *(
        "stage.learning_rate=1e-3",
        "stage.samples_kept=16",
        "reward.function=tests.toys:even_tokens",
    ),
    *("model.dtype=float32", "engine.threads=1", "tracking=none"),
    *("data.max_prompt_length=24", "rollout.max_response_length=8", "rollout=server"),
    *("rollout.kv_cache_gib=0.05", "rollout.max_num_seqs=16", "rollout.server.threads=1"),
    *("rollout.server.request_limit_s=8", "launch.ranks_per_node=1"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


def slurm_of(hosts: Hosts, folder: Path) -> dict[str, str]:
    """A cluster of the two hosts: the first component of a job is on the first."""
    first, second = hosts.first, hosts.second
    nodes = {first.address: first.enter, second.address: second.enter}
    return fake_slurm(folder, nodes, [[first.address], [second.address]])


def answers(folder: Path) -> list[dict[str, Any]]:
    """What the first rank got from the server so far."""
    path = folder / "answers-0.jsonl"
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in whole if line.endswith("\n")]


def next_answer(folder: Path, *, fault: bool) -> dict[str, Any]:
    """The next answer from now on that is a fault, or is none."""
    seen = len(answers(folder)) + 1  # one may be under way

    def later() -> dict[str, Any] | None:
        fits = (answer for answer in answers(folder)[seen:] if bool(answer["fault"]) is fault)
        return next(fits, None)

    found: dict[str, Any] = until(later, 30.0)
    return found


def test_a_server_on_another_host_through_a_link_that_fails(hosts: Hosts, tmp_path: Path) -> None:
    asking = {"STAND_IN_RANK_0": "generate", "STAND_IN_RANK_1": "ask"}
    job = [
        *(*PPO, "rollout=server", "launch=slurm", "launch.ranks_per_node=2"),
        *("launch.server_nodes=1", "launch.slurm.gpus=false", "launch.slurm.wait=true"),
    ]
    with start(tmp_path, job, slurm_of(hosts, tmp_path) | asking) as process:
        try:
            assert next_answer(tmp_path, fault=False)["tokens"] == [5, 6, 7]

            hosts.link.is_cut = True
            cut = next_answer(tmp_path, fault=True)
            assert hosts.second.address in cut["fault"]
            assert cut["took_s"] < REQUEST_LIMIT_S + 1.0, "a fault is found within the limit"
            assert process.poll() is None

            hosts.link.is_cut = False
            assert next_answer(tmp_path, fault=False)["tokens"] == [5, 6, 7]

            hosts.link.delay_s = DELAY_S
            assert next_answer(tmp_path, fault=False)["took_s"] >= 2 * DELAY_S

            hosts.link.delay_s = 0.0
            assert next_answer(tmp_path, fault=False)["took_s"] < 2 * DELAY_S
        finally:
            hosts.link.is_cut, hosts.link.delay_s = False, 0.0
            (tmp_path / "stop").touch()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    rank = record(tmp_path, "rank-0")
    assert rank["environment"]["MASTER_ADDR"] == hosts.first.address
    assert f"rollout.servers=[http://{hosts.second.address}:20077]" in rank["arguments"]
    (path,) = tmp_path.glob("started-server-*.json")
    server = json.loads(path.read_text())
    assert server["environment"][TOKEN] == rank["environment"][TOKEN]
    until(lambda: is_gone(server["pid"]))


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_ranks_on_two_hosts_learn_what_they_learn_on_one(
    hosts: Hosts, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    write_data(tmp_path)
    one = ["launch=local", "launch.ranks_per_node=2"]
    two = [
        *("launch=slurm", "launch.nodes=2", "launch.ranks_per_node=1", "launch.slurm.wait=true"),
        *("launch.slurm.gpus=false", f"launch.env.GLOO_SOCKET_IFNAME={DEVICE}"),
    ]
    both = {hosts.first.address: hosts.first.enter, hosts.second.address: hosts.second.enter}
    cluster = fake_slurm(tmp_path, both, [list(both)]) | {"STAND_IN_OUT": str(tmp_path)}
    for name, launch in (("one", one), ("two", two)):
        given = [*options("sft", tmp_path, tiny_model(), name), "engine=zero2", *launch]
        process = start_whole(tmp_path, ["-m", "rlhf", *given], cluster)
        code, errors = finish(process)
        assert code == 0, errors
    expected, found = figures(tmp_path / "one" / "sft"), figures(tmp_path / "two" / "sft")
    assert len(found) >= 5
    for row, same in zip(found, expected, strict=True):
        assert row == pytest.approx(same, abs=1e-6)


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_run_outlives_a_cut_link_to_its_vllm_server(
    hosts: Hosts, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    write_data(tmp_path)
    common = [*GRPO, f"model.path={tiny_model()}", f"data.path={tmp_path / 'prompts.jsonl'}"]
    common.append(f"run.dir={tmp_path}")
    alone = start_whole(tmp_path, ["-m", "rlhf", *common, "run.name=one", "launch=local"])
    code, errors = finish(alone)
    assert code == 0, errors

    apart = ["launch=slurm", "launch.server_nodes=1", "launch.slurm.gpus=false"]
    apart += ["launch.slurm.wait=true", "run.name=two"]
    cluster = slurm_of(hosts, tmp_path) | {"STAND_IN_OUT": str(tmp_path)}
    hosts.link.delay_s = DELAY_S / 10
    try:
        process = start_whole(tmp_path, ["-m", "rlhf", *common, *apart], cluster)
        metrics = tmp_path / "two" / "grpo" / "metrics.jsonl"
        until(lambda: metrics.is_file() and len(read_jsonl(metrics)) >= 2, 300.0)
        (described,) = (tmp_path / "two" / "servers").glob("*.json")
        server = json.loads(described.read_text())
        hosts.link.is_cut = True
        time.sleep(CUT_S)
        steps = len(read_jsonl(metrics))
        hosts.link.is_cut = False
        code, errors = finish(process)
    finally:
        hosts.link.is_cut, hosts.link.delay_s = False, 0.0
    assert code == 0, errors
    assert steps < 6, "the link was cut in the middle of the run"
    url, said = f"http://{hosts.second.address}:20077", " ".join(errors.split())
    assert url in said and "brought back" in said and "serves again" in said
    expected, found = (read_jsonl(tmp_path / name / "grpo" / "samples.jsonl") for name in RUNS)
    assert len(found) == 6 * 16
    assert [row["response"] for row in found] == [row["response"] for row in expected]
    until(lambda: is_gone(server["pid"]))
