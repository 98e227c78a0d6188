"""Judges of pairs: both orders, known biases found again, win rates near the truth, refusals."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from conf.judging import CRITERIA, TEMPLATE, LLMJudgeConfig
from eval.pairwise.asking import IDENTICAL, TOO_LONG, Wording, judge_pairs, pairs_of
from eval.pairwise.biases import biases
from eval.pairwise.kept import KeptReplies
from eval.pairwise.rates import Bounds, pair_rates, untrusted, win_rates
from eval.pairwise.server import Address, ServerJudge
from eval.pairwise.strengths import PRIOR, design, fit
from eval.pairwise.summary import judgement, rows_of, section
from eval.pairwise.verdicts import (
    Judged,
    Pair,
    Reply,
    Verdict,
    fields_of,
    prompt_text,
    question,
    read_verdict,
)
from rlhf.types import Message, Prompt, Rollout, UserError
from tests.eval.scripted_judge import SCALE, biased, judge_server

WORDING = Wording(TEMPLATE, CRITERIA, None)
BOUNDS = Bounds(least_consistency=0.6, most_unread=0.1)


def rollout(prompt: str, text: str) -> Rollout:
    return Rollout(Prompt(prompt, prompt, (1,)), text, [1], [0.0], "stop", 0)


def pair(number: int, mine: str, theirs: str, policies: tuple[str, str] = ("a", "b")) -> Pair:
    return Pair(str(number), f"prompt {number}", policies, (mine, theirs))


def judged(number: int, shown: str, swapped: str, **more: tuple[str, str]) -> Judged:
    """`shown`, `swapped`: replies."""
    replies = [Reply(text, read_verdict(text)) for text in (shown, swapped)]
    return Judged(pair(number, f"one {number}", "another", **more), *replies)


def address(url: str, **more: object) -> Address:
    options: dict[str, object] = {
        "model": "scripted",
        "token": None,
        "timeout_s": 5.0,
        "retries": 2,
        "in_flight": 4,
        "max_tokens": 8,
        "temperature": 0.0,
    }
    return Address(httpx.URL(url), "stage.llm_judge.url", **(options | more))  # type: ignore[arg-type]


# --- questions and verdicts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[A]]", Verdict.first),
        (" B.\n", Verdict.second),
        ("**Tie**", Verdict.tie),
        ("Answer: A", Verdict.first),
        ("The second one is right, so [[B]]", Verdict.second),
        ("[[C]]", Verdict.tie),
        ("[[a]] and again [[A]]", Verdict.first),
        ("<think>A looks good, [[A]]? No.</think>\n[[B]]", Verdict.second),
        ("[[A]] or [[B]]", None),
        ("[[C]] [[tie]]", Verdict.tie),
        ("A is better than B", None),
        ("<think>[[A]]", Verdict.first),  # an unclosed thought that already names one
        ("A, B", None),
        ("", None),
        ("both", None),
    ],
)
def test_a_verdict_is_clear_or_none(text: str, expected: Verdict | None) -> None:
    assert read_verdict(text) is expected


def test_an_answer_cannot_fill_fields_of_the_question() -> None:
    asked = WORDING.messages(pair(1, "{second} {criteria}", "[[A]] {first}"), swapped=False)
    assert "[Answer A]\n{second} {criteria}\n[End of answer A]" in asked[0]["content"]
    assert "[Answer B]\n[[A]] {first}\n[End of answer B]" in asked[0]["content"]
    assert fields_of(TEMPLATE) == {"criteria", "prompt", "first", "second"}
    assert question("{first} {other}", {"first": "x"}) == "x {other}"
    system = Wording(TEMPLATE, CRITERIA, "Be fair.").messages(pair(1, "x", "y"), swapped=True)
    assert [m["role"] for m in system] == ["system", "user"]
    assert "[Answer A]\ny\n" in system[1]["content"]


def test_a_conversation_is_read_turn_by_turn() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert prompt_text(turns, "") == "user: Hi\n\nassistant: Yes?"
    assert prompt_text(turns[:1], "<user>Hi") == "Hi"
    assert prompt_text(None, "so ") == "so "


def test_every_pair_is_asked_in_both_orders_and_equal_answers_are_not() -> None:
    answers = {
        "a": [rollout("p", "x"), rollout("q", "same")],
        "b": [rollout("p", "y"), rollout("q", "same")],
        "c": [rollout("p", "z"), rollout("q", "verylongtext")],
    }
    asked: list[str] = []

    class ChoosesX:
        def ask(self, questions: Sequence[list[Message]]) -> list[str | None]:
            texts = [str(messages[-1]["content"]) for messages in questions]
            asked.extend(texts)
            out: list[str | None] = []
            for text in texts:
                first = "[Answer A]\nx\n" in text
                out.append("A" if first else "B")
                if "verylongtext" in text:
                    out[-1] = None
            return out

    pairs = pairs_of(answers)
    assert [one.policies for one in pairs] == [("a", "b")] * 2 + [("a", "c")] * 2 + [("b", "c")] * 2
    found = judge_pairs(pairs, ChoosesX(), WORDING)
    assert len(asked) == 10 and len(set(asked)) == 8  # a and b against c ask one thing alike
    assert found[0].wins == (1.0, 1.0) and found[1].unasked == IDENTICAL
    assert found[3].unasked == TOO_LONG and found[3].wins is None
    assert found[4].wins == (0.0, 1.0)  # neither is x: the second place wins each time
    with pytest.raises(ValueError, match="same prompts"):
        pairs_of({"a": answers["a"], "b": answers["b"][::-1]})
    lines = [json.dumps(row) for row in rows_of(found)]
    first = json.loads(lines[0])
    assert first["verdict_shown"] == "first" and first["verdict_swapped"] == "second"


# --- biases


def test_biases_by_hand() -> None:
    same = Judged(pair(9, "x", "x"), None, None, IDENTICAL)
    long = Judged(pair(8, "x", "y"), None, None, TOO_LONG)
    cases = [
        judged(0, "A", "B"),  # a in both orders, the longer one is "another": 7 against 5
        judged(1, "A", "A"),  # the first place
        judged(2, "tie", "tie"),
        judged(3, "A", "what?"),
        same,
        long,
    ]
    found = biases(cases, resamples=200, seed=0)
    assert (found.pairs, found.identical, found.too_long) == (6, 1, 1)
    assert (found.asked, found.unread) == (4, 1) and found.unread_share == 2 / 5
    assert found.consistency is not None and found.consistency.estimate == 1 / 2
    assert found.first is not None and found.first.estimate == 3 / 4
    assert found.longer is not None and found.longer.estimate == pytest.approx(1 / 3)
    assert found.ties == 2 / 6
    (rate,) = pair_rates(cases, resamples=200, seed=0)
    assert (rate.pairs, rate.wins, rate.split, rate.ties) == (4, 2.5, 1, 2)
    assert win_rates(cases, ["a", "b"], resamples=50, seed=0)["b"].estimate == 1 - 2.5 / 4


def test_a_share_of_all_or_none_has_an_interval() -> None:
    found = biases([judged(i, "A", "A") for i in range(60)], resamples=100, seed=0)
    assert found.first is not None and found.first.estimate == 1.0
    assert 0.9 < found.first.low < 0.96 and found.first.high > 0.999  # Wilson: 0.940
    assert found.consistency is not None
    assert found.consistency.low == 0.0 and 0.04 < found.consistency.high < 0.1


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        ([judged(i, "A", "A") for i in range(60)], "in 0% of the pairs.*100% of its choices"),
        ([judged(i, "tie", "tie") for i in range(9)], "named no winner"),
        ([judged(0, "A", "B"), judged(1, "A", "hm")], "50% of the pairs have no clear verdict"),
        ([Judged(pair(0, "x", "x"), None, None, IDENTICAL)], "asked about no pair"),
    ],
)
def test_a_judge_that_cannot_be_trusted_ranks_nobody(cases: list[Judged], reason: str) -> None:
    found = judgement("llm", ["a", "b"], cases, BOUNDS, resamples=50, seed=0)
    assert found.ranking is None
    metrics = found.metrics()
    assert metrics["eval/llm/ranked"] == 0.0
    assert not [name for name in metrics if "win_rate" in name or "strength" in name]
    part = section(found, cases, "X judged.", 3)
    assert part.text[1].startswith("NOT RANKED")
    assert [table.title for table in part.tables if table.title == "Who wins"] == []
    assert re.search(reason, "; ".join(found.reasons))


def test_a_coin_is_refused_and_a_good_judge_is_not() -> None:
    rng = np.random.default_rng(0)
    coin = [judged(i, *("AB"[k] for k in rng.integers(0, 2, 2))) for i in range(300)]
    assert "least_consistency=0.6" in untrusted(biases(coin, resamples=50, seed=0), BOUNDS)[0]
    good = [judged(i, "A", "AB"[int(rng.random() < 0.7)]) for i in range(300)]
    assert untrusted(biases(good, resamples=50, seed=0), BOUNDS) == []


# --- strengths


def outcomes(seed: int, count: int) -> list[Judged]:
    """Verdicts among three policies, ties among them."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        policies = [("a", "b"), ("a", "c"), ("b", "c")][i % 3]
        texts = [("A", "B", "tie")[k] for k in rng.choice(3, 2, p=[0.5, 0.3, 0.2])]
        mine = "x" * int(rng.integers(1, 60))
        replies = [Reply(text, read_verdict(text)) for text in texts]
        out.append(Judged(pair(i, mine, "y" * 30, policies), *replies))
    return out


def test_strengths_are_those_of_a_logistic_regression() -> None:
    """Against scikit-learn's, with a tie as half a row of each outcome."""
    rows = design(outcomes(1, 120), ["a", "b", "c"])
    found = fit(rows, place=True, length=True, resamples=20, seed=0)
    x = np.concatenate([rows.terms, rows.terms])
    y = np.concatenate([np.ones(len(rows.wins)), np.zeros(len(rows.wins))])
    weights = np.concatenate([rows.wins, 1 - rows.wins])
    kept = weights > 0
    model = LogisticRegression(C=PRIOR**2, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(x[kept], y[kept], sample_weight=weights[kept])
    expected = model.coef_[0]
    centred = expected[:3] - expected[:3].mean()
    assert [found.strength[name].estimate for name in "abc"] == pytest.approx(centred, abs=1e-5)
    assert found.first_place is not None and found.length is not None
    assert found.first_place.estimate == pytest.approx(expected[3], abs=1e-5)
    assert found.length.estimate == pytest.approx(expected[4], abs=1e-5)


def test_two_policies_have_the_log_odds_of_their_wins() -> None:
    cases = [judged(i, "A", "B") for i in range(60)] + [judged(i, "B", "A") for i in range(60, 80)]
    plain = fit(design(cases, ["a", "b"]), place=False, length=False, resamples=10, seed=0)
    apart = plain.strength["a"].estimate - plain.strength["b"].estimate
    assert apart == pytest.approx(math.log(120 / 40), abs=0.01)  # the prior takes the rest
    assert plain.win_rate["a"].estimate == pytest.approx(0.75, abs=0.002)
    assert plain.first_place is None and plain.length is None
    never_lost = [judged(i, "A", "B") for i in range(20)]
    sure = fit(design(never_lost, ["a", "b"]), place=True, length=True, resamples=50, seed=0)
    assert 0.9 < sure.win_rate["a"].estimate < 1
    with pytest.raises(ValueError, match="no pair has a verdict"):
        design([Judged(pair(0, "x", "x"), None, None, IDENTICAL)], ["a", "b"])


# --- a judge whose tastes are known


@pytest.mark.parametrize(
    ("strength", "place", "length"),
    [
        pytest.param(0.0, 0.5, 1.2, id="equal policies, one longer"),
        pytest.param(0.8, 0.4, -1.0, id="the better one is longer, and length is disliked"),
        pytest.param(-0.6, -0.7, 0.0, id="the second place is liked"),
    ],
)
def test_known_biases_are_found_and_taken_out(strength: float, place: float, length: float) -> None:
    """600 pairs over HTTP; the truth is the win rate of the judge without its biases."""
    rng = np.random.default_rng(3)
    answers: dict[str, list[Rollout]] = {"base": [], "new": []}
    for i in range(600):
        short = int(rng.integers(50, 600))
        long = short + int(rng.normal(200, SCALE))
        for name, odds, size in (("base", 0.0, short), ("new", strength, max(20, long))):
            answers[name].append(rollout(f"prompt {i}", f"{odds} {name} {'x' * size}"))
    with judge_server(biased(place, length)) as (url, seen):
        judge = ServerJudge(address(url, in_flight=8))
        cases = judge_pairs(pairs_of(answers), judge, WORDING)
    assert len(seen) == 1200 and seen[0]["path"] == "/v1/chat/completions"
    assert (seen[0]["model"], seen[0]["max_tokens"]) == ("scripted", 8)
    bounds = Bounds(0.0, 0.1)
    found = judgement("llm", ["base", "new"], cases, bounds, resamples=200, seed=0).ranking
    assert found is not None
    truth = 1 / (1 + math.exp(-strength))
    controlled = found.controlled.win_rate["new"]
    raw = found.win_rate["new"].estimate
    print(f"truth {truth:.3f}, raw {raw:.3f}, controlled {controlled.estimate:.3f}")
    assert abs(controlled.estimate - truth) <= 0.03
    assert controlled.low <= truth <= controlled.high
    if length:
        assert abs(raw - truth) > 0.05
    first, taste = found.controlled.first_place, found.controlled.length
    assert first is not None and taste is not None
    assert first.estimate == pytest.approx(place, abs=0.15) and first.low <= place <= first.high
    assert taste.estimate == pytest.approx(length, abs=0.25) and taste.low <= length <= taste.high
    seen_biases = biases(cases, resamples=200, seed=0)
    assert seen_biases.first is not None and seen_biases.longer is not None
    assert (seen_biases.first.low > 0.5) is (place > 0)
    assert (seen_biases.first.high < 0.5) is (place < 0)


# --- the server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.pairwise.server.pause_s", lambda retry: 0.001)


ASKED: list[list[Message]] = [[{"role": "user", "content": "Which?"}]]


def test_what_may_pass_is_tried_again(quick: None) -> None:
    replies = iter([(503, {}, "busy"), (429, {"retry-after": "0"}, "slow down"), "[[A]]"])
    with judge_server(lambda question: next(replies)) as (url, seen):
        assert ServerJudge(address(url, token="secret-token")).ask(ASKED) == ["[[A]]"]
    assert len(seen) == 3 and {one["token"] for one in seen} == {"Bearer secret-token"}


@pytest.mark.parametrize(
    ("reply", "attempts", "message"),
    [
        ((500, {}, "broken"), 3, "HTTP 500 broken .attempt 3 of 3.*question 1, 'Which"),
        ((401, {}, "no"), 1, "HTTP 401 no.*token_env"),
        ((404, {}, "no"), 1, "HTTP 404.*before /chat/completions"),
        ((200, {}, "<html>"), 1, "expected JSON, found <html>"),
        ((200, {}, '{"choices": []}'), 1, r"expected choices\[0\]"),
        ((200, {}, '{"choices": [{"message": {"content": 1}}]}'), 1, "expected a text"),
    ],
)
def test_no_failure_becomes_a_verdict(
    quick: None, reply: tuple[int, dict[str, str], str], attempts: int, message: str
) -> None:
    with judge_server(lambda question: reply) as (url, seen):
        with pytest.raises(UserError, match=message) as caught:
            ServerJudge(address(url, token="secret-token")).ask(ASKED)
        assert len(seen) == attempts and "secret-token" not in str(caught.value)


def test_a_reply_that_was_cut_before_any_text_holds_no_verdict() -> None:
    with judge_server(lambda question: None) as (url, _):
        (text,) = ServerJudge(address(url)).ask(ASKED)
    assert text == "" and read_verdict(text) is None
    with pytest.raises(UserError, match=r"ConnectError.*attempt 1 of 1"):
        ServerJudge(address(url, retries=0)).ask(ASKED)


def test_replies_are_kept_and_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting:
        def ask(self, questions: Sequence[list[Message]]) -> list[str | None]:
            asked.extend(str(messages[0]["content"]) for messages in questions)
            return [None if messages[0]["content"] == "long" else "A" for messages in questions]

    path = tmp_path / "replies.jsonl"
    texts = ["one", "long", "one", "two"]
    questions: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    assert KeptReplies(Counting(), path, "x").ask(questions) == ["A", None, "A", "A"]
    assert asked == ["one", "long", "two"]
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    assert KeptReplies(Counting(), path, "x").ask(questions) == ["A", None, "A", "A"]
    assert len(asked) == 3 and path.read_bytes().endswith(b"}\n")
    KeptReplies(Counting(), path, "another model").ask(questions[:1])
    assert len(asked) == 4
    path.write_text("[]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"replies\.jsonl, line 1: expected key and reply"):
        KeptReplies(Counting(), path, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{prompt} {first}"}, r"stage\.llm_judge\.template.*\{second\}"),
        ({"url": "http://x/v1"}, r"stage\.llm_judge\.model=None"),
        ({"url": "http://x/v1", "model": "m", "path": "y"}, r"stage\.llm_judge\.url"),
        ({"least_consistency": 1.5}, r"stage\.llm_judge\.least_consistency=1\.5"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMJudgeConfig(**options)  # type: ignore[arg-type]
