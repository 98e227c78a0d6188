"""Sums of two two-digit numbers, made from the seed: few of them worked out for SFT, many with their answer alone for a verifiable reward.

A problem is an unordered pair of numbers. 37+58 and 58+37 are one problem in two wordings, and a problem belongs to one file only, so
that a held-out sum was never seen in either wording. Supervised rows are kept few: a model trained on them gets a part of the held-out
sums right and the rest wrong by a carry or a digit, which is where trying several times, and a verifier, can teach something.
"""

import random
from collections.abc import Sequence

Row = dict[str, object]
Problem = tuple[int, int]  # the smaller number first

FORMAT_VERSION = 1  # raised whenever the same seed would give other rows
LOWEST, HIGHEST = 10, 99
PROBLEMS = {"sft": 500, "sft_eval": 64, "prompts_eval": 256}  # per file; prompts.jsonl gets all others


def question(first: int, second: int) -> str:
    """What the policy reads."""
    return f"{first}+{second}="


def all_problems() -> list[Problem]:
    """Every unordered pair once."""
    return [(first, second) for first in range(LOWEST, HIGHEST + 1) for second in range(first, HIGHEST + 1)]


def assign(seed: int) -> dict[str, list[Problem]]:
    """The problems of each file, shuffled by `seed`."""
    problems = all_problems()
    random.Random(f"{seed}:arithmetic").shuffle(problems)
    out: dict[str, list[Problem]] = {}
    for name, count in PROBLEMS.items():
        out[name], problems = problems[:count], problems[count:]
    return out | {"prompts": problems}


def wordings(problems: Sequence[Problem]) -> list[Problem]:
    """Both orders of each problem, side by side; a number added to itself has one."""
    return [order for first, second in problems for order in dict.fromkeys([(first, second), (second, first)])]


def rows(seed: int) -> dict[str, list[Row]]:
    """All files of the recipe. Training files hold both wordings of a problem, held-out ones a wording drawn by chance."""
    problems, rng = assign(seed), random.Random(f"{seed}:arithmetic rows")
    out: dict[str, list[Row]] = {}
    for name, chosen in problems.items():
        order = [rng.choice([(a, b), (b, a)]) for a, b in chosen] if name.endswith("_eval") else wordings(chosen)
        rng.shuffle(order)
        answered = "completion" if name.startswith("sft") else "answer"
        out[f"{name}.jsonl"] = [{"prompt": question(a, b), answered: str(a + b)} for a, b in order]
    return out
