"""The file is one that safetensors reads, and takes its room at the start."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rollout.server.weight_file import WeightFile, read_tensors
from rollout.weights import Spec


def specs(dtype: torch.dtype) -> dict[str, Spec]:
    return {
        "a": Spec((3,), dtype),
        "b": Spec((5, 2), dtype),
        "c": Spec((), torch.float32),
        "empty": Spec((0, 4), dtype),
    }


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "c": torch.randn((), generator=generator),
        "b": torch.randn(2, 5, generator=generator).t(),  # not contiguous
        "a": torch.randn(3, generator=generator),
        "empty": torch.empty(0, 4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_reads_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    file = WeightFile(specs(dtype), tmp_path)
    for seed in (1, 2):  # the second version in place of the first
        file.write(tensors(seed).items())
        for found in (load_file(file.path), dict(read_tensors(str(file.path)))):
            assert found.keys() == specs(dtype).keys()
            for name, expected in tensors(seed).items():
                spec = specs(dtype)[name]
                assert found[name].dtype is spec.dtype and tuple(found[name].shape) == spec.shape
                assert torch.equal(found[name], expected.to(spec.dtype))
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_wider_dtypes_stay_aligned(tmp_path: Path) -> None:
    odd = {"a": Spec((3,), torch.int8), "b": Spec((2,), torch.float64)}
    file = WeightFile(odd, tmp_path)
    file.write({"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([1, 2, 3])}.items())
    assert {name: t.tolist() for name, t in load_file(file.path).items()} == {
        "a": [1, 2, 3],
        "b": [1.0, 2.0],
    }
    file.close()


def test_a_full_disk_is_told_and_every_tensor_still_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = WeightFile(specs(torch.float32), tmp_path)
    taken = []

    def passing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(1).items():
            taken.append(name)
            yield name, tensor

    def full(self: Any, *args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(WeightFile, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(passing())
    assert taken == list(tensors(1))
    file.close()


def test_room_is_taken_at_the_start(tmp_path: Path) -> None:
    too_large = shutil.disk_usage(tmp_path).total
    with pytest.raises(OSError, match=r"No space|too large"):
        WeightFile({"a": Spec((too_large,), torch.float32)}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert WeightFile(specs(torch.float32), tmp_path).path.stat().st_blocks > 0
