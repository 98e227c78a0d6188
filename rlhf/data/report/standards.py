"""The quality standards of the field, each with a verdict: pass, fail, or not measurable
and why.
"""

from collections.abc import Mapping

from conf.choices import TaskClass
from rlhf.data.report.records import Section, Standard, StandardResult
from rlhf.data.report.remedies import REMEDIES

ACCURACY = 0.95
KAPPA = 0.8
ROWS = {
    TaskClass.simple: (1_000, 5_000),
    TaskClass.medium: (5_000, 20_000),
    TaskClass.complex: (20_000, None),
}


def accuracy(gold: Section) -> Standard:
    """Labels against gold items, above 95 %."""
    source = "acceptance level usual in annotation contracts; set by this toolkit"
    name, expected = "accuracy of labels against gold items", f"above {ACCURACY:.0%}"
    if gold.unmeasured is not None:
        return Standard(
            name,
            StandardResult.unknown,
            gold.unmeasured,
            expected,
            source,
            REMEDIES["standard_accuracy"],
        )
    f = gold.figures
    found = f"{f['accuracy']:.1%} of {f['items']} (95 % interval {f['low']:.1%} to {f['high']:.1%})"
    return Standard(
        name,
        StandardResult.passed if f["accuracy"] > ACCURACY else StandardResult.failed,
        found,
        expected,
        source,
        REMEDIES["standard_accuracy"],
    )


def kappa(annotators: Section) -> Standard:
    """Agreement of annotators beyond chance, above 0.8."""
    source = (
        "Landis and Koch 1977: above 0.8 is 'almost perfect'; Krippendorff 2004 draws the same line"
    )
    name, expected = "agreement of annotators (kappa)", f"above {KAPPA}"
    if annotators.unmeasured is not None:
        return Standard(
            name,
            StandardResult.unknown,
            annotators.unmeasured,
            expected,
            source,
            REMEDIES["standard_kappa"],
        )
    measured: Mapping[str, object] = annotators.figures["kappa"]
    value = measured["value"]
    if not isinstance(value, float):
        reason = f"{measured['name']} is undefined: every label is the same"
        return Standard(
            name, StandardResult.unknown, reason, expected, source, REMEDIES["standard_kappa"]
        )
    return Standard(
        name,
        StandardResult.passed if value > KAPPA else StandardResult.failed,
        f"{measured['name']} {value:.3f}",
        expected,
        source,
        REMEDIES["standard_kappa"],
    )


def enough(rows: int, task: TaskClass | None) -> Standard:
    """Training rows for the class of task. More than the class asks for passes."""
    source = "rule of thumb of this toolkit: 1k-5k simple, 5k-20k medium, 20k and more complex"
    name = "training rows for the task"
    if task is None:
        reason = f"{rows:,} rows; set data.task to simple, medium or complex"
        return Standard(
            name,
            StandardResult.unknown,
            reason,
            "as many as the class of task needs",
            source,
            REMEDIES["standard_rows"],
        )
    low, high = ROWS[task]
    expected = (
        f"{task.value}: {low:,} to {high:,}"
        if high is not None
        else f"{task.value}: {low:,} and more"
    )
    return Standard(
        name,
        StandardResult.passed if rows >= low else StandardResult.failed,
        f"{rows:,}",
        expected,
        source,
        REMEDIES["standard_rows"],
    )


def standards(
    sections: Mapping[str, Section], rows: int, task: TaskClass | None
) -> tuple[Standard, ...]:
    """All of them, from the sections' figures and the number of training rows."""
    return (accuracy(sections["gold"]), kappa(sections["annotators"]), enough(rows, task))
