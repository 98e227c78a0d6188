"""The labels of an A/B export in the order in which they came, for the test of rlhf.labels.ab."""

import datetime
from typing import Any

from rlhf.labels.checking import CHOICES, Outcome, moment
from rlhf.labels.records import Export, Role
from rlhf.labels.report import Situation
from rlhf.process.hashing import digest
from rlhf.types import UserError

_NO_TIME = datetime.datetime.min.replace(tzinfo=datetime.UTC)


def policies(export: Export) -> tuple[str, str]:
    """The two policies, a and b, as the export names them. Raises UserError where its tasks compare
    any others.
    """
    found = {
        answer.policy for task in export.tasks if task.role is Role.main for answer in task.answers
    }
    named = [str(name) for name in export.details["ab"].get("policies", ())]
    if len(named) != 2 or set(named) != found:
        raise UserError(
            f"export {export.id} is an A/B test of {' and '.join(named) or 'nothing'}, but "
            f"compares {', '.join(map(repr, sorted(found)))}."
        )
    return named[0], named[1]


def judged(situation: Situation, export: Export) -> list[tuple[str, str | None]]:
    """(prompt's id, the policy that won or None for a tie) of each label that counts on the
    export's main tasks, in the order of arrival.

    That is by import, and within one by the labels' own time, so that a later import never comes
    before what was looked at earlier.
    """
    rows = []
    for place, one in enumerate(situation.stored):
        label = one.label
        if (
            not one.counts
            or label.export != export.id
            or label.annotator in situation.without
            or label.outcome not in CHOICES
        ):
            continue
        task = situation.ledgers.tasks[label.task][1]
        if task.role is not Role.main:
            continue
        winner = (
            None
            if label.outcome is Outcome.tie
            else task.answers[CHOICES.index(label.outcome)].policy
        )
        rows.append(
            (
                (one.number, moment(label.time) if label.time else _NO_TIME, place),
                (digest(task.prompt), winner),
            )
        )
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def ab_figures(situation: Situation) -> list[dict[str, Any]]:
    """The result of each A/B export: export, a, b, and ABResult's figures. Raises UserError."""
    out = []
    for export in sorted(situation.ledgers.exports.values(), key=lambda e: (e.created, e.id)):
        if not export.details.get("ab"):
            continue
        from rlhf.labels.ab import outcomes, plan_of, sequential_test

        a, b = policies(export)
        given = outcomes(judged(situation, export), a, b, wanted=export.overlap)
        result = sequential_test(
            given,
            plan_of(export.details["ab"]),
            identical=int(export.details["ab"].get("identical", 0)),
        )
        out.append({"export": export.id, "a": a, "b": b, **result.figures()})
    return out
