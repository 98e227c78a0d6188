"""One training run in a process of its own, for tests/checks/test_memory_measured.py: prints the
bytes that it takes beyond its libraries.

python memory_worker.py '{"engine": "torch", "zero": 0, "adapter": 0, "half": false, "tokens": 64}';
under torchrun each rank prints a line.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from conf.choices import AdapterKind, EngineKind, Offload, Quantization, Scheduler
from conf.schema import AdapterConfig, EngineConfig
from policy.adapters import attach, enable_checkpointing
from policy.engines.base import OptimSettings
from policy.engines.torch import make_engine
from policy.model import PolicyModule
from rlhf.checks.memory.shapes import llama
from rlhf.process import distributed
from rlhf.stages import methods

# 36M parameters
BIG: dict[str, Any] = {
    "vocab": 4000,
    "hidden": 512,
    "intermediate": 1536,
    "layers": 10,
    "heads": 8,
    "kv_heads": 8,
    "tied": True,
}
SMALL = {**BIG, "hidden": 64, "intermediate": 96, "layers": 1, "heads": 2, "kv_heads": 2}
CHUNK = 64


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM the most so far."""
    line = next(
        one
        for one in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if one.startswith(key)
    )
    return int(line.split()[1]) * 1024


def train(dims: dict[str, Any], case: dict[str, Any], tokens: int) -> None:
    """Two optimizer steps of two micro-batches each."""
    from transformers import AutoModelForCausalLM

    half = bool(case.get("half"))
    model = AutoModelForCausalLM.from_config(
        llama(**dims), dtype=torch.bfloat16 if half else torch.float32
    )
    if case.get("adapter"):
        methods.register()
        held = Quantization(case.get("quantize", "none"))
        adapter = AdapterConfig(kind=AdapterKind.lora, rank=case["adapter"], quantize=held)
        model = attach(model, adapter, task="CAUSAL_LM")
    if case.get("checkpointing"):
        enable_checkpointing(model)
    kind = EngineKind(case["engine"])
    cfg = EngineConfig(
        kind=kind, zero_stage=case.get("zero", 0), offload=Offload(case.get("offload", "none"))
    )
    optim = OptimSettings(1e-4, 0.0, (0.9, 0.999), 1e-8, 1.0, Scheduler.constant, 0, 2)
    module = PolicyModule(model, chunk=CHUNK)
    module.entropy_grad = False
    engine = make_engine(module, cfg, optim, torch.device("cpu"), half=half)
    engine.module.train()
    rows, length = max(1, tokens // 128), min(tokens, 128)
    ids = torch.randint(0, dims["vocab"], (rows, length))
    positions = torch.arange(length - 1).expand(rows, -1)
    for _ in range(2):
        for last in (False, True):
            logprobs, _ = engine(
                ids, positions, ids[:, 1:], torch.ones(rows, length - 1, dtype=torch.bool)
            )
            engine.backward(-logprobs.mean() / 2, last=last)
        engine.step()


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    distributed.initialise()
    # libraries, kernels and thread pools are there before anything is measured
    train(SMALL, case, 64)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    train(BIG, case, case["tokens"])
    print(
        "measured",
        json.dumps(
            {
                "rank": int(os.environ.get("RANK", "0")),
                "before": before,
                "bytes": status("VmHWM") - before,
            }
        ),
        flush=True,
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()
