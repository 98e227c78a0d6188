"""stage=chat: what it refuses, a conversation by transformers, and the same by vLLM's server."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.cli import config
from rlhf.stages import chat
from rlhf.types import UserError
from tests.checking import check
from tests.export.made import CHATML, language_model, plain_spoken, saved
from tests.models import families

pytestmark = pytest.mark.usefixtures("one_thread")
# the most likely token each time
GREEDY = ["rollout.top_k=1", "data.max_prompt_length=96", "rollout.max_response_length=12"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = families.made(template=CHATML)
    model = language_model("llama", tokenizer, num_attention_heads=2)  # heads of 32 for vLLM
    plain_spoken(model, tokenizer)
    return saved(tmp_path / "base", model, tokenizer)


@pytest.fixture
def ending(tmp_path: Path) -> Path:
    """A model that answers "it" and ends: each token alone decides the next."""
    tokenizer = families.made(template=CHATML)
    model = language_model("llama", tokenizer)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm.weight.data.fill_(1)
    written = tokenizer.encode("\nit", add_special_tokens=False)
    tokens, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    tokens.zero_()
    head.zero_()
    for place, token in enumerate(written):
        tokens[token, place] = 1
        head[[*written, tokenizer.eos_token_id][place + 1], place] = 10
    return saved(tmp_path / "ending", model, tokenizer)


def options(model: Path, *more: str) -> list[str]:
    given = ["stage=chat", f"run.dir={model.parent}", "run.name=mine", f"model.path={model}"]
    return [*given, "model.dtype=float32", *GREEDY, *more]


def talked(monkeypatch: pytest.MonkeyPatch, given: list[str], *lines: str) -> str:
    """What the terminal shows when the user types `lines`."""
    left, shown = list(lines), []

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr(chat, "_read", read)
    monkeypatch.setattr(chat, "_write", shown.append)
    cfg = config.compose(given)
    check(cfg)
    chat.run(SimpleNamespace(cfg=cfg))
    return "".join(shown)


def test_what_is_refused(
    base: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: Path, *given: str) -> str:
        with pytest.raises(UserError) as error:
            check(config.compose(options(model, *given)))
        return str(error.value)

    assert "data.chat_template" in refused(tiny_model())
    assert "rollout=server" in refused(base, "rollout=server")
    assert "stage.compare" in refused(base, f"stage.compare={base}-gone")
    assert "rollout.max_response_length" in refused(base, "rollout.max_response_length=9000")
    assert "environment=python" in refused(
        base, "environment=python", "environment.path=tests.acting:Guess"
    )
    assert "environment.options" in refused(
        base,
        "environment=tools",
        "environment.tools=[calculator]",
        "environment.options={answer: answer}",
    )
    adapter = base.parent / "adapter"
    adapter.mkdir()
    held = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(held), encoding="utf-8")
    assert "stage=export" in refused(adapter, "rollout=vllm")
    with pytest.raises((UserError, ValueError), match=r"stage\.greedy"):
        config.compose(options(base, "stage.greedy=true"))


def test_a_conversation_by_transformers(ending: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talked(monkeypatch, options(ending, "stage.system=Be kind."), "Why?", "And?", "/save")
    (line,) = (ending.parent / "mine" / "chats" / "sft.jsonl").read_text("utf-8").splitlines()
    messages: list[dict[str, Any]] = json.loads(line)["messages"]
    others = [m["content"] for m in messages if m["role"] != "assistant"]
    assert others == ["Be kind.", "Why?", "And?"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert answers == ["it", "it"] and shown.count("it\n") == 2
    # it leaves no run: the same run.name talks again
    assert {path.name for path in (ending.parent / "mine").iterdir()} == {"chats"}
    talked(monkeypatch, options(ending), "Why?")


def test_answers_that_are_cut_are_no_row(ending: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(ending, "rollout.max_response_length=1")
    assert "teaches nothing" in talked(monkeypatch, given, "Why?", "/save")
    assert not (ending.parent / "mine" / "chats" / "sft.jsonl").exists()


def test_two_models_side_by_side(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = families.made(template=CHATML)
    model = language_model("llama", tokenizer)  # other shapes, so other weights
    other = saved(base.parent / "other", model, tokenizer)
    given = options(base, f"stage.compare={other}", "stage.greedy=true")
    shown = talked(monkeypatch, given, "/compare Why?", "1")
    assert str(other) in shown.split("[2]")[-1]


def test_a_call_is_answered_by_the_function(base: Path) -> None:
    given = options(base, "environment=tools", "environment.tools=[calculator]")
    cfg = config.compose(given)
    check(cfg)
    toolbox = chat._toolbox(cfg.environment, families.made(template=CHATML))
    assert toolbox is not None and toolbox.tools[0]["function"]["name"] == "calculator"
    call = '{"name": "calculator", "arguments": {"expression": "3 * 14"}}'
    (said,) = toolbox.act(f"So:\n<tool_call>\n{call}\n</tool_call>")
    assert said["role"] == "tool" and said["content"] == "42"
    assert toolbox.act("It is 42.") == ()
    (said,) = toolbox.act(f"<tool_call>{call[:-1]}</tool_call>")
    assert "error" in said["content"]


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_answers_as_transformers(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ["rollout.kv_cache_gib=0.05", "rollout.max_num_seqs=4", "rollout.server.threads=1"]
    lines = ("Why?", "And?", "/history")
    mine = talked(monkeypatch, options(base), *lines)
    theirs = talked(monkeypatch, options(base, "rollout=vllm", *engine), *lines)
    assert theirs == mine
