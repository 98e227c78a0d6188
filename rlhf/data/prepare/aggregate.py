"""The step `aggregate`: rows of several annotators become one row an item, with the label that they
give together.
"""

import logging
from collections.abc import Iterator
from typing import Any

from conf.preparation.annotation import Aggregate, Method
from rlhf.data.aggregation import (
    Aggregation,
    Annotator,
    ItemLabel,
    dawid_skene,
    majority,
    votes_by_item,
)
from rlhf.data.agreement import Label, Level, agreement
from rlhf.data.prepare.items import Context, Item, require_free
from rlhf.data.prepare.judgements import by_side, reject, settled, subjects, typed
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")
GIVEN = "annotators"  # the column that says how many labels an item has


def _annotator_figures(annotator: Annotator) -> dict[str, Any]:
    confusion = {
        str(true): {str(given): share for given, share in row.items()}
        for true, row in annotator.confusion.items()
    }
    return {
        "annotator": annotator.name,
        "judgements": annotator.judgements,
        "accuracy": annotator.accuracy,
        "confusion": confusion,
    }


def _aggregated(options: Aggregate, labels: list[Label]) -> Aggregation:
    if options.method is Method.majority:
        return majority(labels)
    if all(votes.total() < 3 for votes in votes_by_item(labels).values()):
        LOG.warning(
            "step aggregate: no item has three labels, so method=dawid_skene can't tell who is "
            "right: majority says the same"
        )
    result = dawid_skene(labels)
    if not result.converged:
        LOG.warning(
            "step aggregate: Dawid-Skene has not converged after %s iterations", result.iterations
        )
    return result


def aggregate(options: Aggregate, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Yield one row for each item, where the item's first row was. Its other rows are left out as
    merged; items that tie, or that have too few labels, are left out whole.

    Agreement and annotators go into the figures. An item that a person has decided in a review
    stays as it is and is counted in none of them. Raises UserError as `subjects`, and for labels
    that don't fit the level, and where rows have the columns already that are written.
    """
    judged = subjects(items, options, context)
    rows = [row for subject in judged for row in subject.rows]
    require_free(rows, options.confidence, "aggregate", "; or name another by confidence")
    require_free(rows, GIVEN, "aggregate")
    if options.tie_label is not None and by_side(options, context.kind):
        raise UserError(
            f"step aggregate: tie_label={options.tie_label!r}: a pair is chosen and rejected and "
            "can't tie. Set it to null."
        )
    labels = [label for subject in judged if not subject.reviewed for label in subject.labels()]
    decided = _item_labels(options, labels, context) if labels else {}
    counts = {
        "rows": len(labels),
        "items": len(judged),
        "reviewed": 0,
        "kept": 0,
        "ties": 0,
        "few_labels": 0,
        "unsure": 0,
    }
    context.figures["counts"] = counts
    for subject in judged:
        if subject.reviewed:
            counts["reviewed"] += 1
            label, confidence, given = subject.judgements[0].label, 1.0, 1
        else:
            chosen = decided[subject.id]
            problem = _problem(options, chosen)
            if problem is not None:
                counts[problem[0]] += 1
                reject(subject, problem[1], context)
                continue
            label = chosen.label
            if chosen.tied and options.tie_label is not None:
                label = typed(options.tie_label, [row.label for row in labels])
            confidence, given = chosen.confidence, sum(chosen.votes.values())
        counts["kept"] += 1
        for row in subject.rows[1:]:
            context.rejected(
                row, f"judges the same as '{subject.rows[0].place}', into whose row it was merged"
            )
        yield settled(
            subject,
            label,
            options,
            context.kind,
            {options.confidence: confidence, GIVEN: given},
        )


def _item_labels(options: Aggregate, labels: list[Label], context: Context) -> dict[str, ItemLabel]:
    """The label of each item, by its id. Writes the agreement into the figures."""
    given = [label.label for label in labels]
    order = [typed(name, given) for name in options.order] or None
    try:
        agreed = agreement(
            labels,
            level=Level(options.level.value),
            order=order,
            resamples=options.resamples,
            seed=context.seed,
        )
    except ValueError as error:
        raise UserError(f"step aggregate: level={options.level.value}: {error}.") from error
    result = _aggregated(options, labels)
    context.figures.update(
        method=options.method.value,
        agreement=agreed.figures(),
        annotators=[_annotator_figures(a) for a in result.annotators],
        iterations=result.iterations,
        converged=result.converged,
    )
    return {decided.item: decided for decided in result.labels}


def _problem(options: Aggregate, chosen: ItemLabel) -> tuple[str, str] | None:
    """The figure that counts a rejected item, and the reason; None for an item that stays."""
    given = sum(chosen.votes.values())
    if given < options.min_labels:
        return "few_labels", f"labels of the item: {given}, min_labels={options.min_labels}"
    if chosen.tied and options.tie_label is None:
        return (
            "ties",
            f"its annotators tie between {', '.join(repr(str(label)) for label in chosen.tied)}",
        )
    if chosen.confidence < options.min_confidence:
        return (
            "unsure",
            f"confidence {chosen.confidence:.3f}, min_confidence={options.min_confidence:g}",
        )
    return None
