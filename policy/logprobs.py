"""From a policy's rows to its last hidden states, on to its logits, as the model's own forward does
it, and to the log-probabilities of chosen tokens, without ever holding all logits.

Many families do more than call their head: they scale the hidden states or the logits (Cohere,
Granite, MiniCPM3, Falcon-H1), cap them (Gemma 2, RecurrentGemma), or have several layers (BERT). No
list of names is kept: the model's own forward runs with its backbone stood in for by the hidden
states that are given.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.models.parts import backbone_name

Head = Callable[[Tensor], Tensor]  # hidden states [n, H] -> logits [n, V]

_ROWS = 64  # at a time, so that what is read again is still in the cache
# log p where p is 0, so that p log p is 0: 0 times infinity is NaN
_LOWEST = torch.finfo(torch.float32).min

# ---- last hidden states ----


def last_hidden(
    lm: Any,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pictures: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Last hidden states [B, L, H]. Without positions the last column is left out (L - 1): the last
    token of a response predicts nothing. `pictures`: the model's arguments for those of its rows,
    some of which have a column for each of `input_ids`.
    """
    backbone = getattr(lm, backbone_name(lm))
    if pictures is not None:
        return backbone(input_ids=input_ids, use_cache=False, **pictures).last_hidden_state
    if position_ids is None:
        kept = input_ids[:, : max(input_ids.shape[1] - 1, 1)]
        return backbone(input_ids=kept, use_cache=False).last_hidden_state
    return backbone(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state


# ---- logits ----


def head_of(lm: Any, *, plain: bool) -> Head:
    """The map from hidden states [n, H] to logits [n, V]; `plain` by `has_plain_head`."""
    if plain:
        head: Head = lm.get_output_embeddings()
        return head
    return lambda hidden: own_logits(lm, hidden)


def has_plain_head(lm: Any) -> bool:
    """Whether the model's logits are its output embedding's and nothing else, by two made-up hidden
    states. Weights outside the backbone have to be whole (not parted by ZeRO-3).

    True too where its forward can't be asked so: `policy.agreement` tells whether that is right.
    """
    head = lm.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.is_meta:
        return True
    width = weight.shape[1]
    numbers = torch.arange(2 * width, device=weight.device, dtype=torch.float32)
    hidden = torch.sin(numbers).mul_(4.0).reshape(2, width).to(weight.dtype)
    with torch.no_grad():
        try:
            own = own_logits(lm, hidden)
        # what a forward wants of its backbone beside hidden states, it says by any error
        except Exception:  # noqa: BLE001
            return True
        return torch.equal(own.float(), head(hidden[None])[0].float())


def own_logits(lm: Any, hidden: Tensor) -> Tensor:
    """The logits [n, V] of the model's own forward for last hidden states [n, H]."""
    name = backbone_name(lm)
    backbone = lm._modules[name]
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    lm._modules[name] = _StandIn(backbone, _Given(hidden[None]))
    try:
        # not by a call: hooks on the whole model are for whole passes
        logits: Tensor = lm.forward(input_ids=ids, use_cache=False).logits[0]
    finally:
        lm._modules[name] = backbone
    return logits


def outside_backbone(lm: Any) -> list[nn.Parameter]:
    """What a language model's logits are made of beside its last hidden states: the parameters
    outside its backbone, and its head's.
    """
    backbone = {id(param) for param in getattr(lm, backbone_name(lm)).parameters()}
    head = lm.get_output_embeddings()
    own = [] if head is None else list(head.parameters())
    return own + [param for param in lm.parameters() if id(param) not in backbone]


class _Given:
    """What a backbone returns, holding nothing but its last hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _StandIn:
    """Called like the backbone or a part of it, it returns what is given; else it is as they."""

    def __init__(self, real: Any, given: _Given) -> None:
        self._real, self._given = real, given

    def __call__(self, *args: Any, **kwargs: Any) -> _Given:
        return self._given

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if isinstance(value, nn.Module):  # some forwards call the backbone's decoder instead
            return _StandIn(value, self._given)
        return value


# ---- log-probabilities ----


def selected_logprobs(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    chunk: int,
    temperature: float = 1.0,
    entropy_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Logprob of each label and entropy of its distribution, both [N] float32 nats, with the exact
    gradient of both (of the logprobs alone with `entropy_grad` False).

        logprobs_i = log softmax(head(hidden_i) / temperature)[labels_i]
        entropy_i = -sum_v p_iv log p_iv

    `hidden` [N, H], `labels` [N] long; `head` maps [n, H] to logits [n, V]. The logits of at most
    `chunk` rows exist at a time: where there are several chunks and gradients are wanted, backward
    computes each chunk's logits anew (activation checkpointing) instead of keeping [N, V].

    `head` is called max(1, ceil(N / chunk)) times: N = 0 gives empty results that still reach the
    head's weights. Under ZeRO-3 a call is a collective, so all ranks must bring equally many rows
    there (measured: two ranks of 14 and 8 rows in chunks of 4 never return).
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden [N, H] and labels [N], found {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if chunk < 1 or not temperature > 0:
        raise ValueError(
            f"expected a chunk of at least 1 row and a temperature above 0, found {chunk=}, "
            f"{temperature=}"
        )
    recompute = hidden.shape[0] > chunk and torch.is_grad_enabled()
    logprobs, entropies = [], []
    for part, part_labels in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        arguments = (part, head, part_labels, temperature, entropy_grad)
        if recompute:
            logprob, entropy = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False)
        else:
            logprob, entropy = _chunk_logprobs(*arguments)
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    temperature: float,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    if not entropy_grad:
        logprobs, entropy = _LabelLogprobs.apply(logits, labels)
        return logprobs, entropy
    log_p = torch.log_softmax(logits, dim=-1)  # [n, V]
    entropy = -(log_p.exp() * log_p.clamp(min=_LOWEST)).sum(dim=-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), entropy


class _LabelLogprobs(torch.autograd.Function):
    """Logprob of each label (with a gradient) and entropy (without), from logits [n, V] in the one
    buffer that holds them.

    The logits are overwritten by their probabilities, a few rows at a time, and those by the
    gradient: [n, V] exists once where log_softmax, its exponential and their gradients would be
    four. The caller must own the logits, and backward works once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        buffer = logits.detach()  # the same memory: nothing else reads the head's output
        logprobs, entropy = logits.new_empty(len(labels)), logits.new_empty(len(labels))
        for start in range(0, len(labels), _ROWS):
            part = slice(start, start + _ROWS)
            log_p = torch.log_softmax(buffer[part], dim=-1)
            logprobs[part] = log_p.gather(1, labels[part, None]).squeeze(1)
            torch.exp(log_p, out=buffer[part])
            entropy[part] = -torch.linalg.vecdot(buffer[part], log_p.clamp_(min=_LOWEST))
        # by this way only can activation checkpointing drop it and compute it anew
        ctx.save_for_backward(buffer, labels)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # a second backward ends here: torch sees that the buffer has changed
        gradient, labels = ctx.saved_tensors
        upstream = gradients[0]
        gradient.mul_(-upstream[:, None])
        gradient[torch.arange(len(upstream), device=gradient.device), labels] += upstream
        return gradient, None
