"""What both backends share: seeds, length limits, the sampling distribution, checksums of weights."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.types import Prompt, SyncError, UserError


@dataclass(frozen=True, slots=True)
class Request:
    """One response to write."""

    prompt: Prompt
    seed: int


def requests(prompts: Sequence[Prompt], n: int, seed: int) -> list[Request]:
    """`n` requests per prompt, side by side. A request's seed depends on the prompt's id (and how often it came before), never on its
    place in the batch, so that sharing prompts out among ranks changes no response."""
    seen: Counter[str] = Counter()
    out = []
    for prompt in prompts:
        for _ in range(n):
            digest = hashlib.sha256(f"{seed}/{prompt.id}/{seen[prompt.id]}".encode()).digest()
            seen[prompt.id] += 1
            out.append(Request(prompt, int.from_bytes(digest[:7], "big")))
    return out


def check_lengths(prompts: Sequence[Prompt], max_response: int, limit: int, what: str) -> None:
    """Raises UserError when a prompt leaves no room for a whole response within the model's `limit` positions."""
    for prompt in prompts:
        if len(prompt.token_ids) + max_response > limit:
            raise UserError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens and rollout.max_response_length={max_response}, together above the {limit} "
                f"positions of {what}. Lower rollout.max_response_length, or data.max_prompt_length with data.truncate_prompts=true."
            )


def sampling_logprobs(logits: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Log-probabilities [B, V] float32 of the distribution that is sampled: temperature, then top-k, then top-p (nucleus; Holtzman et al.
    2020, arXiv:1904.09751); -inf for tokens that are cut off."""
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays while the mass before it is below top_p, so at least one always does.
        cut = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -torch.inf)
    return logits.log_softmax(-1)


def checksum(tensor: Tensor) -> tuple[int, float, float]:
    """Element count, float64 sum and sum of squares: enough to notice any weight that differs by more than rounding."""
    # float64 makes the two sums independent of how a kernel splits them, far below what a changed weight moves
    flat = tensor.detach().double().flatten()
    return flat.numel(), float(flat.sum()), float(flat.square().sum())


def same_checksum(sent: tuple[int, float, float], held: tuple[int, float, float]) -> bool:
    scale = max(1.0, abs(sent[1]), sent[2])
    return sent[0] == held[0] and abs(sent[1] - held[1]) <= 1e-9 * scale and abs(sent[2] - held[2]) <= 1e-9 * scale


class Recorder:
    """Passes weights on to the engine and keeps each one's checksum, to compare with what the engine then holds."""

    def __init__(self, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tensors, dtype
        self.sent: dict[str, tuple[int, float, float]] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            converted = tensor.to(self.dtype)
            self.sent[name] = checksum(converted)
            yield name, converted


def compare(sent: dict[str, tuple[int, float, float]], held: dict[str, tuple[int, float, float]], backend: str, version: int) -> None:
    """Raises SyncError naming the first parameter that the generator holds otherwise than the trainer sent it."""
    for name, figures in held.items():
        if name in sent and not same_checksum(sent[name], figures):
            raise SyncError(
                f"weight sync {version} to {backend}: parameter {name} arrived changed. Sent (elements, sum, sum of squares) {sent[name]}, "
                f"the generator holds {figures}. The rollouts would come from another policy, so the run stops."
            )
