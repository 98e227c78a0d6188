"""Rows of the usual benchmark files in one form. A shape is known by its columns; what it makes of
a row stands beside the row's own columns:

    question       what is asked
    answer         what an answer is compared with
    choices, gold  texts to choose from, and the numbers from 0 of the right ones
    letter         the right choice's letter
    solution       gsm8k: the whole worked answer
    tests          humaneval: Python code that raises where the answer is wrong
    begun          humaneval: the code that an answer goes on from; entry_point: what it defines
    constraints    ifeval: a list of {"id": ..., arguments}

A row that doesn't fit raises RowError, which names the column.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.labelling import RowShape
from rlhf.process.wording import describe
from rlhf.types import RowError, UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The columns of files of MMLU, whose CSV files have no header.
MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
_LETTERED = ("A", "B", "C", "D")

Columns = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One row of a task."""

    place: str  # its file and number, for messages
    number: int  # from 1, in its file
    columns: Columns  # the file's and those of its shape


def _value(columns: Columns, name: str) -> Any:
    value = columns.get(name)
    if value is None:
        there = ", ".join(key for key, held in columns.items() if held is not None)
        raise RowError(f"expected the column {name!r}, found {there or 'none'}")
    return value


def _text(columns: Columns, name: str) -> str:
    value = _value(columns, name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"column {name!r}: expected a text, found {describe(value)}")
    return value


def _structure(value: Any) -> Any:
    """A value that a table may hold as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"expected JSON, found {describe(value)} ({error})") from error


def texts_of(columns: Columns, name: str) -> list[str]:
    """A column's list of texts, which a table may hold as JSON. Raises RowError."""
    values = _structure(_value(columns, name))
    if not isinstance(values, list) or not values:
        raise RowError(f"column {name!r}: expected a list of texts, found {describe(values)}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise RowError(f"column {name!r}: expected texts, found {describe(value)}")
    return values


def gold_of(
    value: Any,
    choices: Sequence[str],
    column: str,
) -> list[int]:
    """The numbers of the right choices, given as a number from 0, a letter, a choice's text, or a
    list of these. Raises RowError.
    """
    values = _structure(value)
    several = values if isinstance(values, list) else [values]
    if not several:
        raise RowError(f"column {column!r}: expected a right choice, found an empty list")
    return [_one_gold(each, choices, column) for each in several]


def _one_gold(
    value: Any,
    choices: Sequence[str],
    column: str,
) -> int:
    number = value
    if isinstance(value, str):
        if value in choices:
            return list(choices).index(value)
        known = LETTERS[: len(choices)]
        word = value.strip().upper()
        if len(word) == 1 and word in known:
            return known.index(word)
        if word.isdigit():
            number = int(word)
    is_number = isinstance(number, int) and not isinstance(number, bool)
    if is_number and 0 <= number < len(choices):
        return int(number)
    raise RowError(
        f"column {column!r}: expected the number from 0, the letter or the text of one of "
        f"{len(choices)} choices, found {describe(value)}"
    )


def _chosen(
    question: str,
    choices: list[str],
    gold: list[int],
) -> dict[str, Any]:
    right = gold[0]
    return {
        "question": question,
        "choices": choices,
        "gold": gold,
        "letter": LETTERS[right],
        "answer": choices[right],
    }


# ---- the shapes ----


def _mmlu(columns: Columns) -> dict[str, Any]:
    if "choices" not in columns:
        return _lettered(columns)
    choices = texts_of(columns, "choices")
    gold = gold_of(_value(columns, "answer"), choices, "answer")
    return _chosen(_text(columns, "question"), choices, gold)


def _lettered(columns: Columns) -> dict[str, Any]:
    """Choices in columns A to D; C-Eval's and CMMLU's names differ in their case."""
    names = {key.lower(): key for key in columns}
    choices = [str(_value(columns, letter)) for letter in _LETTERED]
    answer = _value(columns, names.get("answer", "answer"))
    letter = str(answer).strip().upper()
    if letter not in _LETTERED:
        raise RowError(f"column 'answer': expected one of A to D, found {describe(answer)}")
    gold = [_LETTERED.index(letter)]
    question = _text(columns, names.get("question", "question"))
    return _chosen(question, choices, gold)


def _gsm8k(columns: Columns) -> dict[str, Any]:
    solution = _text(columns, "answer")
    _, mark, final = solution.rpartition("####")
    if not mark or not final.strip():
        raise RowError("column 'answer': expected a text that ends with #### and a number")
    return {
        "question": _text(columns, "question"),
        "answer": final.strip(),
        "solution": solution,
    }


def _humaneval(columns: Columns) -> dict[str, Any]:
    begun = _text(columns, "prompt")
    entry = _text(columns, "entry_point")
    test = _text(columns, "test")
    return {
        "question": begun,
        "begun": begun,
        "tests": [f"{test}\ncheck({entry})"],
        "answer": columns.get("canonical_solution") or "",
    }


def _truthfulqa(targets: str) -> Callable[[Columns], dict[str, Any]]:
    def converted(columns: Columns) -> dict[str, Any]:
        held = _structure(_value(columns, targets))
        if not isinstance(held, dict) or not {"choices", "labels"} <= set(held):
            raise RowError(f"column {targets!r}: expected choices and labels")
        choices, labels = texts_of(held, "choices"), held["labels"]
        if not isinstance(labels, list) or len(labels) != len(choices) or 1 not in labels:
            raise RowError(
                f"column {targets!r}: expected a label of 0 or 1 for each of {len(choices)} "
                f"choices and one of 1 at least, found {describe(labels)}"
            )
        gold = [number for number, label in enumerate(labels) if label == 1]
        return _chosen(_text(columns, "question"), choices, gold)

    return converted


def _hellaswag(columns: Columns) -> dict[str, Any]:
    """Its texts as lm-eval's task prepares them: the activity before the context, marks such as
    [title] taken out.
    """
    context = columns.get("ctx")
    first, second = columns.get("ctx_a"), columns.get("ctx_b")
    if first is not None and second is not None:
        ending = str(second).capitalize()
        context = f"{first} {ending}"
    if not isinstance(context, str) or not context.strip():
        raise RowError(f"column 'ctx': expected a text, found {describe(context)}")
    activity = columns.get("activity_label")
    if activity is not None:
        context = f"{activity}: {context}"
    endings = [_without_marks(text) for text in texts_of(columns, "endings")]
    gold = gold_of(_value(columns, "label"), endings, "label")
    return _chosen(_without_marks(context), endings, gold)


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _ifeval(columns: Columns) -> dict[str, Any]:
    names = texts_of(columns, "instruction_id_list")
    arguments = _structure(_value(columns, "kwargs"))
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise RowError(
            f"column 'kwargs': expected a list of {len(names)} objects, found {describe(arguments)}"
        )
    constraints = []
    for name, given in zip(names, arguments, strict=True):
        constraint = {"id": name}
        if given:
            constraint |= given
        constraints.append(constraint)
    return {"question": _text(columns, "prompt"), "constraints": constraints}


def _plain(columns: Columns) -> dict[str, Any]:
    """Its own columns; the right ones of `choices` are in gold, answer or label."""
    if columns.get("choices") is None:
        return {}
    choices = texts_of(columns, "choices")
    column = "gold"
    for name in ("gold", "answer", "label"):
        if name in columns:
            column = name
            break
    gold = gold_of(_value(columns, column), choices, column)
    right = gold[0]
    return {
        "choices": choices,
        "gold": gold,
        "letter": LETTERS[right],
        "answer": choices[right],
    }


SHAPES: dict[RowShape, Callable[[Columns], dict[str, Any]]] = {
    RowShape.plain: _plain,
    RowShape.mmlu: _mmlu,
    RowShape.lettered: _lettered,
    RowShape.gsm8k: _gsm8k,
    RowShape.humaneval: _humaneval,
    RowShape.truthfulqa_mc1: _truthfulqa("mc1_targets"),
    RowShape.truthfulqa_mc2: _truthfulqa("mc2_targets"),
    RowShape.hellaswag: _hellaswag,
    RowShape.ifeval: _ifeval,
}


def shape_of(columns: Columns) -> RowShape:
    """The shape of a file by the columns of its first row; `plain` for any other."""
    names = {key.lower() for key in columns}
    answer = columns.get("answer")
    known = (
        (RowShape.humaneval, {"prompt", "test", "entry_point"} <= names),
        (RowShape.ifeval, {"prompt", "instruction_id_list", "kwargs"} <= names),
        (RowShape.truthfulqa_mc1, {"question", "mc1_targets"} <= names),
        (RowShape.truthfulqa_mc2, {"question", "mc2_targets"} <= names),
        (RowShape.hellaswag, {"endings", "label"} <= names),
        (RowShape.lettered, {"question", "a", "b", "c", "d", "answer"} <= names),
        (RowShape.mmlu, {"question", "choices", "answer"} <= names),
        (RowShape.gsm8k, "question" in names and isinstance(answer, str) and "####" in answer),
    )
    return next((shape for shape, fits in known if fits), RowShape.plain)


def has_no_header(names: Sequence[str]) -> bool:
    """Whether a CSV file's first line is a row of MMLU, not a header."""
    return len(names) == len(MMLU_COLUMNS) and names[-1].strip() in _LETTERED


def renamed(columns: Columns, names: Mapping[str, str]) -> dict[str, Any]:
    """A row whose columns get a shape's names. names: a shape's column to the file's. Raises
    RowError for one that the row lacks.
    """
    out = dict(columns)
    for name, given in names.items():
        if given not in columns:
            raise RowError(f"expected the column {given!r}, found {', '.join(columns) or 'none'}")
        out[name] = columns[given]
    return out


def check_columns(key: str, names: Mapping[str, Any]) -> None:
    """The option `columns` of a task names columns. Raises UserError."""
    for name, given in names.items():
        if not isinstance(given, str) or not given:
            raise UserError(f"{key}.{name}={given!r}: expected the name of a column of the file.")
