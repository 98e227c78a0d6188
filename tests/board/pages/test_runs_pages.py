"""The pages of runs and jobs, asked as a browser asks: what they show, and what they refuse."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from rlhf.board.app import Place
from rlhf.board.paths import run_link
from tests.board.acting import acting, until
from tests.board.making import ORIGIN, client, metric_line, stage

__all__ = ["acting"]

NAME = '<script>alert(1)</script> & 电影 "x"'
LINK = "/runs/" + quote(NAME, safe="")


@pytest.fixture
def place(acting: Path) -> Place:
    return Place(acting, acting.parent / "uploads", 1 << 20, False)


@pytest.fixture
def browser(place: Place) -> Any:
    return client(place)


def test_the_list_shows_search_and_order(place: Place, browser: Any) -> None:
    assert "There is no run yet" in browser.get("/runs").text
    stage(place.runs, NAME.replace("/", "-"), "sft", ended=True)
    stage(place.runs, "other", "ppo")
    text = browser.get("/runs").text
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert text.count('scope="row"') == 2 and "loss 1.9" in text
    found = browser.get("/runs?q=other+ppo").text
    assert found.count('scope="row"') == 1
    assert "No run has all" in browser.get("/runs?q=%3Cb%3E").text
    live = browser.get("/runs-live?q=other").json()
    assert live["ended"] is True and live["other/ppo:steps"] == "10"
    chinese = browser.get("/runs", headers={"accept-language": "zh"}).text
    assert "已完成" in chinese


def test_many_runs_have_pages(place: Place, browser: Any) -> None:
    for number in range(103):
        stage(place.runs, f"run-{number}", "sft", steps=range(1, 3))
    assert browser.get("/runs").text.count('scope="row"') == 100
    second = browser.get("/runs?page=2").text
    assert second.count('scope="row"') == 3 and "Page 2 of 2" in second
    assert browser.get("/runs?page=99999999999&q=").status_code == 200


@pytest.mark.parametrize("run", ["film one", "电影 & <b>", "q'\"uote", "50%", "~1/films/a b"])
def test_names_of_any_kind_have_a_page(place: Place, browser: Any, run: str) -> None:
    folder = stage(place.runs, run, "sft", ended=True)
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "response": "<b>hi</b>"}) + "\n")
    base = run_link(run)
    assert base in browser.get("/runs").text
    assert browser.get(base).headers["location"] == f"{base}/sft"
    answer = browser.get(f"{base}/sft")
    assert answer.status_code == 200
    for source in re.findall(r'(?:href|src|action|data-live)="([^"]*)"', answer.text):
        address = source.replace("&amp;", "&")
        if address.startswith(base) and not address.endswith("/resume"):
            assert browser.get(address).status_code == 200, address
    assert f'data-live="{base}/sft/live"' in answer.text
    shown = browser.get(f"{base}/sft/samples").text
    assert "&lt;b&gt;hi&lt;/b&gt;" in shown and "<b>hi" not in shown


def test_a_run_below_another(place: Place, browser: Any) -> None:
    """Its model is the other's parent; deleting the upper one names and takes both."""
    stage(place.runs, "films", "sft", ended=True)
    folder = stage(place.runs, "films/second", "ppo", ended=True)
    origin = {"kind": "policy", "path": "m", "from": {"run": "../../sft", "stage": "sft"}}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"parents": [origin]}))
    assert '"/runs/films/sft"' in browser.get("/runs/films~1second/ppo").text
    models = browser.get("/models").text
    assert "films/second/ppo" in models and "/runs/films~1second/ppo" in models
    lines = browser.get("/runs-compare?run=films/second/ppo&run=films/sft")
    assert lines.status_code == 200 and "films/second/ppo" in lines.text
    # what lies in a run directory is no run
    assert browser.get("/runs/films~1sft/model").status_code == 404
    assert browser.get("/runs-delete/films~1sft").status_code == 404
    asked = browser.get("/runs-delete/films").text
    assert "second/ppo" in asked and "sft" in asked
    answer = browser.post("/runs-delete/films~1second", headers=ORIGIN, data={"confirm": "yes"})
    assert answer.status_code == 303 and not folder.exists()
    assert (place.runs / "films" / "sft").is_dir()


def test_a_stage_that_ended(place: Place, browser: Any) -> None:
    base = stage(place.runs, "film", "reward", ended=True)
    stage(place.runs, "film", "sft", ended=True)
    text = browser.get("/runs/film/sft").text
    for words in ("ended", "1:01", "512 MiB", "1.25", "&lt;i&gt;x", "base/model", "0123456789ab"):
        assert words in text, words
    model = place.runs / "film" / "sft" / "model"
    reward = {"model.path": str(model), "reward.path": str(base / "model")}
    assert "/new/ppo?" + urlencode({"run.name": "film", **reward}).replace("&", "&amp;") in text
    for name in ("reward", "dpo", "export"):
        wanted = urlencode({"run.name": "film", "model.path": str(model)})
        assert f"/new/{name}?{wanted}".replace("&", "&amp;") in text, name
    assert "stage.before=base%2Fmodel" in text
    assert "/chat?" + urlencode({"model": str(model)}) in text
    text = browser.get("/runs/film/reward").text
    own = {"reward.path": str(base / "model"), "model.path": str(model)}
    assert "/new/ppo?" + urlencode({"run.name": "film", **own}).replace("&", "&amp;") in text
    assert "/new/dpo" not in text and "/chat?" not in text


def test_curves_are_pictures_with_tables(place: Place, browser: Any) -> None:
    stage(place.runs, "film", "sft", steps=range(1, 1001))
    page = browser.get("/runs/film/sft?metric=grad_norm").text
    assert page.count('class="curve"') == 3  # loss, gradient norm, and that by itself
    assert "begins at 1.99 (step 1) and is -8 at step 1000" in page
    answer = browser.get("/runs/film/sft/curve.svg?panel=loss-0&version=17")
    assert answer.headers["content-type"] == "image/svg+xml"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "sandbox" in policy
    assert ">Loss</text>" in answer.text and ">step</text>" in answer.text
    drawn = re.findall(r'class="l r c0" d="M([^"]*)"', answer.text)
    assert len(drawn[0].split("L")) <= 400
    chinese = browser.get(
        "/runs/film/sft/curve.svg?panel=loss-0", headers={"accept-language": "zh"}
    )
    assert ">损失</text>" in chinese.text
    table = browser.get("/runs/film/sft/table?panel=loss-0").text
    assert table.count("<tr>") == 401
    for query in ("panel=none", "panel=score-0", "metric=absent", ""):
        assert browser.get(f"/runs/film/sft/curve.svg?{query}").status_code == 404


def test_several_runs_in_one_picture(place: Place, browser: Any) -> None:
    for number in range(9):
        stage(place.runs, f"run {number}", "sft", steps=range(1, 20 + number))
    other = place.runs / "run 0" / "sft" / "metrics.jsonl"
    other.write_text(metric_line(1, mine=1.0) + "\n")
    query = urlencode([("run", f"run {number}/sft") for number in range(2)])
    text = browser.get(f"/runs-compare?{query}").text
    assert "run 1/sft" in text and "has no such figure" in text
    source = re.findall(r'src="(/runs-compare.svg[^"]*)"', text)[0].replace("&amp;", "&")
    picture = browser.get(source)
    assert picture.status_code == 200 and "run 1/sft" in picture.text
    all_of_them = urlencode([("run", f"run {number}/sft") for number in range(9)])
    assert "1 more were chosen" in browser.get(f"/runs-compare?{all_of_them}").text
    assert "No run was chosen" in browser.get("/runs-compare").text
    for wrong in ("../x/sft", "run 1", "run 1/../../etc", "absent/sft"):
        assert browser.get("/runs-compare?" + urlencode({"run": wrong})).status_code == 404


def test_samples_are_paged_the_newest_first(place: Place, browser: Any) -> None:
    folder = stage(place.runs, "film", "ppo")
    rows = [{"step": step, "prompt": f"p{step}", "response": f"r{step}"} for step in range(1, 24)]
    turns = [{"role": "assistant", "text": "call"}, {"role": "environment", "text": "answer"}]
    rows.append({"step": 24, "response": "last", "turns": turns, "score": 0.123456, "ok": None})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(text + '{"step": 25, "resp')
    first = browser.get("/runs/film/ppo/samples").text
    assert "24 in all" in first and "Page 1 of 3" in first
    assert first.index("last") < first.index("r23") and "r15" in first and "r14<" not in first
    assert "0.1235" in first and "answer" in first
    last = browser.get("/runs/film/ppo/samples?page=3").text
    assert "r1<" in last and "r4<" in last and "r5<" not in last
    assert browser.get("/runs/film/ppo/samples?page=x").status_code == 200
    assert browser.get("/runs/other/ppo/samples").status_code == 404


def test_nothing_outside_is_shown(place: Place, browser: Any, tmp_path: Path) -> None:
    outside = stage(tmp_path / "outside", "x", "sft", ended=True)
    (outside / "samples.jsonl").write_text('{"step": 1, "response": "secret words"}\n')
    folder = stage(place.runs, "film", "sft")
    (place.runs / "out").symlink_to(outside.parent)
    (place.runs / "film" / "ppo").symlink_to(outside)
    (folder / "samples.jsonl").symlink_to(outside / "samples.jsonl")
    (folder / "plots").mkdir()
    (folder / "plots" / "x.png").symlink_to(outside / "manifest.json")
    addresses = ["/runs/out", "/runs/out/sft", "/runs/film/ppo", "/runs/film/sft/samples"]
    addresses += ["/runs/film/sft/plots/x.png", "/runs/..%2Foutside/x", "/runs/%2e%2e/outside"]
    addresses += [
        "/runs/film/%2e%2e",
        "/runs-delete/%2e%2e",
        "/runs-delete/out",
        "/jobs/%2e%2e",
        "/jobs/x/log",
    ]
    addresses += ["/runs/.board/jobs", "/runs/film/sft/plots/..%2Fmanifest.json"]
    for address in addresses:
        answer = browser.get(address)
        assert answer.status_code == 404, address
        assert "secret words" not in answer.text
    assert "secret words" not in browser.get("/runs/film/sft").text


def test_deleting_asks_first(place: Place, browser: Any) -> None:
    stage(place.runs, NAME.replace("/", "-"), "sft", ended=True)
    stage(place.runs, "other", "sft")
    link = "/runs-delete/" + quote(NAME.replace("/", "-"), safe="")
    asked = browser.get(link)
    assert asked.status_code == 200 and 'type="checkbox"' in asked.text
    assert re.search(r"<dd>[1-9][\d.]* (B|KiB)</dd>", asked.text)
    unticked = browser.post(link, headers=ORIGIN)
    assert unticked.status_code == 422 and 'aria-invalid="true"' in unticked.text
    assert browser.post(link, data={"confirm": "yes"}).status_code == 403, "from another page"
    assert len(list(place.runs.glob("*/sft"))) == 2
    assert browser.post(link, headers=ORIGIN, data={"confirm": "yes"}).status_code == 303
    assert [path.parent.name for path in place.runs.glob("*/sft")] == ["other"]
    assert not list((place.runs / ".board" / "deleted").iterdir())
    assert browser.get(link).status_code == 404


def test_old_jobs_are_deleted_when_somebody_says_so(place: Place, browser: Any) -> None:
    """Kept: what runs, and the newest job of a run that is there, whose page shows its output."""
    stage(place.runs, "film", "sft")
    made = {}
    for run in ("film", "film", "gone", None):
        name = None if run is None else "sft"
        job = place.jobs.submit(["act=words"], title=f"of {run}", run=run, stage=name)
        until(lambda id=job.id: not place.jobs.job(id).is_active)
        made.setdefault(run, job)
    newest = place.jobs.of_run("film", "sft")
    running = place.jobs.submit(["act=run"], title="runs", run=None, stage=None)
    assert 'href="/jobs-over"' in browser.get("/runs").text
    page = browser.get("/jobs-over").text
    shown = set(re.findall(r'name="job" value="([^"]+)"', page))
    assert shown == {job.id for job in made.values()}
    assert "3 jobs" in page
    chosen = [made["gone"].id, made["film"].id, running.id, newest.id, "../../film"]
    answer = browser.post("/jobs-over", headers=ORIGIN, data={"job": chosen})
    assert answer.status_code == 303
    left = {job.id for job in place.jobs.jobs()}
    assert left == {made[None].id, running.id, newest.id}
    assert not list((place.runs / ".board" / "jobs").glob(".*.going"))
    assert (place.runs / "film" / "sft").is_dir()
    place.jobs.kill(running.id)


def test_a_run_that_runs_is_not_deleted_and_can_be_stopped(place: Place, browser: Any) -> None:
    stage(place.runs, "film", "sft")
    job = place.jobs.submit(["act=run"], title="film: sft", run="film", stage="sft")
    until(lambda: b"child" in place.jobs.output(job.id, 0)[0])
    refused = browser.post("/runs-delete/film", headers=ORIGIN, data={"confirm": "yes"})
    assert refused.status_code == 422 and "run.name=film stage=sft" in refused.text
    assert (place.runs / "film" / "sft").is_dir()
    text = browser.get("/runs/film/sft").text
    assert f"/jobs/{job.id}/stop" in text and "running" in text
    live = browser.get("/runs/film/sft/live").json()
    assert live["ended"] is False and "child" in live["log"] and live["memory"].endswith(" MiB")
    assert "checkpoint" in browser.get(f"/jobs/{job.id}/stop").text
    assert place.jobs.job(job.id).state == "running", "asking is no stopping"
    answer = browser.post(f"/jobs/{job.id}/stop", headers=ORIGIN)
    assert answer.headers["location"] == "/runs/film/sft"
    until(lambda: place.jobs.job(job.id).state == "stopped")
    text = browser.get("/runs/film/sft").text
    assert "Resume" in text and "143" in text
    assert browser.get("/runs/film/sft/live").json()["ended"] is True
    assert browser.get(f"/jobs/{job.id}/stop").headers["location"] == "/runs/film/sft"
    whole = browser.get(f"/jobs/{job.id}/log")
    assert whole.headers["content-type"].startswith("text/plain") and "saved" in whole.text


def test_resume_takes_the_last_start(place: Place, browser: Any) -> None:
    folder = stage(place.runs, "my film", "sft")
    manifest = json.loads((folder / "manifest.json").read_text())
    first = {"argv": ["stage=sft", "act=fail"], "step": 0}
    options = ["act=words", "run.name=elsewhere", "+run.dir=/x", "run.overwrite=true"]
    manifest["starts"] = [first, {"argv": ["stage=sft", *options], "step": 5}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    answer = browser.post("/runs/my%20film/sft/resume", headers=ORIGIN)
    assert answer.headers["location"] == "/runs/my%20film/sft"
    job = place.jobs.of_run("my film", "sft")
    assert job is not None
    own = (f"run.dir={place.runs}", 'run.name="my film"', "run.resume=true")
    assert job.argv == ("stage=sft", "act=words", *own)
    until(lambda: not place.jobs.job(job.id).is_active)


def test_resume_refuses_what_it_does_not_know(place: Place, browser: Any) -> None:
    folder = stage(place.runs, "film", "sft")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["starts"] = [{"argv": ["stage=sft", "+judge.api_key=***"], "step": 0}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused = browser.post("/runs/film/sft/resume", headers=ORIGIN)
    assert refused.status_code == 422 and "judge.api_key" in refused.text
    (folder / "manifest.json").write_text("{}")
    refused = browser.post("/runs/film/sft/resume", headers=ORIGIN)
    assert refused.status_code == 422 and "manifest.json" in refused.text
    (folder / "manifest.json").write_text(json.dumps({**manifest, "starts": [{"argv": ["a=b"]}]}))
    job = place.jobs.submit(["act=run"], title="t", run="film", stage="sft")
    refused = browser.post("/runs/film/sft/resume", headers=ORIGIN)
    assert refused.status_code == 422 and "run.name=film stage=sft" in refused.text
    place.jobs.kill(job.id)
    until(lambda: not place.jobs.job(job.id).is_active)
    assert len(place.jobs.jobs()) == 1


def test_a_queued_job_has_a_page_before_it_has_a_folder(place: Place, browser: Any) -> None:
    first = place.jobs.submit(["act=run"], title="first", run="a", stage="sft")
    second = place.jobs.submit(["act=fail"], title="second", run="b c", stage="ppo")
    text = browser.get("/runs/b%20c/ppo").text
    assert "queued" in text and "Jobs before it" in text
    assert "queued" in browser.get("/runs").text
    assert browser.get("/runs/b%20c/ppo/live").json()["ahead"] == "1"
    assert browser.get("/runs/b%20c/sft").status_code == 404
    place.jobs.kill(first.id)
    until(lambda: not place.jobs.job(second.id).is_active)
    text = browser.get("/runs/b%20c/ppo").text
    assert "failed" in text and "data.path=none: no such file." in text


def test_a_job_without_a_run_has_a_page_of_its_own(place: Place, browser: Any) -> None:
    job = place.jobs.submit(["act=stubborn"], title="<b>check</b>", run=None, stage=None)
    until(lambda: b"child" in place.jobs.output(job.id, 0)[0])
    assert "&lt;b&gt;check" in browser.get("/runs").text
    text = browser.get(f"/jobs/{job.id}").text
    assert "&lt;b&gt;check" in text and f"/jobs/{job.id}/stop" in text and "/kill" not in text
    browser.post(f"/jobs/{job.id}/stop", headers=ORIGIN)
    until(lambda: place.jobs.job(job.id).state == "stopping")
    assert f"/jobs/{job.id}/kill" in browser.get(f"/jobs/{job.id}").text
    browser.post(f"/jobs/{job.id}/kill", headers=ORIGIN)
    until(lambda: place.jobs.job(job.id).state == "stopped")
    assert browser.get(f"/jobs/{job.id}/live").json()["ended"] is True
    assert browser.get("/jobs/20260101-000000-00000000").status_code == 404


def test_damaged_files_break_no_page(place: Place, browser: Any) -> None:
    for number, damage in enumerate(("", "{", "[]", '{"starts": 3}', "\xff\x00", '{"a": ' * 2000)):
        folder = stage(place.runs, f"run {number}", "sft")
        for name in ("manifest.json", "summary.json", "metrics.jsonl", "samples.jsonl"):
            (folder / name).write_text(damage, encoding="latin-1")
        base = f"/runs/run%20{number}/sft"
        for address in (base, f"{base}/live", f"{base}/samples", "/runs", "/runs-live"):
            assert browser.get(address).status_code == 200, (address, damage[:9])
