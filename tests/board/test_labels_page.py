"""Labels on the server: a link for each annotator that opens one page, and labels that are kept."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.labels.ledger import write_export
from rlhf.labels.targets import page as label_page
from tests.board.rooms import board
from tests.labels.page_exports import EVIL, ID, Elements, pairs

PAGE = "/labels/mine/label"


def export(folder: Path, count: int = 3) -> Any:
    made = pairs(count)
    write_export(made, folder / "runs" / "mine" / "label")
    (folder / "runs" / "mine" / "label" / "config.yaml").touch()
    return made


def add(client: Any, name: str) -> str:
    """The link of a new annotator."""
    before = links(client)
    assert client.post(f"{PAGE}/annotators", data={"name": name}).status_code == 303
    return next(link for link in links(client) if link not in before)


def links(client: Any) -> list[str]:
    return re.findall(r'href="(/annotate/[^"]+)"', client.get(PAGE).text)


def labels(made: Any, annotator: str, count: int, saved: str) -> dict[str, Any]:
    """A labels file as the page makes it."""
    entries = [
        {
            "task": task.id,
            "verdict": "left",
            "ranking": [],
            "ratings": [],
            "comment": "",
            "seconds": 1.5,
            "time": "2031-01-01T00:00:00.000Z",
            "prompt": task.prompt,
            "shown": list(task.shown),
        }
        for task in made.tasks[:count]
    ]
    head = {"format": "rlhf-labels", "version": 1, "export": ID, "annotator": annotator}
    return {**head, "saved": saved, "labels": entries}


def sent(client: Any, link: str, content: dict[str, Any], known: str = "") -> Any:
    return client.post(link, params={"known": known}, json=content)


def test_an_annotator_labels_by_a_link_of_their_own(tmp_path: Path) -> None:
    made = export(tmp_path)
    with board(tmp_path) as client:
        assert PAGE in client.get("/labels").text
        ada, ben = add(client, "Ada"), add(client, "Ben <b>")
        assert "Ben &lt;b&gt;" in client.get(PAGE).text
        client.cookies.clear()  # annotators have no cookie
        page = client.get(ada)
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and client.get("/labels").status_code == 401
        data = json.loads(Elements(page.text).texts("script")[0])
        assert data["server"] == {"annotator": "Ada", "post": ada, "kept": None}
        assert sent(client, ada, labels(made, "Ada", 2, "2031-01-01T00:00:01Z")).status_code == 200
        assert sent(client, ben, labels(made, "Ben <b>", 1, "2031-01-01T00:00:01Z")).is_success
        kept = json.loads(Elements(client.get(ada).text).texts("script")[0])["server"]["kept"]
        assert len(kept["labels"]) == 2
        client.get("/?token=word")
        shown = client.get(PAGE).text
        assert "2 of 3" in shown and "1 of 3" in shown and "Import 3 labels" in shown
    files = tmp_path / "runs" / ".board" / "labels" / ID / "files"
    assert sorted(path.name for path in files.iterdir()) == ["1.json", "2.json"]
    assert len(list(label_page.read(files / "1.json"))) == 2


def test_two_computers_lose_no_label(tmp_path: Path) -> None:
    made = export(tmp_path)
    first, second = "2031-01-01T00:00:01Z", "2031-01-01T00:00:02Z"
    with board(tmp_path) as client:
        link = add(client, "Ada")
        assert sent(client, link, labels(made, "Ada", 2, first)).is_success
        stale = sent(client, link, labels(made, "Ada", 1, second))
        assert stale.status_code == 409 and len(stale.json()["kept"]["labels"]) == 2
        # one that knows what is there may take a label back
        assert sent(client, link, labels(made, "Ada", 1, second), known=first).is_success
        assert "1 of 3" in client.get(PAGE).text


@pytest.mark.parametrize(
    "changes",
    [
        {"annotator": "Ben"},
        {"export": "other"},
        {"format": "x"},
        {"version": 2},
        {"saved": 3},
        {"labels": [{"task": "none", "verdict": "left"}]},
        {"labels": [{"task": f"{ID}-1", "verdict": "best"}]},
        {"labels": "all"},
    ],
)
def test_what_is_no_labels_file_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = export(tmp_path)
    with board(tmp_path) as client:
        link = add(client, "Ada")
        answer = sent(client, link, labels(made, "Ada", 1, "2031-01-01T00:00:01Z") | changes)
        assert answer.status_code == 422 and str(tmp_path) not in answer.text
        assert client.post(link, content=b"\xff{").status_code == 422
    assert not list((tmp_path / "runs" / ".board" / "labels" / ID / "files").iterdir())


def test_who_may_not_label(tmp_path: Path) -> None:
    made = export(tmp_path)
    with board(tmp_path) as client:
        for name in ("", "x" * 101):
            refused = client.post(f"{PAGE}/annotators", data={"name": name})
            assert refused.status_code == 422 and 'aria-invalid="true"' in refused.text
        link = add(client, "Ada")
        assert client.post(f"{PAGE}/annotators", data={"name": " Ada "}).status_code == 422
        assert client.post(f"{PAGE}/import").status_code == 422  # nobody has labelled
        client.post(f"{PAGE}/renew/1")
        assert client.get(link).status_code == 404
        assert sent(client, link, labels(made, "Ada", 1, "x")).status_code == 404
        assert client.post(f"{PAGE}/renew/9").status_code == 404
        assert client.get(links(client)[0]).status_code == 200
        foreign = {"origin": "http://evil.example"}
        assert client.post(links(client)[0], json={}, headers=foreign).status_code == 403


def test_texts_stay_texts(tmp_path: Path) -> None:
    made = pairs(1, title=EVIL[:200].replace("\ud800", ""))
    write_export(made, tmp_path / "runs" / "mine" / "label")
    (tmp_path / "runs" / "mine" / "label" / "config.yaml").touch()
    with board(tmp_path) as client:
        for page in (client.get("/labels").text, client.get(PAGE).text):
            assert "<script>window" not in page and "<img" not in page


def test_the_import_is_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.board.jobs.store import Jobs

    made = export(tmp_path)
    jobs: list[Any] = []

    def submit(self: Any, argv: Any, **named: Any) -> None:
        jobs.append((list(argv), named))

    monkeypatch.setattr(Jobs, "submit", submit)
    with board(tmp_path) as client:
        link = add(client, "Ada")
        sent(client, link, labels(made, "Ada", 2, "2031-01-01T00:00:01Z"))
        answer = client.post(f"{PAGE}/import")
        assert answer.headers["location"] == "/runs/mine/labels"
    [(argv, named)] = jobs
    assert argv[:2] == ["stage=label", "label.mode=import"] and named["run"] == "mine"
    files = tmp_path / "runs" / ".board" / "labels" / ID / "files"
    assert f'label.files=["{files}/*.json"]' in argv
