"""A real Label Studio server takes configuration and tasks, and every label that people give there
comes back: `make test-labelstudio`.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.choices import LabelKind, LabelTarget
from rlhf.labels import server
from rlhf.labels.records import Answer, Export, Judgement, Unreadable, Verdict, as_text
from rlhf.labels.targets import label_studio, read_labels
from rlhf.types import UserError
from tests.labels.label_exports import NASTY, export, task
from tests.labels.label_studio_site import Person, Site, running

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(900)]
SCRIPT = (
    "<script>document.title='owned'</script><img src=x "
    "onerror=\"document.title='owned'\"><b>bold</b>"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi & $answer1"}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    program = os.environ.get("LABEL_STUDIO")
    if not program:
        pytest.fail(
            "LABEL_STUDIO: expected the path of the program label-studio; `make "
            "test-labelstudio` installs it and sets it"
        )
    with running(program, tmp_path_factory.mktemp("label-studio")) as running_site:
        print(f"\nLabel Studio was up after {running_site.started_s:.0f} s")
        yield running_site


@pytest.fixture(scope="module")
def second(site: Site) -> Person:
    return site.invite("second@example.com")


def pairs(**fields: Any) -> Export:
    """Six pairs, with every text that is hard to hold."""
    texts = [(text, text + " too") for text in (*NASTY[:4], SCRIPT, "last")]
    tasks = [
        task(i, CHAT if i == 1 else NASTY[-i], list(two), scores=[0.0, 1.0])
        for i, two in enumerate(texts)
    ]
    given = {
        "title": "Which costs $5 & is <b>better</b>?",
        "instructions": "Read <i>both</i>.\nThen choose.",
    } | fields
    return export(LabelKind.pair, tasks, **given)


def rankings(**fields: Any) -> Export:
    return export(
        LabelKind.ranking,
        [
            task(i, "Which?", [f"{i}", SCRIPT, "=c", ""], scores=[3.0, 2.0, 1.0, 0.0])
            for i in range(4)
        ],
        **fields,
    )


def result(name: str, to: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"r-{name}",
        "from_name": name,
        "to_name": to,
        "type": kind,
        "origin": "manual",
        "value": value,
    }


def selected(side: str) -> dict[str, Any]:
    return result("pw", "pw", "pairwise", {"selected": side})


def chosen(choice: str) -> dict[str, Any]:
    return result("verdict", "prompt", "choices", {"choices": [choice]})


def ordered(*places: int) -> dict[str, Any]:
    return result(
        "rank",
        "results",
        "ranker",
        {"ranker": {"rank": [f"answer{place + 1}" for place in places]}},
    )


def pulled(site: Site, project: int, folder: Path) -> list[Judgement | Unreadable]:
    target, labels = read_labels(
        server.pull(url=site.url, token=site.token, project=project, folder=folder)
    )
    assert target is LabelTarget.label_studio
    return list(labels)


def test_pairs_go_out_and_every_label_comes_back(
    site: Site,
    second: Person,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Left, right, tie, skip, the tool's own skip, two annotators, ratings, comments, a draft, an
    empty annotation; suggestions are no labels.
    """
    monkeypatch.setattr(server, "_BATCH", 4)  # two requests
    caplog.set_level(logging.DEBUG)
    out = pairs(prelabel=True, overlap=2)
    project = server.push(out, url=site.url, token=site.token)
    on_site = site.owner.get(f"/api/projects/{project}")
    assert (
        on_site["title"].endswith(f"({out.id})")
        and on_site["task_number"] == 6
        and on_site["maximum_annotations"] == 2
    )
    assert (
        on_site["total_predictions_number"] == 6
        and on_site["label_config"].strip() == label_studio.config_xml(out).strip()
    )
    assert on_site["expert_instruction"] == "Read &lt;i&gt;both&lt;/i&gt;.<br>Then choose."
    number = [site.numbers(project)[one.id] for one in out.tasks]
    first, comment = site.owner, "so \u0001 ‽ <b>\n=1"
    rating = result("rating2", "answer2", "rating", {"rating": 4})
    said = [
        (
            first,
            0,
            Verdict.left,
            first.annotate(
                number[0],
                project,
                [
                    selected("left"),
                    rating,
                    result("comment", "prompt", "textarea", {"text": [comment]}),
                ],
            ),
        ),
        (second, 0, Verdict.right, second.annotate(number[0], project, [selected("right")])),
        (first, 1, Verdict.tie, first.annotate(number[1], project, [chosen("tie")])),
        (second, 1, Verdict.skip, second.annotate(number[1], project, [chosen("skip")])),
        (first, 2, Verdict.cancelled, first.annotate(number[2], project, [], was_cancelled=True)),
        (
            second,
            2,
            Verdict.cancelled,
            second.annotate(number[2], project, [selected("left")], was_cancelled=True),
        ),
        (first, 3, Verdict.right, first.annotate(number[3], project, [selected("right")])),
        (second, 4, None, second.annotate(number[4], project, [])),
    ]
    second.send(
        f"/api/tasks/{number[5]}/drafts?project={project}",
        {"result": [selected("left")], "lead_time": 1.0},
    )
    names = {
        id(first): str(first.get("/api/current-user/whoami")["id"]),
        id(second): str(second.get("/api/current-user/whoami")["id"]),
    }
    found = {one.place.rsplit(" ", 1)[1]: one for one in pulled(site, project, tmp_path)}
    assert set(found) == {str(annotation) for *_, annotation in said}, (
        "each annotation is accounted for, and nothing else"
    )
    for who, place, verdict, annotation in said:
        one = found[str(annotation)]
        assert one.task == out.tasks[place].id
        if verdict is None:
            assert isinstance(one, Unreadable) and "submitted without a verdict" in one.reason
            continue
        assert isinstance(one, Judgement)
        assert (one.annotator, one.verdict, one.seconds, one.annotation) == (
            names[id(who)],
            verdict,
            4.25,
            str(annotation),
        )
        assert (one.prompt, one.shown) == (
            as_text(out.tasks[place].prompt),
            out.tasks[place].shown,
        ) and one.time is not None
    with_all = found[str(said[0][3])]
    assert (
        isinstance(with_all, Judgement)
        and with_all.ratings == (None, 4)
        and with_all.comment == comment
    )
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert site.token not in written and site.token not in caplog.text


def test_rankings_go_out_and_every_label_comes_back(
    site: Site, second: Person, tmp_path: Path
) -> None:
    out = rankings(prelabel=True)
    project = server.push(out, url=site.url, token=site.token)
    number = [site.numbers(project)[one.id] for one in out.tasks]
    said = {
        site.owner.annotate(number[0], project, [ordered(2, 0, 3, 1)]): (
            0,
            Verdict.ranked,
            ((2,), (0,), (3,), (1,)),
        ),
        second.annotate(number[0], project, [ordered(0, 1, 2, 3)]): (
            0,
            Verdict.ranked,
            ((0,), (1,), (2,), (3,)),
        ),
        site.owner.annotate(number[1], project, [ordered(0, 1, 2, 3), chosen("tie")]): (
            1,
            Verdict.tie,
            (),
        ),
        site.owner.annotate(number[2], project, [ordered(0, 1, 2, 3), chosen("skip")]): (
            2,
            Verdict.skip,
            (),
        ),
        site.owner.annotate(number[3], project, [], was_cancelled=True): (3, Verdict.cancelled, ()),
    }
    found = pulled(site, project, tmp_path)
    assert {
        int(one.annotation): (one.task, one.verdict, one.ranking, one.shown)
        for one in found
        if isinstance(one, Judgement)
    } == {
        annotation: (out.tasks[place].id, verdict, ranking, out.tasks[place].shown)
        for annotation, (place, verdict, ranking) in said.items()
    }
    assert len(found) == len(said)


@pytest.mark.parametrize("kind", list(LabelKind), ids=lambda kind: kind.value)
def test_the_server_takes_every_configuration(kind: LabelKind, site: Site) -> None:
    """By its own validation, which refuses a control of a tag that is not there."""
    make = pairs if kind is LabelKind.pair else rankings
    config = ""
    for fields in (
        {},
        {"comments": False},
        {"title": "plain", "instructions": ""},
        {"title": "\x01"},
        *([{"ratings": False}] if kind is LabelKind.pair else []),
    ):
        config = label_studio.config_xml(make(**fields))
        answer = site.owner.http.post(
            "/api/projects/validate/", json={"label_config": config}, headers=_form(site)
        )
        assert answer.status_code == 204, answer.text
    broken = config.replace('toName="prompt"', 'toName="nowhere"')
    assert (
        site.owner.http.post(
            "/api/projects/validate/", json={"label_config": broken}, headers=_form(site)
        ).status_code
        == 400
    )


def _form(site: Site) -> dict[str, str]:
    return {"X-CSRFToken": site.owner.http.cookies["csrftoken"], "Referer": site.url}


def test_a_push_that_the_server_refuses_leaves_no_project(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = site.owner.get("/api/projects")["count"]
    rows = [{"data": {"answer1": "a"}}]
    monkeypatch.setattr(label_studio, "task_rows", lambda out: rows)
    with pytest.raises(UserError, match=r"the server answers 400: .*prompt"):
        server.push(pairs(), url=site.url, token=site.token)
    assert site.owner.get("/api/projects")["count"] == before


def test_what_the_server_refuses_names_the_remedy(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refuses the access token.*personal access token"):
        server.push(pairs(), url=site.url, token="0123456789abcdef")
    other = site.token[:-4] + ("AAAA" if not site.token.endswith("AAAA") else "BBBB")
    with pytest.raises(UserError, match="refuses the access token") as error:
        server.pull(url=site.url, token=other, project=1, folder=tmp_path)
    assert other not in str(error.value)
    with pytest.raises(UserError, match=r"no such project.*label\.project"):
        server.pull(url=site.url + "/", token=site.token, project=987654, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def rlhf(folder: Path, token: str, *options: str) -> None:
    """One command of the toolkit, with the token in its environment alone. Raises AssertionError
    with what it printed.
    """
    command = [
        sys.executable,
        "-m",
        "rlhf",
        "stage=label",
        "rollout=hf",
        "tracking=none",
        f"run.dir={folder}",
        "run.name=pairs",
        *options,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "LABEL_STUDIO_API_KEY": token},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert token not in done.stdout + done.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_the_whole_way_of_a_label(site: Site, second: Person, tmp_path: Path) -> None:
    """stage=label pushes, people label, stage=label pulls and imports: each annotation is a label
    or a refused row, and a second import adds none.
    """
    samples = [
        {
            "step": step,
            "prompt": f"p{i} {SCRIPT}",
            "response": f"answer {i} of {step}",
            "score": step + i,
        }
        for step in (0, 1)
        for i in range(6)
    ]
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8"
    )
    given = [
        f"label.samples=[{tmp_path / 'samples.jsonl'}]",
        "label.budget=6",
        "label.targets=[label_studio]",
        "label.overlap=2",
        "label.ratings=true",
    ]
    rlhf(tmp_path, site.token, *given, "label.push=true", f"label.url={site.url}")
    out = tmp_path / "pairs" / "label"
    project = json.loads((out / "server.json").read_text(encoding="utf-8"))["project"]
    orders = {row["id"]: row["order"] for row in lines(out / "tasks.jsonl")}
    said: dict[str, str] = {}
    for number, (task_id, on_site) in enumerate(site.numbers(project).items()):
        for who in (site.owner, second):
            left = {0: "first", 1: "second"}[orders[task_id][0]]
            results, outcome = [
                ([selected("left")], left),
                ([selected("right")], {"first": "second", "second": "first"}[left]),
                ([chosen("tie")], "tie"),
                ([chosen("skip")], "skip"),
                ([], "cancelled"),
                ([], "refused"),
            ][(number + (who is second)) % 6]
            said[
                str(who.annotate(on_site, project, results, was_cancelled=outcome == "cancelled"))
            ] = outcome
    back = ["label.mode=import", "label.pull=true", "data.max_bad_rows=2"]
    rlhf(tmp_path, site.token, *back)
    labels = tmp_path / "pairs" / "labels"
    found = {row["annotation"]: row["outcome"] for row in lines(labels / "labels.jsonl")}
    refused = {row["place"].rsplit(" ", 1)[1]: "refused" for row in lines(labels / "refused.jsonl")}
    assert found | refused == said and len(said) == 12 and len(refused) == 2
    rlhf(tmp_path, site.token, *back, "run.resume=true")
    first, again = lines(labels / "imports.jsonl")
    assert (first["new"], again["new"], again["known"], again["refused"]) == (10, 0, 10, 2)
    written = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and site.token.encode() in path.read_bytes()
    ]
    assert written == [], "the token is stored nowhere"


@pytest.mark.browser
def test_in_a_browser_a_click_is_a_label_and_markup_is_text(site: Site, tmp_path: Path) -> None:
    """The editor with headless Chromium: what a response says is shown and does nothing; the answer
    that is clicked and submitted comes back.
    """
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("no Chromium at /usr/bin/chromium")
    from playwright.sync_api import sync_playwright

    one = replace(
        pairs(ratings=True).tasks[4],
        prompt="Which?",
        answers=(Answer(SCRIPT), Answer("plain")),
        order=(1, 0),
    )
    out = pairs(title="Which?")
    project = server.push(replace(out, tasks=(one,)), url=site.url, token=site.token)
    number = site.numbers(project)[one.id]
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        cookies = [
            {"name": c.name, "value": str(c.value), "url": site.url}
            for c in site.owner.http.cookies.jar
        ]
        context.add_cookies(cookies)  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(f"{site.url}/projects/{project}/data?task={number}", timeout=120_000)
        # in the editor, not in the table of tasks beside it
        answer = page.locator(".lsf-richtext__line").filter(has_text=SCRIPT)
        answer.wait_for(timeout=120_000)
        answer.click()
        page.get_by_role("button", name="Submit").click()
        # what Submit becomes once the label is on the server
        page.locator("button").filter(has_text="Update").wait_for(timeout=60_000)
        page.screenshot(path=str(site.log.parent / "editor.png"))
        assert (
            page.title() != "owned"
            and page.locator(".lsf-richtext b, .lsf-richtext script, .lsf-richtext img").count()
            == 0
        )
        browser.close()
    (found,) = pulled(site, project, tmp_path)
    assert (
        isinstance(found, Judgement)
        and found.verdict is Verdict.right
        and found.shown == ("plain", SCRIPT)
    )
    assert (
        json.loads((tmp_path / f"label_studio_project_{project}.json").read_text())[0][
            "annotations"
        ][0]["lead_time"]
        > 0
    )
