"""Reward terms: from the command line, weights, clipping, normalisation over ranks and restarts,
ensembles, and what preflight refuses.
"""

import inspect
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import Combine, CriticInit, TermKind
from conf.schema import RewardConfig, RewardTerm
from conf.stages import OnlineStage
from reward import terms
from reward.base import Stateless
from reward.scorers import computed
from reward.scorers.computed import CompositeScorer, FunctionScorer, Term, band_score
from reward.scorers.reward_model import EnsembleScorer, RewardModelScorer, combine
from reward.terms import make_scorer
from rlhf.cli import config, presets
from rlhf.types import Prompt, Rollout, Scores, UserError
from tests.checking import check
from tests.offline.trl_tools import tiny_tokenizer
from tests.reward.test_scorer import rollout, save_reward_model, some_rollouts

CPU = torch.device("cpu")


def plain(text: str, name: str = "p0", tokens: int | None = None, **fields: Any) -> Rollout:
    """A response without a model."""
    ids = list(range(tokens if tokens is not None else len(text.split())))
    return Rollout(
        Prompt(id=name, text=f"ask {name}", token_ids=(1, 2), fields=fields),
        text,
        ids,
        [0.0] * len(ids),
        "stop",
        0,
    )


class Fixed(Stateless):
    """A scorer that says what it was told to."""

    def __init__(self, values: list[float], **extras: list[float]) -> None:
        self.values, self.extras = values, extras

    def score(self, rollouts: Any) -> Scores:
        return Scores(total=self.values, terms={"x": self.values}, extras=self.extras)


def one(name: str = "a", **options: Any) -> RewardConfig:
    return RewardConfig(terms={name: RewardTerm(**options)})


# --- from the command line


def test_terms_come_from_the_command_line() -> None:
    given_ = [
        "stage=ppo",
        "+reward.terms.brevity.kind=length",
        "+reward.terms.brevity.weight=0.1",
        "reward.terms.brevity.high=20",
    ]
    assert config.compose(given_).reward.terms == {
        "brevity": RewardTerm(kind=TermKind.length, weight=0.1, high=20)
    }
    both = config.compose(
        [
            *given_,
            "+reward.terms.f={kind:function,function:'m:f'}",
            "++reward.terms.brevity.weight=0.3",
        ]
    ).reward.terms
    assert both["brevity"].weight == 0.3 and both["f"].function == "m:f"
    listed = config.compose(
        ["stage=ppo", "+reward.terms.m.kind=model", "+reward.terms.m.paths=[a,b]"]
    ).reward.terms
    assert listed["m"].paths == ["a", "b"]


def test_a_preset_s_term_is_changed_not_replaced() -> None:
    found = config.compose(
        ["stage=ppo", "reward=math", "reward.terms.correct.weight=2"]
    ).reward.terms
    assert (
        found["correct"] == RewardTerm(kind=TermKind.math, weight=2.0)
        and found["format"].weight == 0.1
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+reward.terms.brevity.knd=length",
            "reward.terms.brevity.knd: no such option of stage=ppo. Nearest: "
            "reward.terms.brevity.kind.",
        ),
        ("reward.terms.brevity.wieght=1", "Nearest: reward.terms.brevity.weight."),
        (
            "+reward.terms.brevity={kind:length,hihg:3}",
            "reward.terms.brevity.hihg: no such option of stage=ppo. Nearest: "
            "reward.terms.brevity.high.",
        ),
        ("+reward.terms={brevity:{kind:length,hihg:3}}", "Nearest: reward.terms.brevity.high."),
        ("+reward.terms.brevity.kind=lenght", "Invalid value 'lenght', expected one of [model,"),
        ("+reward.terms.brevity.weight=1", "reward.terms.brevity.kind: "),
        ("+reward.terms.score.kind=length", "reward.terms='score' is out of range"),
        ("+reward.terms={a-b:{kind:length}}", "reward.terms='a-b' is out of range"),
        ("+reward.terms.b={kind:length,ramp:0}", "reward.terms.b.ramp=0 is out of range"),
        ("+reward.terms.b={kind:choice,letters:AA}", "reward.terms.b.letters='AA' is out of range"),
        ("+reward.terms.b={kind:length,low:5,high:4}", "reward.terms.b.high=4 is out of range"),
    ],
)
def test_bad_terms_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.compose(["stage=ppo", override])
    assert message in str(error.value)


def test_a_sweep_over_a_term_stays_a_sweep() -> None:
    assert config.prepare(["reward.terms.b.weight=0.1,0.2", "+run.seed=1"]) == [
        "++reward.terms={b:{weight:0.1}},{b:{weight:0.2}}",
        "+run.seed=1",
    ]


@pytest.mark.parametrize("preset", [name for name in presets.choices("reward") if name != "model"])
def test_every_preset_s_terms_have_what_they_need(preset: str) -> None:
    found = config.compose(["stage=ppo", f"reward={preset}"]).reward
    assert found.terms
    terms.check_terms(found)


# --- the sum


def test_total_is_the_weighted_sum_of_clipped_values_and_terms_stay_raw() -> None:
    scorer = CompositeScorer(
        [
            Term("a", Fixed([1.0, -5.0, 3.0], spread=[0.1, 0.2, 0.3]), weight=2.0, clip=2.0),
            Term("b", Fixed([10.0, 20.0, 30.0]), weight=-0.1),
        ]
    )
    found = scorer.score([plain("x")] * 3)
    assert found.total == pytest.approx([2 * 1 - 1, 2 * -2 - 2, 2 * 2 - 3])
    assert found.terms == {"a": [1.0, -5.0, 3.0], "b": [10.0, 20.0, 30.0]}
    assert found.extras == {"a_spread": [0.1, 0.2, 0.3], "a_clipped": [0.0, 1.0, 1.0]}


def test_normalisation_uses_everything_seen_and_only_clipped_values() -> None:
    source = Fixed([1.0, 2.0, 9.0])
    scorer = CompositeScorer([Term("a", source, clip=4.0, normalise=True)])
    first = [1.0, 2.0, 4.0]
    mean, std = statistics.mean(first), statistics.stdev(first)
    assert scorer.score([plain("x")] * 3).total == pytest.approx([(v - mean) / std for v in first])
    source.values = [0.0]
    mean, std = statistics.mean([*first, 0.0]), statistics.stdev([*first, 0.0])
    assert scorer.score([plain("x")]).total == pytest.approx([-mean / std])
    assert CompositeScorer([Term("a", Fixed([3.0, 3.0]), normalise=True)]).score(
        [plain("x")] * 2
    ).total == [0.0, 0.0]


def test_ranks_share_the_statistics_also_one_without_responses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks, played in turn: the sums that a rank sees are its own plus the other's, which hold
    10 and 14.
    """
    other, asked = [10.0, 14.0], []

    def all_sum(values: Any) -> list[float]:
        asked.append(len(values))
        if len(asked) % 3 == 1:  # how many values there are
            return [values[0] + 2]
        if len(asked) % 3 == 2:  # count and sum
            return [values[0] + 2, values[1] + sum(other)]
        mean = (sum(own) + sum(other)) / (len(own) + 2)
        return [values[0] + sum((v - mean) ** 2 for v in other)]

    monkeypatch.setattr(computed.distributed, "all_sum", all_sum)
    for own in ([2.0, 4.0], []):
        scorer = CompositeScorer([Term("a", Fixed(own), normalise=True)])
        total = scorer.score([plain("x")] * len(own)).total
        mean, std = statistics.mean([*own, *other]), statistics.stdev([*own, *other])
        assert total == pytest.approx([(v - mean) / std for v in own])
        assert scorer.terms[0].moments.count == len(own) + 2
    assert len(asked) == 6


def test_no_responses_at_all_change_nothing() -> None:
    scorer = CompositeScorer([Term("a", Fixed([]), normalise=True)])
    assert scorer.score([]).total == [] and scorer.terms[0].moments.count == 0


def test_a_resumed_scorer_goes_on_where_the_first_stopped() -> None:
    def make() -> CompositeScorer:
        return CompositeScorer(
            [Term("a", Fixed([1.0, 5.0, 6.0]), normalise=True), Term("b", Fixed([0.0, 1.0, 2.0]))]
        )

    first, second = make(), make()
    first.score([plain("x")] * 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for scorer in (first, second):
        scorer.terms[0].scorer = Fixed([2.0, 3.0])
        scorer.terms[1].scorer = Fixed([1.0, 1.0])
    assert first.score([plain("x")] * 2).total == second.score([plain("x")] * 2).total
    assert first.state_dict() == second.state_dict() and set(first.state_dict()) == {"a"}
    with pytest.raises(UserError, match=r"statistics .* a, .*reward\.terms.* none"):
        CompositeScorer([Term("a", Fixed([]))]).load_state_dict(first.state_dict())
    function = FunctionScorer("operator:truth")
    function.load_state_dict(function.state_dict())
    with pytest.raises(UserError, match=r"reward terms a, .*no such terms"):
        function.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan], r"reward\.terms\.a: returned nan for prompt 'p1'"),
        ([1.0, None], "returned None for prompt 'p1'"),
        ([1.0, "2"], "returned '2' for prompt 'p1'"),
        (
            [1.0],
            "expected 2 scores, one per response, found 1; the first response is to prompt 'p0'",
        ),
    ],
)
def test_a_term_without_a_number_stops_the_run(values: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompositeScorer([Term("a", Fixed(values))]).score([plain("x"), plain("y", "p1")])


# --- ensembles


def test_combinations_by_hand() -> None:
    members = [[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]
    spread = math.sqrt(8 / 3)
    assert combine(members, Combine.mean) == ([3.0, 0.0], pytest.approx([spread, 0.0]))
    assert combine(members, Combine.minimum)[0] == [1.0, 0.0]
    assert combine(members, Combine.pessimistic, 0.5)[0] == pytest.approx([3 - 0.5 * spread, 0.0])


@settings(deadline=None)  # a loaded machine is no failure
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5),
    st.floats(0, 3),
)
def test_pessimism_never_exceeds_the_mean_nor_depends_on_order(
    members: list[list[float]], coef: float
) -> None:
    mean, spread = combine(members, Combine.mean)
    low, _ = combine(members, Combine.minimum)
    careful, _ = combine(members, Combine.pessimistic, coef)
    again, _ = combine(members[::-1], Combine.pessimistic, coef)
    assert all(
        a <= m + 1e-9 and s >= 0 and lo <= m + 1e-9
        for a, m, s, lo in zip(careful, mean, spread, low, strict=True)
    )
    assert careful == pytest.approx(again, abs=1e-9)


def test_ensemble_puts_members_on_their_held_out_scale(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_reward_model(tmp_path / "m", tokenizer)
    rollouts = some_rollouts(tokenizer)
    single = RewardModelScorer(str(tmp_path / "m"), RewardConfig(), CPU, policy_tokenizer=tokenizer)
    shifted = RewardModelScorer(
        str(tmp_path / "m"), RewardConfig(), CPU, policy_tokenizer=tokenizer
    )
    # one held-out standard deviation lower, so its scores are one higher
    shifted.manifest = replace(shifted.manifest, score_mean=0.1 - 2.0)
    raw = single.score(rollouts).total
    found = EnsembleScorer([single, shifted], Combine.minimum, 1.0).score(rollouts)
    assert found.total == pytest.approx([(r - 0.1) / 2.0 for r in raw], abs=1e-6)
    assert found.extras["spread"] == pytest.approx([0.5] * len(raw), abs=1e-6)
    shifted.manifest = replace(shifted.manifest, score_std=0.0)
    with pytest.raises(UserError, match=r"score_std .* 0\.0"):
        EnsembleScorer([single, shifted], Combine.mean, 1.0)
    shifted.manifest = replace(shifted.manifest, held_out_texts=0)
    with pytest.raises(UserError, match=r"eval_fraction=0.*data\.eval_path"):
        EnsembleScorer([single, shifted], Combine.mean, 1.0)


# --- from options to scorers


def count_words(completions: list[Any], **columns: Any) -> list[int]:
    return [len(str(c).split()) for c in completions]


async def later(completions: list[Any], answer: list[str]) -> list[float]:
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def test_make_scorer_composes_models_functions_and_lengths(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_reward_model(tmp_path / "m", tokenizer)
    rollouts = [
        rollout(tokenizer, "the film", text, name=f"p{i}", answer="good")
        for i, text in enumerate((" good", " bad film"))
    ]
    options = {
        "alone": RewardTerm(kind=TermKind.model, paths=[str(tmp_path / "m")], weight=0.5),
        "many": RewardTerm(
            kind=TermKind.model, paths=[str(tmp_path / "m")] * 2, combine=Combine.pessimistic
        ),
        "words": RewardTerm(kind=TermKind.function, function=f"{__name__}:count_words"),
        "async_": RewardTerm(kind=TermKind.function, function=f"{__name__}:later"),
        "short": RewardTerm(kind=TermKind.length, high=0, ramp=10),
        "here": RewardTerm(kind=TermKind.exact, normalise=True),
    }
    found = make_scorer(
        RewardConfig(terms=options), device=CPU, policy_tokenizer=tokenizer, training=False
    ).score(rollouts)
    alone = (
        RewardModelScorer(str(tmp_path / "m"), RewardConfig(), CPU, policy_tokenizer=tokenizer)
        .score(rollouts)
        .total
    )
    assert found.terms["alone"] == pytest.approx(alone) and found.terms["many"] == pytest.approx(
        [(a - 0.1) / 2.0 for a in alone]
    )
    assert (
        found.terms["words"] == [1.0, 2.0]
        and found.terms["async_"] == [1.0, 0.0]
        and found.terms["here"] == [1.0, 0.0]
    )
    assert found.extras["many_spread"] == pytest.approx([0.0, 0.0], abs=1e-9)
    expected = [
        0.5 * found.terms["alone"][i]
        + sum(found.terms[name][i] for name in options if name != "alone")
        for i in range(2)
    ]
    assert found.total == pytest.approx(expected), "outside of training nothing is normalised"


def test_a_failing_function_names_the_term() -> None:
    scorer = make_scorer(
        one(kind=TermKind.function, function=f"{__name__}:later"), device=CPU, policy_tokenizer=None
    )
    with pytest.raises(UserError, match=r"reward\.terms\.a\.function=.*:later: .*answer"):
        scorer.score([plain("x")])


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, -1.0), (5, -0.5), (10, 0.0), (20, 0.0), (23, -0.3), (30, -1.0), (500, -1.0)],
)
def test_length_band_by_hand(length: int, expected: float) -> None:
    assert band_score(length, 10, 20, 10) == pytest.approx(expected)


def test_length_in_tokens_and_characters() -> None:
    for unit, expected in (("tokens", -0.3), ("characters", -0.5)):
        term = config.compose(
            ["stage=ppo", f"+reward.terms.a={{kind:length,high:0,ramp:10,unit:{unit}}}"]
        ).reward
        assert make_scorer(term, device=CPU, policy_tokenizer=None).score(
            [plain("abcde", tokens=3)]
        ).total == pytest.approx([expected])


# --- preflight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": TermKind.length}, r"kind=length needs a band: reward\.terms\.a\.low"),
        ({"kind": TermKind.model}, "kind=model needs paths"),
        ({"kind": TermKind.function}, r"needs reward\.terms\.a\.function"),
        (
            {"kind": TermKind.format},
            "needs reward.terms.a.style or reward.terms.a.pattern, found neither",
        ),
        ({"kind": TermKind.remote}, r"needs reward\.terms\.a\.url"),
        (
            {"kind": TermKind.remote, "url": "http://x", "token_env": "NO_SUCH_TOKEN"},
            "token_env=NO_SUCH_TOKEN: this environment variable is not set",
        ),
        (
            {"kind": TermKind.length, "high": 3, "pattern": "x"},
            r"pattern is set, but kind=length doesn't read it .*Leave it out; .*regex, format",
        ),
        (
            {"kind": TermKind.regex, "pattern": "(x"},
            r"reward\.terms\.a \(kind=regex\): '\(x' is no valid pattern",
        ),
        (
            {"kind": TermKind.json_schema, "schema_file": "/no/such.json"},
            "schema_file=/no/such.json: no such file",
        ),
        (
            {"kind": TermKind.function, "function": "no.such:f"},
            r"reward\.terms\.a\.function=no\.such:f: importing no\.such failed",
        ),
    ],
)
def test_terms_that_lack_something_or_have_too_much(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        terms.check_terms(one(**options))


def test_one_source_of_scores() -> None:
    with pytest.raises(UserError, match="found none"):
        terms.check_terms(RewardConfig())
    with pytest.raises(
        UserError,
        match=r"reward\.function=m:f and reward\.terms \(a\): expected one of them, found 2",
    ):
        make_scorer(
            replace(one(kind=TermKind.length, high=1), function="m:f"),
            device=CPU,
            policy_tokenizer=None,
        )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_preflight_looks_at_models_and_rows(tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": "1 + 1", "answer": 2}, {"prompt": "1 + 2", "answer": "three"}],
    )
    overrides = [
        "stage=ppo",
        "model=tiny",
        f"data.path={rows}",
        "tracking=none",
        f"run.dir={tmp_path}/runs",
        "stage.critic_init=policy",
        "rollout=hf",
    ]
    exact = config.compose([*overrides, "+reward.terms.a.kind=exact"])
    assert check(exact) == []
    with pytest.raises(
        UserError,
        match=r"reward\.terms\.a, column 'answer' of .*rows\.jsonl, row 2: expected a number",
    ):
        check(config.compose([*overrides, "+reward.terms.a.kind=numeric"]))
    with pytest.raises(
        UserError,
        match=r"needs the column 'solution', which .*row 1 lacks \(its columns beside the "
        r"prompt: answer\)",
    ):
        check(config.compose([*overrides, "+reward.terms.a={kind:exact,column:solution}"]))
    with pytest.raises(
        UserError, match=rf"reward\.terms\.a\.paths={tmp_path}/none: no such directory"
    ):
        check(
            config.compose([*overrides, f"+reward.terms.a={{kind:model,paths:[{tmp_path}/none]}}"])
        )
    assert isinstance(exact.stage, OnlineStage)
    exact.stage.critic_init = CriticInit.reward
    with pytest.raises(UserError, match=r"critic_init=reward needs reward\.path"):
        check(exact)


def test_every_kind_of_term_has_its_fields_and_its_maker() -> None:
    assert set(terms.FIELDS) == set(TermKind)
    branches = inspect.getsource(terms.make_term)
    for kind in set(TermKind) - set(terms.VERIFIED):
        assert f"TermKind.{kind.name}:" in branches or kind in terms.SCORERS


def test_every_kind_that_verifies_has_its_verifier() -> None:
    assert terms.VERIFIERS.keys() == terms.VERIFIED
