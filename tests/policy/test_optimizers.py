"""stage.optimizer: what steps the weights beside AdamW, its state, and where it can't."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from conf.choices import EngineKind, Scheduler
from conf.model import EngineConfig
from conf.schedule import OptimizerKind
from conf.stages import OnlineStage, SFTStage
from policy.engines.base import OPTIMIZERS, OptimSettings, as_asked, check_optimizer
from policy.engines.torch import TorchEngine
from rlhf.checks.memory.states import Counts, Setting, training_states
from rlhf.stages import methods
from rlhf.types import UserError

KINDS = [kind for kind in OptimizerKind if kind is not OptimizerKind.adamw]
OPTIM = OptimSettings(
    learning_rate=1e-2,
    weight_decay=0.1,
    betas=(0.9, 0.99),
    eps=1e-8,
    max_grad_norm=0.0,
    scheduler=Scheduler.constant,
    warmup_steps=0,
    total_steps=10,
)
SIZE = 96  # 96 x 96 elements: bitsandbytes keeps less than 4096 in 32 bits


def setup_module() -> None:
    methods.register()


def engine(kind: OptimizerKind, **more: Any) -> TorchEngine:
    torch.manual_seed(0)
    settings = replace(OPTIM, optimizer=kind, **more)
    return TorchEngine(nn.Linear(SIZE, SIZE, bias=False), settings, torch.device("cpu"))


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, SIZE, generator=generator) for _ in range(count)]


def stepped(trained: TorchEngine, steps: list[Tensor]) -> Tensor:
    for gradient in steps:
        trained.params[0].grad = gradient.clone()
        trained.step()
    return trained.params[0].detach().clone()


def test_every_kind_is_known() -> None:
    assert set(OPTIMIZERS) == set(KINDS)


def test_lion_by_hand() -> None:
    trained, (first, second) = engine(OptimizerKind.lion), gradients(2)
    start = trained.params[0].detach().clone()
    # decay first, then the sign of the mean of gradients with the first beta; the mean itself
    # goes on with the second
    one = start * (1 - 1e-2 * 0.1) - 1e-2 * first.sign()
    mean = 0.01 * first
    two = one * (1 - 1e-2 * 0.1) - 1e-2 * (0.9 * mean + 0.1 * second).sign()
    after = stepped(trained, [first, second])
    # an element whose mean is next to 0 may have either sign in float32
    assert ((after - two).abs() > 1e-6).float().mean() < 1e-3


def test_adafactor_is_transformers_own() -> None:
    trained, steps = engine(OptimizerKind.adafactor), gradients(3)
    weight = nn.Parameter(trained.params[0].detach().clone())
    reference = Adafactor(
        [weight], lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False
    )
    for gradient in steps:
        weight.grad = gradient.clone()
        reference.step()
    assert torch.equal(stepped(trained, steps), weight.detach())


def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(12, 8),
            "wide": nn.Linear(8, 24),
            "tall": nn.Linear(24, 8, bias=False),
            "score": nn.Linear(8, 1, bias=False),
        }
    )
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    matrices = [copies["wide.weight"], copies["tall.weight"]]
    rest = [copies[name] for name in ("embedding.weight", "wide.bias", "score.weight")]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    settings = replace(OPTIM, optimizer=OptimizerKind.muon)
    trained = TorchEngine(model, settings, torch.device("cpu"))
    for _ in range(3):
        for name, param in model.named_parameters():
            param.grad = torch.randn_like(param)
            copies[name].grad = param.grad.clone()
        trained.step()
        muon.step()
        adam.step()
    for name, param in model.named_parameters():
        tolerance = 1e-4 if name in ("wide.weight", "tall.weight") else 1e-6
        torch.testing.assert_close(param, copies[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (OptimizerKind.paged_adamw, 1e-6),
        (OptimizerKind.adamw_8bit, 5e-3),
        (OptimizerKind.paged_adamw_8bit, 5e-3),
    ],
)
def test_adamw_in_other_forms_is_adamw(kind: OptimizerKind, tolerance: float) -> None:
    steps = gradients(5)
    plain = stepped(engine(OptimizerKind.adamw), steps)
    other = stepped(engine(kind), steps)
    assert (plain - other).abs().max() < tolerance
    assert (plain - engine(kind).params[0]).abs().max() > 2 * 1e-2  # five steps of 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_as_if_nothing_had_been(kind: OptimizerKind, tmp_path: Path) -> None:
    steps = gradients(4)
    whole = stepped(engine(kind), steps)
    first = engine(kind)
    stepped(first, steps[:2])
    first.save(tmp_path)
    second = engine(kind)
    second.load(tmp_path)
    assert torch.equal(stepped(second, steps[2:]), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_its_rate_is_the_schedules(kind: OptimizerKind) -> None:
    trained = engine(kind, warmup_steps=4, weight_decay=0.0)
    before = trained.params[0].detach().clone()
    after = stepped(trained, gradients(1))
    whole = engine(kind, weight_decay=0.0)
    full = stepped(whole, gradients(1))
    # the first of four warm-up steps has a quarter of the rate
    assert torch.allclose((after - before) * 4, full - before, rtol=1e-3, atol=1e-6)


def test_groups_keep_their_decay() -> None:
    decayed, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    groups = [
        {"params": [decayed], "weight_decay": 0.5},
        {"params": [other], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-2)
    assert as_asked(plain, OPTIM) is plain
    asked = as_asked(plain, replace(OPTIM, optimizer=OptimizerKind.lion))
    assert [group["weight_decay"] for group in asked.param_groups] == [0.5, 0.0]
    for param in (decayed, other):
        param.grad = torch.ones(4)
    asked.step()
    assert torch.allclose(decayed, torch.full((4,), 1 - 1e-2 * 0.5 - 1e-2))
    assert torch.allclose(other, torch.full((4,), 1 - 1e-2))


def test_deepspeed_steps_adamw_alone() -> None:
    zero = EngineConfig(kind=EngineKind.deepspeed, zero_stage=1)
    check_optimizer(OptimizerKind.adamw, zero)
    with pytest.raises(UserError, match=r"stage\.optimizer=lion.*engine=torch"):
        check_optimizer(OptimizerKind.lion, zero)
    for kind in KINDS:
        check_optimizer(kind, EngineConfig())


def test_a_stage_names_it() -> None:
    for stage in (
        SFTStage(optimizer=OptimizerKind.lion),
        OnlineStage(optimizer=OptimizerKind.lion),
    ):
        settings = OptimSettings.from_stage(stage, total_steps=4, learning_rate=1e-3)
        assert settings.optimizer is OptimizerKind.lion


@pytest.mark.parametrize("kind", OptimizerKind)
def test_the_plan_counts_its_state(kind: OptimizerKind) -> None:
    trained = engine(kind)
    stepped(trained, gradients(1))
    held = sum(
        value.numel() * value.element_size()
        for state in trained.optimizer.state.values()
        for name, value in state.items()
        # the table of what 256 values mean is one for all tensors
        if isinstance(value, Tensor) and not name.startswith("qmap")
    )
    weights = SIZE * SIZE
    counts = Counts(weights, weights, weights, weights)
    states = training_states(counts, Setting(optimizer=kind))
    planned = states.resident["Adam"].device
    assert held <= planned + 8
    # Adafactor's plan is of one tensor's size, Muon's of weights that are all embedding
    if kind not in (OptimizerKind.adafactor, OptimizerKind.muon):
        assert planned == pytest.approx(held, rel=0.05)
