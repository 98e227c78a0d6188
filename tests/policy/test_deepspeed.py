"""How our engines ask DeepSpeed to add gradients."""

import subprocess
import sys

import pytest

from conf.choices import Dtype, EngineKind
from conf.schema import EngineConfig
from policy.engines import loading
from rlhf.checks import launch


@pytest.mark.parametrize(
    ("zero", "half", "asked"),
    [(0, True, False), (1, True, False), (2, True, True), (3, True, True), (3, False, False)],
)
def test_bfloat16_gradients_are_added_in_float32(zero: int, half: bool, asked: bool) -> None:
    cfg = EngineConfig(kind=EngineKind.deepspeed, zero_stage=zero)
    found = loading.zero_config(cfg, hidden_size=8, half=half, max_grad_norm=1.0)
    assert (found.get("data_types") == {"grad_accum_dtype": "fp32"}) is asked


@pytest.mark.parametrize(
    ("zero", "dtype", "said"),
    [
        (0, Dtype.bfloat16, True),
        (1, Dtype.bfloat16, True),
        (1, Dtype.float32, False),
        (2, Dtype.bfloat16, False),
    ],
)
def test_sums_in_bfloat16_are_said(zero: int, dtype: Dtype, said: bool) -> None:
    cfg = EngineConfig(kind=EngineKind.deepspeed, zero_stage=zero)
    notes = launch.gradient_note(cfg, dtype)
    assert len(notes) == said
    assert all(f"engine=zero{zero} in bfloat16" in note for note in notes)
    assert launch.gradient_note(EngineConfig(), dtype) == []


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize(("zero", "offload"), [(2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_half_precision_gradients_do_not_depend_on_the_split(zero: int, offload: str) -> None:
    """Of 512 micro-batches; added in bfloat16 the error is 0.012."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.policy.deepspeed_worker", str(zero), offload],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert float(done.stdout.split("error")[-1]) < 0.002
