"""One running vLLM server by its HTTP routes: token ids in, token ids and log-probabilities out.

vLLM 0.32's routes that are used here (VLLM_SERVER_DEV_MODE=1 for the last three):

    POST /inference/v1/generate   one prompt's token ids and vLLM's SamplingParams
    GET  /v1/models               the model, its longest sequence, and the adapters that are loaded
    POST /collective_rpc          a method of the worker extension, by name
    POST /reset_prefix_cache
    GET  /weight_info             the label of the weights that the server holds
"""

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
        self._threads = ThreadPoolExecutor(at_once, f"rollout-{host}")
        self.open = 0  # work that was submitted and is not done, of all threads
        self._counting = threading.Lock()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # or a line for each request

    def generate(self, requests: Sequence[Request]) -> list[Written]:
        """Responses in the order of the requests, which are open together. Raises ServerFault."""
        return list(self._threads.map(self.write, requests))

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work`, which sends a request, done beside others, `at_once` at a time."""
        self._count(1)
        self._threads.submit(work).add_done_callback(lambda _: self._count(-1))

    def _count(self, change: int) -> None:
        with self._counting:
            self.open += change

    def write(self, request: Request, *, limit_s: float | None = None) -> Written:
        """One response. Raises ServerFault."""
        with self._understood():
            return _written(self._ask(request, limit_s))

    def logprobs(self, token_ids: Sequence[int], *, model: str | None = None) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) in nats for i >= 1, at temperature 1. Raises
        ServerFault.
        """
        *context, last = token_ids
        # The last token is asked for by name at the first position generated, so that the longest
        # sequence fits as well. Twice, since a server tells as many as were asked for, the token
        # that it drew among them.
        params = {
            "temperature": 0.0,
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "logprobs": 2,
            "logprob_token_ids": [last, last],
            "detokenize": False,
        }
        with self._understood():
            answer = self._ask(Request(context, params, model=model), None)
            known = zip(answer["prompt_logprobs"][1:], context[1:], strict=True)
            values = [_logprob(position[str(token)]["logprob"]) for position, token in known]
            (choice,) = answer["choices"]
            (drawn,) = choice["logprobs"]["content"]
            told = {entry["token_id"]: entry["logprob"] for entry in drawn["top_logprobs"]}
            return [*values, _logprob(told[last])]

    def probe(self, *, model: str | None = None, limit_s: float) -> None:
        """Have one token written: /health says nothing about a worker that hangs. Raises
        ServerFault.
        """
        params = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "detokenize": False}
        self.write(Request([0], params, model=model), limit_s=limit_s)

    def _ask(self, request: Request, limit_s: float | None) -> Any:
        body: dict[str, Any] = {
            "token_ids": list(request.token_ids),
            "sampling_params": dict(request.params),
        }
        if request.model is not None:
            body["model"] = request.model
        return self.post("/inference/v1/generate", body, limit_s=limit_s)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """What can't be read of an answer, as a ServerFault."""
        try:
            yield
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
        """POST; the answer's JSON, or text, or None where it has no body. Raises ServerFault."""
        return self._send("POST", route, {} if body is None else body, limit_s)

    def get(self, route: str, *, limit_s: float | None = None) -> Any:
        """GET, as `post`. Raises ServerFault."""
        return self._send("GET", route, None, limit_s)

    def longest(self) -> int:
        """Tokens of the longest sequence that it takes. Raises ServerFault."""
        with self._understood():
            return int(self._models()[0]["max_model_len"])

    def adapters(self) -> list[str]:
        """Names of the adapters that it holds. Raises ServerFault."""
        with self._understood():
            return [str(entry["id"]) for entry in self._models()[1:]]

    def _models(self) -> list[Any]:
        """The model that it serves, and its adapters."""
        answer = self.get("/v1/models", limit_s=_CONNECT_S)
        models = answer["data"]
        if not isinstance(models, list) or not models:
            raise ValueError(f"/v1/models answered {_quoted(answer)}")
        return models

    def held_version(self) -> str:
        """The label of the weights that it holds. Raises ServerFault."""
        answer = self.get("/weight_info", limit_s=_CONNECT_S)
        if not isinstance(answer, dict) or not isinstance(answer.get("weight_version"), str):
            raise ServerFault(self.url, f"/weight_info answered {_quoted(answer)}")
        version: str = answer["weight_version"]
        return version

    def close(self) -> None:
        """Close the connections; requests that are open fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(RuntimeError):  # that requests are open
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
        if not answer.content:
            return None
        if "json" not in answer.headers.get("content-type", ""):
            return answer.text
        try:
            return answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            cause = f"{route} answered no JSON: {_quoted(answer.text)}"
            raise ServerFault(self.url, cause) from error


def _quoted(value: Any) -> str:
    return shorten(str(value), _QUOTED, placeholder=" ...")


def _written(answer: Any) -> Written:
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
    return Written(token_ids, logprobs, reason, versions)


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
