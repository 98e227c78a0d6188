"""``stage=ppo``, ``grpo`` and the other online algorithms: the loop of `rlhf.online`."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from conf.adapters import virtual_tokens
from conf.choices import Action, AdapterKind, Advantage, Carrier, CriticInit, Dtype, TermKind
from conf.online import OnlineStage
from conf.reward import EnvironmentKind, RewardTerm, TurnCredit
from conf.schema import (
    AdapterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    carrier_of,
    facts_of,
)
from policy import adapters
from policy.engines import resharding
from policy.engines.base import check_optimizer
from policy.engines.deepspeed import check_extensions
from reward.base import model_paths
from reward.scorers.computed import load_function
from reward.terms import check_reward, check_reward_model, scoring_models
from rlhf.checks import inputs, launch
from rlhf.online.loop import Loop
from rlhf.online.setup import build
from rlhf.run.context import RunContext
from rlhf.types import RowReader, UserError
from rollout import APART_CHECKS, PLACES, acting_in

adapt_checkpoint = resharding.adapt  # before a resume


def run(ctx: RunContext, reader: RowReader) -> None:
    """Train a policy online: reads the model, the reward and the prompts, writes the run
    directory.
    """
    with ctx.closing():
        ctx.watchdog.phase("build")
        parts = build(ctx, reader)
        with contextlib.closing(parts.generator):
            Loop(ctx, parts).train()


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load, beside rows and memory; returns notes worth a
    warning. Raises UserError.
    """
    stage = cfg.stage_as(OnlineStage)
    launch.check_engine(cfg.engine, dry_run=cfg.run.dry_run)
    check_optimizer(stage.optimizer, cfg.engine)
    check_extensions(cfg.engine, waits=stage.unfreeze.on)
    ranks = launch.count_ranks(cfg.engine, dry_run=cfg.run.dry_run)
    launch.check_prompts_per_step(stage, ranks)
    launch.check_nonfinite(stage.on_nonfinite, cfg.engine, cfg.model.dtype)
    launch.check_noise(stage, cfg.model.dtype)
    check_penalty(stage, cfg.adapter)
    check_reference(stage, cfg.engine.zero_stage, merges=facts_of(cfg.adapter).merges)
    check_precision(stage.name, cfg.model.dtype)
    assert stage.steps is not None
    notes = launch.growth_note(stage, stage.steps)
    check_turns(stage, cfg.reward, cfg.environment.kind)
    check_ahead(stage, cfg.rollout)
    notes += launch.check_backend(cfg.rollout.backend)
    notes += launch.gradient_note(cfg.engine, cfg.model.dtype)
    launch.check_adapter(cfg.rollout, cfg.adapter)
    inputs.check_virtual_tokens(cfg.adapter, cfg.engine)
    adapters.check_budget(cfg.adapter, cfg.engine)
    inputs.check_trained(cfg.model)
    inputs.check_added_tokens(cfg.model, cfg.adapter, stage)
    adapters.check(cfg.model, cfg.adapter, task="CAUSAL_LM", stage=stage)
    if launch.runs_vllm(cfg.rollout.backend):
        carrier = carrier_of(cfg.rollout, cfg.adapter)
        check_places(carrier, cfg.model, cfg.adapter)
        if cfg.rollout.backend in APART_CHECKS:
            check_apart = APART_CHECKS[cfg.rollout.backend]
            check_apart(cfg.rollout, carrier, dry_run=cfg.run.dry_run)
    sent = adapters.sent_rank(cfg.model, cfg.adapter)
    if sent is not None:
        launch.check_rank(cfg.rollout, cfg.adapter, *sent)
    tokenizer = inputs.policy_tokenizer(cfg.model, cfg.data.chat_template)
    notes += inputs.padding_note(cfg.model.path, tokenizer)
    acting_in(cfg.environment, tokenizer)
    kind, judges = cfg.environment.kind, scoring_models(cfg.reward, stage.watch)
    if inputs.check_pictures(cfg.model.path, tokenizer, cfg.rollout, kind, judges):
        check_pictures(cfg.model.path, stage, cfg.engine)
    reading = check_scores(stage, cfg.reward, tokenizer)
    reading += check_watch(stage, cfg.reward, tokenizer)
    inputs.refuse_texts(cfg.environment.kind, reading)
    notes += reading
    turn = cfg.rollout.max_response_length
    check_buffer(stage.overlong_buffer, cfg.environment.most_written(turn))
    longest = (cfg.environment.longest(turn), cfg.environment.longest_option)
    ahead = virtual_tokens(cfg.adapter)
    check_lengths(cfg.model, ahead, judges, cfg.data.max_prompt_length, *longest)
    return notes


def check_pictures(path: str | None, stage: OnlineStage, engine: EngineConfig) -> None:
    """What the policy of `path`, which reads pictures, can't be trained with, by name. Raises
    UserError.
    """
    reads = f"the policy {path} reads pictures"
    if engine.share_prompts:
        raise UserError(
            f"engine.share_prompts=true: {reads}, and each response is a row of its own with its "
            "prompt's pictures. Set engine.share_prompts=null."
        )
    if engine.sequence_parallel > 1:
        raise UserError(
            f"engine.sequence_parallel={engine.sequence_parallel}: {reads}, and ranks share rows "
            "of text alone. Set engine.sequence_parallel=1."
        )
    if stage.advantage is Advantage.gae:
        raise UserError(
            f"stage.advantage=gae: {reads}, and a critic reads texts alone. Set "
            "stage.advantage=group (stage=grpo)."
        )


def check_places(carrier: Carrier, model: ModelConfig, adapter: AdapterConfig) -> None:
    """vLLM's model has a layer wherever the adapter puts one of its own. Raises UserError."""
    check, known = PLACES.get(carrier), None
    if check is not None:
        known = adapters.places_of(model, adapter)
    if check is not None and known is not None:
        check(*known)


def check_reference(stage: OnlineStage, zero_stage: int, *, merges: bool = True) -> None:
    """A KL penalty needs something to measure against; a reference that moves has to be whole.
    merges: whether whole weights can hold the policy.
    """
    if stage.reference_every and not merges:
        raise UserError(
            f"stage.reference_every={stage.reference_every} moves the reference's weights towards "
            "the policy, whose adapter no weights can hold. Set stage.reference_every=0."
        )
    if stage.reference_every and (not stage.reference or zero_stage == 3):
        hindrance = "stage.reference=false"
        if stage.reference:
            hindrance = "engine=zero3, which leaves no rank with the reference's whole weights"
        raise UserError(
            f"stage.reference_every={stage.reference_every} moves the reference, which "
            f"{hindrance} prevents. Set stage.reference_every=0."
        )
    if stage.kl_coef > 0 and not stage.reference:
        raise UserError(
            f"stage.kl_coef={stage.kl_coef} penalises the distance from a reference, but "
            "stage.reference=false keeps none. "
            "Set stage.reference=true, or stage.kl_coef=0."
        )


def check_penalty(stage: OnlineStage, adapter: AdapterConfig) -> None:
    """AdaLoRA's penalty is added in a step's last micro-batch, so its gradient would count as that
    micro-batch's noise. Raises UserError.
    """
    weight = adapter.adalora.orthogonality
    measured = stage.noise_scale is not None
    if measured and adapter.kind is AdapterKind.adalora and weight:
        raise UserError(
            f"stage.noise_scale={stage.noise_scale} with adapter=adalora: its penalty is in one "
            "micro-batch of a step alone, and would be taken for noise. Set "
            f"stage.noise_scale=null, or adapter.adalora.orthogonality=0 (it is {weight:g})."
        )


def check_precision(stage: str, dtype: Dtype) -> None:
    """float16 gradients vanish without a scaled loss, which only TRL's trainers have; DeepSpeed's
    engine would train bfloat16 in its place.
    """
    if dtype is Dtype.float16:
        raise UserError(
            f"model.dtype=float16: stage={stage} scales no loss, so that small "
            "gradients would vanish in float16. "
            "Set model.dtype=bfloat16, or float32."
        )


def check_ahead(stage: OnlineStage, rollout: RolloutConfig) -> None:
    """Weights can only change while responses are written where these are written ahead, and then
    no engine can sleep.
    """
    if rollout.in_flight and not stage.ahead:
        raise UserError(
            "rollout.in_flight=true changes weights while responses are written, but with "
            "stage.ahead=0 nothing is written while the policy updates. Set stage.ahead=1, or "
            "rollout.in_flight=false."
        )
    if rollout.sleep and stage.ahead:
        raise UserError(
            "rollout.sleep=true leaves the device to the trainer while it updates, but with "
            f"stage.ahead={stage.ahead} the engine writes then. Set stage.ahead=0, or "
            "rollout.sleep=false."
        )


def check_scores(stage: OnlineStage, reward: RewardConfig, tokenizer: Any) -> list[str]:
    """There is one source of scores, and its reward models can read what the policy writes.
    `tokenizer` is the policy's, None where it is not on the disk.
    """
    check_reward(reward)
    critic = stage.advantage is Advantage.gae and stage.critic_init is CriticInit.reward
    if critic and reward.path is None:
        raise UserError(
            "stage.critic_init=reward needs reward.path, which is not set. Set "
            "stage.critic_init=policy, or reward.path."
        )
    notes = []
    for key, path in model_paths(reward):
        notes += check_reward_model(key, path, tokenizer, critic=critic)
    return notes


def check_watch(stage: OnlineStage, reward: RewardConfig, tokenizer: Any) -> list[str]:
    """The held-out judge is there, and it is another than the reward that trains."""
    watch = stage.watch
    if watch.kl is not Action.off and not stage.reference:
        raise UserError(
            f"stage.watch.kl={watch.kl.value} needs a KL, but stage.reference=false keeps "
            "nothing to measure it against."
        )
    if watch.judge_path is not None:
        _refuse_trained("judge_path", watch.judge_path, model_paths(reward))
        return check_reward_model("stage.watch.judge_path", watch.judge_path, tokenizer)
    if watch.judge_function is not None:
        functions = [("reward.function", reward.function)]
        for name, term in reward.terms.items():
            functions.append((f"reward.terms.{name}.function", term.function))
        _refuse_trained("judge_function", watch.judge_function, functions)
        load_function(watch.judge_function, "stage.watch.judge_function")
        return []
    if watch.divergence is Action.stop:
        raise UserError(
            "stage.watch.divergence=stop compares the score with a held-out judge, but there "
            "is none. Set "
            "stage.watch.judge_path=<a second reward run>/model or "
            "stage.watch.judge_function=pkg.module:function, or divergence=off."
        )
    return []


def _refuse_trained(key: str, judge: str, sources: Sequence[tuple[str, str | None]]) -> None:
    for trained_key, source in sources:
        if source == judge:
            raise UserError(
                f"stage.watch.{key}={judge} is {trained_key} too: a judge that also trains can't "
                "tell when the reward is exploited. "
                "Give a second reward model, trained with another seed or on other pairs, or a "
                "function of its own."
            )


def check_turns(stage: OnlineStage, reward: RewardConfig, environment: EnvironmentKind) -> None:
    """Rewards of turns have an environment that gives them; where each stands at the end of its
    turn, they are in the units of the score. Raises UserError.
    """
    acts = environment is not EnvironmentKind.none
    inputs.check_acting_terms(reward, environment)
    terms = {n: t for n, t in reward.terms.items() if t.kind is TermKind.environment}
    if stage.turn_discount != 1.0 and not acts:
        raise UserError(
            f"stage.turn_discount={stage.turn_discount} discounts over turns, but with "
            "environment=none a response is one turn. Set stage.turn_discount=1."
        )
    by_turns = stage.turn_credit is TurnCredit.turn
    if by_turns and not terms:
        raise UserError(
            "stage.turn_credit=turn needs rewards of turns, but no reward term is of "
            "kind=environment. Set reward=environment, or stage.turn_credit=episode."
        )
    changed = stage.turn_discount != 1.0 or by_turns
    if changed and stage.advantage is Advantage.none:
        raise UserError(
            f"stage.turn_credit={stage.turn_credit.value} and "
            f"stage.turn_discount={stage.turn_discount} change nothing with "
            "stage.advantage=none, which compares no scores. Set episode and 1."
        )
    if by_turns:
        _check_units(stage, terms)


def _check_units(stage: OnlineStage, terms: dict[str, RewardTerm]) -> None:
    """What scales or cuts the scores of episodes would leave the rewards of their turns as they
    are. Raises UserError.
    """
    set_options = {
        "stage.reward_clip": stage.reward_clip is not None,
        "stage.reward_normalise": stage.reward_normalise,
    }
    for name, term in terms.items():
        set_options[f"reward.terms.{name}.clip"] = term.clip is not None
        set_options[f"reward.terms.{name}.normalise"] = term.normalise
    for option, is_set in set_options.items():
        if is_set:
            raise UserError(
                f"{option} is set with stage.turn_credit=turn: it changes the scores of whole "
                "episodes, and the rewards of their turns would not go with them. Leave it out, "
                "or set stage.turn_credit=episode."
            )


def check_buffer(buffer: int, response: int) -> None:
    """The penalised end of a response is no longer than all that the policy can write."""
    if buffer > response:
        raise UserError(
            f"stage.overlong_buffer={buffer} tokens are more than the policy can write in a "
            f"response ({response}, by rollout.max_response_length and, with an environment, its "
            "max_turns and max_tokens). Lower the buffer; a fifth of the length is usual."
        )


def check_lengths(
    model: ModelConfig,
    ahead: int,
    scoring: Iterable[tuple[str, str | None]],
    prompt: int,
    response: int,
    option: str,
) -> None:
    """A prompt and a response of so many tokens, behind `ahead` virtual ones, fit the positions of
    every model that reads them. `scoring`: options and directories of the reward models; `option`:
    that tells of the response.
    """
    inputs.check_rope(model, prompt, response, ahead, option=option)
    readers = [inputs.model_positions(model, ahead), *inputs.directory_positions(scoring)]
    inputs.check_sequence_length(prompt, response, readers, option=option)
