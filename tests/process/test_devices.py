"""The devices that a process would see: the environment's, else those that nvidia-smi lists."""

import os
import subprocess
from pathlib import Path

import pytest

from rlhf.process import devices
from rlhf.types import UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [("0,1", ["0", "1"]), ("", []), ("-1", []), (" 3 , GPU-ab", ["3", "GPU-ab"])],
)
def test_the_environment_counts(
    monkeypatch: pytest.MonkeyPatch, given: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert devices.visible_devices() == expected


def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.visible_devices() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: B (UUID: y)'\n")
    os.chmod(tool, 0o755)
    assert devices.visible_devices() == ["0", "1"]


def test_a_device_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run", hang)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        devices.visible_devices()
