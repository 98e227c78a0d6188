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


_SOURCES = {
    "standard_accuracy": "acceptance level usual in annotation contracts; set by this toolkit",
    "standard_kappa": "Landis and Koch 1977: above 0.8 is 'almost perfect'; Krippendorff 2004 "
    "draws the same line",
    "standard_rows": "rule of thumb of this toolkit: 1k-5k simple, 5k-20k medium, 20k and more "
    "complex",
}


def _standard(key: str, name: str, passed: bool | None, shown: str, expected: str) -> Standard:
    """A standard that is met, missed, or (None) unknown; `key` is its own in _SOURCES."""
    result = StandardResult.unknown
    if passed is not None:
        result = StandardResult.passed if passed else StandardResult.failed
    return Standard(name, result, shown, expected, _SOURCES[key], REMEDIES[key])


def accuracy(gold: Section) -> Standard:
    """Labels against gold items, above 95 %."""
    name, expected = "accuracy of labels against gold items", f"above {ACCURACY:.0%}"
    if gold.unmeasured is not None:
        return _standard("standard_accuracy", name, None, gold.unmeasured, expected)
    f = gold.figures
    shown = f"{f['accuracy']:.1%} of {f['items']} (95 % interval {f['low']:.1%} to {f['high']:.1%})"
    return _standard("standard_accuracy", name, f["accuracy"] > ACCURACY, shown, expected)


def kappa(annotators: Section) -> Standard:
    """Agreement of annotators beyond chance, above 0.8."""
    name, expected = "agreement of annotators (kappa)", f"above {KAPPA}"
    if annotators.unmeasured is not None:
        return _standard("standard_kappa", name, None, annotators.unmeasured, expected)
    measured: Mapping[str, object] = annotators.figures["kappa"]
    value = measured["value"]
    if not isinstance(value, float):
        reason = f"{measured['name']} is undefined: every label is the same"
        return _standard("standard_kappa", name, None, reason, expected)
    return _standard(
        "standard_kappa", name, value > KAPPA, f"{measured['name']} {value:.3f}", expected
    )


def enough(rows: int, task: TaskClass | None) -> Standard:
    """Training rows for the class of task. More than the class asks for passes."""
    name = "training rows for the task"
    if task is None:
        reason = f"{rows:,} rows; set data.task to simple, medium or complex"
        return _standard("standard_rows", name, None, reason, "as many as the class of task needs")
    low, high = ROWS[task]
    limits = f"{low:,} and more" if high is None else f"{low:,} to {high:,}"
    return _standard("standard_rows", name, rows >= low, f"{rows:,}", f"{task.value}: {limits}")


def standards(
    sections: Mapping[str, Section], rows: int, task: TaskClass | None
) -> tuple[Standard, ...]:
    """All of them, from the sections' figures and the number of training rows."""
    return (accuracy(sections["gold"]), kappa(sections["annotators"]), enough(rows, task))
