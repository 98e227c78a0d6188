"""NaN, infinities and spikes in the stages on TRL's trainers: the run stops, leaves the step out,
or goes back to its last checkpoint.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from trl import SFTTrainer

from conf.choices import AdapterKind, Dtype, EngineKind, OnNonFinite, Scheduler
from conf.schema import AdapterConfig, EngineConfig, ModelConfig, RunConfig
from conf.stages import SFTStage
from rlhf.checks import launch
from rlhf.offline import steps as guarding
from rlhf.offline.trainers import StageTrainer
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.stages import sft
from rlhf.types import TrainingDiverged, UserError
from tests.offline import trl_tools

pytestmark = pytest.mark.usefixtures("one_thread")
STAGE: dict[str, Any] = {
    "steps": 5,
    "batch_size": 8,
    "eval_steps": 1,
    "max_length": 32,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
}
BAD_STEP = 3
CALLS: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def fresh() -> None:
    CALLS.clear()


def run(folder: Path, name: str = "x", **groups: Any) -> Path:
    stage = SFTStage(**(STAGE | groups.pop("stage", {})))
    run_config = RunConfig(dir=str(folder / "runs"), name=name, keep_checkpoints=0)
    ctx = RunContext.open(
        trl_tools.config(stage, folder, name, trl_tools.sft_rows(), run=run_config, **groups)
    )
    sft.run(ctx, stage_rows)
    return ctx.dir


def break_loss(
    monkeypatch: pytest.MonkeyPatch, factor: float = math.nan, steps: tuple[int, ...] = (BAD_STEP,)
) -> None:
    """The loss of those training steps, times `factor`."""
    real = SFTTrainer.compute_loss

    def changed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(trainer, *args, **kwargs)
        if not trainer.model.training:
            return result
        CALLS["loss"] += 1
        if CALLS["loss"] not in steps:
            return result
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(SFTTrainer, "compute_loss", changed)


def break_gradient(monkeypatch: pytest.MonkeyPatch, factor: float = math.inf) -> None:
    """The gradient of one step, times `factor`."""
    real = transformers.Trainer._clip_grad_norm

    def changed(trainer: Any, model: Any) -> Any:
        CALLS["clip"] += 1
        if CALLS["clip"] == BAD_STEP:
            for param in model.parameters():
                if param.grad is not None:
                    param.grad.mul_(factor)
        return real(trainer, model)

    monkeypatch.setattr(transformers.Trainer, "_clip_grad_norm", changed)


FAULTS = {"loss": break_loss, "gradient": break_gradient}


def weights(place: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(
        next((place / "checkpoints" / f"checkpoint-{step}").glob("*model.safetensors"))
    )


def moments(place: Path, step: int) -> list[torch.Tensor]:
    state = torch.load(
        place / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True
    )["state"]
    return [value["exp_avg_sq"] for _, value in sorted(state.items())]


def same(place: Path, one: int, other: int) -> bool:
    """Whether weights and optimizer of two checkpoints are."""
    first, second = weights(place, one), weights(place, other)
    alike = all(torch.equal(first[name], second[name]) for name in first)
    return alike and all(
        torch.equal(a, b) for a, b in zip(moments(place, one), moments(place, other), strict=True)
    )


def figures(place: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((place / "summary.json").read_text(encoding="utf-8"))[
        "metrics"
    ]
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_skip_leaves_the_step_out_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    FAULTS[fault](monkeypatch)
    place = run(tmp_path, stage={"on_nonfinite": OnNonFinite.skip})
    assert same(place, 3, 2), "neither weights nor optimizer moved"
    assert not same(place, 2, 1) and not same(place, 4, 3), "the comparison sees a step"
    assert (place / "diverged_step3_rank0.safetensors").exists() and (
        place / "diverged_step3_rank0.json"
    ).exists()
    assert figures(place)["train/skipped_total"] == 1.0 and figures(place)["train/rewinds"] == 0.0
    lines = trl_tools.metric_lines(place)
    assert [line["step"] for line in lines if line.get("train/skipped")] == [3]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses.keys() == {1, 2, 4, 5} and all(math.isfinite(loss) for loss in losses.values())


def test_the_logged_loss_is_the_mean_of_the_steps_that_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = {}
    for every in (1, 5):
        with monkeypatch.context() as patch:
            CALLS.clear()
            break_loss(patch)
            stage = {"on_nonfinite": OnNonFinite.skip, "log_steps": every, "eval_steps": 5}
            place = run(tmp_path, f"every{every}", stage=stage)
        means[every] = [
            line["loss"]
            for line in trl_tools.metric_lines(place)
            if "loss" in line and (every == 1 or line["step"] == 5)
        ]
    assert len(means[1]) == 4 and len(means[5]) == 1
    # transformers logs the first step by itself, so the last line is about steps 2 to 5, of which
    # the third was left out
    assert means[5][0] == pytest.approx(statistics.fmean(means[1][1:]), rel=1e-3)


def go_back_to_the_first(patch: pytest.MonkeyPatch) -> None:
    """A rewind goes to the checkpoint of step 1 rather than to that of the step before, so that
    going back is seen.
    """
    newest = guarding.checkpoints.newest
    patch.setattr(
        guarding.checkpoints,
        "newest",
        lambda folder: ((folder / "checkpoint-1", 1), newest(folder)[1]),
    )


LORA = AdapterConfig(kind=AdapterKind.lora, rank=4)


@pytest.mark.parametrize(
    ("fault", "adapter"),
    [("loss", AdapterConfig()), ("gradient", AdapterConfig()), ("gradient", LORA)],
)
def test_rewind_goes_back_to_the_checkpoint_and_on_with_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, adapter: AdapterConfig
) -> None:
    FAULTS[fault](monkeypatch)
    used: list[float] = []
    before = StageTrainer.before_optimizer_step

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        """Right before the optimizer's step."""
        used.append(self.optimizer.param_groups[0]["lr"])
        before(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        go_back_to_the_first(patch)
        patch.setattr(StageTrainer, "before_optimizer_step", noting)
        place = run(tmp_path, stage=REWIND, adapter=adapter)
    assert used == pytest.approx([STAGE["learning_rate"] * (5 - step) / 5 for step in range(5)]), (
        "the step after a rewind has its own rate"
    )
    assert same(place, 3, 1) and not same(place, 2, 1) and not same(place, 4, 3)
    check_rewound(place)


REWIND = {"on_nonfinite": OnNonFinite.rewind, "scheduler": Scheduler.linear}


def check_rewound(place: Path) -> None:
    assert figures(place)["train/rewinds"] == 1.0 and figures(place)["train/skipped_total"] == 1.0
    lines = trl_tools.metric_lines(place)
    assert [line["step"] for line in lines if line.get("train/rewinds") == 1.0] == [3]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert len(rates) == 4 and rates == sorted(rates, reverse=True) and len(set(rates)) == 4, (
        "the schedule is not turned back"
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_rewind_under_zero_on_two_ranks(tmp_path: Path, zero: int) -> None:
    """DeepSpeed has applied the NaN by the time that it is seen, to all ranks' parts."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.offline.test_guards",
    ]
    extra = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*command, str(tmp_path), str(zero)],
        env=os.environ | extra,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    place = tmp_path / "runs" / "x" / "sft"
    check_rewound(place)
    whole = [masters(place, step) for step in (1, 2, 3, 4)]
    assert all(torch.isfinite(tensor).all() for tensors in whole for tensor in tensors)
    alike = [
        all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in ((whole[2], whole[0]), (whole[1], whole[0]))
    ]
    assert alike == [True, False] and not all(
        torch.equal(a, b) for a, b in zip(whole[3], whole[2], strict=True)
    )


def masters(place: Path, step: int) -> list[torch.Tensor]:
    """The float32 weights of a DeepSpeed checkpoint, put together from all ranks."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = get_fp32_state_dict_from_zero_checkpoint(
        str(place / "checkpoints" / f"checkpoint-{step}")
    )
    return [tensor for _, tensor in sorted(whole.items())]


def worker(folder: Path, zero: int) -> None:
    """A rank of the test above: one rank's loss is NaN in one step."""
    torch.set_num_threads(1)
    distributed.initialise()
    patch = pytest.MonkeyPatch()
    go_back_to_the_first(patch)
    break_loss(patch, steps=(BAD_STEP,) if distributed.rank() == 1 else ())
    run(folder, stage=REWIND, engine=EngineConfig(kind=EngineKind.deepspeed, zero_stage=zero))
    distributed.shutdown()


def test_rewinds_come_to_an_end_and_need_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_loss(monkeypatch, steps=tuple(range(2, 10)))
    with pytest.raises(
        TrainingDiverged,
        match=r"stage.on_nonfinite=rewind.*stage.rewinds=2",
    ):
        run(tmp_path, stage={"on_nonfinite": OnNonFinite.rewind, "rewinds": 2})
    assert CALLS["loss"] == 4, "a good step, the first failure and two more"
    CALLS.clear()
    with pytest.raises(TrainingDiverged, match=r"on_nonfinite=rewind.*no whole checkpoint"):
        run(tmp_path, "none", stage={"on_nonfinite": OnNonFinite.rewind, "eval_steps": 5})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("loss", "the loss is .* above stage.spike_loss=5 times"),
        ("grad_norm", "stage.spike_grad_norm=5 times"),
    ],
)
def test_a_spike_stops_the_run_before_it_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    if what == "loss":
        break_loss(monkeypatch, factor=1000.0)
    else:
        break_gradient(monkeypatch, factor=1000.0)
    with pytest.raises(
        TrainingDiverged,
        match=rf"step 3: .*{said}.*diverged_step3_rank0.safetensors.*on_nonfinite=stop",
    ):
        run(tmp_path, stage={f"spike_{what}": 5.0, "spike_window": 2})
    assert [
        line["step"]
        for line in trl_tools.metric_lines(tmp_path / "runs" / "x" / "sft")
        if "loss" in line
    ] == [1, 2]
    CALLS.clear()
    place = run(tmp_path, "calm", stage={"spike_window": 2})
    assert figures(place)["train/skipped_total"] == 0.0, "without a limit it is applied"


def test_counts_and_spike_windows_are_in_the_checkpoint(tmp_path: Path) -> None:
    stage = SFTStage(**STAGE, spike_loss=3.0, spike_window=2)
    first = guarding.Guard(stage, tmp_path, tmp_path, lambda step, figures: None)
    first.brake.check("loss", {"the loss": 2.0})
    first.skipped, first.rewinds = 4, 1
    first.save(tmp_path)
    second = guarding.Guard(stage, tmp_path, tmp_path, lambda step, figures: None)
    second.load(tmp_path)
    assert (second.skipped, second.rewinds, second.brake.state_dict()) == (
        4,
        1,
        first.brake.state_dict(),
    )
    assert second.brake.state_dict() == {"the loss": [2.0]}


def test_batches_are_kept_up_to_a_number(tmp_path: Path) -> None:
    guard = guarding.Guard(
        SFTStage(**STAGE, on_nonfinite=OnNonFinite.skip),
        tmp_path,
        tmp_path,
        lambda step, figures: None,
    )
    tokenizer = type("T", (), {"batch_decode": lambda self, ids: ["text"] * len(ids)})()
    for step in range(1, 9):
        guard.micro_batches = [{"input_ids": torch.full((1, 2), step)}]
        guard.refuse(step, "loss", math.nan, tokenizer)
        guard.problem = None
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == sorted(
        [
            *(f"diverged_step{n}_rank0.safetensors" for n in range(1, 6)),
            "diverged_last_rank0.safetensors",
        ]
    )
    assert int(load_file(tmp_path / "diverged_last_rank0.safetensors")["0.input_ids"][0, 0]) == 8


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            {"engine": EngineConfig(kind=EngineKind.deepspeed, zero_stage=1)},
            "on_nonfinite=skip needs engine=torch",
        ),
        (
            {"model": ModelConfig(path="m", dtype=Dtype.float16)},
            "on_nonfinite=skip.*float16",
        ),
    ],
)
def test_skip_where_it_can_not_be_is_refused(
    tmp_path: Path, groups: dict[str, Any], said: str
) -> None:
    cfg = trl_tools.config(
        SFTStage(**STAGE, on_nonfinite=OnNonFinite.skip),
        tmp_path,
        "x",
        trl_tools.sft_rows(),
        **groups,
    )
    with pytest.raises(UserError, match=said):
        launch.check_nonfinite(OnNonFinite.skip, cfg.engine, cfg.model.dtype)
    launch.check_nonfinite(OnNonFinite.rewind, cfg.engine, cfg.model.dtype)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
