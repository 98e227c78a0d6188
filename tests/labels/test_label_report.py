"""Figures of annotators, the review queue, A/B labels and versions, held against counts made by
hand.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from conf.choices import LabelKind, Strength
from conf.labelling import LabelAggregate
from rlhf.labels import versions
from rlhf.labels.ab_labels import judged, policies
from rlhf.labels.card import markdown
from rlhf.labels.checking import Checked, Outcome
from rlhf.labels.ledger import task_of
from rlhf.labels.pairs import Fate
from rlhf.labels.records import Answer, Export
from rlhf.labels.report import Situation, report
from rlhf.labels.report_tables import annotator_rows
from rlhf.labels.review import review_rows
from rlhf.labels.store import Stored
from rlhf.types import UserError
from tests.labels.labels import export_of, label, ledgers_of, on_disk, pairs


def situation_of(
    exports: Export | list[Export], labels: list[Checked], superseded: int = 0, **settings: Any
) -> Situation:
    """`superseded`: so many labels, the first ones, no longer count."""
    given = exports if isinstance(exports, list) else [exports]
    stored = [Stored(one, 1, i >= superseded) for i, one in enumerate(labels)]
    return versions.settle(ledgers_of(*given), stored, versions.Settings(**settings))


def figures_of(situation: Situation) -> dict[str, dict[str, Any]]:
    return {one["annotator"]: one for one in report(situation, 0)["annotators"]}


def test_an_annotators_figures_by_hand() -> None:
    """Four pairs, a gold task and two repeats; 'a' is the better policy by the scores and writes
    the longer answers.
    """
    main = [
        {
            "prompt": f"p{n}",
            "answers": [Answer(f"long answer {n}", "a", 1.0), Answer(f"b {n}", "b", 0.0)],
            "order": (0, 1),
        }
        for n in range(4)
    ]
    gold = [{"prompt": "g", "answers": ["right", "wrong"], "role": "gold", "best": "right"}]
    again = [{**main[n], "role": "repeat", "repeats": n} for n in (0, 1)]
    export = export_of(main + gold + again)
    t = export.tasks
    ann = [
        label(t[0], "b 0", seconds=1.0),
        label(t[0], "long answer 0", seconds=4.0),
        label(t[1], "long answer 1", seconds=2.0),
        label(t[2], "b 2", seconds=0.01),
        label(t[3], Outcome.skip),
        label(t[4], "wrong"),
        label(t[5], "long answer 0"),
        label(t[6], Outcome.tie),
    ]
    bob = [
        label(t[0], "long answer 0", "bob"),
        label(t[1], "b 1", "bob"),
        label(t[2], "b 2", "bob"),
        label(t[4], "right", "bob"),
    ]
    found = figures_of(situation_of(export, ann + bob, superseded=1))
    one, two = found["ann"], found["bob"]
    assert (one["labels"], one["superseded"], two["labels"], two["superseded"]) == (7, 1, 4, 0)
    sides = {"left": 0, "right": 0}
    for task, text in (
        (t[0], "long answer 0"),
        (t[1], "long answer 1"),
        (t[2], "b 2"),
        (t[4], "wrong"),
        (t[5], "long answer 0"),
    ):
        sides["left" if task.shown[0] == text else "right"] += 1
    assert one["verdicts"] == {**sides, "tie": 1, "skip": 1, "cancelled": 0, "ranked": 0}
    assert (one["left"]["n"], one["left"]["share"]) == (5, sides["left"] / 5)
    assert one["seconds"] == {"known": 3, "median": 2.0, "total": pytest.approx(6.01)}
    assert (one["gold"]["n"], one["gold"]["share"]) == (1, 0.0)
    assert two["gold"]["share"] == 1.0
    assert (one["itself"]["n"], one["itself"]["share"]) == (2, 0.5), (
        "the same on the first, a tie on the second"
    )
    assert two["itself"] == {"n": 0, "share": None, "low": None, "high": None}
    assert (one["others"]["n"], one["others"]["share"]) == (3, pytest.approx(2 / 3))
    assert (one["longer"]["n"], one["longer"]["share"], one["longer"]["model"]) == (
        3,
        pytest.approx(2 / 3),
        1.0,
    )
    assert one["longer"]["verdicts"] == 0.5, (
        "of the two pairs that are not split, the longer answer won one"
    )
    assert (one["model"]["n"], one["model"]["share"]) == (3, pytest.approx(2 / 3))
    assert one["fast"] == {"n": 3, "share": pytest.approx(1 / 3)}, (
        "16 characters can't be read in a hundredth of a second"
    )
    assert one["gold"]["low"] < 1e-9
    assert 0.79 < one["gold"]["high"] < 0.80  # Wilson's upper bound of 0 of 1


def crowd(count: int = 60, seed: int = 0) -> tuple[Export, list[Checked]]:
    """Two careful annotators, one who clicks left within a tenth of a second."""
    rng = random.Random(seed)
    questions: list[dict[str, Any]] = [
        {"prompt": f"p{n}", "answers": [f"good answer {n}", f"bad answer {n}"]}
        for n in range(count)
    ]
    questions += [
        {"prompt": f"g{n}", "answers": ["good", "bad"], "role": "gold", "best": "good"}
        for n in range(20)
    ]
    export = export_of(questions)
    labels = []
    for task in export.tasks:
        good = next(answer.text for answer in task.answers if answer.text.startswith("good"))
        bad = next(answer.text for answer in task.answers if answer.text.startswith("bad"))
        labels += [
            label(task, good if rng.random() < 0.9 else bad, who, seconds=5.0)
            for who in ("ann", "bob")
        ]
        labels.append(label(task, task.shown[0], "lefty", seconds=0.1))
    return export, labels


@pytest.mark.parametrize("method", [LabelAggregate.majority, LabelAggregate.bradley_terry])
def test_who_does_not_look_is_suspected(method: LabelAggregate) -> None:
    export, labels = crowd()
    situation = situation_of(export, labels, aggregate=method)
    found = figures_of(situation)
    if method is LabelAggregate.bradley_terry:
        assert situation.aggregated.figures["first_side"]["lefty"] > 0.8
        assert found["lefty"]["reliability"] < 0.4
    assert [found["ann"]["suspicions"], found["bob"]["suspicions"]] == [[], []]
    said = "; ".join(found["lefty"]["suspicions"])
    assert "faster than" in said
    assert "prefers the left side (100% left" in said
    assert "gold accuracy" in said
    assert found["lefty"]["cohen"] + 0.1 < found["ann"]["cohen"]


def test_labels_of_those_who_fail_gold_do_not_count() -> None:
    export, labels = crowd(30)
    everybody, strict = (
        situation_of(export, labels),
        situation_of(export, labels, min_gold_accuracy=0.7),
    )
    assert strict.without == {"lefty"}
    assert {result.labels for result in everybody.aggregated.results} == {3}
    assert {result.labels for result in strict.aggregated.results} == {2}
    found = figures_of(strict)
    assert [found[name]["counts"] for name in ("ann", "bob", "lefty")] == [True, True, False]
    assert found["lefty"]["labels"] == 50, "they stay in the report"
    assert "(doesn't count)" in annotator_rows([found["lefty"]])[0]["annotator"]
    whole = report(strict, 0)["agreement"]
    assert (whole["annotators"], report(everybody, 0)["agreement"]["annotators"]) == (2, 3)
    none = situation_of(
        export, [one for one in labels if one.annotator == "lefty"], min_gold_accuracy=0.7
    )
    assert report(none, 0)["pairs"]["judged"] == 0, "nobody is left, and that is no error"


def test_what_became_of_the_pairs() -> None:
    export = pairs(6)
    t = export.tasks
    labels = [
        label(t[0], "good answer 0"),
        label(t[1], "good answer 1"),
        label(t[1], "bad 1", "bob"),
        label(t[2], Outcome.tie),
        label(t[3], Outcome.skip),
    ]
    assert report(situation_of(export, labels), 0)["pairs"] == {
        "judged": 3,
        "used": 1,
        "few_labels": 0,
        "split": 1,
        "unsure": 0,
        "tie": 1,
        "empty": 0,
        "episode": 0,
        "disputed": 1,
        "unjudged": 3,
    }
    assert report(situation_of(export, []), 0)["pairs"]["unjudged"] == 6


def test_the_review_queue_goes_out_again_once() -> None:
    export = pairs(4)
    t = export.tasks
    labels = [label(t[0], "good answer 0", who) for who in ("ann", "bob")]
    labels += [label(t[1], "good answer 1"), label(t[1], "bad 1", "bob", comment="hm")]
    labels += [label(t[2], "good answer 2", who) for who in ("ann", "bob")] + [
        label(t[2], "bad 2", "cy")
    ]
    labels += [label(t[3], "good answer 3")]
    rows = review_rows(situation_of(export, labels))
    assert [task_of(row) for row in rows] == [t[1], t[2]]
    assert rows[0]["why"][0].startswith("split: 1 ")
    assert rows[1]["why"][0].startswith("annotators differ: ")
    assert [(said["annotator"], said["comment"]) for said in rows[0]["labels"]] == [
        ("ann", ""),
        ("bob", "hm"),
    ]
    assert json.loads(json.dumps(rows)) == rows
    unsure = review_rows(situation_of(export, labels, min_confidence=0.7))
    assert [row["why"][0].split(":")[0] for row in unsure] == ["split", "confidence 0.667"]
    assert [row["id"] for row in review_rows(situation_of(export, labels, min_labels=3))] == [
        t[2].id
    ], "the others still wait for labels"

    again = export_of(
        [{"prompt": task.prompt, "answers": task.answers} for task in (t[1], t[2])],
        created="2026-03-01T00:00:00+00:00",
        seed=5,
    )
    second = [label(again.tasks[0], "bad 1", "dan"), label(again.tasks[1], "good answer 2", "dan")]
    both = situation_of([export, again], labels + second)
    assert review_rows(both) == [], "two to one and three to one, asked twice: the results stand"
    assert {both.fates[v.pair.id] for v in both.aggregated.results} == {Fate.used}
    open_again = review_rows(
        situation_of(
            [export, again], [*labels, *second, label(again.tasks[0], "good answer 1", "eve")]
        )
    )
    assert [row["id"] for row in open_again] == [again.tasks[0].id], "still split"
    assert len(open_again[0]["labels"]) == 4, "what both exports' annotators said"


def test_rankings_are_disputed_over_the_best() -> None:
    export = export_of(
        [{"prompt": f"p{n}", "answers": list("abc")} for n in range(2)], kind=LabelKind.ranking
    )

    def ranked(number: int, order: str, who: str) -> Checked:
        place = {answer.text: i for i, answer in enumerate(export.tasks[number].answers)}
        task = export.tasks[number]
        return Checked(
            export.id, task.id, who, Outcome.ranked, ranking=tuple((place[text],) for text in order)
        )

    labels = (
        [ranked(0, "abc", w) for w in ("ann", "bob")]
        + [ranked(0, "acb", "cy")]
        + [ranked(1, "abc", w) for w in ("ann", "bob")]
        + [ranked(1, "bac", "cy")]
    )
    rows = review_rows(situation_of(export, labels))
    assert [(row["id"], row["why"]) for row in rows] == [
        (export.tasks[1].id, ["annotators differ on the best one"])
    ]


def test_ab_labels_come_in_the_order_of_the_imports() -> None:
    export = pairs(3, details={"ab": {"policies": ["b", "a"]}})
    t = export.tasks
    stored = [
        Stored(label(t[0], "good answer 0", time="2026-01-05"), 1, True),
        Stored(label(t[1], Outcome.tie, time="2026-01-04"), 1, True),
        Stored(label(t[2], "good answer 2", time="2026-01-01"), 2, True),
        Stored(label(t[2], "bad 2", "bob", time="2026-01-01"), 2, False),
        Stored(label(t[2], Outcome.skip, "cy"), 2, True),
    ]
    situation = versions.settle(ledgers_of(export), stored, versions.Settings())
    assert policies(export) == ("b", "a")
    assert [winner for _, winner in judged(situation, export)] == [None, "a", "a"]
    for wrong in (["a", "c"], ["a"], []):
        with pytest.raises(UserError, match="A/B test"):
            policies(dataclasses.replace(export, details={"ab": {"policies": wrong}}))


def test_a_version_is_made_when_something_changed(tmp_path: Path) -> None:
    export = pairs(40, instructions="Read *both*.\n<script>x</script>")
    place = on_disk(export, tmp_path / "exports" / export.id)
    labels = [label(task, f"good answer {n}", "a|b\n<img>") for n, task in enumerate(export.tasks)]
    settings = versions.Settings(strength=Strength.soft_label, eval_fraction=0.3)

    def made(count: int) -> versions.Version:
        situation = situation_of(export, labels[:count], strength=Strength.soft_label)
        return versions.write(
            tmp_path,
            "x-labels",
            situation,
            settings,
            {**report(situation, 0), "ab": []},
            {export.id: place},
        )

    first, second = made(20), made(40)
    assert (first.number, second.number, versions.numbers(tmp_path)) == (1, 2, [1, 2])
    assert (tmp_path / "latest").resolve() == second.folder.resolve()
    assert not (tmp_path / "latest").readlink().is_absolute()

    def prompts(version: versions.Version, name: str) -> set[str]:
        return {
            json.loads(line)["prompt"]
            for line in version.file(f"{name}.jsonl").read_text().splitlines()
        }

    for side in ("train", "eval"):
        assert prompts(first, side) < prompts(second, side), (
            "no prompt changes sides as labels come in"
        )
    assert len(prompts(second, "train")) + len(prompts(second, "eval")) == 40
    assert second.card["files"]["train.jsonl"]["rows"] == len(prompts(second, "train"))
    assert second.card["previous_version"] == 1
    text = markdown(second.card)
    assert "a\\|b \\<img\\>" in text, "a name can't break the table"
    assert "    <script>x</script>" in text, "instructions are quoted as code"
    newest = versions.newest(tmp_path)
    assert newest is not None
    assert newest.card == second.card


def test_a_version_depends_on_labels_exports_and_settings() -> None:
    export, other = pairs(3), pairs(2, prompt="q")
    stored = [Stored(label(task, Outcome.tie), 1, True) for task in export.tasks]
    same = versions.identity(ledgers_of(export), stored, versions.Settings())
    assert same == versions.identity(ledgers_of(export), stored[::-1], versions.Settings())
    assert same == versions.identity(
        ledgers_of(export),
        [dataclasses.replace(one, number=7) for one in stored],
        versions.Settings(),
    )
    assert same != versions.identity(ledgers_of(export), stored[:2], versions.Settings())
    assert same != versions.identity(ledgers_of(export, other), stored, versions.Settings())
    assert same != versions.identity(ledgers_of(export), stored, versions.Settings(min_labels=2))


def test_what_a_kill_left_is_no_version(tmp_path: Path) -> None:
    export = pairs(3)
    place = on_disk(export, tmp_path / "exports" / export.id)
    situation = situation_of(export, [label(export.tasks[0], "good answer 0")])
    for leftover in (".1.tmp", "1"):
        (tmp_path / "versions" / leftover).mkdir(parents=True)
        (tmp_path / "versions" / leftover / "train.jsonl").write_text("torn")
    assert versions.newest(tmp_path) is None
    made = versions.write(
        tmp_path,
        "x",
        situation,
        versions.Settings(eval_fraction=0),
        {**report(situation, 0), "ab": []},
        {export.id: place},
    )
    assert made.number == 1
    assert len(made.file("train.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["1"]
