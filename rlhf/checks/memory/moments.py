"""The parts of a memory plan: the machine, the moments of a step and what each role holds at them.

A moment is a point of a step at which memory may peak; its phase is the one that users see in
time/<phase>_s.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

from conf.choices import Dtype, EngineKind, RolloutBackend
from conf.online import OnlineStage
from conf.schema import (
    AdapterConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
)
from rlhf.checks.memory.activations import (
    VLLM_OVERHEAD_GIB,
    Beside,
    Pass,
    cache_of,
    transformers_bytes,
)
from rlhf.checks.memory.shapes import Shape, Trained
from rlhf.checks.memory.states import GIB, Bytes, Counts, Setting, rounded_bytes, total
from rlhf.process import distributed

ASSUMED_GIB = 80.0  # a device of an A100 or H100
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
    reward: RewardConfig
    data: DataConfig


@dataclass(frozen=True, slots=True)
class Machine:
    """`device_gib`: of one rank's device; without a GPU its share of the host's memory."""

    ranks: int
    cuda: bool
    device_gib: float
    # of the host that holds all ranks; None: not known, since the devices are not here
    host_gib: float | None
    notes: tuple[str, ...] = ()  # what was assumed

    def half(self, dtype: Dtype) -> bool:
        """Whether weights are in half precision: ``auto`` is bfloat16 on a GPU
        (rlhf.models.loading.resolve_dtype).
        """
        return self.cuda if dtype is Dtype.auto else dtype is not Dtype.float32


def machine_of(engine: EngineConfig, params: float | None, *, all_devices: bool) -> Machine:
    """The devices that the engine's options ask for, else those that are here (`all_devices`: one
    rank on each, not just those launched). A model of assumed size (`params`) runs on assumed
    devices.
    """
    import psutil
    import torch

    launched = distributed.world_size()
    memory = psutil.virtual_memory().total / GIB
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        own = min(torch.cuda.get_device_properties(i).total_memory for i in range(here)) / GIB
        ranks = engine.gpus or (max(launched, here) if all_devices else launched)
        return Machine(ranks, True, engine.gpu_memory_gib or own, memory if ranks <= here else None)
    asked = engine.gpus is not None or engine.gpu_memory_gib is not None or params is not None
    if not asked:
        return Machine(launched, False, memory / launched, memory)
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
    return Machine(
        engine.gpus or launched, True, engine.gpu_memory_gib or ASSUMED_GIB, None, tuple(notes)
    )


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
    `rounding`: whose options say how its linear layers are held.
    """
    if not adapter:
        count, largest = parameters, shape.largest
        if trained is not None:
            count, largest = trained.parameters, trained.largest
        return Counts(parameters, count, largest, shape.largest_layer, alike=True)
    counts = Counts(
        parameters + adapter, adapter, adapter // max(1, len(shape.linears)), shape.largest_layer
    )
    if rounding is None or not rounding.is_quantized:
        return counts
    sizes = [one.inputs * one.outputs for one in shape.linears]
    held = [rounded_bytes(one.outputs, one.inputs, rounding) for one in shape.linears]
    return replace(
        counts, quantised=sum(sizes), quantised_bytes=sum(held), quantised_layer=max(sizes)
    )


def setting_of(
    engine: EngineConfig, machine: Machine, dtype: Dtype, *, lora: bool, trl: bool
) -> Setting:
    """How the modules of a run are held and trained; `trl`: by TRL's trainers."""
    half = machine.half(dtype)
    plain = engine.kind is EngineKind.torch
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


# ---- the generator ----


@dataclass(frozen=True, slots=True)
class GeneratorMemory:
    """What the generator holds on a rank, idle and while it generates."""

    idle: Bytes
    busy: Bytes
    notes: tuple[str, ...] = ()
    problem: str | None = None


def sequences_at_once(stage: OnlineStage, max_num_seqs: int, ranks: int) -> int:
    """Responses that a rank generates at the same time, in the largest step."""
    share = stage.step_sizes()[-1] * stage.samples_per_prompt // ranks
    return max(1, min(max_num_seqs, share))


def generator_memory(
    rollout: RolloutConfig,
    shape: Shape,
    machine: Machine,
    *,
    half: bool,
    adapter: int,
    prompt: int,
    sequences: int,
) -> GeneratorMemory:
    """vLLM's share of the device, whole on every rank; on a CPU its weights and cache; or
    transformers' copy of the model. `adapter` parameters go beside it; `sequences` are generated at
    once, of at most `prompt` tokens and a response.
    """
    width, response = 2 if half else 4, rollout.max_response_length
    if rollout.backend is RolloutBackend.hf:
        busy = transformers_bytes(shape, width, sequences, prompt, response, adapter)
        idle = Bytes(float(width * shape.parameters + 4 * adapter))
        return GeneratorMemory(idle, Bytes(busy))
    weights = float(width * shape.parameters)
    if not machine.cuda:
        held = Bytes(weights + rollout.kv_cache_gib * GIB)
        left = rollout.kv_cache_gib * GIB
        option = f"rollout.kv_cache_gib={rollout.kv_cache_gib:g}"
    else:
        share = rollout.gpu_memory_utilization * machine.device_gib * GIB
        held = Bytes(share)
        left = share - weights - VLLM_OVERHEAD_GIB * GIB
        option = f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
    cache = cache_of(left, shape, width, prompt + response)
    if cache.sequences < 1:
        needed = (
            f"vLLM's weights of {weights / GIB:.1f} GiB and one sequence of "
            f"{prompt + response} tokens"
        )
        return GeneratorMemory(held, held, problem=f"{option} doesn't hold {needed}")
    few = ""
    if cache.sequences < sequences:
        few = f"; of the {sequences} of a step the others wait"
    note = (
        f"{option}: a cache of {cache.tokens} tokens, {cache.sequences} sequences of full "
        f"length at once{few}"
    )
    return GeneratorMemory(held, held, (note,))
