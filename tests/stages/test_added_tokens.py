"""model.add_tokens and model.add_special_tokens: the tokenizer and the embedding grow, the new rows
start at the mean of the others and train, and the saved model has them.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.schema import ModelConfig
from reward.model import load_reward_module
from rlhf.cli import config
from rlhf.models.encoding import encode_text
from rlhf.models.facts import added_tokens
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.offline import trl_tools
from tests.stages.test_adapter_chains import MODULES, OPTIONS

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = ("<note>", "<|call|>")
ADD = ["model.add_tokens=['<note>']", "model.add_special_tokens=['<|call|>']"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokens")
    sft = [{**row, "completion": f" <note>{row['completion']}"} for row in trl_tools.sft_rows(20)]
    pairs = [{**row, "chosen": f" <note>{row['chosen']}"} for row in trl_tools.pair_rows(20)]
    trl_tools.write_rows(place / "sft.jsonl", sft)
    trl_tools.write_rows(place / "pairs.jsonl", pairs)
    prompts = [{"prompt": f"<note> {row['prompt']}"} for row in toys.prompt_rows()]
    toys.write_jsonl(place / "prompts.jsonl", prompts)
    return place


def start(tiny_model: Callable[..., Path], folder: Path, *, tied: bool, pad: int = 0) -> Path:
    """A model directory; pad: rows of the embedding that no token has."""
    base = tiny_model(tied=tied)
    place = folder / f"padded_{tied}_{pad}"
    if pad and not place.exists():
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer) + pad, mean_resizing=False)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place if pad else base


def trained(folder: Path, stage: str, name: str, model: Path, *more: str) -> Path:
    rows = {"sft": "sft.jsonl", "reward": "pairs.jsonl"}.get(stage, "prompts.jsonl")
    given = [f"stage={stage}", f"run.dir={folder}", f"run.name={name}", f"model.path={model}"]
    given += [f"data.path={folder / rows}", *OPTIONS[stage], *more]
    cfg = config.compose(given)
    module = importlib.import_module(f"rlhf.stages.{MODULES.get(stage, stage)}")
    module.check(cfg)
    ctx = RunContext.open(cfg)
    module.run(ctx, stage_rows)
    return ctx.dir / "model"


def rows_of(directory: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The tokenizer, the embedding and the head."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer, model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_at_the_mean(
    tied: bool, tiny_model: Callable[..., Path], folder: Path
) -> None:
    base = start(tiny_model, folder, tied=tied)
    cfg = ModelConfig(path=str(base), add_tokens=["<note>"], add_special_tokens=["<|call|>"])
    tokenizer = load_tokenizer(cfg)
    model = load_causal_lm(cfg, tokenizer)
    old = len(AutoTokenizer.from_pretrained(base))
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [old, old + 1]
    assert encode_text(tokenizer, "a<note>b")[0].count(old) == 1
    _, embedding, head = rows_of(base)
    for layer, before in (
        (model.get_input_embeddings(), embedding),
        (model.get_output_embeddings(), head),
    ):
        assert layer.weight.shape[0] == old + 2 == model.config.vocab_size
        torch.testing.assert_close(layer.weight[:old], before)
        mean = before[:old].mean(dim=0)
        torch.testing.assert_close(layer.weight[old:], torch.stack([mean, mean]))


def test_rows_that_only_padded_are_new_too(tiny_model: Callable[..., Path], folder: Path) -> None:
    base = start(tiny_model, folder, tied=True, pad=5)
    cfg = ModelConfig(path=str(base), add_tokens=["<note>"])
    tokenizer = load_tokenizer(cfg)
    model = load_causal_lm(cfg, tokenizer)
    old = len(tokenizer) - 1
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == old + 5, "there is room"
    torch.testing.assert_close(weight[old], weight[:old].mean(dim=0))


@pytest.mark.parametrize("tied", [True, False])
def test_they_train_and_stay(
    tied: bool, tiny_model: Callable[..., Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = start(tiny_model, folder, tied=tied)
    caplog.set_level("INFO", "rlhf.stages")
    first = trained(folder, "sft", f"first_{tied}", base, *ADD)
    assert "2 tokens are new" in caplog.text
    tokenizer, embedding, head = rows_of(first)
    note = tokenizer.convert_tokens_to_ids("<note>")
    assert embedding.shape[0] == head.shape[0] == len(tokenizer)
    mean = embedding[: note - 1].mean(dim=0)
    assert (embedding[note] - mean).abs().max() > 1e-3, "it has learned"
    # a stage on that model: the same options change nothing any more
    again = ModelConfig(path=str(first), add_tokens=["<note>"])
    known = load_tokenizer(again)
    found = added_tokens(known)
    assert found is not None and (found.new, found.known) == ({}, ["<note>"])
    torch.testing.assert_close(
        load_causal_lm(again, known).get_input_embeddings().weight, embedding
    )
    caplog.clear()
    scored = trained(folder, "reward", f"scored_{tied}", first, ADD[0])
    assert "1 tokens are in the vocabulary already" in caplog.text
    assert load_reward_module(scored, torch.float32).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_policy_writes_with_them(
    stage: str, tiny_model: Callable[..., Path], folder: Path
) -> None:
    base = start(tiny_model, folder, tied=True)
    model = trained(folder, stage, stage, base, *ADD)
    tokenizer, embedding, _ = rows_of(model)
    assert embedding.shape[0] == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<note>") == len(tokenizer) - 2


def test_an_adapter_needs_the_embedding_beside_it(
    tiny_model: Callable[..., Path], folder: Path
) -> None:
    lora = ["adapter=lora", "adapter.rank=2"]
    tied, own = (start(tiny_model, folder, tied=which) for which in (True, False))
    with pytest.raises(UserError, match=r"model\.add_tokens.*tied.*adapter=none"):
        trained(folder, "sft", "tied", tied, *ADD, *lora)
    with pytest.raises(UserError, match=r"adapter\.save_whole=\[embed_tokens,lm_head\]"):
        trained(folder, "sft", "bare", own, *ADD, *lora)
    whole = "adapter.save_whole=[embed_tokens,lm_head]"
    model = trained(folder, "sft", "whole", own, *ADD, *lora, whole)
    cfg = ModelConfig(path=str(model))
    tokenizer = load_tokenizer(cfg)
    weight = load_causal_lm(cfg, tokenizer).get_input_embeddings().weight
    note = tokenizer.convert_tokens_to_ids("<note>")
    assert weight.shape[0] == len(tokenizer)
    assert (weight[note] - weight[: note - 1].mean(dim=0)).abs().max() > 1e-3


def test_what_can_not_add_them_says_so(tiny_model: Callable[..., Path], folder: Path) -> None:
    base = start(tiny_model, folder, tied=True)
    with pytest.raises(UserError, match=r"model\.add_tokens.*stage=eval"):
        config.compose(["stage=eval", f"model.path={base}", *ADD])
    with pytest.raises(UserError, match=r"model\.add_tokens.*stage\.train"):
        trained(folder, "sft", "part", base, *ADD, "stage.train.layers=1")
    with pytest.raises(UserError, match=r"model\.add_tokens.*each of them once"):
        config.compose(["stage=sft", "model.add_tokens=['<a>','<a>']"])


def test_a_resumed_run_has_the_same_ones(tiny_model: Callable[..., Path], folder: Path) -> None:
    base = start(tiny_model, folder, tied=True)
    trained(folder, "sft", "resumed", base, *ADD)
    with pytest.raises(UserError, match=r"model\.add_special_tokens"):
        trained(folder, "sft", "resumed", base, ADD[0], "run.resume=true")
