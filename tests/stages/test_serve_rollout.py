"""stage=serve_rollout: what it refuses, its restarts and its end. The server has vLLM's routes but
no model; tests/rollout/server/test_real_servers.py has vLLM's.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import serve_rollout
from rlhf.stages.serve_rollout import address
from rlhf.types import UserError
from rollout.server.generator import FOLDER
from tests.checking import check
from tests.rollout.server.fake_vllm import interpreter
from tests.rollout.server.test_servers import wait_for

STAGE = ["stage=serve_rollout", "tracking=none", "data.max_prompt_length=24"]
STAGE += ["rollout.max_response_length=8", "model.dtype=float32"]


def refused(*given: str) -> str:
    with pytest.raises(UserError) as error:
        check(config.compose([*STAGE, *given]))
    return str(error.value)


def test_what_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = [f"model.path={tiny_model()}", f"run.dir={tmp_path}"]
    check(config.compose([*STAGE, *model]))
    assert "model.path" in refused()
    assert "rollout.server.count" in refused(*model, "rollout.server.count=2")
    assert "rollout.server.token_env" in refused(*model, "stage.host=0.0.0.0")
    assert "NO_SUCH_TOKEN" in refused(*model, "rollout.server.token_env=NO_SUCH_TOKEN")
    assert "rollout=vllm" in refused(*model, "adapter=houlsby")
    assert "rollout.max_response_length" in refused(*model, "rollout.max_response_length=90")


@pytest.fixture
def opened(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunContext]:
    """opened(overrides ...) -> the context of a run of the stage."""
    python = interpreter(tmp_path, monkeypatch)
    given = [*STAGE, f"model.path={tiny_model()}", f"run.dir={tmp_path}", "run.name=mine"]
    given += [f"rollout.server.python={python}"]
    return lambda *more: RunContext.open(config.compose([*given, *more]), ())


def described(folder: Path) -> dict[str, Any]:
    files = list((folder / "mine" / FOLDER).glob("*.json"))
    found: dict[str, Any] = json.loads(files[0].read_text()) if files else {}
    return found


def test_it_restarts_its_server_and_ends_with_it(
    opened: Callable[..., RunContext], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def disturb() -> None:
        """Kill the server once, then end the run."""
        wait_for(lambda: bool(described(tmp_path)))
        seen.append(described(tmp_path))
        os.kill(seen[0]["pid"], signal.SIGKILL)
        wait_for(lambda: described(tmp_path)["pid"] != seen[0]["pid"])
        seen.append(described(tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=disturb)
    thread.start()
    serve_rollout.run(opened("stage.port=0"))
    thread.join()
    first, second = seen
    assert second["url"] == first["url"]
    assert not any(Path(f"/proc/{entry['pid']}").exists() for entry in seen)
    shown = capsys.readouterr()
    assert "RLHF_ROLLOUT_TOKEN" in shown.out + shown.err
    summary = json.loads((tmp_path / "mine" / "serve_rollout" / "summary.json").read_text())
    assert summary["metrics"]["restarts"] == 1


def test_a_launched_servers_description_lies_with_the_run_that_it_writes_for(
    opened: Callable[..., RunContext], tmp_path: Path
) -> None:
    found: list[dict[str, Any]] = []

    def end() -> None:
        wait_for(lambda: bool(described(tmp_path)))
        found.append(described(tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    serve_rollout.run(opened("run.name=mine/server-0", "stage.servers_of=mine", "stage.port=0"))
    thread.join()
    assert not (tmp_path / "mine" / "server-0" / FOLDER).exists()
    port = found[0]["url"].rpartition(":")[2]
    names = {path.name for path in (tmp_path / "mine" / FOLDER).iterdir()}
    assert names == {f"127.0.0.1-{port}.json", f"127.0.0.1-{port}.log"}


def test_a_port_that_is_taken(opened: Callable[..., RunContext]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError) as error:
        serve_rollout.run(opened(f"stage.port={taken.getsockname()[1]}"))
    assert "stage.port" in str(error.value)


def test_address() -> None:
    assert address("127.0.0.1", 8200) == "http://127.0.0.1:8200"
    assert address("::1", 8200) == "http://[::1]:8200"
    assert address("0.0.0.0", 1) == f"http://{socket.gethostname()}:1"
