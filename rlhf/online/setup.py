"""What the online loop is made of, built from the configuration in the order that fails soonest."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from conf import published
from conf.choices import (
    AdapterKind,
    Advantage,
    CriticInit,
    EngineKind,
    KLController,
    ModelKind,
)
from conf.rules import merges_lora, wants_shared_prompts
from conf.schema import Config, EngineConfig
from conf.stages import OnlineStage
from policy.adapters import attach, enable_checkpointing
from policy.engines.base import Engine, OptimSettings
from policy.engines.factory import make_engine
from policy.forward import ADAPTER, Layout, Models
from policy.kl import AdaptiveKL, FixedKL
from policy.model import (
    CriticModule,
    PolicyModule,
    adapter_weights,
    base_of,
    full_weights,
    has_dropout,
)
from policy.packing import can_share_prompts
from policy.prepare import needs_old_logprobs
from policy.saving import replacing
from reward.base import model_paths
from reward.model import load_reward_model
from reward.terms import make_scorer
from rlhf.data import reading
from rlhf.data.sources import data_files
from rlhf.models.loading import (
    load_causal_lm,
    load_classifier,
    load_or_train_tokenizer,
    loads_as_it_is,
    resolve_dtype,
)
from rlhf.online.sync import WeightSync, gap_tolerance
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import Generator, Prompt, Scorer, UserError
from rollout import make_generator

log = logging.getLogger(__name__)
# Every weight has a part in each logprob but unused rows of the embedding, which are compared by
# checksum.
_PROBE_TOKENS = 24


@dataclass(slots=True)
class Parts:
    """Everything that a step uses."""

    tokenizer: Any
    prompts: list[Prompt]
    models: Models
    passes: bool  # whether logprobs before the update take a pass of their own
    scorer: Scorer
    generator: Generator
    sync: WeightSync
    kl: FixedKL | AdaptiveKL
    adapter: bool  # the policy is a LoRA adapter on a frozen model
    moving_reference: bool  # stage.reference_every moves the reference's weights
    engine: EngineConfig


def build(ctx: RunContext) -> Parts:
    """Load the models and start the engines. Raises UserError for what preflight could not know.

    The order is that in which things fail soonest. It also fixes which random numbers each model's
    fresh weights get.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    assert isinstance(stage, OnlineStage)
    seed_everything(cfg.run.seed)
    texts = reading.stage_texts(reading.DataRequest.of(cfg))
    tokenizer = load_or_train_tokenizer(cfg.model, cfg.data.chat_template, texts)
    prompts = reading.prompts(reading.DataRequest.of(cfg), tokenizer, split="train")
    _register(ctx)
    start = _start_directory(ctx, tokenizer)
    scorer = make_scorer(cfg.reward, device=distributed.device(), policy_tokenizer=tokenizer)
    dtype = resolve_dtype(cfg.model.dtype)
    half = dtype is not torch.float32
    lora = cfg.adapter.kind is not AdapterKind.none
    sends_adapter = lora and not merges_lora(cfg.rollout, cfg.adapter)
    chunk, temperature = cfg.engine.logits_chunk, cfg.rollout.temperature

    def start_model() -> Any:
        return load_causal_lm(replace(cfg.model, path=start, gguf_file=None), tokenizer)

    def generator_model() -> Any:
        model = start_model()
        return attach(model, cfg.adapter, task="CAUSAL_LM") if sends_adapter else model

    policy_model = attach(start_model(), cfg.adapter, task="CAUSAL_LM")
    if cfg.engine.gradient_checkpointing:
        enable_checkpointing(policy_model)
    module = PolicyModule(policy_model, chunk=chunk, temperature=temperature)
    module.entropy_grad = stage.entropy_coef > 0
    generator = make_generator(
        cfg,
        model_path=start,
        tokenizer=tokenizer,
        model_factory=generator_model,
        adapter_rank=cfg.adapter.rank if sends_adapter else None,
    )
    rate = published.learning_rate(stage, cfg.adapter.kind)
    policy = _engine(module, cfg.engine, stage, rate, half=half)
    critic = None
    if stage.advantage is Advantage.gae:
        critic_module = CriticModule(_critic(cfg, tokenizer, start))
        rate = published.critic_learning_rate(stage, cfg.adapter.kind)
        critic = _engine(critic_module, cfg.engine, stage, rate, half=half)
    reference: Any = None
    if stage.reference and lora and not stage.reference_every:
        reference = ADAPTER
    elif stage.reference:
        frozen = PolicyModule(start_model(), chunk=chunk, temperature=temperature)
        reference = _freeze(frozen, cfg.engine, half=half)
    sent = adapter_weights if sends_adapter else full_weights
    return Parts(
        tokenizer=tokenizer,
        prompts=prompts,
        models=Models(policy, critic, reference, _layout(cfg.engine, stage, policy_model)),
        # Under dropout the logprobs of a training pass are not those of the policy that wrote the
        # responses.
        passes=needs_old_logprobs(stage) or has_dropout(policy_model),
        scorer=scorer,
        generator=generator,
        sync=WeightSync(
            generator=generator,
            policy=policy,
            weights=lambda: sent(policy_model, policy.gather),
            probe=_probe(generator, prompts[0]),
            tolerance=gap_tolerance(cfg.rollout.gap_tolerance, dtype),
            pad_id=tokenizer.pad_token_id,
            budget=cfg.engine.micro_tokens,
        ),
        kl=_kl_controller(stage),
        adapter=lora,
        moving_reference=stage.reference_every > 0,
        engine=cfg.engine,
    )


def _engine(
    module: Any, engine: EngineConfig, stage: OnlineStage, learning_rate: float, *, half: bool
) -> Engine:
    assert stage.steps is not None
    optim = OptimSettings.from_stage(
        stage,
        total_steps=stage.steps * stage.epochs * stage.minibatches,
        learning_rate=learning_rate,
    )
    made: Engine = make_engine(module, engine, optim, distributed.device(), half=half)
    return made


def _probe(generator: Generator, prompt: Prompt) -> tuple[int, ...]:
    """Token ids whose logprobs prove a weight sync: the end of a prompt with its most likely
    response, the same on every rank. A collective.
    """
    greedy = generator.generate([prompt], n=1, seed=0, greedy=True)[0]
    ids = (*prompt.token_ids, *greedy.token_ids[:_PROBE_TOKENS])[-_PROBE_TOKENS:]
    probe: tuple[int, ...] = distributed.broadcast(ids)
    return probe


def _kl_controller(stage: OnlineStage) -> FixedKL | AdaptiveKL:
    if stage.kl_controller is KLController.adaptive:
        return AdaptiveKL(stage.kl_coef, stage.kl_target, stage.kl_horizon)
    return FixedKL(stage.kl_coef)


def _layout(engine: EngineConfig, stage: OnlineStage, model: Any) -> Layout:
    """Whether prompts are shared. Raises UserError where engine.share_prompts=true can't be had."""
    base = base_of(model)
    able = can_share_prompts(base)
    if engine.share_prompts and not able:
        raise UserError(
            f"engine.share_prompts=true: {base.config.model_type} with "
            f"attn_implementation={base.config._attn_implementation} takes no mask of ours. "
            "Expected a model with full causal attention under sdpa. Set engine.share_prompts=null."
        )
    shared = able and wants_shared_prompts(engine, stage)
    return Layout(
        budget=engine.micro_tokens,
        shared=shared,
        hidden_size=int(base.config.get_text_config().hidden_size),
    )


def _register(ctx: RunContext) -> None:
    if ctx.cfg.model.path is not None:
        ctx.add_parent("policy", ctx.cfg.model.path)
    for _, path in model_paths(ctx.cfg.reward):
        ctx.add_parent("reward", path)
    for file in data_files(ctx.cfg.data):
        ctx.add_data(file)


def _start_directory(ctx: RunContext, tokenizer: Any) -> str:
    """A directory that transformers and vLLM both load: model.path, or the start written out where
    it is GGUF, an adapter or tiny.
    """
    model = ctx.cfg.model
    whole = model.path is not None and model.gguf_file is None and loads_as_it_is(model.path)
    if whole:
        assert model.path is not None
        return model.path
    written = ctx.dir / "start"
    if distributed.is_main() and not (written / "config.json").exists():
        if model.kind is ModelKind.tiny and model.path is None:
            log.warning(
                "model=tiny without model.path: the policy starts from random weights, written "
                "to %s",
                written,
            )
        with replacing(written) as side:
            load_causal_lm(model, tokenizer).save_pretrained(side)
            tokenizer.save_pretrained(side)
    distributed.barrier()
    return str(written)


def _critic(cfg: Config, tokenizer: Any, start: str) -> Any:
    """The critic's model: the reward model's weights, or the policy's start with a head that
    predicts 0.
    """
    stage = cfg.stage_as(OnlineStage)
    if stage.critic_init is CriticInit.reward:
        assert cfg.reward.path is not None, (
            "preflight refuses critic_init=reward without reward.path"
        )
        loaded = load_reward_model(cfg.reward.path, resolve_dtype(cfg.model.dtype))
        if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"stage.critic_init=reward: the reward model {cfg.reward.path} has another "
                "tokenizer than the policy, so its weights can't read the "
                "policy's tokens. Use stage.critic_init=policy."
            )
        model = loaded.module
    else:
        model = load_classifier(replace(cfg.model, path=start, gguf_file=None), tokenizer)
        torch.nn.init.zeros_(model.score.weight)
    model.requires_grad_(True)
    if stage.critic_adapter:
        adapter = cfg.adapter
        if adapter.kind is AdapterKind.none:
            adapter = replace(adapter, kind=AdapterKind.lora)
        model = attach(model, adapter, task="SEQ_CLS")
    if cfg.engine.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _freeze(module: PolicyModule, engine: EngineConfig, *, half: bool) -> Any:
    """The reference: it only runs forward; under DeepSpeed partitioned like the policy."""
    if engine.kind is EngineKind.deepspeed:
        from policy.engines.deepspeed import freeze

        return freeze(module, engine, distributed.device(), half=half)
    return module.requires_grad_(False).eval().to(distributed.device())
