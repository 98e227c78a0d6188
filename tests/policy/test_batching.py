"""Micro-batch plans (exhaustive, within budget, deterministic) and padded batches."""

from dataclasses import fields
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import batching
from policy.batching import Batch, collate, plan_micro_batches

lengths_lists = st.lists(st.integers(1, 50), max_size=40)


def padded(lengths: list[int], rows: list[int]) -> int:
    return len(rows) * max((lengths[row] for row in rows), default=0)


def test_plan_hand_computed() -> None:
    # longest first: 9 alone; 5 and 4 (2 * 5 = 10); 3, 2, 2 (3 * 3 = 9)
    assert plan_micro_batches([3, 5, 2, 9, 4, 2], budget=10) == [[3], [1, 4], [0, 2, 5]]


def test_a_row_over_the_budget_is_alone() -> None:
    assert plan_micro_batches([3, 25, 3, 30], budget=10) == [[3], [1], [0, 2]]


def test_at_least_halves_the_largest_bin() -> None:
    # one bin of 6 rows x 4 = 24 tokens, then 3 x 4 | 3 x 2, then 2 x 4 | 1 x 4
    assert plan_micro_batches([4, 4, 4, 2, 2, 2], budget=100, at_least=2) == [[0, 1, 2], [3, 4, 5]]
    assert plan_micro_batches([4, 4, 4, 2, 2, 2], budget=100, at_least=3) == [
        [0, 1],
        [2],
        [3, 4, 5],
    ]
    # 2 x 5 = 10 tokens and 4 x 3 = 12: the largest is not the first
    assert plan_micro_batches([5, 5, 3, 3, 3, 3], budget=12, at_least=3) == [[0, 1], [2, 3], [4, 5]]


def test_missing_bins_are_empty() -> None:
    assert plan_micro_batches([5, 7], budget=100, at_least=4) == [[1], [0], [], []]
    assert plan_micro_batches([], budget=100) == [[]]


@given(lengths_lists, st.integers(1, 200), st.integers(1, 12))
def test_every_plan_holds_each_row_once_within_the_budget(
    lengths: list[int], budget: int, at_least: int
) -> None:
    plan = plan_micro_batches(lengths, budget, at_least)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    assert all(padded(lengths, rows) <= budget or len(rows) == 1 for rows in plan)
    assert len(plan) >= at_least
    assert all(plan) or len(plan) == at_least  # empty bins only make up the number ...
    assert all(plan) or max(map(len, plan), default=0) <= 1  # ... when nothing is left to split
    assert plan == plan_micro_batches(lengths, budget, at_least)
    assert len(plan) <= max(at_least, len(lengths))


def cost(lengths: list[int], bins: list[list[int]], of_a_pass: int) -> int:
    return sum(padded(lengths, rows) + of_a_pass for rows in bins)


def all_cuts(order: list[int]) -> list[list[list[int]]]:
    """Every way to cut the rows into bins of neighbours."""
    if not order:
        return [[]]
    ways = []
    for end in range(1, len(order) + 1):
        ways += [[order[:end], *rest] for rest in all_cuts(order[end:])]
    return ways


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9),
    st.integers(1, 200),
    st.sampled_from([0, 7, 1000]),
)
def test_no_other_way_to_cut_costs_less(lengths: list[int], budget: int, of_a_pass: int) -> None:
    with mock.patch.object(batching, "PASS_TOKENS", of_a_pass):
        plan = plan_micro_batches(lengths, budget)
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    assert [row for rows in plan for row in rows] == order
    allowed = [
        ways
        for ways in all_cuts(order)
        if all(padded(lengths, rows) <= budget or len(rows) == 1 for rows in ways)
    ]
    least = min(cost(lengths, ways, of_a_pass) for ways in allowed)
    assert cost(lengths, plan, of_a_pass) == least


def test_rows_of_other_lengths_are_not_padded_to_fill_the_budget() -> None:
    """One long row and many short ones: a bin of all would be 41 x 2000 tokens, mostly padding."""
    plan = plan_micro_batches([2000] + 40 * [50], budget=100_000)
    assert plan == [[0], list(range(1, 41))]
    # 4 tokens of padding are no reason for another pass
    assert plan_micro_batches([52, 50, 50], budget=100_000) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("lengths", "budget", "at_least"), [([0], 10, 1), ([1], 0, 1), ([1], 10, 0)]
)
def test_plan_refuses_nonsense(lengths: list[int], budget: int, at_least: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        plan_micro_batches(lengths, budget, at_least)


NAMES = [field.name for field in fields(Batch) if field.name != "pictures"]  # of tensors
PROMPTS, RESPONSES, PAD = [[1, 2, 3], [4], [5, 6]], [[7], [8, 9, PAD := 99], [10, 11]], 99


def test_collate_hand_computed() -> None:
    batch = collate(PROMPTS, RESPONSES, PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 7], [4, 8, 9, 99], [5, 6, 10, 11]]
    assert batch.response_ids.tolist() == [[7, 99, 99], [8, 9, 99], [10, 11, 99]]
    # a real token that equals pad counts
    assert batch.response_mask.tolist() == [
        [True, False, False],
        [True, True, True],
        [True, True, False],
    ]
    assert batch.positions.tolist() == [[2, 0, 0], [0, 1, 2], [1, 2, 0]]
    assert batch.lengths.tolist() == [4, 4, 4]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=6),
            st.lists(st.integers(0, 9), max_size=6),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_collated_rows_can_be_read_back(pairs: list[tuple[list[int], list[int]]]) -> None:
    batch = collate([p for p, _ in pairs], [r for _, r in pairs], pad_id=0)
    for row, (prompt, response) in enumerate(pairs):
        assert batch.input_ids[row, : batch.lengths[row]].tolist() == prompt + response
        assert batch.response_ids[row][batch.response_mask[row]].tolist() == response
        # a position's next input token is the response token that it predicts
        positions = batch.positions[row][batch.response_mask[row]]
        assert batch.input_ids[row, positions + 1].tolist() == response
        assert not batch.positions[row][~batch.response_mask[row]].any()


def test_select_equals_collating_the_same_rows() -> None:
    prompts, responses = [*PROMPTS, [1, 2, 3, 4, 5, 6]], [*RESPONSES, [7, 8, 9, 10]]
    whole = collate(prompts, responses, PAD)
    for rows in ([2, 0], [1], [3, 1, 0], []):
        ours = whole.select(rows)
        alone = collate([prompts[r] for r in rows], [responses[r] for r in rows], PAD)
        for name in NAMES:
            assert torch.equal(getattr(ours, name), getattr(alone, name)), (rows, name)


def test_to_moves_every_tensor_but_the_lengths() -> None:
    """What decides on shapes stays on the host, which would wait for the device to tell it."""
    moved = collate(PROMPTS, RESPONSES, PAD).to("meta")
    here = {name for name in NAMES if getattr(moved, name).device.type == "cpu"}
    assert here == {"lengths", "prompt_lengths"}


def test_choosing_and_packing_rows_never_wait_for_the_device() -> None:
    """Tensors on the meta device have no values to wait for."""
    batch = collate([[1, 2, 3], [1, 2, 3]], [[7], [8, 9]], PAD).to("meta")
    assert batch.select([1]).input_ids.shape == (1, 5)
    assert batching.pack(batch, [[0, 1]], longest_dense=2).input_ids.shape == (1, 4)


def test_collate_refuses_empty_prompts_and_unequal_numbers() -> None:
    with pytest.raises(ValueError, match=r"none in rows \[1\]"):
        collate([[1], []], [[2], [3]], PAD)
    with pytest.raises(ValueError, match="found 1 and 2"):
        collate([[1]], [[2], [3]], PAD)


# ---- episodes: what the environment wrote stands between what the policy wrote ----

WRITTEN = [[True], [True, False, True], [False, True]]


def test_collate_with_holes_hand_computed() -> None:
    batch = collate(PROMPTS, RESPONSES, PAD, written=WRITTEN)
    plain = collate(PROMPTS, RESPONSES, PAD)
    assert batch.response_mask.tolist() == [
        [True, False, False],
        [True, False, True],
        [False, True, False],
    ]
    # all that the model reads is as if the policy had written it
    for name in ("input_ids", "response_ids", "positions", "lengths", "prompt_lengths"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    assert batch.prompt_lengths.tolist() == [3, 1, 2]
    assert batch.response_lengths.tolist() == [1, 3, 2]


def test_all_written_is_the_same_as_no_word_of_it() -> None:
    batch = collate(PROMPTS, RESPONSES, PAD, written=[[True] * len(row) for row in RESPONSES])
    assert torch.equal(batch.response_mask, collate(PROMPTS, RESPONSES, PAD).response_mask)


def test_select_with_holes_equals_collating_the_same_rows() -> None:
    """The longest row chosen may be one of which the policy wrote least."""
    prompts, responses = [*PROMPTS, [1, 2]], [*RESPONSES, [5, 6, 7, 8, 9]]
    written = [*WRITTEN, [True, False, False, False, True]]
    whole = collate(prompts, responses, PAD, written=written)
    for rows in ([2, 0], [1], [3, 1, 0], []):
        ours = whole.select(rows)
        alone = collate(
            [prompts[r] for r in rows],
            [responses[r] for r in rows],
            PAD,
            written=[written[r] for r in rows],
        )
        for name in NAMES:
            assert torch.equal(getattr(ours, name), getattr(alone, name)), (rows, name)


def test_collate_refuses_a_mask_of_another_length() -> None:
    for written in ([[True], [True, False]], [[True], [True, False, True], [True]]):
        with pytest.raises(ValueError, match="expected of 3 responses"):
            collate(PROMPTS, RESPONSES, PAD, written=written)
