"""Does it fit, and with which setting: the plan of every engine, offload and way to train on the
machine that is asked about, and of where responses are written.
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
from conf.run import LaunchKind
from conf.schedule import TrainPart
from conf.schema import AdapterConfig
from conf.stages import OnlineStage
from rlhf.checks.memory.generator import Asked, asked_of, part_of, share_of
from rlhf.checks.memory.moments import Machine, Plan, Settings
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import Shape, Shapes
from rlhf.checks.sharing import obstacle

_OWN_SHARE = 0.9  # of a device that a server has for itself
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
class Place:
    """Where responses are written: in the trainer's processes, or by servers."""

    cfg: Settings
    machine: Machine  # that trains
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One setting: its plan, as configured and, where that doesn't fit, with what makes it fit."""

    way: Way
    cfg: Settings
    plan: Plan
    changes: tuple[str, ...]  # overrides beyond engine, offload and way that the plan took
    place: tuple[str, ...] = ()  # overrides for servers that write the responses

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
        return [*out, *self.way.overrides, *self.place, *self.changes]


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
    least of the changes that make it fit, or that leave the least missing. The machine's ranks are
    all devices that there are: servers of their own get some of them.
    """
    out = []
    for way in ways(cfg, shapes):
        for setting in engines(way.cfg, machine):
            out.append(_row(way, setting, shapes, machine))
    return out


def _row(way: Way, cfg: Settings, shapes: Shapes, machine: Machine) -> Row:
    tried = []
    for place in places(cfg, shapes.policy, machine):
        for one, changes in eased(place.cfg, shapes, place.machine):
            made = plan(one, shapes, place.machine)
            tried.append(Row(way, one, made, changes, place.overrides))
            if made.fits:
                return tried[-1]
    return min(tried, key=lambda row: (row.plan.problem is not None, row.plan.device_gib))


def places(cfg: Settings, shape: Shape, machine: Machine) -> Iterator[Place]:
    """`cfg` as it is; then servers that have devices for themselves, the fewest first; then servers
    that share all devices with the trainer.
    """
    yield Place(cfg, machine)
    stage = cfg.stage
    if not isinstance(stage, OnlineStage) or not machine.cuda or cfg.rollout.servers:
        return
    if cfg.rollout.backend is RolloutBackend.hf:
        return
    node = machine.of_a_node
    several = machine.ranks > node
    # of several nodes servers get whole ones
    sizes = range(node, machine.ranks, node) if several else _powers(machine.ranks - 1)
    for count in sizes:
        ranks = machine.ranks - count
        if all(size % ranks == 0 for size in stage.step_sizes()):
            yield from _own_devices(cfg, shape, machine, count)
    yield from _shared_devices(cfg, shape, machine)


def _powers(most: int) -> list[int]:
    """1, 2, 4 and so on, up to `most`."""
    return [1 << power for power in range(most.bit_length())]


def _own_devices(cfg: Settings, shape: Shape, machine: Machine, count: int) -> Iterator[Place]:
    """Servers on the last `count` devices, each on as few as hold the model; nothing where no such
    number does.
    """
    asked = _asked(cfg, machine)
    node, ranks = machine.of_a_node, machine.ranks - count
    for parallel in _powers(min(count, node)):
        servers = count // parallel
        least = share_of(part_of(shape, parallel), machine, asked, servers)
        if shape.heads % parallel or least > _OWN_SHARE:
            continue
        left = replace(machine, ranks=ranks, node_ranks=min(node, ranks))
        place = _by_servers(cfg, left, servers, parallel, _OWN_SHARE)
        apart = _own_nodes if machine.ranks > node else _last_devices
        yield apart(place, count)
        return


def _last_devices(place: Place, count: int) -> Place:
    """The servers on the `count` devices of this node behind those that train."""
    server, ranks = place.cfg.rollout.server, place.machine.ranks
    ids = [str(device) for device in range(ranks, ranks + count)]
    starts = range(0, count, server.tensor_parallel)
    devices = [",".join(ids[start : start + server.tensor_parallel]) for start in starts]
    listed = ",".join(f'"{one}"' for one in devices)
    server = replace(server, devices=devices)
    cfg = replace(place.cfg, rollout=replace(place.cfg.rollout, server=server))
    changes = (f"engine.gpus={ranks}", f"rollout.server.devices=[{listed}]")
    return Place(cfg, place.machine, (*place.overrides, *changes))


def _own_nodes(place: Place, count: int) -> Place:
    """The servers on nodes of their own, of `count` devices together."""
    machine, launch = place.machine, place.cfg.launch
    kind = launch.kind if launch.kind in (LaunchKind.slurm, LaunchKind.ray) else LaunchKind.slurm
    nodes, servers = machine.ranks // machine.of_a_node, count // machine.of_a_node
    launch = replace(launch, kind=kind, nodes=nodes, server_nodes=servers)
    changes = (
        f"engine.gpus={machine.ranks}",
        f"launch={kind.value}",
        f"launch.nodes={nodes}",
        f"launch.server_nodes={servers}",
    )
    return Place(replace(place.cfg, launch=launch), machine, (*place.overrides, *changes))


def _shared_devices(cfg: Settings, shape: Shape, machine: Machine) -> Iterator[Place]:
    """One server on all devices of a node, which train as well."""
    node = machine.of_a_node
    share = share_of(part_of(shape, node), machine, _asked(cfg, machine), 1)
    if node > 1 and shape.heads % node == 0 and share < 1:
        yield _by_servers(cfg, machine, 1, node, share)


def _by_servers(cfg: Settings, machine: Machine, count: int, parallel: int, share: float) -> Place:
    """`cfg` with `count` servers of `parallel` devices each, of which they take `share`."""
    server = replace(cfg.rollout.server, count=count, tensor_parallel=parallel, devices=None)
    rollout = replace(
        cfg.rollout,
        backend=RolloutBackend.server,
        server=server,
        sleep=False,
        gpu_memory_utilization=share,
    )
    overrides = ["rollout=server"]
    if count > 1:
        overrides.append(f"rollout.server.count={count}")
    overrides += [
        f"rollout.server.tensor_parallel={parallel}",
        f"rollout.gpu_memory_utilization={share:g}",
    ]
    return Place(replace(cfg, rollout=rollout), machine, tuple(overrides))


def _asked(cfg: Settings, machine: Machine) -> Asked:
    half = machine.half(cfg.model.dtype)
    prompt = cfg.data.max_prompt_length
    response = cfg.environment.longest(cfg.rollout.max_response_length)
    return asked_of(cfg.stage, cfg.rollout, cfg.adapter, prompt, response, half=half)


def eased(
    cfg: Settings, shapes: Shapes, machine: Machine
) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """`cfg` as it is; then with an adapter for the critic of a policy that has one; vLLM's share
    set to what it needs; vLLM asleep while the trainer works; gradient checkpointing; smaller
    scoring batches; smaller micro-batches; ranks that share rows. Each with those before it.
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
    inside = isinstance(cfg.stage, OnlineStage) and machine.cuda
    if inside and cfg.rollout.backend in (RolloutBackend.auto, RolloutBackend.vllm):
        share = share_of(shapes.policy, machine, _asked(cfg, machine), machine.ranks)
        if share < 1 and abs(share - cfg.rollout.gpu_memory_utilization) > 1e-9:
            changes.append(f"rollout.gpu_memory_utilization={share:.2f}")
            cfg = replace(cfg, rollout=replace(cfg.rollout, gpu_memory_utilization=round(share, 2)))
            yield cfg, tuple(changes)
        if share < 1 and not cfg.rollout.sleep and not cfg.stage.ahead:
            changes.append("rollout.sleep=true")
            cfg = replace(cfg, rollout=replace(cfg.rollout, sleep=True))
            yield cfg, tuple(changes)
    if not cfg.engine.gradient_checkpointing:
        changes.append("engine.gradient_checkpointing=true")
        cfg = replace(cfg, engine=replace(cfg.engine, gradient_checkpointing=True))
        yield cfg, tuple(changes)
    if isinstance(cfg.stage, OnlineStage):
        response = cfg.environment.longest(cfg.rollout.max_response_length)
        longest = cfg.data.max_prompt_length + response
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
    yield from _shared_rows(cfg, changes, machine, shapes.policy)


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
    groups = cfg.engine.groups(machine.ranks)
    size = cfg.engine.micro_batch_size or max(1, cfg.stage.batch_size // groups)
    while size % 2 == 0:
        size //= 2
        yield (
            replace(cfg, engine=replace(cfg.engine, micro_batch_size=size)),
            (*changes, f"engine.micro_batch_size={size}"),
        )


def _shared_rows(
    cfg: Settings, changes: Sequence[str], machine: Machine, shape: Shape
) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """SFT, a row at a time: two ranks share it, or four, and so on."""
    if cfg.engine.kind is EngineKind.torch or cfg.engine.sequence_parallel > 1:
        return
    if cfg.engine.micro_batch_tokens is None:
        engine = replace(cfg.engine, micro_batch_size=1)
        one_row = "engine.micro_batch_size=1"
    else:
        engine = replace(cfg.engine, micro_batch_tokens=cfg.stage.max_length)
        one_row = f"engine.micro_batch_tokens={cfg.stage.max_length}"
    ranks = 2
    while machine.ranks % ranks == 0:
        if obstacle(cfg.stage, cfg.model, cfg.adapter, shape.model, ranks) is not None:
            return
        yield (
            replace(cfg, engine=replace(engine, sequence_parallel=ranks)),
            (*changes, one_row, f"engine.sequence_parallel={ranks}"),
        )
        ranks *= 2


def names_of(found: Sequence[Row]) -> list[str]:
    """The ways of the rows, in their order."""
    return list(dict.fromkeys(row.way.name for row in found))


def recommended(found: Sequence[Row], way: str) -> Row | None:
    """The first that fits in this way to train: no offload, then no servers, then the fewest
    changes, then the lowest ZeRO stage; fewer exchanges make a faster step.
    """
    fitting = [row for row in found if row.plan.fits and row.way.name == way]
    order = list(Offload)
    return min(
        fitting,
        key=lambda row: (
            order.index(row.cfg.engine.offload),
            len(row.place) > 0,
            len(row.changes),
            row.cfg.engine.zero_stage,
        ),
        default=None,
    )
