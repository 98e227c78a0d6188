"""Responses to one prompt in one row: the prompt is computed once, and each response sees the
prompt and itself.

    tokens       p p p | a a a | b b          positions   0 1 2 | 3 4 5 | 3 4
    a sees p and a; b sees p and b, not a

A row of a group's k responses has P + sum T tokens instead of sum (P + T). Attention over the
longer row costs more, so a large group is cut where that outweighs the prompt (`pack_groups`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.batching import Batch
from policy.selection import rows_by_group


@dataclass(frozen=True, slots=True)
class Packed:
    """What the model reads for the B rows of a `Batch`: G packs, L tokens in the longest; padding
    is on the right.
    """

    input_ids: Tensor  # [G, L] long
    owner: Tensor  # [B] long: the pack that holds each row
    # [B, T] long: index into L of the hidden state that predicts response token t (0 where padded)
    positions: Tensor
    position_ids: Tensor  # [G, L] long: position in the prompt, or after it in the response
    # [G, 1, L, L] bool: True where a query (third axis) sees a key (fourth axis)
    attention_mask: Tensor


def pack_groups(
    groups: Sequence[int],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    *,
    hidden_size: int,
) -> list[list[int]]:
    """Row numbers in packs of equal `groups`, each group in equally large packs of the size that
    costs least.

    A token costs about 24 H^2 multiplications per layer in the projections and 2 L H in the
    attention over a row of L tokens, with a dense mask; so a row of L tokens costs L (1 + L / (12
    H)) units. `groups`, lengths: [B]; responses and prompts in tokens, H = `hidden_size`.
    """
    packs: list[list[int]] = []
    for rows in rows_by_group(groups):
        rows.sort(key=lambda row: (-response_lengths[row], row))
        prompt = prompt_lengths[rows[0]]
        options = _equal_parts(rows)
        costs = [_cost(parts, prompt, response_lengths, hidden_size) for parts in options]
        packs += options[costs.index(min(costs))]
    return packs


def _equal_parts(rows: list[int]) -> list[list[list[int]]]:
    """`rows`, longest first, as 1, 2, 4, ... packs of nearly equal size, each with long and short
    responses.
    """
    options = []
    count = 1
    while count <= len(rows):
        options.append([rows[start::count] for start in range(count)])
        count *= 2
    return options


def _cost(
    parts: list[list[int]], prompt: int, response_lengths: Sequence[int], hidden_size: int
) -> float:
    """What the packs of one group cost, in the units of `pack_groups`; `prompt` in tokens."""
    cost = 0.0
    for part in parts:
        size = prompt + sum(response_lengths[row] for row in part)
        cost += size * (1.0 + size / (12.0 * hidden_size))
    return cost


def pack_length(
    rows: Sequence[int], prompt_lengths: Sequence[int], response_lengths: Sequence[int]
) -> int:
    """Tokens of one pack; the last token of a response predicts nothing and stays out."""
    return prompt_lengths[rows[0]] + sum(max(response_lengths[row] - 1, 0) for row in rows)


def pack(batch: Batch, packs: Sequence[Sequence[int]]) -> Packed:
    """Lay out the rows of `batch` in `packs` (row numbers; every row in exactly one, all rows of a
    pack with the same prompt).
    """
    prompt_lengths = (batch.lengths - batch.response_mask.sum(dim=1)).tolist()
    response_lengths = batch.response_mask.sum(dim=1).tolist()
    device, width = batch.input_ids.device, batch.response_ids.shape[1]
    longest = max(pack_length(rows, prompt_lengths, response_lengths) for rows in packs)
    input_ids = torch.zeros(len(packs), longest, dtype=torch.long)
    position_ids = torch.zeros(len(packs), longest, dtype=torch.long)
    # 0: prompt, 1..k: responses, -1: padding
    segments = torch.full((len(packs), longest), -1, dtype=torch.long)
    owner = torch.zeros(batch.response_ids.shape[0], dtype=torch.long)
    positions = torch.zeros(batch.response_ids.shape, dtype=torch.long)
    ids = batch.input_ids.cpu()
    columns = torch.arange(max(width, 1))
    for number, rows in enumerate(packs):
        prompt = prompt_lengths[rows[0]]
        input_ids[number, :prompt] = ids[rows[0], :prompt]
        position_ids[number, :prompt] = torch.arange(prompt)
        segments[number, :prompt] = 0
        start = prompt
        for segment, row in enumerate(rows, start=1):
            length = response_lengths[row]
            owner[row] = number
            if length == 0:
                continue
            end = start + length - 1
            input_ids[number, start:end] = ids[row, prompt : prompt + length - 1]
            position_ids[number, start:end] = torch.arange(prompt, prompt + length - 1)
            segments[number, start:end] = segment
            positions[row, :length] = start - 1 + columns[:length]
            positions[row, 0] = prompt - 1
            start = end
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    key, query = segments[:, None, :], segments[:, :, None]
    # padding sees padding before it, so no softmax is empty
    mask = causal & ((key == query) | ((key == 0) & (query >= 0)))
    return Packed(
        input_ids.to(device),
        owner.to(device),
        positions.to(device),
        position_ids.to(device),
        mask[:, None].to(device),
    )


def can_share_prompts(model: Any) -> bool:
    """Whether the model takes a mask of ours: full causal attention in every layer, positions by
    id, sdpa (eager attention would add the mask).
    """
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    layers = getattr(config, "layer_types", None)
    if layers is not None and any(kind != "full_attention" for kind in layers):
        return False
    windowed = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    return config.model_type in _FULL_ATTENTION and not windowed


# read in transformers' source: mask and position_ids are taken as given
_FULL_ATTENTION = ("llama", "qwen2", "qwen3", "mistral", "olmo2", "smollm3")
