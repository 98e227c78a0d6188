"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691), P-tuning (Liu et al. 2021,
arXiv:2103.10385), and prefix tuning without an encoder, which is P-tuning v2 (Li and Liang 2021,
arXiv:2101.00190; Liu et al. 2021, arXiv:2110.07602).

All start from real tokens: with a start at random the loss of a 135M model was 11.2, which is that
of a guess, and it came down slowly. So at the start a model reads its rows as if those tokens stood
in front of them, and `attach` holds that against the model's own forward: a family that treats
virtual tokens otherwise is refused by its name.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, Tuner
from policy.adapters.virtual import Encoded, VirtualTokens, plain
from policy.adapters.virtual_tuner import (
    EncodedConfig,
    PrefixConfig,
    PromptConfig,
    VirtualModel,
    layer_of,
)
from rlhf.models.parts import backbone_name
from rlhf.process.libraries import first_line
from rlhf.types import UserError

_CAUSAL = ("full_attention", "sliding_attention")
# what backbones without keys and values of the usual form keep between tokens
_STATES = ("cache_params", "state", "mems", "past_buckets_states")
_ROWS, _TOKENS = 2, 8  # that a fresh adapter is checked with
# Share of the largest hidden state by which rounding moves one, at most.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes of a language model."""

    layers: int
    width: int  # of an embedding
    heads: int  # of keys
    head_width: int

    @property
    def keys(self) -> int:
        """Width of a token's keys in one layer."""
        return self.heads * self.head_width


def _shape(model: Any, kind: AdapterKind) -> _Shape:
    """Keys are looked at for a prefix alone: layers may differ in them."""
    config = model.config.get_text_config()
    layers, width = config.num_hidden_layers, model.get_input_embeddings().weight.shape[1]
    if kind is not AdapterKind.prefix:
        return _Shape(layers, width, 1, width)
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    head_width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return _Shape(layers, width, heads, head_width)


# ---- what a model can't have ----


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """Raises UserError for a model without room for the virtual tokens, and for one whose layers
    have no keys and values of the kind that a prefix is.
    """
    config, count = model.config.get_text_config(), adapter.prompt.tokens
    name = f"adapter={adapter.kind.value}"
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and count >= positions:
        raise UserError(
            f"adapter.prompt.tokens={count}: {config.model_type} has {positions} positions, so no "
            "row would fit behind so many virtual tokens. Lower it."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"{name}: {config.model_type} has an encoder of its own, and virtual tokens here stand "
            "before a decoder's row. Set adapter=lora."
        )
    if adapter.kind is AdapterKind.ptuning and adapter.prompt.encoder_size < count:
        raise UserError(
            f"adapter.prompt.encoder_size={adapter.prompt.encoder_size} is less than "
            f"adapter.prompt.tokens={count}, so the encoder could not start from real tokens. "
            f"Expected at least {count}."
        )
    if adapter.kind is AdapterKind.prefix:
        _check_keys(config)
    read = inspect.signature(type(_backbone(model)).forward).parameters
    states = [state for state in _STATES if state in read]
    if states and "past_key_values" not in read:
        raise UserError(
            f"{name}: {config.model_type} writes token by token from a state ({states[0]}), which "
            "the virtual tokens would enter again with every token. Set adapter=lora."
        )


def _check_keys(config: Any) -> None:
    """Every layer has keys and values, alike in size. Raises UserError."""
    reason = None
    others = set(getattr(config, "layer_types", None) or ()) - set(_CAUSAL)
    if others:
        reason = f"has layers of another kind than attention ({', '.join(sorted(others))})"
    elif getattr(config, "num_attention_heads", None) is None:
        reason = "has no attention"
    elif getattr(config, "kv_lora_rank", None):
        reason = "keeps one latent vector in the place of keys and values"
    elif config.to_dict().get("per_layer_config"):
        reason = "has keys of another size in some layers"
    if reason is not None:
        raise UserError(
            f"adapter=prefix: {config.model_type} {reason}, so a prefix of keys and values does "
            "not fit it. Set adapter=prompt or adapter=lora."
        )


# ---- a fresh adapter ----


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with fresh virtual tokens, which alone train; they start from real tokens. Raises
    UserError for a family whose forward treats them otherwise than those.
    """
    from peft import get_peft_model

    family = model.config.model_type
    tokens = _start_tokens(model, adapter, fresh)
    try:
        shape, probe = _shape(model, adapter.kind), _probe(model)
        with _evaluating(model):
            wanted = _hidden(model, torch.cat((tokens.expand(_ROWS, -1), probe), dim=1))
            values = _values(model, tokens, shape, adapter.kind)
        adapted = get_peft_model(model, _config(adapter, fresh.task, shape))
        layer = layer_of(adapted)
        assert layer is not None
        gap = _start(layer, model, values, probe, wanted[:, len(tokens) :])
    except UserError:
        raise
    # A family's forward may want anything beside token ids, or take no embeddings.
    except Exception as error:
        raise UserError(
            f"adapter={adapter.kind.value}: {family} takes no virtual tokens "
            f"({type(error).__name__}: {first_line(error)}). Set adapter=lora."
        ) from error
    if not gap <= _ROUNDING.get(model.dtype, _HALF_ROUNDING):
        raise UserError(
            f"adapter={adapter.kind.value}: {family} reads virtual tokens otherwise than the "
            f"tokens that they are made of (by {gap:.1e} of its hidden states). Set adapter=lora."
        )
    return adapted


def _config(adapter: AdapterConfig, task: str, shape: _Shape) -> Any:
    """PEFT's configuration."""
    common: dict[str, Any] = {
        "task_type": task,
        "num_virtual_tokens": adapter.prompt.tokens,
        "num_transformer_submodules": 1,
        "num_layers": shape.layers,
        "token_dim": shape.width,
        "num_attention_heads": shape.heads,
        "modules_to_save": ["score"] if task == "SEQ_CLS" else None,
    }
    if adapter.kind is AdapterKind.prefix:
        return PrefixConfig(**common | {"token_dim": shape.keys})
    if adapter.kind is AdapterKind.ptuning:
        return EncodedConfig(**common, encoder_hidden_size=adapter.prompt.encoder_size)
    return PromptConfig(**common)


def _start_tokens(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Tensor:
    """[n] long: the tokens of adapter.prompt.text, or those of the first rows, again from their
    beginning where there are too few; without either tokens drawn from the vocabulary, as PEFT
    does.
    """
    count, weight = adapter.prompt.tokens, model.get_input_embeddings().weight
    ids: list[int] = []
    if adapter.prompt.text is not None:
        if fresh.encode is None:
            raise UserError(
                f"adapter.prompt.text={adapter.prompt.text!r}: no tokenizer here. Leave it out."
            )
        ids = list(fresh.encode(adapter.prompt.text))
        if not ids:
            raise UserError(f"adapter.prompt.text={adapter.prompt.text!r}: it has no tokens.")
    elif fresh.sample is not None:
        ids = [token for row in fresh.sample() for token in row]
    if not ids:
        ids = torch.randint(0, weight.shape[0], (count,)).tolist()
    ids *= -(-count // len(ids))
    return torch.tensor(ids[:count], device=weight.device)


def _probe(model: Any) -> Tensor:
    """Rows of token ids [2, 8] without the ids that configurations name for padding and the
    like.
    """
    config = model.config.get_text_config()
    named = [value for name, value in config.to_dict().items() if name.endswith("token_id")]
    listed = [token for value in named if isinstance(value, list) for token in value]
    ids = [token for token in range(config.vocab_size) if token not in (*named, *listed)]
    ids *= 1 + _ROWS * _TOKENS // len(ids)
    device = model.get_input_embeddings().weight.device
    return torch.tensor(ids[: _ROWS * _TOKENS], device=device).view(_ROWS, _TOKENS)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout, no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _backbone(model: Any) -> Any:
    return getattr(model, backbone_name(model))


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states [B, L, H]."""
    states: Tensor = _backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return states


def _values(model: Any, tokens: Tensor, shape: _Shape, kind: AdapterKind) -> Tensor:
    """What stands for `tokens` [n]: their embeddings [n, h], or for a prefix their keys and values
    in every layer [n, 2 layers x keys].
    """
    if kind is not AdapterKind.prefix:
        embeddings: Tensor = model.get_input_embeddings()(tokens)
        return embeddings
    cache = _backbone(model)(input_ids=tokens[None], use_cache=True).past_key_values
    size = torch.Size((1, shape.heads, len(tokens), shape.head_width))
    pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    wrong = {tuple(tensor.shape) for tensor in pairs if tensor.shape != size}
    if wrong or len(pairs) != 2 * shape.layers:
        raise UserError(
            f"adapter=prefix: {model.config.model_type} keeps other keys and values than its "
            f"configuration says: {sorted(wrong)} where {tuple(size)} was expected, in "
            f"{len(cache.layers)} layers of {shape.layers}. Set adapter=prompt or adapter=lora."
        )
    # [2 layers, heads, n, width] -> [n, 2 layers x heads x width]
    return torch.cat(pairs).permute(2, 0, 1, 3).reshape(len(tokens), -1)


def _start(
    layer: VirtualTokens, model: Any, values: Tensor, probe: Tensor, wanted: Tensor
) -> float:
    """Start from `values`; returns how far the hidden states of `probe` are then from `wanted`, as
    a share of the largest.
    """
    name = str(layer.active())
    module: Any = layer.virtual_values[name]
    layer.virtual_values[name] = plain(values)
    with _evaluating(model):
        gap = (_hidden(model, probe) - wanted).abs().max()
        gap = torch.maximum(gap, _written_gap(model, probe, wanted)) / wanted.abs().max()
        # as they are once they train: embeddings of no token (Gemma 4 looks them up again)
        layer.virtual_values[name] = plain(values + values.std() * torch.rand_like(values) * 1e-2)
        model(input_ids=probe, use_cache=False)
    layer.virtual_values[name] = module
    if isinstance(module, Encoded):
        module.solve(values)
    else:
        with torch.no_grad():
            module.embedding.weight.copy_(values)
    return float(gap)


def _written_gap(model: Any, probe: Tensor, wanted: Tensor) -> Tensor:
    """How far the last token's hidden states are from those in `wanted`, read as when a response is
    written: by itself, after the keys and values of the others. 0 for a family without these.
    """
    backbone, options = _backbone(model), {"use_cache": True}
    seen = torch.ones_like(probe)
    first = backbone(input_ids=probe[:, :-1], attention_mask=seen[:, :-1], **options)
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        return wanted.new_zeros(())
    last = backbone(
        input_ids=probe[:, -1:], attention_mask=seen, past_key_values=cache, **options
    ).last_hidden_state
    return (last[:, -1] - wanted[:, -1]).abs().max()


# ---- the methods ----


def expected(model: Any, adapter: AdapterConfig) -> int:
    """n h embeddings; P-tuning's encoder beside them; for a prefix 2 n keys in each layer."""
    shape, count = _shape(model, adapter.kind), adapter.prompt.tokens
    if adapter.kind is AdapterKind.prefix:
        return 2 * count * shape.layers * shape.keys
    embeddings = count * shape.width
    if adapter.kind is AdapterKind.prompt:
        return embeddings
    hidden = adapter.prompt.encoder_size
    encoder = (shape.width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * shape.width
    return embeddings + encoder


def _method(name: str, config: Any) -> Method:
    """`name`: PEFT's, whose own classes of virtual tokens this replaces in this process."""
    return Method(
        attach=attach, check=check, expected=expected, tuner=Tuner(name, config, VirtualModel)
    )


METHODS = {
    AdapterKind.prompt: _method("PROMPT_TUNING", PromptConfig),
    AdapterKind.ptuning: _method("P_TUNING", EncodedConfig),
    AdapterKind.prefix: _method("PREFIX_TUNING", PrefixConfig),
}
