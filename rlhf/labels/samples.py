"""Answers that exist already: samples.jsonl of runs, review.jsonl of an import."""

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

LOG = logging.getLogger("rlhf.labels")
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
        """How many responses have a prompt with marks of a chat template: such a prompt is what the
        policy read, not what people wrote.
        """
        prompts = [response.prompt for response in self.responses]
        return sum(isinstance(prompt, str) and bool(_MARKS.search(prompt)) for prompt in prompts)


def read_samples(paths: Sequence[str]) -> Samples:
    """Responses of all files. Their policies are named after run and step; the two sides of a
    comparison after its run and `before` or `after`.

    Raises UserError for a file or a row that doesn't fit, and for files of two runs with the same
    name.
    """
    names = run_names([Path(path).expanduser() for path in paths])
    responses: list[Response] = []
    for path, name in zip(paths, names, strict=True):
        for row in _rows(path, "label.samples"):
            responses += _responses(row, name)
    if not responses:
        raise UserError(
            f"label.samples={list(paths)} holds no rows: expected prompts with responses, as "
            "training writes them."
        )
    return Samples(tuple(responses), _comparable([Path(path).expanduser() for path in paths]))


def check_samples(path: str) -> bool:
    """Whether the first row has a score. Raises UserError where the file does not exist, or its
    first row does not fit.
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
    """Rows of a file that a run wrote. Half of a last line, as a killed run leaves it, is left out
    with a warning. Raises UserError for any other row that can't be read.
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
    """The response of a training run's row, or the two of a comparison's. Raises UserError."""
    columns = row.columns
    turns = columns.get("turns")
    try:
        prompt = text_of(columns, "prompt", empty=True)
        answer = text_of(columns, "response", empty=True)
        if "response_before" not in columns:
            step, score = int(number_of(columns, "step")), _score(columns, "score")
            if turns:
                answer = transcript(turns)
            return [Response(prompt, answer, f"{run}/{step}", score, episode=bool(turns))]
        before = text_of(columns, "response_before", empty=True)
        return [
            Response(prompt, before, f"{run}/before", _score(columns, "score_before")),
            Response(prompt, answer, f"{run}/after", _score(columns, "score")),
        ]
    except RowError as error:
        raise UserError(
            f"{row.place}: {error}. Expected samples.jsonl of a run that generates: step, "
            "prompt, response."
        ) from error


def transcript(turns: Any) -> str:
    """An episode as people read it: who said what, by turns. Raises RowError."""
    parts = []
    for number, turn in enumerate(turns if isinstance(turns, list) else [turns], start=1):
        role = turn.get("role") if isinstance(turn, dict) else None
        said = turn.get("said", turn.get("text")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(said, str):
            raise RowError(f"turns: turn {number} is {turn!r}, expected role and text")
        parts.append(f"[{role}]\n{said}")
    return "\n\n".join(parts)


def _score(columns: dict[str, Any], key: str) -> float | None:
    return None if columns.get(key) is None else number_of(columns, key)


def _config_of(samples: Path) -> dict[str, Any]:
    """The configuration of the run that wrote the file; {} where it can't be known."""
    path = samples.parent / "config.yaml"
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def run_names(files: Sequence[Path]) -> list[str]:
    """The run that wrote each samples.jsonl, with its stage where two files are of one run. Raises
    UserError where they can't be told apart even so.
    """
    short, long = [], []
    for file in files:
        config, folder = _config_of(file), file.resolve().parent.name
        run = _name_in(config, "run") or folder
        stage = _name_in(config, "stage") or folder
        short.append(run)
        long.append(f"{run}/{stage}")
    names = list(short)
    for i, run in enumerate(short):
        if short.count(run) > 1:
            names[i] = long[i]
    for name in names:
        if names.count(name) > 1:
            same = [str(file) for file, other in zip(files, names, strict=True) if other == name]
            raise UserError(
                f"label.samples: {' and '.join(same)} are both of the run {name}, so their "
                "policies can't be told apart. Name one of them."
            )
    return names


def _name_in(config: dict[str, Any], group: str) -> str | None:
    section = config.get(group)
    if isinstance(section, dict) and section.get("name"):
        return str(section["name"])
    return None


def _comparable(files: Sequence[Path]) -> bool:
    """Whether all runs were scored by the same reward, and none by statistics that move from step
    to step, as far as their configurations tell.
    """
    rewards = [_config_of(file).get("reward") for file in files]
    if None in rewards and len(files) > 1:
        return False
    for reward in rewards:
        terms = (reward or {}).get("terms") or {}
        if any(term.get("normalise") for term in terms.values()):
            return False
    return all(reward == rewards[0] for reward in rewards)


def read_review(path: str, kind: LabelKind) -> list[Question]:
    """The tasks of a review queue as questions that go out again, each question once.

    Raises UserError, naming the row, for a row that is no task or has more answers than the `kind`
    can ask about.
    """
    out: dict[str, Question] = {}
    for row in _rows(path, "label.review"):
        question = _question(row, kind)
        out.setdefault(question.id, question)
    if not out:
        raise UserError(f"label.review={path} holds no tasks: there is nothing to ask again.")
    return list(out.values())


def check_review(path: str, kind: LabelKind) -> None:
    """The file exists and its first row is a task. Raises UserError."""
    row = next(iter(scan(check_file(path, "label.review"), 1)), None)
    problem = "it holds no tasks" if row is None else row.problem
    if row is None or problem is not None:
        raise UserError(
            f"label.review={path}: {problem}: expected review.jsonl of label.mode=import."
        )
    _question(row, kind)


def _question(row: SourceRow, kind: LabelKind) -> Question:
    try:
        task = task_of(row.columns)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{row.place}: {problem}. Expected a task of review.jsonl, as label.mode=import writes "
            "it."
        ) from error
    if kind is LabelKind.pair and len(task.answers) != 2:
        raise UserError(
            f"{row.place}: task {task.id} has {len(task.answers)} answers, expected 2 with "
            "label.kind=pair. Set label.kind=ranking."
        )
    best = None
    if task.role is Role.gold and task.best is not None:
        best = task.answers[task.best].id
    return Question(
        task.prompt, task.answers, by="review", best=best, origin=task.id, tools=task.tools
    )
