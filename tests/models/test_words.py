"""Texts put together from remembered words have the tokens of whole texts; texts rendered by our
call of a template are those of transformers' own.
"""

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from rlhf.models import templates, words
from rlhf.models.facts import tokenizer_state
from rlhf.models.templates import beginnings_rendered, rendered
from rlhf.models.turns import ids_of, text_of
from tests.models import families

GPT_2 = ByteLevel(add_prefix_space=False)
_TEXTS = [
    "the cat's sat on the mat and I'll look, it is 1234 o'clock.",
    "user assistant\n\nso!",
] * 9
# what a text is put together from: whatever may stand around a place where a word could begin
_PIECES = (
    *(" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0"),
    *("\u2003", "\u3000", "\u180e", "\u200b", "\ufeff", "\u2028", "\u0308", "\u0301"),
    *("the", "cat", "Cat", "it", "a", "e", "o", "s", "ll", "re", "\u00e9", "\u6587", "\u00df"),
    *("\u0416\u0436", "\u0905\u0902", "\U0001f600", "12", "7", "\u0663", "_", "'", "'s", "'LL"),
    *(".", ",", "!", "?", ")", '"', "/", "//", "-", "<", "[", "(", "|", "\u2026", "\x00"),
    *("<|im_start|>", "<|im_end|>\n", "<tool>", "assistant\n", "<|im_", "   "),
)


def cut_by(expression: str) -> Any:
    """A pre-tokenizer as Llama 3's and Qwen's."""
    split = Split(Regex(expression), "isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


def made(pre_tokenizer: Any = GPT_2, normalizer: Any = None, **model: Any) -> Any:
    core = Tokenizer(models.BPE(**model))
    core.pre_tokenizer, core.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXTS, trainer)
    core.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("   ", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


def texts(count: int) -> Iterator[str]:
    """Every two pieces around a place, and random texts."""
    for first, second in product(_PIECES, repeat=2):
        yield f"{first}{second}"
        yield f"the{first}{second}a,"
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(rng.choices(_PIECES, k=rng.randint(1, 40)))


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize(
    "pre_tokenizer", [GPT_2, *map(cut_by, sorted(words._EXPRESSIONS))], ids=range(5)
)
def test_words_have_the_tokens_of_whole_texts(pre_tokenizer: Any, normalizer: Any) -> None:
    core = made(pre_tokenizer, normalizer).backend_tokenizer
    assert words._begins_anew(core)
    found = words.Words(core)
    put_together = 0
    for text in texts(4000):
        put_together += len(words._WORDS.findall(text)) > 1
        expected = core.encode(text, add_special_tokens=False).ids
        assert found.ids_of(text) == expected, text
        assert found.ids_of(text) == expected, f"{text!r} with every word known"
        found.worth = True
    assert put_together > 4000 and len(found.known) > 1000


def test_words_that_are_all_new_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_TRIED", 100)
    core = made().backend_tokenizer
    same, new = words.Words(core), words.Words(core)
    for number in range(60):
        same.ids_of("the cat sat on the mat")
        text = " ".join(f"n{number}x{i}" for i in range(9))
        assert new.ids_of(text) == core.encode(text, add_special_tokens=False).ids
    assert same.worth and len(same.known) < 9
    assert not new.worth


def test_only_so_many_words_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST", 4)
    core = made().backend_tokenizer
    found = words.Words(core)
    for text in ("the cat sat on", "the cat sat by a mat", "so it is", "o" * 50 + " the cat"):
        assert found.ids_of(text) == core.encode(text, add_special_tokens=False).ids
    assert set(found.known) == {"the", " cat", " sat", " on"}


def refused() -> dict[str, Any]:
    """Tokenizers that may go on from one word to the next, or that begin a text otherwise."""
    blank, mixed, signed = made(), made(), made()
    blank.add_tokens([AddedToken("<x>", rstrip=True)])
    mixed.add_tokens(["New York"])
    signed.add_tokens(["Mr."])
    whole_words = made()
    whole_words.add_tokens([AddedToken("cat", single_word=True)])
    return {
        "strips": blank,
        "two words": mixed,
        "a sign": signed,
        "single word": whole_words,
        "space first": made(ByteLevel(add_prefix_space=True)),
        "no expression": made(ByteLevel(add_prefix_space=False, use_regex=False)),
        "another expression": made(cut_by(r"\w+ \w+|.")),
        "at random": made(dropout=0.5),
        "lower case": made(normalizer=normalizers.Lowercase()),
    }


@pytest.mark.parametrize("name", refused())
def test_other_tokenizers_get_whole_texts(name: str) -> None:
    tokenizer = refused()[name]
    assert words.words_of(tokenizer, tokenizer.backend_tokenizer) is None
    if name != "at random":
        text = "the cat New York Mr. cats <x> the"
        assert ids_of(tokenizer, [text])[0] == tokenizer(text, add_special_tokens=False).input_ids


def test_a_tokenizer_that_changes_forgets_its_words() -> None:
    tokenizer, text = made(), "the cat sat <|im_end|>"
    for change in (
        lambda: None,
        lambda: tokenizer.add_tokens(["sat on"]),
        lambda: setattr(tokenizer, "split_special_tokens", True),
        lambda: tokenizer.add_tokens(["cat sat"]),
    ):
        change()
        for _ in range(2):
            expected = tokenizer(text, add_special_tokens=False).input_ids
            assert ids_of(tokenizer, [text])[0] == expected


def test_encoded_rows_are_of_the_tokenizer_as_it_is() -> None:
    tokenizer, text = made(), "the cat sat"
    before = ids_of(tokenizer, [text])[0]
    assert tokenizer.convert_ids_to_tokens(before)[0] == "the"
    tokenizer.add_tokens(["the"])  # of its vocabulary: as many entries as before
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer_state(tokenizer)
    for given in (text, text.upper()):
        expected = tokenizer(given, add_special_tokens=False).input_ids
        assert ids_of(tokenizer, [given])[0] == expected


@pytest.mark.parametrize("cleans", [True, False])
def test_tokens_say_what_transformers_says(cleans: bool) -> None:
    class Own(PreTrainedTokenizerFast):
        def _decode(self, token_ids: Any, *_: Any, **__: Any) -> str:
            return f"{len(token_ids)} tokens"

    tokenizer = made()
    tokenizer.clean_up_tokenization_spaces = cleans
    for text in ("the cat , sat <|im_end|>", "\u00e9\u6587 ", ""):
        ids = ids_of(tokenizer, [text])[0]
        assert text_of(tokenizer, ids) == tokenizer.decode(ids)
        assert text_of(tokenizer, ids[:-1]) == tokenizer.decode(ids[:-1])
    assert text_of(Own(tokenizer_object=made().backend_tokenizer), [5, 6]) == "2 tokens"


CHAT: list[Any] = [
    {"role": "user", "content": "Is it <so>? \u00e9"},
    {"role": "assistant", "content": " Yes. ", "reasoning_content": "Well."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "No."},
]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("name", [*templates.NAMES, "THINKING", "PHI", "GEMMA"])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_texts_are_those_of_transformers(name: str, tools: Any, generation_prompt: bool) -> None:
    tokenizer = families.made(bos="<|system|>")
    tokenizer.chat_template = getattr(families, name, None) or templates.template_text(name)
    stops, asked = (1, 2, 4), {"generation_prompt": generation_prompt, "tools": tools}
    expected = [
        tokenizer.apply_chat_template(
            templates.as_template_reads(tokenizer, CHAT[:stop]),
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        for stop in stops
    ]
    assert beginnings_rendered(tokenizer, CHAT, stops, **asked) == expected
    assert rendered(tokenizer, CHAT, **asked) == expected[-1]


def test_a_tokenizer_with_a_rendering_of_its_own_is_asked() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation: Any, **_: Any) -> Any:
            return f"{len(conversation)} messages"

    tokenizer = Own(tokenizer_object=made().backend_tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert rendered(tokenizer, CHAT, generation_prompt=True) == "4 messages"
    several = beginnings_rendered(tokenizer, CHAT, (1, 3), generation_prompt=True)
    assert several == ["1 messages", "3 messages"]
