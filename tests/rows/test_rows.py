"""Rows to the token ids that TRL's trainers read: what is left out, and what is refused."""

from typing import Any

import pytest
from datasets import Dataset

from rlhf.data.encoded import Store
from rlhf.models.encoding import response_ids
from rlhf.rows.pairs import encode_pairs, padding_token
from rlhf.rows.preferences import encode_preferences
from rlhf.rows.sft import encode_sft, encode_sft_row
from rlhf.types import UserError
from tests.offline import trl_tools


def test_padding_token_avoids_the_data() -> None:
    tokenizer = trl_tools.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token

    def pairs(*ids: int) -> Dataset:
        return Dataset.from_dict({"chosen_ids": [list(ids)], "rejected_ids": [[5]]})

    last = len(tokenizer) - 1
    assert padding_token(tokenizer, pairs(7)) == tokenizer.unk_token
    assert padding_token(
        tokenizer, pairs(tokenizer.unk_token_id, last)
    ) == tokenizer.convert_ids_to_tokens(last - 1)
    with pytest.raises(UserError, match="every token"):
        padding_token(tokenizer, pairs(*range(len(tokenizer))))


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}
SHOWS_TOOLS = "{{ tools | tojson if tools else '' }}" + trl_tools.CHATML


def test_rows_of_different_columns_stand_side_by_side() -> None:
    """As one data set they would get each other's keys, and nulls for what they have not."""
    tokenizer = trl_tools.tiny_tokenizer(SHOWS_TOOLS)
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    other = {"type": "function", "function": {"name": "g", "parameters": {"c": [1]}}}
    rows = [
        {"messages": turns},
        {"text": "the end"},
        {"messages": turns, "tools": [TOOL]},
        {"prompt": "the", "completion": " good"},
        {"messages": turns, "tools": [other, TOOL]},
        {"prompt": turns[:1], "completion": turns[1:], "tools": [other]},
    ]
    data = encode_sft(
        tokenizer,
        trl_tools.records(rows),
        name="training",
        max_length=400,
        completion_only=True,
        cut=True,
    )
    assert data.column_names == ["input_ids", "labels"]
    for row, encoded in zip(rows, data, strict=True):
        ((ids, labels),) = encode_sft_row(tokenizer, row, completion_only=True)
        assert encoded == {"input_ids": ids, "labels": labels}
    assert '"b": 1, "a": 2' in tokenizer.decode(data[4]["input_ids"])
    assert "null" not in tokenizer.decode(data[4]["input_ids"])


def test_a_row_that_cannot_be_encoded_is_named_by_file_and_row() -> None:
    tokenizer = trl_tools.tiny_tokenizer(trl_tools.CHATML)
    rows = [{"text": "the end"}, {"messages": [{"role": "user", "content": "the film"}]}]
    given: dict[str, Any] = {"max_length": 40, "completion_only": True, "cut": True}
    with pytest.raises(UserError, match=r"rows.jsonl, row 2: .*no assistant turn"):
        encode_sft(tokenizer, trl_tools.records(rows), name="training", **given)
    store = Store(max_bad_rows=1)
    data = encode_sft(tokenizer, trl_tools.records(rows), name="training", store=store, **given)
    assert len(data) == 1


def test_pairs_too_long_are_left_out_and_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = trl_tools.tiny_tokenizer()
    rows = trl_tools.records(
        [
            {"prompt": "the film", "chosen": " good", "rejected": " bad"},
            {"prompt": "the", "chosen": " good" * 50, "rejected": " bad"},
        ]
    )
    with caplog.at_level("WARNING", "rlhf.stages"):
        pairs = encode_pairs(tokenizer, rows, name="training", max_length=20, margin=False)
    assert len(pairs) == 1 and "1 of 2 pairs are longer than" in caplog.text
    assert pairs[0]["chosen_ids"][-1] == tokenizer.eos_token_id
    with pytest.raises(UserError, match=r"each of the 2 pairs.*stage.max_length=3"):
        encode_pairs(tokenizer, rows, name="training", max_length=3, margin=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": float("nan")}, r"rows.jsonl, row 1: margin is nan"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "no chat template"),
    ],
)
def test_pairs_that_are_refused(change: dict[str, Any], message: str) -> None:
    row = {"prompt": "the", "chosen": " good", "rejected": " bad", "margin": 1.0} | change
    if isinstance(row["chosen"], list):
        row |= {"prompt": row["chosen"], "rejected": row["chosen"]}
    with pytest.raises(UserError, match=message):
        encode_pairs(
            trl_tools.tiny_tokenizer(),
            trl_tools.records([row]),
            name="training",
            max_length=20,
            margin=True,
        )


def test_rows_that_are_too_long_or_part_early(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = trl_tools.tiny_tokenizer(trl_tools.CHATML)
    rows = trl_tools.records(
        [
            {"prompt": "the", "chosen": " good", "rejected": " bad"},
            {"prompt": "the", "chosen": " good", "rejected": " bad" * 40},
        ]
    )
    with caplog.at_level("WARNING", "rlhf.stages"):
        kept = encode_preferences(
            tokenizer, rows, ("chosen", "rejected"), name="training", max_length=20
        )
    assert len(kept) == 1 and "1 of 2 rows" in caplog.text
    assert "stage.max_length=20" in caplog.text
    with pytest.raises(UserError, match=r"each of the 2 rows.*stage.max_length=3"):
        encode_preferences(tokenizer, rows, ("chosen", "rejected"), name="training", max_length=3)

    def turns(*texts: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user", "assistant"), texts, strict=False)
        ]

    chats = {"chosen": turns("a", "b", "c", "good"), "rejected": turns("a", "x", "c", "bad")}
    with pytest.raises(UserError, match=r"rows.jsonl, row 1: .* differ in their last message only"):
        encode_preferences(
            tokenizer,
            trl_tools.records([chats]),
            ("chosen", "rejected"),
            name="held-out",
            max_length=200,
        )
    chats["rejected"] = turns("a", "b", "c", "bad")
    encoded = encode_preferences(
        tokenizer,
        trl_tools.records([chats]),
        ("chosen", "rejected"),
        name="held-out",
        max_length=200,
    )[0]
    assert tokenizer.decode(encoded["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert encoded["rejected_ids"] == response_ids(tokenizer, "bad")
