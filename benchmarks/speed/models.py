"""The models that the bench trains, and the prompts and rows that they read."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared import environment, module
from benchmarks.speed.cases import Case
from rlhf.cli import config
from rlhf.data.recipes import build as recipes
from rlhf.types import UserError

SMALL = [
    "model.tiny.vocab_size=8000",
    "model.tiny.hidden_size=256",
    "model.tiny.intermediate_size=704",
    "model.tiny.layers=4",
    "model.tiny.heads=4",
]
LARGE = [
    "model.tiny.vocab_size=8000",
    "model.tiny.hidden_size=512",
    "model.tiny.intermediate_size=1408",
    "model.tiny.layers=6",
    "model.tiny.heads=8",
]
TINY = [
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.layers=2",
    "model.tiny.heads=1",
]


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def recipe_of(folder: Path, name: str) -> Path:
    """The rows of experiment=reviews, made once per folder: its directory."""
    shared = ["stage=sft", "experiment=reviews", f"run.dir={folder}", f"run.name={name}"]
    cfg = config.compose(shared)
    recipes.ensure(cfg.data, cfg.run)
    return folder / name / "recipe"


def train_small(folder: Path, name: str, shape: Sequence[str], steps: int = 120) -> str:
    """A tiny model that writes review sentences, so that answers end by themselves; trained once
    per folder. Raises UserError.
    """
    model = folder / name / "sft" / "model"
    if model.is_dir():
        return str(model)
    recipe = recipe_of(folder, name)
    # a few rows: this model only has to end its sentences
    held_out = folder / name / "held_out.jsonl"
    lines = read_lines(recipe / "sft_eval.jsonl")[:32]
    held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = module(
        "rlhf",
        "stage=sft",
        "experiment=reviews",
        f"run.dir={folder}",
        f"run.name={name}",
        "run.overwrite=true",
        "tracking=none",
        f"stage.steps={steps}",
        f"stage.eval_steps={steps}",
        f"data.eval_path={held_out}",
        *shape,
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode != 0:
        raise UserError(f"training the model {name} failed:\n{done.stderr[-2000:]}")
    return str(model)


def review_prompts(folder: Path, name: str, count: int) -> list[str]:
    lines = read_lines(recipe_of(folder, name) / "prompts_eval.jsonl")
    return [json.loads(line)["prompt"] for line in lines[:count]]


def case_a(folder: Path) -> Case:
    """5M parameters, 64 short answers of uneven length."""
    model = train_small(folder, "bench-5m", SMALL)
    return Case(
        name="a",
        model=model,
        prompts=review_prompts(folder, "bench-5m", 8),
        samples=8,
        max_response=48,
        max_prompt=32,
        lora=False,
        micro_batch=64,
    )


def case_b(folder: Path, *, lora: bool) -> Case:
    """SmolLM2-135M-Instruct, 16 answers of up to 48 tokens."""
    cfg = config.compose(
        ["stage=ppo", "experiment=smollm2", f"run.dir={folder}", "run.name=bench-135m"]
    )
    recipes.ensure(cfg.data, cfg.run)
    recipe = folder / "bench-135m" / "recipe"
    rows: list[Any] = []
    for line in read_lines(recipe / "prompts.jsonl")[:4]:
        review = json.loads(line)["prompt"][-1]["content"]
        question = f"Continue this review of a film in your own words: {review}"
        rows.append([{"role": "user", "content": question}])
    return Case(
        name="b-lora" if lora else "b-full",
        model=str(recipe / "smollm2"),
        prompts=rows,
        samples=4,
        max_response=48,
        max_prompt=96,
        lora=lora,
        micro_batch=16,
    )


def case_of(name: str, folder: Path) -> Case:
    """The case "a", "b-lora" or "b-full"."""
    return case_a(folder) if name == "a" else case_b(folder, lora=name == "b-lora")
