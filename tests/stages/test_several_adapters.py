"""Runs whose adapter stands on those of earlier runs (adapter.load), or beside a rounded base: they
train against what they start from, and write by vLLM what the trainer computes.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.cli import config
from rlhf.models.directories import contents
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.checking import check
from tests.offline import trl_tools
from tests.stages.test_methods import OFFLINE, ONLINE, figures, read

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = "adapter.bottleneck.size=8"
PLAIN_BOTTLENECK = "adapter.bottleneck.size=64"  # its own value: other methods don't read it
MODULES = {"sft": "sft", "dpo": "preference", "grpo": "online"}
ROWS = {"sft": "sft.jsonl", "dpo": "pairs.jsonl", "grpo": "prompts.jsonl"}


class Runs:
    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(20))
        trl_tools.write_rows(folder / "pairs.jsonl", trl_tools.pair_rows(20))
        toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())

    def config(self, stage: str, name: str, *more: str) -> config.Config:
        common = ONLINE if stage == "grpo" else OFFLINE
        given = [f"stage={stage}", f"run.dir={self.folder}", f"run.name={name}"]
        given += [f"model.path={self.base}", f"data.path={self.folder / ROWS[stage]}"]
        return config.compose([*given, *common, "adapter=pfeiffer", SIZE, *more])

    def run(self, stage: str, name: str, *more: str) -> Path:
        ctx = RunContext.open(self.config(stage, name, *more))
        importlib.import_module(f"rlhf.stages.{MODULES[stage]}").run(ctx, stage_rows)
        return ctx.dir

    def metrics(self, run: Path) -> list[dict[str, float]]:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def runs(tmp_path: Path, tiny_model: Callable[..., Path]) -> Runs:
    return Runs(tmp_path, tiny_model())


@pytest.fixture
def earlier(runs: Runs) -> str:
    """adapter.load with the adapters of two runs."""
    found = []
    for name in ("first", "second"):
        run = runs.run("sft", name, f"adapter.name={name}", "stage.learning_rate=3e-2")
        found.append(str(run / "adapter"))
    return f"adapter.load=[{','.join(found)}]"


WAYS = [
    [],
    pytest.param(["adapter.bottleneck.combine=fuse"], marks=pytest.mark.full, id="fuse"),
]


@pytest.mark.parametrize("way", WAYS)
def test_dpo_compares_with_the_adapters_that_were_there(
    way: list[str], runs: Runs, earlier: str
) -> None:
    """Not with the plain base: the first loss, at rewards of 0, is ln 2."""
    run = runs.run("dpo", "dpo", earlier, *way)
    first = next(row for row in runs.metrics(run) if "eval_loss" in row)
    assert first["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(first["eval_rewards/chosen"]) < 1e-6
    last = [row for row in runs.metrics(run) if "eval_loss" in row][-1]
    assert last["eval_loss"] < first["eval_loss"]


@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_an_online_run_starts_at_no_distance(way: list[str], runs: Runs, earlier: str) -> None:
    run = runs.run("grpo", "grpo", earlier, "rollout=vllm", "stage.kl_coef=0.1", *way)
    steps = [row for row in runs.metrics(run) if "objective/kl" in row]
    assert abs(steps[0]["objective/kl"]) < 1e-6 < abs(steps[-1]["objective/kl"])
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in steps)
    kept = load_file(run / "adapter" / "adapter_model.safetensors")
    for name in ("first", "second"):
        held = load_file(runs.folder / name / "sft" / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(kept[key], tensor) for key, tensor in held.items())
    base = figures(read(runs.base, "sft"))
    assert not torch.equal(figures(read(run / "model", "sft")), base)


def test_a_reference_that_moves_is_refused(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"whose adapter no weights can hold.*reference_every=0"):
        check(runs.config("grpo", "moving", "rollout=hf", "stage.reference_every=1"))


def test_a_mixture_of_experts_stands_on_merged_adapters(runs: Runs) -> None:
    """Of base and half of a LoRA: start/ holds them, and the mixture names it as its base."""
    lora = runs.run("sft", "polite", "adapter=lora", PLAIN_BOTTLENECK, "adapter.name=polite")
    given = ["adapter=molora", PLAIN_BOTTLENECK, "adapter.molora.experts=3"]
    given += [f"adapter.load=[{lora / 'adapter'}]", "adapter.load_weights=[0.5]"]
    check(runs.config("sft", "experts", *given))
    run = runs.run("sft", "experts", *given)
    base, first = read(runs.base, "sft").state_dict(), read(lora / "adapter", "sft").state_dict()
    for name, tensor in read(run / "start", "sft").state_dict().items():
        wanted = base[name] + 0.5 * (first[name] - base[name])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)
    assert contents(run / "model").weights == str((run / "start").resolve())
    start, trained = figures(read(run / "start", "sft")), figures(read(run / "model", "sft"))
    assert (trained - start).abs().max() > 1e-4


@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.parametrize("kind", ["houlsby", "parallel", "molora"])
def test_beside_a_base_in_4_bits(kind: str, runs: Runs) -> None:
    """vLLM gets the rounded base, and the adapter's own layers inside it."""
    given = [f"adapter={kind}", "adapter.quantize=nf4", "rollout=vllm"]
    if kind == "molora":
        given.append(PLAIN_BOTTLENECK)
    run = runs.run("grpo", "rounded", *given)
    steps = [row for row in runs.metrics(run) if "rollout/logprob_gap" in row]
    assert len(steps) == 2
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in steps)
