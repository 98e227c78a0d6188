"""Secrets stay out of all that is written: a run's files, logs, error messages, tracebacks,
trackers.

A secret is known by the option's name, by its form, or because an environment variable whose name
says so holds it. Who types a secret as a plain option of another name and form is not helped.
"""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

REDACTED = "***"
_NAME = re.compile(
    r"(^|[._-])(api[_-]?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE
)
# W&B's older keys; a commit looks the same, so messages keep it
_HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")
_FORM = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|wandb_v\d_[A-Za-z0-9_]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,})\b"
)
_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")  # user:password of an address
_BEARER = re.compile(r"(?<=bearer )[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"(?<![\w.-])([\w.-]*[._-]?(?:api[_-]?key|token|secret|password|passwd|credentials?))=([^\s,;'\"\])}]+)",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"(^|_)(key|token|secret|password|passwd|pass|credentials?|pat)(_|$)", re.IGNORECASE
)
_SHORTEST = 8  # characters; a shorter value may stand in any text by chance


def of_environment() -> list[str]:
    """Values of environment variables whose names say that they are secret, the longest first; a
    file's path is none.
    """
    found = {value.strip() for name, value in os.environ.items() if _VARIABLE.search(name)}
    return sorted(
        (value for value in found if len(value) >= _SHORTEST and not os.path.exists(value)),
        key=len,
        reverse=True,
    )


def text(value: str) -> str:
    """A message without secrets."""
    for secret in of_environment():
        value = value.replace(secret, REDACTED)
    value = _USER.sub(REDACTED, _FORM.sub(REDACTED, value))
    value = _BEARER.sub(REDACTED, value)
    return _ASSIGNED.sub(
        lambda match: f"{match[1]}={REDACTED}" if _NAME.search(match[1]) else match[0], value
    )


def redact(name: str, value: Any) -> Any:
    """`value` of the option `name`, or ``***`` for it or what in it is secret; containers item by
    item.
    """
    if isinstance(value, dict):
        return {k: redact(str(k), v) for k, v in value.items()}
    if isinstance(value, list):
        return [redact(name, v) for v in value]
    if _NAME.search(name) and value is not None:
        return REDACTED
    return _HEX_KEY.sub(REDACTED, text(value)) if isinstance(value, str) else value


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line without secrets: ``+some.api_key=abc`` becomes ``+some.api_key=***``."""
    out = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        out.append(f"{name}={redact(name, value)}" if equals else str(redact("", argument)))
    return out


@contextlib.contextmanager
def redacted_arguments() -> Iterator[None]:
    """While inside, ``sys.argv`` has no secrets: trackers record it."""
    before = sys.argv
    sys.argv = [before[0], *arguments(before[1:])]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def redacted_logs() -> Iterator[None]:
    """While inside, no log record of any library holds a secret, its traceback included."""
    before = logging.getLogRecordFactory()

    def make(*given: Any, **named: Any) -> logging.LogRecord:
        record = before(*given, **named)
        # a record that can't be formatted is the handler's to report
        with contextlib.suppress(Exception):
            message = record.getMessage()
            clean = text(message)
            if clean != message:
                record.msg, record.args = clean, ()
            if record.exc_info:
                record.exc_text = text(
                    "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
                )
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A bug's traceback, as Python prints it, without secrets."""
    sys.stderr.write(text("".join(traceback.format_exception(kind, error, trace))))
