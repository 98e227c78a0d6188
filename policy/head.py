"""From a causal language model's last hidden states to its logits, as its own forward does it.

Many families do more there than call their head: they scale the hidden states or the logits
(Cohere, Granite, MiniCPM3, Falcon-H1), cap them (Gemma 2, RecurrentGemma), or have several layers
(BERT). No list of names is kept: the model's own forward runs with its backbone stood in for by the
hidden states that are given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.scalar import backbone_name

Head = Callable[[Tensor], Tensor]


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


def has_plain_head(lm: Any) -> bool:
    """Whether the model's logits are its output embedding's and nothing else, by two made-up hidden
    states. Whole weights only (not ZeRO-3).

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


def head_of(lm: Any, *, plain: bool) -> Head:
    """The map from hidden states [n, H] to logits [n, V]; `plain` by `has_plain_head`."""
    if plain:
        head: Head = lm.get_output_embeddings()
        return head
    return lambda hidden: own_logits(lm, hidden)
