"""AlpacaEval's annotations (a graded preference for one of two outputs) and its models' outputs."""

import math
from dataclasses import replace
from typing import Any

from rlhf.data.formats.base import Format, Made, Several, Use, of_two
from rlhf.data.formats.chats import (
    ALPACA_COLUMNS,
    alpaca_columns,
    alpaca_prompt,
    sft_alpaca,
    write_sft_alpaca,
)
from rlhf.data.formats.draft import Draft, Writer, in_order, prompt_turns, two_texts
from rlhf.data.rows import Row, RowError, number_of, text_of, value_of
from rlhf.process.wording import describe


def _pairs_alpaca_eval(row: Row) -> Several:
    """A preference of 1 is for output_1, 2 for output_2; between them it is graded, and its
    distance from 1.5, doubled, is the margin in (0, 1].
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
