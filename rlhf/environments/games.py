"""Games of ours: environment=python with environment.path=rlhf.environments.games:GuessNumber."""

import random
import re
from collections.abc import Mapping

from rlhf.types import Step


class GuessNumber:
    """The policy guesses a hidden integer; each wrong guess is answered by whether the number is
    higher or lower. The episode's reward is 1 where the number is guessed in time, else 0.
    """

    def __init__(self, low: int = 1, high: int = 16, guesses: int = 5) -> None:
        """`low`, `high`: the least and the greatest number that may be hidden. `guesses`: most
        turns. Raises ValueError.
        """
        if not (low < high and guesses >= 1):
            raise ValueError(f"expected low < high and guesses >= 1, found {low, high, guesses}")
        self.low, self.high, self.guesses = low, high, guesses
        self.number, self.made = low, 0

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        """The row's prompt says what the game is."""
        self.number = random.Random(f"{seed}:guess").randint(self.low, self.high)
        self.made = 0
        return ""

    def step(self, text: str) -> Step:
        """The turn's first integer is the guess; a turn without one is a guess lost."""
        self.made += 1
        match = re.search(r"-?\d+", text)
        guess = None if match is None else int(match[0][:9])
        right = guess == self.number
        done = right or self.made == self.guesses
        info: dict[str, object] = {"invalid": float(guess is None), "success": right}
        answer = "" if done else self._answer(guess)
        return Step(answer, reward=float(right), done=done, info=info)

    def _answer(self, guess: int | None) -> str:
        if guess is None:
            return "no number"
        return "higher" if self.number > guess else "lower"

    def close(self) -> None:
        """Nothing is held."""
