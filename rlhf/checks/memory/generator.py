"""What writes the responses, on a rank's own device or on those of servers, and what it takes to
send weights there.
"""

from dataclasses import dataclass, replace

from conf.choices import Carrier, EngineKind, RolloutBackend
from conf.model import Transfer
from conf.online import OnlineStage
from conf.reward import EnvironmentKind
from conf.schema import AdapterConfig, RolloutConfig, carrier_of
from rlhf.checks.launch import runs_vllm
from rlhf.checks.memory.activations import (
    VLLM_OVERHEAD_GIB,
    cache_of,
    least_share,
    transformers_bytes,
)
from rlhf.checks.memory.moments import Machine, Servers
from rlhf.checks.memory.shapes import Shape
from rlhf.checks.memory.states import GIB, NOTHING, Bytes, Setting, total
from rlhf.types import UserError

# The processes of a vLLM server on a CPU beside weights and cache: one that answers requests, and
# one for each device. Of a whole run, both together: tests/checks/test_memory_servers_measured.py.
SERVER_GIB, WORKER_GIB = 0.8, 0.8
# Games in processes of their own (rlhf/environments/apart.py): the one that they are forked from,
# and each. Proportional set sizes of 1, 16 and 64 episodes: 0.012 GiB an episode of reasoning-gym
# and gymnasium, 0.009 of textarena, and 0.04 to 0.16 beside them.
GAMES_GIB, GAME_GIB = 0.16, 0.0125
_GAMES = (
    EnvironmentKind.reasoning_gym,
    EnvironmentKind.textarena,
    EnvironmentKind.gymnasium,
)
BUCKET = 64.0 * 2**20  # bytes of weights that are sent at once (rollout/server/stream.py)


@dataclass(frozen=True, slots=True)
class GeneratorMemory:
    """What the generator holds of a rank's device, and what servers hold of theirs."""

    idle: Bytes  # while the trainer works
    busy: Bytes  # while it writes
    taking: Bytes  # while weights come to it
    notes: tuple[str, ...] = ()
    problem: str | None = None
    servers: Servers | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the generator."""

    half: bool  # weights in half precision
    prompt: int  # tokens of the longest prompt
    response: int  # and of the longest response
    responses: int  # of a step, all ranks together
    at_once: int  # the most that one copy of the model writes at the same time
    whole: bool  # whether syncs send whole weights, not an adapter

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.half else 4

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.response

    def of_a_copy(self, copies: int) -> int:
        """Sequences that each of `copies` of the model writes at the same time."""
        return max(1, min(self.at_once, -(-self.responses // copies)))


def asked_of(
    stage: OnlineStage,
    rollout: RolloutConfig,
    adapter: AdapterConfig,
    prompt: int,
    response: int,
    *,
    half: bool,
) -> Asked:
    """What the largest step of a stage asks for; `prompt`, `response`: most tokens of them."""
    return Asked(
        half=half,
        prompt=prompt,
        response=response,
        responses=stage.step_sizes()[-1] * stage.samples_per_prompt,
        at_once=rollout.max_num_seqs,
        whole=carrier_of(rollout, adapter) is Carrier.merged,
    )


def games_memory(kind: EnvironmentKind, asked: Asked, machine: Machine) -> dict[str, Bytes]:
    """The host's memory that a rank's games take while all episodes of a step are played side by
    side, under the name of their role; empty where an environment starts no processes of its own.
    """
    if kind not in _GAMES:
        return {}
    episodes = -(-asked.responses // machine.ranks)
    taken = (GAMES_GIB + GAME_GIB * episodes) * GIB
    return {"games": Bytes(host=taken) if machine.cuda else Bytes(taken)}


def generator_memory(
    rollout: RolloutConfig,
    shape: Shape,
    machine: Machine,
    asked: Asked,
    adapter: int,
    *,
    apart: bool = False,
) -> GeneratorMemory:
    """vLLM's share of the device, whole on every rank, or servers'; on a CPU its weights and cache;
    or transformers' copy of the model. `adapter` parameters go beside it. `apart`: servers have
    nodes of their own.
    """
    if rollout.backend is RolloutBackend.hf:
        idle = Bytes(float(asked.width * shape.parameters + 4 * adapter))
        sequences = asked.of_a_copy(machine.ranks)
        sizes = (sequences, asked.prompt, asked.response, adapter)
        busy = Bytes(transformers_bytes(shape, asked.width, *sizes))
        return GeneratorMemory(idle, busy, idle)
    if rollout.backend is RolloutBackend.server:
        return _by_servers(rollout, shape, machine, asked, apart=apart)
    held = _held(rollout, shape, machine, asked, machine.ranks)
    whole = total(held.parts)
    if not (rollout.sleep and machine.cuda):
        return GeneratorMemory(whole, whole, whole, held.notes, held.problem)
    # CUDA's graphs and workspaces stay where they are; assumed, not measured here
    own = held.parts["vLLM's own"]
    weights = held.parts["weights"]
    asleep = own + Bytes(host=weights.device)
    return GeneratorMemory(asleep, whole, own + weights, held.notes, held.problem)


@dataclass(frozen=True, slots=True)
class _Held:
    """Of one device by one vLLM engine, or by its part there."""

    parts: dict[str, Bytes]
    notes: tuple[str, ...] = ()
    problem: str | None = None


def _held(
    rollout: RolloutConfig, shape: Shape, machine: Machine, asked: Asked, copies: int
) -> _Held:
    """Weights, cache and what vLLM takes beside them. `shape`: what one device holds of each of
    `copies` of the model.
    """
    weights = float(asked.width * shape.parameters)
    if machine.cuda:
        own = VLLM_OVERHEAD_GIB * GIB
        cache = rollout.gpu_memory_utilization * machine.device_gib * GIB - weights - own
        option = f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
    else:
        own, cache = 0.0, rollout.kv_cache_gib * GIB
        option = f"rollout.kv_cache_gib={rollout.kv_cache_gib:g}"
    parts = {"weights": Bytes(weights), "vLLM's own": Bytes(own), "cache": Bytes(cache)}
    found = cache_of(cache, shape, asked.width, asked.longest)
    if found.sequences < 1:
        needed = (
            f"vLLM's weights of {weights / GIB:.1f} GiB and one sequence of {asked.longest} tokens"
        )
        return _Held(parts, problem=f"{option} doesn't hold {needed}")
    sequences, few = asked.of_a_copy(copies), ""
    if found.sequences < sequences:
        few = f"; of the {sequences} of a step the others wait"
    note = (
        f"{option}: a cache of {found.tokens} tokens, {found.sequences} sequences of full "
        f"length at once{few}"
    )
    return _Held(parts, (note,))


# ---- servers ----


def _by_servers(
    rollout: RolloutConfig, shape: Shape, machine: Machine, asked: Asked, *, apart: bool
) -> GeneratorMemory:
    """vLLM in processes of its own, on devices of their own or on the trainer's."""
    if rollout.servers:
        note = "the servers of rollout.servers hold what their own configuration says"
        return GeneratorMemory(NOTHING, NOTHING, NOTHING, (note,))
    server = rollout.server
    devices, copies = server.tensor_parallel, server.data_parallel * server.count
    name = f"rollout.server.tensor_parallel={devices}"
    if shape.heads % devices:
        problem = f"{name} doesn't divide the model's {shape.heads} heads"
        return GeneratorMemory(NOTHING, NOTHING, NOTHING, problem=problem)
    held = _held(rollout, part_of(shape, devices), machine, asked, copies)
    kept, bucket = _in_passing(rollout, shape, machine, asked)
    if machine.cuda and not apart and shares_devices(rollout, machine):
        whole = total(held.parts) + bucket
        servers = Servers(server.count, devices * server.data_parallel, {}, kept=kept)
        return GeneratorMemory(whole, whole, whole, held.notes, held.problem, servers)
    parts, answering = dict(held.parts), 0.0
    if not machine.cuda:
        parts["process"] = Bytes(WORKER_GIB * GIB)
        answering = SERVER_GIB * GIB
    size = devices * server.data_parallel
    servers = Servers(server.count, size, parts, answering, kept, apart)
    note = (
        f"servers: {servers.count} x {servers.devices}, "
        f"{total(parts).device / GIB:.1f} GiB of each device"
    )
    notes = (note, *held.notes)
    return GeneratorMemory(bucket, bucket, bucket, notes, held.problem, servers)


def _in_passing(
    rollout: RolloutConfig, shape: Shape, machine: Machine, asked: Asked
) -> tuple[float, Bytes]:
    """What whole weights on their way to servers take: bytes that stay in memory for servers that
    are restarted (a file; the sender's copy), and a rank's bucket.
    """
    if not asked.whole:
        return 0.0, NOTHING
    transfer = rollout.server.transfer
    if transfer is Transfer.auto:
        transfer = Transfer.nccl if machine.cuda else Transfer.file
    whole = float(asked.width * shape.parameters)
    if transfer is Transfer.file:
        return whole, NOTHING
    if transfer is Transfer.gloo:
        return whole, Bytes(host=BUCKET) if machine.cuda else Bytes(BUCKET)
    return 0.0, Bytes(BUCKET)


def part_of(shape: Shape, devices: int) -> Shape:
    """What each of `devices` holds of a copy of the model. Where keys have fewer heads than there
    are devices, each has a whole one.
    """
    keys = max(1, shape.kv_heads // devices)
    return replace(shape, parameters=-(-shape.parameters // devices), kv_heads=keys)


def shares_devices(rollout: RolloutConfig, machine: Machine) -> bool:
    """Whether servers that the run starts are on devices that its ranks train on: where
    rollout.server.devices names none, each takes the first that it sees.
    """
    named = rollout.server.devices
    if named is None:
        return True
    used = {device.strip() for each in named for device in each.split(",")}
    return any(str(rank) in used for rank in range(machine.of_a_node))


def share_of(shape: Shape, machine: Machine, asked: Asked, copies: int) -> float:
    """The least rollout.gpu_memory_utilization that holds a fourth of what a copy writes in a step:
    that keeps vLLM busy, the others wait for their turn. Above 1: no share does.
    """
    sequences = max(1, asked.of_a_copy(copies) // 4)
    least = least_share(shape, asked.width, asked.longest, sequences, machine.device_gib)
    return round(least, 2)


# ---- sending weights ----


def sending(
    rollout: RolloutConfig, adapter: AdapterConfig, shape: Shape, setting: Setting, added: int
) -> Bytes:
    """What a rank takes beside its states while weights go to the generator
    (policy/saving.py: iterate_weights). ZeRO-3 gathers and copies a layer; of a merged one the
    original and the merged copy exist beside it. `added`: parameters of the adapter.
    """
    merged = bool(added) and carrier_of(rollout, adapter) is Carrier.merged
    if added and not merged:
        return Bytes(4.0 * added)
    largest = max(one.inputs * one.outputs for one in shape.linears)
    copies = 2.0 * largest if merged else 0.0
    gathered = 0.0
    if setting.kind is EngineKind.deepspeed and setting.zero == 3:
        gathered = 2.0 * shape.largest_layer
    return Bytes(setting.width * (copies + gathered))


# ---- before a run ----


def check_sleep(rollout: RolloutConfig, *, ahead: int, cuda: bool) -> None:
    """Raises UserError for rollout.sleep without vLLM on a GPU, and where it writes while the
    policy updates (`ahead`: of the stage).
    """
    if not rollout.sleep:
        return
    if ahead:
        raise UserError(
            f"rollout.sleep=true with stage.ahead={ahead}: an engine that writes while the policy "
            "updates doesn't sleep. Set rollout.sleep=false, or stage.ahead=0."
        )
    if cuda and runs_vllm(rollout.backend):
        return
    what = "vLLM's engine on a CPU doesn't sleep"
    if cuda:
        what = "Hugging Face generate doesn't sleep"
    raise UserError(f"rollout.sleep=true: {what}. Set rollout.sleep=false.")
