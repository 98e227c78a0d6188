"""KTO's own needs: answers that meet another prompt, batches of at least two, and the balance of
good and bad answers.
"""

import pytest
from datasets import Dataset

from rlhf.offline.kto import mismatch_shift
from rlhf.rows.preferences import balance_note, without_lone_row
from rlhf.types import UserError


def test_mismatch_shift() -> None:
    assert mismatch_shift([[1], [2], [3]]) == 1
    assert mismatch_shift([[1], [1], [2], [2]]) == 2, "a pair's two sides lie side by side"
    assert mismatch_shift([[1], [1]]) == 1 and mismatch_shift([[1]]) == 0


def test_a_row_alone_in_its_pass_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"prompt_ids": [[i] for i in range(9)]})
    assert len(without_lone_row(rows, 4, "held-out")) == 8 and "last of 9 rows" in caplog.text
    assert len(without_lone_row(rows, 5, "held-out")) == 9
    with pytest.raises(UserError, match="one answer is too few"):
        without_lone_row(rows.select([0]), 4, "held-out")


def test_balance_of_good_and_bad_answers() -> None:
    assert balance_note(50, 50, 1.0, 1.0) is None
    assert (
        balance_note(60, 80, 1.33, 1.0) is None and balance_note(30, 40, 4 / 3 * 4 / 3, 1.0) is None
    )
    note = balance_note(20, 80, 1.0, 1.0)
    assert note is not None and "0.25" in note and "in [4, 5.33]" in note
    assert balance_note(20, 80, 4.5, 1.0) is None
