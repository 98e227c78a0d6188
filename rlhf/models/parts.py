"""The parts of a model: its blocks, its embeddings, norms and head; which of its weights train
where not all do (stage.train), and in which order (stage.unfreeze).

Nothing is read of weights, so all of it works on modules on the meta device.

Also a head of one number on any causal language model: for families that transformers has no
sequence classifier for, or one whose head is not `score` on the last hidden states.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.adapters import AdapterConfig
from conf.choices import AdapterKind
from conf.schedule import TrainPart, UnfreezeConfig
from rlhf.models.facts import language_class
from rlhf.models.naming import (
    EMBEDDINGS,
    HEAD,
    LANGUAGE,
    NORMS,
    PROJECTOR,
    SCORE,
    TOWER,
    matches,
    regions,
)
from rlhf.types import UserError

# what the names of modules under the blocks hold, beside the input embedding itself
_BELOW = ("emb", "wte", "wpe", "project_in")
_PREFIXED = ("cpmant",)
_ENDING = "ScalarHead"  # of the class's name, which config.json keeps as the architecture


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter."""

    names: tuple[str, ...]  # several where modules share it, as tied embeddings do
    kinds: tuple[str, ...]  # of each name: EMBEDDINGS, NORMS, HEAD, SCORE, or ""
    blocks: tuple[int | None, ...]  # of each name: the number of its block, from the bottom
    regions: tuple[str, ...]  # of each name (rlhf/models/naming.py)
    size: int  # elements
    below: bool  # it is under the blocks

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def named(self) -> Iterable[tuple[str, str, int | None, str]]:
        """Each name with its kind, block and region."""
        return zip(self.names, self.kinds, self.blocks, self.regions, strict=True)


@dataclass(frozen=True, slots=True)
class Outline:
    """A model's parameters."""

    weights: tuple[Weight, ...]
    count: int  # blocks

    @property
    def last_names(self) -> list[str]:
        """The last parts of the names of modules that hold weights, each once."""
        modules = {name.rpartition(".")[0] for weight in self.weights for name in weight.names}
        return sorted({module.rpartition(".")[2] for module in modules} - {""})

    def depth(self, weight: Weight) -> int:
        """Blocks between a weight and the top: 0 for the top block and what comes after the blocks,
        the number of blocks for the embeddings.
        """
        inside = [block for block in weight.blocks if block is not None]
        if inside:
            return self.count - 1 - min(inside)
        return self.count if weight.below else 0

    def passed(self, weight: Weight) -> int:
        """Blocks that the gradient of a weight passes through."""
        outside = all(block is None for block in weight.blocks)
        if outside and not weight.below:
            return 0
        return min(self.count, self.depth(weight) + 1)


def outline(model: Any) -> Outline:
    """Of a causal language model or a classifier of transformers'. Raises UserError where its
    blocks are not found.
    """
    prefix, count = _blocks(model)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules(remove_duplicate=False))
    region = regions(model)
    names: dict[int, list[str]] = {}
    found: dict[int, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
        found[id(param)] = param
    weights = []
    for number, own in names.items():
        holders = [name.rpartition(".")[0] for name in own]
        kinds = [_kind(modules[one], one, inputs, outputs) for one in holders]
        blocks = [_block(name, prefix) for name in own]
        below = EMBEDDINGS in kinds or any(part in name for name in own for part in _BELOW)
        size = getattr(found[number], "ds_numel", found[number].numel())  # parted under ZeRO-3
        own_regions = tuple(region(name) if region else "" for name in own)
        weights.append(Weight(tuple(own), tuple(kinds), tuple(blocks), own_regions, size, below))
    return Outline(tuple(weights), count)


def blocks_of(model: Any) -> nn.ModuleList:
    """The blocks of a transformers model, the bottom one first. Raises UserError."""
    prefix, _ = _blocks(model)
    blocks: nn.ModuleList = model.get_submodule(prefix)
    return blocks


def _blocks(model: Any) -> tuple[str, int]:
    """The name of the list that holds the blocks, and their number."""
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [
        (sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise UserError(
            f"{model.config.model_type}: its {count} blocks are in no list of modules, so parts of "
            "it can't train by themselves. Leave stage.train, stage.unfreeze and "
            "stage.depth_decay as they are."
        )
    return max(lists)[1], count


def _block(name: str, prefix: str) -> int | None:
    """The number of the block that the parameter `name` is in."""
    if not name.startswith(f"{prefix}."):
        return None
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])


def _kind(module: nn.Module, name: str, inputs: Any, outputs: Any) -> str:
    if module is inputs or isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if name == SCORE:
        return SCORE
    if module is outputs:
        return HEAD
    return NORMS if "norm" in type(module).__name__.lower() else ""


# ---- which weights train ----


def chosen(parts: Outline, train: TrainPart) -> list[Weight]:
    """The weights that `stage.train` names; a classifier's score always trains.

    Raises UserError for what the model has not, and for a shared weight of which not all names are
    named: with tied embeddings the head is the embedding.
    """
    if train.layers is None and train.modules is None:
        return list(parts.weights)
    if train.layers is not None and train.layers > parts.count:
        raise UserError(
            f"stage.train.layers={train.layers}: the model has {parts.count} blocks. Expected at "
            f"most {parts.count}."
        )
    lowest = parts.count - (train.layers or 0)
    tests = [matches(pattern) for pattern in train.modules or ()]
    used = [False] * len(tests)
    out = []
    for weight in parts.weights:
        named = []
        for name, kind, block, region in weight.named:
            hits = [test(name, kind, region) for test in tests]
            used = [before or hit for before, hit in zip(used, hits, strict=True)]
            in_top = block is not None and block >= lowest
            named.append(any(hits) or in_top or kind == SCORE)
        if any(named):
            _refuse_half(weight, named, train)
            out.append(weight)
    for pattern, found in zip(train.modules or (), used, strict=True):
        if not found:
            raise UserError(
                f"stage.train.modules={list(train.modules or ())}: nothing in the model is named "
                f"{pattern!r}. Its modules end in {', '.join(parts.last_names)}; {EMBEDDINGS}, "
                f"{NORMS} and {HEAD} name these parts of any model, {LANGUAGE}, {TOWER} and "
                f"{PROJECTOR} those of one that reads pictures."
            )
    if not out:
        raise UserError(
            f"stage.train.layers={train.layers} leaves nothing that trains. Expected at least 1, "
            "or stage.train.modules."
        )
    return out


def _refuse_half(weight: Weight, named: Sequence[bool], train: TrainPart) -> None:
    if all(named):
        return
    names = [name.rpartition(".")[0] for name in weight.names]
    inside = [name for name, hit in zip(names, named, strict=True) if hit]
    outside = [name for name, hit in zip(names, named, strict=True) if not hit]
    raise UserError(
        f"stage.train.layers={train.layers} stage.train.modules={train.modules} hold "
        f"{' and '.join(inside)}, whose weight is that of {' and '.join(outside)} too (tied "
        "weights), so both would train. Name all of them to train both, or none."
    )


def train_parts(model: Any, train: TrainPart) -> None:
    """Freeze all weights of `model` but those that `stage.train` names. Raises UserError."""
    if train.layers is None and train.modules is None:
        return
    names = {weight.name for weight in chosen(outline(model), train)}
    for name, param in model.named_parameters():
        param.requires_grad_(name in names)


# ---- in which order, and how fast ----


def places(
    parts: Outline, trained: Iterable[Weight], decay: float, unfreeze: UnfreezeConfig
) -> dict[str, tuple[float, int]]:
    """By a weight's name: what its learning rate is multiplied by (`decay` for each block below the
    top), and the unfreezings before it trains.

    The top block trains from the start, with all that comes after the blocks; the embeddings, and
    a head that is tied to them, come last.
    """
    depths = {weight.name: parts.depth(weight) for weight in trained}
    order = sorted(set(depths.values()))
    waits = dict.fromkeys(order, 0)
    if unfreeze.every is not None or unfreeze.patience is not None:
        waits = {depth: number // unfreeze.blocks for number, depth in enumerate(order)}
    return {name: (decay**depth, waits[depth]) for name, depth in depths.items()}


# ---- a head of one number ----


def base_model(model: Any) -> Any:
    """The transformers model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def backbone_name(lm: Any) -> str:
    """The attribute of a language model or classifier that holds all of it but its head."""
    # Llama 4's text model calls it otherwise than its class says.
    return lm.base_model_prefix if lm.base_model_prefix in lm._modules else "model"


def virtual_tokens(lm: Any) -> int:
    """Positions that an adapter takes in front of every row of a language model or classifier
    (policy/adapters/virtual.py).
    """
    layer = getattr(getattr(lm, backbone_name(lm)), "virtual_tokens", None)
    return 0 if layer is None else int(layer.count())


def one_label_config(
    weights: str, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Any:
    """The configuration of a directory, a hub's model or a GGUF file, for a classifier."""
    from transformers import AutoConfig

    extra = {"gguf_file": gguf_file} if gguf_file else {}
    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code, **extra)
    config.num_labels = 1
    return config


def classifier_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The class of a classifier of one label for a model's configuration: transformers' where that
    is a linear `score` on the last hidden states, else a `scalar_class`.
    """
    from transformers import AutoModelForSequenceClassification

    names = getattr(config, "architectures", None) or [""]
    if config.model_type in _PREFIXED:
        raise UserError(
            f"{config.model_type} puts tokens of its own before each row and sees padding, so the "
            "last token of a row can't be read beside longer rows: it can be no reward model here."
        )
    with torch.device("meta"):
        if not names[0].endswith(_ENDING) and _has_classifier(config):
            theirs = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
            if isinstance(getattr(theirs, "score", None), nn.Linear):
                return type(theirs)
        auto = language_class(config)
        causal = auto.from_config(config, trust_remote_code=trust_remote_code)
    kind: Any = type(causal)
    return scalar_class(kind)


def _has_classifier(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    remote = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return known or "AutoModelForSequenceClassification" in remote


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32: half precision would round scores to a few
    hundredths.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


@functools.cache
def scalar_class(causal: Any) -> Any:
    """A classifier of one label made of a causal language model's class: its backbone under the
    same name, so that its weights load, and `score` [1, H] in float32 at the last token.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    family: Any = next(kind for kind in causal.__mro__[1:] if issubclass(kind, PreTrainedModel))

    class Classifier(family):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            whole = causal(config)
            self.num_labels = 1
            self.backbone_name = backbone_name(whole)
            setattr(self, self.backbone_name, whole._modules[self.backbone_name])
            self.score = Float32Linear(_width(whole), 1, bias=False)
            self.post_init()

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
        ) -> Any:
            """`input_ids` and `attention_mask` [B, L] -> logits [B, 1] float32, read at the last
            token of each row that the mask has.
            """
            options = {name: value for name, value in options.items() if name.startswith(_PASSED)}
            backbone = getattr(self, self.backbone_name)
            hidden = backbone(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options
            ).last_hidden_state  # [B, L, H]
            last = torch.full(input_ids.shape[:1], -1, device=hidden.device)
            if attention_mask is not None:
                columns = torch.arange(input_ids.shape[1], device=hidden.device)
                last = (attention_mask.to(hidden.device).long() * columns).argmax(dim=1)
            rows = torch.arange(len(input_ids), device=hidden.device)
            return SequenceClassifierOutput(logits=self.score(hidden[rows, last]))

    stem = causal.__name__
    for one in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
        stem = stem.removesuffix(one)
    Classifier.__name__ = Classifier.__qualname__ = stem + _ENDING
    Classifier.__module__ = family.__module__  # transformers reads a family's abilities there
    return Classifier


def _width(whole: Any) -> int:
    """Of a model's last hidden states."""
    width = int(whole.config.get_text_config().hidden_size)
    head = whole.get_output_embeddings()
    # Reformer's hold two streams side by side
    return width if head is None else max(width, head.weight.shape[1])


_PASSED = ("position_ids", "inputs_embeds", "pixel_", "image_", "mm_token", "token_type_ids")


# ---- what is added to a frozen model ----


# Parameters that each way to train beside a frozen model adds: those that train, and those that
# never do. policy/adapters tells them here, since plans of memory and disk can't import it.
ADDED: dict[AdapterKind, Callable[[Any, AdapterConfig], tuple[int, int]]] = {}


def added_by(model: Any, adapter: AdapterConfig) -> tuple[int, int]:
    """Parameters that train and that don't of an adapter for `model`; none where all weights train.
    Raises UserError for an adapter that the model has no place for.
    """
    if adapter.kind is AdapterKind.none:
        return 0, 0
    assert adapter.kind in ADDED, "rlhf/stages/methods.py makes the methods known"
    return ADDED[adapter.kind](model, adapter)
