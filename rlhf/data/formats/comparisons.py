"""Published comparisons of answers: Anthropic's hh-rlhf, SHP, Nectar, RewardBench and AlpacaEval.

Recalled rather than read in their own source: hh-rlhf, SHP, Nectar. Taken as they are known: SHP's
label 1 says that A is better; Nectar's rank 1 is the best. RewardBench 2 (several chosen and
rejected texts a row) is read as all pairs of one of each.
"""

import math
from dataclasses import replace
from typing import Any

from rlhf.data.formats.base import (
    Format,
    Made,
    Several,
    Use,
    assistant,
    first_difference,
    make_pair,
    of_two,
    prompt_of_pair,
    ranked,
)
from rlhf.data.formats.chats import (
    ALPACA_COLUMNS,
    alpaca_columns,
    alpaca_prompt,
    sft_alpaca,
    write_sft_alpaca,
)
from rlhf.data.formats.draft import (
    ASSISTANT_TURN,
    HUMAN_TURN,
    Draft,
    Writer,
    in_order,
    is_transcript,
    plain_text,
    prompt_turns,
    ranks_of,
    require_same_form,
    required_prompt,
    shown_pair,
    transcript_turns,
    two_texts,
)
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
        at = first_difference(prompt, other)
        raise RowError(
            "keys 'chosen' and 'rejected': expected the same transcript up to the last "
            f"'Assistant:', found a difference at character {at}: "
            f"{describe(prompt[at : at + 30])} against {describe(other[at : at + 30])}"
        )
    return make_pair(row, prompt, chosen, rejected)


def _pair_hh_messages(row: Row) -> PreferencePair:
    pair = _pair_hh(row)
    if not is_transcript(pair.prompt):
        raise RowError(
            f"key 'chosen': expected a transcript that begins with {HUMAN_TURN!r}, found "
            f"{describe(pair.prompt)}"
        )
    sides = [str(side).strip() for side in (pair.chosen, pair.rejected)]
    if not all(sides):
        raise RowError("keys 'chosen' and 'rejected': expected two answers, found an empty one")
    return make_pair(row, transcript_turns(str(pair.prompt)), *map(assistant, sides))


def _is_hh(row: Row) -> bool:
    sides = (row["chosen"], row["rejected"])
    return "prompt" not in row and all(
        isinstance(side, str) and ASSISTANT_TURN in side for side in sides
    )


HH_RLHF = Format(
    "hh_rlhf",
    ("chosen", "rejected"),
    "chosen, rejected (transcripts of Human: and Assistant: turns, which stay texts)",
    pair=_pair_hh,
    prompt=prompt_of_pair(_pair_hh),
    test=_is_hh,
    consumed=("chosen", "rejected"),
    answers=("margin",),
    note=lambda row: (
        "transcripts stay texts; data.format=hh_rlhf_messages makes turns of them, for a chat "
        "template"
    ),
)
HH_RLHF_MESSAGES = Format(
    "hh_rlhf_messages",
    ("chosen", "rejected"),
    "chosen, rejected as hh_rlhf, read as turns; only where data.format asks for it",
    pair=_pair_hh_messages,
    prompt=prompt_of_pair(_pair_hh_messages),
    test=lambda row: False,
    consumed=("chosen", "rejected"),
    answers=("margin",),
)


def _write_hh(draft: Draft) -> list[dict[str, Any]]:
    prompt = draft.columns["prompt"]
    if not prompt:
        raise RowError(
            "key 'prompt': hh-rlhf wants a transcript before the answers, but this row's texts "
            "are whole"
        )
    chosen, rejected = two_texts(draft, empty=True)
    if any(ASSISTANT_TURN in text for text in (chosen, rejected)):
        raise RowError(f"an answer holds {ASSISTANT_TURN!r}, which begins a turn in hh-rlhf")
    if not isinstance(prompt, str) or not prompt.endswith(ASSISTANT_TURN):
        prompt = _transcript(prompt)
        chosen, rejected = f" {chosen}", f" {rejected}"
        draft.notes.append("prompt and answers become a transcript, read again as text")
    return [{"chosen": prompt + chosen, "rejected": prompt + rejected, **draft.margin()}]


def _transcript(prompt: str | Chat) -> str:
    """A prompt as turns of Human: and Assistant:, up to the answer. Raises RowError for a role that
    a transcript has no word for.
    """
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    marks = {"user": HUMAN_TURN, "assistant": ASSISTANT_TURN}
    unknown = next((m["role"] for m in turns if m["role"] not in marks), None)
    if unknown is not None:
        raise RowError(f"role {unknown!r}: hh-rlhf has Human: and Assistant: only")
    return "".join(f"{marks[m['role']]} {m['content']}" for m in turns) + ASSISTANT_TURN


WRITE_HH_RLHF: dict[Use, Writer] = {Use.preference: _write_hh}

# ---- SHP ----


def _pairs_shp(row: Row) -> Several:
    first_is_better = judgement_of(row, "labels")
    prompt = text_of(row, "history")
    first, second = text_of(row, "human_ref_A"), text_of(row, "human_ref_B")
    return Several([of_two(row, prompt, first, second, 1 if first_is_better else 2)])


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


def _write_shp(draft: Draft) -> list[dict[str, Any]]:
    prompt = plain_text(draft.columns["prompt"], "prompt")
    first, second, position = shown_pair(draft)
    row = {
        "history": prompt,
        "human_ref_A": first,
        "human_ref_B": second,
        "labels": int(position == 1),
    }
    return [{**row, **draft.margin()}]


WRITE_SHP: dict[Use, Writer] = {Use.preference: _write_shp}

# ---- Nectar ----


def _pairs_nectar(row: Row) -> Several:
    answers = value_of(row, "answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(
            "key 'answers': expected a list of at least two answers with ranks, found "
            f"{describe(answers)}"
        )
    ranks = []
    for i, answer in enumerate(answers):
        key = f"answers[{i}]"
        if not isinstance(answer, dict):
            raise RowError(
                f"key {key!r}: expected an object with 'answer' and 'rank', found "
                f"{describe(answer)}"
            )
        try:
            ranks.append((key, text_of(answer, "answer"), number_of(answer, "rank")))
        except RowError as error:
            raise RowError(f"{key}: {error}") from None
    return ranked(text_or_chat(row, "prompt"), ranks, {})


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
    read_inside=("answers[].answer", "answers[].rank"),
)


def _write_nectar(draft: Draft) -> list[dict[str, Any]]:
    draft.lose("margin", "Nectar has ranks")
    prompt = required_prompt(draft)
    first, second, position = shown_pair(draft)
    best, worst = ranks_of(draft)
    ranks = (best, worst) if position == 1 else (worst, best)
    answers = [{"answer": first, "rank": ranks[0]}, {"answer": second, "rank": ranks[1]}]
    return [{"prompt": prompt, "answers": answers}]


WRITE_NECTAR: dict[Use, Writer] = {Use.preference: _write_nectar}

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


def _is_text_or_texts(value: Any) -> bool:
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
        and _is_text_or_texts(row["chosen"])
        and _is_text_or_texts(row["rejected"])
    ),
    consumed=("prompt",),
    answers=("chosen", "rejected", "margin"),
)


def _write_rewardbench(draft: Draft) -> list[dict[str, Any]]:
    prompt = required_prompt(draft)
    require_same_form(draft.columns)
    names = ("subset", "chosen_model", "rejected_model")
    named = {name: draft.take(name, "unknown") for name in names}
    chosen, rejected = two_texts(draft)
    sides = {"chosen": chosen, "rejected": rejected}
    return [{"prompt": prompt, **sides, **named, **draft.margin()}]


WRITE_REWARDBENCH: dict[Use, Writer] = {Use.preference: _write_rewardbench}

# ---- AlpacaEval ----


def _pairs_alpaca_eval(row: Row) -> Several:
    """A preference of 1 is for output_1, 2 for output_2; between them it is graded, and its
    distance from 1.5, doubled, is the margin in (0, 1].
    """
    value = value_of(row, "preference")
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return Several(set_aside=["the annotator gave no preference"])
    preference = number_of(row, "preference")
    if preference in (0, 1.5):  # 0: how older annotators wrote a draw
        return Several(set_aside=[f"a tie: preference is {preference:g}"])
    if not 1 <= preference <= 2:
        raise RowError(
            "key 'preference': expected a number from 1 (output_1) to 2 (output_2), found "
            f"{describe(value)}"
        )
    first, second = text_of(row, "output_1"), text_of(row, "output_2")
    made = of_two(row, alpaca_prompt(row), first, second, 1 if preference < 1.5 else 2)
    pair = replace(made.value, margin=abs(preference - 1.5) * 2)
    return Several([Made(pair, made.fields)])


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


def _write_outputs(draft: Draft) -> list[dict[str, Any]]:
    return [{**write_sft_alpaca(draft)[0], "generator": draft.take("generator", "unknown")}]


def _write_annotation(draft: Draft) -> list[dict[str, Any]]:
    context = alpaca_columns(prompt_turns(draft))
    first, second, position = in_order(draft, *two_texts(draft))
    margin = draft.columns.get("margin")
    if margin is None or not 0 < margin <= 1:
        draft.notes.append(
            "a margin outside (0, 1] becomes a preference of full strength, read again as 1"
        )
        margin = 1.0
    preference = 1.5 + margin / 2 * (1 if position == 2 else -1)
    if abs(preference - 1.5) * 2 != margin:
        draft.notes.append("the margin is rounded to the grades of preference")
    if preference == 1.5:
        raise RowError(f"key 'margin': {margin} is too small for a preference beside a tie")
    return [{**context, "output_1": first, "output_2": second, "preference": preference}]


WRITE_ALPACA_EVAL: dict[Use, Writer] = {
    Use.sft: _write_outputs,
    Use.preference: _write_annotation,
}
