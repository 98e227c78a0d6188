"""Templates that render earlier answers otherwise once others follow: each answer trains behind
what a policy would have read.
"""

import logging
from typing import Any

import pytest

from conf.choices import RewrittenTurns
from rlhf.data.formats import Use
from rlhf.data.preview import preview_row
from rlhf.models.conversations import Conversation, encode_apart, encode_conversation
from rlhf.models.encoding import IGNORED, answer_ids, prompt_ids
from rlhf.rows.sft import encode_sft
from rlhf.types import UserError
from tests.models import families
from tests.models.families import made
from tests.offline import trl_tools

SPLIT = RewrittenTurns.split
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def bot(text: str, reasoning: str = "", **more: Any) -> Any:
    thought = {"reasoning_content": reasoning} if reasoning else {}
    return {"role": "assistant", "content": text, **thought, **more}


def thinking() -> Any:
    return made((*families.ROLES, "<think>", "</think>"), template=families.THINKING)


def assert_as_sampled(tokenizer: Any, messages: list[Any], parts: list[Conversation]) -> list[int]:
    """Each trained answer is what a policy reads and writes. Returns the answers' places."""
    places = []
    for part in parts:
        assert len(part.ids) == len(part.labels)
        expected = [IGNORED] * len(part.ids)
        for i in part.trained:
            head = prompt_ids(tokenizer, messages[:i])
            answer = answer_ids(tokenizer, messages[:i], messages[i])
            assert part.ids[: len(head) + len(answer)] == head + answer
            expected[len(head) : len(head) + len(answer)] = answer
        assert part.labels == expected
        places += part.trained
    return places


TALK = [
    user("why"),
    bot("so", "for two"),
    user("and"),
    bot("it is"),
    user("is it"),
    bot("yes", "k"),
]


def test_every_answer_trains_as_the_policy_wrote_it() -> None:
    tok = thinking()
    with pytest.raises(ValueError, match="message 1"):
        encode_conversation(tok, TALK, completion_only=True)
    parts = encode_apart(tok, TALK, SPLIT)
    assert [part.trained for part in parts] == [[1], [3], [5]]
    assert assert_as_sampled(tok, TALK, parts) == [1, 3, 5]
    texts = [tok.decode(part.ids) for part in parts]
    assert "for two" in texts[0] and "for two" not in texts[1] + texts[2]
    assert texts[2].startswith(tok.decode(prompt_ids(tok, TALK[:5])))
    with pytest.raises(ValueError, match="message 1"):
        encode_apart(tok, TALK, RewrittenTurns.refuse)


def test_flags_and_prompts_stay_untrained() -> None:
    tok = thinking()
    flagged = [TALK[0], {**TALK[1], "train": False}, *TALK[2:]]
    assert [part.trained for part in encode_apart(tok, flagged, SPLIT)] == [[3], [5]]
    assert [part.trained for part in encode_apart(tok, TALK, SPLIT, first=2)] == [[3], [5]]
    (last,) = encode_apart(tok, TALK, SPLIT, first=4)
    assert last.trained == [5]
    # what follows the last answer is nothing that it was written after
    parts = encode_apart(tok, [*TALK, user("so")], SPLIT)
    assert assert_as_sampled(tok, TALK, parts) == [1, 3, 5]


def test_answers_that_the_whole_shows_as_they_were_written_train_together() -> None:
    """Between two questions Qwen 3 keeps the reasoning of calls."""
    tok = thinking()
    calls = [bot("", "look", tool_calls=[CALL]), {"role": "tool", "content": "4"}, bot("so", "hm")]
    parts = encode_apart(tok, [user("why"), *calls], SPLIT)
    assert [part.trained for part in parts] == [[1, 3]]
    twice = [user("why"), *calls, user("and"), *calls]
    parts = encode_apart(tok, twice, SPLIT)
    assert [part.trained for part in parts] == [[1, 3], [5, 7]]
    assert assert_as_sampled(tok, twice, parts) == [1, 3, 5, 7]


@pytest.mark.parametrize("template", [families.PHI, families.SILENT, families.UNPROMPTED])
def test_other_templates_have_one_conversation(template: str) -> None:
    tok = made(template=template)
    plain = [{"role": m["role"], "content": m["content"]} for m in TALK]
    (whole,) = encode_apart(tok, plain, SPLIT)
    assert (whole.ids, whole.labels) == encode_conversation(tok, plain, completion_only=True)


def test_rows_are_counted_and_the_rest_stays(caplog: pytest.LogCaptureFixture) -> None:
    tok = thinking()
    rows = trl_tools.records(
        [
            {"messages": TALK, "weight": 2.0},
            {"messages": TALK[:2], "weight": 1.0},
            {"prompt": TALK[:2] + TALK[2:3], "completion": TALK[3:], "weight": 1.0},
        ]
    )
    given: dict[str, Any] = {"name": "training", "max_length": 200, "cut": True}
    with caplog.at_level(logging.WARNING):
        data = encode_sft(tok, rows, completion_only=True, **given)
    assert len(data) == 6
    ends = [tok.decode([i for i in labels if i != IGNORED]) for labels in data["labels"]]
    first = ["<think>for two</think>so<|end|>", "<think></think>it is<|end|>"]
    last = "<think>k</think>yes<|end|>"
    assert ends == [*first, last, first[0], first[1], last]
    weights = data["weight"]
    assert weights[0] == weights[1] == weights[2] == pytest.approx(2 * weights[3])
    (record,) = caplog.records
    assert record.args == ("training", 2, 5)
    for refused in ({"completion_only": True, "rewritten": RewrittenTurns.refuse}, {}):
        with pytest.raises(UserError, match=r"row 1: message 1"):
            encode_sft(tok, rows, **{"completion_only": False, **refused}, **given)


def test_the_preview_shows_every_part() -> None:
    shown = preview_row(thinking(), Use.sft, {"messages": TALK}, "a.jsonl, row 1")
    assert [side.name for side in shown.sides] == [f"conversation {i}" for i in (1, 2, 3)]
