"""Episodes of a made-up environment, and runs on them: in this process, or by torchrun under ZeRO
(tests/online/test_zero_turns.py) with the arguments of tests/online/zero_online_worker.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.online import setup
from rlhf.types import Generator, Prompt, Rollout, Turn
from tests.online import zero_online_worker

OBSERVED = (20, 21, 22)  # what the environment answers, whatever the policy wrote
MOST_TURNS = 3
SETTINGS = "reward=environment:reward.function=null"  # of a run of zero_online_worker


def reward_of(token_ids: Sequence[int]) -> float:
    """The share of even tokens in a turn."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


@dataclass
class Told:
    """An episode while it goes on."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def add(self, written: Rollout) -> None:
        if self.turns:
            self.token_ids += OBSERVED
            self.logprobs += [0.0] * len(OBSERVED)
        start = len(self.token_ids)
        self.token_ids += written.token_ids
        self.logprobs += written.rollout_logprobs
        reward = reward_of(written.token_ids)
        self.turns.append(Turn(start, len(self.token_ids), written.text, reward, "..."))

    @property
    def goes_on(self) -> bool:
        """An odd token at a turn's start ends the episode."""
        return len(self.turns) < MOST_TURNS and self.token_ids[self.turns[-1].start] % 2 == 0

    def rollout(self, version: int) -> Rollout:
        last = self.turns[-1]
        ended = "turns" if len(self.turns) == MOST_TURNS else "stop"
        return Rollout(
            self.prompt,
            last.text,
            self.token_ids,
            self.logprobs,
            ended,
            version,
            turns=tuple(self.turns),
            success=last.reward > 0.5,
        )


class Episodes:
    """A generator around a generator: each response is an episode."""

    def __init__(self, inner: Generator) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        first = self.inner.generate(prompts, n=n, seed=seed, greedy=greedy)
        told = [Told(rollout.prompt) for rollout in first]
        for episode, rollout in zip(told, first, strict=True):
            episode.add(rollout)
        for turn in range(1, MOST_TURNS):
            going = [number for number, episode in enumerate(told) if episode.goes_on]
            if not going:
                break
            asked = [self._asked(told[number], number % n, turn) for number in going]
            later = None if seed is None else seed + turn
            written = self.inner.generate(asked, seed=later, greedy=greedy)
            for number, rollout in zip(going, written, strict=True):
                told[number].add(rollout)
        return [episode.rollout(self.inner.version) for episode in told]

    def _asked(self, episode: Told, number: int, turn: int) -> Prompt:
        before = (*episode.prompt.token_ids, *episode.token_ids, *OBSERVED)
        return Prompt(f"{episode.prompt.id}/{number}/{turn}", "", before)


def around(make: Callable[..., Generator]) -> Callable[..., Any]:
    """A maker of generators whose responses are episodes."""
    return lambda *args, **options: Episodes(make(*args, **options))


def main() -> None:
    setup.make_generator = around(setup.make_generator)
    zero_online_worker.main()


if __name__ == "__main__":
    main()
