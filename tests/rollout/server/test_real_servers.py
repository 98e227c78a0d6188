"""Runs by vLLM servers take the same steps as runs by the engine in the trainer's process, with one
server or two, and with one that is killed on the way.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rollout.server import routes
from rollout.server.generator import FOLDER, ServerGenerator
from rollout.server.middleware import TOKEN_VARIABLE
from tests import toys
from tests.acting import turning_policy
from tests.online import test_zero_online as zero
from tests.online import zero_online_worker
from tests.stages.test_resume import rows, run, write_data

pytestmark = [pytest.mark.full, pytest.mark.vllm, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[3]
TOKEN = "token-of-the-test"
ENGINE = ["rollout.kv_cache_gib=0.05", "rollout.max_num_seqs=16", "rollout.server.threads=1"]
LENGTHS = ["data.max_prompt_length=24", "rollout.max_response_length=4"]
LORA = ["adapter=lora", "adapter.rank=4"]
GRPO = [
    "stage=grpo",
    "model.dtype=float32",
    "engine.threads=1",
    "tracking=none",
    "reward.function=tests.toys:even_tokens",
    "stage.steps=3",
    "stage.prompts_per_step=4",
    "stage.samples_per_prompt=4",
    "stage.learning_rate=1e-3",
    *LENGTHS,
    *ENGINE,
]


@contextmanager
def serving(folder: Path, model: Path, names: list[str], *more: str) -> Iterator[list[str]]:
    """A server of `model` for each name, by stage=serve_rollout: their URLs."""
    environment = os.environ | {TOKEN_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlhf", "stage=serve_rollout", f"run.dir={folder}"]
    command += [f"model.path={model}", "model.dtype=float32", "tracking=none", "stage.port=0"]
    command += [f"rollout.server.token_env={TOKEN_VARIABLE}", *LENGTHS, *ENGINE, *more]
    started = []
    try:
        for name in names:
            log = (folder / f"{name}.txt").open("wb")
            started.append(
                subprocess.Popen(
                    [*command, f"run.name={name}"], env=environment, stdout=log, stderr=log
                )
            )
        yield [_url(folder, name, process) for name, process in zip(names, started, strict=True)]
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in started]
    assert codes == [0] * len(names)


def _url(folder: Path, name: str, process: "subprocess.Popen[bytes]") -> str:
    while True:
        found = list((folder / name / FOLDER).glob("*.json"))
        if found:
            url: str = json.loads(found[0].read_text())["url"]
            return url
        assert process.poll() is None, (folder / f"{name}.txt").read_text()[-3000:]
        time.sleep(0.5)


def assert_equal(one: Path, other: Path) -> None:
    """Metrics to 1e-6, samples to the token, gaps under 1e-4."""
    ours, theirs = rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl")
    assert len(ours) == len(theirs) >= 3
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            if "gap" in name:
                assert max(value, yours[name]) < 1e-4, name
            else:
                assert value == pytest.approx(yours[name], rel=1e-6, abs=1e-6), name
    texts = [
        [row.get("response") for row in rows(place / "samples.jsonl")] for place in (one, other)
    ]
    assert texts[0] == texts[1] and any(texts[0])


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Path],
    one_thread: Iterator[None],
) -> Path:
    folder = tmp_path_factory.mktemp("servers")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def train(folder: Path, tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """train(name, overrides ...) -> the run's directory; made once for each name."""
    made: dict[str, Path] = {}

    def go(name: str, *more: str) -> Path:
        if name not in made:
            given = [*GRPO, f"model.path={tiny_model()}", f"data.path={folder / 'prompts.jsonl'}"]
            given += [f"run.dir={folder}", f"run.name={name}", *more]
            made[name] = run("grpo", given)
        return made[name]

    return go


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_runs_by_no_one_and_two_servers_are_equal(
    kind: str, folder: Path, train: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    more = LORA if kind == "lora" else []
    engine = train(f"{kind}-0", "rollout=vllm", *more, *ENGINE)
    with serving(folder, tiny_model(), [f"{kind}-a", f"{kind}-b"], *more) as urls:
        for count in (1, 2):
            servers = f"rollout.servers=[{','.join(urls[:count])}]"
            token = f"rollout.server.token_env={TOKEN_VARIABLE}"
            name = f"{kind}-{count}"
            by_servers = train(name, "rollout=server", servers, token, *more, *ENGINE)
            assert_equal(engine, by_servers)


def test_episodes_of_a_server_are_those_of_the_engine(
    tmp_path: Path, one_thread: Iterator[None]
) -> None:
    """Each goes on by itself there, and all together here."""
    model = turning_policy(tmp_path / "policy")
    asked = [{"prompt": [{"role": "user", "content": f"say {word}"}]} for word in "abcd"]
    given = [option for option in GRPO if not option.startswith("reward.")]
    given += [f"model.path={model}", "data.chat_template=plain", f"run.dir={tmp_path}"]
    given += [f"data.path={toys.write_jsonl(tmp_path / 'rows.jsonl', list(asked))}"]
    given += ["reward=environment", "environment=python", "environment.max_tokens=48"]
    given += ["environment.path=tests.acting:EvenTokens", "rollout.max_response_length=12"]
    engine, server = (
        run("grpo", [*given, f"rollout={backend}", f"run.name={backend}", *ENGINE])
        for backend in ("vllm", "server")
    )
    assert_equal(engine, server)
    assert all(row["rollout/turns"] > 1.2 for row in rows(server / "metrics.jsonl"))


# ---- a run's own server, killed ----


def described(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def kill(folder: Path) -> None:
    os.kill(described(folder)["pid"], signal.SIGKILL)


def test_a_server_killed_while_it_writes_and_while_it_gets_weights(
    folder: Path, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = train("whole-0", "rollout=vllm", *ENGINE)
    servers = folder / "killed" / FOLDER
    calls = {"generate": 0, "send": 0}
    generate, send = ServerGenerator.generate, routes.FileRoute.send
    pids = []

    def killed_writing(self: Any, prompts: Any, **given: Any) -> Any:
        calls["generate"] += 1
        if calls["generate"] == 3:  # the proof's, the first step's, the second's
            pids.append(described(servers)["pid"])
            threading.Timer(0.02, kill, (servers,)).start()
        return generate(self, prompts, **given)

    def killed_updating(self: Any, incoming: Any, version: int) -> Any:
        calls["send"] += 1
        if calls["send"] == 3:
            pids.append(described(servers)["pid"])
            kill(servers)
        return send(self, incoming, version)

    monkeypatch.setattr(ServerGenerator, "generate", killed_writing)
    monkeypatch.setattr(routes.FileRoute, "send", killed_updating)
    killed = train("killed", "rollout=server", *ENGINE)
    last = described(servers)["pid"]
    assert len({*pids, last}) == 3, "it was killed and restarted twice"
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*pids, last))
    assert_equal(engine, killed)


# ---- several ranks ----


def test_two_ranks_and_one_server_take_the_steps_of_one_rank(
    tmp_path: Path, one_thread: Iterator[None]
) -> None:
    start = zero.start_folder(tmp_path) / "start"
    sizes = f"stage=grpo:{zero._SIZES}:rollout.kv_cache_gib=0.05:rollout.server.threads=1"
    alone = f"torch:none:{sizes}:rollout=vllm"
    zero_online_worker.run(str(tmp_path), str(start), alone)
    ranks = [f"{engine}:none:{sizes}:rollout=server" for engine in ("zero2", "zero3")]
    zero.launch(tmp_path, start, ranks)
    for name in ranks:
        for ours, theirs in zip(zero.rows(tmp_path, name), zero.rows(tmp_path, alone), strict=True):
            for key in zero.COMPARED_IN_GROUPS:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
