"""Backends, each tried in a process of its own: importing one can end the interpreter (an illegal
instruction on an old CPU) or patch torch for everything after it.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from conf.choices import EngineKind, Offload, RolloutBackend, TrackingKind, WandbMode
from conf.model import AdamKernels
from conf.schema import EngineConfig, TrackingConfig
from rlhf.run.tracking.wandb import wandb_login, wandb_mode
from rlhf.stages.examination.findings import Finding, State
from rlhf.types import UserError

PROBE_SECONDS = 240.0  # a cold import of vLLM takes about 20 s on 2 cores


@dataclass(frozen=True, slots=True)
class Probe:
    """How a child process ended."""

    code: int  # exit status; negative: the signal that ended it
    out: str  # last line of its standard output
    error: str  # last line of its standard error


def probe(code: str, env: Mapping[str, str]) -> Probe:
    """Run `code` in a fresh interpreter."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env={**os.environ, **env},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe(code=124, out="", error=f"no answer within {PROBE_SECONDS:.0f} s")
    return Probe(code=done.returncode, out=last_line(done.stdout), error=last_line(done.stderr))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def judge_probe(name: str, result: Probe, *, required: bool, remedy: str) -> Finding:
    """`required`: the chosen configuration cannot do without this backend."""
    if result.code == 0:
        return Finding(name, State.ok, f"usable, {result.out}")
    if result.code == -4:
        reason = "illegal instruction: this build does not run on this CPU"
    elif result.code < 0:
        reason = f"ended by signal {-result.code}"
    else:
        reason = result.error or f"exit code {result.code}"
    return Finding(name, State.fail if required else State.warn, f"not usable: {reason}", remedy)


def check_transformers() -> Finding:
    """A broken neighbour (torchvision, an old huggingface_hub) shows here first."""
    code = (
        "import transformers, trl, peft; from trl import SFTTrainer; print(f'transformers "
        "{transformers.__version__}, trl {trl.__version__}')"
    )
    return judge_probe(
        "transformers and TRL", probe(code, {}), required=True, remedy="make setup in a fresh .venv"
    )


def check_vllm(backend: RolloutBackend) -> Finding:
    """``rollout=vllm`` needs it; ``rollout=auto`` falls back to Hugging Face generate with a
    warning.
    """
    result = probe(
        "import vllm; from vllm import LLM, SamplingParams; print('vLLM', vllm.__version__)",
        {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    remedy = "install the cpu or cuda extra, or rollout=hf"
    return judge_probe("vLLM", result, required=backend is RolloutBackend.vllm, remedy=remedy)


def check_deepspeed(engine: EngineKind) -> Finding:
    """``engine=zero0`` to ``zero3`` need it."""
    code = (
        "import torch, os; torch.cuda.is_available() or "
        "os.environ.setdefault('DS_ACCELERATOR', 'cpu'); import deepspeed"
    )
    code += (
        "; from deepspeed.accelerator import get_accelerator as g; print(f'DeepSpeed "
        "{deepspeed.__version__} on {g().device_name()}')"
    )
    return judge_probe(
        "DeepSpeed",
        probe(code, {}),
        required=engine is EngineKind.deepspeed,
        remedy="make setup, or engine=torch",
    )


def check_extensions(engine: EngineConfig) -> Finding:
    """What DeepSpeed has to compile for engine.adam=deepspeed and engine.offload=nvme: a minute or
    two at the first time.
    """
    name = "DeepSpeed's extensions"
    asked = []
    if engine.adam is AdamKernels.deepspeed:
        asked.append("engine.adam=deepspeed")
    if engine.offload is Offload.nvme:
        asked.append("engine.offload=nvme")
    if not asked:
        return Finding(name, State.info, "none asked for (engine.adam, engine.offload)")
    code = (
        "from conf.model import *; from policy.engines.deepspeed import check_extensions; "
        f"check_extensions({_as_code(engine)}, waits=False); "
        f"print('compiled for {', '.join(asked)}')"
    )
    remedy = "engine.adam=torch, engine.offload=cpu, or what the message asks for"
    return judge_probe(name, probe(code, {}), required=True, remedy=remedy)


def _as_code(engine: EngineConfig) -> str:
    """The options that `check_extensions` reads, as Python code."""
    return (
        "EngineConfig(kind=EngineKind.deepspeed, zero_stage=3, nvme_path='.', "
        f"adam=AdamKernels('{engine.adam.value}'), offload=Offload('{engine.offload.value}'))"
    )


def check_wandb(tracking: TrackingConfig) -> Finding:
    """Whether ``tracking=wandb`` would be online. Nothing is sent."""
    if tracking.kind is not TrackingKind.wandb:
        return Finding("W&B", State.info, f"not used (tracking={tracking.kind.value})")
    try:
        mode, login = wandb_mode(tracking), wandb_login()
    except UserError as error:
        return Finding("W&B", State.fail, str(error))
    if mode is WandbMode.online:
        return Finding("W&B", State.ok, "online, a login exists")
    return Finding(
        "W&B",
        State.info,
        f"offline ({'a login exists' if login else 'no login'}): the closing panel prints the "
        "sync command",
    )
