"""The benchmark of tasks beside lm-eval: its cases are tasks, its rows fit them."""

from pathlib import Path

import pytest

from benchmarks import evaluation
from benchmarks.shared import write_rows
from rlhf.cli import config
from rlhf.stages import methods
from rlhf.stages.evaluation.task_rows import read_task


@pytest.mark.parametrize("case", evaluation.CASES, ids=lambda case: case.name)
def test_rows_fit_the_case(case: evaluation.Case, tmp_path: Path) -> None:
    methods.register()
    file = write_rows(tmp_path / "rows.jsonl", evaluation.made_rows(6))
    options = [f"tasks.t.{option}" for option in (f"path={file}", *case.options)]
    cfg = config.compose(["stage=eval", *options])
    held = read_task("t", cfg.tasks["t"])
    assert len(held.rows) == 6 and not held.bad
    assert case.metric in [metric.value for metric in held.task.metrics]


def test_few_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluation.main(["--model", "m", "--lm-eval", "p", "--rows", str(evaluation.FEW)])
    assert "--rows" in capsys.readouterr().err
