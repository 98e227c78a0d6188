"""DeepSpeed: the only file that imports it, lazily, so that engine=torch never pays for it."""

import os

import torch
import torch.distributed as dist

from rlhf import distributed


def prepare_cpu() -> None:
    """Make DeepSpeed usable on ranks without a GPU; call it before anything else touches DeepSpeed. Does nothing where CUDA is.

    DeepSpeed would otherwise guess its accelerator from the installed packages, and `init_distributed` would compile a
    shared-memory collective for a minute or two that gloo does not need.
    """
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ensure_process_group() -> None:
    """Join the launcher's process group, or, without a launcher, make a group of this process alone: DeepSpeed wants one at one rank too."""
    distributed.initialise()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
