"""Steps of AdamW by torch and by DeepSpeed's kernels, on the same gradients: `test_adam` starts it.
Prints the largest difference of any weight, or why the kernels can't be compiled.

usage: python -m tests.policy.adam_worker ZERO_STAGE OFFLOAD FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from conf.choices import EngineKind, Offload
from conf.model import AdamKernels
from conf.schema import EngineConfig
from policy.engines.deepspeed import DeepSpeedEngine, build, prepare_cpu
from policy.saving import full_weights
from tests.policy.deepspeed_worker import WIDTH, Regression
from tests.policy.test_engine import OPTIM

STEPS, ROWS = 5, 8


def steps(cfg: EngineConfig, folder: Path) -> dict[str, Tensor]:
    """The weights after some steps, the last ones after a checkpoint was loaded."""
    torch.manual_seed(0)
    module = Regression()
    engine = DeepSpeedEngine(module, cfg, OPTIM, torch.device("cpu"), half=False)
    rows = torch.randn(STEPS, ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    for number, row in enumerate(rows):
        if number == 3:
            engine.save(folder / cfg.adam.value)
            engine.load(folder / cfg.adam.value)
        engine.backward((engine(row) ** 2).mean(), last=True)
        engine.step()
    tensors = full_weights(module.model, engine.gather).tensors
    return {name: tensor.clone() for name, tensor in tensors}


def main() -> None:
    stage, offload, folder = sys.argv[1:]
    prepare_cpu()
    reason = build("cpu_adam")
    if reason is not None:
        sys.stdout.write(f"reason {reason}\n")
        return
    found = []
    for adam in (AdamKernels.torch, AdamKernels.deepspeed):
        cfg = EngineConfig(
            kind=EngineKind.deepspeed, zero_stage=int(stage), offload=Offload(offload), adam=adam
        )
        found.append(steps(cfg, Path(folder)))
    plain, kernels = found
    gaps = [float((kernels[name] - plain[name]).abs().max()) for name in plain]
    moved = max(float(tensor.abs().max()) for tensor in plain.values())
    sys.stdout.write(f"difference {max(gaps)} of {moved}\n")


if __name__ == "__main__":
    main()
