"""Metrics of tasks by verifiers, on answers whose verdict is plain."""

from typing import Any

import pytest

from conf.choices import Isolation
from conf.labelling import TaskConfig, TaskMetric
from eval.tasks.figures import RowAnswer, differences, measured_answers, with_intervals
from eval.tasks.report import sample_rows, section
from eval.tasks.shapes import TaskRow
from rlhf.stages import methods
from rlhf.stages.evaluation.checkers import Checker, checkers_of
from rlhf.types import RowError, UserError


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    methods.register()


def check(
    metric: TaskMetric, columns: dict[str, Any], *texts: str, **options: Any
) -> tuple[list[float], Any]:
    """The values of one row's answers, and their votes."""
    task = TaskConfig(metrics=[metric], samples=len(texts), temperature=1.0, **options)
    checker = Checker("t", metric, task)
    answer = RowAnswer(texts, (1,) * len(texts), (True,) * len(texts))
    found = checker.check([TaskRow("f, row 1", 1, columns)], [answer])
    return found.values[0], None if found.votes is None else found.votes[0]


def test_numbers_and_their_votes() -> None:
    texts = ("so it is 4", "4.0", "#### 5", "none")
    values, votes = check(
        TaskMetric.numeric, {"answer": "4"}, *texts, majority_at=[2], max_tokens=8
    )
    assert values == [1, 1, 0, 0]
    assert votes[0] == votes[1] != votes[2] and votes[3] is None


def test_a_pattern_decides_what_counts() -> None:
    columns = {"answer": "Paris"}
    texts = ("A: paris!\nB: x", "Paris")
    assert check(TaskMetric.exact, columns, *texts, pattern="A: (.*)")[0] == [1, 0]
    values, votes = check(TaskMetric.exact, columns, *texts, pattern="A: (.*)", majority_at=[1])
    assert values == [1, 0] and votes == ["paris", None]
    with pytest.raises(UserError, match=r"tasks\.t\.pattern='\('"):
        check(TaskMetric.exact, columns, "x", pattern="(")


def test_letters_and_several_right_answers() -> None:
    values, votes = check(
        TaskMetric.choice, {"answer": "B"}, "The answer is B.", "(C)", "?", majority_at=[1]
    )
    assert values == [1, 0, 0] and votes == ["B", "C", None]
    found, _ = check(
        TaskMetric.exact, {"answer": ["Paris", "City of Light"]}, "paris", "city of light.", "x"
    )
    assert found == [1, 1, 0]


def test_mathematics_by_value() -> None:
    texts = (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2}")
    values, votes = check(TaskMetric.math, {"answer": "1/2"}, *texts, majority_at=[3])
    assert values == [1, 1, 0]
    assert votes[0] != votes[1]  # votes are texts: equal values written otherwise are two answers


def test_code_goes_on_from_the_prompt_and_runs_in_the_sandbox() -> None:
    columns = {
        "begun": "def add(a, b):\n",
        "entry_point": "add",
        "tests": ["assert add(1, 2) == 3"],
    }
    texts = (
        "    return a + b\n",
        "```python\ndef add(a, b):\n    return a + b\n```",
        "    return a - b\n",
    )
    values, _ = check(TaskMetric.code, columns, *texts, answer="tests", isolation=Isolation.limits)
    assert values == [1, 1, 0]


def test_instructions_strictly_loosely_and_by_share() -> None:
    constraints = [
        {"id": "punctuation:no_comma"},
        {"id": "startend:start_checker", "start_phrase": "Dear"},
    ]
    text = "Sure:\nDear reader\nbye"
    for metric, expected in (
        (TaskMetric.instructions, 0.0),
        (TaskMetric.instructions_loose, 1.0),
        (TaskMetric.instructions_share, 0.5),
    ):
        found, _ = check(metric, {"constraints": constraints}, text, answer="constraints")
        assert found == [expected]


@pytest.mark.parametrize(
    ("metric", "columns", "words"),
    [
        (TaskMetric.numeric, {"question": "q"}, ["'answer'", "question"]),
        (TaskMetric.numeric, {"answer": "many"}, ["'answer'", "many"]),
        (TaskMetric.instructions, {"answer": [{"id": "count:x"}]}, ["count:x"]),
    ],
)
def test_a_reference_that_can_not_be_used_is_named(
    metric: TaskMetric, columns: dict[str, Any], words: list[str]
) -> None:
    checker = Checker("t", metric, TaskConfig(metrics=[metric]))
    with pytest.raises(RowError) as caught:
        checker.reference(TaskRow("f, row 1", 1, columns))
    assert all(word in str(caught.value) for word in words), caught.value


def test_figures_of_samples_by_hand() -> None:
    task = TaskConfig(
        metrics=[TaskMetric.numeric, TaskMetric.rouge_1],
        samples=3,
        temperature=1.0,
        pass_at=[1, 2],
        majority_at=[3],
    )
    rows = [TaskRow(f"f, row {i}", i, {"answer": str(i)}) for i in (1, 2)]
    answers = [
        RowAnswer(("1", "1", "2"), (1, 2, 3), (True, True, False)),
        RowAnswer(("1", "x", "2"), (1, 1, 1), (True, True, True)),
    ]
    checked = {one.metric: one.check(rows, answers) for one in checkers_of("t", task)}
    assert set(checked) == {TaskMetric.numeric}
    found = with_intervals(measured_answers(task, rows, answers, checked), 50, 0)
    figures = {one.name: one.interval.estimate for one in found}
    assert figures == pytest.approx(
        {
            "numeric": (2 / 3 + 1 / 3) / 2,
            "rouge_1": (2 / 3 + 1 / 3) / 2,
            "pass_at_1": (2 / 3 + 1 / 3) / 2,
            "pass_at_2": (1.0 + 2 / 3) / 2,
            "majority_at_3": (1.0 + 1 / 2) / 2,  # of 1 and 2 each is as common
            "length": (2 + 1) / 2,
            "finished": (2 / 3 + 1) / 2,
        }
    )
    assert not any(one.is_binary for one in found)


def test_the_section_shows_figures_tests_and_rows_apart() -> None:
    task = TaskConfig(metrics=[TaskMetric.numeric], path="sums.jsonl", prompt="{question}?")
    rows = [TaskRow(f"f, row {i}", i, {"question": f"{i}+0", "answer": i}) for i in range(1, 5)]
    said = {"first": ["1", "2", "3", "x"], "second": ["1", "9", "9", "9"]}
    answers, found = {}, {}
    for policy, texts in said.items():
        answers[policy] = [RowAnswer((text,), (1,), (True,)) for text in texts]
        checked = {one.metric: one.check(rows, answers[policy]) for one in checkers_of("t", task)}
        found[policy] = with_intervals(
            measured_answers(task, rows, answers[policy], checked), 50, 0
        )
    apart = {"second": differences(found["first"], found["second"], 50, 0)}
    made = section("t", task, rows, answers, found, apart, ["f, row 9: no"], 4)
    figures, tests, shown = made.tables
    assert figures.columns == ("metric", "first", "second") and figures.rows[0][0] == "numeric"
    assert figures.rows[0][1].startswith("0.750") and figures.rows[0][2].startswith("0.250")
    assert tests.rows[0][2].startswith("-0.500") and tests.rows[0][3] == "0.5"
    assert shown.columns == ("row", "asked", "expected", "first", "second")
    assert shown.rows == (("2", "2+0?", "2", "1: 2", "0: 9"), ("3", "3+0?", "3", "1: 3", "0: 9"))
    assert "1 rows were left out: f, row 9: no." in made.text
    held = made.figures["differences"]["second"]["numeric"]
    assert held["estimate"] == -0.5 and held["mcnemar_p"] == 0.5
    lines = sample_rows("t", "first", task, rows, answers["first"], found["first"])
    assert lines[3]["response"] == "x" and lines[3]["numeric"] == 0.0 and lines[3]["row"] == 4
