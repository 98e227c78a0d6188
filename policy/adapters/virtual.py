"""Virtual tokens: trained positions in front of every row, as a PEFT tuner on a model's backbone.

PEFT's own classes for them wrap the whole language model: they give rows of other lengths, read a
classifier's score at padding, and a caller of the backbone, as `policy.model.PolicyModule`, goes
past them. Here two hooks on the backbone (the transformers module without its head) put the virtual
tokens in front of what it reads and cut them off what it returns, so every caller sees rows of the
length that it gave. Configurations and files stay PEFT's: what is saved here PEFT loads, and the
other way round.

A prompt (Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021, arXiv:2103.10385) is n embeddings;
a prefix (Li and Liang 2021, arXiv:2101.00190; Liu et al. 2021, arXiv:2110.07602) is n keys and
values in every layer.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf.types import UserError

LAYER = "virtual_tokens"  # the attribute of the backbone
# what a backbone may be given beside token ids, of their shape, that needs no place for virtual
# tokens here
_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


# ---- the trained tensors ----


class Plain(nn.Module):
    """The values themselves, [n, width]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)

    def forward(self) -> Tensor:
        # by a layer's call: under ZeRO-3 that is what gathers the weights
        numbers = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        values: Tensor = self.embedding(numbers)
        return values


class Encoded(Plain):
    """P-tuning: the values are what an encoder makes of trained embeddings, which learns faster
    than the values alone. The encoder is PEFT's: three linear layers with ReLU between them.
    """

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__(count, width)
        self.mlp_head = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )

    def forward(self) -> Tensor:
        values: Tensor = self.mlp_head(super().forward())
        return values

    @torch.no_grad()
    def solve(self, wanted: Tensor) -> None:
        """Choose the last layer so that the values are `wanted` [n, width], or as near as n tokens
        come with an encoder narrower than n.
        """
        head: Any = self.mlp_head
        features, last = head[:-1](super().forward()).double(), head[-1]
        weight = torch.linalg.lstsq(features, wanted.to(features), driver="gelsd").solution
        last.weight.copy_(weight.t())
        last.bias.zero_()


# ---- on the backbone ----


class VirtualTokens(nn.Module, BaseTunerLayer):
    """The virtual tokens of each adapter by its name, inside of a backbone, and the two hooks that
    put those of the active one in front of every row. One adapter is active at a time.
    """

    adapter_layer_names = ("virtual_values",)
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.virtual_values = nn.ModuleDict()
        self.is_prefix: dict[str, bool] = {}
        self.heads: dict[str, int] = {}  # of a prefix's keys
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.passes = 0  # of the backbone that had virtual tokens, in one of the model
        self._cut = 0  # columns that the running pass gets in front
        self._hooks: list[Any] = []

    def get_base_layer(self) -> nn.Module:
        """No layer of the model is under it."""
        return nn.Module()

    def hook(self, model: nn.Module, backbone: nn.Module) -> None:
        """Take part in every pass of `backbone`, and see that each of `model` is one of it."""
        self._hooks = [
            backbone.register_forward_pre_hook(self.before, with_kwargs=True),
            backbone.register_forward_hook(self.after, with_kwargs=True),
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end),
        ]

    def unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()

    def add(self, name: str, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Random virtual tokens of PEFT's configuration, for the adapter `name`."""
        count, width = config.num_virtual_tokens, config.token_dim
        self.is_prefix[name] = isinstance(config, PrefixTuningConfig)
        if self.is_prefix[name]:
            width *= 2 * config.num_layers
            self.heads[name] = config.num_attention_heads
        if isinstance(config, PromptEncoderConfig) and not config.inference_mode:
            module: Plain = Encoded(count, width, config.encoder_hidden_size)
        else:
            module = Plain(count, width)
        self.virtual_values[name] = module.to(device=device, dtype=dtype)

    def fold_encoders(self) -> None:
        """Put what encoders make in the place of the encoders."""
        held: Any = self.virtual_values
        for name, module in held.items():
            if isinstance(module, Encoded):
                with torch.no_grad():
                    self.virtual_values[name] = plain(module())

    def active(self) -> str | None:
        """The name of the adapter in use. Raises UserError for several."""
        held: Any = self.virtual_values
        active: Any = self.active_adapters
        names = [name for name in active if name in held]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise UserError(
                f"adapter: {', '.join(names)} are all active, but only one adapter's virtual "
                "tokens can be in front of a row. Load one of them."
            )
        return names[0]

    def count(self) -> int:
        """Positions in front of every row now."""
        name = self.active()
        held: Any = self.virtual_values
        return 0 if name is None else int(held[name].embedding.num_embeddings)

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        raise UserError("virtual tokens can't be merged: no weights of the model hold them.")

    def unmerge(self) -> None:
        """Nothing was merged."""

    def begin(self, model: Any, args: Any) -> None:
        """Before a pass of the whole model."""
        self.passes = 0

    def end(self, model: Any, args: Any, output: Any) -> None:
        """After it. Raises UserError for a family that goes past its backbone."""
        if not self.passes and self.active() is not None:
            raise UserError(
                f"adapter: {model.config.model_type} calls parts of its backbone past the backbone "
                "itself, so virtual tokens can't be put in front of what it reads. Set "
                "adapter=lora."
            )

    def before(self, backbone: Any, args: Any, kwargs: Any) -> Any:
        """The arguments of a pass of the backbone, with the virtual tokens in them."""
        self._cut = 0
        name = self.active()
        if name is None:
            return None
        self.passes += 1
        given = _by_name(backbone, args, kwargs)
        values = self.virtual_values[name]()
        count = len(values)
        cache = given.get("past_key_values")
        starts = cache is None or cache.get_seq_length() == 0
        _refuse(backbone, given, prefix=self.is_prefix[name])
        if starts and self.is_prefix[name]:
            rows = _shape(given)[0]
            given["past_key_values"] = _filled(backbone, cache, values, self.heads[name], rows)
        elif starts:
            self._cut = count
            given["inputs_embeds"] = _in_front(backbone, given, values)
            given["input_ids"] = None
        in_row = self._cut > 0
        if given.get("attention_mask") is not None:
            given["attention_mask"] = extended_mask(given["attention_mask"], count, in_row)
        if given.get("position_ids") is not None:
            given["position_ids"] = _shifted(given["position_ids"], count, in_row)
        return (), given

    def after(self, backbone: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """The output without the columns of virtual tokens."""
        cut, self._cut = self._cut, 0
        if not cut:
            return None
        if isinstance(output, tuple):
            return (output[0][:, cut:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, cut:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(states[:, cut:] for states in output.hidden_states)
        if output.get("attentions") is not None:
            output.attentions = tuple(weights[..., cut:, :] for weights in output.attentions)
        return output


def plain(values: Tensor) -> Plain:
    """`values` [n, width], frozen as they are."""
    module = Plain(*values.shape).to(values)
    with torch.no_grad():
        module.embedding.weight.copy_(values)
    return module


def _by_name(backbone: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A pass's arguments by their names."""
    names = list(inspect.signature(type(backbone).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _shape(given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a pass."""
    embeds = given.get("inputs_embeds")
    rows, columns = (given["input_ids"] if embeds is None else embeds).shape[:2]
    return rows, columns


def _refuse(backbone: Any, given: Mapping[str, Any], *, prefix: bool) -> None:
    """Raise UserError for passes in which the virtual tokens would be in the wrong place."""
    family = backbone.config.model_type
    packed = "cu_seq_lens_q" in given
    positions = given.get("position_ids")
    if positions is not None and given.get("attention_mask") is None:
        packed = packed or bool((positions.diff(dim=-1) != 1).any())
    if packed:
        raise UserError(
            "adapter: virtual tokens stand in front of a whole sequence, so rows that share one "
            "(stage.packing=true) would not all have them. Set stage.packing=false."
        )
    if prefix and backbone.training and _recomputes(backbone):
        raise UserError(
            "engine.gradient_checkpointing=true: transformers drops the keys and values of a "
            "prefix (adapter=prefix) where it recomputes layers. Set it to false, or take "
            "adapter=prompt."
        )
    shape = _shape(given)
    for name, value in given.items():
        alike = isinstance(value, Tensor) and value.dim() > 1 and tuple(value.shape[:2]) == shape
        if alike and name not in _KNOWN:
            raise UserError(
                f"adapter: {family} reads {name} of every token, which virtual tokens have not."
            )


def _recomputes(backbone: Any) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())


def _in_front(backbone: Any, given: Mapping[str, Any], values: Tensor) -> Tensor:
    """The rows' embeddings [B, n + L, h] behind `values` [n, h]."""
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = backbone.get_input_embeddings()(given["input_ids"])
    virtual = values.to(embeds)[None].expand(len(embeds), -1, -1)
    return torch.cat((virtual, embeds), dim=1)


def _filled(backbone: Any, cache: Any, values: Tensor, heads: int, rows: int) -> Any:
    """`cache`, or a new one, holding the keys and values [n, 2 layers x heads x width] of a prefix
    for each of `rows` rows.
    """
    from transformers import DynamicCache

    config = backbone.config.get_text_config()
    if cache is None:
        windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        cache = DynamicCache(config=config) if windowed else DynamicCache()
    weight = backbone.get_input_embeddings().weight
    count, layers = len(values), config.num_hidden_layers
    # PEFT's order: layer by layer first the keys, then the values
    pairs = values.to(weight).view(count, layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    for number, (keys, held) in enumerate(pairs):
        cache.update(keys.expand(rows, -1, -1, -1), held.expand(rows, -1, -1, -1), number)
    return cache


def extended_mask(mask: Any, count: int, in_row: bool) -> Any:
    """`mask` with `count` positions more in front that every token sees. `in_row`: the virtual
    tokens are part of the row, so they have a line of their own in a mask of four dimensions.

    Two dimensions: [B, L], 1 at tokens. Four, [G, 1, L, K]: bool (True is seen), or a float that is
    added to scores. [G, 1, 1, S] long: lengths of segments, the prompt's first
    (`policy.batching.Packed`).
    """
    if not isinstance(mask, Tensor):
        raise UserError(
            f"adapter: virtual tokens can't be put into a mask of type {type(mask).__name__}."
        )
    if mask.dim() == 2:
        return torch.cat((mask.new_ones(len(mask), count), mask), dim=1)
    if mask.dtype is torch.long:
        longer = mask.clone()
        if in_row:
            longer[..., 0] += count
        return longer
    seen, hidden = (True, False) if mask.dtype is torch.bool else (0.0, torch.finfo(mask.dtype).min)
    longer = torch.cat((mask.new_full((*mask.shape[:-1], count), seen), mask), dim=-1)
    if not in_row:
        return longer
    front = mask.new_full((*mask.shape[:-2], count, longer.shape[-1]), hidden)
    square = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
    front[..., :count].masked_fill_(square, seen)
    return torch.cat((front, longer), dim=-2)


def _shifted(position_ids: Tensor, count: int, in_row: bool) -> Tensor:
    """Positions [B, L] behind `count` virtual ones. Raises UserError for positions of another
    shape.
    """
    if position_ids.dim() != 2:
        raise UserError(
            f"adapter: virtual tokens can't be put before positions of {position_ids.dim()} "
            "dimensions."
        )
    shifted = position_ids + count
    if not in_row:
        return shifted
    front = torch.arange(count, device=shifted.device).to(shifted)[None]
    return torch.cat((front.expand(len(shifted), -1), shifted), dim=1)
