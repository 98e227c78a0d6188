"""What stage=sft imitates of a conversation with tool turns is what a policy samples in episodes:
the stage's loss on rows is the trainer's loss on the same episodes, with its mask with holes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.choices import ModelKind
from conf.reward import EnvironmentConfig, EnvironmentKind
from conf.schema import DataConfig, ModelConfig, TinyConfig
from conf.stages import SFTStage
from policy.batching import collate
from policy.model import PolicyModule
from rlhf.models.encoding import prompt_ids
from rlhf.models.loading import load_causal_lm, train_tokenizer
from rlhf.models.templates import template_text
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.stages import sft
from rlhf.types import Message, Prompt, Rollout
from rollout.episodes import EpisodeGenerator
from tests import toys
from tests.acting import Scripted, Tool
from tests.offline import trl_tools

TURNS = {"first": 1, "second": 2, "third": 3, "fourth": 2}
TINY = TinyConfig(
    vocab_size=400, hidden_size=32, intermediate_size=48, layers=2, heads=1, max_positions=256
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Its directory, model and tokenizer, which has a template with tool turns."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["the film is good", "user assistant system tool"] * 2, 400, 256)
    tokenizer.chat_template = template_text("hermes")
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(kind=ModelKind.tiny, tiny=TINY), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


def said(name: str, turn: int) -> str:
    return f"{name} look {turn} times"


def episodes(tokenizer: Any) -> list[Rollout]:
    """A policy says what `said` says, and a tool answers in between."""

    def write(name: str, turn: int) -> list[int]:
        row_id = name.partition("/")[0]  # "first/0": the row, and which of its episodes
        ids: list[int] = tokenizer(said(row_id, turn), add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]

    prompts = []
    for name, turns in TURNS.items():
        source: list[Message] = [{"role": "user", "content": f"Count {name}"}]
        ids = tuple(prompt_ids(tokenizer, source))
        prompts.append(Prompt(name, tokenizer.decode(ids), ids, source, {"turns": turns}))
    limits = EnvironmentConfig(
        kind=EnvironmentKind.python, path="tests.acting:Tool", max_tokens=250, step_limit_s=5
    )
    inner = Scripted(tokenizer, write)
    generator = EpisodeGenerator(inner, tokenizer, limits, Tool, max_prompt=100, max_turn=64)
    return generator.generate(prompts, seed=3)


def row(name: str) -> dict[str, Any]:
    """The same conversation as data has it."""
    messages: list[dict[str, str]] = [{"role": "user", "content": f"Count {name}"}]
    for turn in range(TURNS[name]):
        messages.append({"role": "assistant", "content": said(name, turn)})
        messages.append({"role": "tool", "name": "f", "content": f"no {turn + 1}"})
    return {"messages": messages[:-1]}  # the last answer ends the episode


def mean_nll(model: Any, written: list[Rollout], pad_id: int) -> float:
    """Nats, over all tokens that the policy wrote."""
    batch = collate(
        [rollout.prompt.token_ids for rollout in written],
        [rollout.token_ids for rollout in written],
        pad_id,
        written=[rollout.written for rollout in written],
    )
    module = PolicyModule(model, chunk=64)
    with torch.no_grad():
        logprobs, _ = module(
            batch.input_ids, batch.positions, batch.response_ids, batch.response_mask
        )
    return float(-logprobs.sum() / batch.response_mask.sum())


@pytest.mark.parametrize("micro", [4, 1])
def test_the_stages_loss_is_that_of_episodes(
    micro: int, policy: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    directory, model, tokenizer = policy
    written = episodes(tokenizer)
    assert [len(rollout.turns) for rollout in written] == list(TURNS.values())
    rows = [row(name) for name in TURNS]
    held_out = toys.write_jsonl(tmp_path / "held_out.jsonl", rows)
    train = toys.write_jsonl(tmp_path / "train.jsonl", rows)
    stage = SFTStage(steps=1, batch_size=4, eval_steps=1, max_length=256, learning_rate=1e-3)
    cfg = trl_tools.config(
        stage,
        tmp_path,
        f"micro_{micro}",
        rows,
        data=DataConfig(path=str(train), eval_path=str(held_out)),
        model=ModelConfig(path=str(directory)),
    )
    cfg.engine.micro_batch_size = micro
    ctx = RunContext.open(cfg)
    sft.run(ctx, stage_rows)
    expected = mean_nll(model, written, tokenizer.pad_token_id)
    before = json.loads((ctx.dir / "summary.json").read_text())["metrics"]["initial/eval_loss"]
    assert trl_tools.losses(ctx.dir)[0] == pytest.approx(expected, abs=1e-5)
    assert before == pytest.approx(expected, abs=1e-4)
