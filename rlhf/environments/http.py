"""kind=http: an environment behind a server, in whatever language and with whatever libraries.

    POST {url}/reset  {"episode": "<32 hex digits>", "row": {...}, "seed": 7}
                      answer: {"observation": ...}
    POST {url}/step   {"episode": ..., "turn": 0, "text": "..."}
                      answer: {"observation": ..., "reward": 0.5, "done": false, "info": {...}}
    POST {url}/close  {"episode": ...}; the answer is not read

An observation is a text or a list of messages. reward (0), done (false) and info ({}) may be left
out. Turns count from 0; a request that is sent again, because its answer was lost, has the same
turn, and the server answers it as before. Failures that may pass (no connection, 429, 5xx) are
tried again after a growing pause; every other one stops the run.
"""

import contextlib
import json
import logging
import math
import numbers
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from conf.reward import EnvironmentConfig
from rlhf.process.http import bearer_token, checked_url, is_loopback, pause_s, retry_after_s
from rlhf.types import Environment, Observation, Step

LOG = logging.getLogger(__name__)
_KEY = "environment"
_QUOTED = 300  # characters of a server's answer in an error
_GRACE = 1.5  # who waits for an answer ends the episode first, where it can
_CLOSE_S = 5.0


class ServerError(RuntimeError):
    """The server fails, or its answer makes no sense."""


def make(environment: EnvironmentConfig, tokenizer: Any = None) -> Callable[[], Environment]:
    """What makes an episode on the server ``environment.url``, which is asked for the first time by
    the first episode. Raises UserError.
    """
    client = Client(
        environment.url,
        environment.token_env,
        retries=environment.retries,
        limit_s=_GRACE * environment.step_limit_s,
    )
    return lambda: HttpEnvironment(client)


class Client:
    """Requests of all episodes; threads share it."""

    def __init__(
        self, url: str | None, token_env: str | None, *, retries: int, limit_s: float
    ) -> None:
        """Raises UserError for an address or a token that can't be used."""
        address = checked_url(url, f"{_KEY}.url")
        self.token = None
        if token_env is not None:
            self.token = bearer_token(token_env, f"{_KEY}.token_env")
        self.base, self.retries, self.limit_s = str(address).rstrip("/"), retries, limit_s
        loopback = is_loopback(address.host)
        if self.token is not None and address.scheme == "http" and not loopback:
            LOG.warning(
                "environment.url=%s: the token travels unencrypted; use https unless the network "
                "between is trusted.",
                self.base,
            )
        headers = {"content-type": "application/json"}
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        logging.getLogger("httpx").setLevel(logging.WARNING)  # or a line for each request
        # no proxy for a loopback address, which it could not reach
        self._client = httpx.Client(headers=headers, trust_env=not loopback)

    def post(self, path: str, message: Mapping[str, object]) -> dict[str, Any]:
        """The server's answer. Raises ServerError, and TimeoutError where there is none in time."""
        try:
            body = json.dumps(message, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ServerError(f"the row can't be sent as JSON: {error}") from error
        deadline = time.monotonic() + self.limit_s
        for attempt in range(self.retries + 1):
            pause = pause_s(attempt)
            left = deadline - time.monotonic()
            try:
                answer = self._client.post(self.base + path, content=body, timeout=max(left, 0.01))
            except httpx.TimeoutException as error:
                problem = f"{self._name(path)} gave no answer within {self.limit_s:g} s"
                raise TimeoutError(problem) from error
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                passing = answer.status_code == httpx.codes.TOO_MANY_REQUESTS
                if not passing and not answer.is_server_error:
                    return self._content(answer, path)
                problem = f"HTTP {answer.status_code} {answer.text}"
                pause = max(pause, retry_after_s(answer))
            if attempt == self.retries or time.monotonic() + pause >= deadline:
                break
            LOG.warning("%s: %s; again in %.3g s.", self._name(path), self._quote(problem), pause)
            time.sleep(pause)
        tried = f"attempt {attempt + 1} of {self.retries + 1}"
        raise ServerError(f"{self._name(path)} failed: {self._quote(problem)} ({tried})")

    def tell(self, path: str, message: Mapping[str, object]) -> None:
        """Send once; whether the server gets it makes no difference."""
        with contextlib.suppress(httpx.HTTPError):
            self._client.post(self.base + path, content=json.dumps(message), timeout=_CLOSE_S)

    def _content(self, answer: httpx.Response, path: str) -> dict[str, Any]:
        text = self._quote(answer.text)
        if not answer.is_success:
            raise ServerError(f"{self._name(path)}: HTTP {answer.status_code} {text}")
        try:
            content = json.loads(answer.content)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{self._name(path)}: the answer is not JSON: {text}") from error
        if not isinstance(content, dict):
            raise ServerError(f"{self._name(path)}: expected a JSON object, found {text}")
        return content

    def _name(self, path: str) -> str:
        return f"environment.url={self.base}: {path}"

    def _quote(self, text: str) -> str:
        """The beginning of a server's text, on one line, without our token."""
        if self.token is not None:
            text = text.replace(self.token, "***")
        line = " ".join(text.split())
        return line if len(line) <= _QUOTED else line[:_QUOTED] + " ..."


class HttpEnvironment:
    """One episode."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._episode, self._turn = "", 0

    def reset(self, row: Mapping[str, object], seed: int) -> Observation:
        """Raises ServerError and TimeoutError."""
        self._episode, self._turn = secrets.token_hex(16), 0
        message = {"episode": self._episode, "row": dict(row), "seed": seed}
        return _observation(self._client.post("/reset", message))

    def step(self, text: str) -> Step:
        """Raises ServerError and TimeoutError."""
        message = {"episode": self._episode, "turn": self._turn, "text": text}
        answer = self._client.post("/step", message)
        self._turn += 1
        reward, done, info = (
            answer.get("reward", 0.0),
            answer.get("done", False),
            answer.get("info"),
        )
        finite = isinstance(reward, numbers.Real) and not isinstance(reward, bool)
        if not finite or not math.isfinite(reward):
            raise ServerError(f"/step: reward is {reward!r}, expected a finite number")
        if not isinstance(done, bool):
            raise ServerError(f"/step: done is {done!r}, expected true or false")
        if info is not None and not isinstance(info, dict):
            raise ServerError(f"/step: info is {info!r}, expected an object")
        observation = "" if done else _observation(answer)
        return Step(observation, float(reward), done, info or {})

    def close(self) -> None:
        """Tell the server, where it was asked."""
        if self._episode:
            self._client.tell("/close", {"episode": self._episode})
            self._episode = ""


def _observation(answer: Mapping[str, Any]) -> Observation:
    """Raises ServerError."""
    value = answer.get("observation")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(map(_is_message, value)):
        raise ServerError(
            f"observation is {str(value)[:_QUOTED]!r}, expected a text or a list of messages with "
            "role and content"
        )
    return value


def _is_message(value: object) -> bool:
    texts = ("role", "content")
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in texts)
