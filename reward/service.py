"""A reward model as a web service: the counterpart of reward/remote.py, whose docstring has the
protocol.

    ServedModel    texts -> token ids -> scores, as reward/scorer.py reads them
    Batcher        requests that wait are scored together; the model runs one batch at a time
    create_app     routes, bearer token, limits, and errors as {"error": {"message": ..., "item":
    <index or null>}}

Statuses: 400 no JSON, 401 no or another token, 413 body too large, 422 an item that can't be scored
(the message names it), 503 too many requests wait.
"""

import asyncio
import dataclasses
import hmac
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from conf.choices import Dtype
from reward.model import load_reward_model
from reward.scorer import score_ids, text_ids
from rlhf.models.encoding import is_chat
from rlhf.models.loading import resolve_dtype
from rlhf.types import UserError

LOG = logging.getLogger("reward.service")
RETRY_AFTER_S = 1  # what a busy server asks its clients to wait


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str


class Item(BaseModel):
    """One response to score. `token_ids`, prompt and response as sampled, is for clients whose
    tokenizer and template /info names.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[Message]
    response: str
    finished: bool = True
    fields: dict[str, Any] = Field(default_factory=dict)  # for verifiers; a reward model reads none
    token_ids: list[int] | None = None


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    items: list[Item]
    tokenizer_hash: str | None = None  # of the tokenizer that the items' token_ids come from


class Refused(Exception):
    """A request that gets an error: its status, what is wrong and with which item."""

    def __init__(self, status: int, message: str, item: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.item = status, message, item


@dataclass(slots=True)
class Counts:
    """What the service did."""

    requests: int = 0  # POST /score, refused ones included
    items: int = 0  # responses scored
    tokens: int = 0  # that the model read, without padding
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


class ServedModel:
    """The reward model of a directory: token ids of items, and their scores."""

    def __init__(self, path: str, device: torch.device, *, batch_tokens: int) -> None:
        loaded = load_reward_model(path, resolve_dtype(Dtype.auto))
        self.path, self.device, self.budget = path, device, batch_tokens
        self.tokenizer, self.manifest = loaded.tokenizer, loaded.manifest
        module: Any = loaded.module
        self.module = module.to(device)
        config = self.module.config.get_text_config()
        self.limit = int(getattr(config, "max_position_embeddings", 2**31))
        self.vocabulary = int(config.vocab_size)

    def token_ids(self, items: Sequence[Item]) -> list[list[int]]:
        """What the model reads of each item. Raises Refused naming the item that it can't read."""
        rows = []
        for i, item in enumerate(items):
            row = (
                self._given(i, item.token_ids)
                if item.token_ids is not None
                else self._read(i, item)
            )
            if not 0 < len(row) <= self.limit:
                raise Refused(
                    422,
                    f"items[{i}]: prompt and response have {len(row)} tokens, expected 1 to "
                    f"{self.limit}",
                    i,
                )
            rows.append(row)
        return rows

    def _given(self, i: int, ids: list[int]) -> list[int]:
        wrong = next((t for t in ids if not 0 <= t < self.vocabulary), None)
        if wrong is not None:
            raise Refused(
                422,
                f"items[{i}].token_ids: found {wrong}, expected ids in [0, {self.vocabulary})",
                i,
            )
        return ids

    def _read(self, i: int, item: Item) -> list[int]:
        prompt = (
            item.prompt
            if isinstance(item.prompt, str)
            else [message.model_dump() for message in item.prompt]
        )
        if is_chat(prompt) and not self.manifest.conversational:
            raise Refused(
                422,
                f"items[{i}].prompt: found messages, but this reward model reads plain text: "
                "send the rendered prompt as a string",
                i,
            )
        try:
            return text_ids(
                self.tokenizer, self.manifest, prompt, item.response, finished=item.finished
            )
        except UserError as error:
            raise Refused(422, f"items[{i}].prompt: {error}", i) from error

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        return score_ids(self.module, rows, self.budget, self.device)

    def info(self) -> dict[str, Any]:
        """The manifest, and how much text an item may hold."""
        return {"model": self.path, **dataclasses.asdict(self.manifest), "max_tokens": self.limit}


@dataclass(slots=True)
class _Waiting:
    rows: list[list[int]]
    scores: asyncio.Future[list[float]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Batcher:
    """Puts requests that arrive while the model runs into its next batch, whole requests of at most
    `max_batch` items together.

    Tokenizer and model have a thread each: neither can be used by two threads at once, and the
    event loop stays free for others.
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
        self.model, self.max_batch, self.max_waiting, self.counts = (
            model,
            max_batch,
            max_waiting,
            counts,
        )
        self._after = after  # called after every run of the model
        self._open = 0  # requests between arrival and answer
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._scoring = ThreadPoolExecutor(1, "model")

    async def score(self, items: Sequence[Item]) -> list[float]:
        """Scores of one request's items. Raises Refused."""
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
        """Score what waits, for ever."""
        while True:
            await self._arrived.wait()
            batch = self._next()
            rows = [row for waiting in batch for row in waiting.rows]
            began = time.perf_counter()
            try:
                scores = await asyncio.get_running_loop().run_in_executor(
                    self._scoring, self.model.scores, rows
                )
            except Exception as error:  # noqa: BLE001 - each request of the batch gets it, and the next batch its chance
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
                if not waiting.scores.done():  # a client that went away
                    waiting.scores.set_result(part)
            try:
                self._after()
            except Exception:
                LOG.exception("recording the counts failed; the service goes on.")

    def _next(self) -> list[_Waiting]:
        """The oldest requests that fit into one batch together."""
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


async def read_body(request: Request, most: int) -> bytes:
    """The body, given up as soon as it is longer than `most` bytes. Raises Refused."""
    length = request.headers.get("content-length", "")
    body = bytearray()
    if not (length.isdigit() and int(length) > most):
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise Refused(413, f"the body has more than {most} bytes: send fewer items at once")


def parse(body: bytes, max_batch: int, tokenizer_hash: str) -> list[Item]:
    """The items of a request to a reward model with the tokenizer `tokenizer_hash`. Raises Refused
    with the place of what is wrong.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        # of a value that fits none of two types, what is nearest to fitting
        first = max(found, key=lambda e: len(e["loc"]))
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is no JSON: {first['msg']}") from error
        place = [part for part in first["loc"] if part not in ("str", "list[Message]")]
        index = place[1] if len(place) > 1 and isinstance(place[1], int) else None
        name = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in place
        ).lstrip(".")
        raise Refused(422, f"{name or 'the body'}: {first['msg']}", index) from error
    items = request.items
    if len(items) > max_batch:
        raise Refused(
            422, f"items: found {len(items)}, expected at most {max_batch} (max_batch of /info)"
        )
    given = next((i for i, item in enumerate(items) if item.token_ids is not None), None)
    if given is not None and request.tokenizer_hash != tokenizer_hash:
        raise Refused(
            422,
            f"items[{given}].token_ids: of the tokenizer {request.tokenizer_hash}, expected "
            f"tokenizer_hash {tokenizer_hash} (of /info)",
            given,
        )
    return items


def _error(
    status: int, message: str, item: int | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "item": item}}, status, headers)


def _answer_errors(app: FastAPI, counts: Counts) -> None:
    """Every error has one form and is counted."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        counts.errors += 1
        return _error(
            error.status,
            error.message,
            error.item,
            {"retry-after": str(RETRY_AFTER_S)} if error.status == 503 else None,
        )

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: StarletteHTTPException) -> JSONResponse:
        counts.errors += 1
        return _error(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> JSONResponse:
        counts.errors += 1  # uvicorn logs the traceback, which is not the client's business
        return _error(500, f"the reward model failed: {type(error).__name__}")


def create_app(
    model: ServedModel,
    *,
    token: str,
    max_batch: int,
    max_body: int,
    max_waiting: int,
    counts: Counts,
    after: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The service. `max_body` in bytes; `after` is called after every run of the model."""
    batcher = Batcher(
        model, max_batch=max_batch, max_waiting=max_waiting, counts=counts, after=after
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()
        batcher.close()

    async def authorised(request: Request) -> None:
        counts.requests += request.url.path == "/score"
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode(), token.encode()
        ):
            raise HTTPException(
                401,
                "expected the header Authorization: Bearer <token of this server>",
                {"www-authenticate": "Bearer"},
            )

    # No documentation pages: they would be open to all and load scripts from elsewhere.
    app = FastAPI(
        title="reward model", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    _answer_errors(app, counts)
    protected: list[Any] = [Depends(authorised)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info", dependencies=protected)
    async def info() -> dict[str, Any]:
        return {**model.info(), "max_batch": max_batch}

    @app.post("/score", dependencies=protected)
    async def score(request: Request) -> dict[str, Any]:
        items = parse(await read_body(request, max_body), max_batch, model.manifest.tokenizer_hash)
        return {"scores": await batcher.score(items), "model": model.path}

    return app
