"""A step that writes a column refuses rows that have one of this name: a user's values would be
gone. Empty cells are no values.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.preparation.annotation import Aggregate, Contradicted, LabelNoise
from conf.preparation.cleaning import Perplexity, Tfidf
from conf.preparation.sampling import Balance, Balancing, Grouping
from rlhf.data.formats import Use
from rlhf.data.prepare.aggregate import aggregate
from rlhf.data.prepare.balance import balance
from rlhf.data.prepare.label_noise import label_noise
from rlhf.data.prepare.perplexity import perplexity
from rlhf.data.prepare.quality import tfidf
from rlhf.types import UserError
from tests import steps

Row = dict[str, Any]


def judged() -> list[Row]:
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    return [{**pair, "annotator": name} for name in ("ann", "bob")]


def scored() -> list[Row]:
    row = {"prompt": "p", "rejected": "y", "score_chosen": 2.0, "score_rejected": 0.0}
    return [{**row, "chosen": f"x{i}", "group": "ab"[i % 2]} for i in range(4)]


NOISE = LabelNoise(action=Contradicted.flag, score_chosen="score_chosen")
BALANCE = Balance(by=Grouping.column, column="group", how=Balancing.weight)
CASES = [
    (aggregate, Aggregate(), judged, "confidence", "or name another by confidence"),
    (aggregate, Aggregate(confidence="sure"), judged, "sure", "or name another by confidence"),
    (aggregate, Aggregate(), judged, "annotators", "keeps a file's column"),
    (label_noise, NOISE, scored, "label_noise", "keeps a file's column"),
    (label_noise, NOISE, scored, "label_quality", "keeps a file's column"),
    (balance, BALANCE, scored, "weight", "how=over or under"),
    (tfidf, Tfidf(column="rare"), scored, "rare", "or name another by column"),
]


@pytest.mark.parametrize(("step", "options", "rows", "column", "cure"), CASES)
def test_a_column_of_the_rows_is_not_written_over(
    step: Any, options: Any, rows: Callable[[], list[Row]], column: str, cure: str, tmp_path: Path
) -> None:
    given = rows()
    free = steps.run(step, options, given, tmp_path)
    assert all(column in row for row in free.rows)
    empty = [{**row, column: None} for row in given]
    assert steps.run(step, options, empty, tmp_path).rows == free.rows
    given[1][column] = 0.25
    with pytest.raises(UserError) as error:
        steps.run(step, options, given, tmp_path)
    message = str(error.value)
    assert f"step {options.step}: rows.jsonl, row 2 has a column {column!r} already" in message
    assert f"data.columns='{{own_{column}: {column}}}'" in message and cure in message


def test_perplexity_refuses_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rlhf.models.loading.load_causal_lm", never)
    rows = [{"prompt": "p", "completion": "c", "ppl": 3.0}]
    options = Perplexity(model=str(tiny_model()), column="ppl")
    with pytest.raises(UserError, match=r"step perplexity: rows.jsonl, row 1 has a column 'ppl'"):
        steps.run(perplexity, options, rows, tmp_path, Use.sft)
