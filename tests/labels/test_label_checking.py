"""Judgements against the ledger: what was said comes back in places that do not depend on the
sides; anything else is refused by name.
"""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import LabelKind
from rlhf.labels.checking import Checked, Outcome, Refused, check, check_one
from rlhf.labels.records import Export, Judgement, Unreadable, Verdict, as_text
from rlhf.process.files import digest
from tests.labels.labels import CREATED, all_checked, export_of, ledgers_of, pairs, say, shown_back

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
PROMPT = st.one_of(
    TEXT,
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT}),
        min_size=1,
        max_size=3,
    ),
)
NAMES = TEXT.map(str.strip).filter(bool)


@st.composite
def exports(draw: st.DrawFn) -> Export:
    """Any texts, any sides, pairs or rankings."""
    kind = draw(st.sampled_from(LabelKind))
    size = 2 if kind is LabelKind.pair else draw(st.integers(2, 4))
    answers = st.lists(TEXT, min_size=size, max_size=size, unique_by=digest)
    questions = draw(
        st.lists(
            st.fixed_dictionaries({"prompt": PROMPT, "answers": answers}), min_size=1, max_size=5
        )
    )
    return export_of(questions, kind=kind, ratings=True, seed=draw(st.integers(0, 99)))


def ranking(draw: st.DrawFn, size: int) -> tuple[tuple[int, ...], ...]:
    """Some of the places, in any order, some of them together."""
    places = draw(st.permutations(range(size)))[: draw(st.integers(1, size))]
    groups: list[list[int]] = [[places[0]]]
    for place in places[1:]:
        if draw(st.booleans()):
            groups.append([place])
        else:
            groups[-1].append(place)
    return tuple(tuple(sorted(group)) for group in groups)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Export, list[Checked]]:
    """An export and any number of annotators' labels of its tasks."""
    export = draw(exports())
    out = []
    for annotator in draw(st.lists(NAMES, max_size=4, unique=True)):
        for task in export.tasks:
            of_kind = (
                [Outcome.first, Outcome.second]
                if export.kind is LabelKind.pair
                else [Outcome.ranked]
            )
            outcome = draw(
                st.sampled_from([*of_kind, Outcome.tie, Outcome.skip, Outcome.cancelled])
            )
            size = len(task.answers)
            stars = st.one_of(st.none(), st.integers(1, 5))
            out.append(
                Checked(
                    export=export.id,
                    task=task.id,
                    annotator=annotator,
                    outcome=outcome,
                    ranking=ranking(draw, size) if outcome is Outcome.ranked else (),
                    ratings=tuple(
                        draw(st.one_of(st.just([]), st.lists(stars, min_size=size, max_size=size)))
                    ),
                    comment=draw(TEXT),
                    seconds=draw(st.one_of(st.none(), st.floats(0, 1e6))),
                    time=draw(st.sampled_from([None, CREATED, "2026-02-03T04:05:06Z"])),
                )
            )
    return export, out


@settings(deadline=None, max_examples=60)
@given(labelled())
def test_what_was_said_comes_back_whatever_the_sides(case: tuple[Export, list[Checked]]) -> None:
    export, labels = case
    ledgers = ledgers_of(export)
    rows = []
    for number, one in enumerate(labels):
        task = ledgers.tasks[one.task][1]
        prompt = (task.prompt, as_text(task.prompt), None)[number % 3]
        shown = (
            task.shown,
            None,
            tuple(
                text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")
                for text in task.shown
            ),
        )[number % 3]
        rows.append(dataclasses.replace(shown_back(one, task), prompt=prompt, shown=shown))
    assert all_checked(check(rows, ledgers)) == labels


def test_left_is_the_first_shown() -> None:
    export = export_of(
        [{"prompt": "p", "answers": ["x", "y"], "order": order} for order in ((0, 1), (1, 0))]
    )
    for task in export.tasks:
        for verdict, place in ((Verdict.left, 0), (Verdict.right, 1)):
            [found] = all_checked(
                check([Judgement(task.id, "ann", verdict, ratings=(5, None))], ledgers_of(export))
            )
            winner = task.answers[0 if found.outcome is Outcome.first else 1].text
            assert winner == task.shown[place]
            assert found.ratings[task.order[0]] == 5
            assert found.ratings[task.order[1]] is None


PAIR = pairs(2)
TASK = PAIR.tasks[0]
RANKING = export_of([{"prompt": "p", "answers": ["x", "y", "z"]}], kind=LabelKind.ranking)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"task": f"{PAIR.id}-77"},
            f"unknown task '{PAIR.id}-77': export {PAIR.id} has no such task",
        ),
        ({"task": "0123456789ab-0"}, "task '0123456789ab-0' is of another export"),
        ({"task": ""}, "unknown task ''"),
        ({"annotator": " "}, "no annotator"),
        ({"prompt": "prompt 0!"}, f"edited: the prompt of task {TASK.id}"),
        ({"shown": ("x", TASK.shown[1])}, f"edited: answer 1 of task {TASK.id}"),
        ({"shown": (TASK.shown[0], TASK.shown[1] + " ")}, f"edited: answer 2 of task {TASK.id}"),
        (
            {"shown": TASK.shown[::-1]},
            f"edited: the answers of task {TASK.id} came back in another order",
        ),
        ({"shown": (*TASK.shown, "z")}, f"edited: task {TASK.id} went out with 2 answers"),
        (
            {"verdict": Verdict.ranked, "ranking": ((0,), (1,))},
            "pair: expected left, right, tie, skip, cancelled",
        ),
        ({"ranking": ((0,), (1,))}, "with a ranking"),
        ({"ratings": (1, 6)}, r"ratings [1, 6]: expected 2 whole numbers from 1 to 5"),
        ({"ratings": (0, 1)}, "ratings [0, 1]"),
        ({"ratings": (True, 1)}, "ratings [True, 1]"),
        ({"ratings": (3,)}, "ratings [3]"),
        ({"seconds": -1.0}, "it took -1.0 seconds"),
        ({"seconds": float("nan")}, "it took nan seconds"),
        ({"time": "yesterday"}, "time 'yesterday': expected ISO 8601"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    good = say(TASK, "good answer 0", place="file.csv, row 3", prompt=TASK.prompt, shown=TASK.shown)
    assert isinstance(check_one(good, ledgers_of(PAIR)), Checked)
    found = check_one(dataclasses.replace(good, **changes), ledgers_of(PAIR))
    assert isinstance(found, Refused)
    assert reason in found.reason
    assert (found.place, found.task) == ("file.csv, row 3", changes.get("task", TASK.id))
    assert found.row is not None
    assert found.row["verdict"] in [verdict.value for verdict in Verdict]


@pytest.mark.parametrize("groups", [(), ((),), ((0,), (0,)), ((3,),), ((0, 1), ()), ((-1,),)])
def test_a_ranking_names_places_once(groups: tuple[tuple[int, ...], ...]) -> None:
    found = check_one(
        Judgement(RANKING.tasks[0].id, "ann", Verdict.ranked, ranking=groups), ledgers_of(RANKING)
    )
    assert isinstance(found, Refused)
    assert "expected places 0 to 2" in found.reason


def test_sides_are_no_ranking() -> None:
    found = check_one(Judgement(RANKING.tasks[0].id, "ann", Verdict.left), ledgers_of(RANKING))
    assert isinstance(found, Refused)
    assert "asks for a ranking" in found.reason


def test_who_judged_can_be_said_for_the_whole_file() -> None:
    row = say(TASK, Outcome.tie, annotator="")
    [found] = all_checked(check([row], ledgers_of(PAIR), annotator=" ann "))
    assert found.annotator == "ann"
    [named] = all_checked(
        check([dataclasses.replace(row, annotator="bob")], ledgers_of(PAIR), annotator="ann")
    )
    assert named.annotator == "bob"


def test_an_unreadable_row_stays_with_its_place() -> None:
    [found] = check([Unreadable("f.json, row 2", TASK.id, "no verdict")], ledgers_of(PAIR))
    assert found == Refused("f.json, row 2", TASK.id, "no verdict")
    moved = Refused("elsewhere", "t", "why", {"place": "elsewhere", "comment": "c"})
    assert (
        moved.id
        == Refused("here", "t", "why", {"place": "here", "comment": "c"}).id
        != Refused("here", "t", "why", {"comment": "d"}).id
    )
