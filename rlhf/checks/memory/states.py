"""What engines hold of a model: weights, gradients, float32 masters, Adam's moments, buffers; per
rank, by ZeRO stage and offload.

P parameters, T of them trained, N ranks, w bytes a weight (2 in half precision, 4 in float32). The
textbook figures of Rajbhandari et al. 2020 (arXiv:1910.02054, section 3.1 and figure 1) are in
`textbook`. Engines hold more than those at their peak: the float32 gradient of the step,
temporaries of AdamW, gradient buckets, and layers that ZeRO-3 has gathered: read in
policy/engines/torch.py and DeepSpeed 0.19's stage_1_and_2.py, stage3.py, unfused_optimizer.py.
"""

from dataclasses import dataclass, field

from conf.choices import EngineKind, Offload, Quantization
from conf.schedule import OptimizerKind
from conf.schema import AdapterConfig

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Bytes:
    """Memory of one rank: on its device, and on the host. Without a GPU the device is the host, and
    `device` counts there.
    """

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device + other.device, self.host + other.host)


NOTHING = Bytes()


def total(parts: dict[str, Bytes]) -> Bytes:
    """The sum of named parts."""
    return sum(parts.values(), NOTHING)


# elements of DeepSpeed's gradient bucket (zero_optimization.reduce_bucket_size), and of its
# all-reduce without ZeRO
BUCKET = 5e8
MAX_LIVE = 1e9  # parameters that ZeRO-3 keeps gathered (stage3_max_live_parameters)
SUB_GROUP = 1e9  # parameters that ZeRO-3 steps at once (sub_group_size)
# of the NVMe swapper (offload_optimizer.buffer_count, offload_param.buffer_count, buffer_size)
_SWAP_BUFFERS, _PARAM_BUFFERS, _PARAM_BUFFER = 4, 5, 1e8


@dataclass(frozen=True, slots=True)
class Counts:
    """A module's parameters."""

    total: int
    trained: int
    largest: int  # elements of the largest tensor that trains
    largest_layer: int  # parameters of the largest module by itself, frozen or not
    quantised: int = 0  # frozen parameters that are held rounded
    quantised_bytes: float = 0.0  # what holds them
    # elements of the largest such layer, which a pass has in full precision for a moment
    quantised_layer: int = 0
    alike: bool = False  # frozen weights are in the dtype of those that train (no adapter)
    weighed: int = 0  # parameters whose importance is averaged (AdaLoRA)

    def weights(self, width: float, trained_width: float | None = None) -> float:
        """Bytes of all weights, `width` a weight; those that train at `trained_width`."""
        if self.alike and trained_width is not None:
            width = trained_width
        frozen = width * (self.total - self.trained - self.quantised) + self.quantised_bytes
        return frozen + (width if trained_width is None else trained_width) * self.trained


@dataclass(frozen=True, slots=True)
class Setting:
    """How a module is held and trained."""

    kind: EngineKind = EngineKind.torch
    zero: int = 0
    offload: Offload = Offload.none
    ranks: int = 1
    half: bool = False  # weights in bfloat16 or float16
    cuda: bool = False
    # AdamW steps without temporaries: torch's fused one (policy/engines/torch.py) and those of
    # engine.adam=deepspeed; other runs by DeepSpeed or TRL are taken to have torch's plain one
    fused: bool = True
    # what trains is float32 beside half-precision weights: PEFT's adapters, and TRL's full training
    # by autocast
    float32_trained: bool = False
    # ZeRO-3: the module is parted while it is read (policy/engines/parts.py)
    parted: bool = False
    optimizer: OptimizerKind = OptimizerKind.adamw

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.half else 4

    @property
    def sum_width(self) -> int:
        """Bytes of an element in the sum of micro-batches' gradients
        (policy/engines/loading.py: gradient_sums).
        """
        return 4 if self.zero >= 2 else self.width


@dataclass(slots=True)
class States:
    """Named parts. `backward` and `step` come beside `resident` in their time; `start` in place of
    it while the engine is made.
    """

    resident: dict[str, Bytes] = field(default_factory=dict)
    backward: dict[str, Bytes] = field(default_factory=dict)
    gathered: Bytes = NOTHING  # in any pass, with a gradient or without
    step: dict[str, Bytes] = field(default_factory=dict)
    start: Bytes = NOTHING


def textbook(parameters: float, zero: int, ranks: int) -> float:
    """Bytes per rank of model states under Adam in mixed precision: 16P; 4P + 12P/N; 2P + 14P/N;
    16P/N for ZeRO 0 to 3.

    2 bytes weights + 2 gradients + 12 (float32 weights, momentum, variance), of which ZeRO-1 shares
    out the 12, ZeRO-2 the gradients too, ZeRO-3 all.
    """
    shared = {0: 0, 1: 12, 2: 14, 3: 16}[zero]
    return (16 - shared) * parameters + shared * parameters / ranks


def rounded_bytes(outputs: int, inputs: int, adapter: AdapterConfig) -> float:
    """Bytes of a layer that is held rounded (adapter.quantize), scales included: int8, a byte a
    weight and a scale an output; nf4, half a byte and a scale for 64 weights, in 4 bytes or, doubly
    quantised, in one with a scale for 256 of these (Dettmers et al. 2023, arXiv:2305.14314, section
    3), their 256 values and their mean.
    """
    count = outputs * inputs
    if adapter.quantize is Quantization.int8:
        return count + 4.0 * outputs
    blocks = -(-count // 64)
    if not adapter.double_quantize:
        return 36.0 * blocks
    return 33.0 * blocks + 4.0 * -(-blocks // 256) + 4.0 * 257


def training_states(counts: Counts, setting: Setting) -> States:
    """States of a module that trains."""
    if setting.kind is EngineKind.torch:
        states = _torch(counts, setting)
    elif setting.zero == 0:
        states = _replicated(counts, setting)
    else:
        states = _zero3(counts, setting) if setting.zero == 3 else _zero12(counts, setting)
    states.gathered += Bytes(setting.width * counts.quantised_layer)
    if counts.weighed:
        # in float32 and whole on every rank (policy/adapters/budget.py): two averages, and until
        # they are counted the gradients of the step under way
        states.resident["importance"] = Bytes(8 * counts.weighed)
        states.backward["gradients of the importance"] = Bytes(4 * counts.weighed)
        states.step["gradients of the importance"] = Bytes(4 * counts.weighed)
    return states


def frozen_states(parameters: float, setting: Setting, largest_layer: float) -> States:
    """States of a module that only runs forward: whole on every rank, or its part under ZeRO-3
    (policy/engines/deepspeed.py: freeze).
    """
    whole = setting.width * parameters
    start = Bytes(whole, whole if setting.cuda else 0.0)
    start = _parting(parameters, largest_layer, setting) if setting.parted else start
    if setting.kind is EngineKind.torch or setting.zero < 3:
        return States(resident={"weights": Bytes(whole)}, start=start)
    part = whole / setting.ranks
    held = Bytes(part)
    if setting.offload is not Offload.none:
        held = Bytes(host=part if setting.offload is Offload.cpu else 0.0)
    resident = {"weights": held}
    return States(
        resident=resident, gathered=_gathered(parameters, largest_layer, setting), start=start
    )


def temporaries(
    elements: float, largest: float, setting: Setting, *, on_host: bool = False
) -> float:
    """Bytes of AdamW's temporaries, `elements` being stepped at once: none by fused kernels; by
    torch's foreach form, the default on a GPU, the square roots of all second moments; by its plain
    loop on a CPU two tensors of the size of the largest (exp_avg_sq.sqrt() / correction). Adafactor
    has three of these.
    """
    if setting.optimizer is OptimizerKind.adafactor:
        return 12.0 * largest
    if setting.fused:
        return 0.0
    return 4.0 * elements if setting.cuda and not on_host else 8.0 * largest


def _loading(counts: Counts, setting: Setting) -> Bytes:
    """Every rank loads the whole model on the host, rounds there what is held rounded, and moves it
    to its device before anything is shared out; or the model is parted while it is read.
    """
    if setting.parted:
        return _parting(counts.total, counts.largest_layer, setting)
    width = setting.width
    held = counts.weights(width, 4 if setting.float32_trained else width)
    loaded = held + width * counts.quantised
    return Bytes(held, loaded) if setting.cuda else Bytes(loaded)


def _parting(parameters: float, largest_layer: float, s: Setting) -> Bytes:
    """A rank's part of a model, a tensor on its way, and tied embeddings, whole until the end."""
    part, whole = s.width * parameters / s.ranks, 2.0 * s.width * largest_layer
    if not s.cuda:
        return Bytes(part + whole)
    if s.offload is Offload.none:
        return Bytes(part + whole, whole)
    return Bytes(whole, whole + (part if s.offload is Offload.cpu else 0.0))


def _torch(counts: Counts, s: Setting) -> States:
    """policy/engines/torch.py: TorchEngine, and TRL without DeepSpeed."""
    trained_width = 4 if s.float32_trained else s.width
    weights = counts.weights(s.width, trained_width)
    masters = 4 * counts.trained if trained_width == 2 else 0
    # in float32, whatever the weights are; a tensor's gradient of the next micro-batch exists
    # before it is added
    gradients = 4 * counts.trained
    backward = {"gradients": Bytes(gradients + trained_width * counts.largest)}
    step = {"gradients": Bytes(gradients)}
    step["AdamW's temporaries"] = Bytes(temporaries(counts.trained, counts.largest, s))
    resident = {
        "weights": Bytes(weights),
        "masters": Bytes(masters),
        "Adam": Bytes(s.optimizer.state_bytes(counts.trained, counts.largest)),
    }
    return States(
        resident=resident,
        backward=backward,
        step=step,
        start=_loading(counts, s),
    )


def _replicated(counts: Counts, s: Setting) -> States:
    """engine=zero0: plain data parallelism. In bfloat16 DeepSpeed converts all weights, an
    adapter's too, and keeps float32 copies of what trains.
    """
    w = s.width
    weights = counts.weights(w)
    resident = {
        "weights": Bytes(weights),
        "masters": Bytes(4 * counts.trained if s.half else 0),
        "Adam": Bytes(8 * counts.trained),
    }
    backward = {"gradients": Bytes(w * (counts.trained + counts.largest))}
    # After the last backward pass gradients are flattened, reduced and copied back, on one rank as
    # well (runtime/engine.py: allreduce_bucket).
    reducing = w * (counts.trained + min(counts.trained, BUCKET))
    # the half-precision ones stay until the step is done
    gradients = (6 if s.half else 4) * counts.trained
    stepping = gradients + temporaries(counts.trained, counts.largest, s)
    step = {
        "gradients": Bytes(gradients),
        "gradient bucket, AdamW's temporaries": Bytes(max(reducing, stepping) - gradients),
    }
    return States(
        resident=resident,
        backward=backward,
        step=step,
        start=_loading(counts, s),
    )


def _zero12(counts: Counts, s: Setting) -> States:
    """ZeRO-1 shares out masters and moments, ZeRO-2 gradients as well; the masters are a copy in
    float32 training, too.
    """
    w, part = s.width, counts.trained / s.ranks
    filled = w * min(counts.trained, BUCKET)
    # On a CPU pages that are never written cost nothing, and under ZeRO-1, which fills the bucket
    # after the pass, a gradient goes as it is copied in.
    bucket = w * BUCKET if s.cuda else filled if s.zero == 2 else 0.0
    # the bucket's slices for each rank are flattened into a copy before they are reduced
    # (stage_1_and_2.py: allreduce_bucket)
    if s.ranks > 1:
        bucket += filled
    weights = Bytes(counts.weights(w))
    if s.offload is Offload.none:
        resident = {"weights": weights, "masters": Bytes(4 * part), "Adam": Bytes(8 * part)}
        summed = s.sum_width * (counts.trained if s.zero == 1 else part)
        gradients = Bytes(summed + w * counts.largest)
        backward = {"gradients": gradients, "gradient bucket": Bytes(bucket)}
        # own gradients, their flat copy, and its float32 form; in the optimizer's step only the
        # last is left
        flattening = s.sum_width * part + (w + 4 if s.half else 4) * part
        stepping = 4 * part + temporaries(part, part, s)
        step = {
            "gradients": Bytes(4 * part),
            "flattening, AdamW's temporaries": Bytes(max(flattening, stepping) - 4 * part),
        }
        return States(
            resident=resident,
            backward=backward,
            step=step,
            start=_loading(counts, s),
        )
    resident = {
        "weights": weights,
        "masters": Bytes(host=4 * part),
        "Adam": Bytes(host=8 * part),
        "weights to send": Bytes(host=w * part),
    }
    # Where a step has several micro-batches, the gradients of those before the last wait on the
    # host, and never leave it again.
    resident["gradients of micro-batches"] = Bytes(host=s.sum_width * (part + counts.largest))
    backward = {
        "gradients": Bytes(w * 2 * counts.largest, 4 * part),
        "gradient bucket": Bytes(bucket),
    }
    step = {
        "gradients": Bytes(host=4 * part),
        "AdamW's temporaries": Bytes(host=temporaries(part, part, s, on_host=True)),
    }
    return States(
        resident=_on_host(resident, s),
        backward=_on_host(backward, s),
        step=_on_host(step, s),
        start=_loading(counts, s),
    )


def _zero3(counts: Counts, s: Setting) -> States:
    """ZeRO-3: all is shared out; the gradient buffer and the bucket stay from the start."""
    w, part = s.width, counts.trained / s.ranks
    whole_part = (counts.total - counts.quantised) / s.ranks
    group = min(part, SUB_GROUP)
    bucket = w * (BUCKET if s.cuda else min(counts.trained, BUCKET))
    gathered = _gathered(counts.total - counts.quantised, counts.largest_layer, s)
    start = _loading(counts, s)
    passing = {"gradients in passing": Bytes(w * counts.largest)}
    if s.offload is Offload.none:
        resident = {
            "weights": Bytes(w * whole_part),
            "gradients": Bytes(s.sum_width * part),
            "masters": Bytes(4 * part),
            "Adam": Bytes(8 * part),
        }
        step = {
            "float32 gradients": Bytes((4 + (w if s.half else 0)) * group),
            "AdamW's temporaries": Bytes(temporaries(group, group, s)),
        }
    elif s.offload is Offload.cpu:
        resident = {
            "weights": Bytes(host=w * whole_part),
            "gradients": Bytes(host=s.sum_width * part),
            "masters": Bytes(host=4 * part),
        }
        resident |= {"Adam": Bytes(host=8 * part)}
        step = {
            "float32 gradients": Bytes(host=4 * part),
            "AdamW's temporaries": Bytes(host=temporaries(group, group, s, on_host=True)),
        }
    else:
        swap = _SWAP_BUFFERS * 4 * group + _PARAM_BUFFERS * w * _PARAM_BUFFER
        resident = {"gradients": Bytes(host=s.sum_width * part), "swap buffers": Bytes(host=swap)}
        step = {
            "float32 gradients": Bytes(host=4 * group),
            "AdamW's temporaries": Bytes(host=temporaries(group, group, s, on_host=True)),
        }
    resident["gradient bucket"] = Bytes(bucket)
    if counts.quantised:
        resident["rounded weights"] = Bytes(counts.quantised_bytes)  # whole on every rank
    # Every bucket's gradients are copied in the order of the ranks before they are reduced, on one
    # rank as well, and the last bucket before the weights that the pass has gathered are let go.
    passing["bucket's copy"] = Bytes(w * min(counts.trained, BUCKET))
    return States(
        resident=_on_host(resident, s),
        backward=passing,
        gathered=gathered,
        step=_on_host(step, s),
        start=start,
    )


def _gathered(parameters: float, largest_layer: float, s: Setting) -> Bytes:
    """Weights that ZeRO-3 has gathered: of a layer in use and those used again soon."""
    return Bytes(s.width * min(parameters, MAX_LIVE + largest_layer))


def _on_host(parts: dict[str, Bytes], s: Setting) -> dict[str, Bytes]:
    """Without a GPU the host is the device."""
    if s.cuda:
        return parts
    return {name: Bytes(part.device + part.host) for name, part in parts.items()}


def peak(states: States) -> Bytes:
    """The most that a module takes while it trains, activations left out."""
    held = total(states.resident)
    moments = [held + total(states.backward) + states.gathered, held + total(states.step)]
    return Bytes(max(m.device for m in moments), max(m.host for m in moments))
