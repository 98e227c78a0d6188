"""stage=chain: what it starts, and what a resumed one leaves as it is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.run.tracking.files import plain_config
from rlhf.stages import chain
from rlhf.types import UserError

STAGES = ("sft", "reward", "ppo")


def options(folder: Path, *extra: str) -> list[str]:
    return [
        "stage=chain",
        "stage.stages=[sft,reward,ppo]",
        "tracking=none",
        f"run.dir={folder}",
        "model.path=m",
        "data.path=d.jsonl",
        *extra,
    ]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that a chain starts, each with exit code 0."""
    out: list[str] = []

    def run_child(command: Sequence[str]) -> int:
        out.append(next(one for one in command if one.startswith("stage=")).removeprefix("stage="))
        return 0

    monkeypatch.setattr(chain, "run_child", run_child)
    return out


def run_chain(folder: Path, *extra: str) -> dict[str, Any]:
    given = options(folder, *extra)
    ctx = RunContext.open(config.compose(given), given)
    chain.run(ctx)
    summary: dict[str, Any] = json.loads((ctx.dir / "summary.json").read_text(encoding="utf-8"))
    return summary


def finish(folder: Path, stage: str, *extra: str) -> None:
    """What a stage of the chain leaves when it has ended."""
    cfg = config.compose(
        [f"stage={stage}", *(o for o in options(folder, *extra) if not o.startswith("stage"))]
    )
    place = folder / "default" / stage
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(plain_config(cfg)), encoding="utf-8")
    (place / "summary.json").write_text(json.dumps({"wall_s": 7.0}), encoding="utf-8")


def test_a_chain_starts_every_stage(tmp_path: Path, started: list[str]) -> None:
    run_chain(tmp_path)
    assert started == list(STAGES)


def test_a_resumed_chain_leaves_what_has_ended(tmp_path: Path, started: list[str]) -> None:
    finish(tmp_path, "sft")
    (tmp_path / "default" / "reward").mkdir()  # it had begun
    summary = run_chain(tmp_path, "run.resume=true")
    assert started == ["reward", "ppo"] and summary["metrics"]["time/sft_s"] == 7.0


def test_other_options_of_an_ended_stage_are_said(tmp_path: Path, started: list[str]) -> None:
    finish(tmp_path, "sft", "data.max_bad_rows=3")
    with pytest.raises(UserError, match=r"sft .*other options: data.max_bad_rows: 3 -> 0"):
        run_chain(tmp_path, "run.resume=true")
    assert started == []


def test_a_stage_that_ended_before_what_it_builds_on_is_said(
    tmp_path: Path, started: list[str]
) -> None:
    finish(tmp_path, "sft")
    finish(tmp_path, "ppo")
    with pytest.raises(UserError, match=r"ppo is finished, but stage=reward of the chain"):
        run_chain(tmp_path, "run.resume=true")
    assert started == []
