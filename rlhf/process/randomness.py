"""Every random generator of this process: seeded at the start, saved, and restored on resume."""

import logging
import random
import sys
from pathlib import Path
from typing import Any

from rlhf.process import distributed

LOG = logging.getLogger("rlhf.process.randomness")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device). Samplers and data loaders take their own seeds
    from ``run.seed``. A torch that is not imported yet is not: whoever imports it later seeds it.
    """
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below us draw from the global generator
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


def state() -> dict[str, Any]:
    """The generators' states, of types that ``torch.load(weights_only=True)`` reads."""
    import numpy as np
    import torch

    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        # of this rank's device
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore(stored: dict[str, Any]) -> None:
    """Set the generators to what `state` returned."""
    import numpy as np
    import torch

    random.setstate(stored["python"])
    name, keys, position, has_gauss, gauss = stored["numpy"]
    numpy_state = (name, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(stored["torch"])
    if stored["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(stored["cuda"])


def _file(directory: Path) -> Path:
    return directory / f"random-{distributed.rank()}.pt"


def save(directory: Path) -> None:
    """This rank's generators, into `directory`."""
    import torch

    torch.save(state(), _file(directory))


def load(directory: Path, seed: int) -> None:
    """Restore this rank's generators from `directory`.

    Where another number of ranks saved it, all ranks start anew from `seed`, with a warning.
    """
    import torch

    saved = len(list(directory.glob("random-*.pt")))
    if saved != distributed.world_size():
        begin_anew(saved, seed)
        return
    restore(torch.load(_file(directory), weights_only=True))


def begin_anew(saved: int | str, seed: int) -> None:
    """Seed this rank's generators: those of `saved` ranks belong to other rows."""
    if distributed.is_main():
        LOG.warning(
            "resume: the random generators of %s ranks don't fit %d: each rank's start anew from "
            "run.seed and the step. Dropout draws from them; "
            "prompts and samples do not.",
            saved,
            distributed.world_size(),
        )
    seed_everything(seed)
