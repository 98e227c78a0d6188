"""The other side of reward/verifiers/worker.py: answers one JSON line per request, holding responses against
references with libraries that evaluate text.

python -m reward.verifiers.worker_child math|gym MEMORY_MB TEMPORARY_DIRECTORY request   {"reference": ...,
"response": ...}; without "response" the reference alone is checked answer    {"score": number},
{"score": null} for a checked reference, {"broken": why} for one that can't be used
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
    """math-verify as TRL's accuracy_reward calls it, so that both agree."""

    def __init__(self) -> None:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify

        for name in ("math_verify.parser", "math_verify.grader"):
            # it would warn that its own time limits are off; ours is the parent's
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
        """A row's answer as expressions. Text without LaTeX delimiters is one expression as a
        whole: x^2+1 is no number 2.
        """
        text = str(value).strip()
        text = (after_marker(text, "####") or "") if "####" in text else text
        gold = (
            self._parse(text)
            if any(anchor in text for anchor in _ANCHORS)
            else self._parse(f"\\boxed{{{text}}}")
        )
        if all(isinstance(item, str) for item in gold):
            gold = [*self._parse(text), *gold]  # 50%, say
        if not gold:
            raise Broken(f"expected a mathematical expression, found {value!r}")
        return gold

    def score(self, reference: Any, response: str) -> float:
        return float(self._verify(reference, self._parse_answer(response)))


class GymChecker:
    """A reasoning-gym task's own score_answer, which for some tasks evaluates the response as
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
            careless = _score_or_zero(self._tasks[key], _NONSENSE, entry)
        except Exception as error:
            raise Broken(
                f"the task {task!r} can't score its own answer {entry['answer']!r} "
                f"({type(error).__name__}: {error})"
            ) from error
        if careless >= 1:
            raise Broken(
                f"the task {task!r} gives full marks to {_NONSENSE!r}, so its verifier verifies "
                "nothing"
            )
        return self._tasks[key], entry

    def score(self, reference: Any, response: str) -> float:
        return _score_or_zero(reference[0], response, reference[1])


def _score_or_zero(dataset: Any, response: str, entry: dict[str, Any]) -> float:
    """The task's score; it scored the task's own answer, so what raises here is what the response
    says: a wrong answer.
    """
    try:
        return float(dataset.score_answer(response, entry))
    except Exception:  # noqa: BLE001 - see above
        return 0.0


def refuse_effects(directory: str) -> None:
    """An audit hook as in the code sandbox: a response that is evaluated opens no socket, starts no
    process and writes no file.
    """
    sys.addaudithook(make_hook(directory))


def main() -> None:
    kind, memory_mb, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
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
                known = known if len(known) < _KEPT else {}
                known[key] = checker.reference(request["reference"])
            answer = {
                "score": checker.score(known[key], request["response"])
                if "response" in request
                else None
            }
        except Broken as error:
            answer = {"broken": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
