"""DeepSpeed's universal checkpoint, completed so that every ZeRO stage reads it. Run as a program:
``python -m policy.engines.universal CHECKPOINT TARGET``.

DeepSpeed's own converter leaves two forms: what comes from ZeRO-1 or 2 only they can load, and what
comes from ZeRO-3 only ZeRO-3. Both hold the same whole tensors by name, so the few entries that the
other one looks for are added here, and what no loader reads is left out.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from policy.engines.deepspeed import to_universal
from policy.engines.resharding import checkpoint_classes

STATES = ("fp32", "exp_avg", "exp_avg_sq")
_SKIPPED = ("latest", "zero_to_fp32.py", "checksums.json")
# bytes of a checkpoint from which on processes beside each other are worth their start
_POOL_FROM = 1 << 30
# as ZeRO-1 and 2 name it, and ZeRO-3
_METADATA = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def convert(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint's universal form into the folder `target`: DeepSpeed's folders converted,
    small files copied, other weights left out. Raises ValueError where `checkpoint` holds no state
    of DeepSpeed's.
    """
    roots = sorted(path.parent for path in checkpoint.rglob("latest"))
    if not roots:
        raise ValueError(f"{checkpoint} holds no state of DeepSpeed's")
    converted = []
    for root in roots:
        state = _state_folder(root)
        converted.append(state)
        into = target / state.relative_to(checkpoint)
        into.mkdir(parents=True)
        size = sum(path.stat().st_size for path in state.glob("*.pt"))
        workers = min(4, os.cpu_count() or 1) if size > _POOL_FROM else 1
        with tempfile.TemporaryDirectory(dir=target) as aside:
            to_universal(with_moments(state, Path(aside)), into, workers=workers)
        complete(into)
    for path in sorted(checkpoint.rglob("*")):
        copied = path.is_file() and path.name not in _SKIPPED and path.suffix != ".safetensors"
        if copied and not any(path.is_relative_to(folder) for folder in converted):
            copy = target / path.relative_to(checkpoint)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


def _state_folder(root: Path) -> Path:
    """The folder of the state that the file ``latest`` in `root` names. Raises ValueError for a
    name that is no folder beside it.
    """
    tag = (root / "latest").read_text(encoding="utf-8").strip()
    if tag != Path(tag).name or not (root / tag).is_dir():
        raise ValueError(f"{root / 'latest'} names {tag!r}, which is no folder beside it")
    return root / tag


def _read(path: Path, *, lazily: bool = False) -> Any:
    with torch.serialization.safe_globals(checkpoint_classes()):
        return torch.load(path, weights_only=True, map_location="cpu", mmap=lazily)


def with_moments(folder: Path, aside: Path) -> Path:
    """A folder with the same state and Adam's moments: `folder` itself where it has them, else
    `aside`.

    An optimizer that took no step yet (the policy's while the critic warms up) has none, and
    DeepSpeed's converter would stop there. Step 0 and moments of zero are what it starts from.
    """
    files = sorted(folder.glob("*_optim_states.pt"))
    for path in files:
        content = _read(path, lazily=True)
        whole = content["optimizer_state_dict"]
        zero3 = "base_optimizer_state" not in whole
        base = whole["optimizer_state_dict" if zero3 else "base_optimizer_state"]
        masters = whole.get("single_partition_of_fp32_groups", whole.get("fp32_flat_groups"))
        if all(number in base["state"] for number in range(len(masters))):
            return folder
        for number, master in enumerate(masters):
            zeros = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            base["state"].setdefault(number, zeros)
        torch.save(content, aside / path.name)
    for path in folder.glob("*_model_states.pt"):
        (aside / path.name).symlink_to(path.resolve())
    return aside if files else folder


def complete(folder: Path) -> None:
    """Bring what DeepSpeed's converter wrote into the one form that the loaders of ZeRO-1, 2 and 3
    all read.
    """
    zero = folder / "zero"
    optimizer = _read(zero / "optimizer_state.pt")
    groups = optimizer["param_groups"]
    folders = [path.parent for path in sorted(zero.rglob("fp32.pt"))]
    state = optimizer.get("optimizer_state_dict", {}).get("state", {})  # of ZeRO-3
    step = state[0]["step"] if state else _read(min(zero.rglob("step.pt")))
    for of_tensor in folders:
        for kind in STATES:
            path = of_tensor / f"{kind}.pt"
            value = _read(path) if path.is_file() else None
            if isinstance(value, torch.Tensor):
                torch.save({"param": value.clone()}, path)
        if (of_tensor / "exp_avg.pt").is_file():
            torch.save(step, of_tensor / "step.pt")
    states = sorted(folder.glob("*_model_states.pt"))
    # a universal load takes weights from zero/ alone
    metadata = {k: v for k, v in _read(states[0], lazily=True).items() if k != "module"}
    for path in states:
        path.unlink()
    for name in _METADATA:
        torch.save(metadata, folder / name)
    # Every rank reads this file: without rank 0's part of the state, which the converter leaves in
    # it.
    kept = {
        k: v for k, v in optimizer.items() if k not in ("fp32_flat_groups", "optimizer_state_dict")
    }
    slim = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(
        kept | {"ds_version": metadata["ds_version"], "optimizer_state_dict": slim},
        zero / "optimizer_state.pt",
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
