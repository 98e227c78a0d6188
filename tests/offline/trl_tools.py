"""Inputs and configurations that the tests of the SFT and reward stages share."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conf.choices import ModelKind, TrackingKind
from conf.schema import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    TinyConfig,
    TrackingConfig,
)
from conf.stages import RewardStage, SFTStage
from rlhf.data.converting import Record
from rlhf.models.loading import train_tokenizer

TINY = TinyConfig(
    vocab_size=300, hidden_size=32, intermediate_size=64, layers=2, heads=2, max_positions=64
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + eos_token + "
    "'\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GOOD, _BAD, _WORDS = (
    ("good", "great", "fine"),
    ("bad", "awful", "poor"),
    ("film", "plot", "actor", "scene", "end", "the", "a"),
)


def records(rows: Iterable[dict[str, Any]]) -> list[Record]:
    """Rows as they come from a file rows.jsonl."""
    return [Record(number, dict(row), {}, "rows.jsonl") for number, row in enumerate(rows, 1)]


def sft_rows(count: int = 48) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "prompt": " ".join(rng.sample(_WORDS, 3)),
            "completion": " " + " ".join(rng.choices(_GOOD, k=rng.randint(2, 8))),
        }
        for _ in range(count)
    ]


def pair_rows(count: int = 48) -> list[dict[str, Any]]:
    """The chosen side says good things, the rejected side bad ones; lengths are unrelated
    to that.
    """
    rng = random.Random(1)

    def answer(words: tuple[str, ...]) -> str:
        return " " + " ".join([*rng.choices(words, k=2), *rng.choices(_WORDS, k=rng.randint(1, 6))])

    return [
        {
            "prompt": " ".join(rng.sample(_WORDS, 3)),
            "chosen": answer(_GOOD),
            "rejected": answer(_BAD),
            "margin": round(rng.random(), 3),
        }
        for _ in range(count)
    ]


def tiny_tokenizer(template: str | None = None) -> Any:
    texts = [" ".join(str(v) for v in row.values()) for row in sft_rows()]
    tokenizer = train_tokenizer(texts, TINY.vocab_size, TINY.max_positions)
    tokenizer.chat_template = template
    return tokenizer


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(
    stage: SFTStage | RewardStage,
    folder: Path,
    name: str,
    rows: list[dict[str, Any]],
    **groups: Any,
) -> Config:
    """A tiny run in `folder`; `groups` replace whole config groups."""
    data = write_rows(folder / f"{stage.name}_{name}.jsonl", rows)
    return Config(
        stage=stage,
        run=groups.pop("run", None) or RunConfig(dir=str(folder / "runs"), name=name),
        data=groups.pop("data", None) or DataConfig(path=str(data), eval_fraction=0.2),
        model=groups.pop("model", None) or ModelConfig(kind=ModelKind.tiny, tiny=TINY),
        engine=groups.pop("engine", None) or EngineConfig(),
        tracking=TrackingConfig(kind=TrackingKind.none),
        **groups,
    )


def metric_lines(run: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def losses(run: Path) -> list[float]:
    """Training losses by step."""
    return [line["loss"] for line in metric_lines(run) if "loss" in line]
