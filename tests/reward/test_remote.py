"""The remote scorer against a server that misbehaves in every way: what passes is repeated, the
rest stops and names the prompt.
"""

import datetime
import email.utils
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from conf.choices import TermKind
from conf.schema import RewardTerm
from reward.model import template_hash, tokenizer_fingerprint
from reward.scorers import remote
from reward.scorers.remote import RemoteScorer
from rlhf.process import http
from rlhf.process.http import checked_url, pause_s, retry_after_s
from rlhf.types import Prompt, Rollout, UserError
from tests.offline.trl_tools import CHATML, tiny_tokenizer

TOKEN = "secret-token-of-the-test"


def term(**fields: Any) -> RewardTerm:
    return RewardTerm(
        kind=TermKind.remote, **{"timeout_s": 5.0, "retries": 2, "batch_size": 2, **fields}
    )


@dataclass(slots=True)
class Reply:
    """One answer: a status and body, after a delay, its headers; `drip` sends the body a byte at a
    time with so many seconds between.
    """

    status: int = 200
    body: bytes | None = None  # None: the lengths of the responses
    delay_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    drip_s: float = 0.0
    hang_up: bool = False


class Fake:
    """A server that plays `replies` to POST /score, one each and the last for ever; it keeps what
    it was sent.
    """

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[list[Any]], Reply]] = [Reply()]
        self.info: dict[str, Any] | None = None
        self.seen: list[list[dict[str, Any]]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.running, self.most = 0, 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                found = fake.info is not None and self.path == "/api/info"
                self.answer(Reply(200 if found else 404, json.dumps(fake.info).encode()))

            def do_POST(self) -> None:
                items = json.loads(self.rfile.read(int(self.headers["content-length"])))["items"]
                with fake.lock:
                    fake.seen.append(items)
                    fake.times.append(time.monotonic())
                    fake.headers.append(
                        {k.lower(): v for k, v in self.headers.items()} | {"path": self.path}
                    )
                    reply = fake.replies.pop(0) if len(fake.replies) > 1 else fake.replies[0]
                    fake.running += 1
                    fake.most = max(fake.most, fake.running)
                reply = reply if isinstance(reply, Reply) else reply(items)
                time.sleep(reply.delay_s)
                with fake.lock:
                    fake.running -= 1
                lengths = json.dumps(
                    {"scores": [len(item["response"]) for item in items], "model": "fake"}
                ).encode()
                self.answer(
                    reply
                    if reply.body is not None
                    else Reply(
                        reply.status, lengths, 0.0, reply.headers, reply.drip_s, reply.hang_up
                    )
                )

            def answer(self, reply: Reply) -> None:
                if reply.hang_up:
                    self.close_connection = True
                    return
                assert reply.body is not None
                try:
                    self.send_response(reply.status)
                    for name, value in {
                        **reply.headers,
                        "content-length": str(len(reply.body)),
                    }.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for i in range(len(reply.body) if reply.drip_s else 0):
                        self.wfile.write(reply.body[i : i + 1])
                        time.sleep(reply.drip_s)
                    if not reply.drip_s:
                        self.wfile.write(reply.body)
                except OSError:
                    self.close_connection = True  # the client lost its patience, as it should

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/api"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def scorer(self, policy_tokenizer: Any = None, **fields: Any) -> RemoteScorer:
        return RemoteScorer(term(url=self.url, **fields), "far", policy_tokenizer=policy_tokenizer)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)
    made = Fake()
    yield made
    made.server.shutdown()
    made.server.server_close()


def rollouts(count: int = 3, **fields: object) -> list[Rollout]:
    """Responses of 1, 2, 3 ... characters, so that a score tells which response it belongs to."""
    return [
        Rollout(
            Prompt(f"p{i}", f"text {i}", (5, 6), f"text {i}", dict(fields)),
            "x" * (i + 1),
            [7],
            [0.0],
            "length" if i == 1 else "stop",
            0,
        )
        for i in range(count)
    ]


def test_scores_come_in_order_from_a_few_batches_at_a_time(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_TOKEN", TOKEN)
    fake.replies = [
        lambda items: Reply(delay_s=0.1 if len(items[0]["response"]) % 4 == 1 else 0.05)
    ]
    found = fake.scorer(token_env="FAR_TOKEN").score(rollouts(19, answer="yes"))
    assert found.total == [float(i + 1) for i in range(19)]
    assert found.terms == {"far": found.total}
    assert sorted(len(items) for items in fake.seen) == [1] + [2] * 9
    assert 2 <= fake.most <= remote.IN_FLIGHT
    assert {h["authorization"] for h in fake.headers} == {f"Bearer {TOKEN}"} and {
        h["path"] for h in fake.headers
    } == {"/api/score"}
    first = next(items for items in fake.seen if items[0]["prompt"] == "text 0")
    assert first == [
        {"prompt": "text 0", "response": "x", "finished": True, "fields": {"answer": "yes"}},
        {"prompt": "text 1", "response": "xx", "finished": False, "fields": {"answer": "yes"}},
    ]
    assert fake.scorer().score([]).terms == {"far": []}


@pytest.mark.parametrize(
    "bad",
    [
        Reply(500),
        Reply(503),
        Reply(429),
        Reply(delay_s=1.0),
        Reply(hang_up=True),
        Reply(drip_s=0.05),
    ],
)
def test_what_may_pass_is_repeated(fake: Fake, bad: Reply) -> None:
    fake.replies = [bad, bad, Reply()]
    assert fake.scorer(timeout_s=0.3, batch_size=8).score(rollouts()).total == [1.0, 2.0, 3.0]
    assert len(fake.seen) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            Reply(500, b"broken <b>inside</b>"),
            r"HTTP 500 broken <b>inside</b> \(attempt 3 of 3\).*'p0'",
        ),
        (Reply(delay_s=1.0), r"no answer within timeout_s=0.2 s.*attempt 3 of 3.*'p0'"),
        (Reply(drip_s=0.05), r"no answer within timeout_s=0.2 s"),
        (Reply(hang_up=True), r"attempt 3 of 3"),
    ],
)
def test_what_does_not_pass_stops_in_time(fake: Fake, bad: Reply, message: str) -> None:
    fake.replies = [bad]
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        fake.scorer(timeout_s=0.2, batch_size=8).score(rollouts())
    assert len(fake.seen) == 3
    assert time.monotonic() - began < 3.0
    assert fake.url in str(error.value)


def test_connection_refused_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        UserError,
        match=rf"http://127.0.0.1:{port}\).*ConnectError.*attempt 2 of 2.*'p0'.*Is the server up",
    ):
        RemoteScorer(term(url=f"http://127.0.0.1:{port}/", retries=1), "far").score(rollouts())


def test_retry_after_is_kept_to(fake: Fake) -> None:
    fake.replies = [Reply(429, headers={"retry-after": "1"}), Reply()]
    assert fake.scorer(batch_size=8).score(rollouts()).total == [1.0, 2.0, 3.0]
    assert 1.0 <= fake.times[1] - fake.times[0] < 2.5


def test_a_wait_beyond_the_limit_is_not_begun(fake: Fake) -> None:
    fake.replies = [Reply(503, headers={"retry-after": "3600"})]
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"HTTP 503.*3.6e\+03 s to wait.*would pass the limit.*attempt 1 of 3"
    ):
        fake.scorer(batch_size=8).score(rollouts())
    assert time.monotonic() - began < 3.0 and len(fake.seen) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(400, b"no"), r"HTTP 400 no for prompt 'p0'.*was not repeated"),
        (
            Reply(401, b'{"error": {"message": "who?"}}'),
            r"HTTP 401 who\? for prompt 'p0'.*token_env",
        ),
        (Reply(413, b"[]"), r"HTTP 413 \[\] for prompt 'p0'.*Lower batch_size"),
        (
            Reply(422, b'{"error": {"message": "too long", "item": 2}}'),
            r"HTTP 422 too long for prompt 'p2' \('text 2'\)",
        ),
        (Reply(422, b'{"error": {"message": "odd", "item": 9}}'), r"HTTP 422 odd for prompt 'p0'"),
        (
            Reply(404, b"gone"),
            r"HTTP 404 gone for prompt 'p0'.*at this url \(http://127.0.0.1:\d+/api/score\)",
        ),
        (Reply(302, b"", headers={"location": "http://127.0.0.1:1/"}), r"HTTP 302"),
    ],
)
def test_refusals_are_not_repeated(fake: Fake, reply: Reply, message: str) -> None:
    fake.replies = [reply]
    with pytest.raises(UserError, match=message):
        fake.scorer(batch_size=8).score(rollouts())
    assert len(fake.seen) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"scores": [1.0, 2.0]}', r"a list of 3 numbers.*found 2 values.*'p0'"),
        (b'{"scores": 1.0}', r"a list of 3 numbers.*found 1.0"),
        (b'{"score": [1, 2, 3]}', r"a list of 3 numbers.*found None"),
        (b'{"scores": [1, null, 3]}', r"returned None for prompt 'p1'"),
        (b'{"scores": [1, 2, NaN]}', r"returned nan for prompt 'p2'"),
        (b'{"scores": [-Infinity, 2, 3]}', r"returned -inf for prompt 'p0'"),
        (b'{"scores": [1, "2", 3]}', r"returned '2' for prompt 'p1'"),
        (b'{"scores": [1, true, 3]}', r"returned True for prompt 'p1'"),
        (b'{"scores": [1, 1e999, 3]}', r"returned inf for prompt 'p1'"),
        (b"[1, 2, 3]", r"expected a JSON object, found \[1, 2, 3\].*'p0'"),
        (b"<html>good morning</html>", r"not JSON: <html>good morning</html>.*'p0'"),
        (b'{"scores": [1, 2', r"not JSON"),
        (b"\xff\xfe\x00", r"not JSON"),
        (b"", r"not JSON"),
    ],
)
def test_anything_but_a_number_per_response_names_the_prompt(
    fake: Fake, body: bytes, message: str
) -> None:
    fake.replies = [Reply(200, body)]
    with pytest.raises(UserError, match=message) as error:
        fake.scorer(batch_size=8).score(rollouts())
    assert len(fake.seen) == 1 and fake.url in str(error.value)


def test_an_answer_in_an_encoding_that_it_is_not_stops(fake: Fake) -> None:
    fake.replies = [Reply(200, b"not gzip", headers={"content-encoding": "gzip"})]
    with pytest.raises(UserError, match=r"can't be read: DecodingError.*'p0'"):
        fake.scorer(batch_size=8).score(rollouts())


def test_first_failure_ends_the_requests_beside_it(fake: Fake) -> None:
    fake.replies = [
        lambda items: Reply(400, b"no") if items[0]["prompt"] == "text 2" else Reply(delay_s=3.0)
    ]
    began = time.monotonic()
    with pytest.raises(UserError, match=r"HTTP 400 no for prompt 'p2'"):
        fake.scorer().score(rollouts(8))
    assert time.monotonic() - began < 2.0


def test_secrets_appear_nowhere(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAR_TOKEN", TOKEN)
    fake.replies = [Reply(500, f"Bearer {TOKEN} is odd".encode())]
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(UserError, match=r"Bearer \*\*\* is odd") as error,
    ):
        fake.scorer(token_env="FAR_TOKEN", retries=1).score(rollouts(1))
    assert TOKEN not in str(error.value) and TOKEN not in caplog.text and "again in" in caplog.text
    for url in (
        f"http://me:{TOKEN}@127.0.0.1/",
        f"http://127.0.0.1/?key={TOKEN}",
        f"http://127.0.0.1/#{TOKEN}",
    ):
        with pytest.raises(UserError, match="environment variable") as error:
            checked_url(url, "reward.terms.far.url")
        assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is not set"),
        (" ", "is not set"),
        ("a b", "can't be a bearer token"),
        ("ö" * 9, "can't be"),
    ],
)
def test_tokens_that_are_none(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
) -> None:
    monkeypatch.delenv("FAR_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("FAR_TOKEN", value)
    with pytest.raises(UserError, match=rf"reward.terms.far.token_env=FAR_TOKEN.*{message}"):
        fake.scorer(token_env="FAR_TOKEN")


@pytest.mark.parametrize(
    "url", [None, "", "127.0.0.1:80", "ftp://host/x", "http://", "http://host:notaport"]
)
def test_urls_that_are_none(url: str | None) -> None:
    with pytest.raises(
        UserError, match=r"reward.terms.far.url.*Expected reward.terms.far.url=http\(s\)://host"
    ):
        RemoteScorer(term(url=url), "far")


def test_token_over_plain_http_is_said_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAR_TOKEN", TOKEN)
    for url, warned in (
        ("http://10.1.2.3:80", True),
        ("https://10.1.2.3", False),
        ("http://localhost:8100", False),
        ("http://[::1]:8100", False),
    ):
        caplog.clear()
        RemoteScorer(term(url=url, token_env="FAR_TOKEN"), "far")
        assert ("unencrypted" in caplog.text) is warned


def test_server_s_manifest_decides_what_is_sent(fake: Fake) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    messages = [{"role": "user", "content": "the film"}]
    chat = Rollout(
        Prompt("c", "<rendered>", (5, 6), messages), "good", [7, 8], [0.0, 0.0], "stop", 0
    )
    plain = rollouts(1)[0]
    hashes = {
        "tokenizer_hash": tokenizer_fingerprint(tokenizer),
        "chat_template_hash": template_hash(tokenizer),
    }

    def sent(info: dict[str, Any] | None, policy: Any = tokenizer) -> list[tuple[Any, Any]]:
        fake.info = info
        fake.seen.clear()
        fake.scorer(policy).score([plain, chat])
        return [(item["prompt"], item.get("token_ids")) for items in fake.seen for item in items]

    assert sent(None) == [("text 0", None), (messages, None)]
    assert sent({"conversational": True, **hashes}) == [
        ("text 0", [5, 6, 7]),
        (messages, [5, 6, 7, 8]),
    ]
    assert sent({"conversational": True, **hashes, "chat_template_hash": "other"}) == [
        ("text 0", [5, 6, 7]),
        (messages, None),
    ]
    assert sent({"conversational": True, **hashes, "tokenizer_hash": "other"}) == [
        ("text 0", None),
        (messages, None),
    ]
    assert sent({"conversational": False, **hashes, "tokenizer_hash": "other"}) == [
        ("text 0", None),
        ("<rendered>", None),
    ]
    assert sent({"conversational": True, **hashes}, None) == [("text 0", None), (messages, None)]
    with pytest.raises(UserError, match=r"tokenizer.*chat template"):
        sent({"conversational": True, "tokenizer_hash": "other", "chat_template_hash": None})


def test_server_s_largest_batch_is_kept_to(fake: Fake) -> None:
    fake.info = {"max_batch": 3}
    assert fake.scorer(batch_size=64).score(rollouts(7)).total == [
        1.0,
        2.0,
        3.0,
        4.0,
        5.0,
        6.0,
        7.0,
    ]
    assert sorted(map(len, fake.seen)) == [1, 3, 3]
    fake.info = {"max_batch": 0}
    with pytest.raises(UserError, match="max_batch=0, expected at least 1"):
        fake.scorer().score(rollouts())


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object()])
def test_columns_that_json_has_not_name_the_prompt(fake: Fake, value: object) -> None:
    with pytest.raises(UserError, match=r"row of prompt 'p0'.*can't be sent as JSON.*answer"):
        fake.scorer().score(rollouts(2, answer=value))
    assert not fake.seen


def test_another_model_in_mid_run_is_said_aloud(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = fake.scorer()
    fake.replies = [
        Reply(200, b'{"scores": [1], "model": "a"}'),
        Reply(200, b'{"scores": [1], "model": "b"}'),
    ]
    scorer.score(rollouts(1))
    assert "now scores with" not in caplog.text
    scorer.score(rollouts(1))
    assert "now scores with b" in caplog.text


def test_pauses_double_up_to_a_limit_and_leave_the_run_s_random_numbers_alone() -> None:
    random.seed(1)
    state = random.getstate()
    for attempt in range(12):
        longest = min(0.5 * 2**attempt, 30.0)
        drawn = [pause_s(attempt) for _ in range(50)]
        assert all(longest / 2 <= pause <= longest for pause in drawn) and len(set(drawn)) > 10
    assert random.getstate() == state


def test_retry_after_is_a_number_or_a_date() -> None:
    now = datetime.datetime.now(datetime.UTC)

    def seconds(value: str) -> float:
        return retry_after_s(httpx.Response(503, headers={"retry-after": value}))

    assert seconds("7") == 7.0
    assert seconds(
        email.utils.format_datetime(now + datetime.timedelta(seconds=60), usegmt=True)
    ) == pytest.approx(60, abs=2)
    assert (
        seconds("Wed, 21 Oct 2015 07:28:00 GMT")
        == seconds("soon")
        == seconds("-3")
        == seconds("1e3")
        == 0.0
    )
    assert retry_after_s(httpx.Response(503)) == 0.0
