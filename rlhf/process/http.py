"""What a client of an HTTP service needs: the server's address, the bearer token, and the pauses
between attempts.
"""

import datetime
import email.utils
import ipaddress
import os
import random
import re

import httpx

from rlhf.types import UserError

FIRST_PAUSE_S = 0.5  # before the second attempt; each further pause is twice as long
LONGEST_PAUSE_S = 30.0
_MOST_TOKEN = 4096  # characters of a bearer token
# A generator of its own: draws from the global one belong to the run and must not depend on a
# network.
_JITTER = random.Random()


def bearer_token(variable: str, key: str) -> str:
    """The token in the environment variable `variable`, which the option `key` holds.

    Raises UserError. No message quotes the token, not even where it was given instead of the
    variable's name.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError(
            f"{key} is no environment variable's name of capital letters, digits and "
            "underscores. Put the token into one and give its name."
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"{key}={variable}: this environment variable is not set, expected a bearer token in "
            f"it. Remedy: export {variable}=<token>."
        )
    if len(token) > _MOST_TOKEN or not all("!" <= c <= "~" for c in token):
        raise UserError(
            f"{key}={variable}: its value can't be a bearer token: expected at most "
            f"{_MOST_TOKEN} printable ASCII characters, no spaces."
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_url(url: str | None, key: str) -> httpx.URL:
    """The server's address. Raises UserError, which never quotes a part that may be secret."""
    remedy = f"Expected {key}=http(s)://host[:port][/path]"
    if url is None:
        raise UserError(f"{key} is not set, expected a server's address. {remedy}.")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{key} is no URL: {error}. {remedy}.") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UserError(
            f"{key} holds a user, a query or a fragment. {remedy}; a secret goes into the "
            "environment variable that token_env names."
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{key}={url}: has no scheme or host that can be reached. {remedy}.")
    return parsed


def check_remote(url: str | None, token_env: str | None, key: str) -> None:
    """Check a remote reward before the run starts: its address, and that the token is set. The
    server itself is asked with the first responses. Raises UserError.
    """
    checked_url(url, f"{key}.url")
    if token_env is not None:
        bearer_token(token_env, f"{key}.token_env")


def _longest_pause_s(retry: int) -> float:
    return min(FIRST_PAUSE_S * 2**retry, LONGEST_PAUSE_S)


def pause_s(retry: int) -> float:
    """Seconds to wait before retry number `retry`, counted from 0.

    The pause doubles up to LONGEST_PAUSE_S; a random half of it is taken off, so that clients that
    failed together don't come back together.
    """
    return _longest_pause_s(retry) * _JITTER.uniform(0.5, 1.0)


def all_pauses_s(retries: int) -> float:
    """The most seconds that `retries` retries wait together."""
    return sum(_longest_pause_s(retry) for retry in range(retries))


def retry_after_s(answer: httpx.Response) -> float:
    """Seconds that the Retry-After header asks to wait (RFC 9110, section 10.2.3: a number or a
    date); 0 where the header is missing or can't be read.
    """
    value = answer.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
