"""What a model's files say of its tokens reaches the tokenizer, and the model that is saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from conf.schema import ModelConfig
from policy.saving import save_model
from rlhf.models.encoding import prompt_ids
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.turns import end_ids
from rlhf.types import UserError
from tests.models import families
from tests.models.families import ids, made


def saved(folder: Path, tokenizer: Any, rows: int | None = None, **settings: Any) -> str:
    """A model's directory; settings: of generation_config.json, which is left out without any."""
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if settings:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def written(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return content


def test_the_end_tokens_survive_a_training(tmp_path: Path) -> None:
    """As a stage does it: load, train (trainers put the tokenizer's end in), save; and again."""
    tok = made(template=families.PHI)
    user, end, eos = ids(tok, "<|user|>", "<|end|>", "<|endoftext|>")
    # sampling settings without do_sample, as Llama 2 had them, can be read but not saved
    path = saved(tmp_path / "0", tok, eos_token_id=[end, user], temperature=0.6, do_sample=False)
    for round in ("1", "2"):
        cfg = ModelConfig(path=path)
        tok = load_tokenizer(cfg)
        assert end_ids(tok) == (end, user, eos)
        model = load_causal_lm(cfg, tok)
        assert model.generation_config.eos_token_id == [end, user, eos]
        model.generation_config.eos_token_id = tok.eos_token_id
        save_model(model, tok, tmp_path / round)
        assert written(tmp_path / round)["eos_token_id"] == [end, user, eos]
        assert written(tmp_path / round)["temperature"] == 0.6
        path = str(tmp_path / round)


def test_one_end_stays_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    cfg = ModelConfig(path=str(tiny_model()))
    tok = load_tokenizer(cfg)
    save_model(load_causal_lm(cfg, tok), tok, tmp_path / "model")
    assert written(tmp_path / "model")["eos_token_id"] == tok.eos_token_id


def test_a_default_of_the_configuration_is_no_end(tmp_path: Path) -> None:
    """LlamaConfig says 2 where nobody said anything."""
    special = ("<s>", "</s>", "<|end|>")
    named = load_tokenizer(ModelConfig(path=saved(tmp_path / "a", made(special, eos="</s>"))))
    assert end_ids(named) == (2, 1), "a special token may well be meant"
    other = load_tokenizer(ModelConfig(path=saved(tmp_path / "b", made(special[:2], eos="</s>"))))
    assert end_ids(other) == (1,)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    tok = made()
    rows = len(tok)
    tok.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    path = saved(tmp_path, tok, rows)
    with pytest.raises(UserError) as error:
        load_tokenizer(ModelConfig(path=path))
    for part in (path, f"{rows + 1} entries", f"{rows} rows", "<tool>", "resize_token_embeddings"):
        assert part in str(error.value)


def test_entries_for_images_may_lack_a_row(tmp_path: Path) -> None:
    """As in Gemma 3's text models; a text that holds one is refused by itself."""
    tok = made()
    rows = len(tok)
    tok.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    saved(tmp_path, tok, rows)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["image_token"] = "<image_soft_token>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert prompt_ids(loaded, "the cat") == tok("the cat")["input_ids"]
    with pytest.raises(ValueError, match=f"<image_soft_token>.*{rows} rows"):
        prompt_ids(loaded, "the <image_soft_token>")
