"""The recipes in conf/experiment/ for models of 1.5B to 8B parameters: each composes, passes its
stage's checks and a dry run against a model directory of the right shape without weights, and its
memory plan fits the devices that it states. None has been run at its size.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from conf.schema import Config
from conf.stages import OnlineStage
from reward.model import write_manifest
from reward.terms import scoring_models
from rlhf.checks import capacity
from rlhf.checks.memory.fit import eased
from rlhf.checks.memory.moments import HEADROOM, machine_of
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import shapes_of
from rlhf.cli import config, presets
from rlhf.models.loading import train_tokenizer
from rlhf.stages import dry_run
from tests import toys
from tests.checking import check

# experiment -> stage, shape of its model, devices, GiB of one
RECIPES = {
    "ppo_7b": ("ppo", "llama_7b", 8, 80),
    "ppo_7b_lora": ("ppo", "llama_7b", 8, 80),
    "ppo_7b_nodes": ("ppo", "llama_7b", 16, 80),
    "grpo_1_5b": ("grpo", "qwen_1_5b", 8, 80),
    "grpo_1_5b_lora": ("grpo", "qwen_1_5b", 1, 24),
    "grpo_7b": ("grpo", "qwen_7b", 8, 80),
    "grpo_7b_nodes": ("grpo", "qwen_7b", 16, 80),
    "dpo_8b": ("dpo", "llama_8b", 8, 80),
    "dpo_8b_lora": ("dpo", "llama_8b", 1, 24),
    "rm_8b": ("reward", "llama_8b", 8, 80),
    "rm_8b_lora": ("reward", "llama_8b", 1, 24),
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def shape(name: str) -> Any:
    """The configuration of a published model, from its model card."""
    if name == "llama_7b":
        return LlamaConfig(vocab_size=32000, max_position_embeddings=4096)
    if name == "llama_8b":
        return LlamaConfig(
            vocab_size=128256,
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=8192,
        )
    small = name == "qwen_1_5b"
    return Qwen2Config(
        vocab_size=151936 if small else 152064,
        hidden_size=1536 if small else 3584,
        intermediate_size=8960 if small else 18944,
        num_hidden_layers=28,
        num_attention_heads=12 if small else 28,
        num_key_value_heads=2 if small else 4,
        max_position_embeddings=32768,
        tie_word_embeddings=small,
    )


def write_model(path: Path, name: str) -> Any:
    """A model's directory without weights."""
    tokenizer = train_tokenizer(["How are you? Fine, thanks."], 300, 4096)
    tokenizer.chat_template = TEMPLATE
    shape(name).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], Config]:
    """The overrides of a recipe with a model, rows and a reward model, and what they compose to."""
    stage, model, _, _ = RECIPES[request.param]
    tokenizer = write_model(tmp_path / "model", model)
    row = {"prompt": "How are you?", "chosen": "Fine, thanks.", "rejected": "No.", "answer": "1"}
    columns = ["prompt", "chosen", "rejected"] if stage in ("dpo", "reward") else ["prompt"]
    columns += ["answer"] if stage == "grpo" else []
    rows = [{key: row[key] for key in columns} for _ in range(1024)]
    toys.write_jsonl(
        tmp_path / "rows.jsonl", [{**r, "prompt": f"{i}?"} for i, r in enumerate(rows)]
    )
    overrides = [
        f"stage={stage}",
        f"experiment={request.param}",
        f"model.path={tmp_path / 'model'}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        f"run.dir={tmp_path}",
        "run.dry_run=true",
        "tracking=none",
    ]
    if stage == "ppo":
        write_model(tmp_path / "reward", model)
        write_manifest(tmp_path / "reward", toys.reward_manifest(tokenizer))
        overrides.append(f"reward.path={tmp_path / 'reward'}")
    return overrides, config.compose(overrides)


def test_every_recipe_is_tested() -> None:
    text = {name: presets.preset_text("experiment", name) for name in presets.choices("experiment")}
    assert {name for name in text if "Not run at this size" in text[name]} == set(RECIPES)
    for name in RECIPES:
        assert "After " in text[name] and ("arXiv:" in text[name]), name


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_a_recipe_passes_its_dry_run_and_fits_its_devices(
    recipe: tuple[list[str], Config],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    overrides, cfg = recipe
    stage, _, devices, gib = RECIPES[request.node.callspec.params["recipe"]]
    assert (cfg.engine.gpus, cfg.engine.gpu_memory_gib) == (devices, gib)
    check(cfg)
    dry_run.show(cfg, overrides)
    assert f"stage={stage}" in capsys.readouterr().out
    assert "outside the published range" not in caplog.text

    machine = machine_of(cfg.engine, cfg.model.params, all_devices=False)
    scoring = []
    if isinstance(cfg.stage, OnlineStage):
        scoring = scoring_models(cfg.reward, cfg.stage.watch)
    shapes, _ = shapes_of(cfg.model, scoring)
    assert shapes.policy.parameters > 1.4e9
    planned = plan(cfg, shapes, machine)
    print(json.dumps({"device_gib": planned.device_gib, "usable": HEADROOM * machine.device_gib}))
    assert planned.fits, planned.problem


def eight_billion(tmp_path: Path, *overrides: str) -> Config:
    write_model(tmp_path / "model", "llama_8b")
    return config.compose(
        [
            "stage=reward",
            f"model.path={tmp_path / 'model'}",
            "model.dtype=bfloat16",
            "run.dry_run=true",
            "engine=zero3",
            "engine.gpus=8",
            "engine.gpu_memory_gib=80",
            "stage.batch_size=64",
            *overrides,
        ]
    )


def test_a_micro_batch_that_is_left_out_is_the_largest_that_fits(tmp_path: Path) -> None:
    cfg = eight_billion(tmp_path)
    chosen = capacity.fitting_micro_batch(cfg)
    assert chosen is not None and chosen[0] == "micro_batch_tokens"
    size = chosen[1] // cfg.stage.max_length
    assert chosen[1] == size * cfg.stage.max_length
    machine, shapes = (
        machine_of(cfg.engine, cfg.model.params, all_devices=False),
        shapes_of(cfg.model, ())[0],
    )

    def fits(rows: int) -> bool:
        engine = dataclasses.replace(cfg.engine, micro_batch_size=rows)
        return plan(dataclasses.replace(cfg, engine=engine), shapes, machine).fits

    assert fits(size) and not fits(size + 1) and size < 8


def test_a_micro_batch_that_is_given_stays_and_a_small_model_takes_the_whole_batch(
    tmp_path: Path,
) -> None:
    given = eight_billion(tmp_path, "engine.micro_batch_size=2")
    assert capacity.fitting_micro_batch(given) is None
    small = eight_billion(tmp_path, "run.dry_run=false")
    assert capacity.fitting_micro_batch(small) is None, "a directory without weights"


def test_a_budget_of_tokens_is_halved_down_to_the_longest_row(tmp_path: Path) -> None:
    cfg = eight_billion(tmp_path, "engine.micro_batch_tokens=20000", "stage.max_length=4096")
    machine = machine_of(cfg.engine, cfg.model.params, all_devices=False)
    tried = eased(cfg, shapes_of(cfg.model, ())[0], machine)
    last = [changes[-1] for _, changes in tried if changes]
    assert last[-2:] == ["engine.micro_batch_tokens=10000", "engine.micro_batch_tokens=5000"]
