"""Tokenizers and templates as people bring them: what SFT trains is what the sampler continues,
with one token at the beginning and one at the end.
"""

from typing import Any

import pytest

from rlhf.models.conversations import encode_conversation
from rlhf.models.encoding import (
    IGNORED,
    answer_ids,
    encode_answer,
    encode_completion,
    encode_text,
    prompt_ids,
    response_ids,
)
from rlhf.models.facts import Notices, noticed
from rlhf.models.templates import TemplateRefusal
from rlhf.models.turns import (
    LISTED_ENDS,
    end_ids,
    habits,
    response_text,
)
from rlhf.types import UserError
from tests.models import families
from tests.models.families import ids, made

ASKED = [{"role": "user", "content": "is it so"}]
TURNS = [
    *ASKED,
    {"role": "assistant", "content": "the cat sat"},
    {"role": "user", "content": "is the dog"},
    {"role": "assistant", "content": "on the mat"},
]
SYSTEM = {"role": "system", "content": "looked"}
S = ("<unk>", "<s>", "</s>")


def llama() -> Any:
    return made(S, eos="</s>", bos="<s>", around="<s> $A")


def adds_eos() -> Any:
    return made(S, eos="</s>", bos="<s>", around="<s> $A </s>")


def gemma() -> Any:
    special = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    return made(special, eos="<eos>", bos="<bos>", around="<bos> $A", template=families.GEMMA)


# ---- one token at the beginning ----


@pytest.mark.parametrize("make", [llama, adds_eos])
@pytest.mark.parametrize("text", ["the cat", "<s>the cat", "<s><s>the cat"])
def test_one_beginning_and_one_end(make: Any, text: str) -> None:
    tok = make()
    bos, eos = ids(tok, "<s>", "</s>")
    context = prompt_ids(tok, text)
    assert context == [bos, *tok("the cat", add_special_tokens=False)["input_ids"]]
    whole, labels = encode_text(tok, text)
    assert whole == labels == [*context, eos]
    assert encode_text(tok, text + "</s>")[0] == whole
    assert encode_answer(tok, None, text) == whole, "a whole text as an answer"
    assert encode_answer(tok, text, "<s> sat") == [*context, *response_ids(tok, " sat")]
    trained, _ = encode_completion(tok, text, " sat", completion_only=True)
    assert trained == context + response_ids(tok, " sat")
    assert noticed(tok, text) == ({"bos"} if text.startswith("<s>") else set())


def test_a_template_that_writes_two_beginnings() -> None:
    tok = made(S, eos="</s>", bos="<s>", template="<s>{{ bos_token }}{{ messages[0]['content'] }}")
    assert prompt_ids(tok, ASKED)[:2].count(tok.bos_token_id) == 1
    assert noticed(tok, ASKED) == {"bos"}


# ---- how a turn ends ----


def test_the_templates_own_end_is_found_and_trained() -> None:
    tok = made(template=families.PHI)
    end, eos = ids(tok, "<|end|>", "<|endoftext|>")
    assert end_ids(tok) == (eos, end)
    answer = [*tok("the cat sat")["input_ids"], end]
    assert answer_ids(tok, ASKED, "the cat sat") == answer
    whole, labels = encode_conversation(tok, TURNS, completion_only=True)
    assert whole[-1] == end and eos not in whole, "no second end behind the template's"
    last = [*tok("on the mat")["input_ids"], end]
    assert [label for label in labels if label != IGNORED] == answer + last
    assert whole == prompt_ids(tok, TURNS[:3]) + last == encode_answer(tok, None, TURNS)
    assert answer_ids(tok, "is it so", "the cat sat")[-1] == eos, "a text has no turns"
    assert encode_completion(tok, ASKED, "the cat sat", completion_only=False)[0][-1] == end


def test_listed_ends_come_first_and_stay_in_their_order() -> None:
    tok = made(template=families.PHI)
    user, end, eos = ids(tok, "<|user|>", "<|end|>", "<|endoftext|>")
    vars(tok)[LISTED_ENDS] = (end, user)
    assert end_ids(tok) == (end, user, eos)
    assert response_ids(tok, "the cat<|user|>") == [*tok("the cat")["input_ids"], user]


def test_a_template_without_special_tokens_ends_with_the_tokenizers() -> None:
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tok = made(template=plain + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert end_ids(tok) == (tok.eos_token_id,)
    whole, labels = encode_conversation(tok, TURNS[:2], completion_only=True)
    assert whole[-1] == labels[-1] == tok.eos_token_id


# ---- how a turn begins ----


def test_a_template_without_a_generation_prompt_gets_one() -> None:
    tok = made(template=families.UNPROMPTED)
    assert habits(tok).turn.opening == "<|assistant|>\n"
    context = prompt_ids(tok, ASKED)
    assert tok.decode(context).endswith("<|assistant|>\n")
    whole, labels = encode_conversation(tok, TURNS[:2], completion_only=True)
    assert whole == context + answer_ids(tok, ASKED, "the cat sat")
    assert labels[: len(context)] == [IGNORED] * len(context)


@pytest.mark.parametrize("template", [families.SPACED, families.PHI])
@pytest.mark.parametrize("prefix_space", [False, True])
def test_blanks_of_the_template_and_of_the_tokenizer(template: str, prefix_space: bool) -> None:
    """A conversation, a completion and a scored answer are the same tokens, and the text of a
    response is what was said.
    """
    tok = made(template=template, prefix_space=prefix_space)
    whole, _ = encode_conversation(tok, TURNS[:2], completion_only=True)
    answer = answer_ids(tok, ASKED, "the cat sat")
    assert whole == prompt_ids(tok, ASKED) + answer
    assert encode_completion(tok, ASKED, "the cat sat", completion_only=True)[0] == whole
    assert response_text(tok, answer, chat=True) == "the cat sat"
    assert answer_ids(tok, ASKED, "the cat sat", finished=False) == answer[:-1]


def test_a_template_that_strips_strips_everywhere() -> None:
    tok = gemma()
    spaced = [*ASKED, {"role": "assistant", "content": " the cat \n"}]
    whole, _ = encode_conversation(tok, spaced, completion_only=True)
    assert whole == prompt_ids(tok, ASKED) + answer_ids(tok, ASKED, " the cat \n")
    assert response_text(tok, whole[len(prompt_ids(tok, ASKED)) :], chat=True) == "the cat"


def test_an_answer_that_merges_with_the_template_is_what_the_sampler_writes() -> None:
    """ "\\n" and "\\n\\n the" are other tokens together than apart."""
    tok = made(template=families.PHI)
    tok.add_tokens(["\n\n"])
    turn = {"role": "assistant", "content": "\nthe cat"}
    whole, labels = encode_conversation(tok, [*ASKED, turn], completion_only=True)
    context = prompt_ids(tok, ASKED)
    assert whole == context + answer_ids(tok, ASKED, "\nthe cat")
    assert labels == [IGNORED] * len(context) + whole[len(context) :]
    with pytest.raises(ValueError, match=r"message 1: it begins with .*one token"):
        encode_conversation(tok, [*ASKED, turn, *TURNS[2:]], completion_only=True)


# ---- refusals, and what is never read ----


@pytest.mark.parametrize(
    ("messages", "reason"),
    [([SYSTEM, *TURNS], "System role not supported"), ([*ASKED, *TURNS], "must alternate")],
)
def test_a_refusal_is_the_rows(messages: list[dict[str, str]], reason: str) -> None:
    for error in (UserError, ValueError, TemplateRefusal):
        with pytest.raises(error, match=reason):
            encode_conversation(gemma(), messages, completion_only=True)


def test_what_a_template_never_reads_is_told() -> None:
    tok = made(template=families.SILENT)
    assert habits(tok).unread == {"system", "tool_calls"}
    parts = made(template="{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}")
    assert {"user", "assistant"} <= habits(parts).unread, "it reads texts in parts only"
    assert not habits(made(template=families.PHI)).unread & {"system", "developer", "tool"}
    assert not habits(gemma()).unread & {"system"}, "what it refuses it does not drop"
    notices = Notices(tok)
    notices.look("a.jsonl, row 1", [TURNS])
    notices.look("a.jsonl, row 2", [[SYSTEM, *TURNS]])
    notices.look("a.jsonl, row 3", [[SYSTEM, *TURNS]])
    (line,) = notices.lines()
    assert "2 rows" in line and "a.jsonl, row 2" in line and "'system'" in line


def test_calls_that_no_template_writes_are_refused() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(ValueError, match="tool_calls"):
        answer_ids(made(template=families.PHI), ASKED, turn)


# ---- the text of a response ----


def test_special_tokens_reach_the_reward() -> None:
    tok = made((*families.ROLES, "<think>", "</think>"), template=families.PHI)
    text = "<think>the cat</think> sat"
    answer = answer_ids(tok, ASKED, text)
    assert response_text(tok, answer, chat=True) == text
    assert response_text(tok, [*answer, tok.eos_token_id], chat=False) == text
