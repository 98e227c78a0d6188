"""Batches of requests: those that arrive while the model runs are scored together afterwards."""

import asyncio
import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from reward.service.served import Item, Refused, ServedModel

LOG = logging.getLogger("reward.service")
RETRY_AFTER_S = 1  # seconds that a busy server asks its clients to wait


@dataclass(slots=True)
class Counts:
    """What the service did so far."""

    requests: int = 0  # POST /score, refused ones included
    items: int = 0  # responses scored
    tokens: int = 0  # read by the model, without padding
    batches: int = 0  # runs of the model
    errors: int = 0  # answers with a status of 400 or above
    model_s: float = 0.0  # seconds in the model

    def metrics(self) -> dict[str, float]:
        """Flat names for metrics.jsonl and summary.json."""
        names = {"model_s": "time/score_s"}
        return {
            names.get(key, f"serve/{key}"): float(value)
            for key, value in dataclasses.asdict(self).items()
        }


@dataclass(slots=True)
class _Waiting:
    rows: list[list[int]]
    scores: asyncio.Future[list[float]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Batcher:
    """Puts the requests that arrive while the model runs into its next batch: whole requests, of at
    most `max_batch` items together.

    Tokenizer and model each have a thread of their own: neither can be used by two threads at once,
    and the event loop stays free for other requests.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        max_batch: int,
        max_waiting: int,
        counts: Counts,
        after: Callable[[], None],
    ) -> None:
        self.model, self.counts = model, counts
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._after = after  # called after every run of the model
        self._open = 0  # requests between arrival and answer
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._scoring = ThreadPoolExecutor(1, "model")

    async def score(self, items: Sequence[Item]) -> list[float]:
        """Scores of a request's items. Raises Refused."""
        if self._open >= self.max_waiting:
            raise Refused(
                503, f"{self._open} requests wait already; try again in {RETRY_AFTER_S} s"
            )
        self._open += 1
        try:
            loop = asyncio.get_running_loop()
            rows = await loop.run_in_executor(self._tokenizing, self.model.token_ids, items)
            if not rows:
                return []
            waiting = _Waiting(rows)
            self._queue.append(waiting)
            self._arrived.set()
            scores = await waiting.scores
        finally:
            self._open -= 1
        wrong = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
        if wrong is not None:
            raise Refused(
                422,
                f"items[{wrong}]: its score is {scores[wrong]}, expected a finite number",
                wrong,
            )
        return scores

    async def run(self) -> None:
        """Score the requests that wait, until the task is cancelled."""
        while True:
            await self._arrived.wait()
            batch = self._next()
            rows = [row for waiting in batch for row in waiting.rows]
            began = time.perf_counter()
            try:
                scores = await asyncio.get_running_loop().run_in_executor(
                    self._scoring, self.model.scores, rows
                )
            except Exception as error:  # noqa: BLE001 - it fails this batch, not the service
                for waiting in batch:
                    if not waiting.scores.done():
                        waiting.scores.set_exception(error)
                continue
            self.counts.model_s += time.perf_counter() - began
            self.counts.batches += 1
            self.counts.items += len(rows)
            self.counts.tokens += sum(map(len, rows))
            for waiting in batch:
                part, scores = scores[: len(waiting.rows)], scores[len(waiting.rows) :]
                if not waiting.scores.done():  # done: its client went away
                    waiting.scores.set_result(part)
            try:
                self._after()
            except Exception:
                LOG.exception("recording the counts failed; the service goes on.")

    def _next(self) -> list[_Waiting]:
        """The oldest requests that fit into a batch together."""
        batch = [self._queue.popleft()]
        size = len(batch[0].rows)
        while self._queue and size + len(self._queue[0].rows) <= self.max_batch:
            batch.append(self._queue.popleft())
            size += len(batch[-1].rows)
        if not self._queue:
            self._arrived.clear()
        return batch

    def close(self) -> None:
        self._tokenizing.shutdown(cancel_futures=True)
        self._scoring.shutdown(cancel_futures=True)
