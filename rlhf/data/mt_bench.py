"""MT-Bench keeps questions, answers and judgments in files of their own: here a row that names
texts is given them (data.join).

question   {"question_id", "turns": [...]}
answer     {"question_id", "model_id", "choices": [{"turns": [...]}]}
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from rlhf.data.formats.comparisons import MT_ANSWER_1, MT_ANSWER_2, MT_QUESTION
from rlhf.data.parts import parts_of
from rlhf.types import UserError

Row = dict[str, Any]


def tables(paths: tuple[str, ...]) -> tuple[dict[Any, Any], dict[tuple[Any, Any], Any]]:
    """Turns by question, and by question and model, out of the files of `paths`. Raises UserError
    for a row that is neither, or comes twice.
    """
    questions: dict[Any, Any] = {}
    answers: dict[tuple[Any, Any], Any] = {}
    for path in paths:
        for part in parts_of(path, "data.join"):
            for row in part.open():
                columns = row.columns
                if row.problem is not None:
                    raise UserError(f"{row.place}: {row.problem}.")
                if "question_id" in columns and "turns" in columns:
                    _put(questions, columns["question_id"], columns["turns"], row.place)
                elif {"question_id", "model_id", "choices"} <= columns.keys() and _first_choice(
                    columns["choices"]
                ) is not None:
                    _put(
                        answers,
                        (columns["question_id"], columns["model_id"]),
                        _first_choice(columns["choices"]),
                        row.place,
                    )
                else:
                    raise UserError(
                        f"{row.place}: data.join expects MT-Bench's questions (question_id, "
                        "turns) or answers (question_id, model_id, choices of "
                        f"turns), found keys: {', '.join(map(str, columns))}."
                    )
    return questions, answers


def _first_choice(choices: Any) -> Any:
    return (
        choices[0].get("turns")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict)
        else None
    )


def _put(table: dict[Any, Any], key: Any, turns: Any, place: str) -> None:
    if table.setdefault(key, turns) != turns:
        raise UserError(f"{place}: {key} comes a second time, with other texts.")


def joiner(paths: tuple[str, ...]) -> Callable[[Row], Row]:
    """A row with the texts that it names; one whose texts aren't there stays as it is, and is
    refused when it is read.
    """

    load = cache(lambda: tables(paths))  # once, at the first row

    def join(row: Row) -> Row:
        if "question_id" not in row:
            return row
        questions, answers = load()
        question = row["question_id"]
        found = {
            MT_QUESTION: questions.get(question),
            MT_ANSWER_1: answers.get((question, row.get("model_1"))),
            MT_ANSWER_2: answers.get((question, row.get("model_2"))),
        }
        return row | {key: turns for key, turns in found.items() if turns is not None}

    return join
