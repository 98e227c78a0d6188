"""The CUDA devices of this machine, found without torch."""

import os
import re
import shutil
import subprocess

from rlhf.types import UserError

_LIST_LIMIT_S = 30.0  # nvidia-smi of a sick device may hang


def visible_devices() -> list[str]:
    """The CUDA devices that a process started here would see, in the words of
    CUDA_VISIBLE_DEVICES.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        return [name for name in names if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_LIST_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"nvidia-smi -L gave no answer within {_LIST_LIMIT_S:g} s. Set CUDA_VISIBLE_DEVICES "
            "to the devices that the run may use."
        ) from error
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)
