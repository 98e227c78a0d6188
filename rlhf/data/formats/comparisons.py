"""Published comparisons of answers: Anthropic's hh-rlhf, SHP, Nectar, RewardBench, AlpacaEval and
MT-Bench.

Recalled rather than read in their own source: hh-rlhf, SHP, Nectar. Taken as they are known: SHP's
label 1 says that A is better; Nectar's rank 1 is the best. RewardBench 2 (several chosen and
rejected texts a row) is read as all pairs of one of each.
"""

import math
from typing import Any

from rlhf.data.formats.base import (
    Format,
    Made,
    Several,
    assistant,
    make_pair,
    of_two,
    prompt_of_pair,
    ranked,
)
from rlhf.data.formats.chats import ALPACA_COLUMNS, alpaca_prompt, sft_alpaca
from rlhf.data.rows import (
    Chat,
    Row,
    RowError,
    judgement_of,
    number_of,
    text_of,
    text_or_chat,
    value_of,
)
from rlhf.process.wording import describe
from rlhf.types import PreferencePair

HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"

# ---- hh-rlhf ----


def _split_transcript(row: Row, key: str) -> tuple[str, str]:
    """Everything up to and with the last "Assistant:", and what follows. Raises RowError."""
    text = text_of(row, key)
    before, mark, after = text.rpartition(ASSISTANT_TURN)
    if not mark:
        raise RowError(
            f"key {key!r}: expected a transcript with {ASSISTANT_TURN!r}, found {describe(text)}"
        )
    return before + mark, after


def _pair_hh(row: Row) -> PreferencePair:
    prompt, chosen = _split_transcript(row, "chosen")
    other, rejected = _split_transcript(row, "rejected")
    if prompt != other:
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b),
            min(len(prompt), len(other)),
        )
        raise RowError(
            "keys 'chosen' and 'rejected': expected the same transcript up to the last "
            f"'Assistant:', found a difference at character {at}: "
            f"{describe(prompt[at : at + 30])} against {describe(other[at : at + 30])}"
        )
    return make_pair(row, prompt, chosen, rejected)


HH_RLHF = Format(
    "hh_rlhf",
    ("chosen", "rejected"),
    "chosen, rejected (transcripts of Human: and Assistant: turns)",
    pair=_pair_hh,
    prompt=prompt_of_pair(_pair_hh),
    test=lambda row: (
        "prompt" not in row
        and all(
            isinstance(row[k], str) and ASSISTANT_TURN in row[k] for k in ("chosen", "rejected")
        )
    ),
    consumed=("chosen", "rejected"),
    answers=("margin",),
)

# ---- SHP ----


def _pairs_shp(row: Row) -> Several:
    first_is_better = judgement_of(row, "labels")
    prompt = text_of(row, "history")
    return Several(
        [
            of_two(
                row,
                prompt,
                text_of(row, "human_ref_A"),
                text_of(row, "human_ref_B"),
                1 if first_is_better else 2,
            )
        ]
    )


SHP = Format(
    "shp",
    ("history", "human_ref_A", "human_ref_B", "labels"),
    "history, human_ref_A, human_ref_B, labels (1: A is better)",
    pairs=_pairs_shp,
    prompt=lambda row: text_of(row, "history"),
    test=lambda row: not isinstance(row["history"], list),
    consumed=("history",),
    answers=("human_ref_A", "human_ref_B", "labels", "margin"),
)

# ---- Nectar ----


def _pairs_nectar(row: Row) -> Several:
    answers = value_of(row, "answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(
            "key 'answers': expected a list of at least two answers with ranks, found "
            f"{describe(answers)}"
        )
    found = []
    for i, answer in enumerate(answers):
        place = f"answers[{i}]"
        if not isinstance(answer, dict):
            raise RowError(
                f"key {place!r}: expected an object with 'answer' and 'rank', found "
                f"{describe(answer)}"
            )
        try:
            found.append((place, text_of(answer, "answer"), number_of(answer, "rank")))
        except RowError as error:
            raise RowError(f"{place}: {error}") from None
    return ranked(text_or_chat(row, "prompt"), found, {})


NECTAR = Format(
    "nectar",
    ("prompt", "answers"),
    "prompt, answers of {answer, rank} (rank 1: the best)",
    pairs=_pairs_nectar,
    prompt=lambda row: text_or_chat(row, "prompt"),
    test=lambda row: (
        isinstance(row["answers"], list)
        and any(isinstance(a, dict) and "rank" in a for a in row["answers"])
    ),
    consumed=("prompt",),
    answers=("answers", "margin"),
)

# ---- RewardBench ----


def _texts(row: Row, key: str) -> list[str]:
    value = value_of(row, key)
    if not isinstance(value, list):
        return [text_of(row, key)]
    if not value:
        raise RowError(f"key {key!r}: expected at least one text, found an empty list")
    return [text_of({f"{key}[{i}]": text}, f"{key}[{i}]") for i, text in enumerate(value)]


def _pairs_rewardbench(row: Row) -> Several:
    prompt = text_or_chat(row, "prompt")
    answer = assistant if isinstance(prompt, list) else str
    return Several(
        [
            Made(make_pair(row, prompt, answer(c), answer(r)))
            for c in _texts(row, "chosen")
            for r in _texts(row, "rejected")
        ]
    )


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(v, str) for v in value)
    )


REWARDBENCH = Format(
    "rewardbench",
    ("prompt", "chosen", "rejected", "subset"),
    "prompt, chosen, rejected, subset (and chosen_model, rejected_model; of RewardBench 2, models)",
    pairs=_pairs_rewardbench,
    prompt=lambda row: text_or_chat(row, "prompt"),
    test=lambda row: (
        ("chosen_model" in row or "models" in row)
        and _strings(row["chosen"])
        and _strings(row["rejected"])
    ),
    consumed=("prompt",),
    answers=("chosen", "rejected", "margin"),
)

# ---- AlpacaEval ----


def _pairs_alpaca_eval(row: Row) -> Several:
    """1 is output_1, 2 is output_2; what lies between is graded, and its distance from 1.5
    (doubled) is the margin, in (0, 1].
    """
    value = value_of(row, "preference")
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return Several(aside=["the annotator gave no preference"])
    preference = number_of(row, "preference")
    if preference in (0, 1.5):  # 0: how older annotators wrote a draw
        return Several(aside=[f"a tie: preference is {preference:g}"])
    if not 1 <= preference <= 2:
        raise RowError(
            "key 'preference': expected a number from 1 (output_1) to 2 (output_2), found "
            f"{describe(value)}"
        )
    made = of_two(
        row,
        alpaca_prompt(row),
        text_of(row, "output_1"),
        text_of(row, "output_2"),
        1 if preference < 1.5 else 2,
    )
    pair = made.value
    return Several(
        [
            Made(
                PreferencePair(pair.prompt, pair.chosen, pair.rejected, abs(preference - 1.5) * 2),
                made.fields,
            )
        ]
    )


ALPACA_EVAL_ANNOTATION = Format(
    "alpaca_eval_annotation",
    ("instruction", "output_1", "output_2", "preference"),
    "instruction, output_1, output_2, preference (1 to 2)",
    pairs=_pairs_alpaca_eval,
    prompt=alpaca_prompt,
    consumed=ALPACA_COLUMNS,
    answers=("output_1", "output_2", "preference", "margin"),
)
ALPACA_EVAL = Format(
    "alpaca_eval",
    ("instruction", "output", "generator"),
    "instruction, output, generator",
    sft=sft_alpaca,
    prompt=alpaca_prompt,
    test=lambda row: "kto_tag" not in row,
    consumed=ALPACA_COLUMNS,
    answers=("output",),
)

# ---- MT-Bench: answers and judgments name their texts; rlhf/data/mt_bench.py puts them into the
# row ----

MT_QUESTION, MT_ANSWER_1, MT_ANSWER_2 = "question_turns", "answer_turns_1", "answer_turns_2"


def _turns(row: Row, key: str, what: str) -> list[str]:
    if key not in row:
        raise RowError(
            f"this row names its {what} but holds no text of "
            f"{'it' if what == 'question' else 'them'}: expected "
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
    question = _turns(row, MT_QUESTION, "question")
    answers = _turns({MT_ANSWER_1: value_of(choices[0], "turns")}, MT_ANSWER_1, "answers")
    return {"messages": _dialogue(question, answers, min(len(question), len(answers)))}


_WINNERS = ("model_1", "model_2", "tie", "error")


def _winner(row: Row, key: str) -> str:
    winner = text_of(row, key)
    if winner not in _WINNERS:
        raise RowError(f"key {key!r}: expected one of {', '.join(_WINNERS)}, found {winner!r}")
    return winner


def _pairs_mt_bench(row: Row) -> Several:
    """Two games with the answers in either order: only where both have the same winner is there
    one, as MT-Bench counts it.
    """
    first, second = _winner(row, "g1_winner"), _winner(row, "g2_winner")
    if "error" in (first, second):
        return Several(aside=["the judge's answer was not understood (error)"])
    if first != second or first == "tie":
        return Several(aside=[f"a tie: game 1 says {first}, game 2 {second}"])
    turn = number_of(row, "turn") if "turn" in row else 1.0
    if turn not in (1, 2):
        raise RowError(f"key 'turn': expected 1 or 2, found {describe(row['turn'])}")
    question = _turns(row, MT_QUESTION, "question")
    sides = [
        _dialogue(question, _turns(row, key, "answers"), int(turn))
        for key in (MT_ANSWER_1, MT_ANSWER_2)
    ]
    if sides[0][:-1] != sides[1][:-1]:
        return Several(
            aside=[
                "turn 2 compares conversations whose first answers differ, which are no two "
                "answers to one prompt"
            ]
        )
    return Several(
        [
            of_two(
                row,
                sides[0][:-1],
                sides[0][-1]["content"],
                sides[1][-1]["content"],
                1 if first == "model_1" else 2,
            )
        ]
    )


def _first_question(row: Row) -> Chat:
    return [{"role": "user", "content": _turns(row, MT_QUESTION, "question")[0]}]


MT_BENCH_JUDGMENT = Format(
    "mt_bench_judgment",
    ("question_id", "model_1", "model_2", "g1_winner", "g2_winner"),
    "question_id, model_1, model_2, g1_winner, g2_winner; the texts come from data.join",
    pairs=_pairs_mt_bench,
    prompt=_first_question,
    consumed=(MT_QUESTION,),
    answers=(MT_ANSWER_1, MT_ANSWER_2, "g1_winner", "g2_winner", "margin"),
)
MT_BENCH_ANSWER = Format(
    "mt_bench_answer",
    ("question_id", "model_id", "choices"),
    "question_id, model_id, choices of {turns}; the questions come from data.join",
    sft=_sft_mt_bench,
    prompt=_first_question,
    consumed=(MT_QUESTION,),
    answers=("choices",),
)
