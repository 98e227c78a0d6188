"""The rows of an optimizer step of TRL's trainers: which they are, in which micro-batches, and what
they weigh; and what the model's method adds to a step. `rlhf/offline/trainers.py` uses it.

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

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback

from conf.stages import OfflineStage
from policy.batching import plan_micro_batches
from policy.engines.deepspeed import write as write_in_shards
from policy.model import NoTending, clip_scale, tending_of, write_plainly
from rlhf.process import distributed
from rlhf.types import PICTURES, SOFT_LABEL, WEIGHT

Row = dict[str, Any]
CARRIED = (WEIGHT, SOFT_LABEL)  # columns that reach the loss
EXTRA = (*CARRIED, PICTURES)  # beside those that TRL knows
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


def parts_of(
    batches: list[Any], budget: int | None, collate: Callable[[list[Row]], Inputs], rows: int
) -> Parts:
    """The micro-batches of a rank's step: of its rows by a `budget` of tokens, as `part_rows`, or
    collated already, of `rows` rows each.
    """
    if budget is None:
        return Parts(batches, [rows] * len(batches))
    parts = part_rows([row for batch in batches for row in batch.rows], budget)
    return Parts([collate(part) for part in parts], [len(part) for part in parts])


class Growth(TrainerCallback):
    """stage.batch_growth: how many rows steps have, and how many passes they are."""

    def __init__(self, stage: OfflineStage, rows: int) -> None:
        self.stage, self.rows = stage, rows

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers takes the whole run for one pass."""
        trained = sum(self.stage.step_size(step) for step in range(state.global_step))
        state.epoch = trained / self.rows

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "learning_rate" in logs:
            logs["train/batch_rows"] = float(self.stage.step_size(state.global_step - 1))


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


# ---- hidden states of texts, on the disk (stage.cache_frozen) ----

INDEX, STATES = "index.json", "states.bin"
Texts = Sequence[Sequence[int]]  # token ids


def text_key(text: Sequence[int]) -> bytes:
    """What a text is found by."""
    return hashlib.blake2b(np.asarray(text, dtype=np.int64).tobytes(), digest_size=16).digest()


def padded(texts: Texts, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L], padded on the right, on this rank's device."""
    rows = [torch.tensor(text) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids.to(distributed.device()), mask.to(distributed.device())


def mapped_states(file: Path, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """[tokens, hidden] in a file."""
    size = tokens * hidden
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(tokens, hidden)


class FrozenStates:
    """The hidden states of texts, mapped from their file."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.dtype: torch.dtype = getattr(torch, index["dtype"])
        self.hidden = int(index["hidden"])
        ends = np.cumsum([0, *index["lengths"]])
        self.places = {
            bytes.fromhex(key): (int(start), int(end))
            for key, start, end in zip(index["keys"], ends[:-1], ends[1:], strict=True)
        }
        self.states = mapped_states(folder / STATES, int(ends[-1]), self.hidden, self.dtype)

    def batch(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L, H] of texts [B, L] padded on the right; 0 at padding."""
        out = torch.zeros(*input_ids.shape, self.hidden, dtype=self.dtype)
        lengths = attention_mask.sum(dim=1).tolist()
        for number, (ids, length) in enumerate(zip(input_ids.tolist(), lengths, strict=True)):
            start, end = self.places[text_key(ids[:length])]
            out[number, :length] = self.states[start:end]
        return out.to(input_ids.device)


def batches_of(texts: Texts, numbers: Iterable[int], budget: int) -> Iterator[list[int]]:
    """Numbers of texts of like length, at most `budget` padded tokens together, one at least."""
    batch: list[int] = []
    for number in sorted(numbers, key=lambda one: -len(texts[one])):
        if batch and (len(batch) + 1) * len(texts[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def allocate_states(file: Path, size: int) -> str | None:
    """A file of so many bytes, all of them taken from the disk, so that no write to mapped memory
    finds it full. Returns what is wrong, if anything.
    """
    try:
        shutil.rmtree(file.parent, ignore_errors=True)
        file.parent.mkdir(parents=True)
        with file.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
    except OSError as error:
        shutil.rmtree(file.parent, ignore_errors=True)
        return (
            f"stage.cache_frozen=true: {size / 2**30:.2f} GiB of hidden states can't be kept in "
            f"{file.parent.parent} ({error}). Make room, set data.cache_dir to another folder, or "
            "stage.cache_frozen=false."
        )
    return None


# ---- what is added to a step's loss, once however it is split ----


class Tended:
    """What a model's method does beside the steps of a trainer (`policy.model.Tending`)."""

    def __init__(self, model: Any) -> None:
        self.model, self.tending = model, tending_of(model)
        self.norm: Any = None  # of the step's gradient, before it was clipped

    def with_penalty(self, trainer: Any, result: Any, items: Any) -> Any:
        """A micro-batch's loss, or its loss and outputs, with its part of the step's penalty, so
        that a step adds the penalty once however it is split; the logged loss holds it too.

        items: the number of the step's tokens, where the trainer divides by it.
        """
        if isinstance(self.tending, NoTending):
            return result
        part = trainer.share_of_step(items) * self.tending.penalty()
        if isinstance(result, tuple):
            return (result[0] + part, *result[1:])
        return result + part

    def after_step(self, trainer: Any) -> None:
        """After the optimizer's step, before it is evaluated and saved. Weights that are not yet as
        small as they are to end are not kept as the best. A collective.
        """
        write = write_in_shards if trainer.is_deepspeed_enabled else write_plainly
        step = trainer.state.global_step
        self.tending.after_step(step, write, clip_scale(self.norm, trainer.args.max_grad_norm))
        if step == self.tending.settled:
            state = trainer.state
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
