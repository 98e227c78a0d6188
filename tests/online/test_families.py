"""Families beside Llama through the loop with vLLM: what samples is what trains, before and after
an update.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.schema import Config
from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.online.families import tiny_family

Weights = dict[str, torch.Tensor]
MAX_GAP = 1e-4  # nats, float32


def grpo_with_vllm(model: Path, folder: Path, *overrides: str) -> Config:
    """Two steps of GRPO on a tiny model."""
    return config.compose(
        [
            "stage=grpo",
            f"model.path={model}",
            "rollout=vllm",
            "rollout.kv_cache_gib=0.05",
            "rollout.max_response_length=8",
            "tracking=none",
            f"run.dir={folder}",
            f"data.path={toys.write_jsonl(folder / 'prompts.jsonl', toys.prompt_rows())}",
            "data.max_prompt_length=32",
            "reward.function=tests.toys:even_tokens",
            "stage.steps=2",
            "stage.prompts_per_step=4",
            "stage.samples_per_prompt=4",
            "stage.learning_rate=1e-3",
            "stage.save_steps=0",
            *overrides,
        ]
    )


def weights_around(cfg: Config, model: Path, folder: Path) -> tuple[Weights, Weights]:
    """Runs the two steps of `cfg` and looks at their gaps; the weights before and after."""
    online_stage.run(RunContext.open(cfg, ()), stage_rows)
    run = folder / cfg.run.name / "grpo"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 2
    for step in steps:
        assert 0 <= step["rollout/logprob_gap"] < MAX_GAP
        assert 0 <= step["rollout/probe_gap"] < MAX_GAP
    before, after = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).state_dict()
        for place in (model, run / "model")
    )
    return before, after


@pytest.mark.vllm
@pytest.mark.parametrize(
    "family",
    [
        "gpt_neox",
        pytest.param("smollm3", marks=pytest.mark.full),
        pytest.param("olmo", marks=pytest.mark.full),
        pytest.param("qwen3_moe", marks=pytest.mark.full),
        pytest.param("mixtral", marks=pytest.mark.full),
        pytest.param("olmoe", marks=pytest.mark.full),
        pytest.param("deepseek_v2", marks=pytest.mark.full),
        pytest.param("deepseek_v3", marks=pytest.mark.full),
        pytest.param("gpt_oss", marks=pytest.mark.full),
    ],
)
def test_a_family_trains_with_vllm(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The first three run through vLLM's Transformers backend, which decorates the class that the
    policy and the reference are made of: both go on as they were. The others have experts, which
    transformers joins and vLLM wants one by one; DeepSeek's attention is latent, GPT-OSS's has
    sinks.
    """
    model = tiny_family(family, tiny_model(), tmp_path / "model")
    cfg = grpo_with_vllm(model, tmp_path)
    before, after = weights_around(cfg, model, tmp_path)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-4


def test_an_adapter_of_experts_is_refused_where_vllm_would_get_it_alone(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_family("qwen3_moe", tiny_model(), tmp_path / "model")
    cfg = grpo_with_vllm(model, tmp_path, "adapter=lora", "adapter.rank=4")
    with pytest.raises(UserError, match=r"all-linear.*qwen3_moe.*rollout\.lora_sync=merged"):
        online_stage.run(RunContext.open(cfg, ()), stage_rows)


@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_an_adapter_of_experts_goes_merged(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Into the weights that vLLM samples from, after an update, too; the base stays."""
    model = tiny_family(family, tiny_model(), tmp_path / "model")
    adapter = ("adapter=lora", "adapter.rank=4", "rollout.lora_sync=merged")
    cfg = grpo_with_vllm(model, tmp_path, *adapter, "stage.learning_rate=1e-2")
    before, after = weights_around(cfg, model, tmp_path)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # PEFT leaves GPT-OSS's experts out (policy/adapters/lora.py warns)
    assert moved and any(".experts." in name for name in moved) is (family != "gpt_oss")


@pytest.mark.vllm
@pytest.mark.full
def test_what_vllm_does_not_start_is_told_by_its_reason(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Heads of 24 numbers are none that its attention has."""
    model = tiny_family("qwen3_moe", tiny_model(), tmp_path / "model", head_dim=24)
    cfg = grpo_with_vllm(model, tmp_path)
    expected = r"rollout=vllm: vLLM does not start qwen3_moe here .*Set rollout=hf"
    with pytest.raises(UserError, match=expected):
        online_stage.run(RunContext.open(cfg, ()), stage_rows)
