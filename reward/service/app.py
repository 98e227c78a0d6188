"""A reward model as a web service, the counterpart of reward/scorers/remote.py, whose docstring has
the protocol: routes, bearer token, limits, and errors as
{"error": {"message": ..., "item": <index or null>}}.

Statuses: 400 no JSON, 401 no or another token, 413 body too large, 422 an item that can't be scored
(the message names it), 503 too many requests wait.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from reward.service.batcher import RETRY_AFTER_S, Batcher, Counts
from reward.service.served import Refused, ServedModel, parse


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request. Reading stops as soon as it is longer than `most` bytes. Raises
    Refused.
    """
    too_long = Refused(413, f"the body has more than {most} bytes: send fewer items at once")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_long
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise too_long
    return bytes(body)


def _error(
    status: int, message: str, item: int | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "item": item}}, status, headers)


def _answer_errors(app: FastAPI, counts: Counts) -> None:
    """Give all errors the same form, and count them."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        counts.errors += 1
        headers = None
        if error.status == 503:
            headers = {"retry-after": str(RETRY_AFTER_S)}
        return _error(error.status, error.message, error.item, headers)

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

    # No documentation pages: they would be open to everyone and load scripts from other sites.
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
