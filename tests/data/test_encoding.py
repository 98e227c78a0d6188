"""Rows to token ids: boundaries, end-of-sequence, and which tokens train."""

from typing import Any

import pytest

from rlhf.models.conversations import encode_conversation
from rlhf.models.encoding import (
    IGNORED,
    encode_answer,
    encode_completion,
    encode_text,
    prompt_ids,
    response_ids,
    split_answer,
)
from tests.offline.trl_tools import CHATML, tiny_tokenizer

TURNS = [
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "the end"},
    {"role": "assistant", "content": "great fine"},
]


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat() -> Any:
    return tiny_tokenizer(CHATML)


def trained_text(tokenizer: Any, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORED])


def test_prompt_and_response_are_tokenised_apart(plain: Any) -> None:
    ids, labels = encode_completion(plain, "the fi", "lm good", completion_only=True)
    context = plain("the fi")["input_ids"]
    assert ids == [*context, *plain("lm good")["input_ids"], plain.eos_token_id]
    assert ids != [*plain("the film good")["input_ids"], plain.eos_token_id], (
        "the words merge over the boundary, or the test shows nothing"
    )
    assert labels == [IGNORED] * len(context) + ids[len(context) :]
    assert encode_completion(plain, "the fi", "lm good", completion_only=False) == (ids, ids)


def test_end_of_sequence_is_written_once(plain: Any) -> None:
    eos = plain.eos_token_id
    assert encode_text(plain, "good" + plain.eos_token)[0] == encode_text(plain, "good")[0]
    assert encode_text(plain, "good")[0].count(eos) == 1
    assert response_ids(plain, "good", finished=False) == response_ids(plain, "good")[:-1]


def test_conversation_trains_assistant_turns_only(chat: Any) -> None:
    ids, labels = encode_conversation(chat, TURNS, completion_only=True)
    assert trained_text(chat, labels) == f"good{chat.eos_token}great fine{chat.eos_token}"
    assert ids[-1] == chat.eos_token_id, (
        "ends where a policy stops, not with the template's newline"
    )
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    whole_ids, whole_labels = encode_conversation(chat, TURNS, completion_only=False)
    assert whole_ids == ids and whole_labels == ids
    _, last_only = encode_conversation(chat, TURNS, completion_only=True, first=2)
    assert trained_text(chat, last_only) == f"great fine{chat.eos_token}"


def test_conversation_equals_prompt_and_response(chat: Any) -> None:
    """What SFT trains as a conversation is what a policy reads and writes."""
    ids, _ = encode_conversation(chat, TURNS, completion_only=True)
    assert ids == prompt_ids(chat, TURNS[:3]) + response_ids(chat, "great fine")
    assert encode_answer(chat, TURNS[:3], TURNS[3:]) == ids == encode_answer(chat, None, TURNS)


def test_template_that_rewrites_turns_is_refused(chat: Any) -> None:
    counting = tiny_tokenizer("{{ messages | length }}" + CHATML)
    with pytest.raises(ValueError, match="renders a turn differently"):
        encode_conversation(counting, TURNS, completion_only=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(TURNS[:3], "found 'user'"), (TURNS[1:2], "nothing that it answers"), ([], "no messages")],
)
def test_answers_that_are_none(answer: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_answer(None, answer)


def test_conversation_without_assistant_is_refused(chat: Any) -> None:
    with pytest.raises(ValueError, match="no assistant turn"):
        encode_conversation(chat, TURNS[:1], completion_only=True)
