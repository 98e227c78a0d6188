"""Keeps secrets out of everything that is written: files, logs, messages, tracebacks, trackers.

A secret is recognised by the name of its option, by its form, or because an environment variable
with such a name holds it. A secret of another form in an option of another name is not recognised.
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
_SECRET_NAME = r"(?:api[_-]?key|token|secret|password|passwd|credentials?)"
_NAME = re.compile(rf"(^|[._-]){_SECRET_NAME}$", re.IGNORECASE)
# W&B's older keys. A commit's hash has the same form, so messages keep what has it.
_HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")
_HASH = re.compile(r"\b[0-9a-f]{40,}\b")
_FORMS = (
    r"hf_[A-Za-z0-9]{20,}",
    r"wandb_v\d_[A-Za-z0-9_]{20,}",
    r"sk-[A-Za-z0-9_-]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{30,}",
    r"github_pat_\w{20,}",
    r"glpat-[\w-]{20,}",
)
_FORM = re.compile(rf"\b({'|'.join(_FORMS)})\b")
_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")  # user:password of an address
_BEARER = re.compile(r"(?<=bearer )[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?<![\w.-])([\w.-]*[._-]?{_SECRET_NAME})=([^\s,;'\"\])}}]+)", re.IGNORECASE
)
_VARIABLE = re.compile(
    r"(^|_)(key|token|secret|password|passwd|pass|credentials?|pat)(_|$)", re.IGNORECASE
)
_SHORTEST = 8  # characters; a shorter value may stand in any text by chance


def of_environment() -> list[str]:
    """Values of environment variables with the name of a secret, the longest first.

    The path of a file that exists is no secret.
    """
    values = {value.strip() for name, value in os.environ.items() if names_secret(name)}
    secrets = [v for v in values if len(v) >= _SHORTEST and not os.path.exists(v)]
    return sorted(secrets, key=len, reverse=True)


def names_secret(variable: str) -> bool:
    """Whether an environment variable has the name of a secret."""
    return _VARIABLE.search(variable) is not None


def _without_value(match: re.Match[str]) -> str:
    """``api_key=***`` for an assignment to the name of a secret; others as they are."""
    return f"{match[1]}={REDACTED}" if _NAME.search(match[1]) else match[0]


def text(value: str) -> str:
    """A message without secrets."""
    for secret in of_environment():
        value = value.replace(secret, REDACTED)
    for form in (_FORM, _USER, _BEARER):
        value = form.sub(REDACTED, value)
    return _ASSIGNED.sub(_without_value, value)


def report(value: str, *, home: str) -> str:
    """A text that is meant for others, such as a bug report: without secrets, without keys or
    hashes in hexadecimal digits, and with ``~`` for the directory `home` and other users' homes.
    """
    value = _HASH.sub(REDACTED, text(value))
    home = home.rstrip("/")
    if home:
        value = re.sub(re.escape(home) + r"(?=/|\b)", "~", value)
    return re.sub(r"/(?:home|Users)/[^/\s]+", "~", value)


def redact(name: str, value: Any) -> Any:
    """The value of the option `name` with ``***`` in place of secrets, also inside containers."""
    if isinstance(value, dict):
        return {key: redact(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact(name, inner) for inner in value]
    if _NAME.search(name) and value is not None:
        return REDACTED
    if isinstance(value, str):
        return _HEX_KEY.sub(REDACTED, text(value))
    return value


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
        # The handler reports a record that can't be formatted.
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
