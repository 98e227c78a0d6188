"""What is refused of virtual tokens before weights load: rows that don't fit behind them, and rows
that would not all have them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy import adapters
from policy.saving import save_adapter
from rlhf.checks import inputs
from rlhf.cli import config
from rlhf.models.directories import contents
from rlhf.types import UserError
from tests import toys
from tests.checking import check
from tests.offline import trl_tools

COMMON = ["model.dtype=float32", "tracking=none", "stage.learning_rate=1e-2"]
# on a model with 64 positions, behind 20 virtual tokens
CASES = {
    r"stage\.max_length=48 .*without 20 virtual tokens = 44.*stage\.max_length=44": [
        *("stage=sft", "adapter=prompt", "stage.max_length=48"),
    ],
    r"data\.max_prompt_length=40 .* = 50 tokens .*without 20 virtual tokens = 44": [
        *("stage=grpo", "adapter=prompt", "data.max_prompt_length=40"),
        *("rollout.max_response_length=10", "rollout=hf"),
        "reward.function=tests.toys:even_tokens",
    ],
    r"stage\.packing=true with adapter=ptuning": [
        *("stage=sft", "adapter=ptuning", "stage.max_length=40", "stage.packing=true"),
    ],
    r"engine\.gradient_checkpointing=true with adapter=prefix": [
        *("stage=sft", "adapter=prefix", "stage.max_length=40"),
        "engine.gradient_checkpointing=true",
    ],
}


@pytest.mark.parametrize("message", CASES)
def test_it_is_refused_by_name(
    message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    trl_tools.write_rows(tmp_path / "sft.jsonl", trl_tools.sft_rows(20))
    toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())
    given = CASES[message]
    rows = "sft" if "stage=sft" in given else "prompts"
    places = [f"model.path={tiny_model()}", f"data.path={tmp_path / rows}.jsonl"]
    with pytest.raises(UserError, match=message):
        check(config.compose([*given, *COMMON, *places]))


def test_a_directory_has_the_places_that_its_adapter_leaves(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = AdapterConfig(kind=AdapterKind.prompt)
    adapter.prompt.tokens = 7
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model = adapters.attach(model, adapter, task="CAUSAL_LM", base=str(tiny_model()))
    save_adapter(model, tmp_path / "adapter")
    (held,) = contents(tmp_path / "adapter").adapters
    assert held.ahead == 7 and held.is_native
    assert inputs.max_positions(str(tiny_model())) == 64
    assert inputs.max_positions(str(tmp_path / "adapter")) == 57
