"""A reward model with a scalar head of ours, on a family that transformers has no classifier of:
PPO starts its critic from it and goes on after a kill, and the service serves it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.schema import ModelConfig, RewardConfig
from conf.stages import RewardStage
from reward.model import load_reward_module
from reward.scorers.reward_model import RewardModelScorer
from rlhf.run.context import RunContext
from rlhf.stages import reward
from rlhf.stages import rows as stage_rows
from tests import toys
from tests.offline import trl_tools
from tests.online.families import tiny_family
from tests.stages import test_resume
from tests.stages.test_serve_reward import post, rollout, serving

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("granite")
    trl_tools.tiny_tokenizer().save_pretrained(place / "tokenizer")
    return tiny_family("granite", place / "tokenizer", place / "policy")


@pytest.fixture(scope="module")
def reward_model(policy: Path) -> Path:
    stage = RewardStage(steps=2, batch_size=8, eval_steps=2, max_length=40, learning_rate=1e-2)
    cfg = trl_tools.config(
        stage,
        policy.parent,
        "reward",
        trl_tools.pair_rows(40),
        model=ModelConfig(path=str(policy)),
    )
    ctx = RunContext.open(cfg)
    reward.run(ctx, stage_rows)
    assert type(load_reward_module(ctx.model_dir, torch.float32)).__name__ == "GraniteScalarHead"
    return ctx.model_dir


def test_ppo_with_its_critic_goes_on_after_a_kill(
    policy: Path, reward_model: Path, tmp_path: Path
) -> None:
    given = [
        "stage=ppo",
        f"model.path={policy}",
        f"reward.path={reward_model}",
        f"run.dir={tmp_path}",
        f"data.path={toys.write_jsonl(tmp_path / 'prompts.jsonl', toys.prompt_rows())}",
        *(option for option in test_resume.ONLINE if not option.startswith("reward.function")),
        "stage.critic_init=reward",
        "stage.prompts_per_step=4",
        "stage.steps=4",
    ]
    straight = test_resume.run("ppo", [*given, "run.name=straight"])
    broken = [*given, "run.name=broken"]
    test_resume.run("ppo", broken, killed_at=3)
    folder = test_resume.run("ppo", [*broken, "run.resume=true"])
    expected = test_resume.rows(straight / "metrics.jsonl")
    assert test_resume.rows(folder / "metrics.jsonl") == expected and len(expected) == 4
    assert test_resume.both(tmp_path, "ppo") == (straight, folder)
    weights, found = (load_file(run / "model/model.safetensors") for run in (straight, folder))
    assert test_resume.same(found, weights)
    # the critic's, which no folder keeps
    assert len({row["loss/value"] for row in expected}) == 4


def test_the_service_serves_it(reward_model: Path) -> None:
    tokenizer = trl_tools.tiny_tokenizer()
    rollouts = [
        rollout(tokenizer, "the film", " good"),
        rollout(tokenizer, "the film is long and", " bad", finished=False),
    ]
    local = RewardModelScorer(str(reward_model), RewardConfig(), CPU, policy_tokenizer=tokenizer)
    expected = local.score(rollouts).total
    items = [
        {"prompt": "the film", "response": " good"},
        {"prompt": "the film is long and", "response": " bad", "finished": False},
    ]
    with serving(reward_model) as (url, _, _):
        answer = post(url, items)
    assert answer.status_code == 200, answer.text
    assert answer.json()["scores"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4
