"""Servers that a run starts itself: they end with it, however it ends, and are restarted at the
current version. What is started here has vLLM's routes and options but no model.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from conf.choices import RolloutBackend
from conf.model import ServerConfig, Transfer
from conf.schema import RolloutConfig
from rlhf.types import UserError
from rollout.server.generator import FOLDER, ServerGenerator
from rollout.server.launch import recipe_of
from rollout.server.process import Child, core_list
from rollout.weights import HubNames
from tests.rollout.server.fake_vllm import interpreter
from tests.rollout.server.test_servers import PROMPTS, lora, model, states, wait_for, whole, written

__all__ = ["model"]  # a fixture

ROOT = Path(__file__).resolve().parents[3]
# A process with a child of its own, as a server has workers.
TREE = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print(child.pid, flush=True); time.sleep(600)"
)
PARENT = """
import sys, time
from pathlib import Path
from rollout.server.process import Child

child = Child([sys.executable, "-c", sys.argv[1]], {**__import__("os").environ}, Path(sys.argv[2]))
while not child.log.read_text():
    time.sleep(0.05)
print(child.server_pid(), flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether the process is there; a zombie counts."""
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_servers_end_with_the_trainer(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, TREE, str(log)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as trainer:
        assert trainer.stdout is not None
        server = int(trainer.stdout.readline())
        worker = int(log.read_text())
        assert is_running(server) and is_running(worker)
        trainer.send_signal(number)
        trainer.wait(10)
    wait_for(lambda: not is_running(server) and not is_running(worker))


def test_memory_of_a_killed_trainer_is_given_back_by_its_server(tmp_path: Path) -> None:
    holding = PARENT.replace(
        "child = Child",
        "from rlhf.process.files import OwnFolder\n"
        "folders = [OwnFolder(kind, Path(sys.argv[3])) for kind in ('weights', 'adapter')]\n"
        "child = Child",
    )
    # the system's folder for temporary files, here a test's
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", holding, TREE, str(tmp_path / "log"), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline()
        assert len(list(tmp_path.glob("rlhf-*"))) == 2
        trainer.kill()
    wait_for(lambda: not list(tmp_path.glob("rlhf-*")))


def test_what_a_killed_server_leaves_behind_is_ended(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", TREE], os.environ, tmp_path / "log")
    wait_for(lambda: bool((tmp_path / "log").read_text()))
    worker, server = int((tmp_path / "log").read_text()), child.server_pid()
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not child.is_running())
    assert not is_running(server) and not is_running(worker)
    child.stop()


def test_stop_ends_what_does_not_listen(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + TREE
    child = Child([sys.executable, "-c", deaf], os.environ, tmp_path / "log", grace_s=0.2)
    wait_for(lambda: bool((tmp_path / "log").read_text()))
    server = child.server_pid()
    begun = time.monotonic()
    child.stop()
    assert time.monotonic() - begun < 5 and not is_running(server)


def test_cores_are_the_servers_own(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    program = "import os; print(os.sched_getaffinity(0))"
    child = Child([sys.executable, "-c", program], os.environ, tmp_path / "log", [core])
    wait_for(lambda: not child.is_running())
    assert (tmp_path / "log").read_text().strip() == str({core})
    child.stop()


# ---- a run's own servers ----

Make = Callable[..., ServerGenerator]


@pytest.fixture
def make(
    model: Any,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Make]:
    made: list[ServerGenerator] = []
    python = interpreter(tmp_path, monkeypatch)

    def generator(*, adapter_rank: int | None = None, **changes: Any) -> ServerGenerator:
        settings = RolloutConfig(
            backend=RolloutBackend.server,
            max_response_length=10,
            max_num_seqs=8,
            server=ServerConfig(**{"python": str(python), "request_limit_s": 5.0, **changes}),
        )
        directory = tiny_model()
        made.append(
            ServerGenerator(
                str(directory),
                AutoTokenizer.from_pretrained(directory),
                settings,
                max_tokens=40,
                names=HubNames(model),
                dtype=torch.float32,
                folder=tmp_path,
                adapter_rank=adapter_rank,
            )
        )
        return made[-1]

    yield generator
    for item in made:
        item.close()


def described(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / FOLDER).glob("*.json"))]


def test_a_run_starts_its_servers_and_ends_them(make: Make, tmp_path: Path) -> None:
    generator = make(count=2)
    found = described(tmp_path)
    assert [entry["url"] for entry in found] == sorted(
        member.url for member in generator._service.pool.members
    )
    assert all(entry["dtype"] == "float32" and entry["world_size"] == 1 for entry in found)
    assert all(is_running(entry["pid"]) for entry in found)
    assert len(list((tmp_path / FOLDER).glob("*.log"))) == 2
    generator.close()
    assert not any(is_running(entry["pid"]) for entry in found)


def test_a_killed_server_is_restarted_and_gets_the_weights_first(
    make: Make,
    model: Any,
    tmp_path: Path,
) -> None:
    generator = make(count=1)
    generator.sync(whole(model), 7)
    expected = written(generator.generate(PROMPTS, seed=2))
    (before,) = described(tmp_path)
    os.kill(before["pid"], signal.SIGKILL)
    rollouts = generator.generate(PROMPTS, seed=2)
    assert written(rollouts) == expected and {r.version for r in rollouts} == {7}
    (after,) = described(tmp_path)
    assert after["url"] == before["url"] and after["pid"] != before["pid"]
    assert not is_running(before["pid"])


def test_a_server_stopped_by_a_signal_counts_as_hung(make: Make, tmp_path: Path) -> None:
    generator = make(count=1, request_limit_s=1.0, adapter_rank=2)
    generator.sync(lora(), 1)
    (before,) = described(tmp_path)
    os.kill(before["pid"], signal.SIGSTOP)
    assert {r.version for r in generator.generate(PROMPTS, seed=2)} == {1}
    assert not is_running(before["pid"])


def test_restarts_have_an_end(make: Make, tmp_path: Path) -> None:
    generator = make(count=1, restarts=1)
    for _ in range(2):
        (entry,) = described(tmp_path)
        wait_for(lambda: states(generator) == ["serving"])
        os.kill(entry["pid"], signal.SIGKILL)
        try:
            generator.generate(PROMPTS, seed=2)
        except UserError as error:
            stopped = error
    assert "rollout=server" in str(stopped) and entry["url"] in str(stopped)


def test_a_server_that_does_not_start(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(UserError) as error:
        make()
    assert "no memory on this device" in str(error.value)  # the end of its log
    assert str(tmp_path / FOLDER) in str(error.value)


def test_a_server_that_starts_too_slowly(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_START_S", "60")
    with pytest.raises(UserError) as error:
        make(start_limit_s=0.5)
    assert "rollout.server.start_limit_s" in str(error.value)


def test_the_token_is_made_and_needed(make: Make, tmp_path: Path) -> None:
    import httpx

    make()
    (entry,) = described(tmp_path)
    assert httpx.get(f"{entry['url']}/v1/models").status_code == 401
    arguments = json.loads((tmp_path / entry["url"].rpartition(":")[2]).read_text())["arguments"]
    assert "rollout.server.middleware.BearerToken" in arguments


# ---- how they are started ----


def recipe(rollout: RolloutConfig, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "token": "t",
        "dtype": torch.bfloat16,
        "max_tokens": 77,
        "transfer": Transfer.file,
    }
    return recipe_of(rollout, "some/model", **{**given, **changes})


def test_command() -> None:
    server = ServerConfig(tensor_parallel=2, data_parallel=3)
    rollout = RolloutConfig(backend=RolloutBackend.server, server=server, in_flight=True)
    made = recipe(rollout, adapter_rank=5)
    command = made.command("127.0.0.1", 8000)
    given = dict(zip(command, [*command[1:], ""], strict=True))
    expected = {
        "--model": "some/model",
        "--dtype": "bfloat16",
        "--max-model-len": "77",
        "--port": "8000",
        "--logprobs-mode": "processed_logprobs",
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "3",
        "--max-lora-rank": "8",
        "--max-loras": "2",
        "--weight-transfer-config": '{"backend": "rlhf"}',
    }
    assert {name: given[name] for name in expected} == expected
    assert "--tokens-only" in command and "--trust-remote-code" not in command
    assert ("--no-enable-chunked-prefill" in command) is not torch.cuda.is_available()
    assert "--enable-lora" not in recipe(RolloutConfig()).command("127.0.0.1", 1)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    server = ServerConfig(count=2, cores=["0", "4-7"], devices=["0", "1,2"], tensor_parallel=2)
    made = recipe(RolloutConfig(server=server))
    names = made.environment(1)
    assert names["CUDA_VISIBLE_DEVICES"] == "1,2" and names["RLHF_ROLLOUT_TOKEN"] == "t"
    assert names["VLLM_CPU_OMP_THREADS_BIND"] == "4,5|6,7" and names["OMP_NUM_THREADS"] == "2"
    assert names["VLLM_SERVER_DEV_MODE"] == "1"
    assert not {"RANK", "VLLM_ENABLE_V1_MULTIPROCESSING"} & names.keys()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in names
    fewer = dataclasses.replace(server, threads=1)
    names = recipe(RolloutConfig(server=fewer)).environment(1)
    assert names["VLLM_CPU_OMP_THREADS_BIND"] == "4|6"


def test_core_lists() -> None:
    assert core_list("0-2,5") == [0, 1, 2, 5]
    for wrong in ("", "a", "1-", "2-1"):
        with pytest.raises(ValueError, match=r"core|int"):
            core_list(wrong)


@pytest.mark.parametrize("name", ["cores", "devices"])
def test_an_entry_for_each_server(name: str) -> None:
    with pytest.raises(ValueError, match=f"rollout.server.{name}"):
        ServerConfig(count=2, **{name: ["0"]})


def test_servers_need_the_backend() -> None:
    with pytest.raises(ValueError, match=r"rollout\.servers"):
        RolloutConfig(servers=["http://a:1"])
