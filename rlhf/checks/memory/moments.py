"""The parts of a memory plan: the machine, the moments of a step and what each role holds at them.

A moment is a point of a step at which memory may peak; its phase is the one that users see in
time/<phase>_s.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

from conf.adapters import needs_whole
from conf.choices import AdapterKind, Dtype, EngineKind
from conf.model import AdamKernels
from conf.reward import EnvironmentConfig
from conf.run import LaunchConfig
from conf.schema import (
    AdapterConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
)
from rlhf.checks.memory.activations import Beside, Pass
from rlhf.checks.memory.shapes import Shape, Trained
from rlhf.checks.memory.states import GIB, Bytes, Counts, Setting, rounded_bytes, total
from rlhf.process import distributed

ASSUMED_GIB = 80.0  # a device of an A100 or H100
NODE_DEVICES = 8  # of a node, where nothing says how many
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


class Settings(Protocol):
    """The groups of options that a memory plan reads; the configuration has them all."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace takes it
    stage: Any
    model: ModelConfig
    adapter: AdapterConfig
    engine: EngineConfig
    rollout: RolloutConfig
    environment: EnvironmentConfig
    reward: RewardConfig
    data: DataConfig
    launch: LaunchConfig


@dataclass(frozen=True, slots=True)
class Machine:
    """`device_gib`: of one rank's device; without a GPU its share of the host's memory."""

    ranks: int
    cuda: bool
    device_gib: float
    # of each host; None: not known, since the devices are not here
    host_gib: float | None
    notes: tuple[str, ...] = ()  # what was assumed
    node_ranks: int | None = None  # ranks of one host; None: all

    @property
    def of_a_node(self) -> int:
        """Ranks that share one host."""
        return self.node_ranks or self.ranks

    def half(self, dtype: Dtype) -> bool:
        """Whether weights are in half precision: ``auto`` is bfloat16 on a GPU
        (rlhf.models.loading.resolve_dtype).
        """
        return self.cuda if dtype is Dtype.auto else dtype is not Dtype.float32


def machine_of(
    engine: EngineConfig, params: float | None, *, all_devices: bool, nodes: int = 1
) -> Machine:
    """The devices that the engine's options ask for, else those that are here (`all_devices`: one
    rank on each, not just those launched), on so many `nodes`. A model of assumed size (`params`)
    runs on assumed devices.
    """
    import psutil
    import torch

    launched = distributed.world_size()
    memory = psutil.virtual_memory().total / GIB
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        own = min(torch.cuda.get_device_properties(i).total_memory for i in range(here)) / GIB
        ranks = engine.gpus or (max(launched, here) if all_devices else launched)
        node = _ranks_of_a_node(ranks, nodes)
        known = memory if (node or ranks) <= here else None
        return Machine(ranks, True, engine.gpu_memory_gib or own, known, node_ranks=node)
    asked = engine.gpus is not None or engine.gpu_memory_gib is not None or params is not None
    if not asked:
        node = _ranks_of_a_node(launched, nodes)
        return Machine(launched, False, memory / (node or launched), memory, node_ranks=node)
    notes = []
    if engine.gpu_memory_gib is None:
        notes.append(
            f"no GPU here: devices of {ASSUMED_GIB:.0f} GiB are assumed; "
            "engine.gpu_memory_gib=<GiB> says otherwise"
        )
    if engine.gpus is None:
        notes.append(
            f"{launched} device{'s' if launched > 1 else ''}, one for each rank launched; "
            "engine.gpus=<number> says otherwise"
        )
    ranks, size = engine.gpus or launched, engine.gpu_memory_gib or ASSUMED_GIB
    node = _ranks_of_a_node(ranks, nodes)
    if node is None and ranks > NODE_DEVICES:
        node = NODE_DEVICES
        notes.append(f"nodes of {node} devices are assumed; launch.nodes=<number> says otherwise")
    return Machine(ranks, True, size, None, tuple(notes), node)


def _ranks_of_a_node(ranks: int, nodes: int) -> int | None:
    """Of so many `nodes`, or as they were launched; None: there is one node."""
    if nodes > 1:
        return -(-ranks // nodes)
    local = distributed.local_world_size()
    return min(ranks, local) if distributed.world_size() > local else None


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
class Servers:
    """vLLM servers that a run starts; without a GPU they are beside the ranks on their host, unless
    they have nodes of their own.
    """

    count: int
    devices: int  # of each
    parts: dict[str, Bytes]  # of one device; none where it is a rank's as well
    answering: float = 0.0  # bytes of each server's process that takes requests
    kept: float = 0.0  # bytes of weights that wait for restarts, once on the trainer's host
    apart: bool = False  # whether they have nodes of their own

    @property
    def total(self) -> float:
        """Bytes of all of them, without a GPU."""
        each = self.devices * total(self.parts).device + self.answering
        return self.count * each

    @property
    def on_host(self) -> float:
        """Bytes of a host with ranks that they take, without a GPU."""
        return self.kept + (0.0 if self.apart else self.total)


@dataclass(frozen=True, slots=True)
class Plan:
    """All moments of a stage on a machine."""

    moments: tuple[Moment, ...]
    machine: Machine
    notes: tuple[str, ...] = ()
    problem: str | None = None  # why it can't run whatever fits
    servers: Servers | None = None
    whole_first: bool = True  # each rank loads the whole of what trains before it is shared out

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
        """Of all ranks of a host together, at the worst moment, with weights on their way."""
        kept = 0.0 if self.servers is None else self.servers.kept
        ranks = self.machine.of_a_node * max(m.total.host for m in self.moments)
        return (ranks + kept) / GIB

    @property
    def usable_gib(self) -> float:
        """What a rank may fill of its device; without a GPU servers take theirs of the host."""
        usable = HEADROOM * self.machine.device_gib
        if self.servers is not None and not self.machine.cuda:
            usable -= self.servers.on_host / self.machine.of_a_node / GIB
        return usable

    @property
    def fits(self) -> bool:
        return self.obstacle is None

    @property
    def obstacle(self) -> str | None:
        """Why it doesn't fit; None where it does."""
        machine, worst = self.machine, self.peak()
        if self.problem is not None:
            return self.problem
        if self.device_gib > self.usable_gib:
            role = max(worst.roles, key=lambda name: worst.roles[name].device)
            where = (
                f"{self.device_gib:.1f} GiB in {worst.phase.value}, of which "
                f"{worst.roles[role].device / GIB:.1f} for the {role}"
            )
            if worst.phase is Phase.start and self.whole_first and machine.ranks > 1:
                where += "; each rank loads the whole model there"
            return where
        if machine.cuda and machine.host_gib is not None and self.host_gib > machine.host_gib:
            return f"{self.host_gib:.0f} GiB of host memory, and {machine.host_gib:.0f} are here"
        return None


def process(machine: Machine, engine: EngineKind, libraries_gib: float) -> Bytes:
    """What a rank takes before any model; `libraries_gib`: the trainer's or the generator's part
    without a GPU.
    """
    if machine.cuda:
        return Bytes(PROCESS_DEVICE_GIB * GIB, PROCESS_HOST_GIB * GIB)
    deepspeed = DEEPSPEED_GIB if engine is EngineKind.deepspeed else 0.0
    return Bytes((INTERPRETER_GIB + deepspeed + libraries_gib) * GIB)


def counts_of(
    shape: Shape,
    parameters: int,
    adapter: int,
    *,
    rounding: AdapterConfig | None = None,
    trained: Trained | None = None,
) -> Counts:
    """A module of `parameters`, of which `trained` train (None: all), or an adapter beside them.
    `rounding`: whose options say how its linear layers are held, and what is kept beside it.
    """
    if not adapter:
        count, largest = parameters, shape.largest
        if trained is not None:
            count, largest = trained.parameters, trained.largest
        return Counts(parameters, count, largest, shape.largest_layer, alike=True)
    counts = Counts(
        parameters + adapter, adapter, adapter // max(1, len(shape.linears)), shape.largest_layer
    )
    if rounding is not None and rounding.kind is AdapterKind.adalora:
        counts = replace(counts, weighed=adapter)
    if rounding is None or not rounding.is_quantized:
        return counts
    sizes = [one.inputs * one.outputs for one in shape.linears]
    held = [rounded_bytes(one.outputs, one.inputs, rounding) for one in shape.linears]
    return replace(
        counts, quantised=sum(sizes), quantised_bytes=sum(held), quantised_layer=max(sizes)
    )


def setting_of(cfg: Settings, machine: Machine, *, trl: bool) -> Setting:
    """How the modules of a run are held and trained; `trl`: by TRL's trainers."""
    engine, adapter = cfg.engine, cfg.adapter
    lora = adapter.kind is not AdapterKind.none
    half = machine.half(cfg.model.dtype)
    plain = engine.kind is EngineKind.torch
    return Setting(
        kind=engine.kind,
        zero=engine.zero_stage,
        offload=engine.offload,
        ranks=machine.ranks,
        half=half,
        cuda=machine.cuda,
        fused=(plain and not trl) or engine.adam is AdamKernels.deepspeed,
        float32_trained=half and plain and (lora or trl),
        parted=engine.zero_stage == 3 and not needs_whole(adapter),
        optimizer=cfg.stage.optimizer,
    )


def pass_of(
    setting: Setting,
    tokens: int,
    *,
    adapter: Beside | None,
    checkpointing: bool,
    trl: bool,
    masked: bool = False,
    length: int = 0,
    pack: int = 0,
    layers: int | None = None,
) -> Pass:
    """A forward pass of `tokens`, padding included, in rows of `length`, or in packs that have a
    mask of ours, the longest with a dense one of `pack` tokens; `adapter`: what trains beside
    frozen weights, None where these train; `layers`: blocks that a gradient passes through, None:
    all.
    """
    autocast = trl and setting.float32_trained and adapter is None
    return Pass(
        tokens=tokens,
        width=4 if autocast else setting.width,
        length=length,
        adapter=adapter,
        adapter_float32=setting.kind is EngineKind.torch,
        autocast=autocast,
        masked=masked,
        pack=pack,
        checkpointing=checkpointing,
        layers=layers,
    )
