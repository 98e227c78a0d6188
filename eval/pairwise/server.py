"""A judge behind HTTP: any server with OpenAI's chat completions.

    POST {url}/chat/completions  {"model", "messages", "max_tokens", "temperature"}
                                 answer: {"choices": [{"message": {"content": "..."}}]}

Failures that may pass (no connection, no answer in time, 408, 409, 429, 5xx) are retried after a
growing pause, and after what Retry-After asks for. Every other failure stops the evaluation and
names the question; nothing is ever read as a tie instead.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from rlhf.process.http import is_loopback, pause_s, retry_after_s
from rlhf.process.wording import describe
from rlhf.types import Message, UserError

LOG = logging.getLogger("eval.pairwise.server")
_PASSING = (408, 409, 429)  # codes of failures that may pass, beside those of 500 and above
_QUOTED = 300  # characters of an answer in an error


@dataclass(frozen=True, slots=True)
class Address:
    """Where a judge is, and how it is asked."""

    url: httpx.URL  # up to and without /chat/completions
    key: str  # the option that holds it, for errors
    model: str  # its name there
    token: str | None  # bearer token; None: none is sent
    timeout_s: float  # of a whole answer
    retries: int  # further attempts
    in_flight: int  # requests at the same time
    max_tokens: int  # of a reply
    temperature: float


class ServerJudge:
    """Asks a server."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._chat = f"{str(address.url).rstrip('/')}/chat/completions"
        self._where = f"{address.key} ({str(address.url).rstrip('/')})"
        logging.getLogger("httpx").setLevel(logging.WARNING)  # or a line for each request
        far = not is_loopback(address.url.host)
        if address.token is not None and address.url.scheme == "http" and far:
            LOG.warning(
                "%s: the token travels unencrypted; use https unless the network between is "
                "trusted.",
                self._where,
            )

    def ask(self, questions: Sequence[list[Message]]) -> list[str | None]:
        """Replies in the order of the questions; never None, since only the server knows what is
        too long for it. Raises UserError where a reply can't be had or is none.
        """
        return asyncio.run(self._ask(questions))

    async def _ask(self, questions: Sequence[list[Message]]) -> list[str | None]:
        headers = {}
        if self.address.token is not None:
            headers["authorization"] = f"Bearer {self.address.token}"
        free = asyncio.Semaphore(self.address.in_flight)
        # No proxy for a loopback address. No timeouts of httpx: they hold for each read.
        local = is_loopback(self.address.url.host)
        limits = httpx.Limits(max_connections=self.address.in_flight)
        async with httpx.AsyncClient(
            headers=headers, timeout=None, trust_env=not local, limits=limits
        ) as client:

            async def one(number: int, question: list[Message]) -> str:
                async with free:
                    return await self._reply(client, number, question)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = []
                    for number, question in enumerate(questions, start=1):
                        tasks.append(group.create_task(one(number, question)))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from failures.exceptions[0].__cause__
        return [task.result() for task in tasks]

    async def _reply(self, client: httpx.AsyncClient, number: int, question: list[Message]) -> str:
        blame = f"question {number}, {question[-1]['content'][:120]!r}"
        body = {
            "model": self.address.model,
            "messages": question,
            "max_tokens": self.address.max_tokens,
            "temperature": self.address.temperature,
        }
        answer = await self._send(client, body, blame)
        try:
            content = answer.json()
        except ValueError as error:
            raise UserError(
                f"{self._where}: expected JSON, found {_quoted(answer.text)}; {blame}."
            ) from error
        return self._text(content, blame)

    def _text(self, content: Any, blame: str) -> str:
        """The reply in an answer. Of one that was cut before any text, "", which holds no
        verdict and is counted so.
        """
        try:
            choice = content["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self._where}: expected choices[0].message.content, found "
                f"{_quoted(repr(content))}; {blame}."
            ) from error
        if text is None and choice.get("finish_reason") == "length":
            return ""
        if not isinstance(text, str):
            raise UserError(
                f"{self._where}: expected a text as choices[0].message.content, found "
                f"{describe(text)}; {blame}."
            )
        return text

    async def _send(
        self, client: httpx.AsyncClient, body: dict[str, Any], blame: str
    ) -> httpx.Response:
        """The 2xx answer to a request. Raises UserError."""
        attempts = self.address.retries + 1
        for attempt in range(attempts):
            pause = pause_s(attempt)
            try:
                async with asyncio.timeout(self.address.timeout_s):
                    answer = await client.post(self._chat, json=body)
            except TimeoutError:
                problem = f"no answer within timeout_s={self.address.timeout_s:g} s"
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {_quoted(str(error))}"
            else:
                if answer.is_success:
                    return answer
                problem = f"HTTP {answer.status_code} {_quoted(answer.text)}"
                if answer.status_code not in _PASSING and not answer.is_server_error:
                    raise UserError(
                        f"{self._where}: {problem}; {blame}. {_hint(answer.status_code)}"
                    )
                pause = max(pause, retry_after_s(answer))
            tried = f"attempt {attempt + 1} of {attempts}"
            if attempt + 1 < attempts:
                LOG.warning("%s: %s (%s); again in %.3g s.", self._where, problem, tried, pause)
                await asyncio.sleep(pause)
        raise UserError(
            f"{self._where}: {problem} ({tried}); {blame}. Is the server up? Otherwise raise "
            "timeout_s or retries, or lower in_flight."
        )


def _hint(code: int) -> str:
    if code in (401, 403):
        return "Does the environment variable that token_env names hold the server's token?"
    if code == 404:
        return "Does url end before /chat/completions, and does the server know the model's name?"
    return "The server refuses this request, so it was not repeated."


def _quoted(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _QUOTED else f"{flat[:_QUOTED]} ..."
