"""The steps aggregate and review: rows of several annotators, their figures, the queue file and
back.
"""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.preparation.annotation import Aggregate, Method, Repeats, Review, Scale
from rlhf.data.formats import Use
from rlhf.data.prepare.aggregate import aggregate
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.review import review
from rlhf.types import UserError
from tests import steps

Row = dict[str, Any]


def judged(marks: str, **annotators: str) -> list[Row]:
    """Rows of judged answers: an item a character of `marks`, g good and b bad; a dot is
    missing.
    """
    return [
        {"prompt": f"p{i}", "completion": f"c{i}", "label": mark == "g", "annotator": name}
        for i in range(len(marks))
        for name, given_marks in {"first": marks, **annotators}.items()
        if (mark := given_marks[i]) != "."
    ]


def pair(prompt: str, chosen: str, rejected: str, annotator: str, **more: Any) -> Row:
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "annotator": annotator,
        **more,
    }


PAIRS = [
    pair("p", "good", "bad", "ann", margin=2.0, source="x"),
    pair("p", "bad", "good", "bob", margin=1.0),
    pair("p", "good", "bad", "cid", margin=1.0),
    pair("q", "one", "two", "ann"),
    pair("q", "two", "one", "bob"),
]


# ---- aggregate ----


def test_pairs_with_exchanged_sides_are_one_item(tmp_path: Path) -> None:
    ran = steps.run(aggregate, Aggregate(), PAIRS, tmp_path)
    assert ran.rows == [
        {
            "prompt": "p",
            "chosen": "good",
            "rejected": "bad",
            "source": "x",
            "margin": 1.5,
            "confidence": pytest.approx(2 / 3),
            "annotators": 3,
        }
    ]
    assert "tie between 'a', 'b'" in ran.left_out[4] and ran.left_out[4] == ran.left_out[5]
    assert (
        set(ran.left_out) == {2, 3, 4, 5}
        and "merged" in ran.left_out[2]
        and "'rows.jsonl, row 1'" in ran.left_out[3]
    )
    assert ran.figures["counts"] == {
        "rows": 5,
        "items": 2,
        "reviewed": 0,
        "kept": 1,
        "ties": 1,
        "few_labels": 0,
        "unsure": 0,
    }


def test_the_majority_can_turn_the_first_row_around(tmp_path: Path) -> None:
    rows = [
        pair("p", "bad", "good", "ann"),
        pair("p", "good", "bad", "bob"),
        pair("p", "good", "bad", "cid"),
    ]
    row = steps.run(aggregate, Aggregate(), rows, tmp_path).rows[0]
    assert (row["chosen"], row["rejected"]) == ("good", "bad") and "margin" not in row


def test_judged_answers_and_their_figures(tmp_path: Path) -> None:
    rows = judged("ggbb", second="ggbg", third="gbb.")
    ran = steps.run(aggregate, Aggregate(min_labels=3), rows, tmp_path, Use.unpaired)
    assert [row["label"] for row in ran.rows] == [True, True, False]
    assert [row["confidence"] for row in ran.rows] == [1.0, pytest.approx(2 / 3), 1.0]
    assert all("annotator" not in row for row in ran.rows)
    assert "min_labels=3" in ran.left_out[10]
    figures = json.loads(json.dumps(ran.figures))
    assert figures["agreement"]["items"] == 4 and figures["agreement"]["annotators"] == 3
    # items 1 and 3 agree wholly, item 2 in one pair of three, item 4 in none
    assert figures["agreement"]["observed"]["value"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert [a["annotator"] for a in figures["annotators"]] == ["first", "second", "third"]


def test_options_settle_ties_and_doubt(tmp_path: Path) -> None:
    rows = judged("gb", second="bb")
    assert len(steps.run(aggregate, Aggregate(), rows, tmp_path, Use.unpaired).rows) == 1
    tied = steps.run(aggregate, Aggregate(tie_label="false"), rows, tmp_path, Use.unpaired)
    assert [row["label"] for row in tied.rows] == [False, False], "the data's own false, not a text"
    sure = steps.run(
        aggregate, Aggregate(min_confidence=0.7, tie_label="false"), rows, tmp_path, Use.unpaired
    )
    assert [row["prompt"] for row in sure.rows] == ["p1"] and sure.figures["counts"]["unsure"] == 1
    with pytest.raises(UserError, match="a pair is chosen and rejected"):
        steps.run(aggregate, Aggregate(tie_label="tie"), PAIRS, tmp_path)


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = [
        {"text": t, "who": w, "topic": topic, "key": k}
        for t, w, topic, k in [("a", 1, "x", "k"), ("a", 2, "y", "k"), ("a", 3, "y", "k")]
    ]
    options = Aggregate(item="key", annotator="who", label="topic", confidence="sure")
    ran = steps.run(aggregate, options, rows, tmp_path, Use.sft)
    assert ran.rows == [
        {"text": "a", "topic": "y", "key": "k", "sure": pytest.approx(2 / 3), "annotators": 3}
    ]
    with pytest.raises(UserError, match=r"step aggregate: label .*kind sft"):
        steps.run(aggregate, Aggregate(), rows, tmp_path, Use.sft)
    with pytest.raises(
        UserError,
        match=r"step review: .*rows.jsonl, row 1: column 'annotator'",
    ):
        steps.run(review, Review(label="topic"), rows, tmp_path, Use.sft)


def test_ratings_have_an_ordinal_alpha(tmp_path: Path) -> None:
    rows = [
        {"text": str(i), "annotator": name, "label": marks[i]}
        for name, marks in {"a": ["bad", "ok", "good"], "b": ["ok", "ok", "good"]}.items()
        for i in range(3)
    ]
    options = Aggregate(label="label", level=Scale.ordinal, order=["bad", "ok", "good"])
    ordinal = steps.run(aggregate, options, rows, tmp_path, Use.sft).figures["agreement"][
        "krippendorff_alpha"
    ]["value"]
    nominal = steps.run(aggregate, Aggregate(label="label"), rows, tmp_path, Use.sft).figures[
        "agreement"
    ]["krippendorff_alpha"]["value"]
    assert ordinal > nominal
    with pytest.raises(
        UserError, match=r"step aggregate: level=interval: interval labels: expected numbers"
    ):
        steps.run(
            aggregate, Aggregate(label="label", level=Scale.interval), rows, tmp_path, Use.sft
        )


def test_dawid_skene_outvotes_a_majority_of_guessers(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    truth = [rng.random() < 0.5 for _ in range(200)]
    marks = {f"good{j}": "".join("g" if t else "b" for t in truth) for j in range(2)}
    marks |= {f"guess{j}": "".join(rng.choice("gb") for _ in truth) for j in range(3)}
    first = marks.pop("good0")
    rows = [
        row | {"annotator": {"first": "good0"}.get(row["annotator"], row["annotator"])}
        for row in judged(first, **marks)
    ]
    found = {}
    for method in Method:
        ran = steps.run(
            aggregate, Aggregate(method=method, tie_label="true"), rows, tmp_path, Use.unpaired
        )
        found[method] = sum(
            row["label"] is t for row, t in zip(ran.rows, truth, strict=True)
        ) / len(truth)
    assert found[Method.dawid_skene] > 0.97 > found[Method.majority]
    assert ran.figures["converged"] is True


def test_rows_without_a_judgement_are_rejected(tmp_path: Path) -> None:
    rows = [
        *judged("g", second="g"),
        {"prompt": "p9", "completion": "c9", "label": True},
        {"prompt": "p8", "completion": "c", "annotator": "x"},
    ]
    ran = steps.run(aggregate, Aggregate(), rows, tmp_path, Use.unpaired)
    assert len(ran.rows) == 1 and set(ran.left_out) == {2, 3, 4}
    assert (
        "expected who judged, found no column" in ran.left_out[3]
        and "expected a label, found no column" in ran.left_out[4]
    )
    with pytest.raises(UserError, match="and other texts"):
        steps.run(
            aggregate,
            Aggregate(item="key"),
            [row | {"key": "k"} for row in judged("gg")],
            tmp_path,
            Use.unpaired,
        )


def test_repeated_judgements(tmp_path: Path) -> None:
    rows = [*judged("g", second="b"), *judged("b")]
    with pytest.raises(
        UserError,
        match=r"'first'.* True in rows.jsonl, row 1 .* False in rows.jsonl, row 3",
    ):
        steps.run(aggregate, Aggregate(), rows, tmp_path, Use.unpaired)
    assert (
        steps.run(aggregate, Aggregate(repeats=Repeats.last), rows, tmp_path, Use.unpaired).rows[0][
            "label"
        ]
        is False
    )
    same = [*judged("g"), *judged("g")]
    assert (
        steps.run(aggregate, Aggregate(), same, tmp_path, Use.unpaired).rows[0]["annotators"] == 1
    )


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from("xyz"), st.booleans()), min_size=1, max_size=20
    )
)
def test_every_row_is_kept_merged_or_rejected(
    tmp_path: Path, rows: list[tuple[int, str, bool]]
) -> None:
    data = [
        {"prompt": f"p{i} ñ中", "completion": "c", "label": good, "annotator": name}
        for i, name, good in rows
    ]
    ran = steps.run(
        aggregate, Aggregate(repeats=Repeats.last, resamples=5), data, tmp_path, Use.unpaired
    )
    assert len(ran.rows) + len(ran.rejected) == len(rows), "every row has a reason"
    gone = {item.columns["prompt"] for item, reason in ran.rejected if "merged" not in reason}
    kept = {row["prompt"] for row in ran.rows}
    assert (
        not gone & kept
        and gone | kept == {row["prompt"] for row in data}
        and len(ran.rows) == len(kept)
    )
    for row in ran.rows:
        last = {name: good for i, name, good in rows if f"p{i} ñ中" == row["prompt"]}
        votes = list(last.values())
        assert votes.count(row["label"]) * 2 > len(votes) and row["confidence"] == votes.count(
            row["label"]
        ) / len(votes)


# ---- review ----


def queue(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def decide(
    source: Path, target: Path, decisions: dict[str, str], *, edit: dict[str, str] | None = None
) -> Path:
    """A queue file filled in as a spreadsheet would: by prompt; `edit` changes cells of every row.
    CSV with Windows line ends.
    """
    with source.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys())
        writer.writeheader()
        for row in rows:
            changed = row | {"decision": decisions.get(row["prompt"], "")} | (edit or {})
            writer.writerow({key: value.replace("\n", "\r\n") for key, value in changed.items()})
    return target


def test_the_queue_holds_disagreements_and_nothing_else_changes(tmp_path: Path) -> None:
    rows = judged("ggb", second="gbb")
    ran = steps.run(review, Review(), rows, tmp_path, Use.unpaired)
    assert ran.rows == rows and not ran.rejected
    assert ran.figures == {
        "items": 3,
        "queued": 1,
        "decided": 0,
        "dropped": 0,
        "queue": "review.csv",
    }
    (waiting,) = queue(tmp_path / "review.jsonl")
    assert {k: waiting[k] for k in ("prompt", "completion", "labels", "decision")} == {
        "prompt": "p1",
        "completion": "c1",
        "labels": "first: True; second: False",
        "decision": "",
    }
    with (tmp_path / "review.csv").open(encoding="utf-8-sig", newline="") as lines:
        assert list(csv.DictReader(lines)) == [waiting]


def test_decisions_come_back(tmp_path: Path) -> None:
    """Written, filled in, read: decided items are one row, dropped ones rejected, others as they
    were; aggregate takes the decision.
    """
    rows = judged("ggb", second="bbb", third="ggg")
    steps.run(review, Review(), rows, tmp_path, Use.unpaired)
    filled = decide(tmp_path / "review.csv", tmp_path / "filled.csv", {"p0": "FALSE", "p1": "drop"})
    options = Review(decisions=str(filled))
    ran = steps.run(review, options, rows, tmp_path / "second", Use.unpaired)
    assert ran.rows[0] == {
        "prompt": "p0",
        "completion": "c0",
        "label": False,
        "annotator": "review",
        "reviewed": True,
    }
    assert ran.rows[1:] == rows[6:] and set(ran.left_out) == {2, 3, 4, 5, 6}
    assert "decided in review" in ran.left_out[2] and ran.left_out[4] == "dropped in review"
    assert (
        ran.figures["decided"] == 1 and ran.figures["dropped"] == 1 and ran.figures["queued"] == 3
    )
    again = steps.run(review, options, [*ran.rows, *rows[3:6]], tmp_path / "third", Use.unpaired)
    assert again.rows == ran.rows, "reading decisions twice gives the same rows"
    both = steps.run(aggregate, Aggregate(min_labels=2), ran.rows, tmp_path, Use.unpaired)
    assert [(row["prompt"], row["label"], row["confidence"]) for row in both.rows] == [
        ("p0", False, 1.0),
        ("p2", False, pytest.approx(2 / 3)),
    ]
    assert both.figures["agreement"]["items"] == 1 and both.figures["counts"]["reviewed"] == 1, (
        "a decision is no agreement"
    )


def test_pairs_are_decided_by_side(tmp_path: Path) -> None:
    steps.run(review, Review(), PAIRS, tmp_path)
    waiting = {row["prompt"]: row for row in queue(tmp_path / "review.jsonl")}
    assert {waiting["q"]["a"], waiting["q"]["b"]} == {"one", "two"}
    side = "a" if waiting["q"]["a"] == "two" else "b"
    filled = decide(tmp_path / "review.csv", tmp_path / "filled.csv", {"q": side})
    ran = steps.run(review, Review(decisions=str(filled)), PAIRS, tmp_path / "second")
    assert ran.rows[-1] == {
        "prompt": "q",
        "chosen": "two",
        "rejected": "one",
        "annotator": "review",
        "reviewed": True,
    }
    assert ran.rows[:3] == PAIRS[:3]


def test_conversations_and_line_ends_survive_a_spreadsheet(tmp_path: Path) -> None:
    prompt = [
        {"role": "user", "content": 'Hi,\n"you" = 1; ñ 中文'},
        {"role": "assistant", "content": "=1+1"},
        {"role": "user", "content": "Go\n"},
    ]
    sides = [[{"role": "assistant", "content": text}] for text in ("yes\nno", "no, yes")]
    rows = [
        {"prompt": prompt, "chosen": sides[0], "rejected": sides[1], "annotator": "x"},
        {"prompt": prompt, "chosen": sides[1], "rejected": sides[0], "annotator": "y"},
    ]
    steps.run(review, Review(), rows, tmp_path)
    (waiting,) = queue(tmp_path / "review.jsonl")
    assert waiting["prompt"].startswith("user: Hi,") and "assistant: =1+1" in waiting["prompt"]
    filled = decide(tmp_path / "review.csv", tmp_path / "filled.csv", {waiting["prompt"]: "a"})
    (row,) = steps.run(review, Review(decisions=str(filled)), rows, tmp_path / "second").rows
    assert row["prompt"] == prompt and {str(row["chosen"]), str(row["rejected"])} == {
        str(side) for side in sides
    }


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"id": "0123456789abcdef"}, r"filled.csv, row 1: the data has no item '0123456789abcdef'"),
        (
            {"completion": "c0 better"},
            r"row 1: item '.*' was judged with another text in 'completion'",
        ),
        ({"decision": "maybe"}, r"row 1: decision 'maybe': expected one of False, True, or drop"),
    ],
)
def test_unknown_and_edited_rows_are_refused(
    tmp_path: Path, edit: dict[str, str], message: str
) -> None:
    rows = judged("g", second="b")
    steps.run(review, Review(), rows, tmp_path, Use.unpaired)
    filled = decide(tmp_path / "review.csv", tmp_path / "filled.csv", {"p0": "true"}, edit=edit)
    with pytest.raises(UserError, match=message):
        steps.run(review, Review(decisions=str(filled)), rows, tmp_path / "second", Use.unpaired)


def test_a_file_that_is_no_queue_is_refused(tmp_path: Path) -> None:
    rows = judged("g", second="b")
    (tmp_path / "other.csv").write_text("id,verdict\nx,y\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"found none called 'decision'"):
        steps.run(
            review, Review(decisions=str(tmp_path / "other.csv")), rows, tmp_path, Use.unpaired
        )
    steps.run(review, Review(), rows, tmp_path, Use.unpaired)
    filled = decide(tmp_path / "review.csv", tmp_path / "filled.csv", {"p0": "true"})
    text = filled.read_text(encoding="utf-8")
    filled.write_text(
        text + text.splitlines(keepends=True)[1].replace("true", "false"), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"twice.*True.*False"):
        steps.run(review, Review(decisions=str(filled)), rows, tmp_path / "second", Use.unpaired)


def test_decisions_are_never_written_over(tmp_path: Path) -> None:
    rows = judged("g", second="b")
    steps.run(review, Review(), rows, tmp_path, Use.unpaired)
    steps.run(review, Review(), rows, tmp_path, Use.unpaired)  # an empty queue may be replaced
    place = tmp_path / "review.csv"
    decide(place, place, {"p0": "true"})
    with pytest.raises(UserError, match="holds decisions that would be lost"):
        steps.run(review, Review(), rows, tmp_path, Use.unpaired)
    steps.run(review, Review(decisions=str(place)), rows, tmp_path, Use.unpaired)
    assert queue(tmp_path / "review.jsonl")[0]["decision"] is True, (
        "they are kept in the queue that is written anew"
    )


def test_the_queue_holds_no_formula_and_comes_back(tmp_path: Path) -> None:
    """Texts, ids, labels, comments and earlier decisions that a spreadsheet would calculate; as
    often as they are written and read.
    """
    rows = [
        {
            "prompt": text,
            "completion": "@c",
            "topic": label,
            "annotator": f"={label}",
            "key": f"=id{i}",
        }
        for i, text in enumerate(("=1+1", "-- no", "'quoted", "\tx"))
        for label in ("=good", "bad")
    ]
    options = Review(label="topic", item="key")
    steps.run(review, options, rows, tmp_path, Use.sft)
    place = tmp_path / "review.csv"
    for number in range(3):
        with place.open(encoding="utf-8-sig", newline="") as lines:
            found = list(csv.DictReader(lines))
        assert len(found) == 4 and not [
            cell for row in found for cell in row.values() if cell.startswith(("=", "-", "@", "\t"))
        ]
        if number == 0:
            found = [row | {"decision": "=good", "comment": "-- so"} for row in found]
        with (filled := tmp_path / f"filled{number}.csv").open(
            "w", encoding="utf-8", newline=""
        ) as out:
            writer = csv.DictWriter(out, found[0].keys())
            writer.writeheader()
            writer.writerows(found)
        ran = steps.run(
            review, replace(options, decisions=str(filled)), rows, tmp_path / str(number), Use.sft
        )
        assert [(row["prompt"], row["topic"]) for row in ran.rows] == [
            (text, "=good") for text in ("=1+1", "-- no", "'quoted", "\tx")
        ]
        place = tmp_path / str(number) / "review.csv"


def test_agreed_sets_the_share(tmp_path: Path) -> None:
    rows = judged("gg", second="gb", third="gg", fourth="gg")
    assert (
        steps.run(review, Review(agreed=0.75), rows, tmp_path, Use.unpaired).figures["queued"] == 0
    )
    assert (
        steps.run(review, Review(agreed=0.76), rows, tmp_path, Use.unpaired).figures["queued"] == 1
    )


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    st.data(),
)
def test_any_text_comes_back(tmp_path: Path, texts: list[str], data: st.DataObject) -> None:
    folder = tmp_path / str(abs(hash(tuple(texts))))
    texts = list({text.replace("\r\n", "\n").replace("\r", "\n"): None for text in texts})
    rows = [
        {"prompt": text, "completion": "c", "label": good, "annotator": str(good)}
        for text in texts
        for good in (True, False)
    ]
    steps.run(review, Review(queue="any"), rows, folder, Use.unpaired)
    waiting = queue(folder / "any.jsonl")
    assert [row["prompt"] for row in waiting] == texts
    chosen = {
        row["id"]: data.draw(st.sampled_from(["", "true", "false", "drop"])) for row in waiting
    }
    lines = [json.dumps(row | {"decision": chosen[row["id"]]}) for row in waiting]
    (folder / "filled.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ran = steps.run(
        review,
        Review(queue="more", decisions=str(folder / "filled.jsonl")),
        rows,
        folder,
        Use.unpaired,
    )
    by_text = {row["prompt"]: chosen[row["id"]] for row in waiting}
    expected: list[Any] = []
    for text in texts:
        expected += {"": [True, False], "true": [True], "false": [False], "drop": []}[by_text[text]]
    assert [row["label"] for row in ran.rows] == expected


def test_items_keep_their_place(tmp_path: Path) -> None:
    rows = judged("g", second="b")
    kept = steps.run(
        aggregate,
        Aggregate(tie_label="true"),
        steps.items(rows, "data/a.csv"),
        tmp_path,
        Use.unpaired,
    ).kept
    assert kept == [Item(kept[0].columns, "data/a.csv", 1)]
