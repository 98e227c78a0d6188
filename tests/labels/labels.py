"""Exports and labels for the tests of labelling, made without a model."""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.checking import CHOICES, Checked, Ledgers, Outcome
from rlhf.labels.ledger import write_export
from rlhf.labels.records import Answer, Export, Judgement, Role, Task, Verdict, export_id

CREATED = "2026-01-01T00:00:00+00:00"


def export_of(
    questions: Sequence[dict[str, Any]],
    *,
    kind: LabelKind = LabelKind.pair,
    created: str = CREATED,
    seed: int = 0,
    **fields: Any,
) -> Export:
    """An export of {prompt, answers (Answer or text), role, best (the text), repeats (number of the
    first), order} for each task.
    """
    rng = random.Random(seed)
    made = []
    for question in questions:
        answers = tuple(
            sorted(
                (a if isinstance(a, Answer) else Answer(a) for a in question["answers"]),
                key=lambda a: a.id,
            )
        )
        order = tuple(question.get("order") or rng.sample(range(len(answers)), len(answers)))
        made.append((question, answers, order))
    name = export_id(
        [(q["prompt"], [a.text for a in answers], order) for q, answers, order in made],
        created=created,
        seed=seed,
    )
    tasks = tuple(
        Task(
            id=f"{name}-{number}",
            prompt=q["prompt"],
            answers=answers,
            order=order,
            role=Role(q.get("role", "main")),
            chosen_by="random",
            best=next((i for i, a in enumerate(answers) if a.text == q["best"]), None)
            if "best" in q
            else None,
            repeats=f"{name}-{q['repeats']}" if "repeats" in q else None,
        )
        for number, (q, answers, order) in enumerate(made)
    )
    given = {
        "title": "Which is better?",
        "instructions": "Read both.",
        "ratings": False,
        "comments": True,
        **fields,
    }
    return Export(id=name, kind=kind, created=created, tasks=tasks, **given)


def pairs(count: int, *, prompt: str = "prompt", **fields: Any) -> Export:
    """An export of so many pairs with scores; the longer answer has the higher one."""
    questions = [
        {
            "prompt": f"{prompt} {n}",
            "answers": [Answer(f"good answer {n}", "a", 1.0), Answer(f"bad {n}", "b", 0.0)],
        }
        for n in range(count)
    ]
    return export_of(questions, **fields)


def ledgers_of(*exports: Export) -> Ledgers:
    return Ledgers({export.id: export for export in exports})


def on_disk(export: Export, folder: Path) -> Path:
    write_export(export, folder)
    return folder


def say(task: Task, outcome: Outcome | str, annotator: str = "ann", **fields: Any) -> Judgement:
    """A judgement of a pair, as the annotator sees it: `outcome` is the better answer's text, or an
    Outcome.
    """
    if isinstance(outcome, str):
        outcome = CHOICES[
            next(i for i, answer in enumerate(task.answers) if answer.text == outcome)
        ]
    verdict = (
        Verdict(outcome.value)
        if outcome not in CHOICES[:2]
        else (Verdict.left, Verdict.right)[task.order.index(CHOICES.index(outcome))]
    )
    return Judgement(task=task.id, annotator=annotator, verdict=verdict, **fields)


def label(task: Task, outcome: Outcome | str, annotator: str = "ann", **fields: Any) -> Checked:
    """A checked label of a task; `outcome` as in `say`."""
    if isinstance(outcome, str):
        outcome = CHOICES[
            next(i for i, answer in enumerate(task.answers) if answer.text == outcome)
        ]
    return Checked(
        export=task.id.rpartition("-")[0],
        task=task.id,
        annotator=annotator,
        outcome=outcome,
        **fields,
    )


def shown_back(checked: Checked, task: Task) -> Judgement:
    """The judgement that a label was made from, in the places as shown."""
    place = {answer: shown for shown, answer in enumerate(task.order)}
    verdict = (
        Verdict(checked.outcome.value)
        if checked.outcome not in CHOICES[:2]
        else (Verdict.left, Verdict.right)[place[CHOICES.index(checked.outcome)]]
    )
    ratings = tuple(checked.ratings[answer] for answer in task.order) if checked.ratings else ()
    ranking = tuple(tuple(sorted(place[answer] for answer in group)) for group in checked.ranking)
    names = {f.name for f in dataclasses.fields(Judgement)} & {
        f.name for f in dataclasses.fields(Checked)
    } - {"ranking", "ratings"}
    return Judgement(
        verdict=verdict,
        ranking=ranking,
        ratings=ratings,
        **{name: getattr(checked, name) for name in names},
    )


def all_checked(rows: Iterable[Any]) -> list[Checked]:
    out = list(rows)
    assert all(isinstance(row, Checked) for row in out), out
    return out
