"""Where a batch that must not be applied goes, and where a run goes back to."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.process import checkpoints
from rlhf.run.directory import KEPT, BadBatches, write_tensors
from rlhf.types import TrainingDiverged


def test_the_first_batches_keep_their_names_and_further_ones_share_one(tmp_path: Path) -> None:
    batches = BadBatches(tmp_path)
    paths = [batches.next_path(step) for step in range(1, KEPT + 3)]
    assert [path.name for path in paths] == [
        *(f"diverged-step-{step}-rank-0" for step in range(1, KEPT + 1)),
        "diverged-last-rank-0",
        "diverged-last-rank-0",
    ]
    assert {path.parent for path in paths} == {tmp_path}


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "batch.safetensors", {"whole": whole, "columns": whole.view(2, 3).T})
    read = load_file(tmp_path / "batch.safetensors")
    assert torch.equal(read["whole"], whole) and torch.equal(read["columns"], whole.view(2, 3).T)


def saved(folder: Path, step: int) -> Path:
    checkpoint = folder / f"step-{step}"
    checkpoint.mkdir()
    (checkpoint / "loop.json").write_text("{}", encoding="utf-8")
    checkpoints.seal(checkpoint)
    return checkpoint


def test_a_rewind_goes_to_the_newest_whole_checkpoint_as_often_as_allowed(tmp_path: Path) -> None:
    whole = saved(tmp_path, 2)
    (saved(tmp_path, 4) / "loop.json").write_text("torn", encoding="utf-8")
    assert checkpoints.rewind_target(tmp_path, 1, 1, "step 5: nan.") == whole
    with pytest.raises(TrainingDiverged, match=r"^step 5: nan\. stage.on_nonfinite=rewind: .*=1"):
        checkpoints.rewind_target(tmp_path, 2, 1, "step 5: nan.")
    with pytest.raises(TrainingDiverged, match=r"^step 5: nan\. .*no whole checkpoint"):
        checkpoints.rewind_target(tmp_path / "none", 1, 1, "step 5: nan.")
