"""Weights that leave the trainer, the plain engine, and an update that no split changes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from conf.schema import AdapterConfig, AdapterKind, OnlineStage, Scheduler
from policy.adapters import attach, enable_checkpointing
from policy.batching import collate
from policy.engine import NonFinite, OptimSettings, TorchEngine
from policy.model import CriticModule, PolicyModule, adapter_weights, full_weights, iterate_weights
from policy.prepare import prepare
from policy.saving import save_adapter, save_model
from policy.update import update
from rlhf.types import UserError

VOCAB, PAD = 64, 0
OPTIM = OptimSettings(
    learning_rate=1e-2,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    eps=1e-8,
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
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), "merging drifted the trained weights"


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
    from rlhf.models import train_tokenizer

    model = attach(causal(), lora(), task="CAUSAL_LM")
    shake(model)
    save_model(model, train_tokenizer(["a b c"], 300, 64), tmp_path / "model")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_unknown_adapter_target_names_the_linear_modules() -> None:
    with pytest.raises(UserError, match=r"no such module; the model's linear modules are .*q_proj"):
        attach(causal(), lora(targets=["qq_proj"]), task="CAUSAL_LM")


def test_schedule_warms_up_then_decays() -> None:
    settings = replace(OPTIM, learning_rate=1.0, scheduler=Scheduler.cosine, warmup_steps=2, total_steps=6)
    expected = [0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4)), 0.0]
    assert [settings.rate(s) for s in range(7)] == pytest.approx(expected, abs=1e-12)
    assert replace(settings, scheduler=Scheduler.linear).rate(4) == pytest.approx(0.5)
    assert replace(settings, scheduler=Scheduler.constant).rate(5) == 1.0


def test_half_precision_weights_keep_float32_masters() -> None:
    """A step far below bfloat16's resolution is lost without masters; with them, many such steps add up."""
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    engine = TorchEngine(layer, replace(OPTIM, learning_rate=1e-4), torch.device("cpu"))
    for _ in range(100):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), last=True)
        engine.step()
    assert float(layer.weight.detach()) == pytest.approx(0.99, abs=0.004)


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
            engine.backward((engine(torch.full((1, 3), float(i + engine.steps))) ** 2).sum(), last=True)
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


def rollout_batch(rows: int = 7):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, VOCAB, (length,), generator=generator).tolist()

    prompts, responses = [ids(2, 6) for _ in range(rows)], [ids(1, 9) for _ in range(rows)]
    tokens = collate(prompts, responses, PAD)
    return tokens, torch.randn(tokens.response_mask.shape, generator=generator) - 4.0, torch.randn(rows, generator=generator)


def engines(adapter: AdapterConfig | None = None, checkpointing: bool = False) -> tuple[TorchEngine, TorchEngine]:
    model = causal() if adapter is None else attach(causal(), adapter, task="CAUSAL_LM")
    critic = critic_model()
    if checkpointing:
        enable_checkpointing(model)
        enable_checkpointing(critic)
    device = torch.device("cpu")
    return TorchEngine(PolicyModule(model, chunk=5), OPTIM, device), TorchEngine(CriticModule(critic), OPTIM, device)


def trained(
    budget: int, *, adapter: AdapterConfig | None = None, checkpointing: bool = False, stage: OnlineStage | None = None
) -> dict[str, torch.Tensor]:
    stage = stage or OnlineStage(epochs=2, minibatches=1, prompts_per_step=7, entropy_coef=0.01)
    policy, critic = engines(adapter, checkpointing)
    torch.manual_seed(11)
    reference = "adapter" if adapter is not None else PolicyModule(causal(seed=4), chunk=5)
    tokens, sampled, scores = rollout_batch()
    batch = prepare(tokens, sampled, scores, policy=policy, reference=reference, critic=critic, stage=stage, kl_coef=0.1, budget=budget)
    figures = update(batch, policy=policy, critic=critic, stage=stage, budget=budget, seed=1)
    out = {n: p.detach().clone() for n, p in policy.module.named_parameters()} | {
        f"critic.{n}": p.detach() for n, p in critic.module.named_parameters()
    }
    return out | {"loss": torch.tensor([figures["loss/policy"], figures["loss/value"], figures["policy/approxkl"]])}


@pytest.mark.parametrize("adapter", [None, lora()])
def test_the_micro_batch_split_changes_no_update(adapter: AdapterConfig | None) -> None:
    whole, split = trained(10_000, adapter=adapter), trained(20, adapter=adapter)
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


def test_gradient_checkpointing_changes_no_update() -> None:
    plain, recomputed = trained(40), trained(40, checkpointing=True)
    for name, tensor in plain.items():
        torch.testing.assert_close(recomputed[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_an_update_early_stops_at_the_kl_bound() -> None:
    policy, critic = engines()
    stage = OnlineStage(epochs=6, prompts_per_step=7, stop_kl=1e-6)
    tokens, sampled, scores = rollout_batch()
    batch = prepare(tokens, sampled, scores, policy=policy, reference=None, critic=critic, stage=stage, kl_coef=0.0, budget=99)
    figures = update(batch, policy=policy, critic=critic, stage=stage, budget=99, seed=1)
    assert figures["policy/stopped_early"] == 1.0
    assert figures["policy/updates"] == 2.0  # the first has KL 0 by definition


def test_a_loss_that_is_not_finite_stops_before_any_step() -> None:
    policy, critic = engines()
    stage = OnlineStage(epochs=1, prompts_per_step=7)
    tokens, sampled, scores = rollout_batch()
    batch = prepare(tokens, sampled, scores, policy=policy, reference=None, critic=critic, stage=stage, kl_coef=0.0, budget=99)
    batch.returns[0, 0] = math.nan
    before = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
    with pytest.raises(NonFinite, match="loss/value=nan"):
        update(batch, policy=policy, critic=critic, stage=stage, budget=99, seed=1)
    assert all(torch.equal(before[n], p) for n, p in policy.module.named_parameters())


def test_reference_is_the_policy_with_its_adapter_off() -> None:
    policy, critic = engines(lora())
    shake(policy.module)
    tokens, sampled, scores = rollout_batch()
    stage = OnlineStage(prompts_per_step=7)
    batch = prepare(tokens, sampled, scores, policy=policy, reference="adapter", critic=critic, stage=stage, kl_coef=0.1, budget=99)
    separate, _ = PolicyModule(causal(), chunk=99)(tokens.input_ids, tokens.positions, tokens.response_ids, tokens.response_mask)
    assert batch.ref_logprobs is not None
    torch.testing.assert_close(batch.ref_logprobs, separate.detach(), atol=1e-5, rtol=1e-5)
    assert float(batch.kl.abs().sum()) > 0.1
