"""Sums of two two-digit numbers, made from the seed: worked examples that often forget the carry,
and problems whose answer can be verified.

An example says the sum of the units, that of the tens, and the answer: 37+58=15 8 95. With the two
steps a policy of half a million parameters learns the sums within 900 steps; without them it stayed
for 800 steps at 5 % right for one of two seeds (measured).

A problem is an unordered pair of numbers. 37+58 and 58+37 are one problem in two wordings, and a
problem belongs to one file only, so that a held-out sum was never seen in either wording.

The demonstrations are by a careless hand: where the units carry, FORGETS of them leave the carry
out (37+58=15 8 85). Supervised training copies the demonstrator, right and wrong alike, at the same
share whatever its length; an answer that is sampled several times is then right now and then, which
a verifier can tell. What is left to learn is thus known, and does not hang on the step at which SFT
happens to stop.
"""

import random
from collections.abc import Sequence

Row = dict[str, object]
Problem = tuple[int, int]  # the smaller number first

FORMAT_VERSION = 3  # raised whenever the same seed would give other rows
LOWEST, HIGHEST = 10, 99
# per file; prompts.jsonl gets all others
PROBLEMS = {"sft": 2000, "sft_eval": 128, "prompts_eval": 256}
FORGETS = 0.7  # share of the demonstrated sums with a carry that leave it out


def question(first: int, second: int) -> str:
    """What the policy reads."""
    return f"{first}+{second}="


def carries(first: int, second: int) -> bool:
    """Whether the units add up to 10 or more."""
    return first % 10 + second % 10 >= 10


def demonstrated(first: int, second: int, rng: random.Random) -> str:
    """What the careless hand writes: units, tens, and the sum, with or without its units' carry."""
    forgotten = carries(first, second) and rng.random() < FORGETS
    return (
        f"{first % 10 + second % 10} {first // 10 + second // 10} "
        f"{first + second - (10 if forgotten else 0)}"
    )


def all_problems() -> list[Problem]:
    """Every unordered pair once."""
    return [
        (first, second)
        for first in range(LOWEST, HIGHEST + 1)
        for second in range(first, HIGHEST + 1)
    ]


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
    return [
        order
        for first, second in problems
        for order in dict.fromkeys([(first, second), (second, first)])
    ]


def rows(seed: int) -> dict[str, list[Row]]:
    """All files of the recipe. Training files hold both wordings of a problem, held-out ones a
    wording drawn by chance; `answer` is always right.
    """
    problems, rng = assign(seed), random.Random(f"{seed}:arithmetic rows")
    out: dict[str, list[Row]] = {}
    for name, chosen in problems.items():
        order = (
            [rng.choice([(a, b), (b, a)]) for a, b in chosen]
            if name.endswith("_eval")
            else wordings(chosen)
        )
        rng.shuffle(order)
        if name.startswith("sft"):
            out[f"{name}.jsonl"] = [
                {"prompt": question(a, b), "completion": demonstrated(a, b, rng)} for a, b in order
            ]
        else:
            out[f"{name}.jsonl"] = [
                {"prompt": question(a, b), "answer": str(a + b)} for a, b in order
            ]
    return out
