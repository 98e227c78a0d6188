"""A request on its way to an arm and back. Whatever goes wrong behind the gateway is one and the
same error for clients; the operator's page counts what it was.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.responses import StreamingResponse

from rlhf.gateway.records import Arm, Refused
from rlhf.gateway.rewriting import Rewriter, broken_stream, unavailable

LOG = logging.getLogger("rlhf.gateway")
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_PATH = "/v1/chat/completions"
# what says that a request itself will not do
_CLIENTS_FAULT = (400, 413, 422)
Failed = Callable[[Arm, str], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """An arm that began to answer."""

    arm: Arm
    answer: httpx.Response


class Proxy:
    """Asks arms."""

    def __init__(self, client: httpx.AsyncClient, most: int, failed: Failed) -> None:
        """most: bytes of an answer. failed: is told of every arm that did not answer, and why."""
        self._client, self._most, self._failed = client, most, failed

    async def open(self, arms: list[Arm], body: Callable[[Arm], Mapping[str, Any]]) -> Opened:
        """The first of the arms that begins to answer. Raises Refused."""
        for arm in arms:
            try:
                answer = await self._send(arm, body(arm))
            except httpx.HTTPError as error:
                self._failed(arm, type(error).__name__)
                continue
            if answer.status_code == httpx.codes.OK:
                return Opened(arm, answer)
            await answer.aclose()
            if answer.status_code in _CLIENTS_FAULT:
                raise Refused(400, "the model refused the request: it is too long, or not valid")
            self._failed(arm, f"status {answer.status_code}")
        raise unavailable()

    async def _send(self, arm: Arm, body: Mapping[str, Any]) -> httpx.Response:
        """Raises httpx.HTTPError. A server may close an idle connection just as it is used again:
        that is tried once more, on a new one.
        """
        headers = {} if arm.token is None else {"authorization": f"Bearer {arm.token}"}
        url = f"{arm.address}{_PATH}"
        for last in (False, True):
            request = self._client.build_request("POST", url, json=body, headers=headers)
            try:
                return await self._client.send(request, stream=True)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if last:
                    raise
        raise AssertionError

    async def whole(self, opened: Opened, rewriter: Rewriter) -> bytes:
        """A whole answer, rewritten. Raises Refused."""
        content = bytearray()
        try:
            async for piece in opened.answer.aiter_bytes():
                content += piece
                if len(content) > self._most:
                    self._failed(opened.arm, "answer too long")
                    raise unavailable()
            return rewriter.whole(bytes(content))
        except httpx.HTTPError as error:
            self._failed(opened.arm, type(error).__name__)
            raise unavailable() from error
        except Refused:
            self._failed(opened.arm, "no answer in OpenAI's format")
            raise
        finally:
            await opened.answer.aclose()

    async def stream(
        self, opened: Opened, rewriter: Rewriter, done: Callable[[], None]
    ) -> AsyncIterator[bytes]:
        """A stream, rewritten chunk by chunk; `done` is called at its end, whichever that is."""
        count = 0
        try:
            async for piece in opened.answer.aiter_bytes():
                count += len(piece)
                if count > self._most:
                    raise unavailable()
                for event in rewriter.feed(piece, self._most):
                    if rewriter.ended:  # what is kept is kept before the client knows the end
                        done()
                    yield event
            if not rewriter.ended:
                raise unavailable()
        except (httpx.HTTPError, Refused) as error:
            self._failed(opened.arm, f"stream: {type(error).__name__}")
            yield broken_stream()
        finally:
            if not rewriter.ended:
                done()
            with contextlib.suppress(httpx.HTTPError, asyncio.CancelledError):
                await asyncio.shield(opened.answer.aclose())


class Once:
    """A function that runs at its first call alone."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run: Callable[[], None] | None = run

    def __call__(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run()


class Streamed(StreamingResponse):
    """A stream whose arm is let go whatever becomes of the client, who may leave before the first
    event.
    """

    def __init__(self, events: AsyncIterator[bytes], opened: Opened, leave: Once) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self._opened, self._leave = opened, leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()
            await self._opened.answer.aclose()
