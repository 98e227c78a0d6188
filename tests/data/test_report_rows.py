"""Duplicates, leakage, pairs and lengths of the data report, on rows by hand."""

# ruff: noqa: RUF001 - full-width signs of Chinese texts
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.report.duplicates import asked, duplicates, leakage, whole
from rlhf.data.report.lengths import lengths, row_length
from rlhf.data.report.pairs import contradicting, judged, length_preference, pairs
from rlhf.data.report.records import Section, Settings, Severity
from rlhf.data.report.texts import entropy, excerpt, quantile, safe, wilson, words
from tests.data.report_rows import (
    LONG,
    PREFERENCE,
    SFT,
    UNPAIRED,
    chat,
    checks,
    found,
    items,
    pair_rows,
    rows_of,
    texts,
)
from tests.offline.trl_tools import CHATML, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(CHATML)


# ---- texts ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The film isn't well-made!", ["the", "film", "isn't", "well-made"]),
        ("我喜欢 this 电影。", ["我", "喜", "欢", "this", "电", "影"]),
        ("Привет, мир 42", ["привет", "мир", "42"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("  ...  ", []),
    ],
)
def test_words_of_several_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_safe_text_has_one_line_and_nothing_that_moves_a_screen() -> None:
    assert safe("a\n b\x1b[31m\u202ec\ud800") == "a b\ufffd[31m\ufffdc\ufffd"


def test_excerpts_are_cut_and_say_so() -> None:
    assert excerpt("short") == "short"
    assert excerpt("x" * 161) == "x" * 159 + "…"
    assert excerpt("x y" + " " * 1000 + "z", 4) == "x y…"


def test_statistics_against_known_values() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5 and quantile([7.0], 0.95) == 7.0
    low, high = wilson(8, 10)  # Agresti and Coull 1998, Table 1: 8 of 10
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert (
        entropy([5, 5]) == pytest.approx(math.log(2))
        and entropy([3, 0]) == 0.0
        and entropy([]) == 0.0
    )
    with pytest.raises(ValueError, match="at least one value"):
        quantile([], 0.5)


# ---- duplicates ----


def repeats(rows: list[Item], settings_: Settings) -> Section:
    return duplicates(whole(rows, settings_), settings_, "train")


def leaks(train: list[Item], held: list[Item], settings_: Settings) -> Section:
    rows = [*train, *held]
    return leakage(whole(rows, settings_), asked(rows, settings_), settings_)


def test_exact_duplicates_are_the_rows_that_repeat_an_earlier_one() -> None:
    section = repeats(texts("A  film.", "other", "a film.", "ａ film.", "", ""), SFT)
    assert rows_of(section, "exact_duplicates") == [3, 4]
    assert found(section, "exact_duplicates").rows[1].note == "the same as a.jsonl, row 1"
    assert section.figures["exact"] == 2 and section.figures["near"] == 0


def test_rows_of_several_annotators_are_no_duplicates() -> None:
    rows = items(
        *(
            {"prompt": "p", "completion": "c", "label": label, "annotator": name}
            for name, label in (("x", 1), ("y", 1), ("x", 1), ("x", 0))
        )
    )
    assert rows_of(repeats(rows, UNPAIRED), "exact_duplicates") == [3]
    assert rows_of(repeats(rows, UNPAIRED), "near_duplicates") == []


def test_a_row_that_balancing_drew_again_is_no_duplicate() -> None:
    rows = texts("one", "two", "one")
    assert rows_of(repeats([*rows, rows[1], rows[1]], SFT), "exact_duplicates") == [3]


def test_near_duplicates_leave_out_the_first_of_each_cluster() -> None:
    swapped = LONG.replace("seven", "eight")
    section = repeats(
        texts("something else entirely stands here", LONG, swapped, LONG + " today", LONG), SFT
    )
    assert rows_of(section, "near_duplicates") == [3, 4] and rows_of(
        section, "exact_duplicates"
    ) == [5]

    assert (
        found(section, "near_duplicates").rows[0].note
        == "nearly the same as a.jsonl, row 2 (cluster of 3)"
    )


def test_a_pair_with_its_sides_exchanged_is_no_near_duplicate() -> None:
    other = " ".join(reversed(LONG.split()))
    assert checks(repeats(pair_rows((LONG, other), (other, LONG)), PREFERENCE)) == []
    near_copy = (LONG.replace("seven", "eight"), other)
    assert rows_of(repeats(pair_rows((LONG, other), near_copy), PREFERENCE), "near_duplicates") == [
        2
    ]


def test_chinese_near_duplicates() -> None:
    text = (
        "这部电影的故事非常感人，演员的表演也很自然，"
        "我会推荐给所有的朋友们去看一看，"
        "因为它让我想起了小时候和家人一起度过的那些快乐时光"
    )
    assert rows_of(
        repeats(texts(text, text.replace("小时候", "小时侯"), "天气很好我们去公园散步吧"), SFT),
        "near_duplicates",
    ) == [2]


def test_what_connects_two_splits_is_no_duplicate_in_either() -> None:
    rows = [*texts(LONG), *texts(LONG.replace("seven", "eight"), split="eval")]
    compared = whole(rows, SFT)
    assert (
        checks(duplicates(compared, SFT, "train"))
        == []
        == checks(duplicates(compared, SFT, "eval"))
    )
    assert compared.clusters[0] == compared.clusters[1]


# ---- leakage ----


def test_leakage_of_rows_exact_and_near() -> None:
    train = texts(LONG, "a film about nothing", "a third row here")
    held = texts(
        "A film about  nothing",
        LONG.replace("seven", "eight"),
        "a row of its own",
        origin="b.jsonl",
        split="eval",
    )
    section = leaks(train, held, SFT)
    assert rows_of(section, "row_leakage_exact") == [1] and rows_of(
        section, "row_leakage_near"
    ) == [2]
    exact = found(section, "row_leakage_exact")
    assert (
        exact.severity is Severity.fail
        and exact.rows[0].file == "b.jsonl"
        and exact.rows[0].note == "the same row as a.jsonl, row 2"
    )
    assert section.figures["prompt_exact"] is None


def test_leakage_of_prompts_beside_rows() -> None:
    train = items(
        {"prompt": "what is it", "completion": "yes"}, {"prompt": LONG, "completion": "no"}
    )
    held = items(
        {"prompt": "What is it", "completion": "another answer"},
        {
            "prompt": LONG.replace("seven", "eight"),
            "completion": "quite another answer of many words that no training row has "
            "at all in it",
        },
        {"prompt": "why", "completion": "because"},
        split="eval",
    )
    section = leaks(train, held, SFT)
    assert rows_of(section, "row_leakage_exact") == [] and rows_of(
        section, "prompt_leakage_exact"
    ) == [1]
    assert rows_of(section, "prompt_leakage_near") == [2]


def test_one_instruction_for_all_rows_leaks_nothing() -> None:
    train, held = (
        items({"prompt": "Sum up.", "completion": "a"}),
        items({"prompt": "Sum up.", "completion": "b"}, split="eval"),
    )
    assert (
        checks(leaks(train, held, SFT)) == []
        and leaks(train, held, SFT).figures["prompt_exact"] is None
    )


def test_leakage_needs_both_splits() -> None:
    assert leaks(texts("a"), [], SFT).unmeasured == "there are no held-out rows"


# ---- pairs ----


def test_equal_sides_and_contradictions() -> None:
    section = pairs(
        pair_rows(("a", "b"), ("x", "X "), ("c", "d"), ("B", "a"), ("a", "b"), ("a", "c")),
        PREFERENCE,
    )
    assert rows_of(section, "equal_sides") == [2]
    assert rows_of(section, "contradictions") == [1, 4, 5]
    notes = [r.note for r in found(section, "contradictions").rows]
    assert notes == [
        f"a.jsonl, row {n} judges the same two answers the other way" for n in (4, 1, 4)
    ]


def test_another_prompt_is_another_pair() -> None:
    rows = items(
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
    )
    assert contradicting(rows) == []
    rows[1].columns["prompt"] = "P"
    assert contradicting(rows) == [(0, 1), (1, 0)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), max_size=15))
def test_contradictions_are_those_that_a_plain_search_finds(sides: list[tuple[str, str]]) -> None:
    expected = {i for i, (a, b) in enumerate(sides) if a != b and (b, a) in sides}
    assert {i for i, _ in contradicting(pair_rows(*sides))} == expected


def test_length_preference_by_hand() -> None:
    share, low, high, correlation = length_preference([3.0, 1.0, -2.0, 0.0])
    assert share == pytest.approx(2 / 3) and (low, high) == wilson(2, 3)
    assert correlation == pytest.approx(0.5 / math.sqrt(14 / 4))
    assert length_preference([2.0, 2.0])[3] == pytest.approx(1.0) and length_preference([0.0]) == (
        0.5,
        0.0,
        1.0,
        0.0,
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=30))
def test_exchanging_all_sides_turns_the_length_bias_round(differences: list[int]) -> None:
    share, _, _, correlation = length_preference([float(d) for d in differences])
    back, _, _, against = length_preference([-float(d) for d in differences])
    assert (
        share + back == pytest.approx(1.0)
        and correlation == pytest.approx(-against)
        and -1 - 1e-9 <= correlation <= 1 + 1e-9
    )


def test_length_bias_is_found_in_either_direction_and_not_without_one() -> None:
    def section(longer: int, shorter: int) -> Any:
        return pairs(
            pair_rows(
                *[("a b c", f"d{i}") for i in range(longer)],
                *[(f"d{i}", "e f g") for i in range(shorter)],
            ),
            PREFERENCE,
        )

    assert (
        found(section(18, 2), "length_bias").message.startswith("the longer side is chosen in 90%")
        and len(rows_of(section(18, 2), "length_bias")) == 18
    )
    assert rows_of(section(2, 18), "length_bias") == list(range(3, 21))
    assert checks(section(10, 10)) == [] and checks(section(2, 1)) == [], (
        "three pairs prove nothing"
    )


def test_the_same_answer_judged_good_and_bad() -> None:
    rows = items(
        *(
            {"prompt": "p", "completion": c, "label": label}
            for c, label in (("a", True), ("b", False), ("A", False), ("a", True))
        )
    )
    assert rows_of(judged(rows, UNPAIRED), "contradictions") == [1, 3, 4]


# ---- lengths ----


def test_lengths_without_a_tokenizer_are_words_and_characters() -> None:
    section = lengths(
        pair_rows(("a b c", "d"), ("我喜欢", "e f"), prompt="two words"),
        Settings(kind=Use.preference, limit=4),
    )
    figures = section.figures
    assert (
        figures["unit"] == "words"
        and figures["columns"]["prompt"]["mean"] == 2
        and figures["columns"]["row"]["max"] == 5
    )
    assert figures["characters"]["rejected"]["median"] == 2.0
    assert (
        rows_of(section, "truncated") == [1, 2]
        and "model.path" in found(section, "truncated").message
    )
    assert found(section, "truncated").rows[0].note == "5 words"


def test_a_row_is_as_long_as_its_longest_sequence() -> None:
    assert (
        row_length({"prompt": 3, "chosen": 5, "rejected": 7}) == 10
        and row_length({"text": 4}) == 4
        and row_length({"messages": 6}) == 6
    )


def test_few_truncated_rows_are_worth_less_than_many() -> None:
    rows = texts(*["a b"] * 199, "a b c d e f")
    assert (
        found(lengths(rows, Settings(kind=Use.sft, limit=5)), "truncated").severity is Severity.info
    )
    assert (
        found(lengths(rows[-20:], Settings(kind=Use.sft, limit=5)), "truncated").severity
        is Severity.warn
    )


def test_lengths_in_tokens_are_those_that_the_stages_train(tokenizer: Any) -> None:
    from rlhf.models import encoding

    rows = items(
        {
            "prompt": chat(("user", "hello there")),
            "chosen": chat(("assistant", "a long answer it is")),
            "rejected": chat(("assistant", "no")),
        },
        {
            "prompt": chat(("user", "hello")),
            "chosen": chat(("user", "not an answer")),
            "rejected": chat(("assistant", "no")),
        },
    )
    plain = items({"prompt": "hello there", "chosen": "a long answer", "rejected": "no"})
    section = lengths(
        [*rows, *plain], Settings(kind=Use.preference, limit=10_000, tokenizer=tokenizer)
    )
    whole = encoding.encode_answer(tokenizer, rows[0].columns["prompt"], rows[0].columns["chosen"])
    text = encoding.encode_answer(tokenizer, "hello there", "a long answer")
    assert section.figures["unit"] == "tokens" and section.figures["columns"]["row"]["rows"] == 3
    only = [
        lengths([row], Settings(kind=Use.preference, tokenizer=tokenizer)).figures["columns"][
            "row"
        ]["max"]
        for row in (rows[0], plain[0])
    ]
    assert only == [len(whole), len(text)]
