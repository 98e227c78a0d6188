"""Which roles a stage has, what each holds at every moment of a step, and the peak.

Roles and moments are those of rlhf/online and of TRL's trainers.
"""

from dataclasses import replace

from conf.adapters import needs_whole
from conf.choices import (
    Advantage,
    CriticInit,
    EngineKind,
    ModelKind,
    PolicyLoss,
    RolloutBackend,
)
from conf.schema import EngineConfig, critic_adapter, facts_of, wants_shared_prompts
from conf.stages import (
    CPOStage,
    KTOStage,
    OfflineStage,
    OnlineStage,
    ORPOStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
)
from rlhf.checks.memory import activations
from rlhf.checks.memory.activations import Pass
from rlhf.checks.memory.generator import (
    asked_of,
    games_memory,
    generator_memory,
    sending,
)
from rlhf.checks.memory.moments import (
    TRL_GIB,
    VLLM_GIB,
    Machine,
    Moment,
    Phase,
    Plan,
    Settings,
    counts_of,
    pass_of,
    process,
    setting_of,
)
from rlhf.checks.memory.shapes import Shape, Shapes, adapter_parameters, trained_parts
from rlhf.checks.memory.states import (
    NOTHING,
    Bytes,
    Setting,
    States,
    frozen_states,
    total,
    training_states,
)


def plan(cfg: Settings, shapes: Shapes, machine: Machine) -> Plan:
    """The plan of a training stage.

    Raises UserError for an adapter that the model has no place for.
    """
    if isinstance(cfg.stage, OnlineStage):
        return _online(cfg, shapes, machine)
    if isinstance(cfg.stage, OfflineStage):
        return _offline(cfg, shapes.policy, machine)
    raise TypeError(f"{type(cfg.stage).__name__} trains nothing")


def _held(states: States) -> Bytes:
    return total(states.resident)


def _backward(states: States) -> Bytes:
    return _held(states) + total(states.backward) + states.gathered


def _step(states: States) -> Bytes:
    return _held(states) + total(states.step)


# ---- online ----


def _online(cfg: Settings, shapes: Shapes, machine: Machine) -> Plan:
    stage, shape = cfg.stage, shapes.policy
    assert isinstance(stage, OnlineStage)
    setting = setting_of(cfg, machine, trl=False)
    shared = replace(setting, parted=setting.zero == 3)  # of models that nothing is put on
    adapter = adapter_parameters(shape, cfg.adapter)
    trained = trained_parts(shape, stage.train, classifier=False)
    whole = shape.parameters + shape.frozen_by(cfg.adapter)
    policy = training_states(
        counts_of(shape, whole, adapter, rounding=cfg.adapter, trained=trained), setting
    )
    critic = _critic(cfg, shapes, setting) if stage.advantage is Advantage.gae else None
    switched_off = facts_of(cfg.adapter).off_is_start and not stage.reference_every
    own_reference = stage.reference and not switched_off
    reference = (
        frozen_states(shape.parameters, shared, shape.largest_layer) if own_reference else None
    )
    asked = asked_of(stage, cfg.rollout, cfg.adapter, *_lengths(cfg), half=setting.half)
    apart = cfg.launch.server_nodes > 0
    generator = generator_memory(cfg.rollout, shape, machine, asked, adapter, apart=apart)
    inside = cfg.rollout.backend in (RolloutBackend.auto, RolloutBackend.vllm)
    beside = VLLM_GIB if inside else 0.0
    scorers = [
        _held(frozen_states(reward.classifier, shared, reward.largest_layer))
        for _, reward in shapes.rewards
    ]
    idle = {"policy": _held(policy)}
    if critic is not None:
        idle["critic"] = _held(critic[1])
    if reference is not None:
        idle["reference"] = _held(reference)
    if shapes.rewards:
        idle["reward"] = sum(scorers, NOTHING)
    idle |= {"generator": generator.idle, "process": process(machine, cfg.engine.kind, beside)}
    playing = games_memory(cfg.environment.kind, asked, machine)
    if stage.ahead:
        idle |= playing
    awake = {**idle, "generator": generator.busy}
    taking = {**idle, "generator": generator.taking}
    sent = sending(cfg.rollout, cfg.adapter, shape, setting, adapter)
    gathering = idle["policy"] + _gathered(setting, shape)
    moments = [
        *_starting(awake, idle, policy, critic, reference),
        Moment(Phase.rollout, "responses", {**awake, **playing}),
        *_scoring(cfg, shapes, setting, idle, reference),
        *_updating(
            cfg,
            shape,
            setting,
            idle,
            policy,
            critic,
            masked=wants_shared_prompts(cfg.engine, stage),
        ),
        Moment(Phase.sync, "weights", {**taking, "policy": idle["policy"] + sent}),
        Moment(Phase.sync, "probe", {**awake, "policy": gathering}),
    ]
    held = (generator.notes, generator.problem, generator.servers)
    return Plan(tuple(moments), machine, *held, not setting.parted)


def _critic(cfg: Settings, shapes: Shapes, setting: Setting) -> tuple[Shape, States]:
    """The critic's shape, the reward model's or the policy's, and its states."""
    stage = cfg.stage
    from_reward = stage.critic_init is CriticInit.reward and shapes.rewards
    shape = shapes.rewards[0][1] if from_reward else shapes.policy
    worn = critic_adapter(stage, cfg.adapter)
    inner = adapter_parameters(shape, worn)
    own = replace(
        setting,
        float32_trained=setting.half and setting.kind is EngineKind.torch and bool(inner),
        parted=setting.zero == 3 and not needs_whole(worn),
    )
    return shape, training_states(counts_of(shape, shape.classifier, inner, rounding=worn), own)


def _starting(
    awake: dict[str, Bytes],
    idle: dict[str, Bytes],
    policy: States,
    critic: tuple[Shape, States] | None,
    reference: States | None,
) -> list[Moment]:
    """The engines are made one after the other, each from a model that every rank holds whole, or
    in parts (rlhf/online/setup.py: build). A whole policy waits on the host while the generator
    starts.
    """
    names = [name for name in ("reward", "generator", "process") if name in idle]
    made: dict[str, Bytes] = {name: idle[name] for name in names}
    waiting = policy.start
    if waiting.host >= waiting.device:
        waiting = Bytes(host=waiting.host)
    starting: dict[str, Bytes] = {name: awake[name] for name in names}
    starting["policy"] = waiting
    out = [Moment(Phase.start, "generator", starting)]
    for name, states in (
        ("policy", policy),
        ("critic", critic[1] if critic is not None else None),
        ("reference", reference),
    ):
        if states is not None:
            out.append(Moment(Phase.start, name, {**made, name: states.start}))
            made[name] = idle[name]
    return out


def _lengths(cfg: Settings) -> tuple[int, int]:
    """Most tokens of a prompt, and of its response."""
    return cfg.data.max_prompt_length, cfg.environment.longest(cfg.rollout.max_response_length)


def _tokens(cfg: Settings, rows: int = 1) -> tuple[int, int]:
    """A rank's tokens of a pass, `rows` rows being the least of it; and of the longest row."""
    longest = sum(_lengths(cfg))
    tokens = max(cfg.engine.micro_tokens, rows * longest)
    tokens = -(-tokens // cfg.engine.sequence_parallel)
    virtual = activations.virtual_tokens(cfg.adapter)
    return tokens + virtual * (tokens // longest), longest + virtual


def _scoring(
    cfg: Settings,
    shapes: Shapes,
    setting: Setting,
    idle: dict[str, Bytes],
    reference: States | None,
) -> list[Moment]:
    """Reward models, and the passes without a gradient that give old and reference logprobs."""
    tokens, longest = _tokens(cfg)
    shape, out = shapes.policy, []
    if shapes.rewards:
        batch = max(cfg.reward.batch_tokens, longest)
        most = max(
            activations.forward_transient(reward, Pass(batch, setting.width))
            for _, reward in shapes.rewards
        )
        largest = max((one for _, one in shapes.rewards), key=lambda one: one.classifier)
        scoring = idle["reward"] + Bytes(most) + _gathered(setting, largest)
        out.append(Moment(Phase.score, "reward", {**idle, "reward": scoring}))
    rows = min(cfg.engine.logits_chunk, tokens)
    head = activations.policy_head(
        shape,
        rows,
        setting.width,
        temperature=cfg.rollout.temperature,
        entropy_grad=False,
        grad=False,
    )
    passing = Bytes(activations.forward_transient(shape, Pass(tokens, setting.width)) + head)
    out.append(
        Moment(
            Phase.score,
            "logprobs",
            {**idle, "policy": idle["policy"] + _gathered(setting, shape) + passing},
        )
    )
    if reference is not None:
        out.append(
            Moment(
                Phase.score,
                "reference",
                {**idle, "reference": idle["reference"] + reference.gathered + passing},
            )
        )
    return out


def _gathered(setting: Setting, shape: Shape) -> Bytes:
    if setting.kind is EngineKind.torch or setting.zero < 3:
        return NOTHING
    return frozen_states(shape.parameters, setting, shape.largest_layer).gathered


def _updating(
    cfg: Settings,
    shape: Shape,
    setting: Setting,
    idle: dict[str, Bytes],
    policy: States,
    critic: tuple[Shape, States] | None,
    *,
    masked: bool,
) -> list[Moment]:
    """Policy and critic take turns in a micro-batch, and both have gradients until both have
    stepped.
    """
    stage = cfg.stage
    # the two sides of a pair are in one pass
    pairs = stage.policy_loss is PolicyLoss.dpo
    tokens, longest = _tokens(cfg, rows=2 if pairs else 1)
    checkpointing = cfg.engine.gradient_checkpointing
    p = pass_of(
        setting,
        tokens,
        adapter=activations.beside(shape, cfg.adapter),
        checkpointing=checkpointing,
        trl=False,
        masked=masked,
        length=longest,
        pack=activations.dense_pack(shape, tokens) if masked else 0,
        layers=trained_parts(shape, stage.train, classifier=False).layers,
    )
    head = activations.policy_head(
        shape,
        min(cfg.engine.logits_chunk, tokens),
        setting.width,
        temperature=cfg.rollout.temperature,
        entropy_grad=stage.entropy_coef > 0,
        grad=True,
    )
    acts = Bytes(activations.kept(shape, p) + max(head, activations.backward_transient(shape, p)))
    if critic is None:
        policies = [("policy's pass", _backward(policy) + acts), ("policy's step", _step(policy))]
        return [Moment(Phase.update, name, {**idle, "policy": held}) for name, held in policies]
    critic_shape, critic_states = critic
    q = pass_of(
        setting,
        tokens,
        adapter=activations.beside(critic_shape, critic_adapter(stage, cfg.adapter)),
        checkpointing=checkpointing,
        trl=False,
        length=longest,
    )
    critic_acts = Bytes(
        activations.kept(critic_shape, q) + activations.backward_transient(critic_shape, q)
    )
    return _taking_turns(idle, policy, acts, critic_states, critic_acts)


def _taking_turns(
    idle: dict[str, Bytes], policy: States, policy_acts: Bytes, critic: States, critic_acts: Bytes
) -> list[Moment]:
    """The moments of an update of policy and critic; `*_acts` are a pass's activations."""
    waiting = {
        **idle,
        "policy": _held(policy) + total(policy.backward),
        "critic": _held(critic) + total(critic.backward),
    }
    holding = [
        ("policy's pass", {**waiting, "policy": _backward(policy) + policy_acts}),
        ("critic's pass", {**waiting, "critic": _backward(critic) + critic_acts}),
        ("policy's step", {**waiting, "policy": _step(policy)}),
        ("critic's step", {**idle, "critic": _step(critic)}),
    ]
    return [Moment(Phase.update, name, held) for name, held in holding]


# ---- offline ----


def _offline(cfg: Settings, shape: Shape, machine: Machine) -> Plan:
    """TRL's trainers: one model, and a reference for DPO and KTO with full weights
    (rlhf/stages/preference.py: start_of).
    """
    stage = cfg.stage
    setting = setting_of(cfg, machine, trl=True)
    made = cfg.model.kind is ModelKind.tiny and cfg.model.path is None and not cfg.model.params
    if made or cfg.model.gguf_file:  # by every rank, whole
        setting = replace(setting, parted=False)
    adapter = adapter_parameters(shape, cfg.adapter)
    name, parameters = "policy", shape.parameters
    if isinstance(stage, RewardStage):
        name, parameters = "reward model", shape.classifier
    trained = trained_parts(shape, stage.train, classifier=isinstance(stage, RewardStage))
    whole = parameters + shape.frozen_by(cfg.adapter)
    counts = counts_of(shape, whole, adapter, rounding=cfg.adapter, trained=trained)
    states = training_states(counts, setting)
    reference = None
    if isinstance(stage, (PreferenceStage, KTOStage)) and not facts_of(cfg.adapter).off_is_start:
        held = replace(setting, half=setting.half and not setting.float32_trained)
        reference = frozen_states(parameters, held, shape.largest_layer)
    tokens = _trl_tokens(stage, cfg.engine, machine.ranks)
    tokens += activations.virtual_tokens(cfg.adapter) * (tokens // stage.max_length)
    p = pass_of(
        setting,
        tokens,
        adapter=activations.beside(shape, cfg.adapter),
        checkpointing=cfg.engine.gradient_checkpointing,
        trl=True,
        length=stage.max_length,
        layers=trained.layers,
    )
    head = 0.0
    if not isinstance(stage, RewardStage):
        fused = isinstance(stage, (SFTStage, PreferenceStage, KTOStage))
        half_width = 2 if setting.half else 4
        trains = trained.head and not adapter
        head = activations.trl_head(shape, tokens, half_width, fused=fused, trained=trains)
    acts = Bytes(activations.kept(shape, p) + max(head, activations.backward_transient(shape, p)))
    processes = {"process": process(machine, cfg.engine.kind, TRL_GIB)}
    moments = [Moment(Phase.start, name, {**processes, name: states.start})]
    idle = {name: _held(states), **processes}
    during_pass = {}
    if reference is not None:
        starting = {**idle, name: states.start, "reference": reference.start}
        moments.append(Moment(Phase.start, "reference", starting))
        idle["reference"] = _held(reference)
        passing = Bytes(activations.forward_transient(shape, p)) + reference.gathered
        during_pass = {"reference": idle["reference"] + passing}
    backward = {**idle, **during_pass, name: _backward(states) + acts}
    moments.append(Moment(Phase.update, "pass", backward))
    moments.append(Moment(Phase.update, "step", {**idle, name: _step(states)}))
    return Plan(tuple(moments), machine, whole_first=not setting.parted)


def _trl_tokens(stage: OfflineStage, engine: EngineConfig, ranks: int) -> int:
    """A rank's tokens of a forward pass, padding included; a pair has two rows."""
    rows = engine.micro_batch_size or max(1, stage.batch_size // engine.groups(ranks))
    if engine.micro_batch_tokens is not None:
        rows = max(1, min(rows, engine.micro_batch_tokens // stage.max_length))
    pairs = isinstance(stage, (RewardStage, PreferenceStage, CPOStage, ORPOStage))
    part = -(-stage.max_length // engine.sequence_parallel)
    return rows * part * (2 if pairs else 1)
