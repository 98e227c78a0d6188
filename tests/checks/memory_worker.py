"""Training runs, for tests/checks/test_memory_measured.py: prints the bytes that each takes beyond
its libraries.

python memory_worker.py '[{"engine": "torch", "tokens": 64}, ...]': each case in a process forked
from this one, so that libraries are imported once; a single case in this one. A case's other keys:
zero, half, offload, adam, checkpointing; adapter, the name of a preset, and options, overrides
beside it; layers, as stage.train.layers; unfreeze, for the first phase of layer-wise training.
Under torchrun each rank prints a line.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from conf.choices import EngineKind, Offload, Scheduler
from conf.model import AdamKernels
from conf.schedule import TrainPart
from conf.schema import EngineConfig
from policy.adapters import attach, enable_checkpointing, rates_of
from policy.engines.base import OptimSettings
from policy.engines.torch import make_engine
from policy.model import PolicyModule
from rlhf.checks.memory.shapes import llama
from rlhf.cli import config
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


def composed(case: dict[str, Any]) -> Any:
    """The configuration of a case's adapter, parts and unfreezing."""
    parts = ["stage.learning_rate=1e-4"]
    if case.get("layers"):
        parts.append(f"stage.train.layers={case['layers']}")
    if case.get("unfreeze"):
        parts.append("stage.unfreeze.every=100")
    return config.compose(
        ["stage=sft", f"adapter={case.get('adapter', 'none')}", *case.get("options", []), *parts]
    )


def rows_of(vocab: int, count: int, length: int) -> list[list[int]]:
    """Rows of token ids for methods that look at data first."""
    ids: list[list[int]] = torch.randint(0, vocab, (count, length)).tolist()
    return ids


def train(dims: dict[str, Any], case: dict[str, Any], cfg: Any, tokens: int) -> None:
    """Two optimizer steps of two micro-batches each."""
    from transformers import AutoModelForCausalLM

    half = bool(case.get("half"))
    model = AutoModelForCausalLM.from_config(
        llama(**dims), dtype=torch.bfloat16 if half else torch.float32
    )
    train = cfg.stage.train
    if train.layers is not None:
        train = TrainPart(layers=min(train.layers, dims["layers"]))
    model = attach(
        model,
        cfg.adapter,
        task="CAUSAL_LM",
        train=train,
        sample=lambda: rows_of(dims["vocab"], 8, 32),
    )
    if case.get("checkpointing"):
        enable_checkpointing(model)
    engine_cfg = EngineConfig(
        kind=EngineKind(case["engine"]),
        zero_stage=case.get("zero", 0),
        offload=Offload(case.get("offload", "none")),
        adam=AdamKernels(case.get("adam", "auto")),
    )
    optim = OptimSettings(1e-4, 0.0, (0.9, 0.999), 1e-8, 1.0, Scheduler.constant, 0, 2)
    module = PolicyModule(model, chunk=CHUNK)
    module.entropy_grad = False
    rates = rates_of(model, cfg.stage, cfg.adapter)
    engine = make_engine(module, engine_cfg, optim, torch.device("cpu"), half=half, rates=rates)
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


def measure(number: int, case: dict[str, Any]) -> None:
    """Print what the case takes."""
    cfg = composed(case)
    # libraries, kernels and thread pools are there before anything is measured
    train(SMALL, case, cfg, 64)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    train(BIG, case, cfg, case["tokens"])
    found = {
        "case": number,
        "rank": int(os.environ.get("RANK", "0")),
        "before": before,
        "bytes": status("VmHWM") - before,
    }
    print("measured", json.dumps(found), flush=True)


def in_a_process(number: int, case: dict[str, Any]) -> None:
    """Measure a case in a process forked from this one. Raises RuntimeError where it fails."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            measure(number, case)
            code = 0
        finally:
            if code:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)  # never into what the parent has to end
    _, ended = os.waitpid(child, 0)
    if ended != 0:
        raise RuntimeError(f"case {number} failed: {case}")


def main() -> None:
    cases = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    distributed.initialise()
    methods.register()
    if len(cases) == 1:
        measure(0, cases[0])
    else:
        composed(cases[0])  # what composing imports
        import transformers.models.llama.modeling_llama  # noqa: F401

        for number, case in enumerate(cases):
            in_a_process(number, case)
    distributed.shutdown()


if __name__ == "__main__":
    main()
