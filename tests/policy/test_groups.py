"""Groups of parameters: their own rates, and what waits stays to the bit and then starts afresh."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.choices import Scheduler
from policy.engines import loading
from policy.engines.base import OptimSettings
from policy.engines.loading import Rates
from policy.engines.torch import TorchEngine
from rlhf.process import distributed
from rlhf.types import UserError

WIDTH, ROWS, STEPS, BLOCKS = 8, 16, 8, 3
OPTIM = OptimSettings(
    learning_rate=2e-2,
    weight_decay=0.3,
    betas=(0.9, 0.99),
    eps=1e-6,
    max_grad_norm=0.2,
    scheduler=Scheduler.cosine,
    warmup_steps=1,
    total_steps=STEPS,
)


class Tower(nn.Module):
    """Blocks above each other, with the attributes by which DeepSpeed's engine finds the width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.model.config = type("C", (), {"hidden_size": WIDTH})()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = torch.tanh(block(x))
        return x


def plain_rates(module: nn.Module) -> Rates:
    return loading.one_rate(module)


def falling_rates(module: nn.Module) -> Rates:
    """A block more each two steps, from the top; half the rate for each block further down, and
    0.8 of it at each unfreezing.
    """

    def place(name: str, param: nn.Parameter) -> tuple[float, int]:
        depth = BLOCKS - 1 - int(name.split(".")[2])
        return 0.5**depth, depth

    return Rates(loading.grouped(module, place), factor=0.8, every=2)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(ROWS, WIDTH, generator=generator),
        torch.randn(ROWS, WIDTH, generator=generator),
    )


def engine_steps(engine: Any, start: int, stop: int) -> None:
    """Optimizer steps of two micro-batches each, on this rank's rows."""
    rank, ranks = distributed.rank(), distributed.world_size()
    for step in range(start, stop):
        x, y = (whole[rank::ranks] for whole in batch(step))
        halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
        for number, (a, b) in enumerate(halves):
            loss = ((engine(a) - b) ** 2).sum() / ROWS
            engine.backward(loss, last=number == len(halves) - 1)
        engine.step()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def torch_engine(rates: Any = plain_rates) -> TorchEngine:
    module = Tower()
    return TorchEngine(module, OPTIM, torch.device("cpu"), rates(module))


def by_hand() -> list[dict[str, Tensor]]:
    """`falling_rates` written out: AdamW by its formula, the weights after each step."""
    module = Tower()
    depth = {name: BLOCKS - 1 - int(name.split(".")[2]) for name, _ in module.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    taken = dict.fromkeys(depth, 0)
    history = []
    for step in range(STEPS):
        x, y = batch(step)
        module.zero_grad()
        (((module(x) - y) ** 2).sum() / ROWS).backward()
        unfrozen = min(step // 2, BLOCKS - 1)
        training = {n: p for n, p in module.named_parameters() if depth[n] <= unfrozen}
        norm = sum(float((p.grad**2).sum()) for p in training.values()) ** 0.5
        clip = min(1.0, OPTIM.max_grad_norm / (norm + 1e-6))
        with torch.no_grad():
            for name, param in training.items():
                gradient = param.grad * clip
                taken[name] += 1
                mean[name] += 0.1 * (gradient - mean[name])
                square[name] += 0.01 * (gradient**2 - square[name])
                rate = OPTIM.rate(step) * 0.8**unfrozen * 0.5 ** depth[name]
                first = mean[name] / (1 - 0.9 ** taken[name])
                second = square[name] / (1 - 0.99 ** taken[name])
                kept = param * (1 - rate * OPTIM.weight_decay)
                param.copy_(kept - rate * first / (second.sqrt() + OPTIM.eps))
        history.append(weights_of(module))
    return history


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=name)


def test_one_group_is_the_optimizer_without_groups() -> None:
    """To the bit, in the state that a checkpoint holds too."""
    engine = torch_engine()
    module = Tower()
    optimizer = torch.optim.AdamW(
        list(module.parameters()),
        lr=OPTIM.learning_rate,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        fused=True,
    )
    engine_steps(engine, 0, STEPS)
    for step in range(STEPS):
        x, y = batch(step)
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            (((module(a) - b) ** 2).sum() / ROWS).backward()
        nn.utils.clip_grad_norm_(module.parameters(), OPTIM.max_grad_norm)
        optimizer.param_groups[0]["lr"] = OPTIM.rate(step)
        optimizer.step()
        optimizer.zero_grad()
    found = weights_of(engine.module)
    assert all(torch.equal(found[name], p) for name, p in module.named_parameters())
    assert engine.optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_unfreezing_is_what_is_written_by_hand() -> None:
    engine, start, expected = torch_engine(falling_rates), weights_of(Tower()), by_hand()
    for step in range(STEPS):
        engine_steps(engine, step, step + 1)
        found = weights_of(engine.module)
        check_close(found, expected[step], 2e-6)
        for name, tensor in start.items():
            waits = 2 * (BLOCKS - 1 - int(name.split(".")[2]))
            assert torch.equal(found[name], tensor) is (step < waits), (name, step)


def test_a_group_that_waits_computes_no_gradient() -> None:
    engine = torch_engine(falling_rates)
    x, _ = batch(0)
    engine.backward(engine(x).sum(), last=True)
    graded = [name for name, p in engine.module.named_parameters() if p.grad is not None]
    assert graded == ["model.blocks.2.weight", "model.blocks.2.bias"]


def test_unfreezing_resumes_to_the_bit(tmp_path: Path) -> None:
    straight = torch_engine(falling_rates)
    engine_steps(straight, 0, 3)
    straight.save(tmp_path)
    resumed = torch_engine(falling_rates)
    resumed.load(tmp_path)
    for engine in (straight, resumed):
        engine_steps(engine, 3, STEPS)
    found, expected = weights_of(resumed.module), weights_of(straight.module)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_groups_than_a_checkpoints_are_refused(tmp_path: Path) -> None:
    torch_engine(falling_rates).save(tmp_path)
    with pytest.raises(UserError, match=r"groups of \[2, 2, 2\] tensors, this run's of \[6\]"):
        torch_engine().load(tmp_path)


def test_scales_come_from_names() -> None:
    module = Tower()
    module.model.blocks[1].weight.requires_grad_(False)
    rates = loading.rates_by_name(module, lambda name: 4.0 if name.endswith("bias") else 1.0)
    assert [(group.scale, len(group.params)) for group in rates.groups] == [(1.0, 2), (4.0, 3)]
    assert rates.factors(0) == [1.0, 4.0] and not rates.plain
    assert loading.rates_by_name(module, lambda name: 1.0).plain


# ---- ZeRO ----


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.policy.groups_worker", str(folder), "0", "1", "2", "3"]
    done = subprocess.run(
        command,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["plain", "falling"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_equal_the_torch_engine(zero_runs: Path, zero: int, kind: str) -> None:
    rates = {"plain": plain_rates, "falling": falling_rates}[kind]
    engine = torch_engine(rates)
    engine_steps(engine, 0, STEPS)
    expected = weights_of(engine.module)
    half = torch.load(zero_runs / f"{kind}{zero}_half.pt", weights_only=True)
    for name, tensor in weights_of(Tower()).items():
        waits = kind == "falling" and name.startswith("model.blocks.0.")
        assert torch.equal(half[name], tensor) is waits, name
    found = torch.load(zero_runs / f"{kind}{zero}.pt", weights_only=True)
    check_close(found, expected, 1e-5)
    resumed = torch.load(zero_runs / f"{kind}{zero}_resumed.pt", weights_only=True)
    assert all(torch.equal(resumed[name], found[name]) for name in found)
    if zero:
        universal = torch.load(zero_runs / f"{kind}{zero}_universal.pt", weights_only=True)
        check_close(universal, found, 1e-6)
