"""What a stage on TRL's trainers leaves behind: whole weights, an adapter, samples."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conf.choices import EngineKind
from conf.schema import AdapterConfig, EngineConfig, ModelConfig
from policy.engines.deepspeed import gather_zero3
from policy.model import Gather, is_peft, no_gather
from policy.saving import save_adapter, save_model
from rlhf.models.loading import load_causal_lm, resolve_dtype
from rlhf.offline.trainers import StageTrainer
from rlhf.process import distributed

_SAMPLE_TOKENS = 48


def gather_of(engine: EngineConfig) -> Gather:
    """How whole weights are reached under an engine: ZeRO-3 has them in shards."""
    if engine.kind is EngineKind.deepspeed and engine.zero_stage == 3:
        return gather_zero3
    return no_gather


def can_name_base(model: ModelConfig) -> bool:
    """Whether an adapter can name its base: a model that PEFT loads again, neither built from a
    config (``model=tiny``) nor a GGUF file.
    """
    return model.path is not None and model.gguf_file is None


def saves_adapter_alone(adapter: AdapterConfig, model: ModelConfig) -> bool:
    """Whether SFT's ``model/`` holds the adapter, which names its base, not whole weights."""
    return not adapter.merge_on_save and can_name_base(model)


def save_trained(
    trainer: StageTrainer,
    tokenizer: Any,
    run_dir: Path,
    model: ModelConfig,
    *,
    adapter_alone: bool = False,
) -> None:
    """``model/`` and, for LoRA, ``adapter/``. A collective.

    model/ holds whole weights in ``model.dtype``, which need not be the dtype that they trained in;
    with LoRA and `adapter_alone` it holds the adapter.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    model_dir, gather = run_dir / "model", gather_of(trainer.engine)
    if is_peft(trained):
        save_adapter(trained, run_dir / "adapter", gather)
        if adapter_alone:
            save_adapter(trained, model_dir, gather)
            if distributed.is_main():
                tokenizer.save_pretrained(model_dir)
            distributed.barrier()
            return
    save_model(trained, tokenizer, model_dir, gather, resolve_dtype(model.dtype))


def free_memory() -> None:
    """Give back memory that nothing refers to any more: trainers and their models refer to each
    other.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def greedy_samples(
    model: ModelConfig,
    tokenizer: Any,
    directory: Path,
    contexts: Sequence[list[int]],
    max_length: int,
) -> list[dict[str, Any]]:
    """What the policy saved in `directory` writes after each of `contexts` (token ids), greedily,
    as rows of samples.jsonl; contexts that fill `max_length` tokens are left out.
    """
    policy = load_causal_lm(model, tokenizer, str(directory)).to(distributed.device()).eval()
    rows = []
    for context in contexts:
        new_tokens = min(_SAMPLE_TOKENS, max_length - len(context))
        if not context or new_tokens < 1:
            continue
        input_ids = torch.tensor([context], device=policy.device)
        with torch.inference_mode():
            whole = policy.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=new_tokens,
            )[0]
        response = whole[len(context) :].tolist()
        finished = tokenizer.eos_token_id in response
        rows.append(
            {
                "prompt": tokenizer.decode(context),
                "response": tokenizer.decode(response, skip_special_tokens=True),
                "response_length": len(response),
                "finish_reason": "stop" if finished else "length",
            }
        )
    return rows
