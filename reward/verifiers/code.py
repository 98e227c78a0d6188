"""A verifier for Python code: it runs the row's tests in a sandbox."""

import json
import os
from typing import Any

from conf.schema import RewardTerm
from reward.sandbox.run import Limits, SandboxError, isolation, run_tests
from reward.verifiers.extract import fenced_or_all


class Code:
    """The share of the row's tests that the response's code passes; with all_or_nothing 1 for all
    of them, else 0.

    The code is the last fenced block whose language is Python or not named, or else the whole
    response. A test is Python code that raises where the response's code is wrong. The column holds
    a list of tests, that list as JSON text, or a single test.
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
        if isinstance(tests, str) and tests.lstrip().startswith("["):
            tests = json.loads(tests)
        elif isinstance(tests, str):
            tests = [tests]
        usable = isinstance(tests, list) and all(isinstance(t, str) and t.strip() for t in tests)
        if not usable or not tests:
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
        code = fenced_or_all(response, ("python", "py", "python3"))
        outcomes = run_tests(code, reference, self.limits, namespaces=self.namespaces)
        passed = sum(outcome.passed for outcome in outcomes)
        if self.all_or_nothing:
            return float(passed == len(reference))
        return passed / len(reference)
