"""Evaluation: figures by hand, intervals against theory, judges on texts whose verdict is plain,
the stage on policies whose distance is known.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.choices import Judge, ModelKind
from conf.schema import ModelConfig, TinyConfig
from eval.compare import Answers, Comparison, compare, side_by_side
from eval.judges import ClassifierJudge, FunctionJudge, LexiconJudge, judged_text
from eval.report import comparison as report
from eval.statistics import bootstrap_mean, distinct_n, paired_difference, per_prompt
from rlhf.cli import config
from rlhf.data.recipes import smollm2
from rlhf.models.loading import load_causal_lm, train_tokenizer
from rlhf.run.context import RunContext
from rlhf.stages import eval as stage
from rlhf.stages.evaluation.policies import response_kl
from rlhf.types import Prompt, Rollout, Scores, UserError
from tests import toys


def rollout(
    prompt: str, text: str, tokens: int = 3, reason: str = "stop", source: object = None
) -> Rollout:
    return Rollout(
        Prompt(prompt, prompt, (1,), source=source),
        text,
        list(range(tokens)),
        [0.0] * tokens,
        reason,
        0,
    )


# --- figures
# ------------------------------------------------------------------------------------------


def test_distinct_n_by_hand() -> None:
    assert distinct_n([list("abab"), list("ab")], 2) == 2 / 4  # ab, ba, ab, ab
    assert distinct_n([list("aaa")], 1) == pytest.approx(1 / 3)
    assert distinct_n([["a"], []], 2) == 0.0
    with pytest.raises(ValueError, match="n >= 1"):
        distinct_n([], 0)


def test_prompts_count_once_whatever_their_responses() -> None:
    assert per_prompt([1.0, 3.0, 10.0], ["a", "a", "b"]).tolist() == [2.0, 10.0]
    interval = paired_difference(
        [0.0, 0.0, 0.0], [1.0, 3.0, 10.0], ["a", "a", "b"], resamples=50, seed=0
    )
    assert interval.estimate == 6.0 and interval.low >= 2.0 and interval.high <= 10.0


def test_interval_is_the_normal_one_where_that_holds() -> None:
    """The mean of 400 draws: the percentile interval is near mean +- 1.96 s / sqrt(N)."""
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    interval = bootstrap_mean(values, resamples=4000, seed=0)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.estimate == values.mean()
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    intervals = [
        bootstrap_mean(rng.normal(0.0, 1.0, 60), resamples=300, seed=i) for i in range(200)
    ]
    assert 0.88 <= sum(i.low <= 0.0 <= i.high for i in intervals) / 200 <= 0.99


def test_pairing_takes_out_what_prompts_differ_by() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0.0, 100.0, 50)
    ids = [str(i) for i in range(50)]
    interval = paired_difference(
        base.tolist(), (base + 1.0 + rng.normal(0.0, 0.1, 50)).tolist(), ids, resamples=500, seed=0
    )
    assert 0.9 < interval.low < interval.high < 1.1
    assert paired_difference(base.tolist(), base.tolist(), ids, resamples=10, seed=0).high == 0.0


def test_same_seed_same_interval_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=30)
    first = bootstrap_mean(values, resamples=100, seed=7)
    assert (
        bootstrap_mean(values, resamples=100, seed=7)
        == first
        != bootstrap_mean(values, resamples=100, seed=8)
    )
    monkeypatch.setattr("eval.statistics._BLOCK", 30 * 7)  # 7 resamples at a time
    assert bootstrap_mean(values, resamples=100, seed=7) == first


@pytest.mark.parametrize(("values", "ids"), [([], []), ([1.0], ["a", "b"])])
def test_values_without_a_prompt_are_an_error(values: list[float], ids: list[str]) -> None:
    with pytest.raises(ValueError, match="prompt ids"):
        per_prompt(values, ids)


# --- judges
# ------------------------------------------------------------------------------------------


def test_lexicon_reads_prompt_and_response() -> None:
    good, bad, turned = LexiconJudge().judge(
        [
            rollout("the film", " is a wonderful delight"),
            rollout("the film", " is awful"),
            rollout("not", " good"),
        ]
    )
    assert good > 0.5 and bad < -0.3 and turned < 0


def test_a_chat_prompt_is_not_judged() -> None:
    assert (
        judged_text(rollout("<user> awful", "great", source=[{"role": "user", "content": "awful"}]))
        == "great"
    )
    assert judged_text(rollout("so ", "great", source="so ")) == "so great"


def test_classifier_learns_its_rows() -> None:
    rows = [
        {"text": f"a {word} film number {i}", "label": label}
        for i in range(20)
        for word, label in (("superb", 1), ("dire", 0))
    ]
    judge = ClassifierJudge.from_rows(rows, "judge.jsonl")
    good, bad = judge.judge([rollout("a superb", " film"), rollout("a dire", " film")])
    assert good > 0.7 and bad < 0.3
    assert judge.judge([]) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "x", "label": 1}, {"text": "y", "label": "good"}],
            r"row 2: expected a text and a label of 0 or 1, found .*'good'",
        ),
        (
            [{"review": "x", "label": 1}],
            r"row 1: expected a text .* found keys \['label', 'review'\]",
        ),
        ([{"text": "x", "label": 1}] * 3, r"needs texts of two labels, 0 and 1; found \[1\]"),
    ],
)
def test_classifier_names_the_row_that_does_not_fit(
    rows: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ClassifierJudge.from_rows(rows, "judge.jsonl")


def test_function_judge_is_its_scorer() -> None:
    class Lengths:
        def score(self, rollouts: Sequence[Rollout]) -> Scores:
            return Scores([float(len(r.text)) for r in rollouts], {})

    assert FunctionJudge(Lengths()).judge([rollout("p", "abc"), rollout("p", "")]) == [3.0, 0.0]


def test_verifiable_preference() -> None:
    chat: list[Any] = [
        [{"role": "assistant", "content": "Clearly, the critic liked it."}],
        [{"role": "assistant", "content": "Perhaps clearly,"}],
    ]
    assert smollm2.decided(chat) == [1.0, 0.0]
    assert smollm2.decided([" Clearly, so", "clearly, so"], prompts=["a", "b"]) == [1.0, 0.0]


# --- before and after
# ------------------------------------------------------------------------------------------


def answers(
    texts: Sequence[str], scores: Sequence[float], tokens: Sequence[int], reason: str = "stop"
) -> Answers:
    rollouts = [
        rollout(f"p{i}", text, n, reason)
        for i, (text, n) in enumerate(zip(texts, tokens, strict=True))
    ]
    return Answers(rollouts, {"score": list(scores), "lexicon": [s / 10 for s in scores]})


@pytest.fixture
def comparison() -> Comparison:
    before = answers(["a b c", "a b d"], [0.0, 2.0], [4, 6], reason="length")
    after = answers(["a b", "a b"], [3.0, 5.0], [2, 3])
    return compare(before, after, [1.0, 4.0], resamples=100, seed=0)


def test_figures_by_hand(comparison: Comparison) -> None:
    found = comparison.metrics()
    expected = {
        "eval/score_before": 1.0,
        "eval/score_after": 4.0,
        "eval/score_delta": 3.0,
        "eval/score_low": 3.0,  # both prompts moved by 3
        "eval/score_high": 3.0,
        "eval/score_shift_sd": 3.0,  # the scores before, 0 and 2, have standard deviation 1
        "eval/lexicon_delta": 0.3,
        "eval/length_before": 5.0,
        "eval/length_after": 2.5,
        "eval/finished_before": 0.0,
        "eval/finished_after": 1.0,
        "eval/distinct_2_before": 3 / 4,  # ab bc ab bd
        "eval/distinct_2_after": 1 / 2,
        "eval/distinct_2_ratio": 2 / 3,
        "eval/kl_per_token": 1.0,  # 5 nats over 5 tokens
        "eval/kl_per_response": 2.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_other_prompts_or_judges_are_refused() -> None:
    before, after = answers(["a", "b"], [0, 0], [1, 1]), answers(["a", "b"], [0, 0], [1, 1])
    with pytest.raises(ValueError, match="same prompts"):
        compare(
            before, Answers(after.rollouts[::-1], after.judgements), [0, 0], resamples=1, seed=0
        )
    with pytest.raises(ValueError, match="different judges"):
        compare(before, Answers(after.rollouts, {"score": [0, 0]}), [0, 0], resamples=1, seed=0)


def test_scores_that_do_not_vary_have_no_deviation_to_count_in() -> None:
    same = compare(
        answers(["a", "b"], [1, 1], [1, 1]),
        answers(["a", "b"], [2, 2], [1, 1]),
        [0, 0],
        resamples=5,
        seed=0,
    )
    assert same.score_shift is None and "eval/score_shift_sd" not in same.metrics()


def test_report_shows_the_figures(comparison: Comparison, tmp_path: Path) -> None:
    rows = {row["figure"]: row for row in report.table_rows(comparison)}
    assert rows["reward-model score"] == {
        "figure": "reward-model score",
        "before": "1.000",
        "after": "4.000",
        "difference [95 %]": "+3.000  [+3.000, +3.000]",
    }
    assert rows["distinct-2"]["difference [95 %]"] == "-0.250  (67% of before)"
    assert rows["KL (nats per token)"]["after"] == "1.000"
    values = {
        "score": {"before": [0.0, 2.0], "after": [3.0, 5.0]},
        "lexicon": {"before": [1.0, 1.0], "after": [1.0, 1.0]},
    }
    paths = list(report.plot(comparison, values, tmp_path / "plots").values())
    assert [path.name for path in paths] == [
        "histogram_score.png",
        "histogram_lexicon.png",
        "differences.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_samples_hold_both_responses() -> None:
    before, after = answers(["old", "x"], [0, 1], [1, 1]), answers(["new", "y"], [2, 3], [5, 1])
    rows = side_by_side(before, after, [0.5, 0.0])
    assert rows[0] == {
        "prompt": "p0",
        "response_before": "old",
        "response": "new",
        "score_before": 0,
        "score": 2,
        "lexicon_before": 0.0,
        "lexicon": 0.2,
        "kl": 0.5,
        "response_length": 5,
        "finish_reason": "stop",
    }
    assert report.sample_rows(rows, 1) == [
        {"prompt": "p0", "before": "old", "after": "new", "score_before": 0, "score": 2}
    ]


# --- the stage
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `start` and `moved`: a random tiny policy, and the same with even token ids about
    e times as likely.

    The first hidden feature is large and the same at every position, so its column of the head acts
    as a bias.
    """
    folder = tmp_path_factory.mktemp("policies")
    tokenizer = train_tokenizer(["alpha beta gamma delta 0 1 2 3"], 300, 64)
    tiny = TinyConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        layers=1,
        heads=1,
        max_positions=64,
        tie_embeddings=False,
    )
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(kind=ModelKind.tiny, tiny=tiny), tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 1.0
    for name, push in (("start", 0.0), ("moved", 1.0 / math.sqrt(32))):
        with torch.no_grad():
            model.lm_head.weight[0::2, 0] += push
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    train_tokenizer(["epsilon zeta"], 280, 64).save_pretrained(folder / "other")
    (folder / "other" / "config.json").write_text((folder / "start" / "config.json").read_text())
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    return folder


def run_eval(
    policies: Path, folder: Path, before: str, after: str, *overrides: str
) -> dict[str, float]:
    base = [
        "stage=eval",
        "rollout=hf",
        "tracking=none",
        f"run.dir={folder}",
        f"data.eval_path={policies / 'prompts.jsonl'}",
    ]
    base += [
        f"stage.before={policies / before}",
        f"stage.after={policies / after}",
        "rollout.max_response_length=8",
        "data.max_prompt_length=16",
    ]
    cfg = config.compose(
        [*base, "reward.function=tests.toys:even_first_token", "stage.bootstrap=50", *overrides]
    )
    stage.run(RunContext.open(cfg, ()))
    summary = json.loads(
        (folder / cfg.run.name / "eval" / "summary.json").read_text(encoding="utf-8")
    )
    assert summary["stage"] == "eval" and summary["model"] is None
    return summary["metrics"]


def test_a_policy_against_itself_differs_in_nothing(policies: Path, tmp_path: Path) -> None:
    found = run_eval(policies, tmp_path, "start", "start", "stage.judges=[lexicon]")
    assert found["eval/kl_per_token"] == 0.0
    assert all(value == 0.0 for name, value in found.items() if name.endswith("_delta"))
    assert found["eval/distinct_2_ratio"] == 1.0


def test_a_policy_that_moved(
    policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = ("stage.judges=[function]", "stage.judge_function=tests.toys:short_is_good")
    found = run_eval(policies, tmp_path, "start", "moved", "stage.samples_per_prompt=4", *judged)
    assert found["eval/score_low"] > 0 and found["eval/score_shift_sd"] > 0
    assert found["eval/function_after"] == -found["eval/length_after"]
    assert found["eval/kl_per_token"] > 0.01 and found["eval/kl_per_response_low"] > 0
    run = tmp_path / "default" / "eval"
    rows = [
        json.loads(line)
        for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == 16 * 4 and rows[0]["response_before"] != rows[0]["response"]
    assert sum(row["kl"] for row in rows) / sum(
        row["response_length"] for row in rows
    ) == pytest.approx(found["eval/kl_per_token"], rel=1e-5)
    assert {"histogram_score.png", "differences.png"} <= {
        path.name for path in (run / "plots").glob("*.png")
    }
    assert "on 16 held-out prompts" in capsys.readouterr().out


def test_greedy_writes_the_most_likely_tokens(policies: Path, tmp_path: Path) -> None:
    """The same responses whatever the seed, and they are the arg max token by token; sampling
    differs from them.
    """

    def responses(name: str, *overrides: str) -> tuple[list[str], list[str]]:
        run_eval(policies, tmp_path, "start", "moved", f"run.name={name}", *overrides)
        lines = (
            (tmp_path / name / "eval" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        )
        return [json.loads(line)["response_before"] for line in lines], [
            json.loads(line)["response"] for line in lines
        ]

    before, after = responses("a", "stage.greedy=true", "run.seed=1")
    assert (
        responses("b", "stage.greedy=true", "run.seed=2")
        == (before, after)
        != responses("c", "run.seed=1")
    )
    tokenizer = AutoTokenizer.from_pretrained(policies / "moved")
    model = AutoModelForCausalLM.from_pretrained(policies / "moved", dtype=torch.float32).eval()
    ids = tokenizer(str(toys.prompt_rows()[0]["prompt"]), return_tensors="pt")["input_ids"]
    written: list[int] = []
    while len(written) < 8 and tokenizer.eos_token_id not in written:
        with torch.no_grad():
            written.append(
                int(
                    model(torch.cat([ids, torch.tensor([written], dtype=torch.long)], dim=1))
                    .logits[0, -1]
                    .argmax()
                )
            )
    assert after[0] == tokenizer.decode(written, skip_special_tokens=True)
    with pytest.raises(
        UserError, match=r"stage\.samples_per_prompt=2 is out of range: expected 1 with greedy=true"
    ):
        config.compose(["stage=eval", "stage.greedy=true", "stage.samples_per_prompt=2"])


def test_kl_is_that_of_whole_distributions(policies: Path) -> None:
    """response_kl against log-softmax over all logits, one row at a time, in float64."""
    start, moved = (
        AutoModelForCausalLM.from_pretrained(policies / name, dtype=torch.float32).eval()
        for name in ("start", "moved")
    )
    rollouts = [
        Rollout(Prompt(str(i), "", tuple(range(5, 6 + i))), "", [7, 3, 9][: i + 1], [], "stop", 0)
        for i in range(3)
    ]
    cfg = config.compose(
        [
            "stage=eval",
            f"stage.before={policies / 'start'}",
            f"stage.after={policies / 'moved'}",
            "data.eval_path=x",
            "engine.micro_tokens=8",
        ]
    )
    found = response_kl(
        lambda: moved,
        lambda: start,
        rollouts,
        tokenizer=SimpleNamespace(pad_token_id=0),
        temperature=cfg.rollout.temperature,
        logits_chunk=cfg.engine.logits_chunk,
        micro_tokens=cfg.engine.micro_tokens,
    )
    for value, one in zip(found, rollouts, strict=True):
        ids = torch.tensor([[*one.prompt.token_ids, *one.token_ids]])
        with torch.no_grad():
            new, old = (model(ids).logits[0].double().log_softmax(-1) for model in (moved, start))
        first = len(one.prompt.token_ids)
        expected = sum(
            float(new[first - 1 + t, token] - old[first - 1 + t, token])
            for t, token in enumerate(one.token_ids)
        )
        assert value == pytest.approx(expected, abs=1e-5)


def test_other_tokenizers_are_refused(policies: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different vocabularies"):
        run_eval(policies, tmp_path, "start", "other")


def test_missing_policies_and_judges_are_named(policies: Path) -> None:
    cfg = config.compose(["stage=eval", "data.eval_path=x", f"stage.before={policies / 'start'}"])
    with pytest.raises(UserError, match=r"stage\.after is not set"):
        stage._paths(cfg.stage)
    cfg.stage.judges = [Judge.classifier]
    with pytest.raises(UserError, match=r"stage\.judge_path is not set"):
        stage.make_judges(cfg.stage, None)
    cfg.stage.judges = [Judge.function]
    with pytest.raises(UserError, match=r"stage\.judge_function is not set"):
        stage.make_judges(cfg.stage, None)


@pytest.mark.vllm
def test_vllm_writes_as_both_policies(policies: Path, tmp_path: Path) -> None:
    """One engine, weights replaced in between: the sync is proved inside, and the same figures move
    as with Hugging Face generate.
    """
    found = run_eval(
        policies, tmp_path, "start", "moved", "rollout=vllm", "stage.samples_per_prompt=4"
    )
    assert found["eval/score_low"] > 0 and found["eval/kl_per_token"] > 0.01
