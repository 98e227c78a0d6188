"""Which roles a stage has, what each holds at every moment of a step, and the peak.

Roles and moments are those of rlhf/online/setup.py and online.py, and of TRL's trainers. A moment
is a point of a step at which memory may peak; its phase is the one that users see in
time/<phase>_s.
"""

from dataclasses import dataclass, replace
from enum import Enum

from conf.choices import (
    AdapterKind,
    Advantage,
    CriticInit,
    EngineKind,
    Offload,
    RolloutBackend,
)
from conf.rules import merges_lora, wants_shared_prompts
from conf.schema import Config
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
from rlhf.checks.memory import GIB, NOTHING, Bytes, activations, generation, total
from rlhf.checks.memory.activations import Pass
from rlhf.checks.memory.machine import Machine
from rlhf.checks.memory.shapes import Shape, adapter_parameters
from rlhf.checks.memory.states import Counts, Setting, States, frozen_states, training_states

# One rank's process by itself, as measured on a CPU: the peak of whole runs of models below 2M
# parameters, by stage, engine and generator.
# vLLM 0.26 in short runs, 0.25 to 0.6 in the online runs of docs/project/proofs.md; TRL 0.04 to
# 0.25, with the rows of the data.
INTERPRETER_GIB, TRL_GIB, DEEPSPEED_GIB, VLLM_GIB = 0.54, 0.12, 0.05, 0.45
# the same beside a GPU, with the host's side of CUDA; assumed, not measured here
PROCESS_HOST_GIB = 1.2
# CUDA context, NCCL and fragmentation of one rank; assumed, not measured here
PROCESS_DEVICE_GIB = 1.5
HEADROOM = 0.95  # share of a device that a plan may fill


class Phase(Enum):
    start = "start"
    rollout = "rollout"
    score = "score"
    update = "update"
    sync = "sync"


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes of one rank by role, at one point of a phase."""

    phase: Phase
    name: str
    roles: dict[str, Bytes]

    @property
    def total(self) -> Bytes:
        return total(self.roles)


@dataclass(frozen=True, slots=True)
class Plan:
    """All moments of a stage on a machine."""

    moments: tuple[Moment, ...]
    machine: Machine
    notes: tuple[str, ...] = ()
    problem: str | None = None  # why it can't run whatever fits

    def peak(self, phase: Phase | None = None) -> Moment:
        """The moment with the most on the device."""
        return max(
            (m for m in self.moments if phase in (None, m.phase)), key=lambda m: m.total.device
        )

    @property
    def phases(self) -> list[Phase]:
        return [phase for phase in Phase if any(m.phase is phase for m in self.moments)]

    @property
    def device_gib(self) -> float:
        return self.peak().total.device / GIB

    @property
    def host_gib(self) -> float:
        """Of all ranks together, at the worst moment."""
        return self.machine.ranks * max(m.total.host for m in self.moments) / GIB

    @property
    def fits(self) -> bool:
        return self.obstacle is None

    @property
    def obstacle(self) -> str | None:
        """Why it doesn't fit; None where it does."""
        machine, worst = self.machine, self.peak()
        if self.problem is not None:
            return self.problem
        if self.device_gib > HEADROOM * machine.device_gib:
            role = max(worst.roles, key=lambda name: worst.roles[name].device)
            where = (
                f"{self.device_gib:.1f} GiB in {worst.phase.value}, of which "
                f"{worst.roles[role].device / GIB:.1f} for the {role}"
            )
            return (
                f"{where}; each rank loads the whole model there"
                if worst.phase is Phase.start and machine.ranks > 1
                else where
            )
        if machine.cuda and machine.host_gib is not None and self.host_gib > machine.host_gib:
            return f"{self.host_gib:.0f} GiB of host memory, and {machine.host_gib:.0f} are here"
        return None


@dataclass(frozen=True, slots=True)
class Shapes:
    """The models of a stage."""

    policy: Shape
    # by option: those that score, and the judge of a watch
    rewards: tuple[tuple[str, Shape], ...] = ()


def plan(cfg: Config, shapes: Shapes, machine: Machine, *, four_bit: bool = False) -> Plan:
    """The plan of a training stage; `four_bit`: with an adapter beside a base in 4 bits (QLoRA,
    which the toolkit itself doesn't train).

    Raises UserError for an adapter that the model has no place for.
    """
    if isinstance(cfg.stage, OnlineStage):
        return _online(cfg, shapes, machine, four_bit)
    if isinstance(cfg.stage, OfflineStage):
        return _offline(cfg, shapes.policy, machine, four_bit)
    raise TypeError(f"{type(cfg.stage).__name__} trains nothing")


def process(cfg: Config, machine: Machine) -> Bytes:
    """What a rank takes before any model."""
    if machine.cuda:
        return Bytes(PROCESS_DEVICE_GIB * GIB, PROCESS_HOST_GIB * GIB)
    held = INTERPRETER_GIB + (DEEPSPEED_GIB if cfg.engine.kind is EngineKind.deepspeed else 0.0)
    if isinstance(cfg.stage, OfflineStage):
        return Bytes((held + TRL_GIB) * GIB)
    return Bytes((held + (VLLM_GIB if cfg.rollout.backend is not RolloutBackend.hf else 0.0)) * GIB)


def counts_of(shape: Shape, parameters: int, adapter: int, *, four_bit: bool = False) -> Counts:
    """A module of `parameters`, all of which train, or an adapter beside them. `four_bit`: its
    linear layers are quantised.
    """
    if not adapter:
        return Counts(parameters, parameters, shape.largest, shape.largest_layer)
    layers = [one.inputs * one.outputs for one in shape.linears] if four_bit else [0]
    return Counts(
        parameters + adapter,
        adapter,
        adapter // max(1, len(shape.linears)),
        shape.largest_layer,
        sum(layers),
        max(layers),
    )


def setting_of(cfg: Config, machine: Machine, *, trl: bool) -> Setting:
    engine, half = cfg.engine, machine.half(cfg.model.dtype)
    plain, lora = engine.kind is EngineKind.torch, cfg.adapter.kind is not AdapterKind.none
    return Setting(
        kind=engine.kind,
        zero=engine.zero_stage,
        offload=engine.offload,
        ranks=machine.ranks,
        half=half,
        cuda=machine.cuda,
        fused=plain and not trl,
        float32_trained=half and plain and (lora or trl),
    )


def _pass(
    cfg: Config,
    setting: Setting,
    tokens: int,
    *,
    trl: bool,
    adapter: bool,
    masked: bool = False,
    length: int = 0,
) -> Pass:
    autocast = trl and setting.float32_trained and not adapter
    return Pass(
        tokens=tokens,
        width=4 if autocast else setting.width,
        length=length,
        adapter=cfg.adapter.rank if adapter else 0,
        adapter_float32=setting.kind is EngineKind.torch,
        autocast=autocast,
        masked=masked,
        checkpointing=cfg.engine.gradient_checkpointing,
    )


def _held(states: States) -> Bytes:
    return total(states.resident)


def _backward(states: States) -> Bytes:
    return _held(states) + total(states.backward) + states.gathered


def _step(states: States) -> Bytes:
    return _held(states) + total(states.step)


# ---- online ----


def _online(cfg: Config, shapes: Shapes, machine: Machine, four_bit: bool) -> Plan:
    stage, shape = cfg.stage, shapes.policy
    assert isinstance(stage, OnlineStage)
    setting = setting_of(cfg, machine, trl=False)
    adapter = adapter_parameters(shape, cfg.adapter)
    policy = training_states(
        counts_of(shape, shape.parameters, adapter, four_bit=four_bit), setting
    )
    critic = (
        _critic(cfg, shapes, setting, adapter, four_bit)
        if stage.advantage is Advantage.gae
        else None
    )
    own_reference = stage.reference and (not adapter or bool(stage.reference_every))
    reference = (
        frozen_states(shape.parameters, setting, shape.largest_layer) if own_reference else None
    )
    generator = _generator(cfg, shape, machine, adapter)
    scorers = Bytes(sum(setting.width * reward.classifier for _, reward in shapes.rewards))
    idle = {"policy": _held(policy)}
    if critic is not None:
        idle["critic"] = _held(critic[1])
    if reference is not None:
        idle["reference"] = _held(reference)
    if shapes.rewards:
        idle["reward"] = scorers
    idle |= {"generator": generator.idle, "process": process(cfg, machine)}
    moments = [
        *_starting(idle, policy, critic, reference),
        Moment(Phase.rollout, "responses", {**idle, "generator": generator.busy}),
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
        Moment(
            Phase.sync,
            "weights",
            {**idle, "policy": idle["policy"] + _syncing(cfg, shape, setting, adapter)},
        ),
    ]
    return Plan(tuple(moments), machine, generator.notes, generator.problem)


def _critic(
    cfg: Config, shapes: Shapes, setting: Setting, adapter: int, four_bit: bool
) -> tuple[Shape, States]:
    """The critic's shape, the reward model's or the policy's, and its states."""
    stage = cfg.stage
    from_reward = stage.critic_init is CriticInit.reward and shapes.rewards
    shape = shapes.rewards[0][1] if from_reward else shapes.policy
    inner = 0
    if stage.critic_adapter:
        inner = (
            adapter_parameters(shape, replace(cfg.adapter, kind=AdapterKind.lora))
            if not adapter or from_reward
            else adapter
        )
    own = replace(
        setting, float32_trained=setting.half and setting.kind is EngineKind.torch and bool(inner)
    )
    return shape, training_states(counts_of(shape, shape.classifier, inner, four_bit=four_bit), own)


def _starting(
    idle: dict[str, Bytes],
    policy: States,
    critic: tuple[Shape, States] | None,
    reference: States | None,
) -> list[Moment]:
    """The engines are made one after the other, each from a model that every rank holds whole
    (rlhf/online/setup.py: build).
    """
    made: dict[str, Bytes] = {
        name: idle[name] for name in ("reward", "generator", "process") if name in idle
    }
    out = []
    for name, states in (
        ("policy", policy),
        ("critic", critic[1] if critic is not None else None),
        ("reference", reference),
    ):
        if states is not None:
            out.append(Moment(Phase.start, name, {**made, name: states.start}))
            made[name] = idle[name]
    return out


def _tokens(cfg: Config) -> tuple[int, int]:
    """Tokens of a micro-batch, a row being the least of it; and of the longest row."""
    longest = cfg.data.max_prompt_length + cfg.rollout.max_response_length
    return max(cfg.engine.micro_tokens, longest), longest


def _scoring(
    cfg: Config, shapes: Shapes, setting: Setting, idle: dict[str, Bytes], reference: States | None
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
        out.append(Moment(Phase.score, "reward", {**idle, "reward": idle["reward"] + Bytes(most)}))
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
    cfg: Config,
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
    tokens, longest = _tokens(cfg)
    lora = cfg.adapter.kind is not AdapterKind.none
    p = _pass(cfg, setting, tokens, trl=False, adapter=lora, masked=masked, length=longest)
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
    q = _pass(cfg, setting, tokens, trl=False, adapter=stage.critic_adapter, length=longest)
    critic_acts = Bytes(
        activations.kept(critic_shape, q) + activations.backward_transient(critic_shape, q)
    )
    waiting = {
        "policy": _held(policy) + total(policy.backward),
        "critic": _held(critic_states) + total(critic_states.backward),
    }
    return [
        Moment(
            Phase.update, "policy's pass", {**idle, **waiting, "policy": _backward(policy) + acts}
        ),
        Moment(
            Phase.update,
            "critic's pass",
            {**idle, **waiting, "critic": _backward(critic_states) + critic_acts},
        ),
        Moment(Phase.update, "policy's step", {**idle, **waiting, "policy": _step(policy)}),
        Moment(Phase.update, "critic's step", {**idle, "critic": _step(critic_states)}),
    ]


def _syncing(cfg: Config, shape: Shape, setting: Setting, adapter: int) -> Bytes:
    """policy/model.py: iterate_weights. ZeRO-3 gathers and copies a layer; of a merged one the
    original and the merged copy exist beside it.
    """
    merged = merges_lora(cfg.rollout, cfg.adapter)
    if adapter and not merged:
        return Bytes(4.0 * adapter)
    largest = max(one.inputs * one.outputs for one in shape.linears)
    copies = 2.0 * largest if merged else 0.0
    gathered = (
        2.0 * shape.largest_layer
        if setting.kind is EngineKind.deepspeed and setting.zero == 3
        else 0.0
    )
    return Bytes(setting.width * (copies + gathered))


@dataclass(frozen=True, slots=True)
class _Generator:
    idle: Bytes
    busy: Bytes
    notes: tuple[str, ...] = ()
    problem: str | None = None


def sequences_at_once(cfg: Config, ranks: int) -> int:
    stage = cfg.stage
    return max(
        1, min(cfg.rollout.max_num_seqs, stage.prompts_per_step * stage.samples_per_prompt // ranks)
    )


def _generator(cfg: Config, shape: Shape, machine: Machine, adapter: int) -> _Generator:
    """vLLM's share of the device, whole on every rank; on a CPU its weights and cache; or
    transformers' copy of the model.
    """
    rollout, width = cfg.rollout, 2 if machine.half(cfg.model.dtype) else 4
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    wanted = sequences_at_once(cfg, machine.ranks)
    if rollout.backend is RolloutBackend.hf:
        busy = generation.transformers_bytes(shape, width, wanted, prompt, response, adapter)
        return _Generator(Bytes(float(width * shape.parameters + 4 * adapter)), Bytes(busy))
    weights = float(width * shape.parameters)
    if not machine.cuda:
        held = Bytes(weights + rollout.kv_cache_gib * GIB)
        cache = generation.cache_of(rollout.kv_cache_gib * GIB, shape, width, prompt + response)
        option = f"rollout.kv_cache_gib={rollout.kv_cache_gib:g}"
    else:
        share = rollout.gpu_memory_utilization * machine.device_gib * GIB
        held = Bytes(share)
        cache = generation.cache_of(
            share - weights - generation.VLLM_OVERHEAD_GIB * GIB, shape, width, prompt + response
        )
        option = f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
    if cache.sequences < 1:
        needed = (
            f"vLLM's weights of {weights / GIB:.1f} GiB and one sequence of "
            f"{prompt + response} tokens"
        )
        return _Generator(held, held, problem=f"{option} doesn't hold {needed}")
    few = "" if cache.sequences >= wanted else f"; of the {wanted} of a step the others wait"
    return _Generator(
        held,
        held,
        (
            f"{option}: a cache of {cache.tokens} tokens, {cache.sequences} sequences of full "
            f"length at once{few}",
        ),
    )


# ---- offline ----


def _offline(cfg: Config, shape: Shape, machine: Machine, four_bit: bool) -> Plan:
    """TRL's trainers: one model, and a reference for DPO and KTO with full weights
    (rlhf/stages/preference.py: start_of).
    """
    stage = cfg.stage
    setting = setting_of(cfg, machine, trl=True)
    adapter = adapter_parameters(shape, cfg.adapter)
    classifier = isinstance(stage, RewardStage)
    parameters = shape.classifier if classifier else shape.parameters
    states = training_states(counts_of(shape, parameters, adapter, four_bit=four_bit), setting)
    held = (
        replace(setting, half=setting.half and not setting.float32_trained)
        if not adapter
        else setting
    )
    reference = (
        frozen_states(parameters, held, shape.largest_layer)
        if isinstance(stage, (PreferenceStage, KTOStage)) and not adapter
        else None
    )
    rows = cfg.engine.micro_batch_size or max(1, stage.batch_size // machine.ranks)
    tokens = (
        rows
        * stage.max_length
        * (2 if isinstance(stage, (RewardStage, PreferenceStage, CPOStage, ORPOStage)) else 1)
    )
    p = _pass(cfg, setting, tokens, trl=True, adapter=bool(adapter), length=stage.max_length)
    half_width = 2 if setting.half else 4
    head = 0.0
    if not classifier:
        fused = isinstance(stage, (SFTStage, PreferenceStage, KTOStage))
        head = activations.trl_head(shape, tokens, half_width, fused=fused, trained=not adapter)
    acts = Bytes(activations.kept(shape, p) + max(head, activations.backward_transient(shape, p)))
    idle = {"policy": _held(states), "process": process(cfg, machine)}
    name = "reward model" if classifier else "policy"
    if name != "policy":
        idle = {name: idle["policy"], "process": idle["process"]}
    if reference is not None:
        idle["reference"] = _held(reference)
    moments = [Moment(Phase.start, name, {"process": idle["process"], name: states.start})]
    if reference is not None:
        moments.append(
            Moment(
                Phase.start, "reference", {**idle, name: states.start, "reference": reference.start}
            )
        )
        passing = Bytes(activations.forward_transient(shape, p)) + reference.gathered
        idle_pass = {**idle, "reference": idle["reference"] + passing}
    else:
        idle_pass = idle
    moments.append(Moment(Phase.update, "pass", {**idle_pass, name: _backward(states) + acts}))
    moments.append(Moment(Phase.update, "step", {**idle, name: _step(states)}))
    return Plan(tuple(moments), machine)


def offloads(kind: EngineKind, zero: int) -> tuple[Offload, ...]:
    """What engine.offload may be beside an engine (conf/engine.py): none below ZeRO-1, nvme with
    ZeRO-3 only.
    """
    if kind is EngineKind.torch or zero == 0:
        return (Offload.none,)
    return (Offload.none, Offload.cpu, Offload.nvme) if zero == 3 else (Offload.none, Offload.cpu)
