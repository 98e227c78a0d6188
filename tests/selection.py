"""Which cases of a matrix a test run covers.

A matrix of launches is costly, so `make test` keeps a covering set of its cases and marks the rest
`full`; a fixture that makes all launches at once makes those that the selected tests need.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def marked_full(cases: Iterable[Any], keep: Iterable[Any]) -> list[Any]:
    """`cases` as parameters; those that are not in `keep` belong to `make test-full`."""
    keep = list(keep)
    cases = list(cases)
    assert all(case in cases for case in keep), "a case that is kept is none of the matrix"
    return [
        case if case in keep else pytest.param(*_arguments(case), marks=pytest.mark.full)
        for case in cases
    ]


def _arguments(case: Any) -> Sequence[Any]:
    return case if isinstance(case, tuple) else (case,)


def selected(request: pytest.FixtureRequest, *arguments: str) -> set[Any]:
    """Values of the parameters `arguments` over the tests of this file that will run.

    Tuples where there are several arguments.
    """
    values = set()
    for item in request.session.items:
        parameters = getattr(item, "callspec", None)
        if item.path != request.path or parameters is None:
            continue
        if all(name in parameters.params for name in arguments):
            case = tuple(parameters.params[name] for name in arguments)
            values.add(case if len(arguments) > 1 else case[0])
    return values
