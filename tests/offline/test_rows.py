"""Rows to the token ids that TRL's trainers read: what is left out, and what is refused."""

from typing import Any

import pytest
from datasets import Dataset

from rlhf.models.encoding import response_ids
from rlhf.offline.rows import EncodedPairs, encode_pairs, encode_preferences, padding_token
from rlhf.types import UserError
from tests.offline import trl_tools


def test_padding_token_avoids_the_data() -> None:
    tokenizer = trl_tools.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token

    def pairs(*ids: int) -> EncodedPairs:
        return EncodedPairs(
            Dataset.from_dict({"chosen_ids": [list(ids)], "rejected_ids": [[5]]}), [0]
        )

    last = len(tokenizer) - 1
    assert padding_token(tokenizer, pairs(7)) == tokenizer.unk_token
    assert padding_token(
        tokenizer, pairs(tokenizer.unk_token_id, last)
    ) == tokenizer.convert_ids_to_tokens(last - 1)
    with pytest.raises(UserError, match="every token"):
        padding_token(tokenizer, pairs(*range(len(tokenizer))))


def test_pairs_too_long_are_left_out_and_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = trl_tools.tiny_tokenizer()
    rows = Dataset.from_list(
        [
            {"prompt": "the film", "chosen": " good", "rejected": " bad"},
            {"prompt": "the", "chosen": " good" * 50, "rejected": " bad"},
        ]
    )
    with caplog.at_level("WARNING", "rlhf.stages"):
        pairs = encode_pairs(tokenizer, rows, name="training", max_length=20, margin=False)
    assert pairs.rows == [0] and "1 of 2 pairs are longer than" in caplog.text
    assert pairs.data[0]["chosen_ids"][-1] == tokenizer.eos_token_id
    with pytest.raises(UserError, match=r"each of the 2 pairs.*stage.max_length=3"):
        encode_pairs(tokenizer, rows, name="training", max_length=3, margin=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": float("nan")}, "pair 0: margin is nan"),
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
            Dataset.from_list([row]),
            name="training",
            max_length=20,
            margin=True,
        )


def test_rows_that_are_too_long_or_part_early(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = trl_tools.tiny_tokenizer(trl_tools.CHATML)
    rows = Dataset.from_list(
        [
            {"prompt": "the", "chosen": " good", "rejected": " bad"},
            {"prompt": "the", "chosen": " good", "rejected": " bad" * 40},
        ]
    )
    with caplog.at_level("WARNING", "rlhf.stages"):
        kept = encode_preferences(
            tokenizer, rows, ("chosen", "rejected"), name="training", max_length=20
        )
    assert len(kept) == 1 and "1 of 2 rows are longer than stage.max_length=20" in caplog.text
    with pytest.raises(UserError, match=r"each of the 2 rows.*stage.max_length=3"):
        encode_preferences(tokenizer, rows, ("chosen", "rejected"), name="training", max_length=3)

    def turns(*texts: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user", "assistant"), texts, strict=False)
        ]

    chats = {"chosen": turns("a", "b", "c", "good"), "rejected": turns("a", "x", "c", "bad")}
    with pytest.raises(UserError, match=r"held-out row 0: .* differ in their last message only"):
        encode_preferences(
            tokenizer,
            Dataset.from_list([chats]),
            ("chosen", "rejected"),
            name="held-out",
            max_length=200,
        )
    chats["rejected"] = turns("a", "b", "c", "bad")
    encoded = encode_preferences(
        tokenizer,
        Dataset.from_list([chats]),
        ("chosen", "rejected"),
        name="held-out",
        max_length=200,
    )[0]
    assert tokenizer.decode(encoded["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert encoded["rejected_ids"] == response_ids(tokenizer, "bad")
