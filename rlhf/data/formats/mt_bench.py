"""MT-Bench's judgments and answers, which name their texts, and the questions and answers in files
of their own that hold them (data.join).

question   {"question_id", "turns": [...]}
answer     {"question_id", "model_id", "choices": [{"turns": [...]}]}
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from rlhf.data.calls import is_nothing
from rlhf.data.formats.base import Format, Several, of_two
from rlhf.data.mixture import parts_of
from rlhf.data.rows import Chat, Row, RowError, number_of, text_of, value_of
from rlhf.process.wording import describe
from rlhf.types import UserError

# columns that the joined texts come in
QUESTION, ANSWER_1, ANSWER_2 = "question_turns", "answer_turns_1", "answer_turns_2"
_WINNERS = ("model_1", "model_2", "tie", "error")


def _turns(row: Row, key: str, what: str) -> list[str]:
    if key not in row:
        pronoun = "it" if what == "question" else "them"
        raise RowError(
            f"this row names its {what} but holds no text of {pronoun}: expected "
            "data.join=[questions, answers], the files of MT-Bench's questions and of the "
            "models' answers"
        )
    turns = row[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise RowError(f"{what}: expected a list of turns, each a text, found {describe(turns)}")
    return turns


def _dialogue(question: list[str], answers: list[str], turns: int) -> Chat:
    if len(question) < turns or len(answers) < turns:
        raise RowError(
            f"expected at least {turns} turns, found {len(question)} of the question and "
            f"{len(answers)} of the answer"
        )
    chat: Chat = []
    for asked, answered in zip(question[:turns], answers[:turns], strict=True):
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return chat


def _sft_mt_bench(row: Row) -> dict[str, Any]:
    choices = value_of(row, "choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RowError(
            f"key 'choices': expected a list of objects with 'turns', found {describe(choices)}"
        )
    question = _turns(row, QUESTION, "question")
    answers = _turns({ANSWER_1: value_of(choices[0], "turns")}, ANSWER_1, "answers")
    return {"messages": _dialogue(question, answers, min(len(question), len(answers)))}


def _winner(row: Row, key: str) -> str:
    winner = text_of(row, key)
    if winner not in _WINNERS:
        raise RowError(f"key {key!r}: expected one of {', '.join(_WINNERS)}, found {winner!r}")
    return winner


def _pairs_mt_bench(row: Row) -> Several:
    """Two games with the answers in either order: as MT-Bench counts it, an answer wins where it
    wins both.
    """
    first, second = _winner(row, "g1_winner"), _winner(row, "g2_winner")
    if "error" in (first, second):
        return Several(set_aside=["the judge's answer was not understood (error)"])
    if first != second or first == "tie":
        return Several(set_aside=[f"a tie: game 1 says {first}, game 2 {second}"])
    turn = number_of(row, "turn") if "turn" in row else 1.0
    if turn not in (1, 2):
        raise RowError(f"key 'turn': expected 1 or 2, found {describe(row['turn'])}")
    question = _turns(row, QUESTION, "question")
    sides = [
        _dialogue(question, _turns(row, key, "answers"), int(turn)) for key in (ANSWER_1, ANSWER_2)
    ]
    if sides[0][:-1] != sides[1][:-1]:
        return Several(
            set_aside=[
                "turn 2 compares conversations whose first answers differ, which are no two "
                "answers to one prompt"
            ]
        )
    answer_1, answer_2 = (side[-1]["content"] for side in sides)
    choice = 1 if first == "model_1" else 2
    return Several([of_two(row, sides[0][:-1], answer_1, answer_2, choice)])


def _first_question(row: Row) -> Chat:
    return [{"role": "user", "content": _turns(row, QUESTION, "question")[0]}]


MT_BENCH_JUDGMENT = Format(
    "mt_bench_judgment",
    ("question_id", "model_1", "model_2", "g1_winner", "g2_winner"),
    "question_id, model_1, model_2, g1_winner, g2_winner; the texts come from data.join",
    pairs=_pairs_mt_bench,
    prompt=_first_question,
    consumed=(QUESTION,),
    answers=(ANSWER_1, ANSWER_2, "g1_winner", "g2_winner", "margin"),
)
MT_BENCH_ANSWER = Format(
    "mt_bench_answer",
    ("question_id", "model_id", "choices"),
    "question_id, model_id, choices of {turns}; the questions come from data.join",
    sft=_sft_mt_bench,
    prompt=_first_question,
    consumed=(QUESTION,),
    answers=("choices",),
    read_inside=("choices[].index", "choices[].turns"),
)

# ---- the texts of other files ----


def tables(paths: tuple[str, ...]) -> tuple[dict[Any, Any], dict[tuple[Any, Any], Any]]:
    """The turns of each question_id, and of each (question_id, model_id), in the files of `paths`.
    Raises UserError for a row that is neither, and for one that comes twice with other texts.
    """
    questions: dict[Any, Any] = {}
    answers: dict[tuple[Any, Any], Any] = {}
    for path in paths:
        for part in parts_of(path, "data.join"):
            for row in part.open():
                columns = row.columns
                if row.problem is not None:
                    raise UserError(f"{row.place}: {row.problem}.")
                answer = _first_choice(columns.get("choices"))
                if "question_id" in columns and "turns" in columns:
                    _put(questions, columns["question_id"], columns["turns"], row.place)
                elif {"question_id", "model_id"} <= columns.keys() and answer is not None:
                    key = columns["question_id"], columns["model_id"]
                    _put(answers, key, answer, row.place)
                else:
                    raise UserError(
                        f"{row.place}: data.join expects MT-Bench's questions (question_id, "
                        "turns) or answers (question_id, model_id, choices of "
                        f"turns), found keys: {', '.join(map(str, columns))}."
                    )
    return questions, answers


def _first_choice(choices: Any) -> Any:
    """The turns of an answer's first choice; None where there is none."""
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0].get("turns")
    return None


def _put(table: dict[Any, Any], key: Any, turns: Any, where: str) -> None:
    if table.setdefault(key, turns) != turns:
        raise UserError(f"{where}: {key} comes a second time, with other texts.")


def joiner(paths: tuple[str, ...]) -> Callable[[dict[str, Any], list[str]], dict[str, Any]]:
    """A function that gives a row the texts that it names, and notes the columns of those names
    that the row had. A row whose texts aren't in the files of `paths` stays as it is, and is
    refused when it is read.
    """
    load = cache(lambda: tables(paths))  # once, at the first row

    def join(row: dict[str, Any], lost: list[str]) -> dict[str, Any]:
        if "question_id" not in row:
            return row
        questions, answers = load()
        question = row["question_id"]
        texts = {
            QUESTION: questions.get(question),
            ANSWER_1: answers.get((question, row.get("model_1"))),
            ANSWER_2: answers.get((question, row.get("model_2"))),
        }
        found = {key: turns for key, turns in texts.items() if turns is not None}
        for key, turns in found.items():
            if not is_nothing(row.get(key)) and row[key] != turns:
                lost.append(f"column {key!r} is not read: data.join gives its texts")
        return row | found

    return join
