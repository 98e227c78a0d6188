"""The pages of the forms, through the guard."""

import platform
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.board.forms.basic import stages
from rlhf.board.forms.looking import Look
from rlhf.board.pages import new
from tests.board import making
from tests.board.entering import client_of, place_in, post

_TOKEN = {"id": 1, "text": "<script>alert(1)</script>\n", "part": "response", "trained": True}
_SIDE = {"name": "completion", "tokens": [_TOKEN], "bos": 0, "eos": 0, "problems": ["no EOS"]}
_MEMORY = {
    "peak_gib": 30.0,
    "usable_gib": 20.0,
    "phase": "update",
    "roles": {"policy": 29.0},
    "fits": False,
    "problem": "too large",
    "notes": ["a note"],
    "device": True,
    "disk_gib": 1.0,
    "free_gib": 2.0,
    "remedies": ["fits with: adapter=lora"],
}
_FACTS = {
    "figures": {"steps": "5 of them"},
    "rows": 9,
    "previews": [{"place": "rows.jsonl, row 1", "sides": [_SIDE], "shared": None}],
    "memory": _MEMORY,
    "work": {"stage": "sft", "steps": 50, "rows": 8, "parameters": 7},
}


class Jobs:
    """Keeps what was submitted."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Any, dict[str, Any]]] = []
        self.earlier: list[Any] = []

    def jobs(self) -> list[Any]:
        return self.earlier

    def submit(self, argv: Any, **values: Any) -> Any:
        self.submitted.append((argv, values))
        return SimpleNamespace(id="17")


@pytest.fixture
def board(tmp_path: Path) -> Any:
    place, jobs = place_in(tmp_path), Jobs()
    object.__setattr__(place, "jobs", jobs)
    return SimpleNamespace(client=client_of(place, (new.routes,)), jobs=jobs, place=place)


class Page(HTMLParser):
    """Inputs, ids, labels and references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


def check_accessible(text: str) -> None:
    page = Page(text)
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids)), sorted({i for i in ids if ids.count(i) > 1})
    labelled = {label.get("for") for label in page.all("label")}
    for field in page.all("input", "select", "textarea"):
        boxed = field.get("type") == "checkbox" and not field.get("id")  # inside its label
        assert field.get("type") == "hidden" or boxed or field["id"] in labelled, field
    for _, attributes in page.tags:
        for name in ("aria-describedby", "aria-labelledby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids), attributes
        href = attributes.get("href") or ""
        assert not href.startswith("#") or href[1:] in ids
        assert "style" not in attributes and not any(key.startswith("on") for key in attributes)
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("stage", ["sft", "ppo", "eval", "export", "data", "label"])
def test_every_form_is_whole_and_accessible(board: Any, stage: str, language: str) -> None:
    answer = board.client.get(f"/new/{stage}", headers={"accept-language": language})
    assert answer.status_code == 200
    check_accessible(answer.text)
    assert f"python -m rlhf stage={stage}" in answer.text


def test_the_list_has_every_stage_and_others_have_no_form(board: Any) -> None:
    text = board.client.get("/new").text
    check_accessible(text)
    assert set(re.findall(r'href="/new/(\w+)"', text)) == set(stages())
    assert board.client.get("/new/board").status_code == 404
    assert board.client.get("/new/../etc").status_code == 404
    assert board.client.get("/new/sft/check").headers["location"] == "/new/sft"


def test_a_link_fills_the_form(board: Any) -> None:
    query = "?model.path=owner%2Fname&reward.path=a%2Fb&reward.terms.x.kind=math&run.dir=%2Ftmp"
    text = board.client.get(f"/new/ppo{query}").text
    assert 'value="owner/name"' in text and 'value="x"' in text
    assert "Not set from this page: run.dir" in text


def test_rows_are_added_and_removed_without_script(board: Any) -> None:
    sent = {"do": "add:reward.terms", "reward": "code", "stage.steps": "7"}
    text = post(board.client, "/new/ppo", sent).text
    check_accessible(text)
    assert 'name="reward.terms#2"' in text and 'value="7"' in text
    assert 'value="remove:reward.terms#2"' in text and 'value="remove:reward.terms#0"' not in text
    sent = {"do": "remove:data.columns#0", "data.columns#0": "a", "data.columns#0.value": "b"}
    sent |= {"data.columns#1": "prompt", "data.columns#1.value": "q"}
    text = post(board.client, "/new/sft", sent).text
    assert 'value="prompt"' in text and 'value="b"' not in text
    text = post(board.client, "/new/data", {"do": "show", "data.pipeline#0": "length"}).text
    check_accessible(text)
    assert 'name="data.pipeline#0.low"' in text


def test_the_preview_says_command_file_and_problems(board: Any) -> None:
    good = post(board.client, "/new/sft/preview", {"stage.batch_size": "8"}).json()
    assert "stage.batch_size=8" in good["command"] and "batch_size: 8" in good["yaml"]
    assert "experiment=mine" in good["file_command"]
    sent = {"stage.batch_size": "x"}
    bad = post(board.client, "/new/sft/preview", sent, **{"accept-language": "zh"}).json()
    assert bad["command"] == "" and "不是整数" in bad["errors"]


def test_a_problem_stands_at_its_field_and_in_the_summary(board: Any) -> None:
    sent = {"stage.batch_size": "0", "data.max_rows": "x", "data.path": "<script>/etc"}
    answer = post(board.client, "/new/sft/check", sent)
    assert answer.status_code == 422
    check_accessible(answer.text)
    assert "<script>/etc" not in answer.text
    for key in ("f-stage-batch_size", "f-data-max_rows"):
        (field,) = [a for a in Page(answer.text).all("input") if a.get("id") == key]
        assert field["aria-invalid"] == "true" and f"{key}-error" in str(field["aria-describedby"])
        assert f'href="#{key}"' in answer.text
    group = re.search(r"<details class=\"card group\" open>\s*<summary>Data", answer.text)
    assert group is not None


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_check_then_a_start_of_the_very_same(
    board: Any, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    looked: list[Any] = []

    def look(overrides: Any) -> Look:
        looked.append(list(overrides))
        return Look(warnings=["rate is <b>high</b>"], facts=_FACTS)

    monkeypatch.setattr(new, "look", look)
    sent = {"run.name": "läufe 1", "stage.batch_size": "8"}
    answer = post(board.client, "/new/sft/check", sent, **{"accept-language": language})
    assert answer.status_code == 200
    check_accessible(answer.text)
    assert "<script>alert" not in answer.text and "&lt;script&gt;alert" in answer.text
    assert "<b>high" not in answer.text and "adapter=lora" in answer.text
    key = re.search(r'name="checked" value="([^"]+)"', answer.text)
    assert key is not None
    started = post(board.client, "/new/sft/start", {"checked": key[1]})
    assert started.status_code == 303
    assert started.headers["location"] == "/runs/l%C3%A4ufe%201/sft"
    ((argv, values),) = board.jobs.submitted
    assert [*argv] == looked[0] and "stage.batch_size=8" in argv
    work = {**_FACTS["work"], "machine": platform.node()}
    assert values == {"title": "sft: läufe 1", "run": "läufe 1", "stage": "sft", "work": work}
    again = post(board.client, "/new/sft/start", {"checked": key[1]})
    assert again.status_code == 422 and len(board.jobs.submitted) == 1


def test_how_long_it_may_take(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier run took 1.5 s for a step of 4 rows; 50 steps of 8 rows begin."""
    monkeypatch.setattr(new, "look", lambda _: Look(facts=_FACTS))
    sent = {"run.name": "next", "stage.batch_size": "8"}
    assert "Not known before the first steps" in post(board.client, "/new/sft/check", sent).text
    making.stage(board.place.runs, "earlier", "sft")
    work = {**_FACTS["work"], "rows": 4, "machine": platform.node()}
    board.jobs.earlier = [SimpleNamespace(run="earlier", stage="sft", work=work)]
    page = post(board.client, "/new/sft/check", sent).text
    assert "About 2:30, as earlier/sft went on this machine: a step of 4 rows took 1.5 s" in page


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_server_and_its_key(board: Any, monkeypatch: pytest.MonkeyPatch, language: str) -> None:
    """The key is in one answer and in the job's environment, in no command and on no other page."""
    monkeypatch.setattr(new, "look", lambda _: Look())
    model = board.place.runs / "mine" / "sft" / "model"
    model.mkdir(parents=True)
    sent = {"run.name": "mine", "model.path": str(model), "stage.port": "8123"}
    answer = post(board.client, "/new/serve/check", sent)
    key = re.search(r'name="checked" value="([^"]+)"', answer.text)
    assert key is not None
    headers = {"accept-language": language}
    page = post(board.client, "/new/serve/start", {"checked": key[1]}, **headers)
    check_accessible(page.text)
    ((argv, values),) = board.jobs.submitted
    ((variable, secret),) = values["secret"].items()
    assert len(secret) > 30 and page.text.count(secret) == 1
    assert "http://127.0.0.1:8123/v1" in page.text
    assert f"stage.token_env={variable}" in argv and secret not in " ".join(argv)
    assert values["run"] is None and secret not in values["title"]
    assert "/jobs/17" in page.text
    # neither another address nor another's secret
    form = board.client.get("/new/serve?stage.host=0.0.0.0&stage.token_env=HOME").text
    assert "stage.host" in form and 'name="stage.host"' not in form


def test_what_was_not_checked_does_not_start(board: Any) -> None:
    for sent in ({}, {"checked": "x"}, {"override": "run.dir=/"}):
        assert post(board.client, "/new/sft/start", sent).status_code == 422
    assert not board.jobs.submitted
    answer = board.client.post("/new/sft/start", data={"checked": "x"})
    assert answer.status_code == 403  # no origin


def test_what_the_dry_run_refuses_stands_at_its_field(
    board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Look(error="data.path=None: expected rows.", warnings=["careful"])
    monkeypatch.setattr(new, "look", lambda _: refused)
    answer = post(board.client, "/new/sft/check", {})
    assert answer.status_code == 422 and "careful" in answer.text
    (field,) = [a for a in Page(answer.text).all("input") if a.get("id") == "f-data-path"]
    assert field["aria-invalid"] == "true"


def test_a_run_that_is_there_offers_what_may_be_done(board: Any) -> None:
    folder = board.place.runs / "mine" / "sft"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("x")
    answer = post(board.client, "/new/sft/check", {"run.name": "mine"})
    assert answer.status_code == 422
    check_accessible(answer.text)
    basics = answer.text.split("<details")[0]
    assert 'href="#f-run-resume"' in basics and 'id="f-run-overwrite"' in answer.text


def test_a_form_that_is_too_large_is_refused(board: Any) -> None:
    assert post(board.client, "/new/sft", {"x": "y" * (5 << 20)}).status_code == 413
    many = {f"k{i}": "1" for i in range(50_001)}
    assert post(board.client, "/new/sft", many).status_code == 413


def test_the_form_needs_no_torch(board: Any) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from rlhf.board.pages import new; from rlhf.board.forms.base import compose; "
        "compose(['stage=ppo']); print(*{'torch', 'transformers', 'trl'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
