"""Calls in what a policy wrote: each form by hand, the forms of families that TRL knows by their
own templates, and what can't be read.
"""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as trl_templates

from rlhf.environments.calls import (
    Broken,
    Call,
    answer,
    as_text,
    complain,
    make_reader,
    read_calls,
)
from rlhf.models.templates import template_text

ADD = Call("add", {"a": 1, "b": [2]})
JSON = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "array"}},
            },
        },
    }
]


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{JSON}\n</tool_call>",
        f"Let me see. <tool_call>{JSON}</tool_call> Done.",
        f"<think>\nFirst <tool_call>?\n</think>\n<tool_call>{JSON}</tool_call>",
        JSON,
        f"  {JSON}\n",
        f"```json\n{JSON}\n```",
        JSON.replace("arguments", "parameters"),
        f'{{"type": "function", "function": {JSON}}}',
        f"[{JSON}]",
        f"[TOOL_CALLS][{JSON}]",
        json.dumps({"name": "add", "arguments": json.dumps({"a": 1, "b": [2]})}),
    ],
)
def test_common_forms(text: str) -> None:
    assert read_calls(text) == [ADD]


def test_several_calls_keep_their_order() -> None:
    other = '{"name": "now"}'
    tagged = f"<tool_call>{JSON}</tool_call>\n<tool_call>{other}</tool_call>"
    assert read_calls(tagged) == [ADD, Call("now", {})]
    assert read_calls(f"[{JSON}, {json.dumps({'name': 'now', 'arguments': None})}]") == [
        ADD,
        Call("now", {}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "The answer is 42.",
        "{}",
        "[1, 2]",
        '{"name": "Ann"}',
        "use </tool_call>",
        "{a: 1}",
    ],
)
def test_what_is_no_call(text: str) -> None:
    assert read_calls(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        f"<tool_call>{JSON}",
        "<tool_call></tool_call>",
        "<tool_call>add(1, 2)</tool_call>",
        f"<tool_call>{JSON[:-3]}</tool_call>",
        "<tool_call>[]x</tool_call>",
        "<tool_call>3</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{"}</tool_call>',
        '{"name": "add", "arguments": {"a": 1}',
        "[TOOL_CALLS] add",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        '{"name": "add", "arguments": ' + '{"a":' * 50_000,
    ],
)
def test_broken_calls_say_why(text: str) -> None:
    (broken,) = read_calls(text)
    assert isinstance(broken, Broken) and broken.reason and len(broken.reason) < 300


def tokenizer(template: str, end: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<unk>": 0, end: 1}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, unk_token="<unk>")
    fast.chat_template = template
    return fast


FAMILIES = {
    "qwen3": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "glm4moe": "<|user|>",
}


@pytest.mark.parametrize(("family", "end"), FAMILIES.items())
def test_families_are_read_as_their_template_writes(family: str, end: str) -> None:
    template = getattr(trl_templates, f"{family}_chat_template")
    made = tokenizer(template, end)
    read = make_reader(made, TOOLS)
    user = {"role": "user", "content": "Add."}
    function = {"name": "add", "arguments": {"a": 1, "b": [2]}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    options: dict[str, Any] = {"tools": TOOLS, "tokenize": False}
    before = made.apply_chat_template([user], add_generation_prompt=True, **options)
    whole = made.apply_chat_template([user, call], **options)
    assert isinstance(before, str) and isinstance(whole, str)
    # a template may open <think> by itself
    shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), None)
    written = whole[len(before) if shared is None else shared :]
    written = written.strip().removesuffix(end).strip()
    assert read(written) == [ADD], written
    assert read("The sum is 3.") == []
    assert getattr(made, "response_template", None) is None, "the policy's tokenizer is as before"


def test_our_templates_are_read_in_the_common_form() -> None:
    for name in ("hermes", "qwen"):
        read = make_reader(tokenizer(template_text(name), "<|im_end|>"), TOOLS)
        assert read(f"<tool_call>\n{JSON}\n</tool_call>") == [ADD]
        (broken,) = read("<tool_call>\n{}\n</tool_call>")
        assert isinstance(broken, Broken)
    assert make_reader(None, TOOLS)(JSON) == [ADD]


def test_answers() -> None:
    assert answer("add", "3") == {"role": "tool", "name": "add", "content": "3"}
    told = complain(Call("<|im_end|>", {}), "no such function")
    assert told == {"role": "tool", "name": "error", "content": "error: no such function"}
    assert complain(Call("ad", {}), "x")["name"] == "ad"
    assert complain(Broken("y"), "y")["name"] == "error"
    text = as_text([answer("add", "3"), answer("add", "4")])
    block = "<tool_response>\n{}\n</tool_response>\n"
    assert text == "\n" + block.format(3) + block.format(4)
