"""Python code that passes the row's tests."""

import json
import os
from typing import Any

from conf.schema import RewardTerm
from reward.sandbox.run import Limits, SandboxError, isolation, run_tests
from reward.verifiers.extract import fenced


class Code:
    """The share of the row's tests that the response's code passes, or 1 for all and else 0.

    The code is the last fenced block that says python or nothing, else the whole response. A test
    is Python that raises where the code is wrong; the column holds a list of them, the list as JSON
    text, or one text.
    """

    def __init__(self, term: RewardTerm) -> None:
        """Raises ValueError where the sandbox doesn't work on this machine."""
        self.columns: tuple[str, ...] = (term.column or "tests",)
        self.all_or_nothing = term.all_or_nothing
        self.limits = Limits(time_s=term.time_limit_s, memory_mb=term.memory_mb)
        try:
            self.namespaces = isolation(term.isolation)
        except SandboxError as error:
            raise ValueError(str(error)) from error
        self.workers = max(1, len(os.sched_getaffinity(0)))

    def reference(self, *values: Any) -> list[str]:
        tests = values[0]
        if isinstance(tests, str):
            tests = json.loads(tests) if tests.lstrip().startswith("[") else [tests]
        if (
            not isinstance(tests, list)
            or not tests
            or not all(isinstance(test, str) and test.strip() for test in tests)
        ):
            raise ValueError(
                f"expected a list of tests, each of them Python code, found {values[0]!r}"
            )
        for number, test in enumerate(tests, start=1):
            try:
                compile(test, "test", "exec")
            except SyntaxError as error:
                raise ValueError(
                    f"test {number} is no Python code ({error.msg}, line {error.lineno}): "
                    f"{test[:80]!r}"
                ) from error
        return tests

    def score(self, response: str, reference: list[str]) -> float:
        code = fenced(response, ("python", "py", "python3"))
        outcomes = run_tests(
            response if code is None else code, reference, self.limits, namespaces=self.namespaces
        )
        passed = sum(outcome.passed for outcome in outcomes)
        return float(passed == len(reference)) if self.all_or_nothing else passed / len(reference)
