"""Every online preset learns a toy whose best answer is known, and what presets add to the loop
does what it says.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.stages import OnlineStage
from policy import agreement
from policy.forward import Layout, Models
from rlhf.cli import config
from rlhf.cli.presets import CONF_DIR, choices, stage_schema
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.online.test_online import TINY, metrics
from tests.selection import marked_full

PRESETS = [name for name in choices("stage") if stage_schema(name) == "ppo"]
EXPECTED = {
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce_pp",
    "remax",
    "raft",
    "online_dpo",
}
# Sizes for a toy; what makes the algorithm what it is stays as the preset says.
SIZES = {
    1: ["stage.prompts_per_step=32"],
    4: ["stage.prompts_per_step=8", "stage.samples_per_prompt=4"],
}
EXTRA = {
    "ppo": ["stage.critic_init=policy", "stage.critic_learning_rate=3e-3", "stage.kl_coef=0.01"],
    "dapo": ["stage.overlong_buffer=1", "stage.minibatches=1"],
    "gspo": ["stage.cliprange=0.05", "stage.cliprange_high=0.05", "stage.minibatches=2"],
    "remax": ["stage.kl_coef=0.01"],
}
# Each way to split a step once; every pair of a way and a preset is in make test-full.
SPLITS = [
    ("grpo", "engine.micro_tokens=24"),
    ("online_dpo", "engine.share_prompts=false"),
    ("grpo", "engine.share_prompts=false"),
    ("online_dpo", "engine.micro_tokens=24"),
    ("raft", "engine.share_prompts=false"),
    ("raft", "engine.micro_tokens=24"),
]


def run_preset(preset: str, folder: Path, *overrides: str, steps: int = 20) -> Path:
    """The preset on the toy prompts from a random tiny policy, Hugging Face rollouts of 3 tokens;
    returns the run directory.
    """
    rows = toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    default = (
        OnlineStage.samples_per_prompt
        if preset == "ppo"
        else config.compose([f"stage={preset}"]).stage.samples_per_prompt
    )
    base = [
        f"stage={preset}",
        *TINY,
        "rollout=hf",
        "tracking=none",
        f"run.dir={folder}",
        f"data.path={rows}",
        f"stage.steps={steps}",
    ]
    base += [
        "reward.function=tests.toys:even_tokens",
        "rollout.max_response_length=3",
        "stage.learning_rate=1e-2",
    ]
    base += SIZES[1 if default == 1 else 4] + EXTRA.get(preset, [])
    cfg = config.compose([*base, *overrides])
    online_stage.run(RunContext.open(cfg, ()), stage_rows)
    return folder / cfg.run.name / preset


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_presets_are_those_of_the_documentation() -> None:
    assert set(PRESETS) == EXPECTED


@pytest.mark.parametrize("preset", sorted(EXPECTED))
def test_every_preset_cites_its_paper_and_states_its_departures(preset: str) -> None:
    text = (CONF_DIR / "stage" / f"{preset}.yaml").read_text(encoding="utf-8")
    assert "arXiv:" in text and "Departures:" in text
    assert config.compose([f"stage={preset}"]).stage.name == preset


# A critic, a group, a single greedy baseline, pairs: one preset of each kind.
@pytest.mark.parametrize(
    "preset", marked_full(sorted(EXPECTED), keep=["ppo", "dapo", "remax", "online_dpo"])
)
def test_every_preset_raises_the_reward(preset: str, tmp_path: Path) -> None:
    """From about 0.5 by at least 0.2: the score's standard error over the eight averaged steps is
    below 0.02.
    """
    # a single greedy response is a noisy baseline
    rows = metrics(run_preset(preset, tmp_path, steps=40 if preset == "remax" else 20))
    scores = [row["objective/scores"] for row in rows]
    assert mean(scores[:4]) < 0.75
    assert mean(scores[-4:]) > mean(scores[:4]) + 0.2, scores
    assert max(row["rollout/logprob_gap"] for row in rows) < 1e-4
    assert all(row["policy/updates"] >= 1 for row in rows)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize(("preset", "other"), marked_full(SPLITS, keep=SPLITS[:2]))
def test_sharing_prompts_and_splitting_micro_batches_changes_no_step(
    preset: str, other: str, tmp_path: Path
) -> None:
    """The same weights after three steps, whether a prompt is computed once or for each response,
    and however small the micro-batches are.
    """
    assert_same_weights(
        run_preset(preset, tmp_path, "run.name=plain", steps=3),
        run_preset(preset, tmp_path, "run.name=split", other, steps=3),
    )


def test_attention_by_segments_changes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalty = "stage.kl_coef=0.01"  # so that a reference reads the rows too
    masked = run_preset("grpo", tmp_path, "run.name=masked", penalty, steps=3)
    layouts = []
    by_segments = agreement._by_segments

    def taken(models: Models, layout: Layout) -> Layout:
        layouts.append(by_segments(models, layout))
        return layouts[-1]

    monkeypatch.setattr(agreement, "LONGEST_DENSE", 1)
    monkeypatch.setattr(agreement, "_by_segments", taken)
    segments = run_preset("grpo", tmp_path, "run.name=segments", penalty, steps=3)
    assert [layout.longest_dense for layout in layouts] == [1]
    assert_same_weights(masked, segments)


def test_a_pass_of_its_own_for_logprobs_before_the_update_changes_no_step(tmp_path: Path) -> None:
    """A vanishing penalty in the reward needs the pass; without one the update measures them
    itself.
    """
    measured = run_preset("grpo", tmp_path, "run.name=measured", "stage.kl_coef=0.0", steps=3)
    assert_same_weights(
        measured,
        run_preset(
            "grpo",
            tmp_path,
            "run.name=passed",
            "stage.kl_place=reward",
            "stage.kl_coef=1e-12",
            steps=3,
        ),
    )


def assert_same_weights(plain: Path, split: Path) -> None:
    """Both runs ended alike, and not where they began."""
    ours, theirs, start = (
        final_weights(plain),
        final_weights(split),
        load_file(plain / "start" / "model.safetensors"),
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4, msg=name)
    assert max(float((ours[name] - start[name]).abs().max()) for name in start) > 5e-3


def test_dynamic_sampling_trains_only_groups_whose_scores_differ(tmp_path: Path) -> None:
    """One-token responses with a score of 0 or 1: groups of two are often equal, and more prompts
    are drawn in their place.
    """
    settings = [
        "rollout.max_response_length=1",
        "stage.samples_per_prompt=2",
        "stage.prompts_per_step=8",
        "stage.overlong_buffer=0",
    ]
    rows = metrics(run_preset("dapo", tmp_path, *settings, "stage.learning_rate=1e-5", steps=3))
    for row in rows:
        assert row["rollout/draws"] > 1 and 0 < row["group/equal"] < 1
        assert row["rollout/trained_responses"] <= 8 * row["group/size_max"]
    assert sum(row["rollout/trained_responses"] for row in rows) >= 3 * 12
    assert sum(row["rollout/response_tokens"] for row in rows) > sum(
        row["rollout/trained_responses"] for row in rows
    )


def test_a_step_whose_groups_are_all_equal_takes_no_optimizer_step(tmp_path: Path) -> None:
    run = run_preset(
        "dapo",
        tmp_path,
        "reward.function=tests.toys:constant",
        "stage.resample=1",
        "stage.overlong_buffer=0",
        steps=2,
    )
    for row in metrics(run):
        assert not {"objective/kl", "objective/entropy", "objective/rlhf_reward"} & row.keys(), (
            "a mean over nothing is no figure"
        )
        assert (
            row["policy/updates"] == 0
            and row["group/equal"] == 1
            and row["rollout/trained_responses"] == 0
            and row["rollout/draws"] == 2
        )
    start = load_file(run / "start" / "model.safetensors")
    assert all(
        torch.equal(tensor, start[name])
        for name, tensor in final_weights(run).items()
        if name in start
    )


def test_a_prompt_that_comes_twice_in_a_step_makes_two_groups(tmp_path: Path) -> None:
    """17 draws of 16 prompts: two rows with one text may have several answers, so each is compared
    within itself.
    """
    row = metrics(run_preset("grpo", tmp_path, "stage.prompts_per_step=17", steps=1))[0]
    assert (row["group/size_min"], row["group/size_max"]) == (4, 4)


def test_truncated_responses_can_be_left_out(tmp_path: Path) -> None:
    row = metrics(run_preset("grpo", tmp_path, "stage.mask_truncated=true", steps=1))[0]
    finished = round(row["rollout/finished"] * 32)
    assert row["rollout/trained_responses"] == finished < 32


@pytest.mark.parametrize("adapter", marked_full(["none", "lora"], keep=["none"]))
def test_a_reference_that_follows_at_every_step_whole_is_the_policy_before_the_step(
    adapter: str, tmp_path: Path
) -> None:
    rows = metrics(
        run_preset(
            "grpo",
            tmp_path,
            f"adapter={adapter}",
            "stage.reference_every=1",
            "stage.reference_mix=1.0",
            steps=4,
        )
    )
    assert all(abs(row["objective/kl"]) < 1e-4 for row in rows)
    still = metrics(run_preset("grpo", tmp_path, f"adapter={adapter}", "run.name=still", steps=4))
    assert still[-1]["objective/kl"] > 1e-2


@pytest.mark.slow  # tests/stages/test_resume.py resumes a moving reference in every run
def test_a_moving_reference_is_resumed(tmp_path: Path) -> None:
    import shutil

    settings = ["stage.reference_every=1", "stage.reference_mix=0.5", "stage.save_steps=2"]
    straight = run_preset("dapo", tmp_path, *settings, "run.name=straight", steps=4)
    broken = run_preset("dapo", tmp_path, *settings, "run.name=broken", steps=4)
    shutil.rmtree(broken / "checkpoints" / "step-4")
    shutil.rmtree(broken / "model")
    (broken / "summary.json").unlink()
    run_preset("dapo", tmp_path, *settings, "run.name=broken", "run.resume=true", steps=4)
    for name in ("objective/scores", "objective/kl", "loss/policy", "rollout/draws"):
        assert [row.get(name) for row in metrics(straight)] == [
            row.get(name) for row in metrics(broken)
        ], name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stage=grpo", "stage.samples_per_prompt=1"],
            "stage.samples_per_prompt=1.*at least 2 with advantage=group",
        ),
        (["stage=grpo", "stage.kl_loss_estimator=k1"], "stage.kl_loss_estimator='k1'.*zero mean"),
        (
            ["stage=ppo", "stage.kl_estimator=k3_weighted"],
            "stage.kl_estimator='k3_weighted'.*no ratio",
        ),
        (
            ["stage=online_dpo", "stage.selection=all"],
            "stage.selection='all'.*best_worst with policy_loss=dpo",
        ),
        (["stage=online_dpo", "stage.dpo_losses=[aot]"], "stage.dpo_losses=.*sort a whole batch"),
        (
            ["stage=online_dpo", "stage.dpo_losses=[exo_pair]"],
            "stage.label_smoothing=0.0.*above 0 with exo_pair",
        ),
        (
            ["stage=online_dpo", "stage.dpo_weights=[1.0,2.0]"],
            "stage.dpo_weights=.*one weight for each of 1 losses",
        ),
        (
            ["stage=raft", "stage.advantage=group"],
            "stage.advantage='group'.*none with selection=best",
        ),
        (["stage=rloo", "stage.group_baseline=true"], "stage.group_baseline=True.*reinforce_pp"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.compose(overrides)


def test_samples_hold_every_response_and_kl_only_where_it_was_measured(tmp_path: Path) -> None:
    run = run_preset("raft", tmp_path, steps=1)
    samples = [
        json.loads(line)
        for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(samples) == 8
    # the best of each of two groups of four
    assert [sample["kl"] is None for sample in samples].count(False) == 2
