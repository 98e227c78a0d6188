"""The dry run of a migrated experiment on a small model without weights (a config, a tokenizer),
rows of the stage's kind, and a reward that needs no model. All else is the experiment's own.
"""

import contextlib
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.choices import CriticInit, RolloutBackend, TermKind
from conf.schema import DataConfig, RewardConfig, RewardTerm
from conf.stages import OnlineStage
from rlhf.__main__ import execute
from rlhf.cli import config
from rlhf.types import UserError

ROWS = 400
_TEXT = "A question about numbers, and what follows from it. "
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def refusal(overrides: Sequence[str], scratch: Path) -> str | None:
    """Why the dry run refuses the experiment that `overrides` name; None where it passes."""
    cfg = config.compose(overrides)
    cfg.run.dry_run, cfg.run.resume, cfg.run.dir = True, False, str(scratch / "runs")
    cfg.model.path, cfg.model.attn_implementation = str(model_directory(scratch)), None
    kept = ("eval_fraction", "max_prompt_length", "truncate_prompts", "max_rows")
    values = {name: getattr(cfg.data, name) for name in kept}
    cfg.data = DataConfig(path=str(rows_file(scratch, cfg.stage)), **values)
    cfg.adapter.load, cfg.adapter.load_weights = [], []
    if isinstance(cfg.stage, OnlineStage):
        cfg.reward = RewardConfig(terms={"length": RewardTerm(kind=TermKind.length, low=1, high=9)})
        cfg.rollout.backend, cfg.rollout.servers = RolloutBackend.hf, []
        cfg.stage.critic_init = CriticInit.policy  # there is no reward model
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            execute(cfg, ["run.dry_run=true"])
    except UserError as error:
        return str(error)
    return None


@functools.cache
def model_directory(scratch: Path) -> Path:
    """A Llama of about 100M parameters as a config and a tokenizer."""
    from transformers import LlamaConfig

    from rlhf.models.loading import train_tokenizer

    directory = scratch / "model"
    tokenizer = train_tokenizer([_TEXT] * ROWS, 512, 131072)
    tokenizer.chat_template = _TEMPLATE
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def rows_file(scratch: Path, stage: Any) -> Path:
    """Rows of the kind that a stage trains on."""
    kinds = {"SFTStage": "sft", "KTOStage": "unpaired", "OnlineStage": "prompt"}
    kind = kinds.get(type(stage).__name__, "pairs")
    path = scratch / f"{kind}.jsonl"
    lines = [json.dumps(_row(kind, number)) for number in range(ROWS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _row(kind: str, number: int) -> dict[str, object]:
    question = [{"role": "user", "content": f"{number}: {_TEXT}"}]
    answer = [{"role": "assistant", "content": f"{_TEXT}{number}."}]
    worse = [{"role": "assistant", "content": f"No {number}."}]
    match kind:
        case "sft":
            return {"messages": question + answer}
        case "unpaired":
            return {"prompt": question, "completion": answer, "label": number % 2 == 0}
        case "prompt":
            return {"prompt": question}
        case _:
            return {"prompt": question, "chosen": answer, "rejected": worse}
