"""What users say: kept once it is acknowledged, without personal data, deleted when they ask, and
read by stage=data as rows.
"""

import asyncio
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from conf.serving import ArmConfig
from rlhf.__main__ import main
from rlhf.gateway import keeping, rows
from rlhf.gateway.clean import Cleaner
from rlhf.gateway.store import FILE, Store, alone
from rlhf.registry.gate import Gate
from rlhf.registry.store import Registry
from tests.gateway.standing import ASKED, CLIENT, Network, Server, network, standing
from tests.gateway.test_proxy import runs
from tests.registry.made import WHY, finished, registered

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = "I am Ann Lee, ann@example.org, +44 20 7946 0958, card 4111 1111 1111 1111, 10.0.0.7"


def read(folder: Path, statement: str) -> list[Any]:
    """Rows of the gateway's file."""
    db = sqlite3.connect(folder / FILE)
    try:
        return db.execute(statement).fetchall()
    finally:
        db.close()


def test_a_user_counts_once_with_the_first_thumbs(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, network(), votes=2) as gateway:
            first = (await gateway.ask("ann"))["id"]
            await gateway.say("ann", first, thumb="up")
            await gateway.say("ann", first, thumb="down")  # of the same answer: not a second vote
            assert sum(s["users"] for s in (await gateway.state())["standings"]) == 0
            await gateway.say("ann", (await gateway.ask("ann"))["id"], thumb="down")
            for _ in range(3):  # what comes later changes nothing that was counted
                await gateway.say("ann", (await gateway.ask("ann"))["id"], thumb="up")
            (found,) = [s for s in (await gateway.state())["standings"] if s["users"]]
            assert (found["users"], found["mean"]) == (1, 0.5)

    runs(test)


@pytest.mark.parametrize(
    ("said", "code", "word"),
    [
        ({}, 400, "thumb, over, edit, reason"),
        ({"thumb": "left"}, 400, "up or down"),
        ({"thumb": "up", "index": 2}, 400, "2 choices"),
        ({"edit": "better"}, 400, "consent"),
        ({"reason": "why", "consent": "yes"}, 400, "consent"),
        ({"edit": " ", "consent": True}, 400, "edit"),
        ({"over": {"index": 0}}, 400, "itself"),
        ({"over": {"answer": "none", "index": 1}}, 404, "no such answer"),
        ({"over": {"index": 5}}, 400, "over.index"),
        ({"thumb": "up", "stars": 3}, 400, "stars"),
    ],
)
def test_feedback_that_is_refused(
    tmp_path: Path, said: dict[str, Any], code: int, word: str
) -> None:
    async def test() -> None:
        async with standing(tmp_path, network()) as gateway:
            answer = (await gateway.ask("ann", n=2))["id"]
            refused = await gateway.say("ann", answer, code, **said)
            assert word in refused["error"]["message"]
            await gateway.say("bob", answer, 404, thumb="up")  # another user's answer
            await gateway.say("ann", "chatcmpl-0", 404, thumb="up")
            assert read(gateway.folder, "SELECT count(*) FROM feedback") == [(0,)]

    runs(test)


def test_texts_only_with_consent_and_without_personal_data(tmp_path: Path) -> None:
    net = network()
    names = tmp_path / "names.txt"
    names.write_text("Lee\n")
    for server in net.servers.values():
        server.text = "Dear Ann, write to bob@example.org"

    async def test() -> None:
        async with standing(tmp_path, net, names=str(names)) as gateway:
            asked = [{"role": "user", "content": PRIVATE}]
            silent = (await gateway.ask("Ann", messages=asked))["id"]
            told = await gateway.say("Ann", silent, thumb="up")
            assert told == {"kept": True, "texts": False}
            stored = read(gateway.folder, "SELECT messages, choices FROM answers")
            assert stored == [(None, None)]
            spoken = (await gateway.ask("Ann", messages=asked))["id"]
            said = {"thumb": "up", "consent": True, "reason": "I am Ann of 192.168.0.1"}
            assert (await gateway.say("Ann", spoken, **said))["texts"]
            header = {"x-consent": "true"}
            await gateway.ask("Ann", messages=asked, headers=header)
            await gateway.state()  # what waits is written
            texts = read(
                gateway.folder, "SELECT messages, choices FROM answers WHERE messages NOT NULL"
            )
            assert len(texts) == 2 and texts[0] == texts[1]
            reasons = read(gateway.folder, "SELECT reason FROM feedback WHERE reason NOT NULL")
            assert reasons == [("I am [USER] of [IP]",)]
            (content,) = json.loads(texts[0][0])
            assert content == {
                "role": "user",
                "content": "I am [USER] [NAME], [EMAIL], [PHONE], card [CREDIT_CARD], [IP]",
            }
            assert json.loads(texts[0][1]) == ["Dear [USER], write to [EMAIL] 0"]
            users = read(gateway.folder, "SELECT user FROM users")
            assert len(users[0][0]) == 32 and "nn" not in users[0][0]

    runs(test)
    content = b"".join(path.read_bytes() for path in (tmp_path / "gateway").iterdir())
    for word in (b"example.org", b"7946", b"4111", b"10.0.0.7", b"Lee", b"Ann"):
        assert word not in content
    assert stat.S_IMODE((tmp_path / "gateway" / FILE).stat().st_mode) == 0o600


def test_a_user_is_forgotten(tmp_path: Path) -> None:
    net = network()
    for server in net.servers.values():
        server.text = "SAIDTOANN"

    async def test() -> None:
        async with standing(tmp_path, net, votes=1) as gateway:
            for user in ("ann", "bob"):
                answer = (await gateway.ask(user))["id"]
                await gateway.say(user, answer, thumb="up", consent=True, reason=f"BY{user}")
            got = await gateway.client.post("/v1/forget", json={"user": "ann"}, headers=CLIENT)
            assert got.json()["deleted"] == {"answers": 1, "feedback": 1, "parts": 1, "users": 1}
            content = b"".join(path.read_bytes() for path in gateway.folder.iterdir())
            assert b"BYann" not in content and b"BYbob" in content
            # the outcome has no name, and stays: deleting changes nothing that the test has seen
            assert sum(s["users"] for s in (await gateway.state())["standings"]) == 2
            await gateway.say("ann", answer, 404, thumb="up")

    runs(test)


def test_what_is_old_is_deleted(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, network(), votes=1, retention_days=10) as gateway:
            answer = (await gateway.ask("ann"))["id"]
            await gateway.say("ann", answer, thumb="up", consent=True)
            await asyncio.sleep(0.15)
            assert read(gateway.folder, "SELECT count(*) FROM feedback") == [(1,)]
            db = sqlite3.connect(gateway.folder / FILE)
            for table in ("feedback", "answers"):
                db.execute(f"UPDATE {table} SET time = time - 86400 * 10.1")
            db.commit()
            db.close()
            await asyncio.sleep(0.2)
            for table in ("feedback", "answers"):
                assert read(gateway.folder, f"SELECT count(*) FROM {table}") == [(0,)]
            assert read(gateway.folder, "SELECT count(*) FROM users") == [(1,)]

    runs(test)


@pytest.mark.parametrize("name", ["Email", "user", "name", "[USER]", "a.*b", "ann@example.org"])
def test_names_that_are_marks_or_expressions(name: str, tmp_path: Path) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("name\nEmail\n")
    counts: Counter[str] = Counter()
    message = {"role": "user", "content": f"{name} wrote to x@example.org"}
    clean = Cleaner.of(str(listed)).clean(message, name, counts)
    assert clean["role"] == "user" and clean["content"].endswith("] wrote to [EMAIL]")
    assert name in ("[USER]", "user") or name not in clean["content"]
    assert counts["email"] >= 1


# ---- kill -9 ----


class _Upstream(BaseHTTPRequestHandler):
    """A served model for a gateway in a process of its own."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}}
        content = json.dumps({"choices": [{**choice, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *_: Any) -> None:
        pass


def test_kill_9_loses_no_acknowledged_feedback(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, "-m", "rlhf", "stage=gateway", f"run.dir={tmp_path}"]
    command += ["run.name=mine", "stage.port=0", "stage.token_env=GATE", "stage.votes=1"]
    url = f"http://127.0.0.1:{server.server_port}"
    command += ["stage.operator_env=GATE", f"+stage.arms.a={{url: '{url}', model: m}}"]
    environment = {**os.environ, "GATE": "client-key", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    acknowledged: list[str] = []
    try:
        assert process.stdout is not None
        shown = ""
        while "OPENAI_BASE_URL=" not in shown:
            line = process.stdout.readline()
            assert line, shown
            shown += line
        address = shown.split("OPENAI_BASE_URL=")[1].split()[0]
        writers = [
            threading.Thread(target=_talk, args=(address, f"user {n}", acknowledged))
            for n in range(4)
        ]
        for writer in writers:
            writer.start()
        began = time.monotonic()
        while len(acknowledged) < 60 and time.monotonic() - began < 30:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        for writer in writers:
            writer.join(10)
    finally:
        process.kill()
        process.wait(10)
        server.shutdown()
    kept = read(tmp_path / "mine" / "gateway", "SELECT answer FROM feedback WHERE consent")
    assert len(acknowledged) >= 60 and set(acknowledged) <= {answer for (answer,) in kept}


def _talk(address: str, user: str, acknowledged: list[str]) -> None:
    with httpx.Client(base_url=address, headers=CLIENT, trust_env=False) as client:
        while True:
            try:
                body = {"model": "mine", "messages": ASKED, "user": user}
                answer = client.post("/chat/completions", json=body).json()["id"]
                said = {"answer": answer, "user": user, "thumb": "up", "consent": True}
                got = client.post("/feedback", json=said)
            except (httpx.HTTPError, KeyError):
                return
            if got.status_code == 200 and got.json() == {"kept": True, "texts": True}:
                acknowledged.append(answer)


# ---- rows ----


async def say_all(gateway: Any) -> None:
    """Feedback of every kind, of two users."""
    asked = [{"role": "system", "content": "Be brief."}, *ASKED]
    one = (await gateway.ask("ann", messages=asked, n=2))["id"]
    await gateway.say("ann", one, thumb="up", consent=True)
    await gateway.say("ann", one, index=1, over={"index": 0}, consent=True, reason="ann@x.org says")
    other = (await gateway.ask("ann", messages=asked))["id"]
    await gateway.say("ann", one, over={"answer": other}, consent=True)
    await gateway.say("ann", one, 400, over={"answer": one, "index": 0}, consent=True)
    await gateway.say("ann", other, thumb="down", consent=True)
    await gateway.say("ann", other, thumb="up", consent=True)
    await gateway.say("ann", other, edit="It is a thing.", consent=True)
    await gateway.say("ann", other, reason="so it is", consent=True)
    silent = (await gateway.ask("bob"))["id"]
    await gateway.say("bob", silent, thumb="up")


def test_rows_go_through_stage_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs_dir = tmp_path / "runs"
    registry = Registry(runs_dir / "registry.sqlite", create=True)
    version = registered(registry, finished(runs_dir / "mine" / "sft", {}, b"sft"))
    registry.promote(version, "production", WHY, Gate())
    net = Network(a=Server("A", ["mine-1"]))
    arms = {"only": ArmConfig(url="http://a", model="mine-{version}", version="mine@production")}

    async def test() -> None:
        async with standing(runs_dir, net, arms=arms) as gateway:
            await say_all(gateway)

    runs(test)
    (runs_dir / "gateway").rename(runs_dir / "mine" / "gateway")
    options = [f"run.dir={runs_dir}", "run.name=mine"]
    assert main(["stage=gateway", "stage.action=export", *options]) == 0
    told = capsys.readouterr().out
    assert "7 pieces of feedback with consent" in told
    assert "no row: 1 (a later thumb about the same answer" in told
    assert "no row: 1 (a reason alone" in told
    assert "personal data removed before: 1 email" in told

    folder = runs_dir / "mine" / "gateway" / "feedback"
    read_rows = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }
    labels = [(row["completion"][0]["content"], row["label"]) for row in read_rows[rows.KTO]]
    assert labels == [("an answer 0", True), ("an answer 0", True)]
    pairs = [
        (row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in read_rows[rows.PAIRS]
    ]
    assert pairs == [("an answer 1", "an answer 0"), ("It is a thing.", "an answer 0")]
    assert read_rows[rows.PAIRS][0]["reason"] == "[EMAIL] says"
    assert "no row: 1 (both answers are the same" in told
    (edit,) = read_rows[rows.SFT]
    assert [turn["role"] for turn in edit["messages"]] == ["system", "user", "assistant"]
    every = [row for listed in read_rows.values() for row in listed]
    assert all(row["registry_version"] == "mine@1" for row in every)

    for name, count in ((rows.KTO, 2), (rows.PAIRS, 2), (rows.SFT, 1)):
        read_by = [*options, f"run.name={name[:3]}", f"data.path={folder / name}", "tracking=none"]
        assert main(["stage=data", *read_by, "data.pipeline=[patterns]"]) == 0
        written = (runs_dir / name[:3] / "data" / "train.jsonl").read_text().splitlines()
        assert len(written) == count
        assert {json.loads(line)["registry_version"] for line in written} == {"mine@1"}
    # the versions whose users spoke are ancestors of what is trained on it
    manifest = runs_dir / "pai" / "data" / "manifest.json"
    entry = {"path": "train.jsonl", "from": {"run": "../../pai/data", "stage": "data"}}
    assert manifest.is_file()
    path = finished(runs_dir / "new" / "dpo", {}, b"dpo", data=[entry])
    assert registered(registry, path, "new").draft.lineage["ancestors"] == ["mine@1"]


def test_the_command_line_forgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with standing(tmp_path / "mine", network()) as gateway:
            await gateway.say("ann", (await gateway.ask("ann"))["id"], thumb="up")

    runs(test)
    options = ["stage=gateway", f"run.dir={tmp_path}", "run.name=mine"]
    assert main([*options, "stage.action=forget", "stage.user=ann"]) == 0
    assert "1 answers, 1 feedback" in capsys.readouterr().out
    assert main([*options, "stage.action=export"]) == 1
    assert "no feedback with consent" in capsys.readouterr().err
    assert main(["stage=gateway", f"run.dir={tmp_path}", "run.name=x", "stage.action=export"]) == 1
    assert "no gateway has run here" in capsys.readouterr().err
    with alone(tmp_path / "mine" / "gateway"):
        assert main([*options, "stage.action=forget", "stage.user=ann"]) == 1
    assert "another gateway runs here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ([], "stage.arms"),
        (["stage.host=0.0.0.0"], "stage.token_env"),
        (["+stage.arms.a.version=mine@x"], "no registry"),
        (["+stage.arms.a.token_env=NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["+stage.arms.a.weight=0"], "stage.arms"),
        (["stage.action=forget"], "stage.user"),
    ],
)
def test_options_that_are_refused(
    given: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = ["+stage.arms.a.url=http://127.0.0.1:1", "+stage.arms.a.model=m"] if given else []
    assert main(["stage=gateway", f"run.dir={tmp_path}", *arm, *given]) == 1
    assert word in capsys.readouterr().err


def test_a_disk_that_is_full_acknowledges_nothing(tmp_path: Path) -> None:
    """Work that fails undoes itself alone; a transaction that can't be written fails for all."""
    store = Store(tmp_path / FILE)

    def bad(db: sqlite3.Connection) -> None:
        keeping.note(db, "half")
        raise ValueError("bad")

    good = store.submit(lambda db: keeping.note(db, "good"))
    failed = store.submit(bad)
    good.result(5)
    with pytest.raises(ValueError, match="bad"):
        failed.result(5)
    assert store.read(lambda db: db.execute("SELECT text FROM events").fetchall()) == [("good",)]
    store.submit(lambda db: db.execute("PRAGMA max_page_count = 1")).result(5)
    full = store.submit(lambda db: keeping.note(db, "x" * 10_000_000))
    with pytest.raises(sqlite3.Error):
        full.result(5)
    store.close()
