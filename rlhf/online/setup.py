"""What the online loop is made of, built from the configuration in the order that fails soonest."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from conf import published
from conf.choices import (
    Advantage,
    Carrier,
    CriticInit,
    Dtype,
    LoraInit,
    ModelKind,
    Quantization,
    RolloutBackend,
)
from conf.schema import (
    AdapterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    carrier_of,
    critic_adapter,
    facts_of,
    wants_shared_prompts,
)
from conf.stages import OnlineStage
from policy.adapters import (
    Rows,
    attach,
    enable_checkpointing,
    lora_rank,
    rates_of,
    round_weights,
    sender,
    spaced,
)
from policy.agreement import agreed_layout, can_share_prompts
from policy.engines.base import Engine, OptimSettings
from policy.engines.loading import SHARING, Loader, Rates, holder_of, loader_of
from policy.engines.torch import freeze, make_engine
from policy.forward import ADAPTER, Layout, Models
from policy.kl import AdaptiveKL, FixedKL, kl_controller
from policy.model import (
    CriticModule,
    PolicyModule,
    base_of,
    has_dropout,
    no_gather,
    reads_pictures,
    turn_off_dropout,
    whole,
)
from policy.prepare import needs_old_logprobs
from policy.saving import mix_weights, named, replacing, with_further
from reward.base import model_paths
from reward.model import load_reward_model
from reward.terms import make_scorer
from rlhf.models.directories import UNROUNDED, contents, merges_first
from rlhf.models.loading import (
    load_causal_lm,
    load_classifier,
    resolve_dtype,
    starts_whole,
    write_whole,
)
from rlhf.online.collect import in_words, refuse_mixed
from rlhf.online.sync import WeightSync, make_proof
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.run.directory import LOOKED_UP
from rlhf.types import AdapterWeights, Generator, Prompt, RowReader, Scorer, UserError
from rollout import acting_in, make_generator, resolve_backend

log = logging.getLogger(__name__)
Sample = Callable[[], Rows]  # rows that the stage trains on


@dataclass(slots=True)
class Parts:
    """Everything that a step uses."""

    tokenizer: Any
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]  # for the watch's judge
    models: Models
    passes: bool  # whether logprobs before the update take a pass of their own
    scorer: Scorer
    holder: Any  # how the ranks hold reward models together (reward.model.Holder), or None
    generator: Generator
    sync: WeightSync
    kl: FixedKL | AdaptiveKL
    adapter: AdapterConfig  # what trains of the policy
    moving_reference: bool  # stage.reference_every moves the reference's weights
    engine: EngineConfig


@dataclass(frozen=True, slots=True)
class _Start:
    """What every model of the run starts from."""

    path: str  # a directory that transformers and vLLM both load
    config: ModelConfig  # with that path
    source: ModelConfig  # the weights before they are rounded; with adapter.quantize=none the same
    tokenizer: Any
    sample: Sample
    folder: Path  # of the run
    engine: EngineConfig

    def loader(self, adapter: AdapterConfig | None = None) -> Loader:
        """How a model comes into memory, and this adapter onto it."""
        return loader_of(self.engine, resolve_dtype(self.config.dtype), adapter)

    def causal_lm(self) -> Any:
        """What the generator, and a reference of its own, start from."""
        return load_causal_lm(self.config, self.tokenizer)

    def policy_lm(self) -> Any:
        """What the policy starts from, before an adapter's base is held rounded."""
        return load_causal_lm(self.source, self.tokenizer)

    def looks(self) -> dict[str, Any]:  # for `attach`
        record = self.folder / LOOKED_UP
        return {"sample": self.sample, "record": record, "tokenizer": self.tokenizer}


def build(ctx: RunContext, reader: RowReader) -> Parts:
    """Load the models and start the engines. Raises UserError for what preflight could not know.

    The order is that in which things fail soonest. It also fixes which random numbers each model's
    fresh weights get.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage_as(OnlineStage)
    seed_everything(cfg.run.seed)
    read = reader.read_prompts(cfg)
    tokenizer, prompts = read.tokenizer, read.train
    acting = acting_in(cfg.environment, tokenizer)
    acting.check(prompts, cfg.data)
    refuse_mixed(prompts, tokenizer)
    _register(ctx, read.files)
    sample = functools.partial(_token_ids, prompts, cfg.adapter.sample_rows)
    start = _start_of(ctx.start_dir, cfg.model, cfg.adapter, tokenizer, sample, cfg.engine)
    dtype, holder = resolve_dtype(cfg.model.dtype), holder_of(cfg.engine, resolve_dtype(Dtype.auto))
    scorer = make_scorer(
        cfg.reward, device=distributed.device(), policy_tokenizer=tokenizer, holder=holder
    )
    carrier = carrier_of(cfg.rollout, cfg.adapter)
    vllm = resolve_backend(cfg.rollout.backend) is not RolloutBackend.hf
    weights_of = named(sender(cfg.adapter, carrier, vllm=vllm), cfg.adapter.name)
    policy_module = _policy_module(start, cfg)
    first = weights_of(policy_module.model, no_gather)
    generator = make_generator(
        cfg,
        model_path=start.path,
        tokenizer=tokenizer,
        model_factory=lambda: _generator_model(start, cfg.adapter, carrier),
        carrier=carrier,
        adapter_rank=lora_rank(first) if vllm and carrier is Carrier.lora else None,
        adapter=first if isinstance(first, AdapterWeights) else None,
    )
    models = _models(policy_module, start, cfg)
    return Parts(
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=read.held_out,
        models=models,
        # Under dropout the logprobs of a training pass are not those of the policy that wrote the
        # responses.
        passes=needs_old_logprobs(stage) or has_dropout(policy_module.model),
        scorer=scorer,
        holder=holder,
        generator=acting.around(generator, cfg.data, cfg.rollout),
        sync=WeightSync(
            generator=generator,
            policy=models.policy,
            weights_of=weights_of,
            proof=make_proof(generator, in_words(prompts, tokenizer), cfg.rollout, dtype),
            pad_id=tokenizer.pad_token_id,
            budget=cfg.engine.micro_tokens,
        ),
        kl=kl_controller(stage),
        adapter=cfg.adapter,
        moving_reference=stage.reference_every > 0,
        engine=cfg.engine,
    )


def _token_ids(prompts: Sequence[Prompt], count: int) -> Rows:
    return [list(prompts[i].token_ids) for i in spaced(len(prompts), count)]


def _generator_model(start: _Start, adapter: AdapterConfig, carrier: Carrier) -> Any:
    """The model of a generator in this process, with room for the adapter that is sent to it."""
    model = start.causal_lm()
    if carrier is Carrier.merged:
        return model
    # the start's weights are rounded, and every sync brings the adapter's
    init = LoraInit.default if adapter.init is LoraInit.loftq else adapter.init
    whole = replace(adapter, quantize=Quantization.none, init=init)
    return attach(model, whole, task="CAUSAL_LM", **start.looks())


def _policy_module(start: _Start, cfg: Config) -> PolicyModule:
    stage = cfg.stage_as(OnlineStage)
    loader = start.loader(cfg.adapter)
    model = loader.load(start.policy_lm)
    if not stage.dropout:
        turn_off_dropout(model)
    options = {"task": "CAUSAL_LM", "base": start.path, "train": stage.train, **start.looks()}
    model = loader.adapt(model, lambda lm: attach(lm, cfg.adapter, **options))
    if cfg.engine.gradient_checkpointing:
        enable_checkpointing(model)
    chunk, temperature = cfg.engine.logits_chunk, cfg.rollout.temperature
    module = PolicyModule(model, chunk=chunk, temperature=temperature)
    module.entropy_grad = stage.entropy_coef > 0
    return module


def _models(policy_module: PolicyModule, start: _Start, cfg: Config) -> Models:
    """The policy's and the critic's engines and the reference, in this order."""
    stage, engine = cfg.stage_as(OnlineStage), cfg.engine
    half = resolve_dtype(cfg.model.dtype) is not torch.float32
    rate = published.learning_rate(stage, cfg.adapter.kind)
    rates = rates_of(policy_module.model, stage, cfg.adapter)
    facts, own_start = facts_of(cfg.adapter), None
    # before an engine takes the policy apart
    if stage.reference and not (facts.off_is_start or facts.merges):
        own_start = copy.deepcopy(policy_module.model)
    elif stage.reference and cfg.adapter.init is LoraInit.loftq:
        own_start = start.causal_lm()
        mix_weights(own_start, policy_module.model, 1.0)  # start/ has no update
    policy = _engine(policy_module, engine, stage, rate, half=half, rates=rates)
    critic = None
    if stage.advantage is Advantage.gae:
        model = _critic_model(start, stage, cfg.reward.path, cfg.adapter)
        if engine.gradient_checkpointing:
            enable_checkpointing(model)
        critic_module = CriticModule(model)
        rate = published.critic_learning_rate(stage)
        critic = _engine(critic_module, engine, stage, rate, half=half)
    reference: Any = None
    if stage.reference and facts.off_is_start and not stage.reference_every:
        reference = ADAPTER
    elif stage.reference:
        chunk, temperature = engine.logits_chunk, cfg.rollout.temperature
        model = own_start or start.loader().load(start.causal_lm)
        frozen = PolicyModule(model, chunk=chunk, temperature=temperature)
        reference = freeze(frozen, engine, distributed.device(), half=half)
    models = Models(policy, critic, reference, _layout(engine, stage, policy_module.model))
    models.layout = agreed_layout(models, engine)
    if engine.sequence_parallel > 1:
        SHARING["online"](models, engine)
    return models


def _engine(
    module: Any,
    engine: EngineConfig,
    stage: OnlineStage,
    learning_rate: float,
    *,
    half: bool,
    rates: Rates | None = None,
) -> Engine:
    assert stage.steps is not None
    optim = OptimSettings.from_stage(
        stage,
        total_steps=stage.steps * stage.epochs * stage.minibatches,
        learning_rate=learning_rate,
    )
    device = distributed.device()
    made: Engine = make_engine(module, engine, optim, device, half=half, rates=rates)
    return made


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
    if reads_pictures(base):
        log.info(
            "engine.share_prompts: off, since %s reads pictures: each response is a row of its own "
            "with its prompt's pictures.",
            base.config.model_type,
        )
    return Layout(
        budget=engine.micro_tokens,
        shared=shared,
        hidden_size=int(base.config.get_text_config().hidden_size),
    )


def _register(ctx: RunContext, files: Iterable[Path]) -> None:
    ctx.add_inputs("policy", files)
    for _, path in model_paths(ctx.cfg.reward):
        ctx.add_parent("reward", path)


def _start_of(
    written: Path,
    model: ModelConfig,
    adapter: AdapterConfig,
    tokenizer: Any,
    sample: Sample,
    engine: EngineConfig,
) -> _Start:
    """The run's start, written where there is none to load. A collective.

    Where the policy holds its frozen weights rounded (adapter.quantize), start/ has the rounded
    weights in full. The policy itself is rounded from the weights before: rounding start/ once more
    would give others.
    """
    if not adapter.is_quantized:
        path = _start_directory(written, model, adapter, tokenizer)
        config = replace(model, path=path, gguf_file=None)
        return _Start(path, config, config, tokenizer, sample, written.parent, engine)
    path = _start_directory(written.with_name(UNROUNDED), model, adapter, tokenizer)
    source = replace(model, path=path, gguf_file=None)
    if distributed.is_main() and not (written / "config.json").exists():
        rounded = round_weights(load_causal_lm(source, tokenizer), adapter)
        with replacing(written) as side:
            write_whole(rounded, tokenizer, side)
    distributed.barrier()
    path = str(written)
    rounded_start = replace(source, path=path)
    return _Start(path, rounded_start, source, tokenizer, sample, written.parent, engine)


def _start_directory(
    written: Path, model: ModelConfig, adapter: AdapterConfig, tokenizer: Any
) -> str:
    """model.path, or `written`, where a run that goes on has it already, where model.path is a GGUF
    file, an adapter, or missing (a tiny model), or adapter.load has further adapters merged in.
    """
    if starts_whole(model) and not merges_first(adapter):
        assert model.path is not None
        return model.path
    if distributed.is_main() and not (written / "config.json").exists():
        if model.kind is ModelKind.tiny and model.path is None:
            log.warning(
                "model=tiny without model.path: the policy starts from random weights, written "
                "to %s",
                written,
            )
        with replacing(written) as side:
            whole = with_further(load_causal_lm(model, tokenizer), adapter)
            write_whole(whole, tokenizer, side)
    distributed.barrier()
    return str(written)


def _critic_model(
    start: _Start, stage: OnlineStage, reward_path: str | None, adapter: AdapterConfig
) -> Any:
    """The critic's model: the reward model's weights, or the policy's start with a head that
    predicts 0. With stage.critic_adapter only a LoRA adapter of it trains.
    """
    adapter = critic_adapter(stage, adapter)
    loader = start.loader(adapter)
    if stage.critic_init is CriticInit.reward:
        assert reward_path is not None, "preflight refuses critic_init=reward without reward.path"
        loader = Loader() if contents(reward_path).is_native else loader
        model = loader.load(functools.partial(_reward_weights, reward_path, start))
    else:
        model = loader.load(lambda: load_classifier(start.config, start.tokenizer))
        with whole([model.score.weight], changed=True):
            torch.nn.init.zeros_(model.score.weight)
    if not stage.dropout:
        turn_off_dropout(model)
    model.requires_grad_(True)
    return loader.adapt(model, lambda base: attach(base, adapter, task="SEQ_CLS"))


def _reward_weights(path: str, start: _Start) -> Any:
    """The reward model's module. Raises UserError where it reads other tokens than the policy
    writes.
    """
    loaded = load_reward_model(path, resolve_dtype(start.config.dtype))
    if loaded.tokenizer.get_vocab() != start.tokenizer.get_vocab():
        raise UserError(
            f"stage.critic_init=reward: the reward model {path} has another tokenizer than the "
            "policy, so its weights can't read the policy's tokens. Use stage.critic_init=policy."
        )
    return loaded.module
