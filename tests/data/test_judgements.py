"""Rows of judgements: what annotation tools and published comparisons say becomes pairs, ties and
skips are set aside with their reasons.
"""

import re
from typing import Any

import pytest

from rlhf.data import formats
from rlhf.data.formats import Use
from rlhf.types import PreferencePair


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pairwise(*selected: str, choices: str | None = None, **annotation: Any) -> dict[str, Any]:
    """A Label Studio annotation."""
    result: list[dict[str, Any]] = [
        {"from_name": "pw", "to_name": "pw", "type": "pairwise", "value": {"selected": side}}
        for side in selected
    ]
    if choices is not None:
        result.append(
            {"from_name": "tie", "to_name": "a", "type": "choices", "value": {"choices": [choices]}}
        )
    return {"completed_by": 1, "was_cancelled": False, "result": result, **annotation}


def task(*annotations: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "data": {"prompt": "Hi", "answer1": "a", "answer2": "b", **data},
        "annotations": list(annotations),
    }


def ranker(value: Any, **annotation: Any) -> dict[str, Any]:
    result = {
        "from_name": "rank",
        "to_name": "results",
        "type": "ranker",
        "value": {"ranker": value},
    }
    items = [{"id": f"m{i}", "title": "", "body": text} for i, text in enumerate("abc", start=1)]
    return {
        "data": {"prompt": "Hi", "items": items},
        "annotations": [{"completed_by": 2, "result": [result], **annotation}],
    }


def argilla(
    *responses: dict[str, Any], question: str = "preference", **fields: str
) -> dict[str, Any]:
    shown = {"prompt": "Hi", "response-0": "a", "response-1": "b", **fields}
    return {
        "id": "1",
        "fields": shown,
        "metadata": {"source": "s"},
        "responses": {question: list(responses)},
    }


def sheet(preference: str) -> dict[str, Any]:
    return {
        "pair_id": "7",
        "prompt": "Hi",
        "response_a": "a",
        "response_b": "b",
        "preference": preference,
        "annotator": "x",
        "comment": "",
    }


EVAL = {
    "instruction": "p",
    "output_1": "a",
    "output_2": "b",
    "generator_1": "g",
    "generator_2": "m",
    "annotator": "j",
}
GAME = {
    "question_id": 81,
    "model_1": "m",
    "model_2": "n",
    "g1_winner": "model_1",
    "g2_winner": "model_1",
    "turn": 1,
    "question_turns": ["q", "r"],
    "answer_turns_1": ["a", "c"],
    "answer_turns_2": ["b", "d"],
}
A_B, B_A = PreferencePair("Hi", "a", "b"), PreferencePair("Hi", "b", "a")


@pytest.mark.parametrize(
    ("name", "row", "pairs"),
    [
        (
            "shp",
            {"post_id": "x", "history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
            [A_B],
        ),
        (
            "shp",
            {"post_id": "x", "history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
            [B_A],
        ),
        (
            "nectar",
            {
                "prompt": "Hi",
                "answers": [
                    {"answer": "c", "rank": 3},
                    {"answer": "a", "rank": 1},
                    {"answer": "b", "rank": 2},
                ],
            },
            [PreferencePair("Hi", "a", "c"), PreferencePair("Hi", "b", "c"), A_B],
        ),
        (
            "alpaca_eval_annotation",
            {**EVAL, "preference": 1},
            [PreferencePair([user("p")], bot("a"), bot("b"), 1.0)],
        ),
        (
            "alpaca_eval_annotation",
            {**EVAL, "preference": 2.0},
            [PreferencePair([user("p")], bot("b"), bot("a"), 1.0)],
        ),
        (
            "alpaca_eval_annotation",
            {**EVAL, "preference": 1.75},
            [PreferencePair([user("p")], bot("b"), bot("a"), 0.5)],
        ),
        (
            "alpaca_eval_annotation",
            {**EVAL, "preference": 1.375},
            [PreferencePair([user("p")], bot("a"), bot("b"), 0.25)],
        ),
        ("mt_bench_judgment", GAME, [PreferencePair([user("q")], bot("a"), bot("b"))]),
        (
            "mt_bench_judgment",
            {**GAME, "g1_winner": "model_2", "g2_winner": "model_2"},
            [PreferencePair([user("q")], bot("b"), bot("a"))],
        ),
        (
            "mt_bench_judgment",
            {**GAME, "turn": 2, "answer_turns_2": ["a", "d"]},
            [PreferencePair([user("q"), *bot("a"), user("r")], bot("c"), bot("d"))],
        ),
        (
            "rewardbench",
            {
                "prompt": "Hi",
                "chosen": "a",
                "chosen_model": "m",
                "rejected": "b",
                "rejected_model": "n",
                "subset": "alpacaeval-easy",
                "id": 1,
            },
            [A_B],
        ),
        (
            "rewardbench",
            {
                "prompt": "Hi",
                "chosen": ["a"],
                "rejected": ["b", "c"],
                "subset": "Math",
                "models": ["m", "n", "o"],
            },
            [A_B, PreferencePair("Hi", "a", "c")],
        ),
        ("label_studio", task(pairwise("left")), [A_B]),
        ("label_studio", task(pairwise("right")), [B_A]),
        # the side as it was shown decides
        ("label_studio", task(pairwise("left"), swapped=True), [A_B]),
        ("label_studio", task(pairwise("left"), pairwise("right", completed_by=2)), [A_B, B_A]),
        (
            "label_studio",
            task(pairwise("left"), prompt=[user("Hi")]),
            [PreferencePair([user("Hi")], bot("a"), bot("b"))],
        ),
        ("label_studio_ranker", ranker({"rank": ["m2", "m1"]}), [B_A]),
        ("label_studio_ranker", ranker(["m2", "m1"]), [B_A]),  # older exports
        (
            "label_studio_ranker",
            ranker({"rank": ["m3", "m1", "m2"]}),
            [A_B, PreferencePair("Hi", "c", "a"), PreferencePair("Hi", "c", "b")],
        ),
        ("argilla", argilla({"value": "response-1", "user_id": "u"}), [B_A]),
        (
            "argilla",
            argilla({"value": "response-0"}, {"value": "response-1", "status": "submitted"}),
            [A_B, B_A],
        ),
        ("argilla", argilla({"value": "response-0"}, question="better"), [A_B]),
        (
            "argilla",
            argilla(
                {"value": [{"value": "response-0", "rank": 2}, {"value": "response-1", "rank": 1}]}
            ),
            [B_A],
        ),
        (
            "argilla",
            argilla({"value": "response-0"}, **{"response-2": "c"}),
            [A_B, PreferencePair("Hi", "a", "c")],
        ),
        ("label_sheet", sheet("a"), [A_B]),
        ("label_sheet", sheet(" B "), [B_A]),
    ],
)
def test_judgements_become_pairs(
    name: str, row: dict[str, Any], pairs: list[PreferencePair]
) -> None:
    found = formats.detect(row)
    assert found is not None and found.name == name
    several = found.read(row, Use.preference)
    assert [made.value for made in several.pairs] == pairs
    assert [made.value for made in found.read(row, Use.unpaired).pairs] == pairs


def test_responses_by_user_are_those_by_question() -> None:
    """What Argilla's API gives is read as what its SDK writes, and no response is lost."""
    said = [
        {"value": "response-1", "user_id": "u", "status": "submitted"},
        {"value": "tie", "user_id": "v", "status": "submitted"},
        {"value": "response-0", "user_id": "w", "status": "draft"},
        {"value": None, "user_id": "x", "status": "discarded"},
    ]
    by_question = argilla(*said)
    by_user = [
        {"user_id": one["user_id"], "status": one["status"], "values": {}}
        | ({"values": {"preference": {"value": one["value"]}}} if one["value"] else {})
        for one in said
    ]
    found = formats.detect(by_question)
    assert found is not None
    expected = found.read(by_question, Use.preference)
    assert len(expected.pairs) == 1 and len(expected.set_aside) == 3
    read = found.read({**by_question, "responses": by_user}, Use.preference)
    assert read == expected
    by_user[0]["values"]["comment"] = {"value": "good"}
    read = found.read({**by_question, "responses": by_user}, Use.preference)
    assert read.pairs == expected.pairs and read.set_aside == expected.set_aside
    assert read.notes == [*expected.notes, "responses.comment is not read"]
    lone = {**by_question, "responses": [{"user_id": "u", "status": "discarded"}]}
    assert found.read(lone, Use.preference).set_aside == ["response 1 by u: discarded"]
    for wrong, why in (
        (["u"], r"responses\[0\]': expected an object, found text 'u'"),
        ([by_user[0], by_user[0]], r"responses\[1\]': a second response of user 'u'"),
        ("u", r"key 'responses': expected an object, found text 'u'"),
    ):
        with pytest.raises(formats.RowError, match=why):
            found.read({**by_question, "responses": wrong}, Use.preference)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (
            task(pairwise("right", lead_time=4.2), pair_id="p", swapped=True),
            {"pair_id": "p", "swapped": True, "annotator": "1", "lead_time": 4.2, "position": 2},
        ),
        (
            task(pairwise("left", completed_by={"id": 3, "email": "x@y"})),
            {"annotator": "x@y", "position": 1},
        ),
        (
            argilla({"value": "response-1", "user_id": "u"}),
            {"source": "s", "annotator": "u", "position": 2},
        ),
        (sheet("b"), {"pair_id": "7", "annotator": "x", "comment": "", "position": 2}),
        (
            ranker(["m2", "m1"]),
            {"annotator": "2", "rank_chosen": 1.0, "rank_rejected": 2.0, "position": 2},
        ),
        (
            {**EVAL, "preference": 2},
            {"generator_1": "g", "generator_2": "m", "annotator": "j", "position": 2},
        ),
    ],
)
def test_who_judged_and_which_side_was_chosen_stay_known(
    row: dict[str, Any], fields: dict[str, Any]
) -> None:
    found = formats.detect(row)
    assert found is not None
    assert found.read(row, Use.preference).pairs[0].fields == fields


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        (
            {"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
            ["a tie: answers[0] and answers[1] share rank 1"],
        ),
        ({**EVAL, "preference": 1.5}, ["a tie: preference is 1.5"]),
        ({**EVAL, "preference": 0}, ["a tie: preference is 0"]),
        ({**EVAL, "preference": None}, ["the annotator gave no preference"]),
        ({**GAME, "g2_winner": "model_2"}, ["a tie: game 1 says model_1, game 2 model_2"]),
        ({**GAME, "g1_winner": "tie", "g2_winner": "tie"}, ["a tie: game 1 says tie, game 2 tie"]),
        ({**GAME, "g2_winner": "error"}, ["the judge's answer was not understood (error)"]),
        (
            {**GAME, "turn": 2},
            [
                "turn 2 compares conversations whose first answers differ, which are no two "
                "answers to one prompt"
            ],
        ),
        (task(), ["not annotated yet"]),
        (task(pairwise(was_cancelled=True)), ["annotation 1 by 1: skipped (was_cancelled)"]),
        (
            task(pairwise("left", was_cancelled=True)),
            ["annotation 1 by 1: skipped (was_cancelled)"],
        ),
        (task(pairwise()), ["annotation 1 by 1: no side was selected"]),
        (task(pairwise(choices="tie")), ["annotation 1 by 1: a tie or a skip: 'tie' was chosen"]),
        (
            task(pairwise("left", choices="tie")),
            ["annotation 1 by 1: a side was selected and 'tie' chosen too"],
        ),
        (ranker([], was_cancelled=True), ["annotation 1 by 2: skipped (was_cancelled)"]),
        (argilla(), ["no response yet"]),
        (
            argilla() | {"suggestions": {"preference": {"value": "response-0"}}},
            ["no response yet (a suggestion alone is no judgement)"],
        ),
        (
            argilla({"value": "tie", "user_id": "u"}),
            ["response 1 by u: a tie or a skip: 'tie' was chosen"],
        ),
        (argilla({"value": "response-0", "status": "discarded"}), ["response 1: discarded"]),
        (
            argilla(
                {"value": [{"value": "response-0", "rank": 1}, {"value": "response-1", "rank": 1}]}
            ),
            ["response 1: a tie: response-0 and response-1 share rank 1"],
        ),
        (sheet("tie"), ["a tie"]),
        (sheet("SKIP"), ["a skip"]),
        (sheet(""), ["not labelled yet"]),
    ],
)
def test_ties_and_skips_are_set_aside(row: dict[str, Any], reasons: list[str]) -> None:
    found = formats.detect(row, Use.preference)
    assert found is not None
    several = found.read(row, Use.preference)
    assert several.pairs == [] and several.set_aside == reasons


def test_one_row_gives_pairs_and_reasons() -> None:
    row = task(
        pairwise("left"),
        pairwise(completed_by=2, was_cancelled=True),
        pairwise("right", completed_by=3),
    )
    several = formats.by_name("label_studio").read(row, Use.preference)
    assert [made.value for made in several.pairs] == [A_B, B_A]
    assert [made.fields["annotator"] for made in several.pairs] == ["1", "3"]
    assert several.set_aside == ["annotation 2 by 2: skipped (was_cancelled)"]
    partly = formats.by_name("label_studio_ranker").read(ranker(["m2", "m1"]), Use.preference)
    assert partly.set_aside == ["annotation 1 by 2: m3 was not ranked"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            task(pairwise("middle")),
            "key 'annotations[0].result[0].value.selected': expected left or right, found text "
            "'middle'",
        ),
        (task(pairwise("left"), answer2=3), "key 'answer2': expected text, found a number 3"),
        (
            {"data": {"prompt": "Hi", "answer1": "a"}, "annotations": [pairwise("left")]},
            "key 'answer2': expected, but missing; found keys: prompt, answer1",
        ),
        (
            task() | {"annotations": {}} | {"annotations": "x"},
            "key 'annotations': expected a list of objects, found text 'x'",
        ),
        (
            task({"result": [{"type": "pairwise"}]}),
            "key 'annotations[0].result[0]': expected an object with 'type' and 'value'",
        ),
        (ranker(["m9", "m1"]), "expected each of the ids m1, m2, m3 at most once, found m9, m1"),
        (
            ranker({"good": ["m1"], "bad": ["m2"]}),
            "expected one ranked list, found the lists good, bad",
        ),
        (
            ranker({"rank": "m1"}),
            "expected a list of ids from the best to the worst, found text 'm1'",
        ),
        (
            argilla({"value": "response-3"}),
            "expected one of response-0, response-1 (or tie), found 'response-3'; nearest: "
            "'response-1'",
        ),
        (
            argilla({"value": 1}),
            "expected an answer's name or a list of {value, rank}, found a number 1",
        ),
        (
            {"fields": {"prompt": "Hi", "response-0": "a"}, "responses": {}},
            "expected prompt, response-0 and response-1, found keys: prompt, response-0",
        ),
        (
            {**argilla(), "responses": {"a": [], "b": []}},
            "expected the question 'preference', found the questions a, b",
        ),
        (sheet("c"), "key 'preference': expected a, b, tie or skip, found text 'c'"),
        (
            {**EVAL, "preference": 3},
            "key 'preference': expected a number from 1 (output_1) to 2 (output_2), found a "
            "number 3",
        ),
        (
            {**EVAL, "preference": "better"},
            "key 'preference': expected a finite number, found text 'better'",
        ),
        (
            {**GAME, "g1_winner": "model_3"},
            "key 'g1_winner': expected one of model_1, model_2, tie, error, found 'model_3'",
        ),
        (
            {k: v for k, v in GAME.items() if not k.startswith("answer")},
            "names its answers but holds no text of them: expected data.join=[questions, answers]",
        ),
        (
            {k: v for k, v in GAME.items() if k != "question_turns"},
            "names its question but holds no text of it: expected data.join",
        ),
        (
            {"prompt": "Hi", "answers": [{"answer": "a", "rank": "x"}, {"answer": "b"}]},
            "answers[0]: key 'rank': expected a finite number, found text 'x'",
        ),
        (
            {"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
            "answers[1]: key 'rank': expected, but missing; found keys: answer",
        ),
        (
            {"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 2},
            "key 'labels': expected true or false (or 1 or 0), found a number 2",
        ),
        (
            {"history": "Hi", "human_ref_A": "a", "human_ref_B": "a", "labels": 1},
            "expected two different answers, found the same twice",
        ),
        (
            {"prompt": "Hi", "chosen": ["a"], "rejected": [], "subset": "x", "models": []},
            "key 'rejected': expected at least one text, found an empty list",
        ),
    ],
)
def test_a_judgement_that_does_not_fit(row: dict[str, Any], message: str) -> None:
    found = formats.detect(row, Use.preference)
    assert found is not None
    with pytest.raises(formats.RowError, match=re.escape(message)):
        found.read(row, Use.preference)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (task(), "Hi"),
        (ranker([]), "Hi"),
        (argilla(), "Hi"),
        (sheet("skip"), "Hi"),
        ({**EVAL, "preference": 1.5}, [user("p")]),
        ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, "Hi"),
        (
            {"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
            "Hi",
        ),
        (GAME, [user("q")]),
    ],
)
def test_prompts_need_no_judgement(row: dict[str, Any], prompt: object) -> None:
    found = formats.detect(row, Use.prompt)
    assert found is not None
    assert [made.value for made in found.read(row, Use.prompt).pairs] == [prompt]


def test_mt_bench_answers_train_with_their_questions() -> None:
    row = {
        "question_id": 81,
        "model_id": "m",
        "choices": [{"index": 0, "turns": ["a", "b"]}],
        "question_turns": ["q", "r"],
    }
    found = formats.detect(row, Use.sft)
    assert found is not None and found.name == "mt_bench_answer"
    assert found.read(row, Use.sft).pairs[0].value == {
        "messages": [user("q"), *bot("a"), user("r"), *bot("b")]
    }


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(formats.RowError, match=r"'text'.*U\+D800 to U\+DFFF"):
        formats.by_name("text").read({"text": "a\ud83d"}, Use.sft)
