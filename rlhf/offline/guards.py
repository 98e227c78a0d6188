"""What keeps a run of TRL's trainers sound: steps of whole batches, and an answer to losses and
gradients that are NaN, infinite or a spike. `rlhf/offline/trainers.py` calls both.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from conf.choices import OnNonFinite
from conf.stages import OfflineStage
from policy.engines.base import Brake
from rlhf.process import checkpoints, distributed
from rlhf.run.directory import BadBatches, write_tensors
from rlhf.types import TrainingDiverged

_STATE = "guard.json"  # in each checkpoint


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
        generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
        return iter(torch.randperm(self.rows, generator=generator)[: self.length].tolist())


class Guard:
    """Knows which steps of a run must not be applied, and what ``stage.on_nonfinite`` and the
    limits on spikes say about them.
    """

    def __init__(
        self,
        stage: OfflineStage,
        run_dir: Path,
        checkpoint_dir: Path,
        record: Callable[[int, dict[str, float]], None],
    ) -> None:
        """run_dir: where refused batches are kept; record: takes the step and the figures of a step
        that was left out.
        """
        self.stage = stage
        self.checkpoint_dir = checkpoint_dir
        self.record = record
        self.bad_batches = BadBatches(run_dir, "diverged_{}_rank{}", "step{}")
        self.brake = Brake.from_stage(stage)
        # Of the optimizer step under way, on this rank:
        self.problem: str | None = None  # why it must not be applied
        self.micro_batches: list[dict[str, Any]] = []
        self.losses: list[float] = []
        # Of the run:
        self.skipped = self.rewinds = 0

    def refuse(
        self, step: int, what: str, value: float, tokenizer: Any, why: str | None = None
    ) -> None:
        """Keep the batch of `step`, once. Raises TrainingDiverged where the run is to stop.

        why: the reason in a message, where it is more than "the `what` is `value`".
        """
        if self.problem is not None:
            return
        path = self.bad_batches.next_path(step)
        path = save_batch(path, self.micro_batches, tokenizer, step, {what: value})
        reason = why or f"the {what} is {value}"
        self.problem = (
            f"step {step}: {reason}. The batch that caused it: {path} (its texts beside it as "
            ".json)."
        )
        if self.stage.on_nonfinite is OnNonFinite.stop:
            raise TrainingDiverged(
                f"{self.problem} Training stopped (stage.on_nonfinite=stop). Look at its rows, or "
                f"lower stage.learning_rate={self.stage.learning_rate}."
            )

    def checkpoint(self) -> Path:
        """The checkpoint that a rewind goes to, the same on every rank, and count the rewind.

        Raises TrainingDiverged where there is none, or after more than ``stage.rewinds`` rewinds.
        """
        self.rewinds += 1
        return checkpoints.rewind_target(
            self.checkpoint_dir, self.rewinds, self.stage.rewinds, str(self.problem)
        )

    def save(self, directory: Path) -> None:
        """Write the counts and the spikes' windows into a checkpoint."""
        state = {"brake": self.brake.state_dict(), "skipped": self.skipped, "rewinds": self.rewinds}
        (directory / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; counts that a rewind has raised since stay."""
        path = directory / _STATE
        if not path.is_file():  # a checkpoint from before there were guards
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self.brake.load_state_dict(state["brake"])
        self.skipped = max(self.skipped, state["skipped"])
        self.rewinds = max(self.rewinds, state["rewinds"])


def save_batch(
    path: Path,
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: Any,
    step: int,
    figures: dict[str, float],
) -> Path:
    """This rank's micro-batches of one optimizer step as tensors, and their texts as JSON beside
    them. path: without a suffix. Returns the tensors' file.
    """
    tensors: dict[str, torch.Tensor] = {}
    texts: list[list[str]] = []
    for number, batch in enumerate(micro_batches):
        texts.append([])
        for column, value in batch.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{column}"] = value
            if column.endswith("input_ids"):
                texts[-1].extend(tokenizer.batch_decode(value))
    file = path.with_suffix(".safetensors")
    write_tensors(file, tensors)
    content = {
        "step": step,
        "rank": distributed.rank(),
        **{key: str(value) for key, value in figures.items()},
        "micro_batches": texts,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    return file
