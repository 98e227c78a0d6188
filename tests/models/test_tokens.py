"""Texts as token ids by the short way: always what the tokenizer's own call gives."""

from typing import Any

import pytest

from rlhf.models.turns import ids_of, is_blank, plain_ids, single_bos
from tests.models import families

TEXTS = ["the cat <|end|> sat", "", "  \n", "Größe <|user|>\U0001f642 it is so"]


class Shouting(type(families.made())):  # type: ignore[misc]
    """A tokenizer with a way of its own."""

    def _encode_plus(self, text: Any, **options: Any) -> Any:
        return super()._encode_plus(text.upper(), **options)


def own_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("state", ["plain", "shortened", "filled", "split", "spaced", "own"])
def test_the_short_way_gives_what_the_tokenizer_does(state: str) -> None:
    tokenizer = families.made(around="<|user|> $A", prefix_space=state == "spaced")
    core = tokenizer.backend_tokenizer
    if state == "shortened":
        core.enable_truncation(2)
    elif state == "filled":
        core.enable_padding(length=99)
    elif state == "split":
        tokenizer.split_special_tokens = True
    elif state == "own":
        tokenizer = Shouting(tokenizer_object=core)
    found = ids_of(tokenizer, TEXTS)
    assert found == [own_ids(tokenizer, text) for text in TEXTS]
    assert plain_ids(tokenizer, TEXTS[0]) == found[0]
    (end,) = families.ids(tokenizer, "<|end|>")
    assert (end in found[0]) is (state not in ("split", "own"))


def test_what_is_no_text_is_refused_as_by_the_tokenizer() -> None:
    tokenizer = families.made()
    with pytest.raises(ValueError, match="str"):
        plain_ids(tokenizer, 5)  # type: ignore[arg-type]


def test_blanks_and_first_tokens() -> None:
    tokenizer = families.made(("<s>", "</s>"), eos="</s>", bos="<s>")
    begin, end = families.ids(tokenizer, "<s>", "</s>")
    space, word = plain_ids(tokenizer, " ")[0], plain_ids(tokenizer, "x")[0]
    assert [is_blank(tokenizer, token) for token in (space, word, end)] == [True, False, False]
    assert single_bos(tokenizer, [begin, begin, word]) == [begin, word]
    assert single_bos(tokenizer, [word, word]) == [word, word]
