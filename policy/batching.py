"""Which responses share a micro-batch, and how token lists become rectangular tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def plan_micro_batches(lengths: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Rows (indices into `lengths`, tokens) in bins whose padded size, rows x longest row, is at
    most `budget` tokens.

    Rows are sorted by length, longest first, so that a bin wastes little on padding and the largest
    allocation comes first. A row longer than the budget gets a bin of its own. `at_least` bins are
    made by halving the bin of the largest padded size; where there are fewer rows than that, empty
    lists make up the number and the caller pads (ranks must agree on the number of micro-batches).
    Every row is in exactly one bin, and the same lengths always give the same plan.
    """
    if budget < 1 or at_least < 1:
        raise ValueError(
            f"expected a budget and at_least of 1 or more, found {budget=}, {at_least=}"
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"expected lengths of at least 1 token, found {min(lengths)}")
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= budget:
            bins[-1].append(row)
        else:
            bins.append([row])
    while len(bins) < at_least:
        sizes = [_divisible_size(rows, lengths) for rows in bins]
        if not any(sizes):
            return bins + [[] for _ in range(at_least - len(bins))]
        largest = sizes.index(max(sizes))
        rows = bins[largest]
        half = (len(rows) + 1) // 2
        bins[largest : largest + 1] = [rows[:half], rows[half:]]
    return bins


def _divisible_size(rows: Sequence[int], lengths: Sequence[int]) -> int:
    """The padded size of a bin in tokens; 0 for one that can't be halved."""
    if len(rows) < 2:
        return 0
    return len(rows) * lengths[rows[0]]


@dataclass(frozen=True, slots=True)
class Batch:
    """B prompts with their responses. L is the longest prompt + response, T the longest response;
    padding is on the right.
    """

    input_ids: Tensor  # [B, L] long: prompt, then response
    response_ids: Tensor  # [B, T] long
    response_mask: Tensor  # [B, T] bool: True at response tokens
    # [B, T] long: index into L of the hidden state that predicts response token t (0 where padded)
    positions: Tensor
    lengths: Tensor  # [B] long: tokens of prompt + response

    def select(self, rows: Sequence[int]) -> "Batch":
        """These rows in this order, without the columns that hold only padding: L and T shrink to
        the longest row chosen.

        Cut other [B, T] tensors alike with ``tensor[rows, : selected.response_ids.shape[1]]``.
        """
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.lengths.device)
        lengths, mask = self.lengths[index], self.response_mask[index]
        wide = int(lengths.max()) if len(index) else 0
        tall = int(mask.sum(dim=1).max()) if mask.numel() else 0
        return Batch(
            input_ids=self.input_ids[index, :wide],
            response_ids=self.response_ids[index, :tall],
            response_mask=mask[:, :tall],
            positions=self.positions[index, :tall],
            lengths=lengths,
        )

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            input_ids=self.input_ids.to(device),
            response_ids=self.response_ids.to(device),
            response_mask=self.response_mask.to(device),
            positions=self.positions.to(device),
            lengths=self.lengths.to(device),
        )


def collate(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str | None = None,
) -> Batch:
    """Pad token lists to a `Batch`. The mask comes from lengths alone, so `pad_id` may be a token
    that responses use (often it is eos).

    Raises ValueError where the numbers of prompts and responses differ, or a prompt is empty
    (nothing would predict the first response token).
    """
    if len(prompt_ids) != len(response_ids):
        raise ValueError(
            f"expected as many prompts as responses, found {len(prompt_ids)} and "
            f"{len(response_ids)}"
        )
    empty = [row for row, prompt in enumerate(prompt_ids) if not len(prompt)]
    if empty:
        raise ValueError(
            f"expected at least one token in every prompt, found none in rows {empty[:8]}"
        )
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompt_ids], dtype=torch.long)
    response_lengths = torch.tensor([len(response) for response in response_ids], dtype=torch.long)
    columns = torch.arange(int(response_lengths.max()) if len(response_lengths) else 0)
    response_mask = columns < response_lengths[:, None]
    whole = [
        [*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)
    ]
    batch = Batch(
        input_ids=_pad(whole, pad_id),
        response_ids=_pad(response_ids, pad_id),
        response_mask=response_mask,
        positions=torch.where(response_mask, prompt_lengths[:, None] - 1 + columns, 0),
        lengths=prompt_lengths + response_lengths,
    )
    return batch if device is None else batch.to(device)


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Ragged lists -> [B, longest] long, padded on the right."""
    longest = max(map(len, rows), default=0)
    padded = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), longest)
