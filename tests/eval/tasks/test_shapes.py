"""Rows of the usual files, made here in their shapes."""

from typing import Any

import pytest

from conf.labelling import RowShape, TaskConfig, TaskKind, TaskMetric
from eval.tasks.answers import counted_text, loosened, whole_code
from eval.tasks.prompts import Scored, examples_for, filled, prompt_of, scored_texts, windows
from eval.tasks.shapes import SHAPES, TaskRow, gold_of, has_no_header, renamed, shape_of
from rlhf.types import RowError

TARGETS = {"choices": ["yes", "no", "maybe"], "labels": [1, 0, 1]}
ROWS: list[tuple[RowShape, dict[str, Any], dict[str, Any]]] = [
    (
        RowShape.mmlu,
        {"question": "2?", "choices": ["1", "2"], "answer": 1, "subject": "s"},
        {"question": "2?", "gold": [1], "letter": "B", "answer": "2"},
    ),
    (
        RowShape.mmlu,
        {"question": "2?", "choices": '["1", "2"]', "answer": "A"},
        {"gold": [0], "choices": ["1", "2"]},
    ),
    (
        RowShape.lettered,
        {"Question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "D"},
        {"question": "q", "choices": ["1", "2", "3", "4"], "gold": [3]},
    ),
    (
        RowShape.lettered,
        {"id": 0, "question": "q", "A": 1, "B": 2, "C": 3, "D": 4, "answer": " b "},
        {"choices": ["1", "2", "3", "4"], "gold": [1], "letter": "B"},
    ),
    (
        RowShape.gsm8k,
        {"question": "q", "answer": "It is\n#### 1,200"},
        {"answer": "1,200", "solution": "It is\n#### 1,200"},
    ),
    (
        RowShape.humaneval,
        {
            "prompt": "def f():\n",
            "test": "def check(c):\n    assert c()",
            "entry_point": "f",
        },
        {"begun": "def f():\n", "tests": ["def check(c):\n    assert c()\ncheck(f)"]},
    ),
    (
        RowShape.truthfulqa_mc1,
        {"question": "q", "mc1_targets": TARGETS, "mc2_targets": TARGETS},
        {"choices": ["yes", "no", "maybe"], "gold": [0, 2]},
    ),
    (
        RowShape.hellaswag,
        {
            "activity_label": "Walking",
            "ctx_a": "A man.",
            "ctx_b": "he goes",
            "endings": ["on [title] now [step] x", "off"],
            "label": "1",
        },
        {
            "question": "Walking: A man. He goes",
            "choices": ["on. now x", "off"],
            "gold": [1],
        },
    ),
    (
        RowShape.ifeval,
        {
            "key": 1,
            "prompt": "Write.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"n": None}],
        },
        {"constraints": [{"id": "punctuation:no_comma", "n": None}]},
    ),
    (RowShape.plain, {"text": "t"}, {}),
    (
        RowShape.plain,
        {"context": "c", "choices": ["x", "y"], "label": "y"},
        {"gold": [1], "answer": "y"},
    ),
]


@pytest.mark.parametrize(("shape", "columns", "expected"), ROWS, ids=range(len(ROWS)))
def test_a_shape_is_known_and_read(
    shape: RowShape, columns: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert shape_of(columns) is shape
    made = SHAPES[shape](columns)
    assert expected.items() <= made.items()


@pytest.mark.parametrize(
    ("shape", "columns", "words"),
    [
        (RowShape.mmlu, {"question": "q", "choices": ["a", "b"], "answer": 2}, ["'answer'", "2"]),
        (RowShape.mmlu, {"question": "q", "choices": [], "answer": 0}, ["'choices'"]),
        (RowShape.lettered, {"question": "q", "A": "1", "answer": "A"}, ["'B'"]),
        (RowShape.gsm8k, {"question": "q", "answer": "4"}, ["####"]),
        (RowShape.gsm8k, {"question": " ", "answer": "#### 4"}, ["'question'"]),
        (RowShape.humaneval, {"prompt": "p", "entry_point": "f"}, ["'test'"]),
        (
            RowShape.truthfulqa_mc1,
            {"question": "q", "mc1_targets": {"choices": ["a"], "labels": [0]}},
            ["'mc1_targets'"],
        ),
        (RowShape.hellaswag, {"ctx": "c", "endings": ["a", "b"], "label": ""}, ["'label'"]),
        (
            RowShape.ifeval,
            {"prompt": "p", "instruction_id_list": ["a", "b"], "kwargs": [{}]},
            ["'kwargs'", "2"],
        ),
    ],
)
def test_a_row_that_does_not_fit_names_the_column(
    shape: RowShape, columns: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RowError) as caught:
        SHAPES[shape](columns)
    assert all(word in str(caught.value) for word in words), caught.value


def test_mmlu_without_a_header_and_columns_of_other_names() -> None:
    assert has_no_header(["What is 1?", "1", "2", "3", "4", "A"])
    assert not has_no_header(["question", "A", "B", "C", "D", "answer"])
    assert renamed({"text_clean": "q"}, {"question": "text_clean"})["question"] == "q"
    with pytest.raises(RowError, match="'clean'"):
        renamed({"text_clean": "q"}, {"question": "clean"})
    assert gold_of(["x", 0], ["x", "y"], "gold") == [0, 0]


# ---- prompts ----


def row(number: int, **columns: Any) -> TaskRow:
    return TaskRow(f"f, row {number}", number, columns)


def task(**options: Any) -> TaskConfig:
    return TaskConfig(**{"metrics": [TaskMetric.exact], **options})


def test_texts_of_a_row() -> None:
    one = row(1, question="2?", choices=["1", "2"], gold=[1])
    assert filled("{question}\n{options}\n{{x}} \\boxed{}", one) == (
        "2?\nA. 1\nB. 2\n{x} \\boxed{}"
    )
    with pytest.raises(RowError, match="'answr'"):
        filled("{answr}", one)
    with pytest.raises(RowError, match="'choices'"):
        filled("{choices}", one)


def test_examples_are_never_the_row_itself() -> None:
    pool = [row(i, question=f"q{i}", answer=f"a{i}") for i in range(5)]
    pool.append(row(9, question="q0", answer="a0"))  # the first row's twin
    shown = task(fewshot=2)
    assert [one.number for one in examples_for(shown, pool[0], pool)] == [1, 2]
    assert [one.number for one in examples_for(shown, pool[3], pool)] == [0, 1]
    drawn = task(fewshot=3, fewshot_seed=4)
    for one in pool:
        found = examples_for(drawn, one, pool)
        assert found == examples_for(drawn, one, pool) and len({x.number for x in found}) == 3
        assert all(x.columns != one.columns for x in found)
    orders = {tuple(x.number for x in examples_for(drawn, one, pool)) for one in pool}
    assert len(orders) > 1
    with pytest.raises(RowError, match="fewshot=5"):
        examples_for(task(fewshot=5), pool[0], pool)


def test_prompts_by_hand() -> None:
    pool = [row(i, question=f"q{i}", answer=f"a{i}") for i in range(3)]
    plain = task(fewshot=1, prompt="Q: {question}\nA:", system="Answer.\n\n")
    assert prompt_of(plain, pool[2], pool) == "Answer.\n\nQ: q0\nA: a0\n\nQ: q2\nA:"
    chat = task(fewshot=1, chat=True, system="Be brief.")
    assert prompt_of(chat, pool[2], pool) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q0"},
        {"role": "assistant", "content": "a0"},
        {"role": "user", "content": "q2"},
    ]
    letters = task(
        kind=TaskKind.loglikelihood,
        metrics=[TaskMetric.accuracy],
        letters_only=True,
        fewshot=1,
        prompt="{question}\n{options}\nAnswer:",
    )
    rows = [row(i, question=f"q{i}", choices=["x", "y"], gold=[i % 2]) for i in range(2)]
    assert scored_texts(letters, rows[0]) == ["A", "B"]
    expected = "q1\nA. x\nB. y\nAnswer: B\n\nq0\nA. x\nB. y\nAnswer:"
    assert prompt_of(letters, rows[0], rows) == expected


def test_windows_score_each_token_once() -> None:
    whole = Scored((0,), tuple(range(1, 24)))
    assert windows(whole, 24) == [whole]
    parts = windows(whole, 10)
    assert [token for part in parts for token in part.ids] == list(whole.ids)
    assert all(len(part.context) + len(part.ids) <= 10 for part in parts)
    assert [part.context[-1] for part in parts[1:]] == [part.ids[-1] for part in parts[:-1]]
    with pytest.raises(ValueError, match="10 tokens"):
        windows(Scored(tuple(range(10)), (1,)), 10)


# ---- answers ----


def test_the_part_of_an_answer_that_counts() -> None:
    import regex

    pattern = regex.compile(r"answer is (\d+)|= (\d+)")
    text = "answer is 4, or = 5"
    assert counted_text(task(), pattern, text) == "5"
    assert counted_text(task(last_match=False), pattern, text) == "4"
    assert counted_text(task(), pattern, "none") is None
    assert counted_text(task(), None, text) == text


def test_code_goes_on_from_what_the_row_begins() -> None:
    begun = 'import math\n\ndef f(x):\n    """Doc."""\n'
    one = row(1, begun=begun, entry_point="f")
    assert whole_code(one, "    return x\n") == begun + "    return x\n"
    assert whole_code(one, "def f(x):\n    return x") == "import math\n\ndef f(x):\n    return x"
    assert whole_code(row(1, tests=["x"]), "y = 1") == "y = 1"


def test_loose_readings() -> None:
    found = loosened("Sure!\n*body*\nBye")
    assert {"*body*\nBye", "Sure!\n*body*", "*body*", "body"} <= set(found)
