"""A run whose checkpoints would not fit on the disk is refused before anything loads."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checks import capacity
from rlhf.checks.memory.shapes import shapes_of
from rlhf.cli import config
from rlhf.stages import dry_run
from rlhf.types import UserError
from tests.online.test_online import run_ppo

PPO = [
    "stage=ppo",
    "model.dtype=float32",
    "rollout=hf",
    "reward.function=tests.toys:even_tokens",
    "stage.critic_init=policy",
    "stage.steps=100",
]


def cfg(folder: Path, model: Path, *extra: str) -> Any:
    return config.compose(
        [*PPO, f"run.dir={folder}", f"model.path={model}", "data.path=x.jsonl", *extra]
    )


def with_free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(
        capacity.shutil, "disk_usage", lambda place: usage._replace(free=int(gib * 2**30))
    )


def needed(given: Any) -> float:
    """GiB of the checkpoints and the model."""
    shapes, _ = shapes_of(given.model, [])
    need = capacity.need_of(given, shapes)
    return (need.count * need.checkpoint + 4 * shapes.policy.parameters) / 2**30


def test_a_dry_run_says_it(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = cfg(tmp_path, tiny_model())
    for share, said in ((0.99, "does not fit"), (1.01, "fits")):
        with_free(monkeypatch, needed(given) * share)
        dry_run._print_plan(given)
        assert re.search(
            rf"disk of run.dir: 3 checkpoints of .* free: {said}$",
            capsys.readouterr().out,
            re.MULTILINE,
        )


def test_too_little_room_is_said_with_the_remedies(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = cfg(tmp_path, tiny_model())
    with_free(monkeypatch, needed(given) * 0.99)
    with pytest.raises(
        UserError,
        match=r"run.dir=.* GiB .* 3 checkpoints of .*save_steps=0",
    ):
        capacity.check_disk(given)
    with_free(monkeypatch, needed(given) * 1.01)
    capacity.check_disk(given)


def test_existing_checkpoints_make_room_for_new_ones(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = cfg(tmp_path, tiny_model())
    need = needed(given)
    with_free(monkeypatch, need * 0.6)
    old = tmp_path / "default" / "ppo" / "checkpoints" / "step-20"
    old.mkdir(parents=True)
    with (old / "engine.pt").open("wb") as file:
        file.truncate(int(need * 0.5 * 2**30))
    capacity.check_disk(given)
    (old / "engine.pt").unlink()
    with pytest.raises(UserError, match="GiB are free there"):
        capacity.check_disk(given)


@pytest.mark.parametrize("extra", ["run.dry_run=true", "stage.save_steps=0"])
def test_who_writes_no_checkpoint_is_not_asked(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    extra: str,
) -> None:
    with_free(monkeypatch, needed(cfg(tmp_path, tiny_model())) * 0.5)
    capacity.check_disk(cfg(tmp_path, tiny_model(), extra))


@pytest.mark.parametrize(
    ("extra", "count"),
    [
        ([], 3),
        (["run.keep_checkpoints=5"], 5),
        (["run.keep_checkpoints=0"], 5),
        (["stage.steps=20"], 1),
        (["stage.save_steps=0"], 0),
    ],
)
def test_how_many_lie_there_at_once(tmp_path: Path, extra: list[str], count: int) -> None:
    given = cfg(tmp_path, tmp_path, *extra)
    assert capacity.count_checkpoints(given.stage, given.run.keep_checkpoints) == count


@pytest.mark.parametrize(
    "adapter",
    [[], ["adapter=lora", "adapter.rank=4", "stage.critic_adapter=true"]],
    ids=["full", "lora"],
)
def test_the_size_is_that_of_a_real_checkpoint(tmp_path: Path, adapter: list[str]) -> None:
    place = run_ppo(
        tmp_path,
        "stage.steps=1",
        "stage.save_steps=1",
        "stage.prompts_per_step=4",
        "rollout.max_response_length=3",
        *adapter,
    )
    given = config.compose(
        [
            "stage=ppo",
            f"model.path={place / 'model'}",
            "stage.critic_init=policy",
            "model.dtype=float32",
            *adapter,
        ]
    )
    shapes, _ = shapes_of(given.model, [])
    tensors = [
        tensor
        for path in sorted((place / "checkpoints" / "step-1").rglob("engine.pt"))
        for tensor in _tensors(torch.load(path, weights_only=True))
        if tensor.numel() > 1
    ]
    found = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert found == pytest.approx(capacity.need_of(given, shapes).checkpoint, rel=0.01)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return [tensor for one in inside for tensor in _tensors(one)]


def test_weights_elsewhere_are_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0.0)
    capacity.check_disk(cfg(tmp_path, Path("org/name")))
