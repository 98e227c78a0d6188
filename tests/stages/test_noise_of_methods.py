"""stage.noise_scale where not every parameter trains from the start, and where a method has a
penalty: what the hooks see of each micro-batch is the gradient that it adds.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policy.engines.base import GradientNoise
from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.checking import check
from tests.offline import trl_tools

pytestmark = pytest.mark.usefixtures("one_thread")
COMMON = ["model.dtype=float32", "tracking=none", "stage.learning_rate=1e-2", "stage.steps=4"]
COMMON += ["stage.noise_scale=0.5", "stage.max_grad_norm=1e9"]
OFFLINE = ["stage.batch_size=6", "stage.eval_steps=4", "stage.max_length=48"]
OFFLINE += ["engine.micro_batch_size=2"]
ONLINE = ["data.max_prompt_length=24", "rollout.max_response_length=4", "rollout=hf"]
ONLINE += ["reward.function=tests.toys:even_tokens", "stage.save_steps=0"]
ONLINE += ["stage.prompts_per_step=2", "stage.samples_per_prompt=2", "engine.micro_tokens=16"]
ADALORA = ["adapter=adalora", "adapter.rank=2", "adapter.adalora.initial_rank=4"]
UNFREEZE = ["stage.unfreeze.every=2"]
PLAIN = ["adapter.adalora.orthogonality=0"]
CASES = {
    "adalora": ("sft", [*OFFLINE, *ADALORA]),
    "unfreezing": ("sft", [*OFFLINE, *UNFREEZE]),
    "unfreezing online": ("grpo", [*ONLINE, *UNFREEZE]),
    "adalora online": ("grpo", [*ONLINE, *ADALORA, *PLAIN]),
}


def composed(folder: Path, base: Path, stage: str, *more: str) -> config.Config:
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(40))
    toys.write_jsonl(folder / "grpo.jsonl", toys.prompt_rows())
    given = [f"stage={stage}", f"run.dir={folder}", f"model.path={base}"]
    return config.compose([*given, f"data.path={folder / stage}.jsonl", *COMMON, *more])


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_each_micro_batch_is_seen_whole(
    case: str, tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, options = CASES[case]
    before: dict[int, Tensor] = {}
    parts, trained = [], []
    part, end = GradientNoise.part, GradientNoise.end

    def compared(self: GradientNoise, rows: int) -> None:
        square = 0.0
        for number, param in enumerate(self.params):
            if param.grad is None:
                continue
            own = param.grad - before.get(number, torch.zeros_like(param.grad))
            square += float(own.double().square().sum())
            before[number] = param.grad.clone()
        assert float(self._norm) == pytest.approx(square, rel=1e-4)
        parts.append(square)
        trained.append(len(before))
        part(self, rows)

    def ended(self: GradientNoise, norm: float | None) -> None:
        before.clear()
        end(self, norm)

    monkeypatch.setattr(GradientNoise, "part", compared)
    monkeypatch.setattr(GradientNoise, "end", ended)
    cfg = composed(tmp_path, tiny_model(), stage, *options)
    check(cfg)
    ctx = RunContext.open(cfg)
    module = "online" if stage == "grpo" else stage
    importlib.import_module(f"rlhf.stages.{module}").run(ctx, stage_rows)
    assert len(parts) >= 8 and all(square > 0 for square in parts)
    assert (trained[-1] > trained[0]) is ("unfreezing" in case), "another block trains at the end"
    lines: list[dict[str, Any]] = []
    for line in (ctx.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        lines.append(json.loads(line))
    traces = [line["train/noise_trace"] for line in lines if "train/noise_trace" in line]
    assert len(traces) == 4 and all(trace >= 0 for trace in traces)


def test_a_penalty_in_one_micro_batch_is_no_noise(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    cfg = composed(tmp_path, tiny_model(), "grpo", *ONLINE, *ADALORA)
    with pytest.raises(UserError) as refused:
        check(cfg)
    for named in ("stage.noise_scale=0.5", "adapter=adalora", "adapter.adalora.orthogonality=0"):
        assert named in str(refused.value)
    check(composed(tmp_path, tiny_model(), "grpo", *ONLINE, *ADALORA, *PLAIN))
