"""Who writes the responses of a step, and when: as the step asks for them, or (stage.ahead) in a
thread while the policy updates.

Nothing but `Generator.generate` runs in the thread. Prompts are drawn, responses scored and
selected on the main thread, with every collective, so that collectives keep one order on all ranks.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from conf.choices import Advantage
from conf.stages import OnlineStage
from rlhf.process import distributed
from rlhf.types import Announcing, Generator, Prompt, Rollout, UserError

LOG = logging.getLogger("rlhf.online.ahead")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is with its prompts, before a draw."""

    draws: int  # of prompts, since the run began
    prompts: int  # that these draws took, over all ranks
    size: int  # prompts of the draw, over all ranks
    # under way, from 0; a draw is the same for whatever step it was written
    step: int = field(default=0, compare=False)

    def after(self, draws: int) -> "Place":
        """Where the same step is after so many draws."""
        taken = draws * self.size
        return Place(self.draws + draws, self.prompts + taken, self.size, self.step)


def draw_prompts(prompts: Sequence[Prompt], start: int, count: int, seed: int) -> list[Prompt]:
    """This rank's of the `count` prompts, over all ranks, that follow on the first `start`:
    consecutive slices of one shuffled pass after another, a function of `start` alone.
    """
    chosen = []
    orders: dict[int, torch.Tensor] = {}
    for index in range(start, start + count):
        epoch, position = divmod(index, len(prompts))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            orders[epoch] = torch.randperm(len(prompts), generator=generator)
        chosen.append(prompts[int(orders[epoch][position])])
    share = count // distributed.world_size()
    return chosen[distributed.rank() * share : (distributed.rank() + 1) * share]


class Writer:
    """Writes the responses of a draw when it is asked for them: generation and update take
    turns.
    """

    def __init__(
        self, generator: Generator, prompts: Sequence[Prompt], stage: OnlineStage, seed: int
    ) -> None:
        """prompts: of the whole run."""
        self.generator, self.prompts, self.stage, self.seed = generator, prompts, stage, seed
        self._spent = 0.0
        self._drawn: list[tuple[Place, list[Prompt]]] = []  # by this step

    def begin(self) -> None:
        """A step begins."""
        self._spent, self._drawn = 0.0, []

    def take(self, place: Place) -> list[Rollout]:
        """This rank's responses of the draw at `place`, all of a prompt's side by side."""
        began = time.perf_counter()
        prompts = self._draw(place)
        rollouts = self._sample(prompts, place)
        self._drawn.append((place, prompts))
        self._spent += time.perf_counter() - began
        return rollouts

    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The most likely response to each of `prompts`: those of the draws that this step took.
        Environments begin as they do for the responses of the draw.
        """
        began = time.perf_counter()
        rollouts: list[Rollout] = []
        for place, drawn in self._drawn:
            rollouts += self._most_likely(drawn, place)
        self._spent += time.perf_counter() - began
        return _answers_to(prompts, rollouts)

    def spent(self) -> float:
        """Seconds that the step's responses took to write."""
        return self._spent

    def _draw(self, place: Place) -> list[Prompt]:
        return draw_prompts(self.prompts, place.prompts, place.size, self.seed)

    def _sample(self, prompts: Sequence[Prompt], place: Place) -> list[Rollout]:
        n = self.stage.samples_per_prompt
        return self.generator.generate(prompts, n=n, seed=self._seed_of(place))

    def _most_likely(self, prompts: Sequence[Prompt], place: Place) -> list[Rollout]:
        return self.generator.generate(prompts, n=1, seed=self._seed_of(place), greedy=True)

    def _seed_of(self, place: Place) -> int:
        return self.seed * 1_000_003 + place.draws

    def pause(self) -> None:
        """Until `resume` the generator writes nothing on any rank: the caller may change its
        weights, or write himself. Waits for what is being written. A collective.
        """

    def resume(self) -> None:
        """The generator is free again."""

    def forget(self) -> None:
        """What was written ahead is of no use: a draw is written anew when it is asked for."""

    def idle(self) -> dict[str, float]:
        """Seconds since the last call in which trainer and generator had nothing to do, of the rank
        that had most; empty where they take turns. A collective.
        """
        return {}

    def close(self) -> None:
        """Nothing more is written."""


@dataclass(slots=True)
class _Job:
    """The responses of one draw, to be written or written."""

    place: Place
    prompts: list[Prompt]
    rollouts: list[Rollout] = field(default_factory=list)
    greedy: list[Rollout] = field(default_factory=list)  # with advantage=greedy
    seconds: float = 0.0
    done: bool = False


class Ahead(Writer):
    """Writes the draws that follow, at most `stage.ahead` of them, in a thread.

    Draws have an order of their own, whatever step takes them, and each step takes at least one. So
    the draw that is j-th in the queue during a step with weights of version v is taken j steps
    later at the latest, by weights of version v + j, and with j <= stage.ahead no token is staler
    than that. A queue whose first draw is not the one that is asked for (the step has grown, or a
    step was left out) is written anew.
    """

    def __init__(
        self, generator: Generator, prompts: Sequence[Prompt], stage: OnlineStage, seed: int
    ) -> None:
        super().__init__(generator, prompts, stage, seed)
        assert stage.steps is not None
        self.steps = stage.steps
        self._queue: deque[_Job] = deque()  # not taken; of the main thread alone
        self._taken: list[_Job] = []  # by this step
        self._waited = 0.0  # seconds of the main thread
        self._changed = threading.Condition()  # guards what follows
        self._to_write: deque[_Job] = deque()
        self._writing = self._paused = self._closed = False
        self._needed: _Job | None = None  # may be written though the thread is to pause
        self._error: BaseException | None = None
        self._unused = 0.0  # seconds of the thread
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)

    # ---- the main thread ----

    def begin(self) -> None:
        super().begin()
        self._taken = []

    def take(self, place: Place) -> list[Rollout]:
        """As `Writer.take`. Raises what went wrong in the thread."""
        if not self._thread.is_alive() and self._error is None:
            self._thread.start()
        self.resume()  # who paused has no use for the generator any more
        if not self._queue or self._queue[0].place != place:
            self._drop()
            self._add(place)
        job = self._queue.popleft()
        self._fill(place)
        self._wait_until(lambda: job.done)
        self._taken.append(job)
        self._spent += job.seconds
        return job.rollouts

    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """As `Writer.greedy`; they were written with the draws."""
        return _answers_to(prompts, [rollout for job in self._taken for rollout in job.greedy])

    def _fill(self, place: Place) -> None:
        """Queue the draws of the next steps after `place`, which was taken."""
        last = self._queue[-1].place if self._queue else place
        for step in range(place.step + len(self._queue) + 1, place.step + self.stage.ahead + 1):
            if step >= self.steps:
                return
            prompts = last.prompts + last.size
            last = Place(last.draws + 1, prompts, self.stage.step_size(step), step)
            self._add(last)

    def _add(self, place: Place) -> None:
        job = _Job(place, self._draw(place))
        self._queue.append(job)
        with self._changed:
            self._to_write.append(job)
            self._changed.notify_all()

    def _drop(self) -> None:
        self._queue.clear()
        with self._changed:
            self._to_write.clear()

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises what went wrong in the thread."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: ready() or self._error is not None)
        self._waited += time.perf_counter() - began
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """As `Writer.pause`; the draw that is taken next is written before, so that with
        stage.ahead=1 a run's weights do not depend on who is faster. Where a rank's thread has
        failed, every rank raises.
        """
        if self._paused:
            return
        began = time.perf_counter()
        with self._changed:
            self._paused = True
            self._needed = self._queue[0] if self._queue else None
            self._changed.notify_all()
            self._changed.wait_for(self._stands_still)
            self._needed = None
        self._waited += time.perf_counter() - began
        failures = distributed.gather(None if self._error is None else repr(self._error))
        if self._error is not None:
            raise self._error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise UserError(f"rank {rank} can't write responses: {failure}")

    def _stands_still(self) -> bool:
        if self._error is not None:
            return True
        return not self._writing and (self._needed is None or self._needed.done)

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def forget(self) -> None:
        self._drop()
        self._wait_until(lambda: not self._writing)

    def idle(self) -> dict[str, float]:
        with self._changed:
            unused, self._unused = self._unused, 0.0
        waited, self._waited = self._waited, 0.0
        trainer, generator = distributed.all_max([waited, unused])
        return {"ahead/trainer_idle_s": trainer, "ahead/generator_idle_s": generator}

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # ---- the thread ----

    def _run(self) -> None:
        if torch.cuda.is_available():  # each thread has a device of its own
            torch.cuda.set_device(distributed.device())
        # a new thread has OpenMP's own number of threads, and vLLM counts them before torch sets it
        torch.set_num_threads(torch.get_num_threads())
        while (job := self._next()) is not None:
            began, error = time.perf_counter(), None
            try:
                self._write(job)
            except BaseException as raised:  # noqa: BLE001 - the main thread raises it
                error = raised
            job.seconds = time.perf_counter() - began
            with self._changed:
                job.done, self._writing = error is None, False
                self._error = error
                self._changed.notify_all()
            if error is not None:
                return

    def _next(self) -> _Job | None:
        """The next draw to write; None where the run ends."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(self._may_go_on)
            self._unused += time.perf_counter() - began
            if self._closed:
                return None
            self._writing = True
            return self._to_write.popleft()

    def _may_go_on(self) -> bool:
        if self._closed or not self._to_write:
            return self._closed
        return not self._paused or self._to_write[0] is self._needed

    def _write(self, job: _Job) -> None:
        job.rollouts = self._sample(job.prompts, job.place)
        if self.stage.advantage is Advantage.greedy:
            job.greedy = self._most_likely(job.prompts, job.place)


def _answers_to(prompts: Sequence[Prompt], written: list[Rollout]) -> list[Rollout]:
    if [rollout.prompt.id for rollout in written] != [prompt.id for prompt in prompts]:
        raise RuntimeError("expected the greedy responses of the draws that the step took")
    return written


def make_writer(
    generator: Generator,
    prompts: Sequence[Prompt],
    stage: OnlineStage,
    seed: int,
    begin: Callable[[Rollout], None],
) -> Writer:
    """What writes the responses of the stage's steps. `begin` is told of each as soon as it is
    whole, where the generator can tell.
    """
    if isinstance(generator, Announcing):
        generator.arrived = begin
    kind = Ahead if stage.ahead else Writer
    return kind(generator, prompts, stage, seed)
