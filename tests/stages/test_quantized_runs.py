"""Whole runs beside a frozen model in 4 or 8 bits: what trains is what generates and what is
saved.
"""

import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.schema import ModelConfig
from policy import adapters
from reward.model import load_reward_module
from rlhf.cli import config
from rlhf.models.directories import contents
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from tests import toys
from tests.offline import trl_tools

pytestmark = pytest.mark.usefixtures("one_thread")

QLORA = ["adapter=qlora", "adapter.rank=4", "adapter.dropout=0", "stage.learning_rate=2e-2"]
COMMON = [*QLORA, "model.dtype=float32", "tracking=none", "stage.steps=2"]
OFFLINE = [*COMMON, "stage.batch_size=4", "stage.eval_steps=1", "stage.max_length=48"]
ONLINE = [
    *COMMON,
    "stage.prompts_per_step=2",
    "stage.samples_per_prompt=2",
    "data.max_prompt_length=24",
    "rollout.max_response_length=4",
    "reward.function=tests.toys:even_tokens",
    "stage.save_steps=1",
]
MODULES = {"grpo": "online", "ppo": "online", "dpo": "preference"}


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """run("sft", *overrides) -> the run's directory."""
    trl_tools.write_rows(tmp_path / "sft.jsonl", trl_tools.sft_rows(20))
    trl_tools.write_rows(tmp_path / "pairs.jsonl", trl_tools.pair_rows(20))
    toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())

    def started(stage: str, *overrides: str) -> Path:
        online = MODULES.get(stage) == "online"
        rows = "prompts" if online else "sft" if stage == "sft" else "pairs"
        given = [f"stage={stage}", f"run.dir={tmp_path}", f"model.path={tiny_model()}"]
        given += [f"data.path={tmp_path / rows}.jsonl", *(ONLINE if online else OFFLINE)]
        cfg = config.compose([*given, *overrides])
        module = importlib.import_module(f"rlhf.stages.{MODULES.get(stage, stage)}")
        assert not any("quantize" in note for note in module.check(cfg))
        module.run(RunContext.open(cfg), stage_rows)
        return tmp_path / cfg.run.name / stage

    return started


def rows_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def causal_lm(path: Path) -> Any:
    cfg = ModelConfig(path=str(path))
    return load_causal_lm(cfg, load_tokenizer(cfg)).eval()


def is_rounded(start: Path, base: Path, quantize: str = "nf4") -> bool:
    """Whether start/ holds the base's weights as they are rounded, in full."""
    adapter = config.compose(["stage=sft", "adapter=qlora", f"adapter.quantize={quantize}"]).adapter
    plain, whole = causal_lm(base), causal_lm(start)
    assert not torch.equal(
        plain.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight
    )
    wanted, found = adapters.round_weights(plain, adapter).state_dict(), whole.state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_stages_on_rows_train_beside_the_rounded_model(
    stage: str, run: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    found = run(stage)
    assert is_rounded(found / "start", tiny_model())
    assert contents(found / "adapter").weights == str((found / "start").resolve())
    model, start = causal_lm(found / "model"), causal_lm(found / "start")
    update = model.model.layers[0].mlp.up_proj.weight - start.model.layers[0].mlp.up_proj.weight
    adapter = load_file(found / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    by_hand = 16 / 4 * adapter[name.format("B")] @ adapter[name.format("A")]
    torch.testing.assert_close(update.detach(), by_hand, rtol=0, atol=1e-6)
    assert float(by_hand.abs().max()) > 1e-4


@pytest.mark.full
def test_a_reward_model_trains_beside_the_rounded_model(
    run: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    found = run("reward", "stage.bootstrap=10")
    adapter = config.compose(["stage=reward", "adapter=qlora"]).adapter
    rounded = adapters.round_weights(causal_lm(tiny_model()), adapter).state_dict()
    start = load_file(found / "start" / "model.safetensors")
    scores = load_reward_module(found / "model", torch.float32).state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(start[name], rounded[name])
    assert torch.linalg.matrix_rank(scores[name] - start[name], atol=1e-5) == 4
    assert not torch.equal(scores["score.weight"], start["score.weight"]), "trains in full"


@pytest.mark.full
@pytest.mark.vllm
def test_vllm_holds_what_the_trainer_sees(
    run: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    found = run("grpo", "rollout=vllm", "rollout.kv_cache_gib=0.05")
    assert is_rounded(found / "start", tiny_model())
    for row in rows_of(found):
        assert row["rollout/logprob_gap"] < 1e-4 and row["rollout/probe_gap"] < 1e-4
    assert rows_of(found)[0]["objective/kl"] == pytest.approx(0, abs=1e-5), "the reference"
    merged, whole = causal_lm(found / "adapter"), causal_lm(found / "model")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "stage", ["dpo", pytest.param("grpo", marks=[pytest.mark.full, pytest.mark.vllm])]
)
def test_loftq_starts_as_its_own_reference(
    stage: str, run: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    """And not as the rounded weights, which start/ holds and the adapter is an update of."""
    given = ["adapter.init=loftq"]
    if stage == "grpo":
        given += ["rollout=vllm", "rollout.kv_cache_gib=0.05"]
    found = run(stage, *given)
    rows = rows_of(found)
    if stage == "dpo":
        assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    else:
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
        assert all(row["rollout/logprob_gap"] < 1e-4 for row in rows)
        assert all(row["rollout/probe_gap"] < 1e-4 for row in rows)
    adapter = config.compose(["stage=sft", *QLORA, "adapter.init=loftq"]).adapter
    wanted = adapters.round_weights(causal_lm(tiny_model()), adapter).state_dict()
    start = causal_lm(found / "start").state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in wanted.items())
    merged, whole = causal_lm(found / "adapter"), causal_lm(found / "model")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.full
def test_8_bits_with_a_critic_and_merged_weights(
    run: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    found = run(
        "ppo",
        "adapter.quantize=int8",
        "rollout=hf",
        "rollout.lora_sync=merged",
        "stage.critic_init=policy",
        "stage.critic_adapter=true",
    )
    assert is_rounded(found / "start", tiny_model(), "int8")
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in rows_of(found))


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.full), "grpo"])
def test_resuming_is_never_having_stopped(stage: str, run: Callable[..., Path]) -> None:
    options = ["rollout=hf"] if stage == "grpo" else []
    if stage == "sft":
        options += ["adapter.merge_on_save=true"]
    straight = run(stage, *options, "run.name=straight")
    broken = run(stage, *options, "run.name=broken")
    last = max((broken / "checkpoints").iterdir(), key=lambda place: int(place.name[-1]))
    shutil.rmtree(last)
    shutil.rmtree(broken / "model")
    (broken / "summary.json").unlink()
    run(stage, *options, "run.name=broken", "run.resume=true")
    ours, theirs = (
        load_file(place / "model" / "model.safetensors") for place in (straight, broken)
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
