"""The bench's own parts: both programs get the same case, take turns over a pipe, and the ratios
are taken step by step.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.speed.__main__ import report
from benchmarks.speed.cases import Case, distinct_words
from benchmarks.speed.ours import bare_pass, overrides
from benchmarks.speed.protocol import Worker
from conf.choices import Advantage
from rlhf.cli import config

CASE = Case(
    name="b-lora",
    model="runs/x",
    prompts=["a", "b"],
    samples=4,
    max_response=6,
    max_prompt=8,
    lora=True,
)


def test_a_case_survives_its_file(tmp_path: Path) -> None:
    CASE.dump(tmp_path / "case.json")
    assert Case.load(tmp_path / "case.json") == CASE


def test_our_side_trains_grpo_without_a_penalty_on_every_prompt(tmp_path: Path) -> None:
    cfg = config.compose(overrides(CASE, tmp_path))
    stage = cfg.stage
    assert (stage.advantage, stage.epochs, stage.minibatches, stage.kl_coef, stage.reference) == (
        Advantage.group,
        1,
        1,
        0.0,
        False,
    )
    assert (
        stage.prompts_per_step,
        stage.samples_per_prompt,
        cfg.rollout.max_response_length,
        cfg.adapter.rank,
    ) == (2, 4, 6, 8)
    assert len((tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_the_reward_is_the_share_of_distinct_words() -> None:
    assert distinct_words(["a b a b", [{"role": "assistant", "content": "x"}], ""]) == [
        0.5,
        1.0,
        0.0,
    ]


def figures(step: float, memory: float) -> dict[str, float]:
    return {
        "step_s": step,
        "rollout_s": step / 2,
        "update_s": step / 4,
        "sync_s": step / 100,
        "bare_s": step / 5,
        "gap": 1e-6,
        "peak_rss_mb": memory,
        "response_tokens": 100.0,
    }


def test_the_table_holds_medians_and_ratios_of_neighbouring_steps() -> None:
    ours, trl = (
        [figures(s, 100) for s in (1.0, 2.0, 4.0)],
        [figures(s, 200) for s in (3.0, 5.0, 8.0)],
    )
    text = "\n".join(report(CASE, {"ours": ours, "trl": trl}))
    assert "TRL's time / ours: 2.50 [2.00, 3.00] (target 2); per token 2.50" in text
    assert (
        "real tokens: 0.80" in text
        and "share of the step: 1.0 %" in text
        and "against TRL's: 0.50" in text
    )


class Toy(nn.Module):
    """A language model just large enough for a pass."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=11)
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.seen: list[tuple[int, int]] = []
        self.answered: list[int] = []
        self.head.register_forward_hook(lambda _m, args, _o: self.answered.append(len(args[0])))

    def body(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.seen.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=self.embed(input_ids))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_the_bare_pass_covers_the_real_tokens_and_leaves_no_gradient() -> None:
    module = nn.Module()
    module.model = toy = Toy()
    assert bare_pass(module, 10, 40, 60, budget=35) > 0
    assert sum(rows * length for rows, length in toy.seen) == 100 and sum(toy.answered) == 60
    assert all(rows * length <= 35 for rows, length in toy.seen)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_worker_answers_each_request_and_a_dead_one_tells_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echo_worker.py").write_text(
        "import itertools\nfrom benchmarks.speed.protocol import serve\nn = itertools.count()\n"
        "def step():\n    i = next(n)\n    assert i < 2, 'no third step'\n    return {'i': "
        "float(i)}\nserve(step)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    CASE.dump(tmp_path / "case.json")
    worker = Worker.start("echo_worker", tmp_path / "case.json", tmp_path / "log")
    assert [worker.step()["i"], worker.step()["i"]] == [0.0, 1.0]
    with pytest.raises(RuntimeError, match="no third step"):
        worker.step()
    assert (
        json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))["name"] == "b-lora"
        and sys.executable
    )
