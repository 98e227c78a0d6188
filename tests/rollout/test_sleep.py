"""rollout.sleep: when vLLM's engine leaves the device to the trainer, and in which order it takes
it back. A stand-in engine: vLLM's own sleeps on GPUs alone, and none was at hand.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from conf.choices import RolloutBackend
from conf.schema import RolloutConfig
from rlhf.checks.memory import shapes
from rlhf.checks.memory.generator import check_sleep
from rlhf.cli import config
from rlhf.stages import memory
from rlhf.types import FullWeights, Prompt, SyncError, UserError
from rollout.episodes import Sleeper
from rollout.sampling import Sampling
from rollout.vllm import VLLMGenerator
from rollout.weights import HubNames, Spec
from tests import toys


class Engine:
    """Records what is asked of it. Like vLLM's it computes only when all of it is awake."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.away: set[str] = set()

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.away = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> bool:
        self.calls.append(f"wake {' '.join(tags)}")
        self.away -= set(tags)
        return not self.away

    def generate(self, requests: list[Any], params: Any, **options: Any) -> list[Any]:
        assert not self.away, "a request to an engine that sleeps"
        self.calls.append("generate")
        written = SimpleNamespace(
            finish_reason="length", token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=-1.0)}]
        )
        position = {7: SimpleNamespace(logprob=-1.0)}
        answer = SimpleNamespace(outputs=[written], prompt_logprobs=[None, position])
        return [answer for _ in requests]

    def apply_model(self, function: Callable[..., Any]) -> list[Any]:
        assert "weights" not in self.away, "weights are read while they are away"
        self.calls.append("weights")
        return [True]

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        assert "weights" not in self.away, "weights are written while they are away"
        assert "kv_cache" in self.away or "sleep 1" not in self.calls
        self.calls.append(name)
        list(kwargs["weights_iterator"])

    def reset_prefix_cache(self) -> bool:
        assert not self.away, "a cache is emptied that isn't there"
        self.calls.append("reset_prefix_cache")
        return True


@pytest.fixture
def model() -> Any:
    made = shapes.llama(
        vocab=20, hidden=16, intermediate=16, layers=1, heads=1, kv_heads=1, tied=False
    )
    return LlamaForCausalLM(made)


def made(model: Any, *, sleep: bool) -> tuple[VLLMGenerator, Engine]:
    """A generator around a stand-in engine, as it is after its start."""
    generator, engine = VLLMGenerator.__new__(VLLMGenerator), Engine()
    generator._llm, generator._sleeps = engine, sleep
    generator._reads_pictures = False
    generator._names = HubNames(model)
    generator._dtype = torch.float32
    specs = generator._names.specs
    generator._specs = {name: Spec(spec.shape, torch.float32) for name, spec in specs.items()}
    generator._readable = generator._adapter = generator._lora = None
    generator._max_tokens, generator.version = 8, 0
    generator.sampling = Sampling(max_response_length=4)
    generator._tokenizer = SimpleNamespace(
        eos_token_id=3, pad_token_id=0, decode=lambda ids, **options: "x"
    )
    generator.rest()
    return generator, engine


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a response's end and text depend on beside the engine."""
    monkeypatch.setattr("rollout.vllm.end_ids", lambda tokenizer: (3,))
    monkeypatch.setattr("rollout.vllm.response_text", lambda *args, **options: "x")
    monkeypatch.setattr("rollout.vllm.pack_experts", lambda model: None)


PROMPTS = [Prompt(id="a", source="x", text="x", token_ids=[1, 2])]


def test_weights_come_back_before_the_cache_and_the_sync_between(model: Any) -> None:
    generator, engine = made(model, sleep=True)
    assert engine.calls == ["sleep 1"], "it sleeps while the trainer's engines start"
    generator.generate(PROMPTS, seed=1)
    assert engine.calls[1:] == ["wake weights", "wake kv_cache", "generate", "sleep 1"]
    engine.calls.clear()
    engine.calls.append("sleep 1")
    generator.sync(FullWeights(iter(model.state_dict().items())), 1)
    order = [call for call in engine.calls if call != "weights"]
    assert order == [
        "sleep 1",
        "wake weights",
        "reload_weights",
        "wake kv_cache",
        "reset_prefix_cache",
    ]
    # the probe and the next step's responses find it awake
    engine.calls.clear()
    generator.logprobs([1, 7])
    generator.generate(PROMPTS, seed=2)
    assert engine.calls == ["generate", "generate", "sleep 1"]


def test_an_engine_of_which_a_sync_failed_wakes_the_rest_for_the_next_one(model: Any) -> None:
    generator, engine = made(model, sleep=True)
    with pytest.raises(SyncError, match="missing"):
        generator.sync(FullWeights(iter([])), 1)
    assert engine.away == {"kv_cache"}
    engine.calls.clear()
    generator.generate(PROMPTS, seed=1)
    assert engine.calls == ["wake kv_cache", "generate", "sleep 1"]


def test_without_the_option_nothing_sleeps(model: Any) -> None:
    generator, engine = made(model, sleep=False)
    generator.generate(PROMPTS, seed=1)
    generator.sync(FullWeights(iter(model.state_dict().items())), 1)
    assert not [call for call in engine.calls if call.startswith(("sleep", "wake"))]


@pytest.mark.parametrize("backend", ["hf", "server"])
def test_other_generators_refuse_the_option(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout.sleep=True.*rollout={backend}"):
        RolloutConfig(backend=RolloutBackend(backend), sleep=True)


def test_an_engine_on_a_cpu_refuses_the_option_before_weights_load(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tmp_path / "p.jsonl"
    toys.write_jsonl(rows, [{"prompt": "the film is"}])
    options = ["stage=grpo", "rollout=vllm", "rollout.sleep=true", f"model.path={tiny_model()}"]
    options += ["reward.function=builtins:len", f"data.path={rows}", f"run.dir={tmp_path}"]
    options += toys.LENGTHS
    if torch.cuda.is_available():
        pytest.skip("vLLM's engine on a GPU sleeps")
    with pytest.raises(UserError, match=r"rollout.sleep=true.*CPU.*rollout.sleep=false"):
        memory.check(config.compose(options))
    memory.check(config.compose([*options, "run.dry_run=true"]))  # a plan for GPUs elsewhere
    asleep = RolloutConfig(backend=RolloutBackend.vllm, sleep=True)
    with pytest.raises(UserError, match=r"rollout.sleep=true"):
        check_sleep(asleep, ahead=0, cuda=False)
    with pytest.raises(UserError, match=r"rollout.sleep=true.*stage.ahead=1"):
        check_sleep(asleep, ahead=1, cuda=True)
    check_sleep(asleep, ahead=0, cuda=True)


def test_it_stays_awake_between_the_turns_of_an_episode(model: Any) -> None:
    generator, engine = made(model, sleep=True)
    with generator.awake():
        for _ in range(2):
            generator.generate(PROMPTS, seed=1)
    assert engine.calls == [
        *("sleep 1", "wake weights", "wake kv_cache"),
        *("generate", "generate", "sleep 1"),
    ]
    assert isinstance(generator, Sleeper), "episodes ask for it"
    too_long = [Prompt(id="b", source="x", text="x", token_ids=tuple(range(9)))]
    with pytest.raises(UserError), generator.awake():
        generator.generate(too_long, seed=1)
    assert engine.calls[-1] == "sleep 1", "a call that fails leaves it asleep too"
    awake, other = made(model, sleep=False)
    with awake.awake():
        awake.generate(PROMPTS, seed=1)
    assert other.calls == ["generate"]
