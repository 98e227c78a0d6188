"""Weights that leave the trainer, the plain engine, and an update that no split changes."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Starcoder2Config,
)

from conf.choices import AdapterKind, Advantage, PolicyLoss, PreferenceLoss, Scheduler
from conf.schema import AdapterConfig
from conf.stages import OnlineStage
from policy.adapters import METHODS, attach, enable_checkpointing
from policy.batching import collate
from policy.engines.base import NonFinite, OptimSettings
from policy.engines.torch import TorchEngine
from policy.forward import Layout, Models
from policy.model import (
    CriticModule,
    PolicyModule,
    base_of,
    has_dropout,
    take_segments,
    turn_off_dropout,
)
from policy.preference import LOSSES
from policy.prepare import TrainBatch, needs_old_logprobs, prepare
from policy.saving import adapter_weights, full_weights, iterate_weights, save_adapter, save_model
from policy.update import update
from rlhf.cli import config
from rlhf.types import UserError

VOCAB, PAD = 64, 0
OPTIM = OptimSettings(
    learning_rate=1e-2,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    # with 1e-8 an element whose gradient is rounding noise would move as far as any other
    eps=1e-4,
    max_grad_norm=0.0,
    scheduler=Scheduler.constant,
    warmup_steps=0,
    total_steps=10,
)


def shape(tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        num_labels=1,
        pad_token_id=PAD,
    )


def causal(tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(shape(tied)).float()


def critic_model(seed: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(shape()).float()


def lora(**changes: object) -> AdapterConfig:
    return replace(AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0), **changes)


def shake(model: torch.nn.Module, seed: int = 3) -> None:
    """Move every trainable weight, so that a fresh adapter (whose update is 0) becomes visible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1 * torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_are_the_state_dict_tied_names_included(tied: bool) -> None:
    model = causal(tied)
    sent = dict(full_weights(model).tensors)
    expected = model.state_dict()
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_are_the_adapters_model_and_leave_the_trainer_untouched(dora: bool) -> None:
    model = attach(causal(tied=False), lora(dora=dora), task="CAUSAL_LM")
    shake(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plain = causal(tied=False, seed=9)
    plain.load_state_dict(dict(iterate_weights(model)), strict=True)
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), (
        "merging drifted the trained weights"
    )


def test_adapter_weights_have_pefts_names_and_only_the_adapter(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel

    model = attach(causal(), lora(), task="CAUSAL_LM")
    shake(model)
    weights = adapter_weights(model)
    assert weights.tensors and all("lora_" in name for name in weights.tensors)
    assert weights.config["r"] == 4
    save_adapter(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(causal(), tmp_path / "adapter")
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_saved_model_loads_merged_and_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from rlhf.models.loading import train_tokenizer

    model = attach(causal(), lora(), task="CAUSAL_LM")
    shake(model)
    save_model(model, train_tokenizer(["a b c"], 300, 64), tmp_path / "model")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_unknown_adapter_target_names_the_linear_modules() -> None:
    with pytest.raises(UserError, match=r"qq_proj.*no such module.* q_proj"):
        attach(causal(), lora(targets=["qq_proj"]), task="CAUSAL_LM")


def test_every_adapter_and_every_loss_of_pairs_has_its_function() -> None:
    made = {kind for kind in AdapterKind if kind in METHODS}
    assert AdapterKind.lora in made and AdapterKind.none not in made
    sorts_a_batch = {PreferenceLoss.aot, PreferenceLoss.aot_unpaired}
    assert LOSSES.keys() == set(PreferenceLoss) - sorts_a_batch


DROPPING = [
    # in modules, in attributes of modules, in the configuration that modules read in each pass
    GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    Starcoder2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        residual_dropout=0.2,
    ),
    FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.2,
        hidden_dropout=0.2,
    ),
]


@pytest.mark.parametrize("config_", DROPPING, ids=lambda config_: config_.model_type)
def test_without_dropout_a_training_pass_is_an_evaluation_pass(config_: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_)
    ids = torch.randint(1, VOCAB, (2, 12))
    before = model.eval()(ids).logits
    assert has_dropout(model)
    assert not torch.equal(model.train()(ids).logits, before)
    turn_off_dropout(model)
    assert not has_dropout(model)
    torch.testing.assert_close(model.train()(ids).logits, before, rtol=0, atol=0)
    assert model.config.to_dict() == config_.to_dict(), "what is saved stays"


def test_schedule_warms_up_then_decays() -> None:
    settings = replace(
        OPTIM, learning_rate=1.0, scheduler=Scheduler.cosine, warmup_steps=2, total_steps=6
    )
    expected = [
        0.5,
        1.0,
        1.0,
        0.5 * (1 + math.cos(math.pi / 4)),
        0.5,
        0.5 * (1 + math.cos(3 * math.pi / 4)),
        0.0,
    ]
    assert [settings.rate(s) for s in range(7)] == pytest.approx(expected, abs=1e-12)
    assert replace(settings, scheduler=Scheduler.linear).rate(4) == pytest.approx(0.5)
    assert replace(settings, scheduler=Scheduler.constant).rate(5) == 1.0


def test_half_precision_weights_keep_float32_masters() -> None:
    """A step far below bfloat16's resolution is lost without masters; with them, many such steps
    add up.
    """
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    engine = TorchEngine(layer, replace(OPTIM, learning_rate=1e-4), torch.device("cpu"))
    for _ in range(100):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), last=True)
        engine.step()
    assert float(layer.weight.detach()) == pytest.approx(0.99, abs=0.004)


@pytest.mark.parametrize("parts", [1, 8, 512])
def test_half_precision_gradients_do_not_depend_on_the_split(parts: int) -> None:
    """Against the gradient in float64: bfloat16 sums of 512 micro-batches were 0.5 of it off."""
    torch.manual_seed(0)
    rows, width = 512, 16
    x = torch.randn(rows, width).bfloat16()
    y = (x.float() @ torch.randn(width, 1) + 0.3).bfloat16()
    layer = torch.nn.Linear(width, 1, bias=False).bfloat16()
    exact = layer.weight.detach().double().requires_grad_()
    ((x.double() @ exact.T - y.double()) ** 2).mean().backward()
    assert exact.grad is not None
    engine = TorchEngine(layer, OPTIM, torch.device("cpu"))
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        engine.backward(((engine(a).float() - b.float()) ** 2).sum() / rows, last=True)
    assert layer.weight.grad is None
    gradient = engine.masters[0].grad
    assert gradient is not None
    error = float((gradient.double() - exact.grad).norm() / exact.grad.norm())
    assert error < 0.01
    engine.discard()
    assert engine.masters[0].grad is None


def test_a_gradient_that_is_not_finite_is_never_applied() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    engine = TorchEngine(layer, OPTIM, torch.device("cpu"))
    engine.backward((engine(torch.ones(1, 2)) * math.nan).sum(), last=True)
    with pytest.raises(NonFinite, match="gradient"):
        engine.step()
    assert torch.equal(layer.weight, before)


def test_engine_state_round_trips(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def steps(engine: TorchEngine, n: int) -> None:
        for i in range(n):
            engine.backward(
                (engine(torch.full((1, 3), float(i + engine.steps))) ** 2).sum(), last=True
            )
            engine.step()

    torch.manual_seed(0)
    straight = TorchEngine(torch.nn.Linear(3, 1), OPTIM, torch.device("cpu"))
    broken = TorchEngine(copy.deepcopy(straight.module), OPTIM, torch.device("cpu"))
    steps(straight, 3)
    steps(broken, 3)
    broken.save(tmp_path)
    resumed = TorchEngine(torch.nn.Linear(3, 1), OPTIM, torch.device("cpu"))
    resumed.load(tmp_path)
    steps(straight, 2)
    steps(resumed, 2)
    assert resumed.steps == 5
    assert torch.equal(straight.module.weight, resumed.module.weight)


def rollout_batch(
    rows: int = 7, pairs: list[tuple[int, int]] | None = None
) -> tuple[TrainBatch, torch.Tensor]:
    """Random rollouts of two prompts, (batch, scores)."""
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, VOCAB, (length,), generator=generator).tolist()

    both, responses = [ids(2, 6), ids(2, 6)], [ids(1, 9) for _ in range(rows)]
    tokens = collate([both[row % 2] for row in range(rows)], responses, PAD)
    sampled = torch.randn(tokens.response_mask.shape, generator=generator) - 4.0
    batch = TrainBatch(
        tokens=tokens,
        keep=torch.ones(rows, dtype=torch.bool),
        groups=torch.arange(rows) % 2,
        pairs=pairs or [],
        rollout_logprobs=torch.where(tokens.response_mask, sampled, 0.0),
    )
    return batch, torch.randn(rows, generator=generator)


def prepared(
    stage: OnlineStage,
    policy: Any,
    critic: Any,
    reference: Any,
    layout: Layout,
    *,
    kl_coef: float = 0.0,
    passes: bool = True,
) -> TrainBatch:
    pairs = [(0, 2), (5, 1), (4, 6)] if stage.policy_loss is PolicyLoss.dpo else None
    batch, scores = rollout_batch(pairs=pairs)
    # one row is left out, as a truncated one may be
    kept = replace(batch, keep=torch.tensor([True] * 6 + [stage.policy_loss is PolicyLoss.dpo]))
    if critic is not None:
        kept = batch
    models = Models(policy, critic, reference, layout)
    return prepare(kept, scores, scores.flip(0), models, stage, kl_coef=kl_coef, passes=passes)


def updated(
    batch: TrainBatch,
    stage: OnlineStage,
    policy: Any,
    critic: Any,
    reference: Any,
    layout: Layout,
    kl_coef: float = 0.0,
) -> dict[str, float]:
    models = Models(policy, critic, reference, layout)
    return update(batch, models, stage, kl_coef=kl_coef, constant_length=8, seed=1)


def engines(
    adapter: AdapterConfig | None = None, checkpointing: bool = False
) -> tuple[TorchEngine, TorchEngine]:
    model = causal() if adapter is None else attach(causal(), adapter, task="CAUSAL_LM")
    critic = critic_model()
    if checkpointing:
        enable_checkpointing(model)
        enable_checkpointing(critic)
    device = torch.device("cpu")
    return TorchEngine(PolicyModule(model, chunk=5), OPTIM, device), TorchEngine(
        CriticModule(critic), OPTIM, device
    )


PPO = OnlineStage(epochs=2, minibatches=1, prompts_per_step=7, entropy_coef=0.01)


def trained(
    layout: Layout,
    *,
    adapter: AdapterConfig | None = None,
    checkpointing: bool = False,
    stage: OnlineStage = PPO,
    passes: bool = True,
) -> dict[str, torch.Tensor]:
    """Every weight after the stage's update, and its figures."""
    policy, critic = engines(adapter, checkpointing)
    critic = critic if stage.advantage is Advantage.gae else None
    policy.module.entropy_grad = stage.entropy_coef > 0
    reference = "adapter" if adapter is not None else PolicyModule(causal(seed=4), chunk=5)
    if layout.longest_dense is not None:
        for module in (policy.module, reference):
            assert take_segments(base_of(module.model))
    batch = prepared(stage, policy, critic, reference, layout, kl_coef=0.1, passes=passes)
    figures = updated(batch, stage, policy, critic, reference, layout, kl_coef=0.1)
    out = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
    if critic is not None:
        out |= {f"critic.{n}": p.detach() for n, p in critic.module.named_parameters()}
    return out | {
        name: torch.tensor(figures[name])
        for name in ("loss/policy", "loss/entropy", "policy/approxkl")
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    start = {name.removeprefix("model."): tensor for name, tensor in causal().named_parameters()}
    moved = [
        float((one[f"model.{name}"] - tensor).abs().max())
        for name, tensor in start.items()
        if f"model.{name}" in one
    ]
    assert not moved or max(moved) > 3e-3, (
        "the comparison would hold for an update that does nothing"
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("adapter", [None, lora()])
def test_the_micro_batch_split_changes_no_update(adapter: AdapterConfig | None) -> None:
    assert_same(trained(Layout(10_000), adapter=adapter), trained(Layout(20), adapter=adapter))


def preset(name: str, *overrides: str) -> OnlineStage:
    stage = config.compose(
        [f"stage={name}", "stage.prompts_per_step=7", "stage.samples_per_prompt=4", *overrides]
    ).stage
    assert isinstance(stage, OnlineStage)
    return stage


PRESETS = [
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce_pp",
    "remax",
    "raft",
    "online_dpo",
]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(20),
        Layout(10_000, shared=True, hidden_size=32),
        Layout(24, shared=True, hidden_size=32),
        Layout(10_000, shared=True, hidden_size=32, longest_dense=0),
    ],
)
def test_neither_the_split_nor_shared_prompts_change_an_update_of_any_preset(
    name: str, layout: Layout
) -> None:
    """Two passes, so that ratios, bounds and the importance correction matter in the second."""
    extra = (
        []
        if name == "online_dpo"
        else ["stage.importance_cap=1.5", "stage.importance_level=sequence"]
    )
    stage = preset(name, "stage.epochs=2", "stage.minibatches=1", *extra)
    assert_same(trained(Layout(10_000), stage=stage), trained(layout, stage=stage))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "raft", "online_dpo"])
@pytest.mark.parametrize("adapter", [None, lora()])
def test_a_single_update_measures_on_its_way_what_a_pass_before_it_would(
    name: str, adapter: AdapterConfig | None
) -> None:
    stage = preset(name, "stage.epochs=1", "stage.minibatches=1")
    layout = Layout(40, shared=True, hidden_size=32)
    assert not needs_old_logprobs(stage)
    assert_same(
        trained(layout, stage=stage, adapter=adapter),
        trained(layout, stage=stage, adapter=adapter, passes=False),
    )


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["stage=grpo"], False),
        (["stage=grpo", "stage.epochs=2"], True),
        (["stage=gspo"], True),
        (["stage=rloo"], True),
        (["stage=rloo", "stage.kl_coef=0"], False),
        (["stage=rloo", "stage.kl_coef=0", "stage.reference=false"], False),
        (["stage=grpo", "stage.kl_place=both"], True),
        (["stage=ppo", "stage.epochs=1", "stage.kl_coef=0"], False),
        (["stage=ppo", "stage.epochs=1", "stage.kl_coef=0", "stage.critic_warmup=1"], True),
    ],
)
def test_when_logprobs_before_the_update_take_a_pass_of_their_own(
    overrides: list[str], needed: bool
) -> None:
    assert needs_old_logprobs(config.compose(overrides).stage) is needed


def equal_rows(count: int, length: int, keep: list[bool] | None = None) -> TrainBatch:
    """One group of equally long responses."""
    tokens = collate([[5, 6]] * count, [[7] * length] * count, PAD)
    return TrainBatch(
        tokens=tokens,
        keep=torch.tensor(keep or [True] * count),
        groups=torch.zeros(count, dtype=torch.long),
        pairs=[],
        rollout_logprobs=torch.zeros(count, length),
    )


WITHOUT_KL: dict[str, Any] = {
    "samples_per_prompt": 4,
    "prompts_per_step": 1,
    "epochs": 1,
    "kl_coef": 0.0,
    "reference": False,
    "whiten_advantages": False,
}
BASELINES: list[dict[str, Any]] = [
    {"advantage": Advantage.greedy},
    {"advantage": Advantage.reinforce_pp, "group_baseline": True},
]


def without_models(batch: TrainBatch, scores: list[float], stage: OnlineStage) -> torch.Tensor:
    """Advantages where nothing but scores counts; the greedy response scores their mean."""
    given = torch.tensor(scores)
    models = Models(None, None, None, Layout(4096))
    baselines = given.mean().expand(len(scores))
    done = prepare(batch, given, baselines, models, stage, kl_coef=0.0, passes=False)
    return done.advantages


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_is_discounted_as_the_score_is(kind: dict[str, Any]) -> None:
    stage = OnlineStage(**WITHOUT_KL, **kind, gamma=0.99)
    advantages = without_models(equal_rows(4, 200), [1.0] * 4, stage)
    torch.testing.assert_close(advantages, torch.zeros(4, 200), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_has_the_units_of_whitened_rewards(kind: dict[str, Any]) -> None:
    batch, scores = equal_rows(4, 10), [9.0, 10.0, 10.0, 11.0]
    plain = without_models(batch, scores, OnlineStage(**WITHOUT_KL, **kind))
    white = without_models(batch, scores, OnlineStage(**WITHOUT_KL, **kind, whiten_rewards=True))
    torch.testing.assert_close(plain[:, 0], torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    scale = float(white[3, 0])
    assert scale > 0
    torch.testing.assert_close(white, plain * scale)


class _Constant(torch.nn.Module):
    """A policy that gives every token one logprob."""

    def __init__(self, logprob: float) -> None:
        super().__init__()
        self.logprob = logprob

    def forward(self, ids: Any, at: Any, responses: torch.Tensor, mask: Any) -> Any:
        return torch.full(responses.shape, self.logprob), torch.zeros(responses.shape)


@pytest.mark.parametrize("advantage", [Advantage.leave_one_out, Advantage.group])
def test_rows_that_do_not_train_keep_their_penalty_in_their_groups_statistics(
    advantage: Advantage,
) -> None:
    """Four equal responses with equal KL: whoever is left out, all are worth the same."""
    stage = OnlineStage(**(WITHOUT_KL | {"kl_coef": 0.05, "reference": True}), advantage=advantage)
    batch = equal_rows(4, 100, keep=[True, True, False, False])
    models = Models(_Constant(-2.0), None, _Constant(-2.1), Layout(4096))
    done = prepare(batch, torch.ones(4), None, models, stage, kl_coef=0.05, passes=True)
    torch.testing.assert_close(done.rewards.sum(dim=1), torch.full((4,), 0.5), rtol=0, atol=1e-4)
    torch.testing.assert_close(done.advantages, torch.zeros(4, 100), rtol=0, atol=1e-3)


def test_gradient_checkpointing_changes_no_update() -> None:
    assert_same(trained(Layout(40)), trained(Layout(40), checkpointing=True))


def test_an_update_early_stops_at_the_kl_bound() -> None:
    policy, critic = engines()
    stage = OnlineStage(epochs=6, prompts_per_step=7, stop_kl=1e-6)
    batch = prepared(stage, policy, critic, None, Layout(99))
    figures = updated(batch, stage, policy, critic, None, Layout(99))
    assert figures["policy/stopped_early"] == 1.0
    assert figures["policy/updates"] == 2.0  # the first has KL 0 by definition


def test_a_loss_that_is_not_finite_stops_before_any_step() -> None:
    policy, critic = engines()
    stage = OnlineStage(epochs=1, prompts_per_step=7)
    batch = prepared(stage, policy, critic, None, Layout(99))
    batch.returns[0, 0] = math.nan
    before = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
    with pytest.raises(NonFinite, match="loss/value=nan"):
        updated(batch, stage, policy, critic, None, Layout(99))
    assert all(torch.equal(before[n], p) for n, p in policy.module.named_parameters())


def test_reference_is_the_policy_with_its_adapter_off() -> None:
    policy, critic = engines(lora())
    shake(policy.module)
    batch = prepared(
        OnlineStage(prompts_per_step=7), policy, critic, "adapter", Layout(99), kl_coef=0.1
    )
    tokens = batch.tokens
    separate, _ = PolicyModule(causal(), chunk=99)(
        tokens.input_ids, tokens.positions, tokens.response_ids, tokens.response_mask
    )
    assert batch.ref_logprobs is not None and batch.old_logprobs is not None
    torch.testing.assert_close(batch.ref_logprobs, separate.detach(), atol=1e-5, rtol=1e-5)
    assert float((batch.old_logprobs - batch.ref_logprobs).abs().sum()) > 0.1
