"""A model's shape and its parameter counts: exact from a configuration, without weights, or of a
Llama of a given size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.choices import ModelKind
from conf.schedule import TrainPart
from conf.schema import AdapterConfig, ModelConfig
from rlhf.models.directories import check_model_path
from rlhf.models.loading import tiny_config
from rlhf.models.naming import HEAD, SCORE
from rlhf.models.parts import Outline, Weight, added_by, chosen, outline
from rlhf.types import UserError

# Llama 2 and 3: heads of 128, 8 of them for keys, and 128 columns a layer
_HEAD_SIZE, _MAX_KV_HEADS, _WIDTH_PER_LAYER = 128, 8, 128
# vocabulary and tied embeddings of an assumed model from 3e9 parameters on, as Llama 3
_LARGE = (128_256, False)
_SMALL = (49_152, True)  # below, as SmolLM2


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer by the last part of its module's name."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Shape:
    """All that a memory plan needs of a causal language model."""

    name: str  # what it is, for messages
    parameters: int  # tied tensors counted once
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    linears: tuple[Linear, ...]  # every linear layer but the head
    largest: int  # elements of the largest tensor
    # parameters that one module holds by itself, the most: what ZeRO-3 gathers at once
    largest_layer: int
    eager: bool = False  # attention keeps its scores (attn_implementation=eager)
    parts: Outline | None = None  # None where its blocks are not found
    model: Any = field(default=None, compare=False, repr=False)  # on the meta device

    @property
    def head(self) -> int:
        """Parameters that the language-model head has for itself."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def classifier(self) -> int:
        """Parameters of the same backbone with a scalar head: a reward model, or a critic."""
        return self.parameters - self.head + self.hidden

    @property
    def adapted(self) -> int:
        """Width of the inputs of all linear layers of one block."""
        return sum(linear.inputs for linear in self.linears) // self.layers

    def frozen_by(self, adapter: AdapterConfig) -> int:
        """Parameters of the adapter that never train."""
        return added_by(self.model, adapter)[1]


def adapter_parameters(shape: Shape, adapter: AdapterConfig) -> int:
    """Parameters that train beside a frozen model, by the formula of the adapter's method; 0
    without an adapter. Raises UserError for an adapter that the model has no place for.
    """
    return added_by(shape.model, adapter)[0]


@dataclass(frozen=True, slots=True)
class Trained:
    """What trains of a model without added modules."""

    parameters: int
    largest: int  # elements of the largest tensor
    layers: int  # blocks that a gradient passes through
    head: bool  # whether the head is among it


def trained_parts(shape: Shape, train: TrainPart, *, classifier: bool) -> Trained:
    """What `stage.train` leaves trainable; `classifier`: with a scalar head in the head's place.
    Raises UserError for what the model has not.
    """
    if train.everything or shape.parts is None:
        whole = shape.classifier if classifier else shape.parameters
        return Trained(whole, shape.largest, shape.layers, head=True)
    parts = shape.parts
    if classifier:
        kept = [weight for weight in parts.weights if set(weight.kinds) != {HEAD}]
        score = Weight(("score.weight",), (SCORE,), (None,), ("",), shape.hidden, below=False)
        parts = replace(parts, weights=(*kept, score))
    weights = chosen(parts, train)
    return Trained(
        sum(weight.size for weight in weights),
        max(weight.size for weight in weights),
        max(parts.passed(weight) for weight in weights),
        head=any(HEAD in weight.kinds for weight in weights),
    )


def read_shape(model: ModelConfig, path: str | None = None, key: str = "model.path") -> Shape:
    """The shape of `path` or ``model.path``, of ``model=tiny``, or of an assumed model of
    ``model.params``. No weights are read.

    Raises UserError where none of them is given and for a directory whose configuration can't be
    read.
    """
    place = path or model.path
    if place is None and model.kind is ModelKind.tiny and model.params is None:
        return shape_of_config(
            tiny_config(model.tiny), "model=tiny", eager=model.attn_implementation == "eager"
        )
    if place is None and model.params is not None:
        return assumed_shape(model.params, eager=model.attn_implementation == "eager")
    if place is None:
        raise UserError(
            "model.path is not set: a memory plan needs a model's directory, or "
            "model.params=<parameters>, such as model.params=7e9."
        )
    eager = model.attn_implementation == "eager"
    return shape_of_config(
        _read_config(model, place, key),
        f"{key}={place}",
        eager=eager,
        trust_remote_code=model.trust_remote_code,
    )


def _read_config(model: ModelConfig, path: str, key: str) -> Any:
    from transformers import AutoConfig

    held = check_model_path(path, key)
    extra = {}
    if model.gguf_file is not None and path == model.path:
        extra = {"gguf_file": model.gguf_file}
    elif held.is_local and not held.has_config:
        # check_model_path leaves nothing else
        name = min(file.name for file in Path(held.weights).glob("*.gguf"))
        raise UserError(
            f"{key}={path}: holds no config.json, but {name}. Set model.gguf_file={name}."
        )
    try:
        return AutoConfig.from_pretrained(
            held.weights, trust_remote_code=model.trust_remote_code, **extra
        )
    except Exception as error:  # as in rlhf.models.loading.readable
        first = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"{key}={path}: its configuration can't be read ({first}). Give a model's directory, "
            "or model.params=<parameters>."
        ) from error


def llama(
    *,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool,
) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )


def assumed_shape(parameters: float, *, eager: bool = False) -> Shape:
    """A Llama of so many parameters: 128 columns a layer, heads of 128, at most 8 of them for keys
    and values, three and a half times as wide inside.

    With 8.03e9 parameters these are Llama 3 8B's own figures. The number of layers is the even one
    that comes nearest, from 3e9 on of those that 8 devices can share the heads of; the inner width
    is then set so that the count is the one asked for. Wanted exactly: model.path.
    """
    large = parameters >= 3e9
    vocab, tied = _LARGE if large else _SMALL
    embeddings = 1 if tied else 2

    def outside_mlp(layers: int) -> tuple[int, int, int]:
        """(hidden, key-value heads, parameters without the three matrices of the feed-forward
        layers)
        """
        hidden = _WIDTH_PER_LAYER * layers
        heads = hidden // _HEAD_SIZE
        kv = max(n for n in range(1, _MAX_KV_HEADS + 1) if heads % n == 0)
        block = 2 * hidden * hidden + 2 * hidden * kv * _HEAD_SIZE + 2 * hidden
        return hidden, kv, embeddings * vocab * hidden + layers * block + hidden

    def count(layers: int) -> float:
        hidden, _, rest = outside_mlp(layers)
        return rest + layers * 3 * hidden * 3.5 * hidden

    steps = range(8, 208, 8) if large else range(2, 202, 2)
    layers = min(steps, key=lambda n: abs(count(n) - parameters))
    hidden, kv, rest = outside_mlp(layers)
    intermediate = max(hidden, round((parameters - rest) / (3 * layers * hidden)))
    config = llama(
        vocab=vocab,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=hidden // _HEAD_SIZE,
        kv_heads=kv,
        tied=tied,
    )
    return shape_of_config(config, f"a Llama of {parameters:.3g} parameters, assumed", eager=eager)


# what families' code raises for sizes that don't go together, or a package that is not there
_UNBUILT = (ValueError, ImportError, TypeError, AttributeError, KeyError, AssertionError)


def shape_of_config(
    config: Any, name: str, *, eager: bool = False, trust_remote_code: bool = False
) -> Shape:
    """Counts from the model that `config` makes, built without memory on torch's meta device.
    Raises UserError for one that can't be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _UNBUILT as error:
        raise UserError(
            f"{name}: its model can't be built from its configuration ({error}), so its "
            "parameters can't be counted."
        ) from error
    parameters = list(model.parameters())  # tied tensors come once
    vocab, hidden = model.get_input_embeddings().weight.shape
    hidden = _size(text, "hidden_size") or hidden
    heads = _size(text, "num_attention_heads")
    return Shape(
        name=name,
        parameters=sum(p.numel() for p in parameters),
        layers=_size(text, "num_hidden_layers") or _longest_list(model),
        hidden=hidden,
        intermediate=_size(text, "intermediate_size") or _size(text, "n_inner") or 4 * hidden,
        heads=heads,
        kv_heads=_size(text, "num_key_value_heads") or heads,
        head_size=heads and (_size(text, "head_dim") or hidden // heads),
        vocab=vocab,
        tied=model.get_output_embeddings() is None
        or model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        linears=tuple(_linears(model)),
        largest=max(p.numel() for p in parameters),
        largest_layer=max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
        eager=eager,
        parts=_parts(model),
        model=model,
    )


def _size(config: Any, name: str) -> int:
    """A size by its name, the largest where layers differ; 0 where the family has none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses where layers differ
        layers = config.per_layer_config
        value = [getattr(layer, name, None) for layer in layers]
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = max((size for size in value if isinstance(size, int)), default=0)
    return int(value or 0)


def _longest_list(model: Any) -> int:
    """Blocks of a model whose configuration doesn't say how many it has."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(map(len, lists), default=1)


def _parts(model: Any) -> Outline | None:
    try:
        return outline(model)
    except UserError:  # told where an option needs the blocks
        return None


def _linears(model: Any) -> Sequence[Linear]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    out, head = [], model.get_output_embeddings()
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and module is not head:
            out.append(Linear(last, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):  # GPT-2's linear layers
            out.append(Linear(last, module.weight.shape[0], module.weight.shape[1]))
    return out


# ---- the models of a stage ----


@dataclass(frozen=True, slots=True)
class Shapes:
    """The models of a stage."""

    policy: Shape
    # by option: those that score, and the judge of a watch
    rewards: tuple[tuple[str, Shape], ...] = ()


def can_plan(model: ModelConfig) -> bool:
    """Whether the options say which model a plan is about."""
    if model.kind is ModelKind.tiny:
        return True
    return model.path is not None or model.params is not None


def shapes_of(model: ModelConfig, scoring: Sequence[tuple[str, str]]) -> tuple[Shapes, list[str]]:
    """The shapes of the policy and of the reward models beside it (option and directory of each),
    and a note that describes the policy. Raises UserError for a model that can't be counted.
    """
    policy = read_shape(model)
    plain = ModelConfig(trust_remote_code=model.trust_remote_code)
    rewards = [(key, read_shape(replace(plain, path=path), key=key)) for key, path in scoring]
    notes = [f"{policy.name}: {describe(policy)}"]
    for shape in (policy, *(shape for _, shape in rewards)):
        if not shape.heads:
            notes.append(
                f"{shape.name}: its layers have no attention heads, so what they keep of a "
                "sequence is not counted"
            )
    return Shapes(policy, tuple(rewards)), notes


def describe(shape: Shape) -> str:
    """A model in a few figures."""
    heads = (
        f"{shape.heads} heads"
        if shape.heads == shape.kv_heads
        else f"{shape.heads} heads, {shape.kv_heads} for keys"
    )
    return (
        f"{number(shape.parameters)} parameters, {shape.layers} layers of {shape.hidden} "
        f"({heads}; {shape.intermediate} inside), "
        f"{shape.vocab} tokens{' with tied embeddings' if shape.tied else ''}"
    )


def number(count: float) -> str:
    """8030261248 as 8.03B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"
