"""The modules that engines train: token ids in, float32 figures at response positions out; and
where their weights are.

Batches are right-padded and causal, so a real token never attends to padding and no attention mask
is needed: the hidden state at a real position is the same whatever follows it.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from policy.logprobs import (
    has_plain_head,
    head_of,
    last_hidden,
    outside_backbone,
    selected_logprobs,
)
from rlhf.models.facts import is_picture_model
from rlhf.process import distributed

# Our name for attention by segments among transformers' implementations.
BY_SEGMENTS = "by_segments"
# Tokens of a row up to which a dense mask is as fast: on a CPU, 9 heads of 64, forward and backward
# of 576 tokens took 29 ms with one and 22 ms by segments, 320 tokens 9.5 and 10.7 ms.
LONGEST_DENSE = 512
_sdpa = AttentionInterface()["sdpa"]
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
Write = Callable[[nn.Parameter, Tensor], None]  # sets a parameter wherever an engine keeps it
_TENDING = "tending.pt"
# what transformers calls probabilities of dropout, in configurations and in modules
_DROPOUT = ("dropout", "pdrop", "dropout_prob", "layerdrop")


def base_of(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if is_peft(model) else model


def is_peft(model: Any) -> bool:
    """Whether the model is a PeftModel, without importing PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def reads_pictures(model: Any) -> bool:
    """Whether a transformers model reads pictures beside a text."""
    return is_picture_model(model.config)


class PolicyModule(nn.Module):
    """A causal language model that returns logprobs and entropies of given response tokens only.

    The language-model head runs at response positions, in chunks: [B, L, vocab] never exists.
    """

    def __init__(self, model: Any, *, chunk: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        with whole(outside_backbone(base_of(model))):
            self.plain_head = has_plain_head(base_of(model))
        self.chunk = chunk
        self.temperature = temperature
        self.same_calls = False  # ZeRO-3: every rank must call the head as often as the others
        self.entropy_grad = True  # False saves memory and time where the entropy is only looked at

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        owner: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pictures: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`input_ids` [B, L]; `positions`, `response_ids`, `response_mask` [B, T] -> logprobs,
        entropy, both [B, T] float32 nats (0 where masked).

        With prompts shared, `input_ids` are [G, L] packs and `owner`, `position_ids`,
        `attention_mask` those of `policy.batching.Packed`. `position_ids` alone: the columns of
        `input_ids` are some of their rows'. `pictures`: the model's own arguments for those of the
        rows (`policy.batching.Batch.seen`).
        """
        lm = base_of(self.model)
        # [B, L, H], or [G, L, H]
        hidden = last_hidden(lm, input_ids, position_ids, attention_mask, pictures)
        where = response_mask.nonzero(as_tuple=True)  # the one wait for the device in a pass
        rows = where[0] if owner is None else owner[where[0]]
        picked = hidden[rows, positions[where]]  # [N, H]
        labels = response_ids[where]  # [N]
        tokens = len(labels)
        if self.same_calls:
            spare = int(distributed.all_max([tokens])[0]) - tokens
            picked, labels = F.pad(picked, (0, 0, 0, spare)), F.pad(labels, (0, spare))
        flat_logprobs, flat_entropy = selected_logprobs(
            picked,
            head_of(lm, plain=self.plain_head),
            labels,
            chunk=self.chunk,
            temperature=self.temperature,
            entropy_grad=self.entropy_grad,
        )
        zeros = torch.zeros(response_mask.shape, dtype=torch.float32, device=input_ids.device)
        logprobs = zeros.masked_scatter(response_mask, flat_logprobs[:tokens])
        entropy = zeros.masked_scatter(response_mask, flat_entropy[:tokens])
        return logprobs, entropy


# ---- attention in rows that share a prompt ----


def take_segments(lm: Any) -> bool:
    """Let the attention of `lm`, which is sdpa, read segments where it gets them as a mask
    (`policy.batching.Packed`). Returns whether its code asks transformers which attention to use.
    """
    AttentionInterface.register(BY_SEGMENTS, attend_by_segments)
    AttentionMaskInterface.register(BY_SEGMENTS, AttentionMaskInterface()["sdpa"])
    lm.set_attn_implementation(BY_SEGMENTS)
    if lm.config.get_text_config()._attn_implementation != BY_SEGMENTS:
        return False
    for module in lm.modules():
        # `turn_off_dropout` gives the modules a configuration of their own
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = BY_SEGMENTS
    return True


def attend_by_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention. Where the mask is the lengths of segments, each response
    attends to its prompt and to itself alone, so neither a mask nor scores of L x L exist.

    `query` [G, heads, L, D]; `key`, `value` [G, key heads, L, D]; segments [G, 1, 1, S] long on the
    host. Keys beyond L are a prefix in front, which every token sees (policy/adapters/virtual.py).
    Returns [G, L, heads, D], 0 at padding.
    """
    if attention_mask is None or attention_mask.dtype is not torch.long:
        return _sdpa(module, query, key, value, attention_mask, **options)
    rows = []
    for number, lengths in enumerate(attention_mask[:, 0, 0].tolist()):
        heads = [heads[number : number + 1] for heads in (query, key, value)]
        rows.append(_attend_in_row(module, heads, lengths, options))
    return torch.cat(rows), None


def _attend_in_row(
    module: nn.Module, heads: Sequence[Tensor], lengths: Sequence[int], options: dict[str, Any]
) -> Tensor:
    """[1, L, heads, D] of one row, whose segments have `lengths`, the prompt's first."""
    prompt, start = lengths[0], 0
    parts = []
    for length in lengths:
        if length == 0:
            continue
        stop = start + length
        attend = functools.partial(_attend_in_segment, module, options, prompt, start, stop)
        # Keys of a segment are copies of the prompt's and its own: made again for the gradient.
        if prompt and torch.is_grad_enabled():
            attend = functools.partial(checkpoint, attend, use_reentrant=False)
        parts.append(attend(*heads))
        start = stop
    row = torch.cat(parts, dim=1)
    return F.pad(row, (0, 0, 0, 0, 0, heads[0].shape[2] - start))


def _attend_in_segment(
    module: nn.Module,
    options: dict[str, Any],
    prompt: int,
    start: int,
    stop: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """[1, stop - start, heads, D] of the tokens from `start` to `stop`, which see a prefix, the
    first `prompt` tokens and those before them in the segment.
    """
    ahead = key.shape[2] - query.shape[2]
    query, mask = query[:, :, start:stop], None
    before = ahead + min(prompt, start)  # keys that all of these tokens see
    own = slice(ahead + start, ahead + stop)
    if not before:
        key, value = key[:, :, own], value[:, :, own]
    else:
        key = torch.cat((key[:, :, :before], key[:, :, own]), dim=2)
        value = torch.cat((value[:, :, :before], value[:, :, own]), dim=2)
        seen = torch.ones(stop - start, key.shape[2], dtype=torch.bool, device=key.device)
        mask = seen.tril(before)[None, None]
    return _sdpa(module, query, key, value, mask, **options)[0]


class CriticModule(nn.Module):
    """A sequence classifier read at every response position: the value of the state before each
    response token.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        position_ids: Tensor | None = None,
        pictures: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """`input_ids` [B, L], `positions` [B, T] -> values [B, T] float32, in units of the score;
        `position_ids` and `pictures` as a policy's.
        """
        lm = base_of(self.model)
        hidden = last_hidden(lm, input_ids, position_ids, pictures=pictures)  # [B, L, H]
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)[:, None]
        return lm.score(hidden[rows, positions]).squeeze(-1).float()


def size_of(param: Any) -> int:
    """Elements of a parameter, whether it is whole or in parts (ZeRO-3)."""
    return int(getattr(param, "ds_numel", param.numel()))


def parted(param: Any) -> bool:
    """Whether this rank holds no more of a parameter than its part."""
    return size_of(param) != param.numel()


@contextmanager
def whole(params: Sequence[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """Parted `params` are whole while inside; `changed`: all ranks write the same. A collective."""
    parts: list[Any] = [param for param in params if parted(param)]
    if parts:
        parts[0].all_gather(param_list=parts)
    try:
        yield
    finally:
        if parts:
            parts[0].partition(param_list=parts, has_been_updated=changed)


def no_gather(params: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Weights are whole already."""
    return nullcontext()


class RoundedLinear(nn.Linear):
    """A linear layer that holds its frozen weights rounded (policy/adapters/quantized.py): its
    `weight` is no parameter.
    """

    def whole(self) -> nn.Linear:
        """A plain layer with the weights that this one stands for, and a copy of its bias."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        plain.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain


def make_whole(model: nn.Module) -> None:
    """Hold rounded layers as plain ones with the weights that they stand for, in place: PEFT merges
    into nothing else.
    """
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, RoundedLinear):
                setattr(module, name, layer.whole())


def is_rounded(model: nn.Module) -> bool:
    """Whether the model holds layers rounded."""
    return any(isinstance(module, RoundedLinear) for module in model.modules())


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def has_dropout(model: nn.Module) -> bool:
    """Whether a training pass gives other logprobs than an evaluation pass."""
    return any(_held_dropout(module) for module in model.modules())


def turn_off_dropout(model: Any) -> None:
    """Set every dropout of a transformers model to 0, so that a training pass gives the logprobs of
    an evaluation pass. The model's own configuration, which is saved, stays.
    """
    config = copy.deepcopy(model.config)
    for name in _held_dropout(config):
        setattr(config, name, 0.0)
    for module in model.modules():
        for name in _held_dropout(module):
            setattr(module, name, 0.0)
        # some modules read the configuration in every pass
        if module is not model and getattr(module, "config", None) is model.config:
            module.config = config


def _held_dropout(holder: Any) -> list[str]:
    """The attributes of a module or configuration that hold a dropout above 0."""
    names = [name for name in vars(holder) if name.endswith(_DROPOUT)]
    if isinstance(holder, nn.modules.dropout._DropoutNd):
        names.append("p")
    return [name for name in names if _is_probability(getattr(holder, name))]


def _is_probability(value: Any) -> bool:
    return isinstance(value, float) and value > 0


# ---- what a way to train does beside the optimizer's steps ----


class Tending(Protocol):
    """What a method does while a model trains, the same on every rank: a penalty, what it counts
    and changes after each step (from 1), and what of that a resumed run needs. AdaLoRA does that.
    """

    settled: int  # the step from which on the weights are as small as they are to end

    def begin(self, steps: int) -> None: ...  # before the first step: how many there will be
    def penalty(self) -> Tensor: ...  # added once to the loss of a step, however it is split
    def clear(self) -> None: ...  # before a step, and where none is taken
    def after_step(self, step: int, write: Write, scale: float) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class NoTending:
    """Of a model whose method does nothing beside the steps."""

    settled = 0

    def begin(self, steps: int) -> None:
        """Nothing to prepare."""

    def penalty(self) -> float:
        """No penalty."""
        return 0.0

    def clear(self) -> None:
        """Nothing is counted."""

    def after_step(self, step: int, write: Write, scale: float) -> None:
        """Nothing is changed."""


def tending_of(model: Any) -> Any:
    """The `Tending` that a method put on a model, or one that does nothing."""
    return getattr(model, "tending", None) or NoTending()


def write_plainly(param: nn.Parameter, value: Tensor) -> None:
    """`Write` where the optimizer steps the parameters themselves."""
    with torch.no_grad():
        param.copy_(value)


def clip_scale(norm: float | None, largest: float) -> float:
    """What clipping to `largest` (0: no clipping) multiplied a gradient of this norm by."""
    if norm is None or largest <= 0:
        return 1.0
    return min(1.0, largest / (float(norm) + 1e-6))


def save_tending(model: Any, directory: Path) -> None:
    """The state into a checkpoint, by rank 0."""
    tending = tending_of(model)
    if not isinstance(tending, NoTending) and distributed.is_main():
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(tending.state(), directory / _TENDING)


def load_tending(model: Any, directory: Path) -> None:
    """What `save_tending` wrote, on every rank."""
    tending = tending_of(model)
    if not isinstance(tending, NoTending):
        state = torch.load(directory / _TENDING, weights_only=True, map_location="cpu")
        tending.load_state(state)
