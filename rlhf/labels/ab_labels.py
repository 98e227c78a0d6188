"""The labels of an A/B export in the order in which they came, for the test of rlhf.labels.ab."""

import datetime
from typing import Any

from rlhf.labels.ab import outcomes, plan_of, sequential_test
from rlhf.labels.checking import CHOICES, Outcome, moment
from rlhf.labels.records import Export, Role, prompt_key
from rlhf.labels.report import Situation
from rlhf.types import UserError

_NO_TIME = datetime.datetime.min.replace(tzinfo=datetime.UTC)


def policies(export: Export) -> tuple[str, str]:
    """The two policies, a and b, as the export names them. Raises UserError where its tasks compare
    any others.
    """
    compared = {
        answer.policy for task in export.tasks if task.role is Role.main for answer in task.answers
    }
    named = [str(name) for name in export.details["ab"].get("policies", ())]
    if len(named) != 2 or set(named) != compared:
        raise UserError(
            f"export {export.id} is an A/B test of {' and '.join(named) or 'nothing'}, but "
            f"compares {', '.join(map(repr, sorted(compared)))}."
        )
    return named[0], named[1]


def judged(situation: Situation, export: Export) -> list[tuple[str, str | None]]:
    """(prompt's id, the policy that won or None for a tie) of each label that counts on the
    export's main tasks, in the order of arrival.

    That order is by import, and within one import by the labels' own time: so a later import never
    comes before what was looked at earlier.
    """
    rows = []
    for number, stored in enumerate(situation.stored):
        label = stored.label
        if not stored.counts or label.annotator in situation.without:
            continue
        if label.export != export.id or label.outcome not in CHOICES:
            continue
        task = situation.ledgers.tasks[label.task][1]
        if task.role is not Role.main:
            continue
        winner = None
        if label.outcome is not Outcome.tie:
            winner = task.answers[CHOICES.index(label.outcome)].policy
        time = moment(label.time) if label.time else _NO_TIME
        prompt = prompt_key(task.prompt, task.tools)
        rows.append(((stored.number, time, number), (prompt, winner)))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def ab_figures(situation: Situation) -> list[dict[str, Any]]:
    """The result of each A/B export: export, a, b, and ABResult's figures. Raises UserError."""
    out = []
    for export in sorted(situation.ledgers.exports.values(), key=lambda e: (e.created, e.id)):
        plan = export.details.get("ab")
        if not plan:
            continue
        a, b = policies(export)
        given = outcomes(judged(situation, export), a, b, wanted=export.overlap)
        identical = int(plan.get("identical", 0))
        result = sequential_test(given, plan_of(plan), identical=identical)
        out.append({"export": export.id, "a": a, "b": b, **result.figures()})
    return out
