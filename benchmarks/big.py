"""What big models ask for, measured on one: the peak memory of two ranks that load it whole or in
parts (engine=zero3), and time and memory of a step with and without gradient checkpointing.

    python -m benchmarks.big loading MODEL [--dtype float32]
    python -m benchmarks.big checkpointing MODEL [--tokens 2048]

MODEL is a directory of whole weights, such as the recipe of experiment=smollm2 writes. Every figure
is of processes of their own; a line is printed for each rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from conf.choices import Dtype, EngineKind, Scheduler
from conf.schema import EngineConfig, ModelConfig
from policy.adapters import enable_checkpointing
from policy.engines.base import OptimSettings
from policy.engines.loading import Loader
from policy.engines.torch import freeze, make_engine
from policy.model import PolicyModule
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.process import distributed
from rlhf.stages import methods

OPTIM = OptimSettings(1e-5, 0.0, (0.9, 0.999), 1e-8, 1.0, Scheduler.constant, 0, 8)
ROW = 512  # tokens
STEPS = 4  # the first is not counted
# Every tensor of 64 KiB or more is a mapping of its own and goes back when it is freed.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def mib(key: str) -> float:
    """A line of /proc/self/status: VmRSS, RssAnon (its part that no file backs), VmHWM (the most
    since `restart_peak`).
    """
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(one for one in text.splitlines() if one.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def restart_peak() -> None:
    """Let VmHWM count anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def tell(**figures: Any) -> None:
    shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}
    sys.stdout.write(json.dumps({"rank": distributed.rank(), **shown}) + "\n")
    sys.stdout.flush()


class Phases:
    """Prints what each phase adds to the memory that the process had before the first."""

    def __init__(self, mode: str) -> None:
        self.mode, self.before = mode, mib("VmRSS")
        restart_peak()

    def end(self, phase: str) -> None:
        """The phase `phase` ends here."""
        tell(
            mode=self.mode,
            phase=phase,
            peak_mib=mib("VmHWM") - self.before,
            then_mib=mib("VmRSS") - self.before,
            then_anon_mib=mib("RssAnon"),
        )
        distributed.barrier()
        restart_peak()


def step(engine: Any, tokens: int, vocabulary: int) -> float:
    """Seconds of a step on rows of ROW tokens."""
    ids = torch.randint(5, vocabulary, (max(1, tokens // ROW), ROW))
    positions = torch.arange(ROW - 1).expand(len(ids), -1)
    mask = torch.ones(len(ids), ROW - 1, dtype=torch.bool)
    began = time.perf_counter()
    logprobs, _ = engine(ids, positions, ids[:, 1:], mask)
    engine.backward(-logprobs.mean(), last=True)
    engine.step()
    return time.perf_counter() - began


def load_on_two_ranks(mode: str, source: ModelConfig) -> None:
    """A policy and its reference under ZeRO-3, and a step."""
    from policy.engines.deepspeed import ensure_process_group, prepare_cpu
    from policy.engines.parts import PartsLoader

    distributed.initialise()
    prepare_cpu()
    ensure_process_group()
    dtype = getattr(torch, source.dtype.value)
    half, device = dtype is torch.bfloat16, torch.device("cpu")
    cfg = EngineConfig(kind=EngineKind.deepspeed, zero_stage=3)
    loader = PartsLoader(cfg, dtype) if mode == "parts" else Loader()
    tokenizer = load_tokenizer(source)
    phases = Phases(mode)
    model = loader.load(lambda: load_causal_lm(source, tokenizer))
    phases.end("policy loaded")
    engine = make_engine(PolicyModule(model, chunk=64), cfg, OPTIM, device, half=half)
    phases.end("policy's engine made")
    other = loader.load(lambda: load_causal_lm(source, tokenizer))
    reference = freeze(PolicyModule(other, chunk=64), cfg, device, half=half)
    del other
    phases.end("reference loaded")
    step(engine, ROW, len(tokenizer))
    phases.end("a step")
    del reference
    distributed.shutdown()


def checkpoint(mode: str, source: ModelConfig, tokens: int) -> None:
    """Steps of engine=torch with (`mode` on) or without gradient checkpointing."""
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, tokenizer)
    if mode == "on":
        enable_checkpointing(model)
    module = PolicyModule(model, chunk=64)
    engine = make_engine(
        module, EngineConfig(), OPTIM, torch.device("cpu"), half=source.dtype is Dtype.bfloat16
    )
    module.train()
    seconds = [step(engine, tokens, len(tokenizer))]
    held = mib("VmRSS")
    restart_peak()
    seconds += [step(engine, tokens, len(tokenizer)) for _ in range(STEPS - 1)]
    tell(
        checkpointing=mode,
        step_s=statistics.median(seconds[1:]),
        peak_mib=mib("VmHWM"),
        between_steps_mib=held,
        tokens=tokens,
    )


def start(args: argparse.Namespace, mode: str) -> None:
    """A measurement in processes of its own."""
    environment = os.environ | HEAP | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m"]
    if args.what == "loading":
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["benchmarks.big", args.what, args.model, "--mode", mode]
    command += ["--dtype", args.dtype, "--tokens", str(args.tokens)]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("loading", "checkpointing"))
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--mode", help="of one measurement, in this process")
    args = parser.parse_args()
    source = ModelConfig(path=args.model, dtype=Dtype(args.dtype))
    if args.mode is None:
        for mode in ("whole", "parts") if args.what == "loading" else ("off", "on"):
            start(args, mode)
        return
    methods.register()
    distributed.set_threads(1)
    if args.what == "loading":
        load_on_two_ranks(args.mode, source)
    else:
        checkpoint(args.mode, source, args.tokens)


if __name__ == "__main__":
    main()
