"""Which responses share a micro-batch or a row, how token lists become rectangular tensors, and
checks of shapes and masks for the maths over them: a wrong broadcast is the commonest silent bug in
token-level losses.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.types import Picture

# What a pass costs beside its tokens, in tokens: weights are read, kernels started. A guess between
# a small model on a CPU, where it is less, and ZeRO-3, where each pass gathers the weights.
PASS_TOKENS = 256


def plan_micro_batches(lengths: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Rows (indices into `lengths`, tokens) in bins whose padded size, rows x longest row, is at
    most `budget` tokens.

    Rows are sorted by length, longest first, so that the largest allocation comes first, and cut
    into the bins whose padded sizes, and `PASS_TOKENS` for each bin, add up to the least. A longer
    row gets a bin of its own. `at_least` bins are made by halving the bin of the largest padded
    size; where there are fewer rows, empty lists make up the number and the caller pads (ranks must
    agree on it). Every row is in one bin, and the same lengths always give the same plan.
    """
    if budget < 1 or at_least < 1:
        raise ValueError(
            f"expected a budget and at_least of 1 or more, found {budget=}, {at_least=}"
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"expected lengths of at least 1 token, found {min(lengths)}")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    ends = _cuts([lengths[row] for row in order], budget)
    bins = [order[start:end] for start, end in itertools.pairwise(ends)]
    while len(bins) < at_least:
        sizes = [_divisible_size(rows, lengths) for rows in bins]
        if not any(sizes):
            return bins + [[] for _ in range(at_least - len(bins))]
        largest = sizes.index(max(sizes))
        rows = bins[largest]
        half = (len(rows) + 1) // 2
        bins[largest : largest + 1] = [rows[:half], rows[half:]]
    return bins


def _cuts(lengths: Sequence[int], budget: int) -> list[int]:
    """Where to cut rows of these `lengths`, longest first, so that the bins cost least: from 0 to
    their number. The best way for the first n rows is a last bin behind the best way before it.
    """
    longest = np.array(lengths, dtype=np.int64)
    costs = np.zeros(len(lengths) + 1, dtype=np.int64)  # of the best way to cut the first n rows
    begins = [0]  # of its last bin
    first = 0  # the earliest row that a bin up to here may begin with
    for end in range(1, len(lengths) + 1):
        while first < end - 1 and (end - first) * longest[first] > budget:
            first += 1
        sizes = np.arange(end - first, 0, -1) * longest[first:end]
        whole = costs[first:end] + sizes
        begin = int(whole.argmin())
        costs[end] = whole[begin] + PASS_TOKENS
        begins.append(first + begin)
    cuts = [len(lengths)]
    while cuts[-1] > 0:
        cuts.append(begins[cuts[-1]])
    return cuts[::-1]


def _divisible_size(rows: Sequence[int], lengths: Sequence[int]) -> int:
    """The padded size of a bin in tokens; 0 for one that can't be halved."""
    if len(rows) < 2:
        return 0
    return len(rows) * lengths[rows[0]]


RowPictures = tuple[Picture, ...]  # of one row, in the order of their tokens


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that the rows of a batch show, as files: each pass opens those of its own rows,
    so that pixels never exist for a whole batch.
    """

    rows: tuple[RowPictures, ...]  # [B]
    # The model's arguments for rows of pictures and their token ids [B, L], on the host
    # (rlhf.models.pictures.picture_inputs).
    inputs: Callable[[Sequence[RowPictures], Tensor], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Batch:
    """B prompts with their responses. L is the longest prompt + response, T the longest response;
    padding is on the right.

    The response of an episode holds what its environment wrote too: the model reads it, and the
    mask is False there.
    """

    input_ids: Tensor  # [B, L] long: prompt, then response
    response_ids: Tensor  # [B, T] long
    response_mask: Tensor  # [B, T] bool: True at response tokens that the policy wrote
    # [B, T] long: index into L of the hidden state that predicts response token t (0 where padded)
    positions: Tensor
    lengths: Tensor  # [B] long, on the host: tokens of prompt + response
    prompt_lengths: Tensor  # [B] long, on the host
    pictures: Pictures | None = None  # None: a model of text

    @property
    def response_lengths(self) -> Tensor:
        """[B] long: tokens of the response, whoever wrote them."""
        return self.lengths - self.prompt_lengths

    def seen(self) -> dict[str, Any]:
        """What a module of `policy.model` gets beside tokens: `pictures`, opened now and on the
        tokens' device; nothing for a model of text.
        """
        if self.pictures is None:
            return {}
        device = self.input_ids.device
        inputs = self.pictures.inputs(self.pictures.rows, self.input_ids.cpu())
        return {"pictures": {name: tensor.to(device) for name, tensor in inputs.items()}}

    def select(self, rows: Sequence[int]) -> "Batch":
        """These rows in this order, without the columns that hold only padding: L and T shrink to
        the longest row chosen.

        Cut other [B, T] tensors alike with ``tensor[rows, : selected.response_ids.shape[1]]``.
        """
        index = torch.as_tensor(list(rows), dtype=torch.long)
        lengths, prompt_lengths = self.lengths[index], self.prompt_lengths[index]
        index = index.to(self.input_ids.device)
        wide = int(lengths.max()) if len(index) else 0
        tall = int((lengths - prompt_lengths).max()) if len(index) else 0
        pictures = self.pictures
        if pictures is not None:
            pictures = replace(pictures, rows=tuple(pictures.rows[row] for row in rows))
        return Batch(
            input_ids=self.input_ids[index, :wide],
            response_ids=self.response_ids[index, :tall],
            response_mask=self.response_mask[index, :tall],
            positions=self.positions[index, :tall],
            lengths=lengths,
            prompt_lengths=prompt_lengths,
            pictures=pictures,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """On a device, but for the lengths and the pictures."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            response_ids=self.response_ids.to(device),
            response_mask=self.response_mask.to(device),
            positions=self.positions.to(device),
        )


def collate(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str | None = None,
    written: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """Pad token lists to a `Batch`. The mask comes from lengths and from `written` alone, so
    `pad_id` may be a token that responses use (often it is eos). `written`: of each response's
    tokens, whether the policy wrote it; None: all.

    Raises ValueError where the numbers of prompts and responses differ, a prompt is empty (nothing
    would predict the first response token), or `written` isn't as long as its response.
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
    inside = columns < response_lengths[:, None]
    response_mask = inside if written is None else _written_mask(written, response_ids)
    whole = [
        [*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)
    ]
    batch = Batch(
        input_ids=_pad(whole, pad_id),
        response_ids=_pad(response_ids, pad_id),
        response_mask=response_mask,
        positions=torch.where(inside, prompt_lengths[:, None] - 1 + columns, 0),
        lengths=prompt_lengths + response_lengths,
        prompt_lengths=prompt_lengths,
    )
    return batch if device is None else batch.to(device)


def without_tokens(
    rows: Sequence[list[int]], tokens: Sequence[int], pad_id: int
) -> tuple[list[list[int]], list[bool]]:
    """Rows of token ids with `pad_id` in place of `tokens`; and of each whether it held none."""
    out, clean = [], []
    for row in rows:
        clean.append(not any(token in tokens for token in row))
        out.append(row if clean[-1] else [pad_id if token in tokens else token for token in row])
    return out, clean


def _written_mask(
    written: Sequence[Sequence[bool]], response_ids: Sequence[Sequence[int]]
) -> Tensor:
    """`written` of each response as a mask [B, T]. Raises ValueError."""
    given, expected = [len(row) for row in written], [len(row) for row in response_ids]
    if given != expected:
        raise ValueError(
            f"expected of {len(expected)} responses whether each of their {expected[:8]} tokens "
            f"was written, found {len(given)} lists of {given[:8]}"
        )
    mask = torch.zeros(len(expected), max(expected, default=0), dtype=torch.bool)
    for row, flags in enumerate(written):
        mask[row, : len(flags)] = torch.tensor(list(flags), dtype=torch.bool)
    return mask


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Ragged lists -> [B, longest] long, padded on the right."""
    longest = max(map(len, rows), default=0)
    padded = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), longest)


def same_shape(rank: int, **tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all named tensors have `rank` dimensions and one common shape (no
    broadcasting).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != rank for shape in shapes.values()):
        raise ValueError(f"expected {rank}-dimensional tensors of one shape, found {shapes}")


def check_mask(mask: Tensor) -> None:
    """Raise ``ValueError`` unless `mask` is boolean: 0/1 numbers would index instead of select."""
    if mask.dtype is not torch.bool:
        raise ValueError(f"expected a boolean mask, found {mask.dtype}")


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is True, a scalar. Selects rather than multiplies, so NaN under
    the mask stays out (0 * NaN is NaN).
    """
    return torch.where(mask, values, 0.0).sum()


# ---- packs: responses to one prompt in one row
#
#     tokens       p p p | a a a | b b          positions   0 1 2 | 3 4 5 | 3 4
#
# The prompt p is computed once; a sees p and a; b sees p and b, not a. A row of a group's k
# responses has P + sum T tokens instead of sum (P + T). Attention over the longer row costs more,
# so a large group is cut where that outweighs the prompt (`policy.forward.pack_groups`).


def rows_by_group(groups: Sequence[int]) -> list[list[int]]:
    """Row numbers of each group, groups by first appearance."""
    out: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        out.setdefault(group, []).append(row)
    return list(out.values())


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
    # [G, 1, L, L] bool: True where a query (third axis) sees a key (fourth axis); or, for
    # `policy.model.attend_by_segments`, [G, 1, 1, S] long on the host: how many tokens the prompt
    # has and each of its responses, 0 where a pack has fewer
    attention_mask: Tensor


def pack_length(
    rows: Sequence[int], prompt_lengths: Sequence[int], response_lengths: Sequence[int]
) -> int:
    """Tokens of one pack; the last token of a response predicts nothing and stays out."""
    return prompt_lengths[rows[0]] + sum(max(response_lengths[row] - 1, 0) for row in rows)


def pack(
    batch: Batch, packs: Sequence[Sequence[int]], *, longest_dense: int | None = None
) -> Packed:
    """Lay out the rows of `batch` in `packs` (row numbers; every row in exactly one, all rows of a
    pack with the same prompt). Packs of more than `longest_dense` tokens get segments for a mask;
    None: never.
    """
    prompt_lengths = batch.prompt_lengths.tolist()
    response_lengths = batch.response_lengths.tolist()
    longest = max(pack_length(rows, prompt_lengths, response_lengths) for rows in packs)
    places = torch.zeros(len(packs), longest, dtype=torch.long)  # in input_ids, row after row
    position_ids = torch.zeros(len(packs), longest, dtype=torch.long)
    # 0: prompt, 1..k: responses, -1: padding
    segments = torch.full((len(packs), longest), -1, dtype=torch.long)
    owner = torch.zeros(batch.response_ids.shape[0], dtype=torch.long)
    positions = torch.zeros(batch.response_ids.shape, dtype=torch.long)
    columns = torch.arange(batch.input_ids.shape[1])
    for number, rows in enumerate(packs):
        prompt = prompt_lengths[rows[0]]
        places[number, :prompt] = rows[0] * len(columns) + columns[:prompt]
        position_ids[number, :prompt] = columns[:prompt]
        segments[number, :prompt] = 0
        start = prompt
        for segment, row in enumerate(rows, start=1):
            length, owner[row] = response_lengths[row], number
            if length == 0:
                continue
            end = start + length - 1
            position_ids[number, start:end] = columns[prompt : prompt + length - 1]
            places[number, start:end] = row * len(columns) + position_ids[number, start:end]
            segments[number, start:end] = segment
            positions[row, :length] = start - 1 + columns[:length]
            positions[row, 0] = prompt - 1
            start = end
    by_segments = longest_dense is not None and longest > longest_dense
    device = batch.input_ids.device
    mask = _lengths(segments) if by_segments else _dense_mask(segments).to(device)
    ids = batch.input_ids.flatten()[places.to(device)]
    return Packed(
        torch.where((segments >= 0).to(device), ids, 0),
        owner.to(device),
        positions.to(device),
        position_ids.to(device),
        mask,
    )


def _dense_mask(segments: Tensor) -> Tensor:
    """What each token of a pack sees, [G, 1, L, L] bool; `segments` [G, L]: 0 in the prompt, then 1
    to k, -1 at padding.
    """
    longest = segments.shape[1]
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    key, query = segments[:, None, :], segments[:, :, None]
    # padding sees padding before it, so no softmax is empty
    mask = causal & ((key == query) | ((key == 0) & (query >= 0)))
    return mask[:, None]


def _lengths(segments: Tensor) -> Tensor:
    """Tokens of each segment, [G, 1, 1, S] long."""
    numbers = torch.arange(int(segments.max()) + 1)
    return (segments[:, :, None] == numbers).sum(dim=1)[:, None, None]
