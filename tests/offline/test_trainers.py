"""What our trainers add to TRL's: steps of whole batches, and refused batches kept."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from conf.schema import EngineConfig
from conf.stages import SFTStage
from rlhf.offline import step_rows
from rlhf.offline.steps import Guard
from rlhf.offline.trainers import StageTrainer
from rlhf.types import TrainingDiverged

STAGE: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "eval_steps": 3,
    "max_length": 32,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
}


class FakeTrainer(Trainer):
    """What `StageTrainer` needs of a trainer."""

    def __init__(self, loss: float, norm: float) -> None:
        self.loss, self.norm = loss, norm
        self.data_collator = list
        self.model = type("M", (), {"training": True})()
        self.args = type("A", (), {"fp16": False, "learning_rate": 0.1})()
        self.state = type("S", (), {"global_step": 4})()
        self.processing_class = type(
            "T", (), {"batch_decode": lambda self, ids: ["text"] * len(ids)}
        )()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        return torch.tensor(self.loss)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        return self.norm


class Guarded(StageTrainer, FakeTrainer):
    """The fake with our guards."""


def test_a_bad_gradient_saves_every_micro_batch_of_its_step(tmp_path: Path) -> None:
    def fresh() -> Guard:
        return Guard(SFTStage(**STAGE), tmp_path, tmp_path, lambda step, figures: None)

    trainer = Guarded(1.0, 2.0, guard=fresh(), engine=EngineConfig())
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    trainer.compute_loss(None, batch)
    assert trainer._get_grad_norm(None) == 2.0 and trainer.guard.micro_batches == []
    trainer.norm = math.nan
    trainer.compute_loss(None, batch)
    trainer.compute_loss(None, batch)
    with pytest.raises(TrainingDiverged, match="step 5: the gradient's norm is nan"):
        trainer._get_grad_norm(None)
    assert set(load_file(tmp_path / "diverged_step5_rank0.safetensors")) == {
        "0.input_ids",
        "1.input_ids",
    }
    trainer.loss, trainer.guard = math.inf, fresh()
    with pytest.raises(TrainingDiverged, match="step 5: the loss is inf"):
        trainer.compute_loss(None, batch)
    trainer.model.training = False
    assert trainer.compute_loss(None, batch) == math.inf, "an evaluation is not a step"


def test_passes_are_whole_batches_of_the_same_rows_for_every_split() -> None:
    steps = 0
    sampler = step_rows.WholeBatches(21, 8, 3, lambda: steps)
    first = list(sampler)
    assert len(first) == len(set(first)) == len(sampler) == 16 and set(first) < set(range(21))
    steps = 1
    assert list(sampler) == first, "the same pass, as a resumed run would ask for"
    steps = 2
    assert list(sampler) != first
    assert sorted(step_rows.WholeBatches(5, 8, 3, lambda: 0)) == [0, 1, 2, 3, 4]


def test_rows_are_parted_by_padded_tokens() -> None:
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in (3, 9, 4, 2, 10)]
    parts = step_rows.part_rows(rows, 20)
    assert [[len(row["input_ids"]) for row in part] for part in parts] == [[10, 9], [4, 3, 2]]
    assert [len(part) for part in step_rows.part_rows(rows, 1)] == [1] * 5


@pytest.mark.parametrize(
    ("row", "length"),
    [
        ({"input_ids": [1] * 5, "labels": [1] * 5, "weight": 0.5}, 5),
        ({"chosen_ids": [1] * 4, "rejected_ids": [1] * 7, "margin": 1.0}, 7),
        ({"prompt_ids": [1] * 3, "chosen_ids": [1] * 4, "rejected_ids": [1]}, 7),
        ({"prompt_ids": [1] * 3, "completion_ids": [1] * 2, "label": True}, 5),
        ({"chosen_input_ids": [1] * 6, "rejected_input_ids": [1] * 2, "chosen_labels": [1]}, 6),
    ],
)
def test_a_row_is_as_long_as_its_longest_sequence(row: dict[str, Any], length: int) -> None:
    assert step_rows.sequence_length(row) == length


def test_shares_weigh_micro_batches_by_their_rows() -> None:
    assert step_rows.Parts([{}, {}], [3, 1]).shares() == [0.75, 0.25]
