"""Verifiers: where the answer stands, what counts as the same, what a broken reference or response
does, and agreement with TRL's rewards.
"""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from conf.choices import FormatStyle, TermKind
from conf.schema import RewardTerm
from reward.base import VerifierScorer
from reward.scorers.computed import CompositeScorer, Term, band_score
from reward.terms import make_verifier
from reward.verifiers.evaluated import MathAnswer, Worker, WorkerError, _Ended
from reward.verifiers.extract import after_marker, close, letter_of, normalise, numbers_in
from reward.verifiers.instructions import INSTRUCTIONS, Instructions, in_script, sentences
from rlhf.types import UserError
from tests.reward.test_reward_terms import plain


def score(kind: TermKind, response: str, value: Any, **options: Any) -> float:
    """One response against one reference, through the scorer as training runs it."""
    column = {
        TermKind.instructions: "constraints",
        TermKind.json_schema: "schema",
        TermKind.regex: "pattern",
    }.get(kind, "answer")
    scorer = VerifierScorer("t", make_verifier("t", RewardTerm(kind=kind, **options)))
    return scorer.score([plain(response, **({} if value is None else {column: value}))]).total[0]


# --- where the answer stands


@pytest.mark.parametrize(
    ("text", "marker", "expected"),
    [
        ("a #### 1\nb #### 42 apples\nend", "####", "42 apples"),
        ("no mark", "####", None),
        ("####", "####", None),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\boxed{}", r"\frac{1}{2}"),
        (r"\boxed{a \} b}", r"\boxed{}", r"a \} b"),
        (r"\boxed{1} and \boxed{2", r"\boxed{}", "1"),
        (r"\fbox{x}", r"\boxed{}", "x"),
        ("<answer>1</answer> <answer> 2\n</answer>", "<answer>", "2"),
        ("<answer>1", "<answer>", None),
        ("Answer: Paris\nmore", "Answer:", "Paris"),
    ],
)
def test_marker(text: str, marker: str, expected: str | None) -> None:
    assert after_marker(text, marker) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it costs $1,234.50.", ["1234.50"]),
        ("from 3 to -4", ["3", "-4"]),
        ("10-3 = 7", ["10", "3", "7"]),
        ("x=-5", ["-5"]),
        ("(2)-1", ["2", "1"]),
        ("1/4 of 8", ["0.25", "8"]),
        (r"-\frac{3}{4}", ["-0.75"]),
        ("\u22127", ["-7"]),
        ("1.5e3, 2E-2", ["1.5E+3", "0.02"]),
        ("50% off", ["50"]),
        ("12,34", ["12", "34"]),
        ("1{,}000", ["1000"]),
        ("5/0", []),
        ("1" * 500, []),
        ("1e999999", ["1E+999999"]),
        (".5", ["0.5"]),
        ("none", []),
    ],
)
def test_numbers(text: str, expected: list[str]) -> None:
    assert numbers_in(text) == [Decimal(e) for e in expected]


@settings(deadline=None)  # a loaded machine is no failure
@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4
    )
)
def test_a_number_is_read_as_it_was_written(number: Decimal) -> None:
    assert numbers_in(f"so the answer is {number:f}.") == [number]
    assert numbers_in(f"so the answer is {number:,f}!") == [number]
    assert numbers_in(f"{number:.4e}") == [Decimal(f"{number:.4e}")]


@settings(deadline=None)  # a loaded machine is no failure
@given(st.integers(-(10**30), 10**30), st.integers(1, 10**6))
def test_numeric_accepts_itself_and_refuses_the_next(number: int, step: int) -> None:
    options = {"tolerance": 0.0}
    assert score(TermKind.numeric, f"It is {number}", number, **options) == 1.0
    assert score(TermKind.numeric, f"It is {number + step}", number, **options) == 0.0


@settings(deadline=None)  # a loaded machine is no failure
@given(st.text(), st.sampled_from([None, "####", r"\boxed{}", "<answer>"]))
@example("-" * 300 + "1" * 300, None)
def test_no_response_breaks_a_text_verifier(text: str, marker: str | None) -> None:
    for kind, reference in (
        (TermKind.exact, "yes"),
        (TermKind.numeric, 3),
        (TermKind.choice, "B"),
        (TermKind.json_schema, {"type": "object"}),
    ):
        assert score(kind, text, reference, marker=marker) in (0.0, 1.0)


@settings(deadline=None)  # a loaded machine is no failure
@given(
    st.lists(
        st.sampled_from(
            [
                "[",
                "{",
                '"a":',
                "1",
                "]",
                "}",
                ",",
                "\\boxed{",
                "```json\n",
                "\n```\n",
                "<answer>",
                "</answer>",
                "#### ",
            ]
        )
    ).map("".join)
)
def test_no_nesting_breaks_a_text_verifier(text: str) -> None:
    for marker in (None, r"\boxed{}", "<answer>"):
        assert score(TermKind.json_schema, text, {}, marker=marker) in (0.0, 1.0)
        assert score(TermKind.numeric, text, 1, marker=marker) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("response", "reference", "options", "expected"),
    [
        ("The total is 18 dollars.", 18, {}, 1.0),
        ("3 + 4 = 7, so 8", 7, {}, 0.0),
        (r"7 \boxed{8} 9", 8, {}, 1.0),
        ("1 #### 42 (of 100)", "5 * 8 + 2 = 42\n#### 42", {}, 1.0),
        ("42", 42, {"marker": "####"}, 0.0),
        ("#### 42", 42, {"marker": "####"}, 1.0),
        ("<answer>x = 42</answer> 7", 42, {"marker": "<answer>"}, 1.0),
        ("3.14", 3.14159, {"tolerance": 1e-3}, 1.0),
        ("3.14", 3.14159, {}, 0.0),
        ("1000001", 1000000, {"tolerance": 1e-5}, 1.0),
        ("0.30000000000000004", 0.3, {}, 1.0),
        ("I don't know", 1, {}, 0.0),
    ],
)
def test_numeric(response: str, reference: Any, options: dict[str, Any], expected: float) -> None:
    assert score(TermKind.numeric, response, reference, **options) == expected


def test_close_is_exact_in_decimals() -> None:
    assert close(Decimal("0.3"), Decimal("0.1") + Decimal("0.2"), 0.0)
    assert not close(Decimal("9007199254740993"), Decimal("9007199254740992"), 0.0)


@pytest.mark.parametrize(
    ("response", "reference", "options", "expected"),
    [
        (" The  PARIS! ", "the paris", {}, 1.0),
        ("Paris", ["Lyon", "paris"], {}, 1.0),
        ("Paris.", "Paris", {"ignore_punctuation": False}, 0.0),
        ("paris", "Paris", {"ignore_case": False}, 0.0),
        ("3.5", "35", {}, 0.0),
        ("-3", "3", {}, 0.0),
        ("ﬁne", "fine", {}, 1.0),
        ("I think Paris", "Paris", {}, 0.0),
        ("I think\nAnswer: Paris.\nBye", "Paris", {"marker": "Answer:"}, 1.0),
        ("Paris", "Paris", {"marker": "Answer:"}, 0.0),
        ("7", 7, {}, 1.0),
    ],
)
def test_exact(response: str, reference: Any, options: dict[str, Any], expected: float) -> None:
    assert score(TermKind.exact, response, reference, **options) == expected


@settings(deadline=None)  # a loaded machine is no failure
@given(st.text(), st.booleans(), st.booleans())
def test_normalising_twice_changes_nothing_more(text: str, case: bool, punctuation: bool) -> None:
    once = normalise(text, ignore_case=case, ignore_punctuation=punctuation)
    assert " ".join(once.split()) == once
    if once.isascii():
        assert normalise(once, ignore_case=case, ignore_punctuation=punctuation) == once


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. Paris", "B"),
        ("**B**", "B"),
        ("B) because A is wrong", "B"),
        ("The answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("the answer is A. No, the answer is D", "D"),
        (r"hence \boxed{\text{B}}", "B"),
        (r"\boxed{b}", "B"),
        ("Not (A)? It must be (A).", "A"),
        ("I like (C) best", "C"),
        ("(A) or (B)", None),
        ("A cat sat on the mat", None),
        ("Because", None),
        ("F", None),
        ("", None),
    ],
)
def test_choice(response: str, expected: str | None) -> None:
    assert letter_of(response, "ABCDE", None) == expected
    for letter in "ABCDE":
        assert score(TermKind.choice, response, letter) == float(letter == expected)


def test_choice_with_a_marker_looks_nowhere_else() -> None:
    assert score(TermKind.choice, "B #### C", "C", marker="####") == 1.0
    assert score(TermKind.choice, "The answer is C", "C", marker="####") == 0.0
    assert score(TermKind.choice, "2", "2", letters="1234") == 1.0


# --- patterns, formats, JSON


def test_regex_of_the_term_and_of_the_row() -> None:
    assert score(TermKind.regex, "a\nfoo42", None, pattern=r"foo\d+") == 1.0
    assert score(TermKind.regex, "foo", None, pattern=r"^foo\d+") == 0.0
    assert score(TermKind.regex, "bar", "^b") == 1.0
    with pytest.raises(UserError, match=r"column 'pattern' of prompt 'p0'.*no valid pattern"):
        score(TermKind.regex, "bar", "(b")


def test_a_pattern_that_backtracks_without_end_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.verifiers.text._PATTERN_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"TimeoutError: the pattern .* took more than 0\.2 s.*for prompt 'p0'"
    ):
        score(TermKind.regex, "a" * 40 + "!", None, pattern=r"^(a|a|aa)+$")
    assert time.monotonic() - began < 10


THINKING = [
    "<think>\nreason\n</think>\nanswer",
    "<think>reason</think>",
    "<think>a</think><think>b</think>",
    "reason</think>answer",
    "x<think>reason</think>answer",
    "x\n<think>reason</think>answer",
    "<think>reason",
    "",
    "<think></think>",
    "<think>a</think> b </think> c",
]


@pytest.mark.parametrize("response", THINKING)
def test_think_format_agrees_with_trl(response: str) -> None:
    (expected,) = think_format_reward([[{"role": "assistant", "content": response}]])
    assert score(TermKind.format, response, None, style=FormatStyle.think) == expected


@settings(deadline=None)  # a loaded machine is no failure
@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", " "]), max_size=8).map("".join))
def test_think_format_agrees_with_trl_everywhere(response: str) -> None:
    (expected,) = think_format_reward([[{"role": "assistant", "content": response}]])
    assert score(TermKind.format, response, None, style=FormatStyle.think) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1.0),
        ("<think>a</think><answer></answer> ", 1.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think> so <answer>c</answer>", 0.0),
        ("<think>a<think></think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer><answer>d</answer>", 0.0),
    ],
)
def test_think_answer_format(response: str, expected: float) -> None:
    assert score(TermKind.format, response, None, style=FormatStyle.think_answer) == expected


def test_format_matches_the_whole_response() -> None:
    assert score(TermKind.format, "yes", None, pattern="yes|no") == 1.0
    assert score(TermKind.format, "yes and no", None, pattern="yes|no") == 0.0


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"a": 1}', 1.0),
        (' {"a": 1}\n', 1.0),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', 1.0),
        ('{"a": "1"}', 0.0),
        ('{"a": 1, "b": 2}', 0.0),
        ("{'a': 1}", 0.0),
        ('Sure: {"a": 1}', 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1e999}', 0.0),
        ('{"a": 1', 0.0),
        ("[" * 100_000, 0.0),
        ('{"a": ' + "1" * 5000 + "}", 0.0),
        ("", 0.0),
    ],
)
def test_json_schema(response: str, expected: float, tmp_path: Path) -> None:
    place = tmp_path / "schema.json"
    place.write_text(json.dumps(SCHEMA))
    assert score(TermKind.json_schema, response, None, schema_file=str(place)) == expected
    assert score(TermKind.json_schema, response, SCHEMA) == expected
    assert score(TermKind.json_schema, response, json.dumps(SCHEMA)) == expected


def test_schemas_that_are_none(tmp_path: Path) -> None:
    place = tmp_path / "schema.json"
    place.write_text('{"type": "objekt"}')
    with pytest.raises(
        UserError, match=r"schema_file=.*: no valid JSON schema at \$\.type: 'objekt'"
    ):
        make_verifier("t", RewardTerm(kind=TermKind.json_schema, schema_file=str(place)))
    with pytest.raises(UserError, match="column 'schema' of prompt 'p0'"):
        score(TermKind.json_schema, "1", {"type": 3})


def test_a_schema_elsewhere_is_not_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        asked: list[bool] = []

        def answer() -> None:
            with contextlib.suppress(TimeoutError):
                server.accept()[0].close()
                asked.append(True)

        listener = threading.Thread(target=answer)
        listener.start()
        with pytest.raises(UserError, match=r"for prompt 'p0'"):
            score(
                TermKind.json_schema,
                "1",
                {"$ref": f"http://127.0.0.1:{server.getsockname()[1]}/none.json"},
            )
        listener.join()
    assert not asked


# --- references


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (TermKind.exact, "...", "expected a text that is more than punctuation"),
        (TermKind.exact, [], "or a list of such texts"),
        (TermKind.exact, {"a": 1}, "expected a text"),
        (TermKind.numeric, "many", "expected a number"),
        (TermKind.numeric, True, "expected a number"),
        (TermKind.numeric, float("nan"), "expected a number"),
        (TermKind.choice, "Z", "expected one of the letters ABCDE"),
        (TermKind.instructions, "[]", "expected a list of constraints"),
        (
            TermKind.instructions,
            [{"id": "punctuation:no_coma"}],
            "there is no constraint 'punctuation:no_coma'; nearest: 'punctuation:no_comma'",
        ),
        (
            TermKind.instructions,
            [{"id": "startend:end_checker"}],
            "expected the arguments end_phrase; found none",
        ),
        (
            TermKind.instructions,
            [{"id": "punctuation:no_comma", "x": 1}],
            "expected the arguments none; found x",
        ),
        (
            TermKind.instructions,
            [{"id": "keywords:existence", "keywords": []}],
            "keywords: expected a list of texts",
        ),
        (
            TermKind.instructions,
            [{"id": "length_constraints:number_words", "num_words": 3, "relation": "about"}],
            "relation: expected one of at least, less than",
        ),
    ],
)
def test_broken_references_stop_the_run_and_name_the_prompt(
    kind: TermKind, value: Any, message: str
) -> None:
    with pytest.raises(
        UserError, match=r"reward\.terms\.t, column .* of prompt 'p0' \('ask p0'\): .*"
    ) as error:
        score(kind, "x", value)
    assert message in str(error.value)


def test_a_missing_column_stops_the_run_and_names_the_prompt() -> None:
    scorer = VerifierScorer("t", make_verifier("t", RewardTerm(kind=TermKind.exact)))
    with pytest.raises(
        UserError,
        match=r"reward\.terms\.t .*'answer'.*'p1' .*: solution\)",
    ):
        scorer.score([plain("x", answer="x"), plain("x", "p1", solution="x", answer=None)])


# --- instructions


@pytest.mark.parametrize(
    ("name", "arguments", "yes", "no"),
    [
        (
            "keywords:existence",
            {"keywords": ["cat", "big dog"]},
            "A Cat and a big dog.",
            "concatenate big dog",
        ),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "The cat."),
        (
            "keywords:frequency",
            {"keyword": "go", "frequency": 2, "relation": "at least"},
            "go, GO",
            "go going",
        ),
        (
            "keywords:letter_frequency",
            {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
            "Zoo",
            "Zz",
        ),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "exactly"},
            "one two-three",
            "one two",
        ),
        (
            "length_constraints:number_sentences",
            {"num_sentences": 2, "relation": "less than"},
            "Only one. ",
            "One. Two?",
        ),
        (
            "length_constraints:number_paragraphs",
            {"num_paragraphs": 2},
            "a\n***\nb",
            "a\n***\nb\n***\nc",
        ),
        (
            "length_constraints:number_characters",
            {"num_characters": 4, "relation": "at most"},
            "abcd",
            "abcde",
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"},
            "a\n\n'Well, b",
            "well\n\nb",
        ),
        (
            "detectable_content:number_placeholders",
            {"num_placeholders": 2},
            "[name] at [place]",
            "[name] at []",
        ),
        (
            "detectable_content:postscript",
            {"postscript_marker": "P.S."},
            "Bye\nP.S. more",
            "Bye P.S.",
        ),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n", "* a\n**b**"),
        (
            "detectable_format:number_highlighted_sections",
            {"num_highlights": 2},
            "*a* and **b**",
            "*a* and * ",
        ),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "SECTION", "num_sections": 2},
            "SECTION 1 a\nSECTION 2 b",
            "SECTION 1 a",
        ),
        ("detectable_format:title", {}, "<<my title>>\ntext", "<<>> text"),
        ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
        ("change_case:english_capital", {}, "ALL OF IT, 3", "Not ALL"),
        ("change_case:english_lowercase", {}, "all of it", "Not all"),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 1, "capital_relation": "at most"},
            "one BIG word",
            "TWO BIG words",
        ),
        ("startend:start_checker", {"start_phrase": "Dear"}, "dear you", "My dear"),
        (
            "startend:end_checker",
            {"end_phrase": "The end."},
            'And so on. the end."\n',
            "The end. Not.",
        ),
        ("startend:quotation", {}, ' "quoted" ', '"'),
        ("punctuation:no_comma", {}, "a b", "a, b"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say A."}, "Say A. A", "A"),
        ("language:script", {"script": "cyrillic"}, "Привет, 3 раза!", "Привет hello"),
    ],
)
def test_instruction(name: str, arguments: dict[str, Any], yes: str, no: str) -> None:
    constraint = [{"id": name, **arguments, "left_out": None}]
    assert score(TermKind.instructions, yes, constraint) == 1.0
    assert score(TermKind.instructions, no, constraint) == 0.0
    assert score(TermKind.instructions, " \n", constraint) == 0.0, (
        "an empty response follows nothing"
    )


def test_every_instruction_has_a_case() -> None:
    cases = next(mark for mark in test_instruction.pytestmark if mark.name == "parametrize").args[1]
    assert {case[0] for case in cases} == set(INSTRUCTIONS)


def test_share_of_constraints_or_all_of_them() -> None:
    constraints = [
        {"id": "punctuation:no_comma"},
        {"id": "change_case:english_lowercase"},
        {"id": "startend:quotation"},
    ]
    assert score(TermKind.instructions, "lower case", constraints) == pytest.approx(2 / 3)
    assert (
        score(TermKind.instructions, "lower case", json.dumps(constraints), all_or_nothing=True)
        == 0.0
    )
    assert score(TermKind.instructions, '"lower"', constraints, all_or_nothing=True) == 1.0


@settings(deadline=None)  # a loaded machine is no failure
@given(st.text(max_size=60))
def test_no_text_breaks_an_instruction(text: str) -> None:
    term = Instructions(RewardTerm(kind=TermKind.instructions))
    cases = next(mark for mark in test_instruction.pytestmark if mark.name == "parametrize").args[1]
    reference = term.reference([{"id": name, **arguments} for name, arguments, _, _ in cases])
    assert 0.0 <= term.score(text, reference) <= 1.0


def test_sentences_and_scripts() -> None:
    assert [
        sentences(t)
        for t in (
            "One. Two! Three?",
            'He said "no." Then 3.5 left',
            "...",
            "a\n\nb",
            "一\u3002二\uff01",
        )
    ] == [3, 2, 0, 2, 2]
    assert in_script("naïve café", "latin") and not in_script("123", "latin")


# --- mathematics


@pytest.fixture(scope="module")
def maths() -> Iterator[MathAnswer]:
    verifier = MathAnswer(RewardTerm(kind=TermKind.math))
    yield verifier
    verifier.worker.close()


MATHS = [
    (r"\frac{1}{2}", r"so \boxed{0.5}", 1.0),
    ("1/2", r"\boxed{\frac{1}{3}}", 0.0),
    (r"$x^2+1$", r"\boxed{1+x^2}", 1.0),
    ("42", "The answer is 42", 0.0),  # no LaTeX
    ("42", "The answer is $42$.", 1.0),
    (r"$\sqrt{8}$", r"\boxed{2\sqrt{2}}", 1.0),
    (r"\boxed{\{1,2\}}", r"\boxed{\{2,1\}}", 1.0),
    (r"$(0,1)$", r"\boxed{(0, 1)}", 1.0),
    ("7", r"\boxed{3} no, \boxed{7}", None),  # whatever TRL says
    ("10", r"\boxed{10\text{ cm}}", 1.0),
    ("3", r"\boxed{", 0.0),
    ("3", "", 0.0),
]


@pytest.mark.parametrize(("gold", "response", "expected"), MATHS)
def test_math_agrees_with_trl(
    maths: MathAnswer,
    gold: str,
    response: str,
    expected: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    (theirs,) = accuracy_reward([[{"role": "assistant", "content": response}]], [gold])
    ours = maths.score(response, maths.reference(gold))
    assert ours == theirs
    assert expected is None or ours == expected


def test_math_reads_a_whole_expression_where_trl_reads_its_first_number(maths: MathAnswer) -> None:
    """`2x+3y` without delimiters: TRL's gold is 2, which it then gives to a response that
    says 2.
    """
    assert accuracy_reward([[{"role": "assistant", "content": r"\boxed{2}"}]], ["2x+3y"]) == [1.0]
    assert maths.score(r"\boxed{2}", maths.reference("2x+3y")) == 0.0
    assert maths.score(r"\boxed{3y+2x}", maths.reference("2x+3y")) == 1.0


def test_an_answer_without_end_is_wrong_and_the_next_is_read(maths: MathAnswer) -> None:
    fast = MathAnswer(RewardTerm(kind=TermKind.math))
    fast.worker = Worker("math", cpu_s=1.0)
    reference = fast.reference("3")
    for endless in (r"\boxed{9^{9^{9^{9^9}}}}", r"\boxed{(10^8)!}"):
        assert fast.score(endless, reference) == 0.0
    assert fast.score(r"\boxed{3}", reference) == 1.0
    fast.worker.close()


def test_math_references_and_processes_that_fail(
    monkeypatch: pytest.MonkeyPatch, maths: MathAnswer
) -> None:
    with pytest.raises(ValueError, match="expression or a number"):
        maths.reference(["3"])
    with pytest.raises(ValueError, match="expected a mathematical expression, found '\\$\\$'"):
        maths.reference("$$")
    monkeypatch.setattr("reward.verifiers.evaluated.sys.executable", "/bin/false")
    broken = Worker("math")
    with pytest.raises(
        WorkerError,
        match=r"ended before it was ready.*python -m reward\.verifiers\.worker_child math",
    ):
        broken.score("3", r"\boxed{3}")
    broken.close()


def test_a_process_that_ends_on_the_reference_too_is_not_the_response_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that the machine lacks, say, ends every process: those responses are not wrong."""

    def ends(*_: Any) -> Any:
        raise _Ended("ended")

    monkeypatch.setattr(Worker, "_ask", ends)
    with pytest.raises(WorkerError, match=r"math .*reference alone: '3'"):
        Worker("math").score("3", r"\boxed{3}")


def test_a_process_that_computes_nothing_is_not_the_response_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reward.verifiers.evaluated._WALL_FACTOR", 1e-4)
    monkeypatch.setattr("reward.verifiers.evaluated._cpu_seconds", lambda pid: 0.0)
    slow = Worker("math")
    monkeypatch.setattr("reward.verifiers.evaluated._START_S", 1e7)
    with pytest.raises(WorkerError, match="no answer within 0 s"):
        slow.score("3", r"\boxed{9^{9^{9^{9^9}}}}")
    slow.close()


# --- lengths


@settings(deadline=None)  # a loaded machine is no failure
@given(st.integers(0, 300), st.integers(1, 200), st.integers(0, 200))
def test_length_agrees_with_trl_s_soft_overlong_punishment(
    length: int, cache: int, more: int
) -> None:
    most = cache + more
    (expected,) = get_soft_overlong_punishment(most, cache)(completion_ids=[[1] * length])
    assert band_score(length, None, most - cache, cache) == pytest.approx(expected)


def test_prompts_with_one_text_keep_their_own_references() -> None:
    scorer = VerifierScorer("t", make_verifier("t", RewardTerm(kind=TermKind.exact)))
    rollouts = [plain("4", "same", answer="4"), plain("4", "same", answer="5")]
    assert scorer.score(rollouts).total == [1.0, 0.0]


# --- while others are still being written


class Waits:
    """Waits for a word before it says that a response is right; workers: two."""

    columns = ("answer",)
    workers = 2

    def __init__(self) -> None:
        self.started, self.go = threading.Event(), threading.Event()

    def reference(self, answer: str) -> str:
        return answer

    def score(self, response: str, reference: str) -> float:
        self.started.set()
        assert self.go.wait(10)
        return float(response == reference)


def test_a_response_is_checked_before_all_are_there() -> None:
    verifier = Waits()
    scorer = CompositeScorer([Term("right", VerifierScorer("right", verifier), weight=2.0)])
    first, second = plain("4", "sum", answer="4"), plain("5", "sum", answer="4")
    scorer.begin(first)
    assert verifier.started.wait(10), "nobody has asked for a score yet"
    verifier.go.set()
    assert scorer.score([first, second]).total == [2.0, 0.0]
    assert scorer.score([first]).total == [2.0], "as often as one asks"


def test_what_goes_wrong_early_is_raised_by_the_score() -> None:
    scorer = VerifierScorer("t", make_verifier("t", RewardTerm(kind=TermKind.exact)))
    lacking = plain("4", "sum")
    scorer.begin(lacking)
    with pytest.raises(UserError, match=r"reward\.terms\.t .*'answer'"):
        scorer.score([lacking])
