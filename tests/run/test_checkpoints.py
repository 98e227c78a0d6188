"""Checkpoints are whole or passed over: torn files, killed saves, full disks, and how many are
kept.
"""

import errno
import json
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import RunConfig
from conf.stages import SFTStage
from rlhf.offline import private_hooks
from rlhf.process import checkpoints, randomness
from rlhf.run.context import RunContext
from rlhf.run.directory import latest_checkpoint
from rlhf.run.tracking import files
from rlhf.stages import rows as stage_rows
from rlhf.stages import sft
from rlhf.types import UserError
from tests.offline import trl_tools
from tests.online.test_online import metrics, run_ppo

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = (
    "stage.steps=3",
    "stage.save_steps=1",
    "stage.prompts_per_step=4",
    "rollout.max_response_length=3",
)


def write(folder: Path, step: int, keep: int = 0) -> Path:
    """A checkpoint of two files, one in a folder."""
    with checkpoints.written(folder / f"step-{step}", keep=keep) as side:
        (side / "policy").mkdir()
        (side / "policy" / "engine.pt").write_bytes(bytes([step]) * 1000)
        (side / "loop.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    return folder / f"step-{step}"


def shortened(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond `size` bytes: EFBIG, as a full
    disk gives ENOSPC.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda c: shortened(c / "policy" / "engine.pt"),
            "policy/engine.pt has 500 bytes instead of 1000",
        ),
        (lambda c: changed(c / "policy" / "engine.pt"), "policy/engine.pt is not what was written"),
        (lambda c: (c / "loop.json").unlink(), "loop.json is missing"),
        (lambda c: (c / checkpoints.SEAL).unlink(), "its writing was cut short"),
        (lambda c: shortened(c / checkpoints.SEAL), "can't be read"),
        (lambda c: (c / checkpoints.SEAL).write_text("[]", encoding="utf-8"), "can't be read"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (9, 10, 11):
        write(folder, step)
    assert checkpoints.problem(folder / "step-11") is None
    damage(folder / "step-11")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == (folder / "step-10", 10)
    assert (
        said in caplog.text
        and "step-11 is passed over" in caplog.text
        and "goes on from step-10" in caplog.text
    )
    assert not (folder / "step-11").exists() and (folder / "torn" / "step-11").is_dir()
    write(folder, 11)
    damage(folder / "step-11")
    latest_checkpoint(tmp_path)
    assert (folder / "torn" / "step-11.2").is_dir(), "an earlier torn one is not overwritten"


def test_all_torn_is_said_and_nothing_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shortened(write(tmp_path / "checkpoints", 1) / "loop.json")
    assert latest_checkpoint(tmp_path) is None
    assert "there is no earlier one" in caplog.text


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in range(8, 13):
        write(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints.numbered(tmp_path)] == [12, 11]
    for step in range(13, 16):
        write(tmp_path, step, keep=0)
    assert [step for step, _ in checkpoints.numbered(tmp_path)] == [15, 14, 13, 12, 11]


def test_all_is_on_the_disk_before_the_seal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power between the two must not leave a seal over files that were never
    written.
    """
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{number}')).name}")
        sync(number)

    def replaced(source: Path, target: Path) -> None:
        done.append(f"name {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path, 1)
    assert sorted(done[:2]) == ["sync engine.pt", "sync loop.json"]
    assert done[2:] == ["sync checksums.json.part", "name checksums.json"]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)

    def killed(path: Path) -> None:
        assert not (path / checkpoints.SEAL).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(tmp_path, 1)
    assert (
        checkpoints.problem(tmp_path / "step-1") is not None
        and checkpoints.problem(tmp_path / "step-2") is None
    )


def test_what_a_killed_save_left_is_removed_on_resume(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints" / "step-2.part" / "policy").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "step-1", 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_leaves_the_checkpoint_before(tmp_path: Path, code: int) -> None:
    write(tmp_path, 1)
    with pytest.raises(
        UserError,
        match=r"step-2 could not be .*MiB were free there\)\. Nothing half-written.*last whole "
        r".*step-1.*run.resume=true",
    ):
        refuse(tmp_path, code)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["step-1"]
        and checkpoints.problem(tmp_path / "step-1") is None
    )


def refuse(folder: Path, code: int) -> None:
    with checkpoints.written(folder / "step-2", keep=1) as side:
        (side / "half").write_text("x", encoding="utf-8")
        raise OSError(code, "refused", str(side / "half"))


def test_torchs_own_words_for_a_full_disk_are_known(tmp_path: Path) -> None:
    """torch.save writes in C++, and what it raises is no OSError."""
    with (
        pytest.raises(UserError, match="could not be written"),
        checkpoints.written(tmp_path / "step-1", keep=1) as side,
        largest_file(50_000),
    ):
        torch.save(torch.zeros(100_000), side / "engine.pt")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_own_words_for_a_full_disk_are_known(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with (
        pytest.raises(UserError, match="could not be written"),
        checkpoints.written(tmp_path / "step-1", keep=1) as side,
        largest_file(50_000),
    ):
        save_file({"a": torch.zeros(100_000)}, str(side / "a.safetensors"))


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="a bug of ours"),
        checkpoints.written(tmp_path / "step-1", keep=1),
    ):
        raise RuntimeError("a bug of ours")
    assert checkpoints.numbered(tmp_path) == []


def test_a_metric_line_that_the_disk_refuses_leaves_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w+b", buffering=0) as file:
        files.write_line(file, 0, '{"step": 1}', path)
        with largest_file(20), pytest.raises(UserError, match=r"metrics.jsonl can't be written"):
            files.write_line(file, 12, json.dumps({"step": 2, "long": "x" * 50}), path)
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n'


def test_a_line_torn_inside_a_character_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "response": "é'.encode()[:-1])
    assert files.truncate(path, 5) == 0
    assert path.read_bytes() == b'{"step": 1}\n'


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("time", "memory/")) and not k.endswith("tokens_per_s")
        }
        for row in rows
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_ppo(tmp_path_factory.mktemp("straight"), *SHORT)


def test_a_run_resumes_from_the_checkpoint_before_a_torn_one(
    straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [step for step, _ in checkpoints.numbered(straight / "checkpoints")] == [3, 2]
    place = tmp_path / "default" / "ppo"
    shutil.copytree(straight, place)
    changed(place / "checkpoints" / "step-3" / "policy" / "engine.pt")
    shutil.rmtree(place / "model")
    run_ppo(tmp_path, *SHORT, "run.resume=true")
    assert "step-3 is passed over" in caplog.text
    assert timeless(metrics(place)) == timeless(metrics(straight))
    assert (place / "model" / "model.safetensors").read_bytes() == (
        straight / "model" / "model.safetensors"
    ).read_bytes()
    assert [step for step, _ in checkpoints.numbered(place / "checkpoints")] == [3, 2]


def test_the_last_step_is_saved_and_a_longer_run_goes_on_from_it(tmp_path: Path) -> None:
    place = run_ppo(tmp_path, *SHORT, "stage.save_steps=2", "run.keep_checkpoints=0")
    assert [step for step, _ in checkpoints.numbered(place / "checkpoints")] == [3, 2]
    run_ppo(
        tmp_path,
        *SHORT,
        "stage.save_steps=2",
        "stage.steps=4",
        "run.keep_checkpoints=0",
        "run.resume=true",
    )
    starts = json.loads((place / "manifest.json").read_text(encoding="utf-8"))["starts"]
    assert starts[-1]["resume_from"].endswith("step-3") and [
        row["step"] for row in metrics(place)
    ] == [1, 2, 3, 4]


def test_a_full_disk_stops_the_run_and_loses_nothing_before(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = randomness.save

    def full_at_two(side: Path) -> None:
        if side.name == "step-2.part":
            raise OSError(errno.ENOSPC, "No space left on device", str(side))
        real(side)

    monkeypatch.setattr(randomness, "save", full_at_two)
    with pytest.raises(UserError, match=r"step-2 could not be written.*No space left.*step-1"):
        run_ppo(tmp_path, *SHORT)
    place = tmp_path / "default" / "ppo"
    assert (
        sorted(p.name for p in (place / "checkpoints").iterdir()) == ["step-1"]
        and not (place / "summary.json").exists()
    )
    monkeypatch.undo()
    run_ppo(tmp_path, *SHORT, "run.resume=true")
    assert timeless(metrics(place)) == timeless(metrics(straight))


def test_a_model_is_replaced_as_a_whole(straight: Path, tmp_path: Path) -> None:
    from policy.saving import replacing

    place = tmp_path / "model"
    with replacing(place) as side:
        (side / "a").write_text("1", encoding="utf-8")
    with (
        pytest.raises(RuntimeError, match="unexpected pos"),
        replacing(place) as side,
        largest_file(50_000),
    ):
        torch.save(torch.zeros(100_000), side / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (place / "a").read_text(
        encoding="utf-8"
    ) == "1"


# ---- transformers' Trainer ----

STAGE = {"steps": 4, "batch_size": 8, "eval_steps": 1, "max_length": 32, "learning_rate": 3e-3}


def run_sft(folder: Path, name: str, **groups: Any) -> Path:
    ctx = RunContext.open(
        trl_tools.config(SFTStage(**STAGE), folder, name, trl_tools.sft_rows(24), **groups)
    )  # type: ignore[arg-type]
    sft.run(ctx, stage_rows)
    return ctx.dir


def test_a_torn_checkpoint_of_the_trainers_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = run_sft(tmp_path, "torn")
    rows, weights = timeless(metrics(place)), (place / "model" / "model.safetensors").read_bytes()
    newest, before = checkpoints.numbered(place / "checkpoints")[:2]
    assert newest[0] == 4 and all(checkpoints.problem(path) is None for _, path in (newest, before))
    shortened(newest[1] / "optimizer.pt")
    run_sft(tmp_path, "torn", run=RunConfig(dir=str(tmp_path / "runs"), name="torn", resume=True))
    assert (
        "checkpoint-4 is passed over: optimizer.pt has" in caplog.text
        and f"goes on from checkpoint-{before[0]}" in caplog.text
    )
    assert (
        timeless(metrics(place)) == rows
        and (place / "model" / "model.safetensors").read_bytes() == weights
    )


def test_a_torn_best_checkpoint_is_not_taken_for_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded back after the last step, hours after it was written."""
    rotate = private_hooks.rotate_checkpoints

    def torn(folder: str, *args: Any, **kwargs: Any) -> None:
        rotate(folder, *args, **kwargs)
        place = Path(folder) / "checkpoint-4"
        if place.is_dir():
            for best in Path(folder).iterdir():
                changed(best / "model.safetensors")

    monkeypatch.setattr(private_hooks, "rotate_checkpoints", torn)
    with pytest.raises(
        UserError,
        match=r"the best checkpoint .* model.safetensors ",
    ):
        run_sft(tmp_path, "best")
    assert not (tmp_path / "runs" / "best" / "sft" / "model").exists()


def test_the_trainers_full_disk_stops_the_run_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoints.seal

    def full_at_three(directory: Path) -> None:
        if directory.name == "checkpoint-3":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(directory)

    monkeypatch.setattr(checkpoints, "seal", full_at_three)
    with pytest.raises(UserError, match=r"checkpoint-3 could not be written.*checkpoint-2"):
        run_sft(tmp_path, "full")
    kept = tmp_path / "runs" / "full" / "sft" / "checkpoints"
    assert (
        not (kept / "checkpoint-3").exists() and checkpoints.problem(kept / "checkpoint-2") is None
    )
