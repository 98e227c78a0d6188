"""Runs whose policy acts in an environment: stage=grpo, stage=ppo and stage=eval."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind
from conf.schema import DataConfig, RolloutConfig
from rlhf.checks import capacity
from rlhf.cli import config
from rlhf.models.encoding import prompt_ids
from rlhf.models.loading import train_tokenizer
from rlhf.models.templates import template_text
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import Message, Prompt, UserError
from rollout import Acting, acting_in
from tests import toys
from tests.acting import Counting, Scripted, turning_policy
from tests.online.test_online import metrics

ACTS = [
    "model=pretrained",
    "data.max_prompt_length=32",
    "tracking=none",
    "environment=python",
    "environment.path=tests.acting:EvenTokens",
    "environment.max_tokens=64",
    "rollout.max_response_length=12",
    "reward=environment",
    "data.chat_template=plain",
]


def compose(folder: Path, stage: str, *overrides: str) -> Any:
    rows = [{"prompt": [{"role": "user", "content": f"say {word}"}], "turns": 2} for word in "abcd"]
    place = toys.write_jsonl(folder / "prompts.jsonl", rows)
    model = turning_policy(folder / "policy")
    base = [f"stage={stage}", *ACTS, f"run.dir={folder}", f"data.path={place}"]
    base.append(f"model.path={model}")
    return config.compose([*base, *overrides])


def run(folder: Path, stage: str, *overrides: str) -> Path:
    cfg = compose(folder, stage, "stage.prompts_per_step=4", *overrides)
    online_stage.check(cfg)
    online_stage.run(RunContext.open(cfg, ()), stage_rows)
    return folder / cfg.run.name / stage


def check_metrics(rows: list[dict[str, float]]) -> None:
    """Episodes have turns, and sampler and trainer agree on all that was written with the weights
    that train.
    """
    assert rows[0]["rollout/logprob_gap"] < 1e-4
    for row in rows:
        assert row.get("rollout/logprob_gap", 0.0) < 1e-4
        assert 0 <= row["objective/scores"] <= 2 and "environment/success" in row
        assert row["rollout/turns"] > 1.2
        assert row["time/environment_turn_s"] > 0


@pytest.mark.parametrize(
    ("stage", "credit", "ahead"),
    [
        ("grpo", "episode", 0),
        ("grpo", "turn", 0),
        ("grpo", "episode", 1),
        ("ppo", "turn", 0),
        ("remax", "episode", 0),
    ],
)
def test_a_policy_learns_from_turns(stage: str, credit: str, ahead: int, tmp_path: Path) -> None:
    changes = ["rollout=hf", "stage.steps=3", "stage.samples_kept=4", f"stage.ahead={ahead}"]
    changes.append(f"stage.turn_credit={credit}")
    if stage == "ppo":
        changes.append("stage.critic_init=policy")
    if stage == "grpo":
        changes.append("stage.samples_per_prompt=4")
    folder = run(tmp_path, stage, *changes)
    check_metrics(metrics(folder))
    written = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    roles = [[turn["role"] for turn in json.loads(line)["turns"]] for line in written]
    assert ["assistant", "environment", "assistant"] in roles


@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.parametrize("ahead", [0, 1])
def test_with_vllm_and_ahead(ahead: int, tmp_path: Path) -> None:
    changes = ["rollout=vllm", "rollout.kv_cache_gib=0.1", "stage.steps=3", f"stage.ahead={ahead}"]
    check_metrics(metrics(run(tmp_path, "grpo", *changes, "stage.samples_per_prompt=4")))


def test_the_same_run_twice(tmp_path: Path) -> None:
    rows = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        changes = ["rollout=hf", "stage.steps=2", "stage.samples_per_prompt=2"]
        found = metrics(run(tmp_path / name, "grpo", *changes))
        rows.append([(row["objective/scores"], row["loss/policy"]) for row in found])
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["environment.path=tests.acting:Missing"], r"environment\.path.*Missing"),
        (["environment.max_tokens=100"], r"environment\.max_tokens=100.*128"),
        (["environment.path=null"], r"environment\.path"),
    ],
)
def test_what_is_refused_before_weights_load(
    changes: list[str], named: str, tmp_path: Path
) -> None:
    cfg = compose(tmp_path, "grpo", "rollout=hf", "stage.steps=1", *changes)
    with pytest.raises(UserError, match=named):
        online_stage.check(cfg)


@pytest.mark.vllm
def test_the_cache_holds_a_whole_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = compose(tmp_path, "grpo", "rollout=vllm", "stage.steps=1")
    # one layer of 32 numbers, keys and values, float32: 256 bytes a token
    cfg.rollout.kv_cache_gib = 256 * (32 + 64) / 2**30
    given = (cfg.rollout, cfg.model, cfg.data.max_prompt_length)
    capacity.check_cache(*given, cfg.environment)
    cfg.environment.max_tokens = 65
    with pytest.raises(UserError, match=r"environment\.max_tokens=65"):
        capacity.check_cache(*given, cfg.environment)


def tools() -> tuple[Any, Acting]:
    """A tokenizer, and what lets its policy call a calculator."""
    tokenizer = train_tokenizer(["the film is good"] * 2, 400, 512)
    tokenizer.chat_template = template_text("hermes")
    limits = EnvironmentConfig(kind=EnvironmentKind.tools, tools=["calculator"], max_tokens=400)
    limits.options["answer"] = "answer"
    return tokenizer, acting_in(limits, tokenizer)


def asked(tokenizer: Any) -> Prompt:
    source: list[Message] = [{"role": "user", "content": "What is 17 * 23?"}]
    ids = tuple(prompt_ids(tokenizer, source))
    return Prompt("p", "", ids, source, {"answer": "391"})


def test_a_tool_is_called_and_answers() -> None:
    tokenizer, acting = tools()
    call = {"name": "calculator", "arguments": {"expression": "17 * 23"}}
    texts = (f"<tool_call>\n{json.dumps(call)}\n</tool_call>", "It is 391.")
    said = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    inner = Scripted(tokenizer, lambda name, turn: said[turn])
    generator = acting.around(
        inner, DataConfig(max_prompt_length=1000), RolloutConfig(max_response_length=200)
    )
    (rollout,) = generator.generate([asked(tokenizer)], seed=1)
    assert "calculator" in rollout.prompt.text, "the prompt shows the tools"
    assert "<tool_response>\n391\n</tool_response>" in rollout.turns[0].observation
    assert rollout.success and rollout.turns[1].reward == 1.0
    assert rollout.info["calls"] == 1 and rollout.info["broken_calls"] == 0


def test_prompts_without_room_for_the_tools_are_refused() -> None:
    tokenizer, acting = tools()
    tokens = len(asked(tokenizer).token_ids)
    with pytest.raises(UserError, match=rf"prompt p.* {tokens} tokens.*max_prompt_length=60"):
        acting.check([asked(tokenizer)], DataConfig(max_prompt_length=60))
    acting.check([asked(tokenizer)], DataConfig(max_prompt_length=1000))


def test_a_template_that_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "first.jinja"
    template.write_text(
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    cfg = compose(tmp_path, "grpo", "rollout=hf", "stage.steps=1", "stage.prompts_per_step=4")
    cfg.data.chat_template = str(template)
    Counting.made.clear()
    with pytest.raises(UserError, match=r"data\.chat_template"):
        online_stage.run(RunContext.open(cfg, ()), stage_rows)
    assert not Counting.made
