"""Labels out and back by the stage itself: export, judged by people (here by rule), import, and the
disputed ones out again.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.labels.ledger import read_export
from rlhf.labels.records import Export, Role, Task
from tests import toys
from tests.labels.label_steps import GOLD, Tiny, configured, run_config, run_export, two

pytestmark = pytest.mark.usefixtures("one_thread")


def judged(task: Task, best: int | None) -> str:
    """What a file says where `answers[best]` is preferred: a for the first shown, b for the second;
    None: a tie.
    """
    return "tie" if best is None else "ab"[task.order.index(best)]


def by_policy(task: Task, policy: str) -> int:
    return (
        task.best
        if task.best is not None
        else next(i for i, answer in enumerate(task.answers) if answer.policy == policy)
    )


def labels(export: Export, directory: Path, annotator: str, policy: str) -> Path:
    """The file that went out, filled in by someone who prefers `policy` and knows the gold
    answers.
    """
    rows = [
        json.loads(line)
        for line in (directory / "out/label_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tasks = {task.id: task for task in export.tasks}
    rows = [
        {**row, "annotator": annotator, "preference": judged(task, by_policy(task, policy))}
        for row in rows
        for task in [tasks[row["pair_id"]]]
    ]
    return toys.write_jsonl(directory.parent / f"{annotator}.jsonl", rows)


def imported(folder: Path, *more: str) -> Path:
    from rlhf.__main__ import execute

    cfg = configured(folder, "label.mode=import", *more, prompts=False)
    execute(cfg, ())
    return folder / cfg.run.name / "labels"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_out_back_and_the_disputed_ones_out_again(tmp_path: Path, tiny_model: Tiny) -> None:
    gold = toys.write_jsonl(tmp_path / "gold.jsonl", GOLD)
    chosen = [
        *two(tiny_model),
        "label.ab.enabled=true",
        "label.ab.effect=0.4",
        "label.overlap=2",
        f"label.gold_path={gold}",
        "label.gold_share=0.4",
    ]
    directory, export = run_export(tmp_path, *chosen, "label.repeat_share=0.4")
    main = [task for task in export.tasks if task.role is Role.main]
    assert len(main) >= 4

    ann, bob = (
        labels(export, directory, "ann", "southern"),
        labels(export, directory, "bob", "southern"),
    )
    rows = read(bob)
    disputed = main[0].id
    for row in rows:
        if row["pair_id"] == disputed:
            row["preference"] = {"a": "b", "b": "a"}[row["preference"]]
    toys.write_jsonl(bob, rows)
    folder = imported(tmp_path, f"label.files=[{ann},{bob}]", "label.eval_fraction=0")
    kept = {row["task"]: row for row in read(folder / "latest/train.jsonl")}
    tasks = {task.id: task for task in main}
    assert set(kept) == set(tasks) - {disputed}
    for name, row in kept.items():
        best = by_policy(tasks[name], "southern")
        assert (row["chosen"], row["rejected"]) == (
            tasks[name].answers[best].text,
            tasks[name].answers[1 - best].text,
        )
        assert row["annotators"] == 2 and row["prompt"] == tasks[name].prompt
    report = json.loads((folder / "latest/report.json").read_text(encoding="utf-8"))
    assert [one["gold"]["share"] for one in report["annotators"]] == [1.0, 1.0]
    (found,) = report["ab"]
    assert (found["a"], found["b"], found["a_wins"], found["b_wins"]) == (
        "northern",
        "southern",
        0,
        len(main) - 1,
    )
    assert (
        found["identical"] == export.details["ab"]["identical"]
        and found["planned"] == export.details["ab"]["pairs"]
    )

    review = folder / "latest/review.jsonl"
    again = configured(tmp_path, "run.name=second", f"label.review={review}", prompts=False)
    second_directory, second = run_config(again)
    (task,) = second.tasks
    assert (
        second.details["origins"] == {task.id: disputed} and task.answers == tasks[disputed].answers
    )
    file = labels(second, second_directory, "cy", "southern")
    imported(
        tmp_path,
        f"label.files=[{file}]",
        f"label.export={second_directory}",
        "label.eval_fraction=0",
    )
    settled = {row["prompt"]: row["chosen"] for row in read(folder / "latest/train.jsonl")}
    assert (
        len(settled) == len(main)
        and settled[task.prompt] == task.answers[by_policy(task, "southern")].text
    )
    assert read(folder / "latest/review.jsonl") == [] and read_export(directory) == export
