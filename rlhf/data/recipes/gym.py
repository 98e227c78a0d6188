"""Procedural tasks of reasoning-gym as prompts: any number of rows, each with what its own verifier
needs (reward/verifiers/evaluated.py).

Columns: prompt, answer, task, and metadata: the task's entry as JSON text, which a reward term of
kind gym reads.
"""

import difflib
import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

from conf.schema import GymConfig
from rlhf.process.metadata import encode
from rlhf.types import UserError

DISTRIBUTION, REQUIREMENT = "reasoning-gym", "reasoning-gym==0.1.25"
FORMAT_VERSION = 1  # raised whenever the same seed would give other rows
_PATIENCE = 20  # draws per wanted row before a task is said to have no more different questions

Row = dict[str, object]


def task_seed(seed: int, task: str) -> int:
    """reasoning-gym seeds row i with seed + i, so that neighbouring seeds would give nearly the
    same rows: they are put far apart.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}".encode()).digest()[:4], "big")


def rows(options: GymConfig, seed: int) -> dict[str, list[Row]]:
    """prompts.jsonl and prompts_eval.jsonl: the tasks in equal shares, no question twice, none in
    both files. Raises UserError.
    """
    train: list[Row] = []
    held: list[Row] = []
    for index, task in enumerate(options.tasks):
        count, eval_count = (
            total // len(options.tasks) + (index < total % len(options.tasks))
            for total in (options.rows, options.eval_rows)
        )
        drawn = _distinct(task, options, seed, count + eval_count)
        held += drawn[:eval_count]
        train += drawn[eval_count:]
    rng = random.Random(f"{seed}:gym")
    rng.shuffle(train)
    rng.shuffle(held)
    return {"prompts.jsonl": train, "prompts_eval.jsonl": held}


def _distinct(task: str, options: GymConfig, seed: int, wanted: int) -> list[Row]:
    """`wanted` rows of one task whose questions differ."""
    questions: dict[str, Row] = {}
    for entry in _entries(task, options, seed, _PATIENCE * wanted):
        questions.setdefault(entry["question"], _row(task, entry, options))
        if len(questions) == wanted:
            return list(questions.values())
    raise UserError(
        f"data.gym.tasks: {task} gave {len(questions)} different questions in {_PATIENCE * wanted} "
        f"draws, expected {wanted}. Lower data.gym.rows or "
        f"data.gym.eval_rows, or make the task larger with data.gym.options.{task}."
    )


def _entries(task: str, options: GymConfig, seed: int, size: int) -> Iterator[dict[str, Any]]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(
            f"data.recipe=gym needs the package {DISTRIBUTION}: pip install --no-deps "
            f"{REQUIREMENT} ({error})."
        ) from error
    known = sorted(set(DATASETS) - {"composite"})
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"data.gym.tasks: reasoning-gym has no task {task!r}. Nearest: {near}. All: "
            f"{', '.join(known)}."
        )
    try:
        dataset = create_dataset(
            task, **options.options.get(task, {}), seed=task_seed(seed, task), size=size
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"data.gym.options.{task}={options.options.get(task, {})}: {error}."
        ) from error
    return (dataset[i] for i in range(size))


def _row(task: str, entry: dict[str, Any], options: GymConfig) -> Row:
    question = entry["question"] + options.suffix
    try:
        metadata = encode(entry["metadata"])
    except TypeError as error:
        raise UserError(f"data.gym.tasks: {task} can't be written to a file: {error}.") from error
    kept = {
        "task": task,
        "config": encode(options.options.get(task, {})),
        "question": entry["question"],
        "answer": entry["answer"],
    }
    prompt: object = question
    if options.chat:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        prompt = [*system, {"role": "user", "content": question}]
    return {
        "prompt": prompt,
        "answer": entry["answer"],
        "task": task,
        "metadata": json.dumps(kept | {"metadata": metadata}, ensure_ascii=False),
    }
