"""A reward model and critic on families that transformers has no classifier for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import tries
from benchmarks.families.build import small_config, tiny
from conf.choices import AdapterKind, Dtype
from conf.schema import AdapterConfig, ModelConfig
from conf.stages import RewardStage
from reward.model import load_reward_model, score_ids
from rlhf.models.facts import check_forward
from rlhf.models.loading import load_classifier
from rlhf.models.parts import classifier_class, one_label_config
from rlhf.run.context import RunContext
from rlhf.stages import reward
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests.offline import trl_tools
from tests.selection import marked_full

FAMILIES = (
    "granite",
    "olmoe",
    "bamba",
    "cohere",
    "falcon_h1",
    "gemma4_text",
    "granitemoe",
    "lfm2",
    "mamba",
    "minimax_m2",
    "xglm",  # its positions depend on the number of the padding token
)


@pytest.mark.parametrize("family", marked_full(FAMILIES, [*FAMILIES[:2], FAMILIES[-1]]))
def test_reward_model_and_critic(family: str, tmp_path: Path) -> None:
    """A row's score is the same alone and beside longer rows, and after saving; a critic's values
    have gradients.
    """
    model = tiny(family)
    assert tries.reward_gap(model, tmp_path) < 1e-5
    found = classifier_class(one_label_config(str(tmp_path / "reward")))
    assert found.__name__.endswith("ScalarHead")


def test_transformers_own_classifier_stays() -> None:
    assert classifier_class(small_config("qwen2")).__name__ == "Qwen2ForSequenceClassification"


def test_what_sees_padding_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="cpmant"):
        classifier_class(small_config("cpmant"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a tiny Granite with a tokenizer."""
    place = tmp_path_factory.mktemp("granite")
    tokenizer = trl_tools.tiny_tokenizer()
    config = small_config("granite")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "adapter", marked_full([AdapterKind.none, AdapterKind.lora], [AdapterKind.lora])
)
def test_the_stage_trains_it(policy: Path, tmp_path: Path, adapter: AdapterKind) -> None:
    stage: dict[str, Any] = {
        "steps": 12,
        "batch_size": 8,
        "eval_steps": 6,
        "max_length": 40,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "bootstrap": 20,
    }
    cfg = trl_tools.config(
        RewardStage(**stage),
        tmp_path,
        "own",
        trl_tools.pair_rows(80),
        model=ModelConfig(path=str(policy), dtype=Dtype.float32),
        adapter=AdapterConfig(kind=adapter, rank=4),
    )
    ctx = RunContext.open(cfg)
    reward.check(cfg)
    reward.run(ctx, stage_rows)
    losses = trl_tools.losses(ctx.dir)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    loaded = load_reward_model(ctx.model_dir, torch.float32)
    ids = [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11]]
    scores = score_ids(loaded.module, ids, 64, torch.device("cpu"))
    alone = [float(loaded.module(input_ids=torch.tensor([row])).logits) for row in ids]
    assert scores == pytest.approx(alone, abs=1e-6)
    critic = load_classifier(cfg.model, loaded.tokenizer, str(ctx.model_dir))
    assert torch.equal(critic.score.weight, loaded.module.score.weight)
    if adapter is AdapterKind.lora:
        again = load_classifier(cfg.model, loaded.tokenizer, str(ctx.dir / "adapter"))
        assert score_ids(again.eval(), ids, 64, torch.device("cpu")) == pytest.approx(
            scores, abs=1e-5
        )


def test_a_family_whose_head_reads_other_states_is_refused_by_name(tmp_path: Path) -> None:
    """RemBERT projects its states before its head; its backbone's are of another width."""
    tiny("rembert").save_pretrained(tmp_path)
    model = load_classifier(ModelConfig(path=str(tmp_path)), tries._tokenizer())
    with pytest.raises(UserError, match=r"model\.path: rembert can't be a reward model"):
        check_forward(model, "a reward model")
