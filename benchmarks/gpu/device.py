"""The device as it is: its name, what it computes at most, and the memory in use.

python -m benchmarks.gpu.device     prints a line of JSON
"""

import contextlib
import json
import re
import subprocess
import threading
import time
from pathlib import Path

from benchmarks.shared import descendants

# Dense bfloat16 products, TFLOP/s, of the makers' data sheets
SHEET_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "L4": 121.0,
    "A10": 125.0,
}
_EVERY_S = 0.25


def measure() -> dict[str, object]:
    """Name, versions, and the rate of large matrix products in the dtype that training uses."""
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, object] = {"cuda": cuda, "torch": torch.__version__}
    side, repeats = (8192, 10) if cuda else (1024, 3)
    dtype = torch.bfloat16 if cuda else torch.float32
    device = "cuda" if cuda else "cpu"
    if cuda:
        found["name"] = torch.cuda.get_device_name(0)
        found["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    else:
        found["name"] = "CPU"
    one = torch.randn(side, side, dtype=dtype, device=device)
    other = torch.randn(side, side, dtype=dtype, device=device)

    def products() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            out = one @ other
        float(out[0, 0])  # waits for the device
        return time.perf_counter() - began

    products()
    found["matmul_tflops"] = repeats * 2 * side**3 / products() / 1e12
    found["sheet_tflops"] = sheet_tflops(str(found["name"]))
    return found


def sheet_tflops(name: str) -> float | None:
    """Of a device's name; None for one that is not in the list."""
    for known, rate in SHEET_TFLOPS.items():
        if re.search(rf"\b{known}\b", name):
            return rate
    return None


class MemoryWatch(threading.Thread):
    """The most memory in use while a process and its children ran, above what was in use before:
    of the CUDA device by nvidia-smi, else of the processes themselves.
    """

    def __init__(self, *, cuda: bool) -> None:
        super().__init__(daemon=True)
        self.cuda = cuda
        self.before = device_mib() if cuda else 0.0
        self.process: int | None = None
        self.peak_gib = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(_EVERY_S):
            mib = device_mib() - self.before if self.cuda else self._processes_mib()
            self.peak_gib = max(self.peak_gib, mib / 1024)

    def _processes_mib(self) -> float:
        if self.process is None:
            return 0.0
        return sum(proportional_mib(one) for one in [self.process, *descendants(self.process)])

    def stop(self) -> float:
        """GiB."""
        self.ended.set()
        self.join()
        return self.peak_gib


def device_mib() -> float:
    """Memory in use on the first CUDA device; 0 where nvidia-smi can't say."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return float(done.stdout.split()[0])
    return 0.0


def proportional_mib(process: int) -> float:
    """Resident memory of a process, where what it shares with others counts in part; 0 where it has
    ended.
    """
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        for line in rollup.splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    print(json.dumps(measure()))
