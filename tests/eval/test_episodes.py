"""stage=eval of policies that act in an environment."""

import itertools
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from eval.episodes import episode_figures, pass_at_k
from reward.model import write_manifest
from rlhf.cli import config
from rlhf.models.templates import template_text
from rlhf.stages import eval as stage
from rlhf.types import Prompt, Rollout, Turn, UserError
from tests import toys
from tests.eval.test_eval import policies, run_eval

__all__ = ["policies"]  # a fixture


def episode(prompt: str, turns: int, success: bool | None) -> Rollout:
    made = tuple(Turn(3 * i, 3 * i + 2, "", 0.0, "") for i in range(turns))
    ids = [1] * (3 * turns - 1)
    rollout = Rollout(Prompt(prompt, "", (1,)), "", ids, [0.0] * len(ids), "stop", 0)
    rollout.turns, rollout.success = made, success
    return rollout


def test_figures_of_episodes() -> None:
    rollouts = [episode("a", 1, True), episode("a", 2, False), episode("b", 3, False)]
    rollouts.append(episode("b", 1, False))
    assert episode_figures(rollouts) == {
        "turns": [1, 2, 3, 1],
        "tokens": [2, 5, 8, 2],
        "success": [1, 0, 0, 0],
        "pass_at_2": [1, 1, 0, 0],
    }
    rollouts[0].success = None
    assert episode_figures(rollouts).keys() == {"turns", "tokens"}
    rollouts[0].turns = ()
    assert episode_figures(rollouts) == {}


@pytest.mark.parametrize("right", range(6))
def test_pass_at_k_is_the_share_of_the_subsets(right: int) -> None:
    succeeded = [number < right for number in range(5)]
    found = pass_at_k(["p"] * 5, succeeded)
    assert found.keys() == {"pass_at_2", "pass_at_4"}
    for k in (2, 4):
        subsets = list(itertools.combinations(succeeded, k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert found[f"pass_at_{k}"] == pytest.approx([share] * 5)


def test_two_policies_in_an_environment(policies: Path, tmp_path: Path) -> None:
    acting = ("environment=python", "environment.path=tests.acting:EvenTokens")
    acting += ("environment.max_tokens=40", "stage.samples_per_prompt=2")
    same = run_eval(policies, tmp_path / "same", "start", "start", *acting)
    assert same["eval/kl_per_token"] == 0.0
    assert all(value == 0.0 for name, value in same.items() if name.endswith("_delta"))
    found = run_eval(policies, tmp_path, "start", "moved", *acting)
    for side in ("before", "after"):
        assert 1 <= found[f"eval/turns_{side}"] <= 2
        assert found[f"eval/tokens_{side}"] >= found[f"eval/length_{side}"]
        assert 0 <= found[f"eval/success_{side}"] <= found[f"eval/pass_at_2_{side}"] <= 1
    assert found["eval/kl_per_token"] > 0


def test_a_term_without_its_environment_is_refused(policies: Path, tmp_path: Path) -> None:
    given = ["stage=eval", "rollout=hf", "reward=environment", f"run.dir={tmp_path}"]
    given += [f"stage.before={policies / 'start'}", f"stage.after={policies / 'moved'}"]
    cfg = config.compose([*given, f"data.eval_path={policies / 'prompts.jsonl'}"])
    with pytest.raises(UserError, match=r"reward\.terms\.episode.*environment=none"):
        stage.check(cfg)


def test_a_reward_model_that_reads_texts_is_refused(policies: Path, tmp_path: Path) -> None:
    reward = tmp_path / "reward"
    other = AutoTokenizer.from_pretrained(policies / "other")
    other.chat_template = template_text("chatml")
    other.save_pretrained(reward)
    (reward / "config.json").write_text((policies / "start" / "config.json").read_text())
    write_manifest(reward, toys.reward_manifest(other))
    given = ["stage=eval", "rollout=hf", f"reward.path={reward}", f"run.dir={tmp_path}"]
    given += [f"stage.before={policies / 'start'}", f"stage.after={policies / 'moved'}"]
    given += [f"model.path={policies / 'start'}", f"data.eval_path={policies / 'prompts.jsonl'}"]
    notes = stage.check(config.compose(given))
    assert any("another tokenizer" in note for note in notes)
    given += ["environment=python", "environment.path=tests.acting:EvenTokens"]
    with pytest.raises(UserError, match=r"environment=python.*reward\.path"):
        stage.check(config.compose(given))
