"""The gateway as an ASGI application.

POST /v1/chat/completions    as OpenAI has it; the user by a header or the field `user`
GET  /v1/models              the one model that clients see
POST /v1/feedback            rlhf/gateway/saying.py
POST /v1/forget              {"user": NAME}: all that is kept of a user is deleted
GET  /health                 open
GET  /operator               the page; the operator's key, as a bearer token or a password
GET  /operator/state         the same as JSON
PUT  /operator/arms          other arms or weights; the operator's bearer token
"""

import asyncio
import contextlib
import hmac
import json
import logging
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rlhf.gateway import keeping, page, saying
from rlhf.gateway.arms import Arms, arms_of
from rlhf.gateway.clean import Cleaner
from rlhf.gateway.proxy import HEADERS, Once, Opened, Proxy, Streamed
from rlhf.gateway.recent import Recent
from rlhf.gateway.records import Answered, Arm, Refused, Said
from rlhf.gateway.rewriting import Rewriter, error_body, request_for
from rlhf.gateway.split import pseudonym
from rlhf.gateway.state import State, state_of
from rlhf.gateway.store import Store
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.gateway")
_BODY_S = 30.0  # for a request to arrive
_MOST_NAME = 256  # characters of a user's name
_CONSENT = "x-consent"
_YES = ("1", "true", "yes")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the gateway was started with."""

    model: str  # as clients know it
    client_token: str
    operator_token: str
    user_header: str
    most_body: int  # bytes
    at_once: int
    failover: bool
    alpha: float
    votes: int
    retention_days: float
    poll_s: float


class Gateway:
    """Everything behind the routes."""

    def __init__(
        self,
        rules: Rules,
        key: bytes,
        arms: Arms,
        store: Store,
        proxy: Callable[[Callable[[Arm, str], None]], Proxy],
        cleaner: Cleaner,
        recent: Recent,
    ) -> None:
        self.rules, self.arms, self.store = rules, arms, store
        self._key, self._cleaner, self._recent = key, cleaner, recent
        self._proxy = proxy(self._failed)
        self._busy = 0

    def _failed(self, arm: Arm, what: str) -> None:
        LOG.warning("arm %s (%s): %s", arm.name, arm.address, what)
        self.store.submit(lambda db: keeping.count(db, what, arm.name))

    # ---- what comes in ----

    def _allow(self, request: Request, token: str, *, password: bool = False) -> None:
        """Raises Refused for another key. password: HTTP's basic scheme will do, as browsers ask
        for it; never for a change, since browsers send it by themselves.
        """
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip()
        if password and scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                given = b64decode(given).decode("utf-8", "replace").partition(":")[2]
            scheme = "bearer"
        same = hmac.compare_digest(given.encode(), token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refused(401, "expected the header Authorization: Bearer <key>", "unauthorized")

    async def _json(self, request: Request) -> dict[str, Any]:
        """The body as an object. Raises Refused; reading stops where it is too long."""
        most = self.rules.most_body
        too_long = Refused(413, f"the request has more than {most} bytes")
        content = bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                async for piece in request.stream():
                    content += piece
                    if len(content) > most:
                        raise too_long
        except (TimeoutError, ClientDisconnect) as error:
            raise Refused(408, "the request did not arrive") from error
        try:
            body = json.loads(bytes(content), parse_constant=_no_number)
            json.dumps(body, ensure_ascii=False).encode()  # half a character can't be passed on
        except (ValueError, RecursionError) as error:
            raise Refused(400, "expected a JSON object of whole characters") from error
        if not isinstance(body, dict):
            raise Refused(400, "expected a JSON object")
        return body

    def _user(self, request: Request, body: Mapping[str, Any]) -> str:
        """The user's name. Raises Refused."""
        header, field = request.headers.get(self.rules.user_header), body.get("user")
        if header is not None and field is not None and header != field:
            raise Refused(400, f"user: the field and the header {self.rules.user_header} differ")
        name = field if header is None else header
        if not isinstance(name, str) or not name.strip() or len(name) > _MOST_NAME:
            raise Refused(
                400,
                f"expected the user's name, of at most {_MOST_NAME} characters, in the header "
                f"{self.rules.user_header} or the field user",
            )
        return name

    # ---- answers ----

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._allow(request, self.rules.client_token)
        if self._busy >= self.rules.at_once:
            raise Refused(503, "too many requests wait; try again", "unavailable")
        self._busy += 1
        leave = Once(self._leave)
        try:
            return await self._complete(request, leave)
        except BaseException:
            leave()
            raise

    def _leave(self) -> None:
        self._busy -= 1

    async def _complete(self, request: Request, leave: Once) -> Response:
        body = await self._json(request)
        name = self._user(request, body)
        consent = request.headers.get(_CONSENT, "").strip().lower() in _YES
        request_for(body, self.rules.model, "")  # refused before an arm is chosen
        user = pseudonym(self._key, name)
        own, epoch = await self.arms.of(self._key, user), self.arms.epoch
        tried = [own, *(self.arms.others(own) if self.rules.failover else [])]
        opened = await self._proxy.open(
            tried, lambda arm: request_for(body, self.rules.model, arm.served)
        )
        rewriter = Rewriter(self.rules.model)
        given = _Given(name, user, own, opened, epoch, consent, body, rewriter)
        if not body.get("stream", False):
            content = await self._proxy.whole(opened, rewriter)
            self._keep(given)
            leave()
            return Response(content, headers=HEADERS, media_type="application/json")
        keep = Once(lambda: self._keep(given))
        return Streamed(self._proxy.stream(opened, rewriter, keep), opened, leave)

    def _keep(self, given: "_Given") -> None:
        """Note the answer; its texts in memory, and on the disk with the user's consent."""
        answered = given.answered()
        self._recent.add(answered)
        if given.opened.arm.name != given.own.name:
            self.store.submit(lambda db: keeping.count(db, "failover", given.own.name))
        if given.consent:
            self.store.submit(lambda db: self._write_texts(db, answered, given.name))
        else:
            bare = replace(answered, messages=None, choices=None, tools=None)
            self.store.submit(lambda db: keeping.keep_answer(db, bare))

    def _write_texts(self, db: keeping.Db, answered: Answered, name: str) -> None:
        counts: Counter[str] = Counter()
        clean = replace(
            answered,
            messages=self._cleaner.clean(answered.messages, name, counts),
            choices=self._cleaner.clean(answered.choices, name, counts),
            tools=self._cleaner.clean(answered.tools, name, counts),
        )
        keeping.keep_answer(db, clean, counts)

    # ---- feedback ----

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback: answered once it is on the disk."""
        self._allow(request, self.rules.client_token)
        body = await self._json(request)
        name = self._user(request, body)
        said = saying.parse(body, pseudonym(self._key, name))
        texts = await asyncio.wrap_future(self.store.submit(lambda db: self._note(db, said, name)))
        return JSONResponse({"kept": True, "texts": texts}, headers=HEADERS)

    def _note(self, db: keeping.Db, said: Said, name: str) -> bool:
        """Write feedback, and with consent the answers' texts where they are still in memory.
        Returns whether the texts are kept. Raises Refused.
        """
        names = [said.answer] if said.over is None else [said.answer, said.over[0]]
        kept = [keeping.answer(db, each) for each in names]
        memory = [self._recent.get(each) for each in names]
        compared = memory if all(memory) and all(kept) else kept  # texts of one kind, or none
        saying.check(said, compared[0], compared[-1])
        for known in memory:
            if said.consent and known is not None:
                self._write_texts(db, known, name)
        counts: Counter[str] = Counter()
        clean = replace(
            said,
            edit=self._cleaner.clean(said.edit, name, counts),
            reason=self._cleaner.clean(said.reason, name, counts),
        )
        keeping.keep_feedback(db, clean, counts, self.rules.votes)
        after = keeping.answer(db, said.answer)
        return said.consent and after is not None and after.messages is not None

    async def forget(self, request: Request) -> Response:
        """POST /v1/forget."""
        self._allow(request, self.rules.client_token)
        name = self._user(request, await self._json(request))
        user = pseudonym(self._key, name)
        self._recent.forget(user)
        self.arms.forget(user)
        gone = await asyncio.wrap_future(
            self.store.submit(lambda db: keeping.forget(db, user), wipe=True)
        )
        return JSONResponse({"deleted": gone}, headers=HEADERS)

    # ---- looking ----

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._allow(request, self.rules.client_token)
        model = {"id": self.rules.model, "object": "model", "created": 0, "owned_by": "gateway"}
        return JSONResponse({"object": "list", "data": [model]}, headers=HEADERS)

    async def health(self, _: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"}, headers=HEADERS)

    def _state(self) -> State:
        return state_of(self.store, self.arms, self.rules.alpha)

    async def operator(self, request: Request) -> Response:
        """GET /operator."""
        self._allow(request, self.rules.operator_token, password=True)
        found = await asyncio.to_thread(self._state)
        return HTMLResponse(page.html(self.rules.model, found), headers={**HEADERS, **page.HEADERS})

    async def operator_state(self, request: Request) -> Response:
        """GET /operator/state."""
        self._allow(request, self.rules.operator_token)
        found = await asyncio.to_thread(self._state)
        return JSONResponse(found.as_json(), headers=HEADERS)

    async def operator_arms(self, request: Request) -> Response:
        """PUT /operator/arms."""
        self._allow(request, self.rules.operator_token)
        wanted = arms_of(await self._json(request))
        try:
            await self.arms.change(wanted)
        except UserError as error:
            raise Refused(400, str(error)) from error
        return JSONResponse({"shares": self.arms.shares}, headers=HEADERS)

    # ---- beside the requests ----

    def _expire(self, db: keeping.Db) -> None:
        keeping.expire(db, self.rules.retention_days)

    async def watch(self, stop: asyncio.Event) -> None:
        """Follow the registry, keep decisions, delete what is too old, until `stop`."""
        while not stop.is_set():
            try:
                await self.arms.refresh()
                await asyncio.to_thread(self._state)  # keeps a decision
                await asyncio.wrap_future(self.store.submit(self._expire))
            except Exception:
                LOG.exception("gateway: what runs beside the requests failed, and is tried again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.rules.poll_s)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


@dataclass(frozen=True, slots=True)
class _Given:
    """A request that is being answered."""

    name: str  # the user's
    user: str  # pseudonym
    own: Arm
    opened: Opened
    epoch: int
    consent: bool
    body: Mapping[str, Any]
    rewriter: Rewriter

    def answered(self) -> Answered:
        """As it is kept."""
        arm = self.opened.arm
        texts = self.rewriter.answers
        return Answered(
            id=self.rewriter.id,
            user=self.user,
            arm=arm.name,
            label=arm.label,
            epoch=self.epoch,
            away=arm.name != self.own.name,
            count=max(1, len(texts)),
            messages=self.body["messages"],
            choices=texts,
            tools=self.body.get("tools"),
            whole=self.rewriter.is_whole,
        )


def create_app(gateway: Gateway, close: Callable[[], Any]) -> Starlette:
    """The ASGI application; `close` ends what it uses."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        stop = asyncio.Event()
        watch = asyncio.create_task(gateway.watch(stop))
        yield
        stop.set()
        await watch  # what it reads is not closed under it
        await close()

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = dict(HEADERS)
        if error.status == 401:
            headers["www-authenticate"] = 'Basic realm="operator"'
        if error.status == 503:
            headers["retry-after"] = "1"
        return JSONResponse(error_body(error.message, error.code), error.status, headers)

    async def broken(_: Request, error: Exception) -> Response:
        LOG.error("gateway: %s", type(error).__name__, exc_info=error)
        return JSONResponse(error_body("the gateway failed", "internal_error"), 500, HEADERS)

    routes = [
        Route("/v1/chat/completions", gateway.complete, methods=["POST"]),
        Route("/v1/models", gateway.models),
        Route("/v1/feedback", gateway.feedback, methods=["POST"]),
        Route("/v1/forget", gateway.forget, methods=["POST"]),
        Route("/health", gateway.health),
        Route("/operator", gateway.operator),
        Route("/operator/state", gateway.operator_state),
        Route("/operator/arms", gateway.operator_arms, methods=["PUT"]),
    ]
    handlers: dict[Any, Any] = {Refused: refused, Exception: broken}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
