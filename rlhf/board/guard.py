"""Who may ask: browsers of this machine that came by the link, for this host, from our own pages.

Every request passes here, before any route. What is refused has a plain text and no cookie.
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

COOKIE = "board_session"
OPEN = ("/static/",)  # style and script: the same for everybody
ANNOTATE = "/annotate/"  # links of annotators: each has a token that opens its one page
READING = ("GET", "HEAD")
TOKEN = "token"  # of the link's query

# Nothing loads or runs but our own files, and no text becomes markup (Trusted Types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-src 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    # with no-referrer browsers would send POSTs of our own forms with "Origin: null"
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


@dataclass
class Doors:
    """What opens the page: words of links, and the sessions that they began."""

    fixed: str | None = None  # opens as often as one likes
    announce: Callable[[str], None] = print  # gets each new word
    _word: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    _sessions: set[str] = field(default_factory=set)

    @property
    def word(self) -> str:
        """What the next link needs."""
        return self.fixed or self._word

    def enter(self, word: str) -> str | None:
        """A new session for a right word, which is then spent; None for a wrong one."""
        if not hmac.compare_digest(word.encode(), self.word.encode()):
            return None
        session = secrets.token_urlsafe(32)
        self._sessions.add(session)
        if self.fixed is None:
            self._word = secrets.token_urlsafe(24)
            self.announce(self._word)
        return session

    def knows(self, session: str) -> bool:
        """Whether a cookie's session was begun here."""
        given = session.encode()
        return any(hmac.compare_digest(given, known.encode()) for known in self._sessions)


class Guard:
    """ASGI middleware in front of `app`."""

    def __init__(
        self, app: App, doors: Doors, hosts: Sequence[str], public: Sequence[str] = ()
    ) -> None:
        """hosts: allowed Host headers, with their ports. public: paths, beside style and script,
        that check their visitors themselves (an annotator's link).
        """
        self._app, self._doors = app, doors
        self._hosts = {host.lower() for host in hosts}
        self._open = (*OPEN, *public)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self._refusal(request)
        sending = _with_headers(send)
        if refusal is not None:
            await refusal(scope, receive, sending)
        else:
            await self._app(scope, receive, sending)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "").lower()
        if host not in self._hosts:
            return PlainTextResponse("This page is not served under that name.", 421)
        if request.method not in READING and not _is_ours(request, host):
            return PlainTextResponse("The request did not come from this page.", 403)
        if request.url.path.startswith(self._open):
            return None
        word = parse_qs(request.url.query).get(TOKEN)
        if word and request.method == "GET":
            return self._enter(request, word[0])
        if self._doors.knows(request.cookies.get(COOKIE, "")):
            return None
        return PlainTextResponse(
            "Open the link that the terminal shows: it lets this browser in. "
            "It works once; after each use the terminal shows the next.",
            401,
        )

    def _enter(self, request: Request, word: str) -> Response:
        session = self._doors.enter(word)
        if session is None:
            if self._doors.knows(request.cookies.get(COOKIE, "")):
                return RedirectResponse(request.url.path, 303)
            return PlainTextResponse(
                "This link was used already, or is wrong. The terminal shows the next.", 401
            )
        answer = RedirectResponse(request.url.path, 303)
        answer.set_cookie(COOKIE, session, httponly=True, samesite="strict")
        return answer


def _is_ours(request: Request, host: str) -> bool:
    """Whether a form or a script of this page sent it. Browsers name the origin of every POST."""
    origin = urlsplit(request.headers.get("origin", ""))
    return origin.scheme in ("http", "https") and origin.netloc.lower() == host


def _with_headers(send: Send) -> Send:
    """`send` that adds what every answer has; a route's own policy stays."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [
                *message["headers"],
                *((name, value) for name, value in more if name not in given),
            ]
        await send(message)

    return sending
