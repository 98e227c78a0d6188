"""The program that reward/verifiers/evaluated.py starts: it checks responses against references
with libraries that evaluate text.

    python -m reward.verifiers.worker_child math|gym MEMORY_MB TEMPORARY_DIRECTORY

It reads a JSON object a line and answers with a JSON object a line:

    request   {"reference": ..., "response": ...}; without "response" only the reference is checked
    answer    {"score": number}; {"score": null} for a checked reference; {"broken": why} for a
              reference that can't be used
"""

import json
import logging
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from reward.sandbox.hook import make_hook
from reward.verifiers.extract import after_marker
from rlhf.process import metadata as gym_entry

Checker = Callable[[Any], Any]
_ANCHORS = ("$", "\\boxed", "\\(", "\\[", "\\begin")
_NONSENSE = "qzx"
_KEPT = 4096  # references kept in memory


class Broken(ValueError):
    """The reference can't be used."""


class MathChecker:
    """math-verify, called as TRL's accuracy_reward calls it, so that both agree."""

    def __init__(self) -> None:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify

        for name in ("math_verify.parser", "math_verify.grader"):
            # it would warn that its time limits are off; the parent process has ours
            logging.getLogger(name).setLevel(logging.ERROR)
        normalisation = NormalizationConfig(units=True)
        extraction = LatexExtractionConfig(
            normalization_config=normalisation,
            boxed_match_priority=0,
            try_extract_without_anchor=False,
        )
        self._parse: Any = lambda text: parse(text, parsing_timeout=None)
        self._parse_answer: Any = lambda text: parse(
            text,
            extraction_config=[extraction],
            extraction_mode="first_match",
            parsing_timeout=None,
        )
        self._verify: Any = lambda gold, answer: verify(gold, answer, timeout_seconds=None)

    def reference(self, value: Any) -> Any:
        """A row's answer as expressions. Text without LaTeX delimiters is a single expression:
        x^2+1 does not hold the number 2.
        """
        text = str(value).strip()
        if "####" in text:
            text = after_marker(text, "####") or ""
        if any(anchor in text for anchor in _ANCHORS):
            gold = self._parse(text)
        else:
            gold = self._parse(f"\\boxed{{{text}}}")
        if all(isinstance(item, str) for item in gold):
            gold = [*self._parse(text), *gold]  # such as 50%
        if not gold:
            raise Broken(f"expected a mathematical expression, found {value!r}")
        return gold

    def score(self, reference: Any, response: str) -> float:
        return float(self._verify(reference, self._parse_answer(response)))


class GymChecker:
    """The score_answer of a reasoning-gym task, which for some tasks evaluates the response as
    Python or SymPy.
    """

    def __init__(self) -> None:
        import reasoning_gym

        self._create = reasoning_gym.create_dataset
        self._tasks: dict[str, Any] = {}

    def reference(self, value: Any) -> Any:
        task, config = value["task"], gym_entry.decode(value["config"])
        entry = {
            "question": value["question"],
            "answer": value["answer"],
            "metadata": gym_entry.decode(value["metadata"]),
        }
        key = json.dumps([task, value["config"]], sort_keys=True)
        try:
            if key not in self._tasks:
                self._tasks[key] = self._create(task, **config)
            if entry["answer"] is not None:
                self._tasks[key].score_answer(entry["answer"], entry)
            nonsense = _score_or_zero(self._tasks[key], _NONSENSE, entry)
        except Exception as error:
            raise Broken(
                f"the task {task!r} can't score its own answer {entry['answer']!r} "
                f"({type(error).__name__}: {error})"
            ) from error
        if nonsense >= 1:
            raise Broken(
                f"the task {task!r} gives full marks to {_NONSENSE!r}, so its verifier verifies "
                "nothing"
            )
        return self._tasks[key], entry

    def score(self, reference: Any, response: str) -> float:
        return _score_or_zero(reference[0], response, reference[1])


def _score_or_zero(dataset: Any, response: str, entry: dict[str, Any]) -> float:
    """The task's score; 0 where it raises. It has scored the task's own answer, so an error comes
    from the response, which is wrong.
    """
    try:
        return float(dataset.score_answer(response, entry))
    except Exception:  # noqa: BLE001 - see above
        return 0.0


def refuse_effects(directory: str) -> None:
    """Install the code sandbox's audit hook: a response that is evaluated can't open a socket,
    start a process, or write outside `directory`.
    """
    sys.addaudithook(make_hook(directory))


def main() -> None:
    kind, memory_mb, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    checker: MathChecker | GymChecker = MathChecker() if kind == "math" else GymChecker()
    known: dict[str, Any] = {}
    soft = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    refuse_effects(directory)
    answers.write('{"ready": true}\n')
    answers.flush()
    for line in requests:
        request = json.loads(line)
        key = json.dumps(request["reference"], sort_keys=True)
        answer: dict[str, object]
        try:
            if key not in known:
                if len(known) >= _KEPT:
                    known = {}
                known[key] = checker.reference(request["reference"])
            answer = {"score": None}
            if "response" in request:
                answer = {"score": checker.score(known[key], request["response"])}
        except Broken as error:
            answer = {"broken": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
