"""Does it fit, and with which setting: the plan of every engine, offload and way to train on the
machine that is asked about.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from conf.choices import (
    AdapterKind,
    Advantage,
    EngineKind,
    LoraInit,
    Offload,
    Quantization,
    RolloutBackend,
)
from conf.schedule import TrainPart
from conf.schema import AdapterConfig
from conf.stages import OnlineStage
from rlhf.checks.memory import activations
from rlhf.checks.memory.moments import Machine, Plan, Settings, sequences_at_once
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import Shapes

_FLOOR = 512  # tokens of a micro-batch below which nothing is proposed
_SCORED = 2048  # tokens of a scoring batch, where the usual ones are too many


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train: which weights, beside which frozen ones."""

    name: str  # in a column
    text: str  # in a sentence
    cfg: Settings
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One setting: its plan, as configured and, where that doesn't fit, with what makes it fit."""

    way: Way
    cfg: Settings
    plan: Plan
    changes: tuple[str, ...]  # overrides beyond engine, offload and way that the plan took

    @property
    def overrides(self) -> list[str]:
        engine = self.cfg.engine
        out = [
            "engine=torch" if engine.kind is EngineKind.torch else f"engine=zero{engine.zero_stage}"
        ]
        if engine.offload is not Offload.none:
            out.append(f"engine.offload={engine.offload.value}")
        if engine.offload is Offload.nvme:
            out.append(f"engine.nvme_path={engine.nvme_path}")
        return [*out, *self.way.overrides, *self.changes]


def ways(cfg: Settings, shapes: Shapes) -> list[Way]:
    """All weights, the top quarter of the blocks, LoRA, QLoRA, and the configured adapter where it
    is another; the one that takes most memory first.
    """
    train, layers = cfg.stage.train, shapes.policy.layers
    loftq = cfg.adapter.init is LoraInit.loftq
    init = LoraInit.default if loftq else cfg.adapter.init
    none = replace(cfg.adapter, kind=AdapterKind.none, quantize=Quantization.none, init=init)
    cfg = replace(cfg, stage=replace(cfg.stage, train=TrainPart()))
    out = [Way("all", "full training", replace(cfg, adapter=none), ("adapter=none",))]
    count = train.layers or layers // 4
    if shapes.policy.parts is not None and count:
        stage = replace(cfg.stage, train=TrainPart(layers=count))
        overrides = ("adapter=none", f"stage.train.layers={count}")
        text = f"training the top {count} of {layers} layers"
        out.append(Way(f"top {count}", text, replace(cfg, adapter=none, stage=stage), overrides))
    lora = AdapterConfig(kind=AdapterKind.lora, rank=cfg.adapter.rank, alpha=cfg.adapter.alpha)
    if cfg.adapter.kind in (AdapterKind.none, AdapterKind.lora):
        lora = replace(cfg.adapter, kind=AdapterKind.lora, quantize=Quantization.none, init=init)
    else:
        kind = cfg.adapter.kind.value
        out.append(Way(kind, f"adapter.kind={kind}", cfg, (f"adapter.kind={kind}",)))
    out.append(Way("LoRA", "LoRA", replace(cfg, adapter=lora), ("adapter=lora",)))
    if lora.init in (LoraInit.default, LoraInit.gaussian, LoraInit.orthogonal, LoraInit.eva):
        method = cfg.adapter.quantize if cfg.adapter.is_quantized else Quantization.nf4
        held = replace(lora, quantize=method)
        given = ["adapter=lora", f"adapter.quantize={method.value}"]
        if loftq:
            held, given = cfg.adapter, ["adapter=loftq"]
        out.append(Way("QLoRA", "QLoRA", replace(cfg, adapter=held), tuple(given)))
    return out


def configured(cfg: Settings) -> str:
    """The name of the way that the configuration itself takes."""
    adapter = cfg.adapter
    if adapter.kind is AdapterKind.none:
        return "all" if not cfg.stage.train.layers else f"top {cfg.stage.train.layers}"
    if adapter.kind is AdapterKind.lora:
        return "QLoRA" if adapter.is_quantized else "LoRA"
    return str(adapter.kind.value)


def engines(cfg: Settings, machine: Machine) -> Iterator[Settings]:
    """Every engine and offload on this number of ranks; the simplest first."""
    kinds = [(EngineKind.torch, 0)] if machine.ranks == 1 else []
    kinds += [(EngineKind.deepspeed, zero) for zero in range(4)]
    for kind, zero in kinds:
        for offload in offloads(kind, zero):
            if offload is not Offload.none and not machine.cuda:
                continue  # the host is the device
            nvme = cfg.engine.nvme_path or "<directory>"
            engine = replace(
                cfg.engine,
                kind=kind,
                zero_stage=zero,
                offload=offload,
                nvme_path=nvme if offload is Offload.nvme else None,
            )
            yield replace(cfg, engine=engine)


def offloads(kind: EngineKind, zero: int) -> tuple[Offload, ...]:
    """What engine.offload may be beside an engine (conf/model.py): none below ZeRO-1, nvme with
    ZeRO-3 only.
    """
    if kind is EngineKind.torch or zero == 0:
        return (Offload.none,)
    return (Offload.none, Offload.cpu, Offload.nvme) if zero == 3 else (Offload.none, Offload.cpu)


def rows(cfg: Settings, shapes: Shapes, machine: Machine) -> list[Row]:
    """A row for every way to train, engine and offload; where one doesn't fit as it is, with the
    least of the changes that make it fit, or that leave the least missing.
    """
    out = []
    for way in ways(cfg, shapes):
        for setting in engines(way.cfg, machine):
            out.append(_row(way, setting, shapes, machine))
    return out


def _row(way: Way, cfg: Settings, shapes: Shapes, machine: Machine) -> Row:
    tried = [
        Row(way, one, plan(one, shapes, machine), changes)
        for one, changes in eased(cfg, shapes, machine)
    ]
    least = min(tried, key=lambda row: (row.plan.problem is not None, row.plan.device_gib))
    return next((row for row in tried if row.plan.fits), least)


def eased(
    cfg: Settings, shapes: Shapes, machine: Machine
) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """`cfg` as it is; then with an adapter for the critic of a policy that has one; vLLM's share
    set to what it needs; gradient checkpointing; smaller scoring batches; smaller micro-batches.
    Each with those before it.
    """
    yield cfg, ()
    changes: list[str] = []
    stage = cfg.stage
    if (
        isinstance(stage, OnlineStage)
        and stage.advantage is Advantage.gae
        and cfg.adapter.kind is not AdapterKind.none
        and not stage.critic_adapter
    ):
        changes.append("stage.critic_adapter=true")
        cfg = replace(cfg, stage=replace(stage, critic_adapter=True))
        yield cfg, tuple(changes)
    if (
        isinstance(cfg.stage, OnlineStage)
        and machine.cuda
        and cfg.rollout.backend is not RolloutBackend.hf
    ):
        width = 2 if machine.half(cfg.model.dtype) else 4
        longest = cfg.data.max_prompt_length + cfg.rollout.max_response_length
        # a fourth of a step's sequences at once keeps vLLM busy; the others wait for their turn
        at_once = max(1, sequences_at_once(cfg.stage, cfg.rollout.max_num_seqs, machine.ranks) // 4)
        share = activations.least_share(shapes.policy, width, longest, at_once, machine.device_gib)
        if share < 1 and abs(share - cfg.rollout.gpu_memory_utilization) > 1e-9:
            changes.append(f"rollout.gpu_memory_utilization={share:.2f}")
            cfg = replace(cfg, rollout=replace(cfg.rollout, gpu_memory_utilization=round(share, 2)))
            yield cfg, tuple(changes)
    if not cfg.engine.gradient_checkpointing:
        changes.append("engine.gradient_checkpointing=true")
        cfg = replace(cfg, engine=replace(cfg.engine, gradient_checkpointing=True))
        yield cfg, tuple(changes)
    if isinstance(cfg.stage, OnlineStage):
        longest = cfg.data.max_prompt_length + cfg.rollout.max_response_length
        if shapes.rewards and cfg.reward.batch_tokens > max(_SCORED, longest):
            changes.append(f"reward.batch_tokens={max(_SCORED, longest)}")
            cfg = replace(cfg, reward=replace(cfg.reward, batch_tokens=max(_SCORED, longest)))
            yield cfg, tuple(changes)
        tokens = cfg.engine.micro_tokens
        while tokens // 2 >= max(_FLOOR, longest):
            tokens //= 2
            yield (
                replace(cfg, engine=replace(cfg.engine, micro_tokens=tokens)),
                (*changes, f"engine.micro_tokens={tokens}"),
            )
        return
    yield from _smaller_micro_batches(cfg, changes, machine)


def _smaller_micro_batches(
    cfg: Settings, changes: Sequence[str], machine: Machine
) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """TRL's stages: half as many tokens or rows in a micro-batch, and half of that, and so on."""
    if cfg.engine.micro_batch_tokens is not None:
        tokens = cfg.engine.micro_batch_tokens
        while tokens // 2 >= cfg.stage.max_length:
            tokens //= 2
            yield (
                replace(cfg, engine=replace(cfg.engine, micro_batch_tokens=tokens)),
                (*changes, f"engine.micro_batch_tokens={tokens}"),
            )
        return
    size = cfg.engine.micro_batch_size or max(1, cfg.stage.batch_size // machine.ranks)
    while size % 2 == 0:
        size //= 2
        yield (
            replace(cfg, engine=replace(cfg.engine, micro_batch_size=size)),
            (*changes, f"engine.micro_batch_size={size}"),
        )


def names_of(found: Sequence[Row]) -> list[str]:
    """The ways of the rows, in their order."""
    return list(dict.fromkeys(row.way.name for row in found))


def recommended(found: Sequence[Row], way: str) -> Row | None:
    """The first that fits in this way to train: no offload, then the fewest changes, then the
    lowest ZeRO stage; fewer exchanges make a faster step.
    """
    fitting = [row for row in found if row.plan.fits and row.way.name == way]
    order = list(Offload)
    return min(
        fitting,
        key=lambda row: (
            order.index(row.cfg.engine.offload),
            len(row.changes),
            row.cfg.engine.zero_stage,
        ),
        default=None,
    )
