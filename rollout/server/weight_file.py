"""One safetensors file that the trainer writes tensor by tensor and servers read.

The format's header needs each tensor's size before the first is written; the generator's specs have
them all. Each version is written into the same file: its pages in memory are there already then.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.process.files import OwnFolder
from rollout.weights import Spec

_FILE = "model.safetensors"
# safetensors' names
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WeightFile:
    """The file, in a folder that ends with this object or its process."""

    def __init__(self, specs: Mapping[str, Spec], place: Path | None) -> None:
        """`place`: None: the system's folder for temporary files. Raises OSError, as where the disk
        or the memory has no room for the whole file.
        """
        self._folder = OwnFolder("weights", place)
        self.path = self._folder.path / _FILE
        self._specs = specs
        header, self._offsets, total = _layout(specs)
        self._start = len(header)
        try:
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, len(header) + total)
                file.write(header)
        except OSError:
            self.close()
            raise

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write each of the `tensors` in its place, in the dtype of its spec. All of them are taken
        even where one can't be written. Raises OSError.
        """
        failure: OSError | None = None
        with self.path.open("r+b", buffering=0) as file:
            for name, tensor in tensors:
                if failure is None:
                    try:
                        self._put(file, name, tensor)
                    except OSError as error:
                        failure = error
            if failure is None:
                os.fsync(file.fileno())  # for readers on other hosts
        if failure is not None:
            raise failure

    def _put(self, file: Any, name: str, tensor: Tensor) -> None:
        held = tensor.detach().to("cpu", self._specs[name].dtype).contiguous()
        numbers: Any = held.reshape(-1).view(torch.uint8).numpy()
        data = memoryview(numbers)
        file.seek(self._start + self._offsets[name])
        while data:
            data = data[file.write(data) :]  # at most 2 GiB at a time

    def close(self) -> None:
        """Delete it."""
        self._folder.close()


def read_tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time, in the order in which they lie in it.
    Raises OSError.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.offset_keys():
            yield name, file.get_tensor(name)


def _layout(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    """The file's header, where each tensor starts behind it, and the bytes of all tensors."""
    entries: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    end = 0
    # wide dtypes first, so that every tensor is aligned
    ordered = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, spec in ordered:
        start, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        offsets[name] = start
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end
