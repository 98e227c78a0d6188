"""The parts of a model: what stage.train names, and the order of stage.unfreeze."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
)

from conf.schedule import TrainPart, UnfreezeConfig
from rlhf.models.parts import Outline, chosen, outline, places, train_parts
from rlhf.types import UserError

HIDDEN, INNER, VOCAB, BLOCKS = 16, 24, 40, 3
BLOCK = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN


def llama(*, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        num_labels=1,
        pad_token_id=0,
    )


def empty(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def classifier() -> Any:
    return LlamaForSequenceClassification(llama())


def names_of(parts: Outline, **train: Any) -> set[str]:
    return {weight.name for weight in chosen(parts, TrainPart(**train))}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"layers": 1}, BLOCK),
        ({"layers": 2}, 2 * BLOCK),
        ({"modules": ["head"]}, VOCAB * HIDDEN),
        ({"modules": ["lm_head"]}, VOCAB * HIDDEN),
        ({"modules": ["norms"]}, (2 * BLOCKS + 1) * HIDDEN),
        ({"modules": ["embeddings"]}, VOCAB * HIDDEN),
        ({"modules": ["q_proj", "v_proj"]}, 2 * BLOCKS * HIDDEN * HIDDEN),
        ({"modules": ["self_attn"]}, BLOCKS * 4 * HIDDEN * HIDDEN),
        ({"modules": [r".*layers\.[02]"]}, 2 * BLOCK),
        ({"modules": [r".*\.0\..*down_proj.*"]}, INNER * HIDDEN),
        ({"modules": ["model.norm.weight"]}, HIDDEN),
        ({"layers": 1, "modules": ["norms"]}, BLOCK + (2 * (BLOCKS - 1) + 1) * HIDDEN),
        ({"layers": 0, "modules": ["model.norm"]}, HIDDEN),
        ({}, BLOCKS * BLOCK + HIDDEN + 2 * VOCAB * HIDDEN),
    ],
)
def test_what_trains_is_counted(train: dict[str, Any], expected: int) -> None:
    """By the formula of a Llama, from modules without weights."""
    model = empty(llama())
    weights = chosen(outline(model), TrainPart(**train))
    assert sum(weight.size for weight in weights) == expected
    train_parts(model, TrainPart(**train))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_a_classifiers_score_always_trains() -> None:
    parts = outline(classifier())
    assert names_of(parts, layers=0) == {"score.weight"}
    assert names_of(parts, modules=["head"]) == {"score.weight"}
    assert len(names_of(parts, layers=1)) == 10


@pytest.mark.parametrize(
    ("train", "tied", "words"),
    [
        ({"modules": ["q_prj"]}, False, "is named 'q_prj'. Its modules end in down_proj, embed"),
        ({"modules": ["lm_head"]}, True, "lm_head, whose weight is that of model.embed_tokens too"),
        ({"modules": ["embeddings"]}, True, "embed_tokens, whose weight is that of lm_head too"),
        ({"layers": BLOCKS + 1}, False, "the model has 3 blocks. Expected at most 3"),
        ({"layers": 0}, False, "leaves nothing that trains"),
    ],
)
def test_what_can_not_train_is_refused_by_name(
    train: dict[str, Any], tied: bool, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        chosen(outline(empty(llama(tied=tied))), TrainPart(**train))


def test_tied_weights_train_where_all_their_names_are_named() -> None:
    parts = outline(empty(llama(tied=True)))
    assert names_of(parts, modules=["head", "embeddings"]) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(("pattern", "right"), [("(", False), ("", False), (".*mlp.*", True)])
def test_patterns_are_checked_before_anything_else(pattern: str, right: bool) -> None:
    if right:
        assert TrainPart(modules=[pattern]).modules == [pattern]
        return
    with pytest.raises(ValueError, match=r"stage\.train\.modules"):
        TrainPart(modules=[pattern])


@pytest.mark.parametrize(
    ("config", "below", "above"),
    [
        (llama(tied=True), {"model.embed_tokens.weight"}, {"model.norm.weight"}),
        (
            llama(),
            {"model.embed_tokens.weight"},
            {"model.norm.weight", "lm_head.weight"},
        ),
        (
            GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=BLOCKS, n_head=2),
            {"transformer.wte.weight", "transformer.wpe.weight"},
            {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        ),
        (
            OPTConfig(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                ffn_dim=INNER,
                num_hidden_layers=BLOCKS,
                num_attention_heads=2,
                word_embed_proj_dim=HIDDEN,
            ),
            {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
            {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"},
        ),
        (
            BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=BLOCKS, n_head=2),
            {
                "transformer.word_embeddings.weight",
                "transformer.word_embeddings_layernorm.weight",
                "transformer.word_embeddings_layernorm.bias",
            },
            {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        ),
    ],
)
def test_families_have_something_below_and_above_their_blocks(
    config: Any, below: set[str], above: set[str]
) -> None:
    parts = outline(empty(config))
    outside = [weight for weight in parts.weights if set(weight.blocks) == {None}]
    assert {weight.name for weight in outside if weight.below} == below
    assert {weight.name for weight in outside if not weight.below} == above
    blocks = {weight.blocks[0] for weight in parts.weights if weight not in outside}
    assert blocks == set(range(BLOCKS)) and parts.count == BLOCKS
    assert {parts.depth(weight) for weight in outside} == {0, BLOCKS}


def test_blocks_unfreeze_from_the_top() -> None:
    parts = outline(empty(llama()))
    placed = places(parts, parts.weights, 0.5, UnfreezeConfig(every=2))
    assert placed["lm_head.weight"] == placed["model.norm.weight"] == (1.0, 0)
    assert placed["model.layers.2.mlp.up_proj.weight"] == (1.0, 0)
    assert placed["model.layers.1.mlp.up_proj.weight"] == (0.5, 1)
    assert placed["model.layers.0.self_attn.q_proj.weight"] == (0.25, 2)
    assert placed["model.embed_tokens.weight"] == (0.125, 3)
    two = places(parts, parts.weights, 1.0, UnfreezeConfig(patience=1, blocks=2))
    assert [two[f"model.layers.{i}.mlp.up_proj.weight"][1] for i in range(3)] == [1, 0, 0]
    assert two["model.embed_tokens.weight"] == (1.0, 1)


def test_only_what_trains_has_a_turn() -> None:
    """Chosen blocks in the middle: the first of them trains from the start."""
    parts = outline(empty(llama()))
    trained = chosen(parts, TrainPart(modules=[r".*layers\.[01]"]))
    placed = places(parts, trained, 1.0, UnfreezeConfig(every=5))
    turns = {name.split(".")[2]: turn for name, (_, turn) in placed.items()}
    assert turns == {"1": 0, "0": 1}
