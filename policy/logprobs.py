"""Log-probabilities of chosen tokens without ever holding all logits."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def selected_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, *, chunk: int, temperature: float = 1.0, entropy_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """Logprob of each label and entropy of its distribution, both [N] float32 nats, with the exact gradient of both
    (of the logprobs alone with `entropy_grad` False).

        logprobs_i = log softmax(head(hidden_i) / temperature)[labels_i],    entropy_i = -sum_v p_iv log p_iv

    `hidden` [N, H], `labels` [N] long; `head` maps [n, H] to logits [n, V]. The logits of at most `chunk` rows exist at a time: where there are
    several chunks and gradients are wanted, backward computes each chunk's logits anew (activation checkpointing) instead of keeping [N, V].

    `head` is called max(1, ceil(N / chunk)) times: N = 0 gives empty results that still reach the head's weights. Under ZeRO-3 a call is a
    collective, so all ranks must bring equally many rows there (measured: two ranks of 14 and 8 rows in chunks of 4 never return).
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected hidden [N, H] and labels [N], found {tuple(hidden.shape)} and {tuple(labels.shape)}")
    if chunk < 1 or not temperature > 0:
        raise ValueError(f"expected a chunk of at least 1 row and a temperature above 0, found {chunk=}, {temperature=}")
    recompute = hidden.shape[0] > chunk and torch.is_grad_enabled()
    logprobs, entropies = [], []
    for part, part_labels in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        arguments = (part, head, part_labels, temperature, entropy_grad)
        logprob, entropy = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False) if recompute else _chunk_logprobs(*arguments)
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, temperature: float, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(head(hidden).float() / temperature, dim=-1)  # [n, V]
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), entropy
