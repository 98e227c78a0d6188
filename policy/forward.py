"""Forward passes without and with gradients: which rows share a pass, and what the policy, the
reference and the critic say of them.

ZeRO's collectives need the same number of passes on every rank, so every plan here is made over all
ranks; a rank with fewer rows gets empty micro-batches, for which it runs a spare row at weight 0.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.batching import Batch, pack, pack_length, plan_micro_batches, rows_by_group
from rlhf.process import distributed

Packs = list[list[int]]  # the rows of one micro-batch; those of one pack share their prompt
Pair = tuple[int, int]  # rows: (better, worse)
ADAPTER = "adapter"  # as a reference: the policy's own weights with its adapter switched off
SPARE: Packs = [[0]]  # what a rank without rows runs


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows become the model's input."""

    budget: int  # tokens per micro-batch, padding included
    shared: bool = False  # a prompt is computed once for all of its responses (policy.batching)
    hidden_size: int = 1  # of the model, for the cost of packing
    # Rows that share a prompt have a dense mask up to so many tokens, and above it attend segment
    # by segment (policy.model.attend_by_segments); None: always a dense mask.
    longest_dense: int | None = None


@dataclass(slots=True)
class Models:
    """The models of one online step."""

    policy: Any  # an engine (policy.engines.base.Engine) around a PolicyModule
    critic: Any  # an engine around a CriticModule; None where the advantage needs no critic
    reference: Any  # a frozen PolicyModule, ADAPTER, or None
    layout: Layout


@dataclass(frozen=True, slots=True)
class PolicyPass:
    """What the policy says of one micro-batch: b rows, t tokens in the longest response."""

    rows: list[int]  # [b] rows of the whole batch
    batch: Batch  # those rows
    logprobs: Tensor  # [b, t] nats
    entropy: Tensor  # [b, t] nats


def aligned_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens, as many on every rank; `lengths` in tokens. A rank
    with fewer rows gets empty ones. Collective.
    """
    own = plan_micro_batches(lengths, budget)
    most = int(distributed.all_max([len(own)])[0])
    if most == len(own):
        return own
    return plan_micro_batches(lengths, budget, at_least=most)


def plan_passes(
    batch: Batch,
    groups: Tensor,
    rows: Sequence[int],
    layout: Layout,
    pairs: Sequence[Pair] = (),
) -> list[Packs]:
    """Micro-batches of `rows`, or of whole `pairs` where they are given; as many on every rank,
    some of them empty. `groups` [B]: the prompt of each row. Collective.
    """
    if layout.shared:
        packs = [list(pair) for pair in pairs] or _packs(batch, groups, rows, layout)
        prompts, responses = batch.prompt_lengths.tolist(), batch.response_lengths.tolist()
        sizes = [pack_length(part, prompts, responses) for part in packs]
        return _fill(packs, sizes, layout.budget)
    lengths = batch.lengths.tolist()
    if not pairs:
        single = [[row] for row in rows]
        return _fill(single, [lengths[row] for row in rows], layout.budget)
    longer = [max(lengths[better], lengths[worse]) for better, worse in pairs]
    micro_batches = aligned_micro_batches(longer, max(1, layout.budget // 2))
    return [_rows_of_pairs(pairs, numbers) for numbers in micro_batches]


def _rows_of_pairs(pairs: Sequence[Pair], numbers: Sequence[int]) -> Packs:
    """Each row of the numbered pairs as a pack of its own."""
    return [[row] for number in numbers for row in pairs[number]]


def _packs(batch: Batch, groups: Tensor, rows: Sequence[int], layout: Layout) -> Packs:
    """Packs of `rows`, those of a pack from one group."""
    prompts, responses = batch.prompt_lengths.tolist(), batch.response_lengths.tolist()
    numbers = groups.tolist()
    local = pack_groups(
        [numbers[row] for row in rows],
        [prompts[row] for row in rows],
        [responses[row] for row in rows],
        hidden_size=layout.hidden_size,
        budget=layout.budget,
        longest_dense=layout.longest_dense,
    )
    return [_selected(rows, numbers) for numbers in local]


def pack_groups(
    groups: Sequence[int],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    *,
    hidden_size: int,
    budget: int,
    longest_dense: int | None = None,
) -> list[list[int]]:
    """Row numbers in packs of equal `groups`, each group in equally large packs of the size that
    costs least among those of at most `budget` tokens. A row that is longer stands alone.

    A token costs about 24 H^2 multiplications per layer in the projections and 2 K H in the
    attention to K tokens, so L tokens cost L (1 + K / (12 H)) units. With a dense mask K is the
    length of the pack; in packs above `longest_dense` tokens it is what a segment sees. `groups`,
    lengths: [B]; responses and prompts in tokens, H = `hidden_size`.
    """
    packs: list[list[int]] = []
    for rows in rows_by_group(groups):
        rows.sort(key=lambda row: (-response_lengths[row], row))
        prompt = prompt_lengths[rows[0]]
        options = _within(_equal_parts(rows), budget, prompt_lengths, response_lengths)
        costs = [
            _cost(parts, prompt, response_lengths, hidden_size, longest_dense) for parts in options
        ]
        packs += options[costs.index(min(costs))]
    return packs


def _equal_parts(rows: list[int]) -> list[list[list[int]]]:
    """`rows`, longest first, as 1, 2, 4, ... packs of nearly equal size, each with long and short
    responses; the last option is a pack for each row.
    """
    options = []
    count = 1
    while count < len(rows):
        options.append([rows[start::count] for start in range(count)])
        count *= 2
    options.append([[row] for row in rows])
    return options


def _within(
    options: list[list[list[int]]],
    budget: int,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
) -> list[list[list[int]]]:
    """The options whose packs all have at most `budget` tokens; the last one, of single rows, where
    none has.
    """
    fitting = []
    for parts in options:
        longest = max(pack_length(part, prompt_lengths, response_lengths) for part in parts)
        if longest <= budget:
            fitting.append(parts)
    return fitting or options[-1:]


def _cost(
    parts: list[list[int]],
    prompt: int,
    response_lengths: Sequence[int],
    hidden_size: int,
    longest_dense: int | None,
) -> float:
    """What the packs of one group cost, in the units of `pack_groups`; `prompt` in tokens."""
    cost = 0.0
    for part in parts:
        responses = [response_lengths[row] for row in part]
        size = prompt + sum(responses)
        pairs = size * size
        if longest_dense is not None and size > longest_dense:
            pairs = prompt * prompt + sum(length * (prompt + length) for length in responses)
        cost += size + pairs / (12.0 * hidden_size)
    return cost


def _selected(items: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [items[number] for number in numbers]


def _fill(packs: Packs, sizes: Sequence[int], budget: int) -> list[Packs]:
    """Micro-batches of whole packs; `sizes` in tokens. Collective."""
    return [_selected(packs, numbers) for numbers in aligned_micro_batches(sizes, budget)]


def rows_of(packs: Packs) -> list[int]:
    """The rows of a micro-batch in the order in which a pass returns them."""
    return [row for part in packs for row in part]


def run_policy(model: Any, batch: Batch, packs: Packs, layout: Layout) -> PolicyPass:
    """One pass of a policy or reference (`model`, an engine or a module) over one micro-batch."""
    rows = rows_of(packs)
    part = batch.select(rows)
    if not layout.shared:
        logprobs, entropy = model(
            part.input_ids, part.positions, part.response_ids, part.response_mask, **part.seen()
        )
        return PolicyPass(rows, part, logprobs, entropy)
    local: Packs = []  # the same packs as row numbers of `part`
    start = 0
    for pack_rows in packs:
        local.append(list(range(start, start + len(pack_rows))))
        start += len(pack_rows)
    packed = pack(part, local, longest_dense=layout.longest_dense)
    logprobs, entropy = model(
        packed.input_ids,
        packed.positions,
        part.response_ids,
        part.response_mask,
        packed.owner,
        packed.position_ids,
        packed.attention_mask,
    )
    return PolicyPass(rows, part, logprobs, entropy)


def module_of(model: Any) -> Any:
    """The module inside an engine, or the module itself."""
    return getattr(model, "module", model)


def reference_pass(models: Models, batch: Batch, packs: Packs) -> PolicyPass:
    """One pass of the reference over one micro-batch, without gradients."""
    with torch.no_grad(), _as_reference(models):
        return run_policy(_reference_model(models), batch, packs, models.layout)


def _reference_model(models: Models) -> Any:
    return models.policy if models.reference == ADAPTER else models.reference


def _as_reference(models: Models) -> AbstractContextManager[Any]:
    """While inside, the model of `_reference_model` is the reference."""
    if models.reference == ADAPTER:
        disabled: AbstractContextManager[Any] = module_of(models.policy).model.disable_adapter()
        return disabled
    return nullcontext()


def policy_logprobs(
    model: Any, batch: Batch, groups: Tensor, rows: Sequence[int], layout: Layout
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropy, both [B, T] nats, of `rows` by a policy or reference in evaluation
    mode; 0 in other rows and where masked. Collective.
    """
    module_of(model).eval()
    shape, device = batch.response_mask.shape, batch.input_ids.device
    logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
    entropy = torch.zeros_like(logprobs)
    with torch.no_grad():
        for packs in plan_passes(batch, groups, rows, layout):
            done = run_policy(model, batch, packs or SPARE, layout)
            if packs:
                write_rows(logprobs, done.rows, done.logprobs, done.batch.response_mask)
                write_rows(entropy, done.rows, done.entropy, done.batch.response_mask)
    return logprobs, entropy


def reference_logprobs(models: Models, batch: Batch, groups: Tensor, rows: Sequence[int]) -> Tensor:
    """Logprobs [B, T] nats of `rows` by the reference, 0 in other rows and where masked.
    Collective.
    """
    with _as_reference(models):
        return policy_logprobs(_reference_model(models), batch, groups, rows, models.layout)[0]


def critic_values(critic: Any, batch: Batch, budget: int) -> Tensor:
    """Values [B, T] of the state before each response token, in units of the score, 0 where masked.
    `budget`: tokens per micro-batch. Collective.
    """
    critic.module.eval()
    shape, device = batch.response_mask.shape, batch.input_ids.device
    out = torch.zeros(shape, dtype=torch.float32, device=device)
    with torch.no_grad():
        for rows in aligned_micro_batches(batch.lengths.tolist(), budget):
            part = batch.select(rows or [0])
            values = critic(part.input_ids, part.positions, **part.seen())
            if rows:
                write_rows(out, rows, values, part.response_mask)
    return out


def write_rows(whole: Tensor, rows: Sequence[int], piece: Tensor, mask: Tensor) -> None:
    """Write `piece` [b, t] into these rows of `whole` [B, T], as 0 outside `mask` [b, t]."""
    whole[list(rows), : piece.shape[1]] = torch.where(mask, piece, 0.0)


def take_rows(tensor: Tensor | None, rows: Sequence[int], width: int) -> Tensor:
    """These rows of a [B, T] tensor, without the columns beyond `width`."""
    assert tensor is not None, "the batch lacks what its configuration needs"
    return tensor[list(rows), :width]
