"""The data page: what is sent is kept whole, under a safe name, or refused with a reason; what is
in it is shown as text.
"""

import logging
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf.board.jobs.store import Jobs
from rlhf.board.uploads import Refused, safe_name
from rlhf.cli.config import compose
from tests.board.rooms import LARGEST, board

PAIRS = "prompt,chosen,rejected\nHi,Hello <b>you</b>,Go away\nWhy?,Because.,No.\n"
BOUNDARY = "x1y2"


def sent(client: Any, name: str, content: bytes | str, field: str = "file") -> Any:
    return client.post("/data", files={field: (name, content)})


def multipart(disposition: str, content: bytes = b"a,b\n1,2\n") -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode()
    return head + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "uploads").glob("*") if path.is_file())


def raw(
    client: Any, content: bytes, kind: str = f"multipart/form-data; boundary={BOUNDARY}"
) -> Any:
    return client.post("/data", content=content, headers={"content-type": kind})


def test_a_file_is_sent_looked_at_and_deleted(tmp_path: Path) -> None:
    with board(tmp_path) as client:
        answer = sent(client, "pairs.csv", PAIRS)
        assert answer.status_code == 303
        link = answer.headers["location"]
        assert (tmp_path / "uploads" / "pairs.csv").read_text() == PAIRS
        page = client.get(link).text
        assert "Hello &lt;b&gt;you&lt;/b&gt;" in page and "<b>you" not in page
        assert "preference pairs" in page and "/new/reward?data.path=" in page
        assert "/new/dpo?" in page and "/new/data?" in page
        listed = client.get("/data").text
        assert "pairs.csv" in listed and "preference pairs" in listed
        assert "Keep it" in client.get(f"{link}/delete").text and names(tmp_path) == ["pairs.csv"]
        assert client.post(f"{link}/delete").headers["location"] == "/data"
        assert names(tmp_path) == [] and client.get(link).status_code == 404


def test_tokens_are_those_of_a_model(tmp_path: Path, tiny_model: Any) -> None:
    with board(tmp_path, models=tiny_model()) as client:
        rows = '{"prompt": "the quick", "completion": " brown fox"}\n'
        link = sent(client, "rows.jsonl", rows).headers["location"]
        page = client.get(link, params={"model": str(tiny_model())}).text
        assert 'class="token response"' in page and 'class="token prompt"' in page
        refused = client.get(link, params={"model": str(tmp_path / "none")})
        assert refused.status_code == 422 and 'role="alert"' in refused.text
        assert "brown fox" in refused.text  # the rest is still shown
        assert "outside" in refused.text


def test_nothing_is_written_over(tmp_path: Path) -> None:
    with board(tmp_path) as client:
        for number in range(3):
            sent(client, "rows.csv", f"text\n{number}\n")
        sent(client, "rows.jsonl.gz", b"\x1f\x8bx")
        sent(client, "rows.jsonl.gz", b"\x1f\x8by")
    found = ["rows-2.csv", "rows-2.jsonl.gz", "rows-3.csv", "rows.csv", "rows.jsonl.gz"]
    assert names(tmp_path) == found
    assert (tmp_path / "uploads" / "rows.csv").read_text() == "text\n0\n"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("rows.csv", "rows.csv"),
        ("/etc/passwd.csv", "passwd.csv"),
        ("..\\..\\x.JSONL", "x.JSONL"),
        ("my rows (1)#5.csv", "my_rows__1__5.csv"),
        (".hidden.csv", "hidden.csv"),
        ("\u6570\u636e.csv", "\u6570\u636e.csv"),
        ("a\0b\n.csv", "a_b.csv"),
        ("*.csv", "rows.csv"),
        ("x" * 300 + ".jsonl.gz", "x" * 71 + ".jsonl.gz"),
        ("rows.tar.csv", "rows.tar.csv"),
    ],
)
def test_names(given: str, name: str) -> None:
    assert safe_name(given) == name


@pytest.mark.parametrize("given", ["", ".", "..", "rows", "rows.exe", "rows.csv/", "csv", "a.gz"])
def test_names_that_are_not_read(given: str) -> None:
    with pytest.raises(Refused):
        safe_name(given)


def test_the_largest_file_and_all_together(tmp_path: Path) -> None:
    with board(tmp_path) as client:
        refused = sent(client, "large.csv", b"x" * (LARGEST + 1))
        assert refused.status_code == 413 and 'role="alert"' in refused.text
        statuses = [
            sent(client, f"{i}.csv", b"y" * (LARGEST - 1000)).status_code for i in range(18)
        ]
        assert statuses[:16] == [303] * 16 and statuses[-1] == 413
    total = sum(path.stat().st_size for path in (tmp_path / "uploads").rglob("*") if path.is_file())
    assert total <= 16 * LARGEST
    assert not list((tmp_path / "uploads" / ".incoming").iterdir())


def malformed() -> list[tuple[str, bytes]]:
    """(content type, body) of uploads that are not right; their count is what the issue asks."""
    whole = multipart('form-data; name="file"; filename="rows.csv"')
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    out = [
        ("multipart/form-data", whole),
        ("multipart/form-data; boundary=", whole),
        (f"multipart/form-data; boundary={'b' * 300}", whole),
        ("multipart/form-data; boundary=other", whole),
        ("application/json", b"{}"),
        ("", whole),
        ("application/x-www-form-urlencoded", b"file=rows.csv"),
        (kind, b""),
        (kind, b"\0" * 100),
        (kind, whole.replace(b"\r\n", b"\n")),
        (kind, multipart('form-data; name="other"; filename="rows.csv"')),
        (kind, multipart('form-data; name="file"')),
        (kind, multipart("form-data")),
        (kind, multipart("")),
        (kind, multipart('form-data; name="file"; filename=""')),
        (kind, multipart('form-data; name="file"; filename="rows.csv"', b"")),
        (kind, multipart('form-data; name="file"; filename="rows.exe"')),
        (kind, multipart('form-data; name="file"; filename="../../"')),
        (kind, multipart('form-data; name="file"; filename="\0"')),
        (kind, multipart(f'form-data; name="file"; filename="{"n" * 5000}"')),
        (kind, multipart(f'form-data; name="file"; filename="{"n" * 9000}.csv"')),
        (kind, multipart("form-data; name=\"file\"; filename*=utf-8''%00%2F..csv")),
        (kind, b"--" + BOUNDARY.encode() + b"\r\nno header\r\n\r\nx"),
        (kind, b"--" + BOUNDARY.encode() + b"\r\n: \r\n\r\nx"),
    ]
    out += [(kind, whole[:cut]) for cut in range(0, len(whole) - 4, 3)]
    rng = random.Random(7)
    while len(out) < 100:
        out.append((kind, rng.randbytes(rng.randrange(1, 400))))
    return out


def test_a_hundred_malformed_uploads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = malformed()
    assert len(cases) >= 100
    with board(tmp_path) as client, caplog.at_level(logging.ERROR):
        for kind, content in cases:
            answer = raw(client, content, kind)
            assert 400 <= answer.status_code < 500, (kind, content, answer.text)
            assert 'role="alert"' in answer.text and "Traceback" not in answer.text
    assert not caplog.records
    assert names(tmp_path) == []
    assert not list((tmp_path / "uploads" / ".incoming").iterdir())


def test_a_browser_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    """The body is shorter than its length says: the connection ends in the middle."""
    import anyio
    from starlette.requests import ClientDisconnect

    from rlhf.board.uploads import receive

    whole = multipart('form-data; name="file"; filename="rows.csv"')

    async def torn() -> Any:
        yield whole[:80]
        raise ClientDisconnect

    async def take() -> None:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        with pytest.raises(ClientDisconnect):
            await receive(kind, torn(), tmp_path, 1000)

    anyio.run(take)
    assert not list((tmp_path / ".incoming").iterdir())


def test_files_that_are_no_rows_are_told(tmp_path: Path) -> None:
    with board(tmp_path) as client:
        for name, content in (
            ("broken.jsonl", b"{not json\n"),
            ("odd.csv", b"\xff\xfe\x00a"),
            ("fake.parquet", b"PAR1"),
            ("none.csv", b"colour,size\nred,3\n"),
        ):
            link = sent(client, name, content).headers["location"]
            page = client.get(link)
            assert page.status_code in (200, 422), page.text
            assert "message warn" in page.text and "Traceback" not in page.text, name


def test_a_report_in_one_click(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of its own: what is there already stays."""
    asked: list[Any] = []
    monkeypatch.setattr(Jobs, "submit", lambda _, argv, **named: asked.append((argv, named)))
    with board(tmp_path) as client:
        uploads = tmp_path / "uploads"
        uploads.mkdir(exist_ok=True)
        (uploads / "my rows.csv").write_text("prompt,completion\na,b\n")
        (tmp_path / "runs" / "report-my-rows").mkdir(parents=True)
        link = "/data/file/my%20rows.csv"
        assert f'action="{link}/report"' in client.get(link).text
        answer = client.post(f"{link}/report")
        assert answer.headers["location"] == "/runs/report-my-rows-2/data"
    ((argv, named),) = asked
    assert (named["run"], named["stage"]) == ("report-my-rows-2", "data")
    cfg = compose(argv)
    assert cfg.data.report and cfg.data.path == str(uploads / "my rows.csv")


def test_reports_of_runs_are_served_without_scripts(tmp_path: Path) -> None:
    with board(tmp_path) as client:
        folder = tmp_path / "runs" / "mine" / "data"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        (folder / "report.html").write_text("<h1>Report</h1><script>1</script>")
        assert "/data/report/mine/data" in client.get("/data").text
        answer = client.get("/data/report/mine/data")
        assert "<h1>Report" in answer.text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "sandbox" in policy and "script" not in policy
