"""Hidden states between the blocks of a model, one point a row."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Rows = Sequence[Sequence[int]]  # token ids
_BLOCK = re.compile(r"(.*?)\.(\d+)\.")
_BATCH_TOKENS = 16_384


def block_of(name: str) -> tuple[str, int] | None:
    """The stack of blocks that a module is in, by the stack's name, and the number of its block:
    ``model.layers.3.mlp.up_proj`` is in block 3 of ``model.layers``. None outside of blocks.
    """
    match = _BLOCK.match(name)
    return (match.group(1), int(match.group(2))) if match else None


def block_states(model: Any, stacks: Sequence[str], rows: Rows, pad_id: int) -> dict[str, Tensor]:
    """Of each of `stacks` the hidden states before its first block and after each block, of `rows`
    (token ids): [blocks + 1, N, H] float32 on the CPU, each the mean over a row's tokens.

    Means, since the last tokens of many rows are the same one. The model stays as it is.
    """
    training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    backbone = getattr(model, model.base_model_prefix, model)  # nobody reads logits here
    points: dict[str, list[Tensor]] = {}
    order: list[int] = []
    with torch.no_grad(), _watching(model, stacks) as seen:
        for batch in _batches(rows):
            order += batch
            ids, mask = _padded([rows[i] for i in batch], pad_id)
            seen.clear()
            backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for stack, states in seen.items():
                means = [_mean(one, mask) for one in states]
                points.setdefault(stack, []).append(torch.stack(means))
    model.train(training)
    back = torch.tensor(order).argsort()
    whole = {}
    for stack, parts in points.items():
        whole[stack] = torch.cat(parts, 1)[:, back]
    return whole


@contextmanager
def _watching(model: Any, stacks: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """While inside, of each stack what went into its first block and came out of each block in the
    last pass.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for stack in stacks:
        for block in model.get_submodule(stack):
            handles.append(_watch(block, stack, seen))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(block: nn.Module, stack: str, seen: dict[str, list[Tensor]]) -> Any:
    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if stack not in seen:
            given = args or (kwargs["hidden_states"],)
            seen[stack] = [given[0].detach()]
        if isinstance(output, tuple):
            output = output[0]
        seen[stack].append(output.detach())

    return block.register_forward_hook(keep, with_kwargs=True)


def _batches(rows: Rows) -> list[list[int]]:
    """The numbers of the rows in batches of at most `_BATCH_TOKENS` padded tokens, the shortest
    first.
    """
    batches: list[list[int]] = [[]]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in order:
        padded = (len(batches[-1]) + 1) * len(rows[i])
        if padded > _BATCH_TOKENS and batches[-1]:
            batches.append([])
        batches[-1].append(i)
    return batches


def _padded(rows: Rows, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """[B, L, H] and [B, L] -> [B, H]."""
    weights = mask.to(states.device).float()[..., None]
    return ((states.float() * weights).sum(1) / weights.sum(1)).cpu()
