"""A Modelfile's template gives, token by token, what the tokenizer's chat template gives."""

from typing import Any

import pytest

from rlhf.export import ollama
from rlhf.models.encoding import prompt_ids
from rlhf.models.templates import template_text
from rlhf.models.turns import plain_ids
from rlhf.types import Message, UserError
from tests.export.go_templates import Template, template_in
from tests.export.made import CHATML
from tests.models import families

LLAMA2 = (  # the system message stands inside the first question
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '[INST] <<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{% if loop.index0 != 1 or messages[0]['role'] != 'system' %}"
    "{{ '[INST] ' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] + '<|end|>' }}{% endfor %}"
)
BRACES += "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
COUNTING = "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}<|end|>{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
SYSTEM: Message = {"role": "system", "content": "Short answers.\n\nIn verse."}
TURNS: list[Message] = [
    {"role": "user", "content": "Is {{ .Role }} a word?\nHow many?"},
    {"role": "assistant", "content": "No: 12 \u00e9t\u00e9"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And 3, 14?"},
]


def tokenizer(template: str, **how: Any) -> Any:
    return families.made(template=template, **how)


@pytest.mark.parametrize(
    ("template", "how"),
    [
        (CHATML, {}),
        (families.PHI, {}),
        (families.GEMMA, {"bos": "<|system|>", "around": "<|system|> $A"}),
        (families.SILENT, {}),
        (families.UNPROMPTED, {}),
        (LLAMA2, {"bos": "<|system|>", "around": "<|system|> $A"}),
        (LLAMA2, {"bos": "<|system|>"}),
        (BRACES, {}),
        (families.THINKING, {}),
    ],
)
def test_template_gives_the_same_tokens(template: str, how: dict[str, Any]) -> None:
    made = tokenizer(template, **how)
    adds_bos = "around" in how
    found = ollama.template_of(made, adds_bos=adds_bos)
    text = template_in(ollama.modelfile("x.gguf", found, None))
    chats: list[list[Message]] = [TURNS[:1], TURNS[:3], TURNS]
    if found.pieces.system is not None:
        chats += [[SYSTEM, *chat] for chat in chats]
    for chat in chats:
        ids = plain_ids(made, Template(text).render(chat))
        assert ([made.bos_token_id] if adds_bos else []) + ids == prompt_ids(made, chat), chat
    if found.pieces.system is None:  # nothing of it, rather than a header without a text
        assert Template(text).render([SYSTEM, *TURNS[:1]]) == Template(text).render(TURNS[:1])


@pytest.mark.parametrize(
    "name", ["chatml", "gemma", "llama-3", "mistral", "qwen", "vicuna", "zephyr", "alpaca"]
)
def test_known_templates_are_written(name: str) -> None:
    made = tokenizer(template_text(name))
    found = ollama.template_of(made, adds_bos=False)
    text = template_in(ollama.modelfile("x.gguf", found, None))
    assert plain_ids(made, Template(text).render(TURNS)) == prompt_ids(made, TURNS)


def test_an_answer_at_the_end_is_continued() -> None:
    found = ollama.template_of(tokenizer(CHATML), adds_bos=False)
    text = Template(ollama.go_template(found.pieces)).render(TURNS[:2])
    assert text.endswith("<|assistant|>\nNo: 12 \u00e9t\u00e9")


@pytest.mark.parametrize(
    ("template", "named"), [(COUNTING, "role"), (DATED, "date"), (None, "chat template")]
)
def test_other_templates_are_refused(template: Any, named: str) -> None:
    with pytest.raises(UserError) as refused:
        ollama.template_of(tokenizer(template), adds_bos=False)
    assert "stage.modelfile" in str(refused.value) and named in str(refused.value)


def test_every_end_token_stops() -> None:
    made = tokenizer(CHATML, eos="<|endoftext|>")
    text = ollama.modelfile("x.gguf", ollama.template_of(made, adds_bos=False), "mit")
    lines = text.splitlines()
    assert lines[0] == "FROM ./x.gguf"
    stops = {line for line in lines if line.startswith("PARAMETER stop ")}
    ends = {f'PARAMETER stop """{token}"""' for token in ("<|end|>", "<|endoftext|>")}
    assert stops == ends
    assert lines[-1] == 'LICENSE """mit"""'


def test_what_the_chat_template_removes_is_told() -> None:
    gemma = tokenizer(families.GEMMA, bos="<|system|>")
    notes = " ".join(ollama.template_of(gemma, adds_bos=False).notes)
    assert "blanks" in notes and "system" in notes
    plain = " ".join(ollama.template_of(tokenizer(CHATML), adds_bos=False).notes)
    assert "blanks" not in plain and "system" not in plain
