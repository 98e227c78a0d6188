"""Batches that must not be applied (a NaN, an infinity, a spike), written where a person can look
at them.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlhf.process import distributed

KEPT = 5  # batches that get a name of their own; further ones replace each other


class BadBatches:
    """The names of a run's bad batches on this rank."""

    def __init__(
        self, directory: Path, name: str = "diverged-{}-rank-{}", step: str = "step-{}"
    ) -> None:
        """directory: the run's; name, step: patterns of a file's name and of its step."""
        self.directory = directory
        self.name, self.step = name, step
        self.count = 0

    def next_path(self, step: int) -> Path:
        """Where the bad batch of optimizer or online step `step` (from 1) goes, without a suffix:
        ``diverged-step-N-rank-R``, or ``diverged-last-rank-R`` after `KEPT` of them.
        """
        self.count += 1
        which = self.step.format(step) if self.count <= KEPT else "last"
        return self.directory / self.name.format(which, distributed.rank())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name into a safetensors file."""
    from safetensors.torch import save_file

    # clones, since safetensors refuses tensors that share memory
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, str(path))
