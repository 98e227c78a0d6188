"""A prompt computed once for all its responses gives the numbers and gradients of one row per
response.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from policy.adapters import enable_checkpointing
from policy.agreement import can_share_prompts
from policy.batching import Batch, collate, pack, pack_length
from policy.forward import Layout, pack_groups, plan_passes
from policy.model import PolicyModule, take_segments, turn_off_dropout

PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 3], [4, 5]]
RESPONSES = [[6, 7, 8], [9], [10, 11], [12, 13], [14, 15, 16, 17]]
PACKS = [[0, 1, 3], [2, 4]]


def test_layout_hand_computed() -> None:
    packed = pack(collate(PROMPTS, RESPONSES, 0), PACKS)
    # no response's last token
    assert packed.input_ids.tolist() == [[1, 2, 3, 6, 7, 12], [4, 5, 10, 14, 15, 16]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 2, 3, 4]]
    assert packed.owner.tolist() == [0, 0, 1, 0, 1]
    assert packed.positions.tolist() == [
        [2, 3, 4, 0],
        [2, 0, 0, 0],
        [1, 2, 0, 0],
        [2, 5, 0, 0],
        [1, 3, 4, 5],
    ]
    seen = packed.attention_mask[0, 0].int().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0]  # the second token of response 0: prompt and itself
    assert seen[5] == [1, 1, 1, 0, 0, 1]  # response 3 sees the prompt, not response 0
    # padding too attends to something: no softmax over nothing
    assert packed.attention_mask.any(dim=-1).all()


def test_segments_hand_computed() -> None:
    batch = collate(PROMPTS, RESPONSES, 0)
    dense, segments = pack(batch, PACKS, longest_dense=6), pack(batch, PACKS, longest_dense=5)
    # tokens of the prompt, then of each response without its last
    assert segments.attention_mask.tolist() == [[[[3, 2, 0, 1]]], [[[2, 1, 3, 0]]]]
    assert dense.attention_mask.dtype is torch.bool
    for name in ("input_ids", "position_ids", "owner", "positions"):
        assert getattr(segments, name).equal(getattr(dense, name))


# Of each response's tokens, whether the policy wrote it: an environment answered two of them.
WRITTEN = [[True, False, True], [True], [False, True], [True, True], [True, False, False, True]]


def test_layout_with_holes_is_that_of_responses_without() -> None:
    """What the environment wrote is read in the pack too; the mask alone tells."""
    plain = pack(collate(PROMPTS, RESPONSES, 0), PACKS)
    holed = pack(collate(PROMPTS, RESPONSES, 0, written=WRITTEN), PACKS)
    for name in ("input_ids", "position_ids", "owner", "positions", "attention_mask"):
        assert getattr(holed, name).equal(getattr(plain, name)), name


def logprobs_of(
    module: PolicyModule,
    batch: Batch,
    packs: list[list[int]] | None,
    longest_dense: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs, and the gradient of a weighted sum of them by parameter."""
    module.zero_grad()
    if packs is None:
        out, _ = module(batch.input_ids, batch.positions, batch.response_ids, batch.response_mask)
    else:
        p = pack(batch, packs, longest_dense=longest_dense)
        out, _ = module(
            p.input_ids,
            p.positions,
            batch.response_ids,
            batch.response_mask,
            p.owner,
            p.position_ids,
            p.attention_mask,
        )
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("written", [None, WRITTEN])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("longest_dense", [None, 0])
@pytest.mark.parametrize("packs", [PACKS, [[0], [1, 3], [4, 2]], [[3, 1, 0], [2], [4]]])
def test_logprobs_and_gradients_equal_those_of_single_rows(
    tiny_model: Callable[..., Path],
    packs: list[list[int]],
    longest_dense: int | None,
    checkpointing: bool,
    written: list[list[bool]] | None,
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    assert can_share_prompts(model)
    module = PolicyModule(model, chunk=1000)
    batch = collate(PROMPTS, RESPONSES, 0, written=written)
    plain, plain_gradients = logprobs_of(module, batch, None)
    if longest_dense is not None:
        turn_off_dropout(model)  # as every run does before: it copies the configuration
        assert take_segments(model)
        again, _ = logprobs_of(module, batch, None)
        assert again.equal(plain), "rows of their own are read as before"
    if checkpointing:
        enable_checkpointing(model)
        module.train()
    shared, shared_gradients = logprobs_of(module, batch, packs, longest_dense)
    torch.testing.assert_close(shared, plain, rtol=0, atol=2e-5)
    assert float(plain.abs().max()) > 1
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_long_rows_make_nothing_of_the_square_of_their_length(
    tiny_model: Callable[..., Path],
) -> None:
    """A prompt of 40 tokens with 20 responses of 40: 820 tokens in a row."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    assert take_segments(model)
    module = PolicyModule(model, chunk=16)
    batch = collate([[1] * 40] * 20, [[2 + i] * 40 for i in range(20)], 0)
    packs = [list(range(20))]
    length = pack_length(packs[0], [40] * 20, [40] * 20)
    made = {}
    for longest_dense in (None, 0):
        with Largest() as largest:
            logprobs_of(module, batch, packs, longest_dense)
        made[longest_dense] = largest.elements
    assert made[None] >= length**2 > 8 * made[0]


def test_long_packs_cost_what_their_segments_see() -> None:
    """With a dense mask eight packs are cheaper, by segments one is."""
    few: dict[str, Any] = {"hidden_size": 32, "budget": 10**6}
    lengths = [[100] * 8, [400] * 8]
    assert len(pack_groups([0] * 8, *lengths, **few)) == 8
    assert len(pack_groups([0] * 8, *lengths, longest_dense=512, **few)) == 1


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=30)


@given(rows, st.integers(8, 4096), st.integers(1, 200))
@settings(deadline=None)
def test_every_row_is_in_one_pack_of_its_own_group_within_the_budget(
    drawn: list[tuple[int, int]], hidden_size: int, budget: int
) -> None:
    groups, lengths = [group for group, _ in drawn], [length for _, length in drawn]
    prompts = [3 + 2 * group for group in groups]
    packs = pack_groups(groups, prompts, lengths, hidden_size=hidden_size, budget=budget)
    assert all(len(part) == 1 or pack_length(part, prompts, lengths) <= budget for part in packs)
    assert sorted(row for part in packs for row in part) == list(range(len(drawn)))
    assert all(len({groups[row] for row in part}) == 1 for part in packs)
    assert all(
        pack_length(part, prompts, lengths)
        == prompts[part[0]] + sum(lengths[row] - 1 for row in part)
        for part in packs
    )


def test_long_prompts_are_shared_by_all_and_long_responses_of_a_small_model_by_none() -> None:
    many = 10**6
    assert len(pack_groups([0] * 8, [500] * 8, [10] * 8, hidden_size=2048, budget=many)) == 1
    assert len(pack_groups([0] * 8, [2] * 8, [1000] * 8, hidden_size=32, budget=many)) == 8


def test_no_micro_batch_of_shared_prompts_is_above_the_budget() -> None:
    """16 responses of 1,000 tokens to a prompt of 3,000: one pack would have 18,984 tokens."""
    batch = collate([[1] * 3000] * 16, [[2] * 1000] * 16, 0)
    layout = Layout(4096, shared=True, hidden_size=4096)
    prompts, responses = [3000] * 16, [1000] * 16
    for packs in plan_passes(batch, torch.zeros(16, dtype=torch.long), list(range(16)), layout):
        longest = max(pack_length(part, prompts, responses) for part in packs)
        assert len(packs) * longest <= 4096


def test_no_micro_batch_of_episodes_is_above_the_budget() -> None:
    """What environments wrote counts as what the policy wrote: 16 rows of 700 tokens, of which it
    wrote 2 each.
    """
    episode = [True, *[False] * 598, True]
    batch = collate([[1] * 100] * 16, [[2] * 600] * 16, 0, written=[episode] * 16)
    groups, rows = torch.zeros(16, dtype=torch.long), list(range(16))
    for shared in (False, True):
        layout = Layout(1400, shared=shared, hidden_size=64)
        for packs in plan_passes(batch, groups, rows, layout):
            part = batch.select([row for pack_rows in packs for row in pack_rows])
            longest = max(pack_length(p, [100] * 16, [600] * 16) for p in packs)
            assert part.input_ids.shape[1] == 700
            assert len(packs) * longest <= 1400


pairs_of_lengths = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12
)


@given(pairs_of_lengths, st.integers(1, 200), st.integers(8, 4096), st.booleans(), st.booleans())
@settings(deadline=None)
def test_no_micro_batch_is_above_what_the_memory_plan_counts(
    drawn: list[tuple[int, int, int]], budget: int, hidden_size: int, shared: bool, paired: bool
) -> None:
    """Padded tokens, against rlhf/checks/memory/plan.py: engine.micro_tokens, or a row (a pair of
    rows) as long as any may be.
    """
    prompts = [prompt for prompt, _, _ in drawn for _ in range(2)]
    responses = [length for _, *both in drawn for length in both]
    batch = collate([[1] * n for n in prompts], [[2] * n for n in responses], 0)
    groups = torch.arange(len(drawn)).repeat_interleave(2)
    pairs = [(2 * number, 2 * number + 1) for number in range(len(drawn))] if paired else []
    layout = Layout(budget, shared=shared, hidden_size=hidden_size)
    planned = plan_passes(batch, groups, list(range(len(prompts))), layout, pairs)
    longest = max(prompts) + max(responses)
    most = max(budget, (2 if paired else 1) * longest)
    for packs in planned:
        rows = [row for part in packs for row in part]
        if shared:
            width = max(pack_length(part, prompts, responses) for part in packs)
            tokens = pack(batch.select(rows), _renumbered(packs)).input_ids.numel()
            assert tokens == len(packs) * width
        else:
            tokens = batch.select(rows).input_ids.numel()
        assert tokens <= most
    assert sorted(row for packs in planned for part in packs for row in part) == list(
        range(len(prompts))
    )


def _renumbered(packs: list[list[int]]) -> list[list[int]]:
    """The rows of the packs, numbered as they come."""
    numbers = iter(range(sum(map(len, packs))))
    return [[next(numbers) for _ in part] for part in packs]


def test_models_with_windows_or_other_layers_are_left_alone(
    tiny_model: Callable[..., Path],
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    assert can_share_prompts(model)
    assert not can_share_prompts(
        AutoModelForCausalLM.from_pretrained(
            tiny_model(), dtype=torch.float32, attn_implementation="eager"
        )
    )
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not can_share_prompts(model)
    model.config.layer_types = None
    model.config.model_type = "something_new"
    assert not can_share_prompts(model)
