"""DeepSpeed's ZeRO, LoRA and vLLM in one run, on a policy that is itself an adapter on a base."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.schema import ModelConfig
from rlhf.models.loading import load_causal_lm, load_tokenizer
from tests import toys

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
OPTIONS = [
    "stage=grpo",
    "engine=zero2",
    "adapter=lora",
    "adapter.rank=8",
    "rollout=vllm",
    "rollout.kv_cache_gib=0.05",
    "rollout.max_response_length=6",
    "data.max_prompt_length=24",
    "model.dtype=float32",
    "reward.function=tests.toys:even_tokens",
    "stage.prompts_per_step=4",
    "stage.samples_per_prompt=4",
    f"stage.steps={STEPS}",
    "stage.learning_rate=2e-2",
    "stage.kl_coef=0.05",
    "stage.save_steps=0",
    "engine.threads=1",
    "tracking=none",
]


def tuned(base: Path, place: Path) -> Path:
    """An adapter on `base`, far from it."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.3)
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(base).save_pretrained(place)
    return place


def logits(place: Path) -> torch.Tensor:
    cfg = ModelConfig(path=str(place))
    with torch.no_grad():
        out = load_causal_lm(cfg, load_tokenizer(cfg)).eval()(input_ids=torch.arange(20, 60)[None])
    found: torch.Tensor = out.logits
    return found


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_samples_from_what_zero_trains(
    tmp_path: Path, tiny_model: Callable[..., Path], ranks: int
) -> None:
    base = tiny_model()
    start = tuned(base, tmp_path / "tuned")
    toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())
    given = [f"model.path={start}", f"data.path={tmp_path / 'prompts.jsonl'}"]
    given += [f"run.dir={tmp_path}", "run.name=all"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    command = [sys.executable, *launcher, "-m", "rlhf", *OPTIONS, *given]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    run = tmp_path / "all" / "grpo"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "rollout/logprob_gap" in row]
    assert len(rows) == STEPS
    # of each token that vLLM wrote, in each step, against the trainer's own logprob
    assert max(row["rollout/logprob_gap"] for row in rows) < 1e-3
    assert max(row["rollout/probe_gap"] for row in rows) < 1e-3
    # an engine that kept the start's weights would show this much
    assert rows[-1]["objective/kl"] > 1e-2
    # the run's adapter rests on base and first adapter, and gives the saved model
    torch.testing.assert_close(logits(run / "adapter"), logits(run / "model"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(run / "start"), logits(start), atol=1e-4, rtol=1e-4)
    for other in (base, start):
        assert (logits(other) - logits(run / "model")).abs().max() > 1e-2
