"""stage=label label.mode=import from the command line's side: labels in any format in, versions of
preference data out, again and again.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.__main__ import execute
from rlhf.cli import config
from rlhf.data.reading import DataRequest, preference_pairs
from rlhf.labels.checking import Outcome
from rlhf.labels.ledger import read_export
from rlhf.labels.records import Export, Judgement, Verdict
from rlhf.run.tracking.tracker import Tracker
from rlhf.types import UserError
from tests.checking import check
from tests.labels.label_exports import fill_label_studio
from tests.labels.labels import export_of, on_disk, pairs, say

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(judgements: list[Judgement]) -> list[Row]:
    """Judgements of pairs as rows of our JSON lines."""
    said = {Verdict.left: "a", Verdict.right: "b", Verdict.tie: "tie", Verdict.skip: "skip"}
    return [
        {
            "pair_id": j.task,
            "preference": said[j.verdict],
            "annotator": j.annotator,
            "comment": j.comment,
            "seconds": j.seconds,
            "time": j.time,
        }
        for j in judgements
    ]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labels(tmp_path: Path, *files: Path, name: str = "t", **options: Any) -> Path:
    """Run the stage in this process; the labels directory."""
    given_ = [f"label.files=[{','.join(str(file) for file in files)}]"] if files else []
    arguments = [
        "stage=label",
        "label.mode=import",
        f"run.dir={tmp_path / 'runs'}",
        f"run.name={name}",
        "tracking=none",
        *given_,
    ]
    arguments += [f"{key}={value}" for key, value in options.items()]
    execute(config.compose(arguments), arguments)
    return tmp_path / "runs" / name / "labels"


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Twelve pairs, two gold tasks and a repeat, in the run directory of an export."""
    questions: list[Row] = [
        {"prompt": f"prompt {n}", "answers": [f"good answer {n}", f"bad {n}"]} for n in range(12)
    ]
    questions += [
        {"prompt": f"gold {n}", "answers": ["right", "wrong"], "role": "gold", "best": "right"}
        for n in range(2)
    ]
    questions.append({**questions[0], "role": "repeat", "repeats": 0})
    made = export_of(questions, overlap=2)
    on_disk(made, tmp_path / "runs" / "t" / "label")
    return made


def said(export: Export, annotator: str, good: bool = True) -> list[Judgement]:
    """An annotator who always finds the better answer, or the worse one; every task."""
    out = []
    for number, task in enumerate(export.tasks):
        best = next(a.text for a in task.answers if a.text.startswith(("good", "right")) is good)
        out.append(
            say(task, best, annotator, seconds=3.0, time=f"2026-01-02T00:00:{number:02d}+00:00")
        )
    return out


def test_labels_become_preference_data(
    tmp_path: Path, export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    ann, bob = said(export, "ann"), said(export, "bob")
    bob[1] = say(export.tasks[1], "bad 1", "bob")
    bob[2] = say(export.tasks[2], Outcome.skip, "bob")
    ann[3], bob[3] = (
        say(export.tasks[3], Outcome.tie, "ann"),
        say(export.tasks[3], Outcome.tie, "bob"),
    )
    file = write(tmp_path / "all.jsonl", rows_of(ann + bob))
    folder = labels(tmp_path, file, **{"label.strength": "soft_label", "label.eval_fraction": 0.2})
    train, held = read(folder / "latest" / "train.jsonl"), read(folder / "latest" / "eval.jsonl")
    by_prompt = {row["prompt"]: row for row in train + held}
    assert set(by_prompt) == {f"prompt {n}" for n in range(12) if n != 1}, (
        "prompt 1 is split; gold and repeat make no rows"
    )
    assert len(train) + len(held) == 11
    assert held
    assert by_prompt["prompt 0"] == {
        "prompt": "prompt 0",
        "chosen": "good answer 0",
        "rejected": "bad 0",
        "soft_label": 0.75,
        "confidence": 1.0,
        "annotators": 2,
        "task": export.tasks[0].id,
        "export": export.id,
    }
    assert by_prompt["prompt 2"]["soft_label"] == pytest.approx(2 / 3), "one vote and a skip"
    assert by_prompt["prompt 3"]["soft_label"] == 0.5
    assert [row["id"] for row in read(folder / "latest" / "review.jsonl")] == [export.tasks[1].id]
    assert len(read(folder / "labels.jsonl")) == 30

    report = json.loads((folder / "latest" / "report.json").read_text(encoding="utf-8"))
    assert report["pairs"] == {
        "judged": 12,
        "used": 11,
        "few_labels": 0,
        "split": 1,
        "unsure": 0,
        "tie": 0,
        "empty": 0,
        "episode": 0,
        "disputed": 1,
        "unjudged": 0,
    }
    assert [
        (a["annotator"], a["gold"]["share"], a["itself"]["share"]) for a in report["annotators"]
    ] == [("ann", 1.0, 1.0), ("bob", 1.0, 1.0)]
    card = json.loads((folder / "latest" / "card.json").read_text(encoding="utf-8"))
    assert card["exports"][0]["instructions"] == "Read both."
    assert card["labels"]["first"] == "2026-01-02T00:00:00+00:00"

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert [parent["kind"] for parent in manifest["parents"]] == ["export"]
    assert [entry["path"] for entry in manifest["data"]] == [str(file)]
    [artifact] = manifest["artifacts"]
    assert (artifact["name"], artifact["kind"]) == ("t-labels", "preference-data")
    assert {entry["path"] for entry in artifact["files"]} >= {
        "versions/1/train.jsonl",
        "versions/1/card.md",
        "versions/1/report.json",
    }
    [line] = read(folder / "metrics.jsonl")
    assert (
        line["step"],
        line["label/new"],
        line["label/pairs_used"],
        line["label/rows_train"],
    ) == (1, 30, 11, len(train))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["stage"], summary["steps"], summary["model"]) == ("label", 1, None)
    screen = "".join(c for c in capsys.readouterr().out if not c.isspace() and c not in "│┃")
    command = (
        f"python -m rlhf stage=reward data.path={folder}/versions/1/train.jsonl "
        f"data.eval_path={folder}/versions/1/eval.jsonl stage.soft_label=true"
    )
    assert command.replace(" ", "") in screen


def test_a_second_import_adds_only_what_is_new(tmp_path: Path, export: Export) -> None:
    ann = rows_of(said(export, "ann"))
    first, second = write(tmp_path / "1.jsonl", ann[:6]), write(tmp_path / "2.jsonl", ann[4:])
    folder = labels(tmp_path, first)
    before = (folder / "labels.jsonl").read_bytes()
    labels(tmp_path, first)
    assert (folder / "labels.jsonl").read_bytes() == before
    assert sorted(path.name for path in (folder / "versions").iterdir()) == ["1"], (
        "nothing changed, so there is no new version"
    )
    labels(tmp_path, second)
    assert (folder / "labels.jsonl").read_bytes().startswith(before)
    assert [
        (r["import"], r["new"], r["known"], r["version"]) for r in read(folder / "imports.jsonl")
    ] == [(1, 6, 0, 1), (2, 0, 6, 1), (3, 9, 2, 2)]
    assert [(r["step"], r["label/total"]) for r in read(folder / "metrics.jsonl")] == [
        (1, 6),
        (2, 6),
        (3, 15),
    ]
    assert set(map(str, read(folder / "versions" / "1" / "train.jsonl"))) <= set(
        map(str, read(folder / "versions" / "2" / "train.jsonl"))
    )
    changed = [{**ann[0], "preference": "tie", "time": "2026-05-05T00:00:00Z"}]
    labels(tmp_path, write(tmp_path / "3.jsonl", changed))
    marked = [
        row for row in read(folder / "latest" / "labels.jsonl") if row["task"] == export.tasks[0].id
    ]
    assert [(row["outcome"], row["counts"]) for row in marked][1:] == [("tie", True)]
    assert marked[0]["counts"] is False
    labels(tmp_path, **{"label.min_labels": 2})
    assert (folder / "latest").readlink() == Path("versions/4"), (
        "other settings make another version of the same labels, without a file"
    )
    assert read(folder / "latest" / "train.jsonl") == []
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["artifacts"]) == 4
    assert [Path(entry["path"]).name for entry in manifest["data"]] == [
        "1.jsonl",
        "2.jsonl",
        "3.jsonl",
    ]
    assert len(manifest["starts"]) == 5


def test_what_is_refused_stops_the_import_and_is_kept(tmp_path: Path, export: Export) -> None:
    rows = rows_of(said(export, "ann"))
    rows[1]["pair_id"] = "0123456789ab-1"
    rows[2]["annotator"] = ""
    rows[3] |= {"response_a": "edited", "response_b": export.tasks[3].shown[1]}
    file = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(
        UserError,
        match=r"3 rows are no labels.*data\.max_bad_rows=0; nothing was imported",
    ) as stopped:
        labels(tmp_path, file)
    folder = tmp_path / "runs" / "t" / "labels"
    assert f"{file}, row 2, task 0123456789ab-1: " in str(stopped.value)
    assert [
        row["reason"].split(":")[0].split(" is of")[0] for row in read(folder / "refused.jsonl")
    ] == [
        "task '0123456789ab-1'",
        "no annotator",
        "edited",
    ]
    assert (folder / "labels.jsonl").read_bytes() == b""
    assert not (folder / "versions").exists()
    labels(tmp_path, file, **{"data.max_bad_rows": 3})
    assert len(read(folder / "labels.jsonl")) == 12
    assert len(read(folder / "refused.jsonl")) == 3, "each once"
    labels(tmp_path, file, **{"data.max_bad_rows": 2, "label.annotator": "ann"})
    assert len(read(folder / "labels.jsonl")) == 13


def test_killed_between_the_labels_and_the_version(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "all.jsonl", rows_of(said(export, "ann")))
    folder = labels(tmp_path, file)
    whole = {
        p.name: p.read_bytes()
        for p in (folder / "versions" / "1").iterdir()
        if p.suffix == ".jsonl"
    }
    content = (folder / "labels.jsonl").read_bytes()
    for leave in range(3):
        (folder / "latest").unlink()
        if leave >= 1:
            shutil.rmtree(folder / "versions")
        if leave >= 2:
            (folder / "labels.jsonl").write_bytes(content[: len(content) // 2])
            (folder / "metrics.jsonl").write_bytes(
                (folder / "metrics.jsonl").read_bytes() + b'{"step": 4, "lab'
            )
            (folder / "imports.jsonl").write_bytes(
                (folder / "imports.jsonl").read_bytes() + b'{"import"'
            )
        labels(tmp_path, file)
        assert (folder / "labels.jsonl").read_bytes().count(b"\n") == 15
        assert {r["task"] for r in read(folder / "labels.jsonl")} == {
            task.id for task in export.tasks
        }
        for name in ("train.jsonl", "eval.jsonl", "review.jsonl"):
            assert (folder / "latest" / name).read_bytes() == whole[name]
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_review_export_joins_the_same_labels(tmp_path: Path, export: Export) -> None:
    file = write(
        tmp_path / "all.jsonl", rows_of(said(export, "ann") + said(export, "bob", good=False))
    )
    folder = labels(tmp_path, file)
    queue = read(folder / "latest" / "review.jsonl")
    assert len(queue) == 12
    assert read(folder / "latest" / "train.jsonl") == []
    arguments = [
        "stage=label",
        f"label.review={folder}/latest/review.jsonl",
        "label.targets=[jsonl]",
        "tracking=none",
    ]
    arguments += [f"run.dir={tmp_path / 'runs'}", "run.name=t-review", "run.seed=3"]
    execute(config.compose(arguments), arguments)
    place = tmp_path / "runs" / "t-review" / "label"
    again = read_export(place)
    assert len(again.tasks) == 12
    labels(
        tmp_path,
        write(tmp_path / "review.jsonl", rows_of(said(again, "cy"))),
        **{"label.export": place, "label.eval_fraction": 0},
    )
    rows = read(folder / "latest" / "train.jsonl")
    assert len(rows) == 12
    assert all(
        row["chosen"].startswith("good") and row["annotators"] == 3 and row["export"] == again.id
        for row in rows
    )
    assert read(folder / "latest" / "review.jsonl") == []
    assert sorted(path.name for path in (folder / "exports").iterdir()) == sorted(
        (export.id, again.id)
    )
    late = rows_of([say(export.tasks[0], "good answer 0", "dan")])
    shutil.rmtree(tmp_path / "runs" / "t" / "label")
    labels(tmp_path, write(tmp_path / "late.jsonl", late))
    assert len(read(folder / "labels.jsonl")) == 43, (
        "the labels directory knows its exports, so label.export may be gone"
    )


def test_ab_test_of_the_labels(tmp_path: Path) -> None:
    from rlhf.labels.ab import plan

    asked = pairs(
        60,
        details={
            "ab": {**plan(0.3, 0.05, 0.8, 0.1).figures(), "policies": ["b", "a"], "identical": 2}
        },
    )
    on_disk(asked, tmp_path / "runs" / "t" / "label")
    rows = rows_of([say(task, f"good answer {n}") for n, task in enumerate(asked.tasks)])
    folder = labels(tmp_path, write(tmp_path / "all.jsonl", rows))
    [found] = json.loads((folder / "latest" / "report.json").read_text(encoding="utf-8"))["ab"]
    assert (
        found["a"],
        found["b"],
        found["decision"],
        found["a_wins"],
        found["b_wins"],
        found["identical"],
    ) == ("b", "a", "b is better", 0, 60, 2)
    assert "b is better" in (folder / "latest" / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "label.mode=import has nothing to read"),
        ({"label.files": "[nowhere.jsonl]"}, "label.files: nowhere.jsonl: no such file"),
        ({"label.files": "[/tmp]"}, "label.files: /tmp is a directory"),
        ({"label.export": "nowhere"}, "nowhere/export.json: no such file"),
        ({"run.name": "other"}, "label.export is not set, and .*other/label holds no export"),
        (
            {"label.pull": "true", "label.url": "http://127.0.0.1:1"},
            "label.pull=true: the export was not pushed",
        ),
        (
            {"label.pull": "true", "label.url": "http://127.0.0.1:1", "label.project": "3"},
            "environment variable LABEL_STUDIO",
        ),
    ],
)
def test_what_can_be_known_beforehand(
    tmp_path: Path,
    export: Export,
    options: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    with pytest.raises(UserError, match=message):
        labels(tmp_path, **options)
    assert not (tmp_path / "runs" / "t" / "labels").exists()


def test_labels_of_a_server(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server gives is a file of its own format, kept in the labels directory; who it is
    comes from the export.
    """
    from rlhf.labels import server
    from rlhf.labels.targets import label_studio

    judgements = [
        dataclasses.replace(one, annotation=str(n)) for n, one in enumerate(said(export, "ann"))
    ]
    asked: Row = {}

    def pull(*, url: str, token: str, project: int, folder: Path) -> Path:
        asked.update(url=url, token=token, project=project)
        filled = fill_label_studio(label_studio.write(export, folder), judgements)
        return filled.rename(folder / "project.json")

    monkeypatch.setattr(server, "pull", pull)
    monkeypatch.setenv("TOKEN_OF_TEST", "s3cret")
    (tmp_path / "runs" / "t" / "label" / "server.json").write_text(
        json.dumps({"url": "http://127.0.0.1:1", "project": 7})
    )
    folder = labels(tmp_path, **{"label.pull": "true", "label.token_env": "TOKEN_OF_TEST"})
    assert asked == {"url": "http://127.0.0.1:1", "token": "s3cret", "project": 7}
    labels(
        tmp_path,
        **{
            "label.pull": "true",
            "label.url": "http://127.0.0.1:2",
            "label.project": "8",
            "label.token_env": "TOKEN_OF_TEST",
        },
    )
    assert (asked["url"], asked["project"]) == ("http://127.0.0.1:2", 8)
    assert len(read(folder / "labels.jsonl")) == len(export.tasks)
    [source] = read(folder / "imports.jsonl")[0]["sources"]
    assert (source["name"], source["target"], source["rows"]) == (
        str(folder / "pulled" / "project.json"),
        "label_studio",
        len(export.tasks),
    )
    card = json.loads((folder / "latest" / "card.json").read_text(encoding="utf-8"))
    assert card["sources"] == [{"name": source["name"], "sha256": source["sha256"]}]
    assert not [
        path for path in folder.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()
    ], "the token is written nowhere"


def test_labels_are_not_overwritten(tmp_path: Path, export: Export) -> None:
    file = write(tmp_path / "all.jsonl", rows_of(said(export, "ann")))
    folder = labels(tmp_path, file)
    with pytest.raises(UserError, match=r"run\.overwrite=true would delete the labels"):
        labels(tmp_path, file, **{"run.overwrite": "true"})
    labels(tmp_path, str(tmp_path / "*.jsonl"), **{"run.resume": "true"})
    assert len(read(folder / "labels.jsonl")) == 15


@pytest.mark.parametrize(
    ("strength", "option"),
    [("none", ""), ("margin", "stage.margin=true"), ("soft_label", "stage.soft_label=true")],
)
@pytest.mark.parametrize("chat", [False, True])
def test_the_reward_stage_reads_the_rows(
    tmp_path: Path, chat: bool, strength: str, option: str
) -> None:
    prompts: list[Any] = [
        [{"role": "user", "content": f"Hi {n}"}] if chat else f"Hi {n}" for n in range(8)
    ]
    asked = export_of(
        [
            {"prompt": prompt, "answers": [f"good one {n}", f"bad {n}"]}
            for n, prompt in enumerate(prompts)
        ]
    )
    place = on_disk(asked, tmp_path / "export")
    rows = rows_of(
        [
            say(task, Outcome.tie if n == 0 else f"good one {n}")
            for n, task in enumerate(asked.tasks)
        ]
    )
    folder = labels(
        tmp_path,
        write(tmp_path / "c.jsonl", rows),
        **{"label.export": place, "label.strength": strength, "label.eval_fraction": 0},
    )
    cfg = config.compose(
        [
            "stage=reward",
            "model=tiny",
            "tracking=none",
            f"data.path={folder}/latest/train.jsonl",
            *([option] if option else []),
        ]
    )
    check(cfg)
    train, held = preference_pairs(DataRequest.of(cfg))
    found = {
        str(pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0]["content"]): pair
        for pair in [*train, *held]
    }
    assert set(found) == {f"Hi {n}" for n in range(0 if strength == "soft_label" else 1, 8)}
    for n in range(1, 8):
        assert found[f"Hi {n}"].chosen == (
            [{"role": "assistant", "content": f"good one {n}"}] if chat else f"good one {n}"
        )
    if strength == "margin":
        assert found["Hi 3"].margin == pytest.approx(math.log(2))
    if strength == "soft_label":
        assert (found["Hi 0"].soft_label, found["Hi 3"].soft_label) == (0.5, pytest.approx(2 / 3))


def test_the_trackers_table(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[tuple[str, int, list[Row]]] = []
    monkeypatch.setattr(
        Tracker, "table", lambda self, name, rows, step: tables.append((name, step, list(rows)))
    )
    judged = [*said(export, "ann"), say(export.tasks[0], "bad 0", "bob")]
    labels(tmp_path, write(tmp_path / "all.jsonl", rows_of(judged)))
    [(name, step, rows)] = tables
    assert (name, step, len(rows)) == ("labels", 1, 12)
    split = next(row for row in rows if row["prompt"] == "prompt 0")
    assert (split["verdict"], split["fate"]) == ("split", "split")
    better = "first" if split["first"] == "good answer 0" else "second"
    worse = {"first": "second", "second": "first"}[better]
    assert split["labels"] == f"ann: {better}; bob: {worse}"
