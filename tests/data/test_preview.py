"""What a preview says of every token, and its counts."""

import io
from typing import Any

import pytest

from rlhf.data.formats import Use
from rlhf.data.preview import Part, RowPreview, Side, preview_row, render
from rlhf.models.loading import train_tokenizer
from rlhf.models.templates import template_text
from rlhf.types import UserError

TURNS = [
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "结局"},
    {"role": "assistant", "content": "很好"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    out = train_tokenizer(["the film is good", "a bad film"], 300, 64)
    out.chat_template = template_text("llama-3")
    return out


def said(tokenizer: Any, side: Side, part: Part) -> str:
    return tokenizer.decode([t.id for t in side.tokens if t.part is part])


def only(preview: RowPreview) -> Side:
    assert len(preview.sides) == 1
    return preview.sides[0]


def test_a_conversation(tokenizer: Any) -> None:
    side = only(preview_row(tokenizer, Use.sft, {"messages": TURNS}, "x"))
    assert said(tokenizer, side, Part.response) == "good很好"
    assert "the film" in said(tokenizer, side, Part.prompt) and "结局" in said(
        tokenizer, side, Part.masked
    )
    assert (side.bos, side.eos) == (1, 2) and not side.problems
    assert [t.id for t in side.tokens if t.part is Part.special] == [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.eos_token_id,
    ]
    assert (
        sum(t.trained for t in side.tokens)
        == len(tokenizer("good")["input_ids"]) + len(tokenizer("很好")["input_ids"]) + 2
    )


def test_texts(tokenizer: Any) -> None:
    side = only(
        preview_row(tokenizer, Use.sft, {"prompt": "the film", "completion": " is good"}, "x")
    )
    assert (said(tokenizer, side, Part.prompt), said(tokenizer, side, Part.response)) == (
        "the film",
        " is good",
    )
    assert (side.bos, side.eos) == (0, 1)
    whole = only(preview_row(tokenizer, Use.sft, {"text": "the film"}, "x"))
    assert said(tokenizer, whole, Part.response) == "the film" and all(
        t.trained for t in whole.tokens
    )


def test_a_pair_shares_its_prompt(tokenizer: Any) -> None:
    row = {
        "prompt": TURNS[:1],
        "chosen": [TURNS[1]],
        "rejected": [{"role": "assistant", "content": "gone"}],
    }
    preview = preview_row(tokenizer, Use.preference, row, "x")
    assert [side.name for side in preview.sides] == ["chosen", "rejected"]
    context = len([t for t in preview.sides[0].tokens if not t.trained])
    assert preview.shared is not None and context <= preview.shared < len(preview.sides[0].tokens)
    assert [t.id for t in preview.sides[0].tokens][: preview.shared] == [
        t.id for t in preview.sides[1].tokens
    ][: preview.shared]
    apart = preview_row(
        tokenizer, Use.preference, {"prompt": "", "chosen": "x", "rejected": "a y"}, "x"
    )
    assert apart.shared == 0


def test_judged_answers_and_prompts(tokenizer: Any) -> None:
    row = {"prompt": "the film", "completion": " bad", "label": False}
    side = only(preview_row(tokenizer, Use.unpaired, row, "x"))
    assert side.name == "bad answer" and said(tokenizer, side, Part.response) == " bad"
    side = only(preview_row(tokenizer, Use.prompt, {"prompt": TURNS[:1]}, "x"))
    assert {t.part for t in side.tokens} == {Part.prompt, Part.special} and not side.problems


def test_what_is_cut_off(tokenizer: Any) -> None:
    row = {"prompt": "the film", "completion": " is good"}
    whole = only(preview_row(tokenizer, Use.sft, row, "x"))
    cut = only(preview_row(tokenizer, Use.sft, row, "x", limit=len(whole.tokens) - 1))
    assert [t.part for t in cut.tokens][-2:] == [Part.response, Part.truncated]
    assert cut.problems == ("does not end with EOS, so a response never ends: it is cut off",)
    prompt = only(preview_row(tokenizer, Use.prompt, {"prompt": "the film is good"}, "x", limit=2))
    assert (
        prompt.tokens[0].part is Part.truncated
        and [t.part for t in prompt.tokens][-2:] == [Part.prompt] * 2
    )


def test_a_doubled_beginning_is_a_problem(tokenizer: Any) -> None:
    other = train_tokenizer(["the film is good"], 300, 64)
    other.chat_template = "{{ bos_token }}" + template_text("llama-3")
    side = only(preview_row(other, Use.sft, {"messages": TURNS[:2]}, "x"))
    assert side.bos == 1
    (problem,) = side.problems
    assert repr(other.bos_token) in problem and "x" in problem


def test_rows_that_a_template_cannot_show(tokenizer: Any) -> None:
    plain = train_tokenizer(["x"], 300, 64)
    with pytest.raises(
        UserError,
        match=r"f.jsonl, row 3: preview.*data.chat_template",
    ):
        preview_row(plain, Use.sft, {"messages": TURNS}, "f.jsonl, row 3")
    with pytest.raises(UserError, match=r"f.jsonl, row 3: the conversation has no assistant turn"):
        preview_row(tokenizer, Use.sft, {"messages": TURNS[:1]}, "f.jsonl, row 3")


def test_colours(tokenizer: Any) -> None:
    from rich.console import Console

    out = io.StringIO()
    row = {"prompt": "the film", "chosen": " is good\n!", "rejected": " bad 好"}
    previews = [preview_row(tokenizer, Use.preference, row, "f.jsonl, row 1", limit=6)]
    Console(file=out, force_terminal=True, width=100, color_system="truecolor").print(
        render(previews)
    )
    text = out.getvalue()
    assert (
        "f.jsonl, row 1" in text
        and "shared prefix:" in text
        and "tokens, " in text
        and "BOS 0, EOS 1" in text
    )
    assert "\x1b[1;32m" in text and "\x1b[36m" in text and "\x1b[9;31m" in text, (
        "response, prompt and truncated tokens differ"
    )
    plain = io.StringIO()
    Console(file=plain, width=100).print(render(previews))
    assert "\x1b" not in plain.getvalue() and "\u21b5" in plain.getvalue()
