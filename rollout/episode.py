"""One episode: what was written and observed, its environment, and what ends it."""

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from textwrap import shorten

from conf.reward import EnvironmentConfig, OnTimeout
from rlhf.models.joining import Joiner, words_of
from rlhf.models.turns import text_of
from rlhf.types import Environment, Observation, Prompt, Rollout, Step, Turn, UserError
from rollout.answers import Answered, TooLong, Waiter

_SHOWN = 200  # characters of a text in a message


def seed_of(seed: int, *parts: object) -> int:
    """A seed in [0, 2^31) for a part of a call with `seed`, as libraries of games take it."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


@dataclass(slots=True, eq=False)
class Episode:
    """One episode while it goes on, T tokens behind its prompt so far."""

    row: Prompt  # as the data has it
    number: int  # among those of the row's prompt
    joiner: Joiner
    limits: EnvironmentConfig
    max_turn: int  # most tokens of a turn
    waiter: Waiter
    prompt: Prompt | None = None  # what the policy reads first
    token_ids: list[int] = field(default_factory=list)  # [T]
    logprobs: list[float] = field(default_factory=list)  # [T]
    versions: list[int] = field(default_factory=list)  # [T]
    turns: list[Turn] = field(default_factory=list)
    cut: bool = False  # the last turn, by a limit of tokens
    reason: str | None = None  # why it ended
    success: bool | None = None
    info: dict[str, float] = field(default_factory=dict)
    environment: Environment | None = None
    hangs: bool = False  # the environment, in a thread that was left to itself
    whole: Rollout | None = None  # what it came to

    # ---- its environment, in whatever thread ----

    def begin(self, make: Callable[[], Environment], seed: int) -> Observation:
        """Make the environment and begin."""
        prompt = self.row
        source = prompt.text if prompt.source is None else prompt.source
        self.environment = make()
        begun = self.environment.reset({"prompt": source, **prompt.fields}, seed)
        observation: Observation | None = self.waiter.finished(begun)
        if not isinstance(observation, str | list):
            kind = type(observation).__name__
            raise ValueError(f"reset() returned a {kind}: expected a text or messages")
        return observation

    def step(self) -> Step:
        """What the environment makes of the last turn. Raises ValueError for what none should
        answer.
        """
        assert self.environment is not None
        step = self.waiter.finished(self.environment.step(self.turns[-1].text))
        if not isinstance(step, Step):
            raise ValueError(f"step() returned a {type(step).__name__}: expected rlhf.types.Step")
        if not math.isfinite(step.reward):
            raise ValueError(f"its reward is {step.reward}: expected a finite number")
        for name, value in step.info.items():
            if name != "success" and not isinstance(value, Real):  # numpy's too
                kind = type(value).__name__
                raise ValueError(f"Step.info[{name!r}] is a {kind}: expected a number")
        return step

    def close(self) -> None:
        """Close the environment, unless it hangs: then its thread does."""
        if not self.hangs:
            self._shut()

    def return_late(self) -> None:
        """In the thread that was left to itself: the environment has answered after all."""
        with contextlib.suppress(Exception):
            self._shut()

    def _shut(self) -> None:
        environment, self.environment = self.environment, None
        if environment is None:
            return
        try:
            close: Callable[[], object] = environment.close
            self.waiter.finished(close())
        finally:
            self.waiter.close()

    # ---- from answer to answer ----

    def open(self, begun: Answered[Observation], max_prompt: int) -> None:
        """Make the prompt, of at most `max_prompt` tokens. Raises UserError."""
        if begun.value is None:
            raise self._failed(begun.error) from begun.error
        try:
            self.prompt = self.joiner.opened(self.row, begun.value)
        except (UserError, ValueError) as error:
            raise self._failed(error) from error
        tokens = len(self.prompt.token_ids)
        if tokens > max_prompt:
            raise UserError(
                f"prompt {self.row.id}: with what the environment begins with it has {tokens} "
                f"tokens, more than data.max_prompt_length={max_prompt}. Raise that, or let the "
                "environment begin with less."
            )

    def next_prompt(self) -> Prompt:
        """What the policy reads before its next turn. Its id is the episode's, so that no other
        episode changes what is drawn.
        """
        assert self.prompt is not None
        return Prompt(
            id=f"{self.row.id}/{self.number}",
            text="",
            token_ids=(*self.prompt.token_ids, *self.token_ids),
            source=self.prompt.source,
            limit=min(self.max_turn, self.limits.max_tokens - len(self.token_ids)),
        )

    def add_written(self, written: Rollout) -> None:
        """The policy wrote its next turn."""
        start = len(self.token_ids)
        self.token_ids += written.token_ids
        self.logprobs += written.rollout_logprobs
        self.versions += written.versions or [written.version] * len(written.token_ids)
        self.turns.append(Turn(start, len(self.token_ids), written.text, 0.0, ""))
        self.cut = written.finish_reason == "length"

    def take(self, answered: Answered[Step]) -> None:
        """Go on with what the environment made of the last turn, or end. Raises UserError."""
        step = answered.value
        self.turns[-1] = replace(self.turns[-1], took_s=answered.took_s)
        if step is None:
            self._take_error(answered.error)
            return
        self.turns[-1] = replace(self.turns[-1], reward=float(step.reward))
        for name, value in step.info.items():
            if name == "success":
                self.success = bool(value)
            elif isinstance(value, Real):
                self.info[name] = self.info.get(name, 0.0) + float(value)
        if self.cut:
            self.reason = "length"
        elif step.done:
            self.reason = "stop"
        elif len(self.turns) == self.limits.max_turns:
            self.reason = "turns"
        else:
            self._observe(step.observation)

    def _observe(self, observation: Observation) -> None:
        """The environment's answer, unless it leaves no token for a further turn."""
        assert self.prompt is not None
        try:
            ids = self.joiner.observation_ids(self.prompt.source, observation)
        except UserError as error:
            raise self._failed(error) from error
        if len(self.token_ids) + len(ids) >= self.limits.max_tokens:
            self.reason = "length"
            return
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.versions += [self.versions[-1]] * len(ids)
        text, said = text_of(self.joiner.tokenizer, ids), words_of(observation)
        self.turns[-1] = replace(self.turns[-1], observation=text, said=said)

    def _take_error(self, error: Exception | None) -> None:
        is_late = isinstance(error, TooLong)
        if not is_late or self.limits.on_timeout is OnTimeout.stop:
            raise self._failed(error) from error
        self.reason = "time"

    def check_closed(self, answered: Answered[None]) -> None:
        """Closing the environment did not fail; one that takes too long is left to itself. Raises
        UserError.
        """
        error = answered.error
        if error is not None and not isinstance(error, TooLong):
            raise self._failed(error) from error

    def _failed(self, error: Exception | None) -> UserError:
        """What stops the run: row, turn and text."""
        where = f"prompt {self.row.id} ({shorten(self.row.text, _SHOWN)!r})"
        if self.turns:
            written = shorten(self.turns[-1].text, _SHOWN)
            where += f", turn {len(self.turns)}, after the policy wrote {written!r}"
        else:
            where += ", at its beginning"
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, UserError):
            what = str(error)
        elif isinstance(error, TooLong):
            limit = self.limits.step_limit_s
            what = f"it took longer than environment.step_limit_s={limit:g} seconds"
        return UserError(f"environment={self.limits.kind.value}: {where}: {what}")

    def rollout(self) -> Rollout:
        """The episode as what trains on it reads it."""
        assert self.prompt is not None and self.reason is not None
        if self.whole is None:
            self.whole = self._made()
        return self.whole

    def _made(self) -> Rollout:
        assert self.prompt is not None and self.reason is not None
        return Rollout(
            self.prompt,
            self.turns[-1].text,
            self.token_ids,
            self.logprobs,
            self.reason,
            min(self.versions),
            versions=self.versions if len(set(self.versions)) > 1 else None,
            turns=tuple(self.turns),
            success=self.success,
            info=self.info,
        )
