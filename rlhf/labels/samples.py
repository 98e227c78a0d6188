"""Answers that are there already: samples.jsonl of runs, review.jsonl of an import."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.choices import LabelKind
from rlhf.data.files import SourceRow, check_file, scan
from rlhf.data.rows import RowError, number_of, text_of
from rlhf.labels.asking import Question
from rlhf.labels.candidates import Response
from rlhf.labels.ledger import task_of
from rlhf.labels.records import Role
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.label")
# what chat templates put into a prompt
_MARKS = re.compile(r"<\|[^|<>\s]{1,32}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")


@dataclass(frozen=True, slots=True)
class Samples:
    """What runs wrote into their samples.jsonl."""

    responses: tuple[Response, ...]
    # whether all their scores are on one scale, as far as the runs' configurations tell
    comparable: bool

    @property
    def templated(self) -> int:
        """Responses whose prompt holds marks of a chat template: it is what the policy read, not
        what people wrote.
        """
        return sum(
            isinstance(r.prompt, str) and _MARKS.search(r.prompt) is not None
            for r in self.responses
        )


def read_samples(paths: Sequence[str]) -> Samples:
    """Responses of all files, their policies named after run and step; a comparison's two sides
    after its run and `before` or `after`.

    Raises UserError for a file or a row that doesn't fit, and for files of which two runs have one
    name.
    """
    names = run_names([Path(path).expanduser() for path in paths])
    responses = [
        r
        for path, name in zip(paths, names, strict=True)
        for row in _rows(path, "label.samples")
        for r in _responses(row, name)
    ]
    if not responses:
        raise UserError(
            f"label.samples={list(paths)} holds no rows: expected prompts with responses, as "
            "training writes them."
        )
    return Samples(tuple(responses), _comparable([Path(path).expanduser() for path in paths]))


def check_samples(path: str) -> bool:
    """For preflight: the file is there and its first row fits; whether that has a score. Raises
    UserError.
    """
    row = next(iter(scan(check_file(path, "label.samples"), 1)), None)
    if row is None:
        raise UserError(
            f"label.samples={path} holds no rows: expected prompts with responses, as training "
            "writes them."
        )
    if row.problem is not None:
        raise UserError(f"{row.place}: {row.problem}.")
    return all(response.score is not None for response in _responses(row, ""))


def _rows(path: str, key: str) -> list[SourceRow]:
    """Rows of a file that a run wrote; a torn last line, as a killed run leaves it, is said and
    left out. Raises UserError for any other.
    """
    rows = list(scan(check_file(path, key), key=key))
    if rows and rows[-1].problem is not None:
        LOG.warning(
            "%s: %s. It is the last row, so it is left out.", rows[-1].place, rows[-1].problem
        )
        rows.pop()
    for row in rows:
        if row.problem is not None:
            raise UserError(f"{row.place}: {row.problem}.")
    return rows


def _responses(row: SourceRow, run: str) -> list[Response]:
    columns = row.columns
    try:
        prompt = text_of(columns, "prompt", empty=True)
        answer = text_of(columns, "response", empty=True)
        if "response_before" in columns:
            before = text_of(columns, "response_before", empty=True)
            return [
                Response(prompt, before, f"{run}/before", _score(columns, "score_before")),
                Response(prompt, answer, f"{run}/after", _score(columns, "score")),
            ]
        return [
            Response(
                prompt, answer, f"{run}/{int(number_of(columns, 'step'))}", _score(columns, "score")
            )
        ]
    except RowError as error:
        raise UserError(
            f"{row.place}: {error}. Expected samples.jsonl of a run that generates: step, "
            "prompt, response."
        ) from error


def _score(columns: dict[str, Any], key: str) -> float | None:
    return None if columns.get(key) is None else number_of(columns, key)


def _config_of(samples: Path) -> dict[str, Any] | None:
    place = samples.parent / "config.yaml"
    content = yaml.safe_load(place.read_text(encoding="utf-8")) if place.is_file() else None
    return content if isinstance(content, dict) else None


def run_names(files: Sequence[Path]) -> list[str]:
    """The run that wrote each samples.jsonl, with its stage where two are of one run. Raises
    UserError where they can't be told apart even so.
    """
    configs = [_config_of(file) for file in files]
    short = [
        _named(config, "run") or file.resolve().parent.name
        for file, config in zip(files, configs, strict=True)
    ]
    long = [
        f"{run}/{_named(config, 'stage') or file.resolve().parent.name}"
        for file, run, config in zip(files, short, configs, strict=True)
    ]
    names = [whole if short.count(run) > 1 else run for run, whole in zip(short, long, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        found = [str(file) for file, name in zip(files, names, strict=True) if name == twice]
        raise UserError(
            f"label.samples: {' and '.join(found)} are both of the run {twice}, so their "
            "policies can't be told apart. Name one of them."
        )
    return names


def _named(config: dict[str, Any] | None, group: str) -> str | None:
    section = (config or {}).get(group)
    return str(section["name"]) if isinstance(section, dict) and section.get("name") else None


def _comparable(files: Sequence[Path]) -> bool:
    """All runs were scored by the same reward, and none by statistics that move from step
    to step.
    """
    rewards = [
        None if (config := _config_of(file)) is None else config.get("reward") for file in files
    ]
    if any(reward is None for reward in rewards) and len(files) > 1:
        return False
    moving = any(
        term.get("normalise")
        for reward in rewards
        if reward
        for term in (reward.get("terms") or {}).values()
    )
    return not moving and all(reward == rewards[0] for reward in rewards)


def read_review(path: str, kind: LabelKind) -> list[Question]:
    """The tasks of a review queue as questions that go out again. A repeated task asks nothing new,
    so it is left out where its first is there too.

    Raises UserError naming the row of one that is no task, or has more answers than the `kind` can
    ask about.
    """
    out: dict[str, Question] = {}
    for row in _rows(path, "label.review"):
        question = _question(row, kind)
        out.setdefault(question.id, question)
    if not out:
        raise UserError(f"label.review={path} holds no tasks: there is nothing to ask again.")
    return list(out.values())


def check_review(path: str, kind: LabelKind) -> None:
    """For preflight: the file is there and its first row is a task. Raises UserError."""
    row = next(iter(scan(check_file(path, "label.review"), 1)), None)
    if row is None or row.problem is not None:
        raise UserError(
            f"label.review={path}: {row.problem if row else 'it holds no tasks'}: expected "
            "review.jsonl of label.mode=import."
        )
    _question(row, kind)


def _question(row: SourceRow, kind: LabelKind) -> Question:
    try:
        task = task_of(row.columns)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{row.place}: {found}. Expected a task of review.jsonl, as label.mode=import writes "
            "it."
        ) from error
    if kind is LabelKind.pair and len(task.answers) != 2:
        raise UserError(
            f"{row.place}: task {task.id} has {len(task.answers)} answers, expected 2 with "
            "label.kind=pair. Set label.kind=ranking."
        )
    best = task.answers[task.best].id if task.role is Role.gold and task.best is not None else None
    return Question(task.prompt, task.answers, by="review", best=best, origin=task.id)
