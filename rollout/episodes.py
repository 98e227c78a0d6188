"""Episodes: a policy and an environment answer each other until one of them ends it, or a limit.

A generator writes the turns; this one stands around it. Turn by turn all open episodes are written
together, and their environments answer side by side in threads. Where the generator writes for
several threads at once, as servers do, each episode goes on by itself.
"""

import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from conf.reward import EnvironmentConfig
from conf.schema import DataConfig, RolloutConfig
from rlhf.models.joining import Joiner
from rlhf.types import (
    AdapterWeights,
    Environment,
    FullWeights,
    Generator,
    Prompt,
    Rollout,
    Tools,
    UserError,
)
from rollout import Acting
from rollout.answers import LOOK_S, Answered, GivenUp, SideBySide, Waiter, tell_progress
from rollout.episode import Episode, seed_of
from rollout.sampling import fresh_seed, ignore

LOG = logging.getLogger("rollout.episodes")
_THREADS = 1024  # episodes that servers write at the same time
Write = Callable[..., list[Rollout]]  # as Generator.generate
_Result = TypeVar("_Result")


@runtime_checkable
class Independent(Protocol):
    """A generator that writes for several threads at once."""

    def session(self) -> AbstractContextManager[Write]:
        """What writes as `generate`, from any thread, until the session ends. Weights change
        meanwhile only where they may in flight.
        """
        ...


@runtime_checkable
class Sleeper(Protocol):
    """A generator that may leave the device after each call."""

    def awake(self) -> AbstractContextManager[None]:
        """It stays between calls."""
        ...


class EpisodeGenerator:
    """Writes episodes: `generate` returns one rollout for each, with its turns."""

    def __init__(
        self,
        inner: Generator,
        tokenizer: Any,
        limits: EnvironmentConfig,
        make: Callable[[], Environment],
        *,
        tools: Tools | None = None,
        max_prompt: int,
        max_turn: int,
    ) -> None:
        """`make`: makes the environment of an episode. `tools`: that its prompts show.
        `max_prompt`: most tokens of an episode's prompt; `max_turn`: of one turn of the policy.
        """
        self.inner, self._tokenizer, self._make, self._tools = inner, tokenizer, make, tools
        self._limits, self._max_prompt, self._max_turn = limits, max_prompt, max_turn
        # for episodes in threads of their own: the tokenizer, and the environments at a time
        self._reading = threading.Lock()
        self._room = threading.Semaphore(limits.workers)
        self.arrived: Callable[[Rollout], None] = ignore

    # ---- as the generator inside ----

    @property
    def version(self) -> int:
        return self.inner.version

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """As the generator inside."""
        return self.inner.logprobs(token_ids)

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """As the generator inside."""
        self.inner.sync(weights, version)

    def close(self) -> None:
        """As the generator inside."""
        self.inner.close()

    # ---- episodes ----

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        """`n` episodes per prompt, side by side. Environments of one prompt get one seed, which
        depends on `seed` and the prompt's id; each turn is drawn with a seed of its own, whatever
        other episodes do. Raises UserError where an environment fails, naming row and turn.
        """
        seed = fresh_seed() if seed is None else seed
        episodes = self._episodes(prompts, n)
        try:
            with self._writing() as write:
                drawing = functools.partial(write, n=1, greedy=greedy)
                if isinstance(self.inner, Independent):
                    self._play_each(episodes, drawing, seed)
                else:
                    self._play_together(episodes, drawing, seed)
        except BaseException:
            self._ask(episodes, Episode.close)
            raise
        return [episode.rollout() for episode in episodes]

    def _episodes(self, prompts: Sequence[Prompt], n: int) -> list[Episode]:
        numbers: Counter[str] = Counter()
        out = []
        for prompt in prompts:
            tools = self._tools if prompt.tools is None else prompt.tools
            joiner = Joiner(self._tokenizer, tools)
            for _ in range(n):
                waiter = Waiter(self._limits.step_limit_s)
                number, numbers[prompt.id] = numbers[prompt.id], numbers[prompt.id] + 1
                out.append(Episode(prompt, number, joiner, self._limits, self._max_turn, waiter))
        return out

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Write]:
        if isinstance(self.inner, Independent):
            with self.inner.session() as write:
                yield write
        elif isinstance(self.inner, Sleeper):
            with self.inner.awake():
                yield self.inner.generate
        else:
            yield self.inner.generate

    def _play_together(self, episodes: Sequence[Episode], write: Write, seed: int) -> None:
        """All episodes turn by turn."""
        begun = self._ask(episodes, lambda episode: self._begin(episode, seed))
        for episode, observation in zip(episodes, begun, strict=True):
            episode.open(observation, self._max_prompt)
        playing, turn = list(episodes), 0
        while playing:
            asked = [episode.next_prompt() for episode in playing]
            written = write(asked, seed=seed_of(seed, "turn", turn))
            for episode, rollout in zip(playing, written, strict=True):
                episode.add_written(rollout)
            steps = self._ask(playing, Episode.step)
            for episode, step in zip(playing, steps, strict=True):
                episode.take(step)
            ended = [episode for episode in playing if episode.reason is not None]
            for episode, closed in zip(ended, self._ask(ended, Episode.close), strict=True):
                episode.check_closed(closed)
                self.arrived(episode.rollout())
            playing = [episode for episode in playing if episode.reason is None]
            turn += 1

    def _play_each(self, episodes: Sequence[Episode], write: Write, seed: int) -> None:
        """Each episode in a thread of its own."""
        failed = threading.Event()
        most = max(1, min(_THREADS, len(episodes)))
        with ThreadPoolExecutor(most, "episode") as threads:
            futures = [threads.submit(self._play, e, write, seed, failed) for e in episodes]
            _wait(futures, lambda: sum(len(episode.turns) for episode in episodes))
            failed.set()  # where one failed, the others end with their turn
        for future in futures:
            future.result()

    def _play(self, episode: Episode, write: Write, seed: int, failed: threading.Event) -> None:
        begun = self._ask_one(episode, lambda episode: self._begin(episode, seed))
        with self._reading:
            episode.open(begun, self._max_prompt)
        while episode.reason is None and not failed.is_set():
            turn = len(episode.turns)
            (written,) = write([episode.next_prompt()], seed=seed_of(seed, "turn", turn))
            episode.add_written(written)
            step = self._ask_one(episode, Episode.step)
            with self._reading:
                episode.take(step)
        episode.check_closed(self._ask_one(episode, Episode.close))
        if episode.reason is not None:
            self.arrived(episode.rollout())

    # ---- environments ----

    def _begin(self, episode: Episode, seed: int) -> Any:
        return episode.begin(self._make, seed_of(seed, "environment", episode.row.id))

    def _ask(
        self, episodes: Sequence[Episode], call: Callable[[Episode], _Result]
    ) -> list[Answered[_Result]]:
        """What each episode's environment answers, or that it takes too long."""
        calls = SideBySide(
            [functools.partial(call, episode) for episode in episodes],
            limit_s=self._limits.step_limit_s,
            returned_late=lambda index: episodes[index].return_late(),
        )
        answered = calls.run(self._limits.workers)
        for episode, answer in zip(episodes, answered, strict=True):
            episode.hangs |= isinstance(answer.error, GivenUp)
        return answered

    def _ask_one(self, episode: Episode, call: Callable[[Episode], _Result]) -> Answered[_Result]:
        """The same in an episode's own thread."""
        with self._room:
            return self._ask([episode], call)[0]


def _wait(futures: Sequence[Future[None]], progress: Callable[[], int]) -> None:
    """Until all are done or one has failed; the watchdog is told while `progress` grows."""
    seen, open_ = 0, set(futures)
    while open_:
        done, open_ = wait(open_, LOOK_S, return_when=FIRST_EXCEPTION)
        if any(future.exception() is not None for future in done):
            return
        if progress() > seen:
            seen = progress()
            tell_progress()


@dataclass(frozen=True, slots=True)
class InEnvironment(Acting):
    """Lets a policy act in a configuration's environment."""

    tokenizer: Any  # None where it can't be known yet
    limits: EnvironmentConfig
    make: Callable[[], Environment]
    tools: Tools | None

    def check(self, prompts: Sequence[Prompt], data: DataConfig) -> None:
        """As `Acting.check`. What environments begin with is known once they do."""
        first = prompts[0]
        joiner = Joiner(self.tokenizer, self.tools if first.tools is None else first.tools)
        for note in joiner.check(first.source):
            LOG.warning(note)
        shown = len(joiner.opened(first, "").token_ids) - len(first.token_ids)
        longest = data.max_prompt_length - shown
        for prompt in prompts if shown else ():
            if prompt.tools is None and len(prompt.token_ids) > longest:
                raise UserError(
                    f"prompt {prompt.id}: it has {len(prompt.token_ids)} tokens, and the "
                    f"environment's tools take {shown}: more than data.max_prompt_length="
                    f"{data.max_prompt_length}. Raise that."
                )

    def around(self, generator: Generator, data: DataConfig, rollout: RolloutConfig) -> Generator:
        """As `Acting.around`."""
        return EpisodeGenerator(
            generator,
            self.tokenizer,
            self.limits,
            self.make,
            tools=self.tools,
            max_prompt=data.max_prompt_length,
            max_turn=rollout.max_response_length,
        )
