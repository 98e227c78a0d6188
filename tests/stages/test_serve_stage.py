"""stage=serve: what it refuses, how its server is started, when it is ready, and its end. One test
has vLLM's own server and OpenAI's client.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.cli import config
from rlhf.serving.server import Served, recipe_of
from rlhf.stages import serve
from rlhf.types import UserError
from tests.checking import check
from tests.export.made import CHATML, language_model, plain_spoken, saved
from tests.models import families
from tests.rollout.server.fake_vllm import interpreter
from tests.rollout.server.test_servers import wait_for

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-of-the-test"
LENGTHS = ["data.max_prompt_length=48", "rollout.max_response_length=16"]


def lora(base: Path, folder: Path, scale: float, **more: Any) -> Path:
    """A LoRA of rank 4 on `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **more))
    torch.manual_seed(1)
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            param.data.normal_(std=scale)
    adapted.save_pretrained(folder)
    return folder


def options(model: Path, *more: str) -> list[str]:
    given = ["stage=serve", f"run.dir={model.parent}", "run.name=mine", f"model.path={model}"]
    return [*given, *LENGTHS, *more]


def test_what_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model()
    good = lora(base, tmp_path / "good", 0.1)
    check(config.compose(options(base, f"+stage.adapters.polite={good}")))

    def refused(model: Path, *given: str) -> str:
        with pytest.raises(UserError) as error:
            check(config.compose(options(model, *given)))
        return str(error.value)

    assert "stage=export" in refused(good) and "stage.adapters" in refused(good)
    assert "stage.token_env" in refused(base, "stage.host=0.0.0.0")
    assert "NO_SUCH_KEY" in refused(base, "stage.token_env=NO_SUCH_KEY")
    assert "stage.adapters.whole" in refused(base, f"+stage.adapters.whole={base}")
    assert "'mine'" in refused(base, f"+stage.adapters.mine={good}")
    other = tiny_model(tied=False)
    assert str(base) in refused(other, f"+stage.adapters.polite={good}")
    dora = lora(base, tmp_path / "dora", 0.1, use_dora=True)
    assert "use_dora" in refused(base, f"+stage.adapters.dora={dora}")
    assert "rollout.max_response_length" in refused(base, "rollout.max_response_length=900")


def test_the_servers_command(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model()
    adapters = {
        "a": str(lora(base, tmp_path / "a", 0.1)),
        "b": str(lora(base, tmp_path / "b", 0.2)),
    }
    cfg = config.compose(options(base))
    served = Served(str(base), "mine", adapters, 64)
    recipe = recipe_of(cfg.rollout, cfg.model, served, token=KEY, seed=3)
    command = recipe.command("127.0.0.1", 8000)
    at = command.index("--lora-modules")
    named = [json.loads(text) for text in command[at + 1 : at + 3]]
    assert named == [{"name": name, "path": path} for name, path in adapters.items()]
    given = dict(itertools.pairwise(command))
    assert given["--served-model-name"] == "mine" and given["--max-model-len"] == "64"
    assert given["--max-loras"] == "2" and given["--max-lora-rank"] == "8"
    assert given["--host"] == "127.0.0.1"
    assert KEY not in command  # other users see a command line
    # no routes that change weights, and none that load adapters from anywhere
    names = recipe.environment(0)
    assert not {"VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"} & set(names)


@pytest.fixture
def stand_in(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """stand_in(overrides ...) -> all that the stage takes, whose server has no model."""
    python = interpreter(tmp_path, monkeypatch)
    monkeypatch.setenv("SERVE_KEY", KEY)
    given = [*options(tiny_model()), f"run.dir={tmp_path}", "stage.port=0"]
    given += [f"rollout.server.python={python}", "stage.token_env=SERVE_KEY"]

    class Run:
        def __init__(self, *more: str) -> None:
            self.cfg = config.compose([*given, *more])

    return Run


def test_it_is_ready_answers_and_ends(
    stand_in: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    answered: list[Any] = []

    def use() -> None:
        """Wait for the line, ask, and end the stage."""

        def ready() -> bool:
            shown.append(capsys.readouterr().out)
            return "ready at" in "".join(shown)

        try:
            wait_for(ready, 30)
            url = re.findall(r"ready at (\S+),", "".join(shown))[0]
            key = {"authorization": f"Bearer {KEY}"}
            answered.append(httpx.get(f"{url}/models", headers=key, trust_env=False).json())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=use)
    thread.start()
    serve.run(stand_in())
    thread.join()
    assert answered[0]["data"]
    text = "".join(shown)
    assert KEY not in text and "SERVE_KEY" in text and "127.0.0.1" in text
    assert "stopped" in capsys.readouterr().out


def test_a_server_that_ends_is_told(
    stand_in: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").write_text("#!/bin/sh\necho 'RuntimeError: no room'; exit 3\n")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(UserError, match="no room"):
        serve.run(stand_in(f"rollout.server.python={tmp_path / 'broken'}"))


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_openais_client_streams_from_it(tmp_path: Path) -> None:
    """A base and two adapters by name; each streams what transformers writes, greedily."""
    from openai import AuthenticationError, OpenAI

    from rlhf.export.answers import most_likely
    from rlhf.models.encoding import prompt_ids
    from rlhf.models.loading import load_causal_lm, load_tokenizer

    tokenizer = families.made(template=CHATML)
    model = language_model("llama", tokenizer, num_attention_heads=2)  # heads of 32 for vLLM
    plain_spoken(model, tokenizer)
    base = saved(tmp_path / "base", model, tokenizer)
    adapters = {
        name: lora(base, tmp_path / name, scale) for name, scale in (("a", 0.5), ("b", 1.0))
    }
    command = [sys.executable, "-m", "rlhf", *options(base, "stage.port=0", "model.dtype=float32")]
    command += [f"+stage.adapters.{name}={path}" for name, path in adapters.items()]
    command += ["rollout.kv_cache_gib=0.05", "rollout.max_num_seqs=4", "rollout.server.threads=1"]
    log = tmp_path / "out.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 600
        while "ready at" not in log.read_text(encoding="utf-8"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        text = log.read_text(encoding="utf-8")
        url = re.findall(r"ready at (\S+),", text)[0]
        key = re.findall(r"OPENAI_API_KEY=(\S+)", text)[0]
        asked: Any = [{"role": "user", "content": "Why is it so?"}]
        with httpx.Client(trust_env=False) as http:
            with pytest.raises(AuthenticationError):
                OpenAI(base_url=url, api_key="wrong", http_client=http).models.list()
            client = OpenAI(base_url=url, api_key=key, http_client=http)
            assert {entry.id for entry in client.models.list()} == {"mine", "a", "b"}
            for name, path in {"mine": base, **adapters}.items():
                stream = client.chat.completions.create(
                    model=name, messages=asked, stream=True, temperature=0, max_tokens=12
                )
                pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
                cfg = config.compose(["stage=sft", f"model.path={path}", "model.dtype=float32"])
                own = load_tokenizer(cfg.model)
                held = load_causal_lm(cfg.model, own).eval()
                ids = most_likely(held, own, prompt_ids(own, asked), 12)
                assert len([piece for piece in pieces if piece]) > 1
                assert "".join(pieces) == own.decode(ids, skip_special_tokens=True), name
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models", trust_env=False)
