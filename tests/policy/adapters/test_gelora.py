"""GeLoRA: ranks by the dimension of hidden states."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy.adapters import attach
from policy.adapters.dimension import dimension
from policy.adapters.gelora import block_rank, find
from policy.adapters.hidden import block_of, block_states
from rlhf.types import UserError

HIDDEN, VOCAB = 32, 64


def llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(shape)


def gelora(**options: Any) -> AdapterConfig:
    return AdapterConfig(kind=AdapterKind.gelora, rank=1, alpha=32.0, **options)


def token_rows(count: int = 64, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


class Spreads(nn.Module):
    """A block whose output has a chosen dimension: a curved map of its first coordinates."""

    def __init__(self, dimension: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.taken = dimension
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("turn", torch.randn(dimension, HIDDEN, generator=generator))

    def forward(self, states: torch.Tensor, **options: Any) -> torch.Tensor:
        spread = states[..., : self.taken] @ self.turn
        out: torch.Tensor = spread + 0.02 * spread.sin()
        return torch.cat((states[..., : self.taken], out[..., self.taken :]), -1)


def of_known_dimension(dimensions: list[int], rows: int) -> tuple[LlamaForCausalLM, Any]:
    """A model of one-token rows whose embeddings are a normal cloud of the first of `dimensions`,
    and whose blocks bring forth the others, which are not larger; and its rows.
    """
    model = llama(layers=len(dimensions) - 1)
    generator = torch.Generator().manual_seed(1)
    cloud = torch.zeros(rows, HIDDEN)
    cloud[:, : dimensions[0]] = torch.randn(rows, dimensions[0], generator=generator)
    model.model.embed_tokens = nn.Embedding.from_pretrained(cloud)
    blocks = [Spreads(one, seed) for seed, one in enumerate(dimensions[1:])]
    model.model.layers = nn.ModuleList(blocks)
    return model, [[i] for i in range(rows)]


def test_ranks_are_those_of_hidden_states_of_known_dimension() -> None:
    """8 dimensions that fall to 3: every block's dimension is found within a tenth, and falling
    dimensions ask for rank 1.
    """
    true = [8, 5, 3]
    model, rows = of_known_dimension(true, 1024)
    names = [f"model.layers.{i}.q_proj" for i in range(2)]
    result = find(model, names, rows, pad_id=0)
    assert result.dimensions["model.layers"] == pytest.approx(true, rel=0.1)
    assert result.ranks == dict.fromkeys(names, 1)


def test_ranks_grow_with_the_dimension() -> None:
    """Blocks that add 2 and 5 dimensions of noise to a cloud of 3 ask for ranks of 3 and 6."""
    model, rows = of_known_dimension([3, 3, 3], 1024)
    generator = torch.Generator().manual_seed(2)
    noise = [torch.zeros(1024, HIDDEN) for _ in range(2)]
    noise[0][:, 3:5] = torch.randn(1024, 2, generator=generator)
    noise[1][:, 5:10] = torch.randn(1024, 5, generator=generator)

    class Adds(nn.Module):
        def __init__(self, added: torch.Tensor) -> None:
            super().__init__()
            self.q_proj = nn.Linear(HIDDEN, HIDDEN)
            self.added = added

        def forward(self, states: torch.Tensor, **options: Any) -> torch.Tensor:
            # rows come in the order of their length, which is one here, 1024 at once
            return states + self.added[:, None, :]

    model.model.layers = nn.ModuleList([Adds(one) for one in noise])
    names = [f"model.layers.{i}.q_proj" for i in range(2)]
    result = find(model, names, rows, pad_id=0)
    assert result.dimensions["model.layers"] == pytest.approx([3, 5, 10], rel=0.1)
    assert list(result.ranks.values()) == [3, 6]


@pytest.mark.parametrize(("before", "after", "rank"), [(5, 4, 1), (5, 5.4, 1), (5, 7.6, 4)])
def test_a_rank_is_the_rounded_growth_and_one(before: float, after: float, rank: int) -> None:
    assert block_rank(before, after) == rank


def test_states_are_means_over_the_tokens_of_each_row() -> None:
    """Padding and the order of batches change nothing, against a pass per row."""
    model, rows = llama().train(), token_rows(9)
    states = block_states(model, ["model.layers"], rows, pad_id=0)["model.layers"]
    assert states.shape == (3, 9, HIDDEN)
    for number, row in enumerate(rows):
        with torch.no_grad():
            each = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in (0, 1):
            torch.testing.assert_close(states[layer, number], each[layer][0].mean(0))
    # the last of transformers' is behind the final norm; this one is the last block's own
    with torch.no_grad():
        normed = model.model.norm(states[2])
    assert not torch.allclose(normed, states[2])
    assert model.training


def test_blocks_are_read_off_names() -> None:
    assert block_of("model.layers.11.mlp.up_proj") == ("model.layers", 11)
    assert block_of("lm_head") is None


def test_an_adapter_has_these_ranks_and_one_scale(tmp_path: Path) -> None:
    from peft.tuners.lora import Linear

    rows, record = token_rows(80), tmp_path / "looked_up.json"
    model = attach(llama(), gelora(), task="CAUSAL_LM", sample=lambda: rows, record=record)
    kept = json.loads(record.read_text(encoding="utf-8"))
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, Linear)}
    assert {name: one.r["default"] for name, one in layers.items()} == kept["ranks"]
    assert {one.scaling["default"] for one in layers.values()} == {32.0}
    sizes = [one.in_features + one.out_features for one in layers.values()]
    wanted = sum(r * size for r, size in zip(kept["ranks"].values(), sizes, strict=True))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted
    states = block_states(llama(), ["model.layers"], rows, pad_id=0)["model.layers"]
    assert kept["dimensions"]["model.layers"] == pytest.approx([dimension(c) for c in states])
    found = model.found()
    assert found["rank"] == kept["ranks"] and found["rows"] == 80


def test_a_resumed_run_and_a_second_model_take_the_ranks_found_first(tmp_path: Path) -> None:
    """They read no rows, so other rows can't give their weights another shape."""
    record = tmp_path / "looked_up.json"
    first = attach(llama(), gelora(), task="CAUSAL_LM", sample=token_rows, record=record)
    changed = json.loads(record.read_text(encoding="utf-8"))
    name = "model.layers.0.self_attn.q_proj"
    changed["ranks"][name] = 7
    record.write_text(json.dumps(changed), encoding="utf-8")

    def other_rows() -> list[list[int]]:
        raise AssertionError("rows were read again")

    again = attach(llama(), gelora(), task="CAUSAL_LM", sample=other_rows, record=record)
    ranks = {one: first.found()["rank"][one] for one in first.found()["rank"]}
    assert again.found()["rank"] == ranks | {name: 7}
    record.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"looked_up\.json .* run\.overwrite=true"):
        attach(llama(), gelora(), task="CAUSAL_LM", sample=other_rows, record=record)


def test_few_rows_are_told_and_too_few_refused(caplog: pytest.LogCaptureFixture) -> None:
    rows = token_rows(60)
    with caplog.at_level(logging.WARNING, "rlhf.policy"):
        find(llama(), ["model.layers.0.self_attn.q_proj"], [*rows, *rows], pad_id=0)
    assert "60 different rows of 120" in caplog.text
    with pytest.raises(UserError, match=r"7 different rows are too few.*adapter=lora"):
        find(llama(), [], rows[:7], pad_id=0)
    with pytest.raises(UserError, match="reads rows"):
        attach(llama(), gelora(), task="CAUSAL_LM")
