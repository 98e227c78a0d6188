"""The online loop end to end on toys whose answers are known."""

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.choices import Advantage, Selection
from conf.stages import OnlineStage
from rlhf.cli import config
from rlhf.online import loop as online
from rlhf.online.ahead import Place, Writer, draw_prompts
from rlhf.online.collect import Collector, final_scores
from rlhf.process.distributed import RunningMoments
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import Prompt, Rollout, Scores, SyncError, TrainingDiverged
from tests import drawing, toys

TINY = [
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.layers=2",
]
TINY += ["model.tiny.heads=1", "model.tiny.max_positions=64", "data.max_prompt_length=32"]


def run_ppo(folder: Path, *overrides: str) -> Path:
    """stage=ppo on the toy prompts from a random tiny policy, Hugging Face rollouts; returns the
    run directory.
    """
    rows = toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    base = [
        "stage=ppo",
        *TINY,
        "rollout=hf",
        "tracking=none",
        f"run.dir={folder}",
        f"data.path={rows}",
        "stage.critic_init=policy",
    ]
    cfg = config.compose(
        [
            *base,
            "reward.function=tests.toys:even_first_token",
            "stage.prompts_per_step=16",
            *overrides,
        ]
    )
    online_stage.run(RunContext.open(cfg, ()), stage_rows)
    return folder / cfg.run.name / "ppo"


def metrics(run: Path) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def even_log_odds(model_dir: Path, prompts: list[str]) -> torch.Tensor:
    """log P(even first token) - log P(odd first token), one per prompt, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    out = []
    for prompt in prompts:
        with torch.no_grad():
            probabilities = (
                model(torch.tensor([tokenizer(prompt)["input_ids"]]))
                .logits[0, -1]
                .double()
                .softmax(-1)
            )
        out.append(math.log(float(probabilities[0::2].sum()) / float(probabilities[1::2].sum())))
    return torch.tensor(out)


@pytest.fixture(scope="module")
def bandit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One-token responses, reward 1 for one half of the vocabulary and 0 for the other, KL
    coefficient 1.
    """
    folder = tmp_path_factory.mktemp("bandit")
    with drawing.on():
        return run_ppo(
            folder,
            "rollout.max_response_length=1",
            "stage.prompts_per_step=128",
            "stage.steps=60",
            "stage.kl_coef=1.0",
            "stage.learning_rate=3e-3",
            "stage.critic_learning_rate=3e-3",
            "stage.whiten_advantages=false",
            "stage.max_grad_norm=0",
        )


def test_ppo_reaches_the_optimum_of_a_two_armed_bandit(bandit: Path) -> None:
    """Maximising r - beta KL(policy || reference) has the optimum policy ~ reference * exp(r /
    beta): the log odds move by exactly 1 / beta = 1.
    """
    prompts = [str(row["prompt"]) for row in toys.prompt_rows()]
    shift = even_log_odds(bandit / "model", prompts) - even_log_odds(bandit / "start", prompts)
    assert float(shift.mean()) == pytest.approx(1.0, abs=0.12)
    assert float((shift - 1.0).abs().max()) < 0.35


def test_run_directory_holds_the_contract(bandit: Path) -> None:
    summary = json.loads((bandit / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) == {"stage", "steps", "wall_s", "peak_rss_mb", "metrics", "model"}
    assert summary["stage"] == "ppo" and summary["steps"] == 60
    for name in (
        "config.yaml",
        "manifest.json",
        "samples.jsonl",
        "model/model.safetensors",
        "model/tokenizer.json",
    ):
        assert (bandit / name).exists(), name
    assert list((bandit / "plots").glob("*.png"))
    rows = metrics(bandit)
    assert [row["step"] for row in rows] == list(range(1, 61))
    named = (
        "objective/scores objective/kl objective/rlhf_reward objective/entropy "
        "policy/clipfrac policy/approxkl policy/ratio loss/policy loss/value"
    )
    named += (
        " value/explained_variance rollout/response_length rollout/finished "
        "rollout/logprob_gap rollout/tokens_per_s reward/even_first_token"
    )
    named += (
        " time/rollout_s time/score_s time/prepare_s time/update_s time/sync_s train/tokens_per_s"
    )
    assert set(named.split()) <= set(rows[0])
    sample = json.loads((bandit / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {
        "step",
        "prompt",
        "response",
        "score",
        "even_first_token",
        "kl",
        "response_length",
        "finish_reason",
    } <= set(sample)


def test_phases_add_up_and_sampler_and_trainer_agree(bandit: Path) -> None:
    for row in metrics(bandit)[1:]:
        phases = sum(
            row[f"time/{name}_s"]
            for name in ("rollout", "score", "prepare", "update", "sync", "log")
        )
        assert phases >= 0.95 * row["time/step_s"]
        assert row["rollout/logprob_gap"] < 1e-4
        assert row["rollout/probe_gap"] < 1e-4


@pytest.mark.slow  # tests/stages/test_resume.py resumes both in every run
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_resuming_equals_never_having_stopped(tmp_path: Path, adapter: str) -> None:
    shared = [
        f"adapter={adapter}",
        "stage.save_steps=2",
        "rollout.max_response_length=4",
        "stage.reward_normalise=true",
        "stage.kl_controller=adaptive",
    ]
    straight = run_ppo(tmp_path, *shared, "run.name=straight", "stage.steps=4")
    broken = run_ppo(
        tmp_path, *shared, "run.name=broken", "stage.steps=4", "stage.scheduler=constant"
    )
    # as a kill after step 2 leaves it: the later checkpoint and the end of the run are not there
    # yet
    import shutil

    shutil.rmtree(broken / "checkpoints" / "step-4")
    shutil.rmtree(broken / "model")
    (broken / "summary.json").unlink()
    run_ppo(tmp_path, *shared, "run.name=broken", "stage.steps=4", "run.resume=true")
    ours, theirs = metrics(straight), metrics(broken)
    assert [row["step"] for row in theirs] == [1, 2, 3, 4]
    for name in (
        "objective/scores",
        "objective/kl",
        "loss/policy",
        "loss/value",
        "objective/kl_coef",
    ):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name


def test_a_corrupted_sync_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from policy import adapters
    from rlhf.types import FullWeights

    real = adapters.full_weights

    def corrupted(model, gather):  # type: ignore[no-untyped-def]
        return FullWeights(
            (n, t + 0.05 if n.endswith("layers.1.mlp.down_proj.weight") else t)
            for n, t in real(model, gather).tensors
        )

    monkeypatch.setattr(adapters, "full_weights", corrupted)
    with pytest.raises(SyncError):
        run_ppo(tmp_path, "stage.steps=1", "rollout.max_response_length=4")


def test_a_reward_that_is_no_number_stops_and_saves_the_batch(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="beta") as error:
        run_ppo(
            tmp_path,
            "reward.function=tests.toys:not_a_number_for_b",
            "stage.steps=1",
            "rollout.max_response_length=2",
        )
    saved = tmp_path / "default" / "ppo" / "diverged-step-1-rank-0" / "rollouts.jsonl"
    assert str(saved.parent) in str(error.value)
    assert len(saved.read_text(encoding="utf-8").splitlines()) == 16


def test_a_loss_that_is_no_number_stops_and_saves_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = online.prepare

    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        batch = real(*args, **kwargs)
        batch.returns[0, 0] = math.nan
        return batch

    monkeypatch.setattr(online, "prepare", poisoned)
    with pytest.raises(TrainingDiverged, match=r"loss/value=nan.*diverged-step-1-rank-0"):
        run_ppo(tmp_path, "stage.steps=1", "rollout.max_response_length=2")
    assert (tmp_path / "default" / "ppo" / "diverged-step-1-rank-0" / "batch.safetensors").exists()


def test_every_prompt_comes_once_per_pass_whatever_the_step_size() -> None:
    prompts = [Prompt(id=str(i), text=str(i), token_ids=(1,)) for i in range(10)]
    seen = [p.id for step in range(5) for p in draw_prompts(prompts, 4 * step, 4, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [str(i) for i in range(10)]
    assert seen[:10] != seen[10:]
    assert [p.id for p in draw_prompts(prompts, 12, 4, seed=3)] == seen[12:16]


def rollout(reason: str, tokens: int = 1) -> Rollout:
    return Rollout(
        Prompt(id="p", text="p", token_ids=(1,)), "", [1] * tokens, [0.0] * tokens, reason, 0
    )


def test_final_scores_clip_then_normalise_then_penalise() -> None:
    stage = OnlineStage(reward_clip=2.0, truncation_penalty=0.5)
    rollouts = [rollout(reason) for reason in ("stop", "length", "stop", "stop")]
    scores, clipped = final_scores([5.0, -1.0, 1.0, -3.0], rollouts, stage, 8, RunningMoments())
    assert scores.tolist() == [2.0, -1.5, 1.0, -2.0]
    assert clipped == 0.5
    normalised, _ = final_scores(
        [1.0, 3.0], rollouts[2:], OnlineStage(reward_normalise=True), 8, RunningMoments()
    )
    assert float(normalised[0]) == -float(normalised[1]) < 0


class _Lengths:
    """Writes to each prompt responses of 40, 50, 55 and 60 tokens."""

    version = 0

    def generate(self, prompts: list[Prompt], *, n: int = 1, **_: object) -> list[Rollout]:
        lengths = (40, 50, 55, 60)
        return [
            Rollout(prompt, "", [7] * lengths[i % 4], [0.0] * lengths[i % 4], "stop", 0)
            for prompt in prompts
            for i in range(n)
        ]


def _collector(stage: OnlineStage, answers: list[str]) -> Collector:
    """Of prompts with one text and these answers."""
    prompts = [Prompt("same", "x", (1,), fields={"answer": answer}) for answer in answers]
    writer = Writer(_Lengths(), prompts, stage, 0)  # type: ignore[arg-type]
    return Collector(writer, stage, 64, RunningMoments())


def _phase(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def test_dynamic_sampling_looks_at_scores_before_penalties_for_length() -> None:
    """A group that is wrong throughout says nothing, however long its answers are."""
    stage = OnlineStage(
        advantage=Advantage.group,
        selection=Selection.unequal,
        resample=0,
        samples_per_prompt=4,
        prompts_per_step=1,
        overlong_buffer=12,
        kl_coef=0.0,
    )

    def wrong(rollouts: list[Rollout]) -> Scores:
        return Scores([0.0] * len(rollouts), {})

    collected = _collector(stage, ["a"]).collect(wrong, Place(0, 0, 1), _phase)  # type: ignore[arg-type]
    assert len(set(collected.finals.tolist())) > 1
    assert collected.rows == []


def test_rows_with_one_text_and_different_answers_are_groups_of_their_own() -> None:
    stage = OnlineStage(
        advantage=Advantage.greedy, samples_per_prompt=2, prompts_per_step=2, kl_coef=0.0
    )

    def score(rollouts: list[Rollout]) -> Scores:
        return Scores([float(r.prompt.fields["answer"] == "a") for r in rollouts], {})

    collected = _collector(stage, ["a", "b"]).collect(score, Place(0, 0, 2), _phase)  # type: ignore[arg-type]
    assert collected.groups == [0, 0, 1, 1]
    assert collected.baselines is not None
    assert collected.baselines.tolist() == collected.scores.total
    assert sorted(collected.scores.total) == [0.0, 0.0, 1.0, 1.0]


GROWING = [
    "stage.batch_growth.steps=[1,2]",
    "stage.batch_growth.rate=linear",
    "stage.scheduler=plateau",
    "stage.plateau.patience=1",
    "stage.min_improvement=100",
    "stage.prompts_per_step=2",
    "stage.learning_rate=1e-3",
    "stage.warmup_ratio=0",
    "stage.save_steps=1",
    "stage.noise_scale=0.9",
    "engine.micro_tokens=16",
    "stage.epochs=1",
    "rollout.max_response_length=2",
]


def test_steps_grow_and_a_stalled_score_lowers_the_rate(tmp_path: Path) -> None:
    """Two, four and eight prompts, by which the rate is scaled, and halved after each step from the
    second on; a resumed run draws on where the last prompts ended.
    """
    straight = run_ppo(tmp_path, *GROWING, "run.name=straight", "stage.steps=4")
    run_ppo(tmp_path, *GROWING, "run.name=broken", "stage.steps=2")
    broken = run_ppo(tmp_path, *GROWING, "run.name=broken", "stage.steps=4", "run.resume=true")
    for run in (straight, broken):
        lines = metrics(run)
        assert [line["rollout/trained_responses"] for line in lines] == [2, 4, 8, 8]
        rates = [1e-3 * grown * cut for grown, cut in ((1, 1), (2, 1), (4, 0.5), (4, 0.25))]
        assert [line["policy/lr"] for line in lines] == pytest.approx(rates)
        state = json.loads((run / "checkpoints" / "step-4" / "loop.json").read_text())
        assert (state["draws"], state["prompts"]) == (4, 22)
    for name in ("objective/scores", "train/noise_trace", "train/noise_square"):
        found, expected = ([line.get(name) for line in metrics(run)] for run in (broken, straight))
        assert found == expected and expected[-1] is not None
    before, after = (load_file(run / "model" / "model.safetensors") for run in (straight, broken))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
