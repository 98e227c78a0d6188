"""What of an arm's answer reaches a client: the fields of OpenAI's format that every arm has, with
an id, a time and a model's name of the gateway's own. Everything else stays behind: fingerprints,
token ids, log-probabilities, stop reasons, headers, and whatever a server adds.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.gateway.records import Refused

# What a request may hold. Others are refused by name: an arm might answer to them in its own way.
_PASSED = (
    "messages",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stream",
    "stream_options",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
)
_OWN = ("model", "user")
_MESSAGE = ("role", "content", "reasoning_content", "reasoning", "refusal")
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_REASONS = ("stop", "length", "tool_calls", "content_filter")
_MOST_CHOICES = 8
_DATA, _DONE = b"data:", b"[DONE]"

UNAVAILABLE = "the model did not answer; try again later"


def unavailable() -> Refused:
    """The one answer to all that is wrong behind the gateway."""
    return Refused(503, UNAVAILABLE, "unavailable")


def request_for(body: Mapping[str, Any], model: str, served: str) -> dict[str, Any]:
    """The request as an arm gets it, without the user. Raises Refused."""
    if body.get("model") != model:
        raise Refused(404, f"there is no model {body.get('model')!r} here; use {model!r}")
    unknown = [name for name in body if name not in (*_PASSED, *_OWN)]
    if unknown:
        raise Refused(
            400, f"fields that are not passed on: {', '.join(map(str, unknown))}. Leave them out"
        )
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise Refused(400, "messages: expected a list of messages")
    count = body.get("n", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MOST_CHOICES:
        raise Refused(400, f"n: expected a number from 1 to {_MOST_CHOICES}")
    if not isinstance(body.get("stream", False), bool):
        raise Refused(400, "stream: expected true or false")
    passed = {name: body[name] for name in _PASSED if name in body}
    return {**passed, "model": served}


@dataclass
class Rewriter:
    """One answer on its way to the client, and its texts for rows."""

    model: str  # as clients know it
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    ended: bool = False  # a stream's [DONE] came
    called: bool = False  # an answer called functions
    _calls: dict[str, str] = field(default_factory=dict)  # ids of calls, the server's and ours
    _rest: bytes = b""

    # ---- a whole answer ----

    def whole(self, content: bytes) -> bytes:
        """A server's whole answer as the client gets it. Raises Refused for what is none."""
        given = _object(content)
        choices = [self._choice(choice, "message") for choice in _choices(given)]
        if not choices:
            raise unavailable()
        content_for = {**self._head("chat.completion"), "choices": choices, **_usage(given)}
        return json.dumps(content_for).encode()

    # ---- a stream ----

    def feed(self, content: bytes, most: int) -> Iterator[bytes]:
        """Whole events for the client, out of the next bytes of a server's stream; `most` bytes may
        wait for their line's end. Raises Refused.
        """
        *lines, self._rest = (self._rest + content).split(b"\n")
        if len(self._rest) > most:
            raise unavailable()
        for line in lines:
            text = line.strip()
            if text.startswith(_DATA):
                yield self._event(text[len(_DATA) :].strip())

    def _event(self, text: bytes) -> bytes:
        if text == _DONE:
            self.ended = True
            return b"data: [DONE]\n\n"
        given = _object(text)
        choices = [self._choice(choice, "delta") for choice in _choices(given)]
        chunk = {**self._head("chat.completion.chunk"), "choices": choices, **_usage(given)}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    # ---- both ----

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, choice: Any, key: str) -> dict[str, Any]:
        if not isinstance(choice, dict) or not isinstance(choice.get(key), dict):
            raise unavailable()
        index = choice.get("index", 0)
        if not isinstance(index, int):
            raise unavailable()
        message = {name: choice[key][name] for name in _MESSAGE if name in choice[key]}
        calls = choice[key].get("tool_calls")
        if isinstance(calls, list) and calls:
            self.called = True
            message["tool_calls"] = [self._call(call) for call in calls]
        text = message.get("content")
        self.texts[index] = self.texts.get(index, "") + (text if isinstance(text, str) else "")
        reason = choice.get("finish_reason")
        if reason is not None:
            reason = reason if reason in _REASONS else "stop"
            self.reasons[index] = reason
        return {"index": index, key: message, "finish_reason": reason}

    def _call(self, call: Any) -> dict[str, Any]:
        if not isinstance(call, dict):
            raise unavailable()
        out = {name: call[name] for name in ("index", "type") if name in call}
        given = call.get("id")
        if isinstance(given, str):
            out["id"] = self._calls.setdefault(given, f"call_{secrets.token_hex(12)}")
        function = call.get("function")
        if isinstance(function, dict):
            out["function"] = {n: function[n] for n in ("name", "arguments") if n in function}
        return out

    @property
    def answers(self) -> list[str]:
        """The text of each choice."""
        return [self.texts[index] for index in sorted(self.texts)]

    @property
    def is_whole(self) -> bool:
        """Every choice ended by itself, as a text."""
        ended = [self.reasons.get(index) == "stop" for index in self.texts]
        return bool(ended) and all(ended) and not self.called


def error_body(message: str, code: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def broken_stream() -> bytes:
    """The last event of a stream whose arm went away."""
    content = json.dumps(error_body(UNAVAILABLE, "unavailable"))
    return f"data: {content}\n\n".encode()


def _object(content: bytes) -> dict[str, Any]:
    try:
        given = json.loads(content)
    except ValueError as error:
        raise unavailable() from error
    if not isinstance(given, dict) or "error" in given:
        raise unavailable()
    return given


def _choices(given: Mapping[str, Any]) -> list[Any]:
    choices = given.get("choices")
    if not isinstance(choices, list):
        raise unavailable()
    return choices


def _usage(given: Mapping[str, Any]) -> dict[str, Any]:
    usage = given.get("usage")
    if not isinstance(usage, dict):
        return {}
    return {"usage": {name: usage[name] for name in _USAGE if isinstance(usage.get(name), int)}}
