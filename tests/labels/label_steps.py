"""What the tests of label.mode=export share: a configuration without Hydra's seconds, the stage as
the command line runs it, small inputs.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf.schema import Config
from rlhf.__main__ import execute
from rlhf.cli import config
from rlhf.labels.ledger import read_export
from rlhf.labels.records import Export
from tests import toys

GOLD = [
    {"prompt": f"known {i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(6)
]
Tiny = Callable[..., Path]


GROUPS = ["stage=label", "rollout=hf", "tracking=none"]


@functools.cache
def composed() -> Any:
    return OmegaConf.structured(config.compose(GROUPS))


def options(folder: Path, *more: str, prompts: bool = True) -> list[str]:
    out = [
        f"run.dir={folder}",
        "data.max_prompt_length=24",
        "rollout.max_response_length=6",
        "label.targets=[jsonl]",
    ]
    if prompts:
        out.append(
            f"data.path={toys.write_jsonl(folder / 'prompts.jsonl', toys.prompt_rows()[:6])}"
        )
    return [*out, *more]


def configured(folder: Path, *more: str, prompts: bool = True) -> Config:
    """What config.compose would give; a twentieth of its time, since groups are composed once."""
    return config.to_dataclass(
        OmegaConf.merge(composed(), OmegaConf.from_dotlist(options(folder, *more, prompts=prompts)))
    )


def run_export(folder: Path, *more: str, prompts: bool = True) -> tuple[Path, Export]:
    """The run directory and its export, through what the command line runs after Hydra: preflight
    and stage.
    """
    return run_config(configured(folder, *more, prompts=prompts))


def run_config(cfg: Config) -> tuple[Path, Export]:
    with pytest.MonkeyPatch.context() as patched:
        # a second of matplotlib for a run of one step
        patched.setattr("rlhf.run.plots.plot_run", lambda _: [])
        execute(cfg, ())
    place = Path(cfg.run.dir) / cfg.run.name / "label"
    return place, read_export(place)


def two(tiny_model: Tiny) -> list[str]:
    return [f"label.policies={{northern: {tiny_model()}, southern: {tiny_model(tied=False)}}}"]


def content(export: Export) -> list[Any]:
    return [
        (task.prompt, task.answers, task.order, task.role, task.chosen_by) for task in export.tasks
    ]


def sample_rows() -> list[dict[str, object]]:
    return [
        {
            "step": step,
            "prompt": f"p{i}",
            "response": f"answer {i} at {step}",
            "score": step / 10 + i,
            "kl": None,
        }
        for step in (1, 5, 9)
        for i in range(4)
    ] + [
        {"step": 12, "prompt": "p0", "response": " answer 0 at 1 ", "score": 3.0},
        {"step": 12, "prompt": "p1", "response": "", "score": 3.0},
    ]


def samples_of(folder: Path, rows: list[dict[str, object]] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "run: {name: alpha}\nstage: {name: ppo}\nreward: {path: rm}\n", encoding="utf-8"
    )
    return toys.write_jsonl(folder / "samples.jsonl", rows if rows is not None else sample_rows())
