"""Whose AdamW steps the weights under DeepSpeed, and that the kernels agree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.choices import EngineKind, Offload
from conf.schedule import AdamKernels
from conf.schema import EngineConfig
from policy.engines import deepspeed
from policy.engines.loading import WaitingAdamW
from rlhf.types import UserError


def engine(adam: AdamKernels, offload: Offload = Offload.none) -> EngineConfig:
    return EngineConfig(kind=EngineKind.deepspeed, zero_stage=2, adam=adam, offload=offload)


def no_compiler(extension: str) -> str:
    return f"no compiler for {extension}"


def test_extensions_have_the_names_that_deepspeed_gives_them() -> None:
    deepspeed.prepare_cpu()
    from deepspeed.ops import op_builder

    for name, builder in deepspeed._BUILDERS.items():
        assert getattr(op_builder, builder)().name == name


def test_torch_steps_without_a_gpu() -> None:
    for adam in (AdamKernels.auto, AdamKernels.torch):
        for offload in (Offload.none, Offload.cpu):
            assert deepspeed.adam_kind(engine(adam, offload), waits=False) is torch.optim.AdamW
    assert deepspeed.adam_kind(engine(AdamKernels.auto), waits=True) is WaitingAdamW


def test_kernels_that_do_not_compile_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "build", no_compiler)
    with pytest.raises(UserError, match=r"engine\.adam=deepspeed.*no compiler for cpu_adam"):
        deepspeed.check_extensions(engine(AdamKernels.deepspeed), waits=False)
    with pytest.raises(UserError, match=r"engine\.adam=deepspeed.*stage\.unfreeze"):
        deepspeed.check_extensions(engine(AdamKernels.deepspeed), waits=True)
    deepspeed.check_extensions(engine(AdamKernels.auto), waits=False)


def test_a_gpu_without_a_compiler_steps_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deepspeed, "build", no_compiler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level("INFO"):
        kind = deepspeed.adam_kind(engine(AdamKernels.auto), waits=False)
    assert kind is torch.optim.AdamW
    assert "no compiler for fused_adam" in caplog.text


def test_nvme_without_its_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "build", no_compiler)
    cfg = EngineConfig(
        kind=EngineKind.deepspeed, zero_stage=3, offload=Offload.nvme, nvme_path="/x"
    )
    with pytest.raises(UserError, match=r"engine\.offload=nvme.*no compiler for async_io"):
        deepspeed.check_extensions(cfg, waits=False)


def test_the_torch_engine_has_no_kernels_of_deepspeeds() -> None:
    with pytest.raises(ValueError, match=r"engine\.adam"):
        EngineConfig(adam=AdamKernels.deepspeed)


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels are compiled, once for all cases."""
    return tmp_path_factory.mktemp("extensions")


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles with g++")
@pytest.mark.parametrize(
    ("zero", "offload"), [(0, "none"), (1, "cpu"), (2, "none"), (3, "none"), (3, "cpu")]
)
def test_kernels_step_as_torch_does(
    zero: int, offload: str, extensions: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.policy.adam_worker", str(zero), offload]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    assert "difference" in words, done.stdout
    difference, moved = float(words[-3]), float(words[-1])
    assert moved > 0.1
    assert difference < 1e-6
