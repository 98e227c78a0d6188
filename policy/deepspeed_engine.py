"""DeepSpeed: the only file that imports it, lazily, so that engine=torch never pays for it."""

import os

import torch


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
