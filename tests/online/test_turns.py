"""What a step makes of episodes: tensors, penalties, figures, samples and dumps."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import Advantage, KLEstimator, TermKind
from conf.reward import EnvironmentConfig, EnvironmentKind, RewardConfig, RewardTerm, TurnCredit
from conf.stages import OnlineStage
from reward.base import environment_weight, refuse_turns
from reward.scorers.computed import CompositeScorer, FunctionScorer, LengthScorer, Term
from reward.scorers.environment import EnvironmentScorer
from reward.terms import check_fields, make_scorer
from rlhf.checks.inputs import refuse_texts
from rlhf.online.ahead import Writer
from rlhf.online.collect import Collected, Collector, final_scores, train_batch
from rlhf.online.judging import HeldOutJudge
from rlhf.online.metrics import sample_rows, step_metrics
from rlhf.online.recovery import write_bad_batch
from rlhf.online.watch import response_statistics
from rlhf.process.distributed import RunningMoments
from rlhf.run.console import samples_table
from rlhf.stages.online import check_turns
from rlhf.types import Prompt, Rollout, Scores, Turn, UserError
from tests.composing import composed

PROMPT = Prompt("p", "How many?", (1, 2))
# Seven tokens, of which the environment wrote the third and the fourth.
GUESSED = Rollout(
    PROMPT,
    "12",
    [10, 11, 20, 21, 12, 13, 14],
    [-1.0, -2.0, 0.0, 0.0, -3.0, -4.0, -5.0],
    "stop",
    3,
    turns=(
        Turn(0, 2, "7?", -0.25, "\n more", "more", took_s=0.5),
        Turn(4, 7, "12", 1.0, "", took_s=1.0),
    ),
    success=True,
    info={"broken_calls": 1.0},
)
FAILED = Rollout(
    PROMPT,
    "3?",
    [15, 16, 17],
    [-1.0, -1.0, -1.0],
    "turns",
    3,
    turns=(Turn(0, 3, "3?", -0.5, "", took_s=0.3),),
    success=False,
)


def collected(rollouts: Sequence[Rollout], groups: Sequence[int] = (0, 0)) -> Collected:
    total = EnvironmentScorer(RewardTerm(kind=TermKind.environment)).score(rollouts).total
    return Collected(
        rollouts=list(rollouts),
        scores=Scores(total, {"episode": total}),
        finals=torch.tensor(total),
        groups=list(groups),
        rows=list(range(len(rollouts))),
        pairs=[],
        baselines=None,
        draws=1,
        clipped=0.0,
    )


# ---- tensors ----


def test_the_batch_of_episodes_hand_computed() -> None:
    batch = train_batch(
        collected([GUESSED, FAILED]), 0, mask_truncated=True, version=5, turn_weight=2.0
    )
    written = [True, True, False, False, True, True, True]
    assert batch.mask.tolist() == [written, [True] * 3 + [False] * 4]
    assert batch.tokens.response_ids.tolist() == [GUESSED.token_ids, [15, 16, 17, 0, 0, 0, 0]]
    assert batch.tokens.positions[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.tokens.prompt_lengths.tolist() == [2, 2]
    assert batch.keep.tolist() == [True, False]  # its turns ran out
    assert batch.rollout_logprobs[0].tolist() == GUESSED.rollout_logprobs
    assert batch.staleness is not None
    assert batch.staleness.tolist() == [[2.0, 2, 0, 0, 2, 2, 2], [2.0, 2, 2, 0, 0, 0, 0]]
    assert batch.turns is not None and batch.turn_rewards is not None
    assert batch.turns.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0] * 7]
    assert batch.turn_rewards.tolist() == [[0, -0.5, 0, 0, 0, 0, 2.0], [0, 0, -1.0, 0, 0, 0, 0]]


def test_the_stage_says_where_rewards_stand() -> None:
    for credit, stands in ((TurnCredit.episode, False), (TurnCredit.turn, True)):
        stage = OnlineStage(turn_credit=credit)
        writer: Any = Writer(None, [], stage, 0)  # type: ignore[arg-type]
        collector = Collector(writer, stage, 64, RunningMoments(), turn_weight=2.0)
        batch = collector.batch(collected([GUESSED, FAILED]), SimpleNamespace(pad_token_id=0), None)
        assert (batch.turn_rewards is not None) is stands


def test_responses_of_one_turn_have_no_tensors_of_turns() -> None:
    plain = Rollout(PROMPT, "", [7, 7], [0.0, 0.0], "stop", 0)
    batch = train_batch(
        Collected([plain], Scores([0.0], {}), torch.zeros(1), [0], [0], [], None, 1, 0.0),
        0,
        mask_truncated=False,
    )
    assert batch.turns is None and batch.turn_rewards is None
    assert set(batch.tensors()) == {
        "keep",
        "groups",
        "rollout_logprobs",
        "rewards",
        "advantages",
        "input_ids",
        "response_mask",
    }


def test_episodes_of_a_group_have_to_begin_alike() -> None:
    other = replace(FAILED, prompt=Prompt("p", "", (1, 3)))
    with pytest.raises(UserError, match="prompt p"):
        train_batch(collected([GUESSED, other]), 0, mask_truncated=False)
    train_batch(collected([GUESSED, other], groups=[0, 1]), 0, mask_truncated=False)


# ---- scores ----


def test_penalties_count_what_the_policy_wrote_and_any_limit() -> None:
    """Five tokens of seven are the policy's; the second episode ran out of turns."""
    stage = OnlineStage(truncation_penalty=10.0, overlong_buffer=4)
    scores, _ = final_scores([1.0, 1.0], [GUESSED, FAILED], stage, 8, RunningMoments())
    assert scores.tolist() == [1.0 - 0.25, 1.0 - 10.0]


def test_the_most_that_a_policy_writes_is_bounded_by_turns_and_tokens() -> None:
    assert EnvironmentConfig().most_written(64) == 64
    acts = EnvironmentConfig(kind=EnvironmentKind.http, max_turns=4, max_tokens=100)
    assert (acts.most_written(20), acts.most_written(64)) == (80, 100)


def test_a_length_term_counts_what_the_policy_wrote() -> None:
    term = RewardTerm(kind=TermKind.length, high=4, ramp=2)
    assert LengthScorer(term).score([GUESSED, FAILED]).total == [-0.5, 0.0]


def test_the_environments_term_adds_its_rewards_up_beside_others() -> None:
    terms = {
        "episode": RewardTerm(kind=TermKind.environment, weight=2.0),
        "short": RewardTerm(kind=TermKind.length, high=4, ramp=2),
    }
    reward = RewardConfig(terms=terms)
    scorer = make_scorer(reward, device=torch.device("cpu"), policy_tokenizer=None)
    scores = scorer.score([GUESSED, FAILED])
    assert scores.terms == {"episode": [0.75, -0.5], "short": [-0.5, 0.0]}
    assert scores.total == [1.0, -1.0]
    assert environment_weight(reward) == 2.0
    assert environment_weight(RewardConfig(function="a:b")) == 0.0


def test_the_environments_term_takes_no_options_of_others_and_no_single_turns() -> None:
    with pytest.raises(UserError, match=r"reward\.terms\.episode\.column"):
        check_fields("episode", RewardTerm(kind=TermKind.environment, column="answer"))
    alone = Rollout(PROMPT, "", [7], [0.0], "stop", 0)
    with pytest.raises(UserError, match="prompt 'p'"):
        CompositeScorer(
            [Term("episode", EnvironmentScorer(RewardTerm(kind=TermKind.environment)))]
        ).score([alone])


def last_words(completions: list[Any], turns: list[Any], **_: object) -> list[float]:
    """Of messages: how many, and how many characters the last has; of turns: their number."""
    return [
        100.0 * len(messages) + 10.0 * len(messages[-1]["content"]) + len(own)
        for messages, own in zip(completions, turns, strict=True)
    ]


def test_functions_read_whole_episodes() -> None:
    chat = Prompt("p", "", (1,), source=[{"role": "user", "content": "How many?"}])
    episode = Rollout(chat, "12", GUESSED.token_ids, [0.0] * 7, "stop", 0, turns=GUESSED.turns)
    scorer = FunctionScorer(f"{__name__}:last_words")
    assert scorer.score([episode]).total == [300.0 + 20.0 + 2.0]


def test_what_reads_texts_refuses_episodes() -> None:
    with pytest.raises(UserError, match=r"reward\.path=x.*'p'"):
        refuse_turns(GUESSED, "reward.path=x")
    refuse_turns(Rollout(PROMPT, "", [7], [0.0], "stop", 0), "reward.path=x")


def test_reward_models_that_read_texts_are_refused_before_weights_load() -> None:
    note = "reward.path=x: the reward model has another tokenizer"
    with pytest.raises(UserError, match=r"environment=tools.*reward\.path=x"):
        refuse_texts(EnvironmentKind.tools, [note])
    refuse_texts(EnvironmentKind.none, [note])
    refuse_texts(EnvironmentKind.tools, [])


# ---- what an option asks for has to be there ----


@pytest.mark.parametrize(
    ("options", "reward", "environment", "named"),
    [
        ({}, "environment", "none", r"reward\.terms\.episode"),
        ({"turn_discount": 0.9}, "function", "none", r"turn_discount=0\.9.*environment=none"),
        ({"turn_credit": TurnCredit.turn}, "function", "python", "turn_credit=turn"),
        (
            {"turn_credit": TurnCredit.turn, "reward_normalise": True},
            "environment",
            "python",
            r"stage\.reward_normalise",
        ),
        (
            {"turn_credit": TurnCredit.turn, "reward_clip": 1.0},
            "environment",
            "python",
            r"stage\.reward_clip",
        ),
        (
            {"turn_credit": TurnCredit.turn},
            "clipped",
            "python",
            r"reward\.terms\.episode\.clip",
        ),
        (
            {"turn_discount": 0.9, "advantage": Advantage.none},
            "environment",
            "python",
            r"stage\.advantage=none",
        ),
    ],
)
def test_options_of_turns_that_would_do_nothing_are_refused(
    options: dict[str, Any], reward: str, environment: str, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        check_turns(OnlineStage(**options), REWARDS[reward], EnvironmentKind(environment))


REWARDS = {
    "function": RewardConfig(function="a:b"),
    "environment": RewardConfig(terms={"episode": RewardTerm(kind=TermKind.environment)}),
    "clipped": RewardConfig(terms={"episode": RewardTerm(kind=TermKind.environment, clip=1.0)}),
}


def test_options_of_turns_pass_where_they_do_something() -> None:
    check_turns(OnlineStage(), REWARDS["function"], EnvironmentKind.none)
    check_turns(OnlineStage(), REWARDS["clipped"], EnvironmentKind.python)
    check_turns(OnlineStage(turn_discount=0.9), REWARDS["function"], EnvironmentKind.python)
    by_turns = OnlineStage(turn_credit=TurnCredit.turn, turn_discount=0.9)
    check_turns(by_turns, REWARDS["environment"], EnvironmentKind.python)


def test_the_preset_asks_for_the_environments_rewards() -> None:
    reward = composed("stage=grpo", "reward=environment").reward
    assert [term.kind for term in reward.terms.values()] == [TermKind.environment]


# ---- figures, samples, dumps ----


def test_figures_of_episodes_by_hand() -> None:
    figures = response_statistics(
        [GUESSED, FAILED], Scores([0.75, -0.5], {}), 0.5, gather=lambda own: [own]
    )
    of_turns = {
        "rollout/turns": 1.5,
        "rollout/observed_tokens": 1.0,
        "rollout/ended_length": 0.0,
        "rollout/ended_turns": 0.5,
        "rollout/ended_time": 0.0,
        "environment/success": 0.5,
        "environment/broken_calls": 0.5,
        "turn/reward": 0.25 / 3,
        "time/environment_turn_s": 0.6,
        "turn/return_1": (-0.25 + 0.5 - 0.5) / 2,
        "turn/return_2": 1.0,
    }
    assert {name: figures[name] for name in of_turns} == pytest.approx(of_turns)
    assert figures["reward/truncated"] == 0.5
    assert figures["reward/length_correlation"] == pytest.approx(1.0)  # 5 and 3 tokens


def test_a_rank_without_episodes_tells_what_the_others_do() -> None:
    shares: list[list[Rollout]] = [[GUESSED, FAILED], []]
    sent: list[Any] = []

    def keep(own: Any) -> list[Any]:
        sent.append(own)
        return [own]

    for share in shares:
        if share:
            response_statistics(share, Scores([0.0] * len(share), {}), gather=keep)
        else:
            sent.append([])
    found = [
        response_statistics(share, Scores([0.0] * len(share), {}), gather=lambda _: sent)
        for share in shares
    ]
    assert found[0] == found[1]
    assert "environment/success" in found[1]


def measured(rollouts: Sequence[Rollout]) -> tuple[Collected, Any]:
    """Episodes, and their batch as after an update that found the sampler 0.5 nats too low."""
    of_step = collected(rollouts)
    batch = train_batch(of_step, 0, mask_truncated=False)
    batch.old_logprobs = torch.where(batch.mask, batch.rollout_logprobs + 0.5, 0.0)
    batch.ref_logprobs = torch.where(batch.mask, batch.old_logprobs - 0.25, 0.0)
    batch.entropy = torch.where(batch.mask, 2.0, 0.0)
    batch.rewards = torch.zeros(batch.mask.shape)
    return of_step, batch


def test_figures_of_a_step_are_of_written_tokens() -> None:
    figures = step_metrics(*measured([GUESSED, FAILED]), KLEstimator.k1, gap_tail=0.4)
    expected = {
        "rollout/response_length": 4.0,
        "rollout/response_tokens": 8.0,
        "rollout/trained_tokens": 8.0,
        "rollout/finished": 0.5,
        "rollout/logprob_gap": 0.5,
        "rollout/logprob_gap_mean": 0.5,
        "rollout/logprob_gap_above": 1.0,
        "objective/entropy": 2.0,
        "objective/kl": 1.0,
        "objective/kl_per_token": 0.25,
        "reward/episode": 0.125,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_samples_show_who_wrote_what() -> None:
    rows = sample_rows(*measured([GUESSED, FAILED]), KLEstimator.k1, step=1, count=2)
    assert rows[0]["response_length"] == 5
    assert rows[0]["success"] is True
    assert rows[0]["turns"] == [
        {"role": "assistant", "text": "7?", "reward": -0.25},
        {"role": "environment", "text": "\n more", "said": "more"},
        {"role": "assistant", "text": "12", "reward": 1.0},
    ]
    assert rows[1]["finish_reason"] == "turns"
    assert json.loads(json.dumps(rows)) == rows


def test_the_console_shows_turns_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    samples_table(sample_rows(*measured([GUESSED, FAILED]), KLEstimator.k1, step=1, count=1))
    shown = capsys.readouterr().out
    assert "environment:" in shown and "assistant: 7?" in shown


def test_a_dump_says_which_tokens_the_policy_wrote(tmp_path: Path) -> None:
    of_step, batch = measured([GUESSED, FAILED])
    write_bad_batch(tmp_path, of_step.rollouts, of_step.scores.total, batch)
    row = json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[0])
    assert [(turn["start"], turn["end"]) for turn in row["turns"]] == [(0, 2), (4, 7)]
    assert row["turns"][0]["observation"] == "\n more"
    tensors = load_file(tmp_path / "batch.safetensors")
    assert torch.equal(tensors["response_mask"], batch.mask)
    assert torch.equal(tensors["turns"], batch.turns)


class Episodes:
    """Writes the same two episodes whatever it is asked."""

    version = 0

    def generate(self, prompts: Sequence[Prompt], **_: object) -> list[Rollout]:
        return [GUESSED, FAILED]


def test_the_judge_counts_written_tokens_and_any_limit() -> None:
    scorer = FunctionScorer("tests.toys:constant")
    judge = HeldOutJudge([PROMPT, PROMPT], scorer, scorer, seed=0)
    judged = judge(Episodes())  # type: ignore[arg-type]
    assert judged.lengths == [5, 3]
    assert judged.truncated == [False, True]
