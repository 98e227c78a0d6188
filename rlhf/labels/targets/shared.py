"""What the targets share: suggestions, checks of texts, instructions, and reading rows."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.files import scan
from rlhf.labels.records import Export, Judgement, Task, Unreadable, as_text, tools_text
from rlhf.types import UserError

# who suggests; the model's own name may tell whose answers it scores
MODEL_VERSION = "reward-model"
# halves of surrogate pairs
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What the reward model would answer to a task."""

    order: tuple[int, ...]  # slots in `shown`, the best first
    probability: float  # of that order, under the model


def suggestion(task: Task) -> Suggestion | None:
    """The order of the answers' scores; None where an answer has none, or two have the same.

    The probability is that of the Plackett-Luce model with the scores as logarithms of its worths:
    prod_k exp(s_k) / sum_{j >= k} exp(s_j) over the slots of the order. For two answers it is the
    Bradley-Terry model's, sigmoid(s_1 - s_2), which reward models are trained with.
    """
    scores = [task.answers[i].score for i in task.order]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores) or len(set(known)) < len(known):
        return None
    order = tuple(sorted(range(len(known)), key=lambda slot: -known[slot]))
    return Suggestion(order, math.exp(_log_probability([known[slot] for slot in order])))


def suggestion_for(task: Task, export: Export) -> Suggestion | None:
    """`suggestion` of the task, where the export has suggestions."""
    return suggestion(task) if export.prelabel else None


def _log_probability(ordered: Sequence[float]) -> float:
    total = 0.0
    for k, score in enumerate(ordered):
        top = max(ordered[k:])
        total += score - top - math.log(sum(math.exp(other - top) for other in ordered[k:]))
    return total


def check_texts(export: Export) -> None:
    """Whether every text can be written as UTF-8. Raises UserError naming the task."""
    for name in ("title", "instructions"):
        if _HALVES.search(getattr(export, name)):
            raise UserError(
                f"label.{name} holds half of a surrogate pair (U+D800 to U+DFFF), which no "
                "encoding holds."
            )
    for task in export.tasks:
        texts = [("prompt", as_text(task.prompt)), ("list of tools", tools_text(task.tools))]
        texts += [("answer", answer.text) for answer in task.answers]
        for name, text in texts:
            if _HALVES.search(text):
                raise UserError(
                    f"task {task.id}: its {name} holds half of a surrogate pair (U+D800 to "
                    "U+DFFF), which no encoding holds."
                )


def most_answers(export: Export) -> int:
    """How many answers the largest task has; 2 of an export without tasks."""
    return max((len(task.answers) for task in export.tasks), default=2)


def has_tools(export: Export) -> bool:
    """Whether some task's answers may call functions."""
    return any(task.tools for task in export.tasks)


def guidance(export: Export, how: str) -> str:
    """Title, instructions, and `how` to fill in the file, for people without a tool that shows
    them.
    """
    parts = (export.title, export.instructions.strip(), how)
    return "\n\n".join(text for text in parts if text) + "\n"


def given_ratings(ratings: Sequence[int | None]) -> tuple[int | None, ...]:
    """The ratings of all slots; () where none was given."""
    return tuple(ratings) if any(rating is not None for rating in ratings) else ()


def read_rows(
    path: Path, of_row: Callable[[Mapping[str, Any], str], Iterable[Judgement | Unreadable]]
) -> Iterator[Judgement | Unreadable]:
    """What `of_row` makes of each row's columns and place; a row that can't be parsed is an
    Unreadable. Raises UserError for an unreadable file.
    """
    for row in scan(path, key="label.files"):
        if row.problem is not None:
            yield Unreadable(row.place, "", row.problem)
        else:
            yield from of_row(row.columns, row.place)
