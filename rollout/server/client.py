"""One running vLLM server by its HTTP routes: token ids in, token ids and log-probabilities out.

vLLM 0.32's routes that are used here (VLLM_SERVER_DEV_MODE=1 for the last three):

    POST /inference/v1/generate   one prompt's token ids and vLLM's SamplingParams
    GET  /v1/models               the model, its longest sequence, and the adapters that are loaded
    POST /collective_rpc          a method of the worker extension, by name
    POST /reset_prefix_cache
    GET  /weight_info             the label of the weights that the server holds
"""

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import httpx

from rlhf.process.http import is_loopback

_CONNECT_S = 10.0  # longest wait for a connection
_QUOTED = 300  # characters of a server's answer in a message
_FINISHED = ("stop", "length")
_LOWEST = -9999.0  # what a server says in place of minus infinity and of NaN


class ServerFault(Exception):
    """A server is gone, hangs, refuses a request or answers with what makes no sense."""

    def __init__(self, url: str, cause: str) -> None:
        self.url, self.cause = url, cause
        super().__init__(f"{url}: {cause}")


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is asked for."""

    token_ids: Sequence[int]  # of the prompt
    params: Mapping[str, Any]  # vLLM's SamplingParams, by their names
    group: str = ""  # requests of one group go to one server, which reads their prompt once
    model: str | None = None  # the adapter's name; None: the model alone


@dataclass(frozen=True, slots=True)
class Written:
    """One response. T: its tokens."""

    token_ids: list[int]  # [T]
    logprobs: list[float]  # [T] nats, under the sampling distribution
    finish_reason: str  # stop or length
    versions: list[str]  # [T] labels of the weights that wrote each token
    # of the prompt's tokens after the first, nats; empty where none were asked for
    prompt_logprobs: list[float] = field(default_factory=list)


class Server:
    """A running server, by its address and bearer token. Any thread may call it."""

    def __init__(
        self, url: str, token: str | None, *, limit_s: float = 600.0, at_once: int = 256
    ) -> None:
        """`limit_s`: longest wait for an answer. `at_once`: requests that are open together."""
        self.url = url.rstrip("/")
        self.at_once = at_once
        self._limit_s = limit_s
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        host = httpx.URL(self.url).host
        self._client = httpx.Client(
            headers=headers,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=at_once),
            trust_env=not is_loopback(host),  # no proxy can reach a loopback address
        )

    def generate(self, requests: Sequence[Request]) -> list[Written]:
        """Responses in the order of the requests, which are open together. Raises ServerFault."""
        with ThreadPoolExecutor(min(self.at_once, max(1, len(requests)))) as threads:
            return list(threads.map(self.write, requests))

    def write(self, request: Request, *, limit_s: float | None = None) -> Written:
        """One response. Raises ServerFault."""
        body: dict[str, Any] = {
            "token_ids": list(request.token_ids),
            "sampling_params": dict(request.params),
        }
        if request.model is not None:
            body["model"] = request.model
        answer = self.post("/inference/v1/generate", body, limit_s=limit_s)
        try:
            return _written(answer, request.token_ids)
        except (KeyError, TypeError, ValueError) as error:
            text = shorten(f"{type(error).__name__}: {error}", _QUOTED, placeholder=" ...")
            raise ServerFault(self.url, f"its response makes no sense ({text})") from error

    def call(self, method: str, *, limit_s: float | None = None, **kwargs: Any) -> list[Any]:
        """A method of the worker extension, in every worker: what each returned. Raises
        ServerFault.
        """
        body = {"method": method, "kwargs": kwargs}
        answer = self.post("/collective_rpc", body, limit_s=limit_s)
        if answer is None:
            return []
        if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
            raise ServerFault(self.url, f"/collective_rpc {method} answered {_quoted(answer)}")
        results: list[Any] = answer["results"]
        return results

    def post(
        self, route: str, body: Mapping[str, Any] | None = None, *, limit_s: float | None = None
    ) -> Any:
        """POST; the answer's JSON, None where it has no body. Raises ServerFault."""
        return self._send("POST", route, {} if body is None else body, limit_s)

    def get(self, route: str, *, limit_s: float | None = None) -> Any:
        """GET; the answer's JSON, None where it has no body. Raises ServerFault."""
        return self._send("GET", route, None, limit_s)

    def longest(self) -> int | None:
        """Tokens of the longest sequence that it takes; None where it does not say. Raises
        ServerFault.
        """
        answer = self.get("/v1/models", limit_s=_CONNECT_S)
        try:
            longest = answer["data"][0]["max_model_len"]
        except (KeyError, IndexError, TypeError):
            raise ServerFault(self.url, f"/v1/models answered {_quoted(answer)}") from None
        return longest if isinstance(longest, int) else None

    def held_version(self) -> str:
        """The label of the weights that it holds. Raises ServerFault."""
        answer = self.get("/weight_info", limit_s=_CONNECT_S)
        if not isinstance(answer, dict) or not isinstance(answer.get("weight_version"), str):
            raise ServerFault(self.url, f"/weight_info answered {_quoted(answer)}")
        version: str = answer["weight_version"]
        return version

    def close(self) -> None:
        self._client.close()

    def _send(
        self, method: str, route: str, body: Mapping[str, Any] | None, limit_s: float | None
    ) -> Any:
        limit = self._limit_s if limit_s is None else limit_s
        timeout = httpx.Timeout(limit, connect=min(limit, _CONNECT_S))
        try:
            answer = self._client.request(method, self.url + route, json=body, timeout=timeout)
        except httpx.TimeoutException as error:
            cause = f"no answer to {route} within {limit:g} s ({type(error).__name__})"
            raise ServerFault(self.url, cause) from error
        # a closed client raises RuntimeError
        except (httpx.HTTPError, RuntimeError, OSError) as error:
            cause = f"no answer to {route} ({type(error).__name__}: {error})"
            raise ServerFault(self.url, cause) from error
        if not answer.is_success:
            cause = f"{route} answered {answer.status_code}: {_quoted(answer.text)}"
            raise ServerFault(self.url, cause)
        if not answer.content or answer.content == b"null":
            return None
        try:
            return answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            cause = f"{route} answered no JSON: {_quoted(answer.text)}"
            raise ServerFault(self.url, cause) from error


def _quoted(value: Any) -> str:
    return shorten(str(value), _QUOTED, placeholder=" ...")


def _written(answer: Any, prompt: Sequence[int]) -> Written:
    """The response in a server's answer. Raises KeyError, TypeError or ValueError for one that
    makes no sense.
    """
    (choice,) = answer["choices"]
    token_ids = choice["token_ids"]
    if not token_ids or not all(isinstance(token, int) for token in token_ids):
        raise ValueError(f"token_ids are {_quoted(token_ids)}")
    reason = choice["finish_reason"]
    if reason not in _FINISHED:
        raise ValueError(f"finish_reason is {reason!r}")
    content = choice["logprobs"]["content"]
    if [entry["token_id"] for entry in content] != token_ids:
        raise ValueError("logprobs are of other tokens than token_ids")
    logprobs = [_logprob(entry["logprob"]) for entry in content]
    versions = _versions(choice["weight_versions"], len(token_ids))
    of_prompt = answer.get("prompt_logprobs")
    if of_prompt is None:
        return Written(token_ids, logprobs, reason, versions)
    if len(of_prompt) != len(prompt):
        raise ValueError(f"{len(of_prompt)} prompt_logprobs for {len(prompt)} tokens")
    later = zip(of_prompt[1:], prompt[1:], strict=True)
    known = [_logprob(position[str(token)]["logprob"]) for position, token in later]
    return Written(token_ids, logprobs, reason, versions, known)


def _logprob(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number <= _LOWEST:
        raise ValueError(f"a log-probability is {value!r}")
    return number


def _versions(spans: Any, tokens: int) -> list[str]:
    """The label of each token's weights, from spans [start, end) that follow one another."""
    labels: list[str] = []
    for span in spans or []:
        if span["start"] != len(labels) or span["end"] <= span["start"]:
            raise ValueError(f"weight_versions are {_quoted(spans)}")
        labels += [str(span["version"])] * (span["end"] - span["start"])
    if len(labels) != tokens:
        raise ValueError(f"weight_versions are {_quoted(spans)} for {tokens} tokens")
    return labels
