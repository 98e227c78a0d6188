"""Steps repair, language, length, quality, tfidf, perplexity and patterns."""

# ruff: noqa: RUF001 - texts in other scripts are meant

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conf.preparation.cleaning import Personal, Quality, Repair
from rlhf.data.formats import Use
from rlhf.data.prepare import cleaning, languages, personal, quality
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.texts import imitated, sides
from rlhf.data.prepare.words import (
    counted,
    lettered,
    letters,
    spaced_words,
    symbol_share,
    symbols,
    words,
)
from rlhf.types import UserError
from tests.data.preparation import apply, judged, numbers, pairs, sft

# ---- repair ----


def repaired(text: str, *, touching: bool = False, **options: bool) -> str:
    return cleaning.repaired(text, Repair(**options), touching=touching)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("âœ” done", "✔ done"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("bell\x07 rings", "bell rings"),
        ("\ud83d\ude00", "😀"),  # two surrogates for one character
        ("e\u0301", "é"),
        ("two  spaces \t here", "two spaces here"),
        ("line  \nnext\n\n\n\nlast  ", "line\nnext\n\nlast"),
        ("no\u00a0break\u200b", "no break"),
        ("\u200bខ្ញុំ\u200bអាន\u200b ok\u200bay", "ខ្ញុំ\u200bអាន okay"),  # parts words in Khmer
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("“quoted” — ‘so’", "“quoted” — ‘so’"),
        ("你好，世界！「引用」", "你好，世界！「引用」"),
        (
            "x = 1\n```py\na  =  1   \n\n\n\nb\n```\nend  ",
            "x = 1\n```py\na  =  1   \n\n\n\nb\n```\nend",
        ),
        ("👨‍👩‍👧 می‌خواهم", "👨‍👩‍👧 می‌خواهم"),  # joiners mean something
        ("10³ Ｆｕｌｌ", "10³ Ｆｕｌｌ"),
        ("&lt;b&gt; &amp; <b>bold</b>", "&lt;b&gt; &amp; <b>bold</b>"),
    ],
)
def test_repair(before: str, after: str) -> None:
    assert repaired(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<p>One &amp; two</p><p>three<br/>four</p>", "One & two\n\nthree\nfour"),
        ("a <b>bold</b> <a href='x'>link</a>", "a bold link"),
        ("<!-- gone --><script>alert(1)</script>kept", "kept"),
        ("List<T> x; a < b && c > d", "List<T> x; a < b && c > d"),
        ("&#39;quoted&#39; &hellip;", "'quoted' …"),
        ("```html\n<b>code</b>\n```", "```html\n<b>code</b>\n```"),
    ],
)
def test_repair_of_html(before: str, after: str) -> None:
    assert repaired(before, html=True) == after


def test_nfkc_is_an_option_with_its_price() -> None:
    assert repaired("10³ Ｆｕｌｌ，ﬁ", nfkc=True) == "103 Full,fi"
    assert repaired("10³ Ｆｕｌｌ", nfkc=True, encoding=False) == "103 Full"


def test_where_prompt_and_answer_touch_nothing_is_stripped() -> None:
    kept, _, _ = apply([Item({"prompt": "Sky  is ", "completion": " blue \n"}, "f", 1)], "repair")
    assert kept[0].columns == {"prompt": "Sky is ", "completion": " blue \n"}
    chat = [
        {"role": "user", "content": "  Hi  there "},
        {"role": "assistant", "content": "\nHello\n"},
    ]
    kept, _, _ = apply([Item({"messages": chat}, "f", 1)], "repair")
    assert [m["content"] for m in kept[0].columns["messages"]] == ["Hi there", "Hello"]


def test_repair_rejects_what_it_empties_and_counts_what_it_changes() -> None:
    rows = pairs(("q", "a\u200b", "a"), ("q", "schÃ¶n", "b"), ("q", "x", "y"))
    kept, reasons, report = apply(rows, "repair", Use.preference)
    assert numbers(kept) == [2, 3] and reasons == {
        1: "keys 'chosen' and 'rejected' have become the same after the repair"
    }
    assert report.figures == {"changed": 1}
    _, reasons, _ = apply(sft("<br>", "text"), "repair", html=True)
    assert reasons == {1: "nothing is left of key 'text' after the repair"}


@settings(deadline=None, max_examples=300)
@example("\u00a0\u00dc\u0086", False, False)  # ftfy reads it otherwise without the blank
@given(st.text(), st.booleans(), st.booleans())
def test_repair_leaves_nothing_to_repair(text: str, touching: bool, nfkc: bool) -> None:
    once = repaired(text, touching=touching, nfkc=nfkc)
    assert repaired(once, touching=touching, nfkc=nfkc) == once
    once.encode("utf-8")  # no lone surrogate is left


# ---- language and length ----

ENGLISH = "The weather was fine yesterday and the children played in the garden until it got dark."
GERMAN = "Das Wetter war gestern schön und die Kinder spielten im Garten, bis es dunkel wurde."
CHINESE = "昨天天气很好，孩子们在花园里一直玩到天黑。"


def test_language_keeps_what_is_asked_for_and_counts_short_texts() -> None:
    kept, reasons, report = apply(sft(ENGLISH, GERMAN, CHINESE, "ok"), "language")
    assert numbers(kept) == [1, 4] and set(reasons) == {2, 3}
    assert reasons[2].startswith("row: language de (probability") and reasons[3].startswith(
        "row: language zh"
    )
    assert report.figures == {
        "languages": {"en": 1, "de": 1, "zh": 1},
        "short_texts_kept": 1,
        "undecided_texts_kept": 0,
    }
    kept, _, _ = apply(sft(ENGLISH, GERMAN, CHINESE), "language", keep=["de", "zh"])
    assert numbers(kept) == [2, 3]


def test_language_of_one_part_and_undecided_texts() -> None:
    rows = pairs((ENGLISH, GERMAN, GERMAN), (GERMAN, ENGLISH, ENGLISH), (GERMAN, ENGLISH, GERMAN))
    assert numbers(apply(rows, "language", Use.preference, part="answer")[0]) == [2], (
        "each answer has to be in the language"
    )
    assert numbers(apply(rows, "language", Use.preference, part="prompt")[0]) == [1]
    # digits and symbols tell nothing, and words of two languages little
    mixed = "wohin nobody geht today? vielleicht maybe"
    rows = sft("12345 67890 12345 67890 +++", mixed)
    kept, _, report = apply(rows, "language", keep=["fr"], min_probability=0.99)
    assert numbers(kept) == [1, 2]
    assert report.figures["short_texts_kept"] == report.figures["undecided_texts_kept"] == 1
    rows = sft("12345 67890 12345 67890 +++", mixed)
    kept, reasons, _ = apply(
        rows, "language", keep=["fr"], min_probability=0.99, keep_undecided=False
    )
    assert numbers(kept) == [1] and "language undecided" in reasons[2]


def test_languages_that_are_not_told_apart_count_as_one() -> None:
    wu = "搿个物事侪是伊拉屋里向个，阿拉勿晓得伊几时会得转来，侬去问问看好伐？"
    croatian = "Jučer je bilo lijepo vrijeme i djeca su se igrala u vrtu dok se nije smračilo."
    bokmal = "Været var fint i går, og barna lekte i hagen helt til det ble mørkt."
    rows = (wu, croatian, bokmal, GERMAN)
    kept, reasons, _ = apply(sft(*rows), "language", keep=["zh", "sr", "nb"])
    assert numbers(kept) == [1, 2, 3] and set(reasons) == {4}
    kept, _, _ = apply(sft(*rows), "language", keep=["zh", "sr", "de"], variants=False)
    assert numbers(kept) == [4]


def test_texts_together_are_identified_as_each_by_itself() -> None:
    texts = [ENGLISH, "", GERMAN * 9, CHINESE, "LOUD ENGLISH", "12", "ลมฟ้าอากาศเมื่อวานนี้ดีมาก" * 5]
    alone = [languages.identifier().classify(text) for text in texts]
    together = languages.identify(texts, grouped=False)
    assert [found.code for found in together] == [code for code, _ in alone]
    assert [found.probability for found in together] == pytest.approx([p for _, p in alone], 1e-4)


def test_no_state_of_the_language_model_is_deeper_than_what_a_segment_looks_back() -> None:
    model = languages._model()
    known = np.zeros(len(model.rows), dtype=bool)
    front, depth = np.array([0]), 0
    while len(front):
        known[front] = True
        after = np.unique(model.moves[(model.rows[front][:, None] + np.arange(256)).ravel()])
        front, depth = after[~known[after]], depth + 1
    assert known.all() and depth - 1 <= languages._BEFORE


def test_an_unknown_language_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"keep=eng: .*nearest: 'en'"):
        apply(sft(ENGLISH), "language", keep=["eng"])


def test_length_in_characters_words_and_tokens(tiny_model: Callable[..., Path]) -> None:
    rows = sft("one", "one two three", "昨天天气")
    assert numbers(apply(rows, "length", low=4)[0]) == [2, 3]
    kept, reasons, _ = apply(rows, "length", low=2, high=3, unit="words")
    assert numbers(kept) == [2] and reasons == {
        1: "row: 1 words, expected at least 2",
        3: "row: 4 words, expected at most 3",
    }
    from transformers import AutoTokenizer

    place = tiny_model()
    count = len(
        AutoTokenizer.from_pretrained(place)("one two three", add_special_tokens=False)["input_ids"]
    )
    assert numbers(
        apply(rows, "length", low=count, high=count, unit="tokens", tokenizer=str(place))[0]
    ) == [2]
    with pytest.raises(UserError, match=r"expected a directory with tokenizer\.json"):
        apply(rows, "length", low=1, unit="tokens", tokenizer=str(place.parent))


def test_length_of_answers_looks_at_each_side() -> None:
    rows = pairs(("a long prompt", "ab", "abcdef"), ("p", "abc", "abcd"))
    kept, reasons, _ = apply(rows, "length", Use.preference, high=4, part="answer")
    assert numbers(kept) == [2] and reasons == {1: "rejected: 6 characters, expected at most 4"}


# ---- words ----


def test_words_of_any_script() -> None:
    assert words("Don't stop: e-mail me, 3 times!") == [
        "Don't",
        "stop",
        "e-mail",
        "me",
        "3",
        "times",
    ]
    assert words("我爱NLP very much") == ["我", "爱", "NLP", "very", "much"]
    assert spaced_words("我爱NLP very") == ["NLP", "very"]
    assert words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]
    assert symbols("a-b (c) é 你好!") == 4
    # beyond the basic plane, where another pattern looks
    assert words("𠀀好 𝒳-ray 😀 déjà") == ["𠀀", "好", "𝒳-ray", "déjà"] and symbols("😀a") == 1


def test_how_many_words_a_text_has_in_any_script() -> None:
    assert counted("one two-fold 3").number == 3
    # 8 Chinese characters are 5 words, so three neighbouring words are 5 characters
    chinese = counted("今天天气非常好啊")
    assert chinese.number == 5 and chinese.span(3) == 5
    assert counted("one two").span(3) == 3
    mixed = counted("我爱NLP very much")
    assert mixed.number == 2 / 1.6 + 3
    assert letters("ab c3!") == 3 and letters("天天") == 2 * 5 / 1.6 and letters("नमस्ते 42") == 4


# ---- quality ----


def judge(text: str, **options: object) -> str | None:
    return quality.verdict(text, Quality(min_words=1, **options))  # type: ignore[arg-type]


def top_ngram(tokens: list[str], n: int) -> float:
    return quality.top_ngram(tokens, quality.repeats(tokens, n))


def duplicate_ngrams(tokens: list[str], n: int) -> float:
    return quality.duplicate_ngrams(tokens, quality.repeats(tokens, n))


@given(st.lists(st.sampled_from("ab c"), max_size=30), st.integers(1, 5), st.integers(0, 3))
def test_repeats_are_among_the_repeats_of_shorter_ngrams(
    tokens: list[str], n: int, more: int
) -> None:
    every = quality.repeats(tokens, n + more)
    assert quality.repeats(tokens, n + more, quality.repeats(tokens, n)) == every
    grams = [tuple(tokens[at : at + n + more]) for at in range(len(tokens) - n - more + 1)]
    assert every == [(at, gram) for at, gram in enumerate(grams) if grams.count(gram) > 1]


@given(st.text(st.characters(max_codepoint=127)))
def test_an_ascii_text_is_counted_as_any_other(text: str) -> None:
    beside = text + " é"  # a word of its own, of one letter
    visible = len("".join(text.split()))
    assert symbols(beside) == round(symbol_share(text, words(text)) * max(1, visible))
    assert letters(beside) == letters(text) + 1
    assert words(beside) == [*words(text), "é"]


def test_repetition_ratios_by_hand() -> None:
    assert quality.repeated(["a", "bb", "a", "a"]) == (2 / 4, 2 / 5)
    # "a b" twice: 2 x 2 characters of the 5 in a b a b c
    assert top_ngram(["a", "b", "a", "b", "c"], 2) == 4 / 5
    assert top_ngram(["a", "b", "c"], 2) == 0.0
    # the second "a b c" stands before: its 3 + 3 characters of 14
    assert duplicate_ngrams(["aa", "b", "c", "dddddd", "aa", "b", "c"], 3) == 4 / 14
    # overlapping repeats count a character once: of a a a a a the words 2 to 5 lie in a repeated
    # pair
    assert duplicate_ngrams(["a"] * 5, 2) == 4 / 5
    assert duplicate_ngrams([], 2) == 0.0


def test_symbol_ratios_by_hand() -> None:
    assert quality.symbol_words("# one #2 ... two…", 2) == 3 / 2, "the first begins a line"
    assert quality.symbol_words("sum\n#### 72\n## end", 3) == 0.0
    for text, share in (("one 2 three 4", 0.5), ("1. 好好学习\n2. 天天向上", 8 / 10)):
        assert quality.alphabetic_words(words(text), lettered(words(text))) == share
    assert symbol_share("a+b ==", words("a+b ==")) == 3 / 5
    # marks and numbers are no letters of a word
    assert quality.word_length(["ab", "நல்ல", "好"]) == ((2 + 3) / 2, 2)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("@@@ ### $$$ %%%", "share of symbols 1.00, expected at most 0.7"),
        ("one # two # three # four", "hash signs and ellipses per word"),
        ("12 34 56 seven 8 9 10", "share of words with a letter 0.14, expected at least 0.25"),
        (
            "one...\ntwo...\nhere are many more words in one line, so that the ellipses among "
            "all of them together are rather few",
            "share of lines that end with an ellipsis",
        ),
        ("same line\nother words\nsame line\nsame line", "share of repeated lines 0.50"),
        ("a b c d e f g h", "mean word length 1.00, expected at least 2"),
        ("antidisestablishmentarianism floccinaucinihilipilification", "mean word length"),
        ("the best film " * 20, "share of the commonest 2-gram"),
        ("最好的电影" * 20, "share of the commonest"),
        ("ดีที่สุดเลยครับ" * 20, "share of the commonest"),
        ("아주 좋은 영화였어요 " * 20, "share of the commonest"),
    ],
)
def test_each_rule_of_quality_finds_its_defect(text: str, rule: str) -> None:
    assert rule in (judge(text) or "")


def test_good_prose_of_any_script_passes_and_short_answers_are_left_alone() -> None:
    prose = (
        ENGLISH
        + "\n\nLater they had supper together, and nobody wanted to go to bed before the last "
        "story was told."
    )
    assert judge(prose) is None
    assert judge(CHINESE * 1) is None
    assert numbers(
        apply(
            sft("42", "yes yes yes", "# Title", r"$\frac{1}{2}$", "x^2 + 2*x - 3 = 0"), "quality"
        )[0]
    ) == [1, 2, 3, 4, 5]


def test_variables_beside_a_script_without_spaces_are_no_short_words() -> None:
    formulas = "设 x + y = z 且 y + z = u，把 x 代入后面的方程，得到 z - x = y 以及 u - z = y。" * 4
    options = {"max_top_ngrams": [], "max_duplicate_ngrams": [], "max_duplicate_lines": None}
    assert judge(formulas, **options) is None
    assert "mean word length" in (judge("x y z u v w " * 9, **options) or "")


def test_a_rule_that_is_null_is_off() -> None:
    bullets = "- one thing\n- two others\n- three of them"
    assert judge(bullets) is None
    assert "share of bullet lines 1.00" in (judge(bullets, max_bullet_lines=0.9) or "")
    assert judge(LOOP, max_top_ngrams=[], max_duplicate_ngrams=[]) is None


LOOP = "the best film ever " * 20


def test_quality_looks_at_what_is_to_be_imitated() -> None:
    kept, reasons, _ = apply(
        pairs(("q", ENGLISH, LOOP), ("q", LOOP, ENGLISH)), "quality", Use.preference
    )
    assert numbers(kept) == [1] and reasons[2].startswith("chosen: share of the commonest")
    assert numbers(
        apply(judged(("q", LOOP, False), ("q", LOOP, True)), "quality", Use.unpaired)[0]
    ) == [1]


# ---- tfidf ----


def test_tfidf_scores_equal_the_definition_by_hand() -> None:
    scores = quality.tfidf_scores(["a b", "a a c", ""])
    one, rare = math.log(4 / 3) + 1, math.log(4 / 2) + 1  # in two of three texts, in one
    assert scores.tolist() == pytest.approx([(one + rare) / 2, (2 * one + rare) / 3, 0.0])


def test_tfidf_drops_the_extremes_in_order_and_writes_its_column() -> None:
    common = [
        f"the film was good and the music was good {word}"
        for word in ("today", "again", "there", "always", "indeed", "truly")
    ]
    rows = sft("the the the", *common, "zyx wvu tsr qpo")
    kept, reasons, report = apply(rows, "tfidf", low_share=0.13, high_share=0.13, column="score")
    assert (
        set(reasons) == {1, 8}
        and "among the lowest 1 of 8" in reasons[1]
        and "among the highest 1 of 8" in reasons[8]
    )
    assert (
        all(isinstance(item.columns["score"], float) for item in kept)
        and report.figures["lowest"] < report.figures["highest"]
    )
    assert numbers(apply(sft("", "..."), "tfidf", low_share=0, high_share=0)[0]) == [1, 2]


@given(st.lists(st.floats(-5, 5), max_size=30), st.floats(0, 0.49), st.floats(0, 0.49))
def test_extremes_take_their_shares(scores: list[float], low: float, high: float) -> None:
    reasons = quality.extremes("x", scores, low=None, high=None, low_share=low, high_share=high)
    out = [s for s, reason in zip(scores, reasons, strict=True) if reason is not None]
    kept = [s for s, reason in zip(scores, reasons, strict=True) if reason is None]
    assert len(out) == int(low * len(scores)) + int(high * len(scores))
    lowest = [s for s, reason in zip(scores, reasons, strict=True) if reason and "lowest" in reason]
    assert all(a <= b for a in lowest for b in kept)


# ---- perplexity ----


def test_perplexity_is_that_of_the_model_whatever_the_batch(
    tiny_model: Callable[..., Path],
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tiny_model()
    texts = ["the quick brown fox", "dog dog dog dog dog dog dog dog", "the", "lazy fox jumps over"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(place),
        AutoTokenizer.from_pretrained(place),
    )
    expected = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected.append(
            math.exp(model(input_ids=ids, labels=ids).loss.item()) if ids.shape[1] > 1 else None
        )
    for budget in (64, 4096):
        kept, _, _ = apply(
            sft(*texts),
            "perplexity",
            model=str(place),
            column="ppl",
            max_tokens=64,
            batch_tokens=budget,
        )
        found = [item.columns.get("ppl") for item in kept]
        assert [f is None for f in found] == [e is None for e in expected]
        assert [f for f in found if f is not None] == pytest.approx(
            [e for e in expected if e is not None], rel=1e-4
        )


def test_perplexity_leaves_out_by_threshold_and_by_rank(tiny_model: Callable[..., Path]) -> None:
    rows = sft("the quick brown fox", "xq zj kv wp", "over the lazy dog")
    scored, _, _ = apply(
        deepcopy(rows), "perplexity", model=str(tiny_model()), column="ppl", max_tokens=64
    )
    values = [item.columns["ppl"] for item in scored]
    worst = values.index(max(values)) + 1
    middle = sorted(values)[1]
    _, reasons, _ = apply(
        deepcopy(rows), "perplexity", model=str(tiny_model()), high=middle + 1e-3, max_tokens=64
    )
    assert set(reasons) == {worst} and "expected at most" in reasons[worst]
    _, reasons, _ = apply(
        deepcopy(rows), "perplexity", model=str(tiny_model()), high_share=0.34, max_tokens=64
    )
    assert set(reasons) == {worst}
    with pytest.raises(UserError, match=r"step perplexity: model=.*is not a model directory"):
        apply(rows, "perplexity", model=str(tiny_model().parent), high=5.0)


# ---- patterns ----


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to jane.doe+list@mail.example.co.uk.", "write to [EMAIL]."),
        ("联系foo@bar.com谢谢", "联系[EMAIL]谢谢"),
        ("call +44 20 7946 0958 now", "call [PHONE] now"),
        ("call (212) 555-0123 or 212-555-0123", "call [PHONE] or [PHONE]"),
        ("手机13800138000，谢谢", "手机[PHONE]，谢谢"),
        ("server 192.168.0.1:80 is down", "server [IP]:80 is down"),
        ("at 2001:db8::ff00:42:8329 or ::1", "at [IP] or [IP]"),
        ("card 4111 1111 1111 1111 ok", "card [CREDIT_CARD] ok"),
        ("pay to DE89 3704 0044 0532 0130 00.", "pay to [IBAN]."),
        ("GB82WEST12345698765432", "[IBAN]"),
        # the second stands alone once the first is gone
        ("+1 212 555 0123+1 212 555 01231", "[PHONE][PHONE]"),
    ],
)
def test_personal_data_is_found(text: str, redacted: str) -> None:
    assert personal.redacted(text, list(personal.KNOWN.values()))[0] == redacted


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # Luhn's digit is wrong
        "DE89 3704 0044 0532 0130 02",  # 97 leaves another remainder
        "version 1.2.3.400, at 12:30:45",
        "pi is 3.14159265358979, 12345678 people, 2024-01-15",
        "a@b, @user, user@host",
        "1 + 2 = 3; x = 1234567890123",
        "ISBN 978-3-16-148410-0",
        "10.1000/182",
        "half = rows[::2]; corner = grid[:, ::2]",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert personal.redacted(text, list(personal.KNOWN.values()))[0] == text


def test_luhn_and_iban_by_hand() -> None:
    assert personal.luhn("79927398713") and not personal.luhn("79927398710")
    assert personal.is_iban("GB82 WEST 1234 5698 7654 32") and not personal.is_iban(
        "GB82 TEST 1234 5698 7654 32"
    )


def test_patterns_redact_or_reject(tmp_path: Path) -> None:
    listed = tmp_path / "words.txt"
    listed.write_text("# comment\ndarn\nbad  phrase\n笨蛋\nโง่\n", encoding="utf-8")
    rows = sft("mail a@b.org", "Darn it", "a bad\nphrase", "darning socks", "你这个笨蛋啊", "clean")
    kept, reasons, report = apply(deepcopy(rows), "patterns", words=str(listed))
    assert numbers(kept) == [1, 4, 6] and kept[0].columns["text"] == "mail [EMAIL]"
    assert reasons == {2: "holds word", 3: "holds word", 5: "holds word"} and report.figures == {
        "word": 3,
        "email": 1,
    }
    kept, reasons, _ = apply(
        deepcopy(rows), "patterns", found="reject", words=str(listed), words_found="redact"
    )
    assert reasons == {1: "holds email"} and [item.columns["text"] for item in kept][:2] == [
        "[WORD] it",
        "a [WORD]",
    ]
    assert numbers(apply(deepcopy(rows), "patterns", find=["ip"])[0]) == [1, 2, 3, 4, 5, 6]
    listed.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"words.*{listed.name}"):
        apply(rows, "patterns", words=str(listed))


def test_a_pair_that_differs_only_in_what_is_redacted_goes() -> None:
    _, reasons, _ = apply(
        pairs(("q", "write a@b.org", "write c@d.org")), "patterns", Use.preference
    )
    assert reasons == {1: "keys 'chosen' and 'rejected' have become the same after redaction"}


PIECES = [
    "a@b.org",
    "4111 1111 1111 1111",
    "DE89370400440532013000",
    "10.0.0.1",
    "+1 212 555 0123",
    " ",
    "x",
    ",",
    "1",
    "[EMAIL]",
    "你",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_after_redaction_nothing_is_found(text: str) -> None:
    marks = list(personal.KNOWN.values())
    once, counts = personal.redacted(text, marks)
    assert personal.redacted(once, marks) == (once, {})
    assert sum(counts.values()) == sum(
        once.count(pattern.mark()) for pattern in marks
    ) - text.count("[EMAIL]")


def test_every_kind_of_personal_data_has_a_pattern() -> None:
    assert set(personal.KNOWN) == set(Personal)


# ---- which texts ----


def test_sides_tell_a_swapped_pair_and_another_judgement_apart() -> None:
    from conf.preparation.base import Part

    pair = pairs(("q", "a", "b"))[0].columns
    assert sides(pair, Part.whole, Use.preference) == ("q\na", "b")
    assert sides(pair, Part.answer, Use.preference) == ("a", "b")
    assert sides(pair, Part.prompt, Use.preference) == ("q", "")
    good, bad = (judged(("q", "a", label))[0].columns for label in (True, False))
    assert sides(good, Part.whole, Use.unpaired) == ("q\na", "") and sides(
        bad, Part.whole, Use.unpaired
    ) == ("q", "a")
    assert sides(bad, Part.answer, Use.unpaired) == ("", "a")
    assert sides({"text": "t"}, Part.answer, Use.sft) == ("t", "")
    assert imitated(bad, Part.answer, Use.unpaired) == {} and imitated(
        pair, Part.whole, Use.preference
    ) == {"row": "q\na"}
