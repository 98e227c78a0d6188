"""stage=serve_reward: over HTTP the numbers of the local scorer, refusals with a place, one batch
at a time, and an end in peace.
"""

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from conf.schema import RewardConfig
from conf.stages import ServeRewardStage
from reward.scorers.remote import RemoteScorer
from reward.scorers.reward_model import RewardModelScorer
from reward.service.app import create_app
from reward.service.batcher import Batcher, Counts
from reward.service.served import Item, Refused, ServedModel
from reward.terms import check_terms, make_scorer
from rlhf.cli import config
from rlhf.models.directories import fingerprint
from rlhf.process.listening import address, listen
from rlhf.types import Rollout, UserError
from tests.checking import check
from tests.offline.trl_tools import CHATML, tiny_tokenizer
from tests.reward.test_remote import term
from tests.reward.test_scorer import other_tokenizer, rollout, save_reward_model

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TOKEN = "token-of-the-test"
BRACKETS = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@contextmanager
def serving(
    path: Path, *, max_batch: int = 8, max_body: int = 4096, max_waiting: int = 16
) -> Iterator[tuple[str, ServedModel, Counts]]:
    """The service on a free loopback port, in a thread of this process."""
    model, counts = ServedModel(str(path), CPU, batch_tokens=8192), Counts()
    app = create_app(
        model,
        token=TOKEN,
        max_batch=max_batch,
        max_body=max_body,
        max_waiting=max_waiting,
        counts=counts,
    )
    with listen("127.0.0.1", 0) as listener:
        listener.listen()
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address(listener), model, counts
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(CHATML)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "model"
    save_reward_model(directory, tokenizer)
    return directory


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("chat") / "model"
    save_reward_model(directory, tokenizer, conversational=True)
    return directory


@pytest.fixture(scope="module")
def plain(plain_model: Path) -> Iterator[tuple[str, ServedModel, Counts]]:
    with serving(plain_model) as service:
        yield service


def post(url: str, items: Any, token: str | None = TOKEN, **more: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"} if token is not None else {}
    return httpx.post(
        f"{url}/score", json={"items": items, **more}, headers=headers, trust_env=False, timeout=20
    )


def message_of(answer: httpx.Response) -> str:
    """The message of an error, whose form is the same for all."""
    error = answer.json()["error"]
    assert set(error) == {"message", "item"}
    return str(error["message"])


def sampled(tokenizer: Any) -> list[Rollout]:
    """Responses to plain and chat prompts; one is cut off, one was sampled in other pieces than the
    tokenizer would cut.
    """
    chat = [{"role": "user", "content": "the film"}]
    out = [
        rollout(tokenizer, "the film", " good", name="p0"),
        rollout(tokenizer, chat, "great plot", name="p1"),
        rollout(tokenizer, "a scene", " bad awful film", finished=False, name="p2"),
        rollout(tokenizer, "the end", " good", name="p3"),
    ]
    out[3].token_ids = [
        *(tokenizer.convert_tokens_to_ids(c) for c in "Ġgood"),
        tokenizer.eos_token_id,
    ]
    assert tokenizer.decode(out[3].token_ids[:-1]) == out[3].text and len(out[3].token_ids) > len(
        out[0].token_ids
    )
    return out


@pytest.mark.parametrize("kind", ["plain_model", "chat_model"])
@pytest.mark.parametrize("policy", ["same", "other template", "other tokenizer"])
def test_scores_over_http_are_the_local_ones(
    kind: str,
    policy: str,
    tokenizer: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path: Path = request.getfixturevalue(kind)
    reader = {
        "same": tokenizer,
        "other template": tiny_tokenizer(BRACKETS),
        "other tokenizer": other_tokenizer(BRACKETS),
    }[policy]
    rollouts = sampled(reader)
    local = RewardModelScorer(str(path), RewardConfig(), CPU, policy_tokenizer=reader)
    assert local.same_tokenizer is (policy != "other tokenizer") and local.same_template is (
        policy == "same"
    )
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    with serving(path) as (url, _, counts):
        far = RemoteScorer(
            term(url=url, token_env="SERVED_TOKEN", batch_size=8), "far", policy_tokenizer=reader
        )
        expected = local.score(rollouts).total
        assert far.score(rollouts).terms == {"far": expected}
        assert (counts.requests, counts.items, counts.batches, counts.errors) == (1, 4, 1, 0)
        assert counts.tokens == sum(len(local.token_ids(r)) for r in rollouts)
        smaller = RemoteScorer(
            term(url=url, token_env="SERVED_TOKEN", batch_size=1), "far", policy_tokenizer=reader
        )
        assert smaller.score(rollouts).total == pytest.approx(expected, abs=1e-6)
    assert len({round(score, 4) for score in expected}) == 4, (
        "scores that are all alike would show nothing"
    )


def test_composed_reward_asks_the_server_as_the_panel_says(
    plain: tuple[str, ServedModel, Counts],
    plain_model: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The options that the panel shows give a scorer whose term has the local numbers, also for
    tokens that were sampled in other pieces.
    """
    rollouts = sampled(tokenizer)
    expected = (
        RewardModelScorer(str(plain_model), RewardConfig(), CPU, policy_tokenizer=tokenizer)
        .score(rollouts)
        .total
    )
    options = [
        f"+reward.terms.remote.{key}={value}"
        for key, value in {"kind": "remote", "url": plain[0], "token_env": "SERVED_TOKEN"}.items()
    ]
    reward = config.compose(["stage=grpo", *options, "+reward.terms.remote.weight=0.5"]).reward
    monkeypatch.delenv("SERVED_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"reward.terms.remote.token_env=SERVED_TOKEN.*is not set"):
        check_terms(reward)
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    check_terms(reward)
    found = make_scorer(reward, device=CPU, policy_tokenizer=tokenizer).score(rollouts)
    assert found.terms == {"remote": expected} and found.total == pytest.approx(
        [0.5 * score for score in expected]
    )
    reward.terms["remote"].url = "http://me:secret@host"
    with pytest.raises(UserError, match=r"reward.terms.remote.url holds a user"):
        check_terms(reward)


def test_reward_model_that_can_t_read_the_policy_is_refused_as_locally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_reward_model(tmp_path / "model", tiny_tokenizer())
    reader = other_tokenizer(CHATML)
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    with serving(tmp_path / "model") as (url, _, counts):
        with pytest.raises(UserError, match=r"tokenizer.*chat template"):
            RemoteScorer(
                term(url=url, token_env="SERVED_TOKEN"), "far", policy_tokenizer=reader
            ).score(sampled(reader))
        assert counts.items == 0


def test_texts_alone_are_enough(
    plain: tuple[str, ServedModel, Counts], tokenizer: Any, plain_model: Path
) -> None:
    """What a client that knows nothing of tokenizers gets, by the protocol's words."""
    rollouts = [
        rollout(tokenizer, "the film", " good"),
        rollout(tokenizer, "the film", " bad", finished=False),
    ]
    expected = (
        RewardModelScorer(str(plain_model), RewardConfig(), CPU, policy_tokenizer=tokenizer)
        .score(rollouts)
        .total
    )
    items = [
        {"prompt": "the film", "response": " good", "fields": {"a": [1]}},
        {"prompt": "the film", "response": " bad", "finished": False},
    ]
    answer = post(plain[0], items)
    assert answer.status_code == 200 and answer.json() == {
        "scores": expected,
        "model": str(plain_model),
    }
    assert post(plain[0], []).json()["scores"] == []


def test_health_is_open_and_the_manifest_is_not(plain: tuple[str, ServedModel, Counts]) -> None:
    url, model, _ = plain
    assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    assert httpx.get(f"{url}/info", trust_env=False).status_code == 401
    info = httpx.get(
        f"{url}/info", headers={"authorization": f"bearer {TOKEN}"}, trust_env=False
    ).json()
    assert info["tokenizer_hash"] == model.manifest.tokenizer_hash and info["base"] == "tiny"
    assert (
        info["max_length"],
        info["max_tokens"],
        info["max_batch"],
        info["score_mean"],
        info["score_std"],
    ) == (64, 64, 8, 0.1, 2.0)
    for path in ("/docs", "/openapi.json", "/redoc", "/nothing"):
        answer = httpx.get(url + path, trust_env=False)
        assert answer.status_code == 404 and message_of(answer) == "Not Found"


@pytest.mark.parametrize("token", [None, "wrong", TOKEN + "x", TOKEN[:-1]])
def test_missing_and_wrong_tokens_get_401_before_the_body_is_read(
    plain: tuple[str, ServedModel, Counts], token: str | None
) -> None:
    answer = post(plain[0], "no items at all", token)
    assert answer.status_code == 401 and "Authorization: Bearer" in message_of(answer)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_wrong_token_stops_a_policy_run_without_repetition(
    plain: tuple[str, ServedModel, Counts], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVED_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"HTTP 401.*prompt 'p0'.*token_env"):
        RemoteScorer(term(url=plain[0], token_env="SERVED_TOKEN"), "far").score(sampled(tokenizer))


GOOD = {"prompt": "the film", "response": " good"}


@pytest.mark.parametrize(
    ("items", "item", "message"),
    [
        ("text", None, r"^items: Input should be a valid"),
        ([GOOD, "text"], 1, r"^items\[1\]: "),
        ([{"prompt": "a"}], 0, r"^items\[0\]\.response: Field required"),
        (
            [GOOD, {**GOOD, "response": 3}],
            1,
            r"^items\[1\]\.response: Input should be a valid string",
        ),
        ([{**GOOD, "finished": "yes"}], 0, r"^items\[0\]\.finished: Input should be a valid bool"),
        ([{**GOOD, "fields": []}], 0, r"^items\[0\]\.fields: "),
        ([{**GOOD, "extra": 1}], 0, r"^items\[0\]\.extra: Extra inputs"),
        ([{**GOOD, "prompt": None}], 0, r"^items\[0\]\.prompt"),
        (
            [{**GOOD, "token_ids": [1, 999]}],
            0,
            r"^items\[0\]\.token_ids: found 999, expected ids in \[0, 295\)",
        ),
        ([{**GOOD, "token_ids": [1, -1]}], 0, r"found -1"),
        ([{**GOOD, "token_ids": []}], 0, r"have 0 tokens, expected 1 to 64"),
        (
            [GOOD, {**GOOD, "response": " good" * 70}],
            1,
            r"^items\[1\]: prompt and response have 7\d tokens, expected 1 to 64",
        ),
        (
            [{**GOOD, "prompt": [{"role": "user", "content": "a"}]}],
            0,
            r"reads plain text: send the rendered prompt",
        ),
        (
            [{**GOOD, "prompt": [{"role": "user"}]}],
            0,
            r"^items\[0\]\.prompt\[0\]\.content: Field required",
        ),
        ([GOOD] * 9, None, r"^items: found 9, expected at most 8"),
    ],
)
def test_what_can_t_be_scored_gets_422_with_its_place(
    plain: tuple[str, ServedModel, Counts], items: Any, item: int | None, message: str
) -> None:
    answer = post(plain[0], items, tokenizer_hash=plain[1].manifest.tokenizer_hash)
    assert answer.status_code == 422 and re.search(message, message_of(answer)), answer.text
    assert answer.json()["error"]["item"] == item


def test_tokens_of_another_tokenizer_are_refused(
    plain: tuple[str, ServedModel, Counts], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the server was restarted with another reward model in mid-run."""
    for more in ({}, {"tokenizer_hash": "other"}):
        answer = post(plain[0], [GOOD, {**GOOD, "token_ids": [1, 2]}], **more)
        assert (
            answer.status_code == 422
            and "items[1].token_ids: of the tokenizer" in message_of(answer)
            and answer.json()["error"]["item"] == 1
        )
    assert post(plain[0], [GOOD], tokenizer_hash="other").status_code == 200
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    far = RemoteScorer(
        term(url=plain[0], token_env="SERVED_TOKEN"), "far", policy_tokenizer=tokenizer
    )
    plain_prompts = [r for r in sampled(tokenizer) if isinstance(r.prompt.source, str)]
    assert len(far.score(plain_prompts).total) == 3
    manifest = plain[1].manifest
    monkeypatch.setattr(
        plain[1], "manifest", dataclasses.replace(manifest, tokenizer_hash="another model's")
    )
    with pytest.raises(UserError, match=r"HTTP 422.*expected tokenizer_hash another model's"):
        far.score(plain_prompts)


def test_template_that_refuses_messages_is_the_client_s_error(tmp_path: Path) -> None:
    strict = tiny_tokenizer("{{ raise_exception('turns must alternate') }}")
    save_reward_model(tmp_path / "model", strict, conversational=True)
    with serving(tmp_path / "model") as (url, _, _):
        answer = post(url, [{**GOOD, "prompt": [{"role": "user", "content": "a"}]}])
    assert answer.status_code == 422 and "1 messages: turns must alternate" in message_of(answer)


def test_bodies_that_are_no_json_or_too_large(plain: tuple[str, ServedModel, Counts]) -> None:
    url, headers = f"{plain[0]}/score", {"authorization": f"Bearer {TOKEN}"}
    for body in (b"", b"{", b"\xff\xfe", b"nonsense"):
        answer = httpx.post(url, content=body, headers=headers, trust_env=False)
        assert answer.status_code == 400 and "no JSON" in message_of(answer)
    assert httpx.post(url, content=b"[]", headers=headers, trust_env=False).status_code == 422
    large = json.dumps({"items": [{**GOOD, "response": " good" * 1000}]}).encode()
    # chunked: no length is announced
    in_pieces = (large[i : i + 500] for i in range(0, len(large), 500))
    for content in (large, in_pieces):
        answer = httpx.post(url, content=content, headers=headers, trust_env=False)
        assert answer.status_code == 413 and "more than 4096 bytes" in message_of(answer)
    assert post(plain[0], [GOOD]).status_code == 200


def test_model_that_fails_gives_500_and_serves_on(
    plain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(plain_model) as (url, model, counts):
        expected = post(url, [GOOD]).json()["scores"]

        def fails(rows: Sequence[Sequence[int]]) -> list[float]:
            raise RuntimeError("internal words")

        with monkeypatch.context() as patch:
            patch.setattr(model, "scores", fails)
            answer = post(url, [GOOD])
            assert (
                answer.status_code == 500
                and message_of(answer) == "the reward model failed: RuntimeError"
            )
        with monkeypatch.context() as patch:
            patch.setattr(model, "scores", lambda rows: [0.0, float("nan")])
            answer = post(url, [GOOD, GOOD])
            assert (
                answer.status_code == 422
                and answer.json()["error"]["item"] == 1
                and "its score is nan" in message_of(answer)
            )
        assert post(url, [GOOD]).json()["scores"] == expected
        assert (counts.requests, counts.errors) == (4, 2)


class SlowModel:
    """Scores a row by its first id, and notes what ran together."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.running = threading.Lock()
        self.go = threading.Event()

    def token_ids(self, items: Sequence[Item]) -> list[list[int]]:
        return [[int(item.response)] for item in items]

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        assert self.running.acquire(blocking=False), "two batches at once"
        self.batches.append(len(rows))
        assert self.go.wait(20)
        self.running.release()
        return [float(row[0]) for row in rows]


def test_requests_that_wait_are_scored_together_one_batch_at_a_time() -> None:
    model, counts = SlowModel(), Counts()

    async def scene() -> list[list[float]]:
        batcher = Batcher(model, max_batch=5, max_waiting=8, counts=counts, after=lambda: None)  # type: ignore[arg-type]
        worker = asyncio.create_task(batcher.run())

        async def arrive(*numbers: int) -> asyncio.Task[list[float]]:
            task = asyncio.create_task(
                batcher.score([Item(prompt="", response=str(n)) for n in numbers])
            )
            await asyncio.sleep(0.05)
            return task

        tasks = [
            await arrive(0),
            await arrive(1, 2),
            await arrive(3, 4, 5),
            await arrive(6, 7),
            await arrive(8, 9, 10, 11),
        ]
        tasks += [await arrive(12), await arrive(13), await arrive(14)]
        with pytest.raises(Refused, match="8 requests wait already") as refused:
            await batcher.score([Item(prompt="", response="15")])
        assert refused.value.status == 503
        model.go.set()
        found = [await task for task in tasks]
        worker.cancel()
        batcher.close()
        return found

    assert asyncio.run(scene()) == [
        [0.0],
        [1.0, 2.0],
        [3.0, 4.0, 5.0],
        [6.0, 7.0],
        [8.0, 9.0, 10.0, 11.0],
        [12.0],
        [13.0],
        [14.0],
    ]
    assert model.batches == [1, 5, 2, 5, 2], (
        "the first runs alone; then whole requests, in order, of at most five items"
    )
    assert (counts.batches, counts.items, counts.tokens) == (5, 15, 15) and counts.model_s > 0


def test_concurrent_clients_get_their_own_scores(plain: tuple[str, ServedModel, Counts]) -> None:
    url, _, _ = plain
    words = ["good", "bad", "film", "plot", "great", "awful"]
    alone = [post(url, [{**GOOD, "response": f" {word}"}]).json()["scores"][0] for word in words]
    with ThreadPoolExecutor(6) as clients:
        together = list(
            clients.map(
                lambda i: post(url, [{**GOOD, "response": f" {words[i % 6]}"}]).json()["scores"][0],
                range(36),
            )
        )
    assert together == pytest.approx(alone * 6, abs=1e-6)
    assert len({round(score, 4) for score in alone}) == 6


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "example.org"])
def test_other_addresses_need_a_token_of_the_user_s(host: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"stage.token_env=None .*stage.host={host}",
    ):
        config.compose(["stage=serve_reward", f"stage.host={host}"])
    assert (
        config.compose(["stage=serve_reward", f"stage.host={host}", "stage.token_env=X"]).stage.host
        == host
    )


def test_what_is_known_before_weights_load(
    plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    base = ["stage=serve_reward", f"run.dir={tmp_path}", "tracking=none"]
    for more, message in (
        ([], "needs reward.path, which is not set"),
        ([f"reward.path={tmp_path}/none/model"], "no such directory"),
        (
            [f"reward.path={plain_model}", "stage.token_env=NO_SUCH_TOKEN"],
            "stage.token_env=NO_SUCH_TOKEN: this environment variable is not set",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check(config.compose([*base, *more]))
    check(config.compose([*base, f"reward.path={plain_model}"]))
    assert ServeRewardStage().host == "127.0.0.1"


@contextmanager
def process(
    tmp_path: Path, reward_path: Path, name: str, *overrides: str, **env: str
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A served reward model in a process of its own, once it is ready: its handle, its address and
    what it has said so far.
    """
    command = [
        sys.executable,
        "-m",
        "rlhf",
        "stage=serve_reward",
        f"reward.path={reward_path}",
        f"run.dir={tmp_path}",
        f"run.name={name}",
    ]
    command += ["stage.port=0", "tracking=none", *overrides]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        said: list[str] = []
        watchdog = threading.Timer(120, child.kill)
        watchdog.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                said.append(line)
                if line.startswith("╰"):
                    break
            found = re.search(r"http://127\.0\.0\.1:\d+", "".join(said))
            assert found, "".join(said)
            yield child, found[0], said
            said.append(child.stdout.read())
        finally:
            watchdog.cancel()
            if child.poll() is None:
                child.kill()


def test_process_serves_a_policy_run_and_ends_in_peace(
    tmp_path: Path, plain_model: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    rollouts = [r for r in sampled(tokenizer) for _ in range(3)]
    expected = (
        RewardModelScorer(str(plain_model), RewardConfig(), CPU, policy_tokenizer=tokenizer)
        .score(rollouts)
        .total
    )
    with process(
        tmp_path, plain_model, "served", "stage.token_env=SERVED_TOKEN", "stage.max_batch=4"
    ) as (child, url, said):
        far = RemoteScorer(
            term(url=url, token_env="SERVED_TOKEN", batch_size=64),
            "far",
            policy_tokenizer=tokenizer,
        )
        assert far.score(rollouts).total == pytest.approx(expected, abs=1e-6)
        assert post(url, [GOOD], "wrong").status_code == 401
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
    text = "".join(said)
    assert (
        f"+reward.terms.remote.kind=remote +reward.terms.remote.url={url} "
        "+reward.terms.remote.token_env=SERVED_TOKEN" in text
    )
    assert TOKEN not in text and "Traceback" not in text
    run = tmp_path / "served" / "serve_reward"
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["stage"] == "serve_reward"
        and summary["model"] is None
        and summary["steps"] == summary["metrics"]["serve/batches"]
    )
    assert {k: summary["metrics"][f"serve/{k}"] for k in ("requests", "items", "errors")} == {
        "requests": 4,
        "items": 12,
        "errors": 1,
    }
    (parent,) = json.loads((run / "manifest.json").read_text())["parents"]
    assert (parent["kind"], parent["path"]) == ("reward", str(plain_model))
    assert parent["summary_sha256"] is None and parent["weights"] == fingerprint(plain_model)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["serve/items"] == 12
    assert (run / "config.yaml").is_file()


@pytest.mark.full  # a process of its own
def test_generated_token_is_shown_once_and_written_nowhere(
    tmp_path: Path, plain_model: Path
) -> None:
    with process(tmp_path, plain_model, "made") as (child, url, said):
        token = re.search(r"export RLHF_REWARD_TOKEN=(\S+)", "".join(said))
        assert token is not None and len(token[1]) >= 40
        assert post(url, [GOOD], token[1]).status_code == 200
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0 and time.monotonic() - began < 15
    assert "".join(said).count(token[1]) == 1 and "Traceback" not in "".join(said)
    files = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert len(files) >= 4 and not [
        path for path in files if token[1].encode() in path.read_bytes()
    ]
