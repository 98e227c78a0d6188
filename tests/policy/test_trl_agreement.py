"""Losses and advantages give the numbers and gradients of TRL's own code where TRL has the same
algorithm; of its trainers only the loss runs.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from conf.choices import Aggregation, ImportanceMode, KLEstimator, Level, PolicyLoss, PreferenceLoss
from policy.advantages import group_advantages, group_index, leave_one_out_advantages
from policy.losses import (
    aggregation_units,
    aggregation_weights,
    importance_weights,
    kl_loss,
    policy_loss,
)
from policy.preference import PairLogprobs, combined_loss, preference_loss
from rlhf.online.collect import overlong

B, T, LIMIT = 6, 7, 9
LENGTHS = [7, 1, 4, 6, 2, 7]


def case(seed: int = 0) -> dict[str, Tensor]:
    """Logprobs far enough apart that every bound is crossed somewhere, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(B, T, generator=generator, dtype=torch.float64)

    old = -normal(1.0).abs() - 0.1
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    new = old + normal(0.4)
    return {
        "old": old,
        "new": new,
        "ref": old + normal(0.3),
        "rollout": old + normal(0.3),
        "mask": mask,
        "adv": normal(1.0)[:, 0],
    }


def fake_accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        device="cpu",
        unwrap_model=lambda m: m,
    )


def trl_grpo(case: dict[str, Tensor], logprobs: Tensor, **settings: Any) -> Tensor:
    """GRPOTrainer's loss of one batch."""
    trainer: Any = object.__new__(GRPOTrainer)
    values = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LIMIT,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "model": SimpleNamespace(training=True),
        "accelerator": fake_accelerator(),
        "_metrics": {"train": defaultdict(list)},
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    } | settings
    for name, value in values.items():
        object.__setattr__(trainer, name, value)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        logprobs,
        torch.zeros_like(logprobs),
        None,
    )
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": case["mask"].long(),
        "advantages": case["adv"],
        "old_per_token_logps": case["old"],
        "ref_per_token_logps": case["ref"],
        "num_items_in_batch": case["mask"].sum(),
        "importance_sampling_ratio": settings.get("ratio"),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def ours(
    case: dict[str, Tensor],
    logprobs: Tensor,
    kind: PolicyLoss,
    aggregation: Aggregation,
    beta: float = 0.0,
    weighted: bool = False,
    **settings: Any,
) -> Tensor:
    mask = case["mask"]
    weights = aggregation_weights(mask, aggregation).double()
    units = aggregation_units(mask, aggregation, LIMIT)
    extra = settings.pop("importance", None)
    advantages = case["adv"][:, None].expand(B, T)
    loss, _ = policy_loss(
        logprobs,
        case["old"],
        advantages,
        mask,
        kind=kind,
        denominator=units,
        weights=weights if extra is None else weights * extra,
        **({"cliprange": 0.2} | settings),
    )
    if beta:
        estimator = KLEstimator.k3_weighted if weighted else KLEstimator.k3
        loss = loss + beta * kl_loss(
            logprobs,
            case["ref"],
            case["old"],
            mask,
            estimator=estimator,
            weights=weights,
            denominator=units,
        )
    return loss


def assert_same(case: dict[str, Tensor], mine: Any, theirs: Any) -> None:
    """Values and gradients, to float64 rounding; and neither is trivially zero."""
    results = []
    for function in (mine, theirs):
        logprobs = case["new"].clone().requires_grad_()
        loss = function(logprobs)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        results.append((loss.detach(), torch.where(case["mask"], gradient, 0.0)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)
    assert float(results[1][1].abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [
        ("grpo", Aggregation.sequence),
        ("dapo", Aggregation.token),
        ("dr_grpo", Aggregation.constant),
    ],
)
@pytest.mark.parametrize("high", [0.2, 0.28])
def test_clipped_losses_and_their_aggregation(
    loss_type: str, aggregation: Aggregation, high: float
) -> None:
    data = case()
    assert_same(
        data,
        lambda x: ours(data, x, PolicyLoss.clip, aggregation, cliprange_high=high),
        lambda x: trl_grpo(data, x, loss_type=loss_type, epsilon_high=high),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_grpo_with_kl_in_the_loss(weighted: bool) -> None:
    data = case()
    args = SimpleNamespace(delta=None, use_bias_correction_kl=weighted, steps_per_generation=1)
    assert_same(
        data,
        lambda x: ours(data, x, PolicyLoss.clip, Aggregation.sequence, beta=0.3, weighted=weighted),
        lambda x: trl_grpo(data, x, beta=0.3, args=args),
    )


def test_gspo() -> None:
    data = case()
    assert_same(
        data,
        lambda x: ours(
            data, x, PolicyLoss.gspo, Aggregation.sequence, cliprange=0.03, cliprange_high=0.04
        ),
        lambda x: trl_grpo(
            data, x, importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04
        ),
    )


def test_cispo() -> None:
    """TRL's epsilon_high is the bound itself, ours lies above 1."""
    data = case()
    assert_same(
        data,
        lambda x: ours(data, x, PolicyLoss.cispo, Aggregation.token, cliprange_high=0.1),
        lambda x: trl_grpo(data, x, loss_type="cispo", epsilon_high=1.1),
    )


def test_importance_correction_multiplies_the_surrogate() -> None:
    data = case()
    low = 0.95  # TRL's vllm_importance_sampling_clip_min
    for mode, level in [(m, le) for m in ImportanceMode for le in Level]:
        weights = importance_weights(
            data["old"],
            data["rollout"],
            1.1,
            floor=low,
            mode=mode,
            level=level,
            response_mask=data["mask"],
        )
        difference = torch.where(data["mask"], data["old"] - data["rollout"], 0.0)
        ratio = torch.exp(
            difference.sum(1, keepdim=True) if level is Level.sequence else difference
        )
        # TRL, token_truncate and so on
        theirs = (
            ratio.clamp(max=1.1)
            if mode is ImportanceMode.truncate
            else ratio.masked_fill((ratio > 1.1) | (ratio < low), 0.0)
        )
        assert bool((ratio > 1.1).any()) and bool((ratio < low).any())
        assert_same(
            data,
            lambda x, weights=weights: ours(
                data, x, PolicyLoss.clip, Aggregation.sequence, importance=weights
            ),
            lambda x, theirs=theirs: trl_grpo(
                data, x, use_vllm=True, vllm_importance_sampling_correction=True, ratio=theirs
            ),
        )


def test_rloo_takes_the_same_direction_as_trls_while_the_policy_is_the_old_one() -> None:
    """TRL clips a response's ratio, we those of its tokens: at the first optimizer step both
    gradients are A_i times that of log pi(y_i).
    """
    data = case()
    data["new"] = data["old"].clone()
    trainer: Any = object.__new__(RLOOTrainer)
    for name, value in {
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "aux_loss_enabled": False,
        "model": SimpleNamespace(training=True),
        "accelerator": fake_accelerator(),
        "_metrics": {"train": defaultdict(list)},
    }.items():
        object.__setattr__(trainer, name, value)
    ids = torch.zeros(B, T, dtype=torch.long)

    def theirs(logprobs: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        )
        inputs = {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": data["mask"].long(),
            "advantages": data["adv"],
        }
        return RLOOTrainer._compute_loss(
            trainer, None, inputs | {"old_logps": (data["old"] * data["mask"]).sum(1)}
        )

    def mine(logprobs: Tensor) -> Tensor:
        loss, _ = policy_loss(
            logprobs,
            data["old"],
            data["adv"][:, None].expand(B, T),
            data["mask"],
            cliprange=0.2,
            denominator=B,
        )
        return loss

    gradients = []
    for function in (mine, theirs):
        logprobs = data["new"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(logprobs), logprobs)
        gradients.append(torch.where(data["mask"], gradient, 0.0))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_group_advantages() -> None:
    """As in GRPOTrainer: (r - mean) / (std + 1e-4); ours has no 1e-4, a relative difference of at
    most 1e-4 / std.
    """
    scores = torch.tensor([1.0, 2.0, 4.0, -1.0, 3.0, 0.5, 7.0, 7.0, 7.0])
    groups = group_index(["a"] * 3 + ["b"] * 3 + ["c"] * 3)
    grouped = scores.view(3, 3)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    theirs = centred / (grouped.std(1).repeat_interleave(3) + 1e-4)
    torch.testing.assert_close(
        group_advantages(scores, groups, std=True), theirs, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        group_advantages(scores, groups, std=False), centred, rtol=1e-6, atol=1e-6
    )


def test_leave_one_out_advantages() -> None:
    """As in RLOOTrainer: r_i - (sum of the group - r_i) / (k - 1)."""
    scores = torch.tensor([1.0, 2.0, 4.0, -1.0, 3.0, 0.5])
    grouped = scores.view(2, 3)
    theirs = (grouped - (grouped.sum(1, keepdim=True) - grouped) / 2).flatten()
    torch.testing.assert_close(leave_one_out_advantages(scores, group_index("aaabbb")), theirs)


def test_soft_overlong_penalty() -> None:
    lengths = list(range(1, 21))
    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=6)(
        completion_ids=[[0] * n for n in lengths]
    )
    assert overlong(lengths, 20, 6).tolist() == pytest.approx([-value for value in theirs])


ONLINE = [
    loss for loss in PreferenceLoss if loss not in (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
]


def trl_dpo(
    data: dict[str, Tensor], logprobs: Tensor, losses: list[str], weights: list[float]
) -> Tensor:
    """DPOTrainer's loss; rows 0 to 2 are chosen, 3 to 5 rejected."""
    trainer: Any = object.__new__(DPOTrainer)
    masked = torch.where(data["mask"], logprobs, 0.0)
    ref = torch.where(data["mask"], data["ref"], 0.0)
    zeros = torch.zeros(B, T, dtype=torch.float64)

    def model(log_probs: Tensor) -> Any:
        return lambda **kwargs: SimpleNamespace(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    for name, value in {
        "model": SimpleNamespace(training=True),
        "ref_model": model(ref),
        "accelerator": fake_accelerator(),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "f_divergence_type": "reverse_kl",
        "loss_types": losses,
        "loss_weights": weights,
        "beta": 0.4,
        "label_smoothing": 0.1,
        "use_weighting": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        "_metrics": {"train": defaultdict(list)},
    }.items():
        object.__setattr__(trainer, name, value)
    mask = torch.cat([torch.zeros(B, 1), data["mask"].float()], dim=1)
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, T + 1),
        "completion_mask": mask,
    }
    return DPOTrainer._compute_loss(trainer, model(masked), inputs, return_outputs=False)


def pairs_of(data: dict[str, Tensor], logprobs: Tensor) -> PairLogprobs:
    new, ref = (
        torch.where(data["mask"], logprobs, 0.0).sum(1),
        torch.where(data["mask"], data["ref"], 0.0).sum(1),
    )
    lengths = data["mask"].sum(1).double()
    return PairLogprobs(new[:3], new[3:], ref[:3], ref[3:], lengths[:3], lengths[3:])


@pytest.fixture
def no_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    import trl.trainer.dpo_trainer as module

    monkeypatch.setattr(
        module, "disable_gradient_checkpointing", lambda *args: contextlib.nullcontext()
    )
    monkeypatch.setattr(module, "is_peft_model", lambda model: False)


@pytest.mark.usefixtures("no_checkpointing")
@pytest.mark.parametrize("loss", [loss for loss in ONLINE if loss is not PreferenceLoss.sft])
def test_preference_losses(loss: PreferenceLoss) -> None:
    data = case(3)
    assert_same(
        data,
        lambda x: preference_loss(pairs_of(data, x), loss, beta=0.4, label_smoothing=0.1).mean(),
        lambda x: trl_dpo(data, x, [loss.value], [1.0]),
    )


@pytest.mark.usefixtures("no_checkpointing")
def test_preference_losses_combine_with_weights() -> None:
    data = case(3)
    losses = [PreferenceLoss.sigmoid, PreferenceLoss.apo_zero, PreferenceLoss.ipo]
    assert_same(
        data,
        lambda x: combined_loss(
            pairs_of(data, x), losses, [0.8, 0.3, 2.0], beta=0.4, label_smoothing=0.1
        ).mean(),
        lambda x: trl_dpo(data, x, [loss.value for loss in losses], [0.8, 0.3, 2.0]),
    )


@pytest.mark.usefixtures("no_checkpointing")
def test_the_sft_loss_is_a_mean_over_pairs_where_trls_is_one_over_tokens() -> None:
    data = case(3)
    data["mask"][:3] = data["mask"][:1]  # chosen responses of one length: both means are the same
    assert_same(
        data,
        lambda x: preference_loss(pairs_of(data, x), PreferenceLoss.sft, beta=0.4).mean(),
        lambda x: trl_dpo(data, x, ["sft"], [1.0]),
    )


def test_losses_of_a_whole_batch_are_refused() -> None:
    data = case()
    for loss in (PreferenceLoss.aot, PreferenceLoss.aot_unpaired):
        with pytest.raises(ValueError, match="whole batch"):
            preference_loss(pairs_of(data, data["new"]), loss, beta=0.1)
    with pytest.raises(ValueError, match="label_smoothing above 0"):
        preference_loss(pairs_of(data, data["new"]), PreferenceLoss.exo_pair, beta=0.1)
