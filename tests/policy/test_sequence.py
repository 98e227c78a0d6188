"""Which part of a row each rank has, by hand. What the parts add up to is shown on real ranks
(tests/offline/test_shared_rows.py, tests/online/test_shared_rows_online.py).
"""

import pytest
import torch
from torch import nn

from policy.sequence import IGNORED, Sharing, difference


def place(number: int, ranks: int) -> Sharing:
    """Of a rank, without the process group that a launch has."""
    sharing = object.__new__(Sharing)
    sharing.number, sharing.ranks = number, ranks
    return sharing


ROW = torch.tensor([[11, 12, 13, 14, 15]])


@pytest.mark.parametrize(
    ("number", "ids", "positions", "labels", "mask"),
    [
        # the label of the first part's last token is the second part's first
        (0, [11, 12, 13], [0, 1, 2], [IGNORED, 13, 14], [1, 1, 1]),
        # five tokens of two ranks: one place of padding, at the last token's position
        (1, [14, 15, 0], [3, 4, 4], [15, IGNORED, IGNORED], [1, 1, 0]),
    ],
)
def test_parts_by_hand(
    number: int, ids: list[int], positions: list[int], labels: list[int], mask: list[int]
) -> None:
    inputs = {
        "input_ids": ROW,
        "attention_mask": torch.ones_like(ROW),
        "labels": torch.tensor([[IGNORED, IGNORED, 13, 14, 15]]),
        "weight": torch.tensor([0.5]),
    }
    part = place(number, 2).split(inputs)
    assert part["input_ids"].tolist() == [ids]
    assert part["position_ids"].tolist() == [positions]
    assert part["shift_labels"].tolist() == [labels]
    assert part["attention_mask"].tolist() == [mask]
    assert part["weight"].tolist() == [0.5] and "labels" not in part


def test_a_row_shorter_than_its_ranks_leaves_some_with_padding_alone() -> None:
    assert [place(number, 4).part(ROW[:, :2], 0).tolist() for number in range(4)] == [
        [[11]],
        [[12]],
        [[0]],
        [[0]],
    ]


def test_rounding_is_no_difference_and_another_figure_is() -> None:
    model = nn.Linear(1, 1)
    expected = torch.tensor([0.0, 1.0, 2.0])
    assert difference(expected + 1e-5, expected, model) is None
    assert difference(expected + 0.1, expected, model) is not None
    assert difference(expected * float("nan"), expected, model) is not None
    assert difference(torch.zeros(3), torch.zeros(3), model) is None  # a fresh critic
