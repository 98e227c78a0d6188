"""The rows of an optimizer step of TRL's trainers: which they are, in which micro-batches, and what
they weigh. `rlhf/offline/trainers.py` says how each trainer uses it.

transformers' Trainer takes as many rows for each micro-batch, and pads them to the longest. With
`engine.micro_batch_tokens` the loader hands out a rank's rows of a step as they are (`StepRows`);
`part_rows` parts them by padded tokens, and the trainer runs them one after the other (`Parts`).

Rows weigh more or less in the loss by the column ``data.weight_column``, and a pair's better side
may be a probability (column ``soft_label``). Weights are divided by their mean over all rows (SFT:
over the tokens that train), so their scale means nothing and equal weights change nothing. The mean
is not a batch's, which would make a row's weight depend on the rows beside it.

Refused with weights: packing, which joins rows of different weights, and the losses that sort a
batch (aot), which belong to no single row.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from policy.batching import plan_micro_batches
from rlhf.process import distributed
from rlhf.types import SOFT_LABEL, WEIGHT

Row = dict[str, Any]
CARRIED = (WEIGHT, SOFT_LABEL)  # columns that reach the loss
Inputs = dict[str, Any]  # a row or a batch, by column


# ---- rows and micro-batches ----


class WholeBatches(Sampler[int]):
    """Shuffled passes over `rows`, each cut to whole batches of `batch_size`, so that a step trains
    the same rows however the batch is split over ranks and micro-batches.

    The order depends on `seed` and the number of the pass alone, and the pass on the steps done:
    every rank draws the same order, and a resumed run draws what an uninterrupted one would. Rows
    left over differ from pass to pass. Fewer rows than a batch are one batch.
    """

    def __init__(
        self, rows: int, batch_size: int, seed: int, steps_done: Callable[[], int]
    ) -> None:
        self.rows, self.seed, self.steps_done = rows, seed, steps_done
        self.batches = max(1, rows // batch_size)  # per pass
        self.length = min(rows, self.batches * batch_size)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        number = self.steps_done() // self.batches
        return iter(shuffled_pass(self.rows, self.seed, number)[: self.length])


class GrowingBatches(Sampler[int]):
    """The rows of all steps of a run whose steps grow, one step after the other: shuffled passes
    over `rows`, each cut to whole steps.

    transformers takes all of it for one pass, of which it leaves out `unit` rows for each step
    done when it resumes: the order begins so many rows before the next step's.
    """

    def __init__(
        self,
        rows: int,
        sizes: Sequence[int],
        seed: int,
        unit: int,
        steps_done: Callable[[], int],
    ) -> None:
        """sizes: rows of each step of the run, at most `rows`; unit: rows of the loader's batches,
        over all ranks, which divide all sizes.
        """
        self.rows, self.sizes, self.seed = rows, sizes, seed
        self.unit, self.steps_done = unit, steps_done

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        done = self.steps_done()
        start = sum(self.sizes[:done]) - done * self.unit
        return itertools.islice(itertools.chain.from_iterable(self.steps()), start, None)

    def steps(self) -> Iterator[list[int]]:
        """The rows of each step of the run."""
        number, begun = 0, 0
        order = shuffled_pass(self.rows, self.seed, number)
        for size in self.sizes:
            if begun + size > self.rows:
                number, begun = number + 1, 0
                order = shuffled_pass(self.rows, self.seed, number)
            yield order[begun : begun + size]
            begun += size


def shuffled_pass(rows: int, seed: int, number: int) -> list[int]:
    """The order of pass `number` (from 0) over so many rows."""
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order


@dataclass(frozen=True, slots=True)
class StepRows:
    """A rank's rows of an optimizer step, not collated yet."""

    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Parts:
    """The micro-batches of an optimizer step of a rank, collated, and the rows in each."""

    inputs: list[Inputs]
    counts: list[int]

    def shares(self) -> list[float]:
        """Each micro-batch's share of the rows; they add up to 1."""
        whole = sum(self.counts)
        return [count / whole for count in self.counts]


def sequence_length(row: Row) -> int:
    """Tokens of the longest sequence that a trainer of TRL's builds of an encoded row: the row
    itself, the longer side of a pair, prompt and answer.
    """
    sequences = [column for column in row if column.endswith("_ids") and column != "prompt_ids"]
    longest = max(len(row[column]) for column in sequences)
    return len(row.get("prompt_ids", ())) + longest


def part_rows(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """A rank's rows of an optimizer step in parts of at most `budget` padded tokens, rows x longest
    row; a pair counts as one row, as long as its longer side. A row longer than the budget is a
    part by itself.

    A collective: every rank makes as many parts, since gradients are exchanged part by part.
    """
    lengths = [sequence_length(row) for row in rows]
    fewest = len(plan_micro_batches(lengths, budget))
    count = int(distributed.all_max([float(fewest)])[0])
    parts = plan_micro_batches(lengths, budget, at_least=count)
    return [[rows[i] for i in part] for part in parts]


# ---- weights and soft labels ----


def without_carried(row: Inputs) -> Inputs:
    """A row or batch without its weights and soft labels."""
    return {key: value for key, value in row.items() if key not in CARRIED}


@dataclass(frozen=True, slots=True)
class WithWeights:
    """A collator that adds the rows' weights and soft labels to the batch, [B] float32 each."""

    collate: Callable[[list[Inputs]], Inputs]

    def __call__(self, rows: list[Inputs]) -> Inputs:
        batch = dict(self.collate([without_carried(row) for row in rows]))
        for name in CARRIED:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


def changed(model: Any, change: Callable[[Any], None]) -> Callable[..., Any]:
    """`model` as a function that applies `change` to its outputs, in place, before it returns
    them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        change(outputs)
        return outputs

    return call


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor | None,
    margin: Tensor | None,
    centering: float | None,
    soft_label: Tensor | None = None,
) -> Tensor:
    """A reward model's loss as TRL has it, with each pair's terms times its weight w: the mean over
    pairs of w (preference + centering (chosen + rejected)^2), in nats.

    chosen, rejected: scores [B]. weights, margin, soft_label: [B] or None. preference is
    -log sigmoid(chosen - rejected - margin), or with soft labels p the cross-entropy
    -(p log sigmoid(d) + (1 - p) log sigmoid(-d)) of d = chosen - rejected.
    `reward.losses.pairwise_loss` is the same without weights.
    """
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    preference = -F.logsigmoid(difference)
    if soft_label is not None:
        preference = soft_label * preference - (1 - soft_label) * F.logsigmoid(-difference)
    if weights is not None:
        preference = preference * weights
    loss = preference.mean()
    if centering is None:
        return loss
    square = (chosen + rejected) ** 2
    if weights is not None:
        square = square * weights
    return loss + centering * square.mean()


def scale_gradient(values: Tensor, weights: Tensor) -> None:
    """Multiply the gradient that flows into row i of `values` [N, ...] by weights[i mod B], where
    `weights` is [B] and N a multiple of B (TRL joins the chosen and the rejected rows).
    """
    if not values.requires_grad:
        return
    rows = weights.repeat(values.shape[0] // weights.shape[0])
    rows = rows.view(-1, *[1] * (values.dim() - 1))
    values.register_hook(lambda gradient: gradient * rows.to(gradient.dtype))
