"""Exports of any texts, and annotators who fill in the files that were written for their tool as
that tool would.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from conf.choices import LabelKind, LabelTarget
from rlhf.data.tables import excel_text
from rlhf.labels.records import Answer, Export, Judgement, Task, Verdict, as_text
from rlhf.process.files import digest

NASTY = (
    "",
    "'",
    "''tis",
    "=1+1",
    "+1",
    "-- a list\n- item",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "＝1",  # noqa: RUF001
    "a\r\nb\rc\n",
    "<script>alert(1)</script>&amp;<b>x</b>",
    "$answer1 ${prompt} $[0]",
    "_x000D_ _x005F_x0041_",
    "\x00\x01\x1b\x7f\x85",
    "\ufeffmark",
    "\ufffe\uffff",
    '"; quote, ""',
    " space ",
    "👩‍🔬 نص עברית",
    "\u2028\u2029",
    '{"pair_id": 1}',
)
TEXT = st.one_of(
    st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
)
NAME = st.one_of(
    st.sampled_from(["", "ann@example.com", "7", "Zoë"]),
    st.text("abc ßд1", min_size=1, max_size=6).map(str.strip),
)
CHAT = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}
    ),
    min_size=1,
    max_size=3,
)


def task(
    number: int,
    prompt: Any,
    texts: list[str],
    order: tuple[int, ...] | None = None,
    scores: list[float] | None = None,
) -> Task:
    """Answers put into the order of their ids, and shown in the order of `texts`, or shuffled by
    `order`.
    """
    answers = [
        Answer(text, policy="secret-policy", score=None if scores is None else scores[i])
        for i, text in enumerate(texts)
    ]
    by_id = sorted(answers, key=lambda answer: answer.id)
    shown = tuple(by_id.index(answer) for answer in answers)
    return Task(f"0123456789ab-{number}", prompt, tuple(by_id), shown if order is None else order)


def export(kind: LabelKind, tasks: list[Task], **fields: Any) -> Export:
    """An export of tasks; ratings and comments unless `fields` say otherwise."""
    given = {
        "title": "Which is better?",
        "instructions": "Read both.",
        "ratings": kind is LabelKind.pair,
        "comments": True,
    } | fields
    return Export(
        id="0123456789ab", kind=kind, created="2026-11-25T20:00:00Z", tasks=tuple(tasks), **given
    )


@st.composite
def exports(draw: st.DrawFn, kind: LabelKind, ratings: bool) -> Export:
    tasks = []
    for number in range(draw(st.integers(1, 3))):
        count = 2 if kind is LabelKind.pair else draw(st.integers(2, 4))
        texts = draw(st.lists(TEXT, min_size=count, max_size=count, unique_by=digest))
        tasks.append(
            task(
                number,
                draw(st.one_of(TEXT, CHAT)),
                texts,
                tuple(draw(st.permutations(range(count)))),
            )
        )
    return export(
        kind, tasks, ratings=ratings, title=draw(TEXT.filter(str.strip)), instructions=draw(TEXT)
    )


def _ranking(draw: st.DrawFn, count: int, tool: "Tool") -> tuple[tuple[int, ...], ...]:
    """Any order; with ties, and with some left out, where the tool can say so."""
    places = list(draw(st.permutations(range(count))))
    if tool.partial:
        places = places[: draw(st.integers(2, count))]
    groups: list[list[int]] = []
    for place in places:
        if groups and tool.equal and draw(st.booleans()):
            groups[-1].append(place)
        else:
            groups.append([place])
    return tuple(tuple(sorted(group)) for group in groups)


@st.composite
def judgements(draw: st.DrawFn, of: Export, tool: "Tool") -> list[Judgement]:
    """Any number of annotators of each task, in the order of the tasks, as the tool can say it."""
    out = []
    for one in of.tasks:
        for annotator in draw(st.lists(NAME, unique=True, max_size=3)):
            verdict = draw(st.sampled_from(tool.verdicts[of.kind]))
            stars = draw(
                st.lists(
                    st.one_of(st.none(), st.integers(1, 5)),
                    min_size=len(one.answers),
                    max_size=len(one.answers),
                )
            )
            out.append(
                Judgement(
                    task=one.id,
                    annotator=annotator,
                    verdict=verdict,
                    ranking=_ranking(draw, len(one.answers), tool)
                    if verdict is Verdict.ranked
                    else (),
                    ratings=tuple(stars) if of.ratings and any(stars) else (),
                    comment=draw(TEXT),
                    seconds=draw(st.one_of(st.none(), st.floats(0, 1e6))) if tool.clocked else None,
                    time=draw(st.sampled_from([None, "2026-11-25T20:01:02.5Z"]))
                    if tool.timed
                    else None,
                    annotation=str(len(out) + 1) if tool.numbered else "",
                    prompt=one.prompt if tool.chats else as_text(one.prompt),
                    shown=one.shown,
                )
            )
    return out


# ---- annotators ----


def _name(judgement: Judgement) -> Any:
    return (
        int(judgement.annotator)
        if judgement.annotator.isascii() and judgement.annotator.isdigit()
        else judgement.annotator or None
    )


def fill_label_studio(files: list[Path], said: list[Judgement]) -> Path:
    """Its JSON export: the tasks with ids, annotations, drafts and predictions."""
    rows = json.loads(files[0].read_text(encoding="utf-8"))
    for number, row in enumerate(rows, start=1):
        draft = {"id": 1, "result": [_result("pw", "pw", "pairwise", {"selected": "left"})]}
        mine = [judgement for judgement in said if judgement.task == row["data"]["pair_id"]]
        row |= {
            "id": number,
            "annotations": [_annotation(judgement) for judgement in mine],
            "drafts": [draft],
        }
    path = files[0].with_name("project-1-at-2026.json")
    path.write_text(json.dumps(rows), encoding="utf-8")  # Label Studio escapes what is not ASCII
    return path


def _result(name: str, to: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "from_name": name,
        "to_name": to,
        "type": kind,
        "value": value,
        "origin": "manual",
    }


def _annotation(said: Judgement) -> dict[str, Any]:
    """As the editor submits it."""
    results = []
    if said.verdict in (Verdict.left, Verdict.right):
        results.append(_result("pw", "pw", "pairwise", {"selected": said.verdict.value}))
    if said.verdict in (Verdict.tie, Verdict.skip):
        results.append(_result("verdict", "prompt", "choices", {"choices": [said.verdict.value]}))
    if said.verdict is Verdict.ranked:
        results.append(
            _result(
                "rank",
                "results",
                "ranker",
                {
                    "ranker": {
                        "rank": [f"answer{place + 1}" for group in said.ranking for place in group]
                    }
                },
            )
        )
    for place, stars in enumerate(said.ratings, start=1):
        if stars is not None:
            results.append(_result(f"rating{place}", f"answer{place}", "rating", {"rating": stars}))
    if said.comment:
        results.append(_result("comment", "prompt", "textarea", {"text": [said.comment]}))
    return {
        "id": int(said.annotation),
        "completed_by": _name(said),
        "result": results,
        "was_cancelled": said.verdict is Verdict.cancelled,
        "lead_time": said.seconds,
        "created_at": said.time,
    }


def _argilla_values(said: Judgement) -> dict[str, Any]:
    values: dict[str, Any] = {
        f"rating-{place}": stars for place, stars in enumerate(said.ratings) if stars is not None
    }
    if said.verdict in (Verdict.left, Verdict.right, Verdict.tie, Verdict.skip):
        values["preference"] = {Verdict.left: "response-0", Verdict.right: "response-1"}.get(
            said.verdict, said.verdict.value
        )
    if said.verdict is Verdict.ranked:
        values["preference"] = [
            {"value": f"response-{place}", "rank": rank}
            for rank, group in enumerate(said.ranking, 1)
            for place in group
        ]
    return values | ({"comment": said.comment} if said.comment else {})


def fill_argilla(files: list[Path], said: list[Judgement]) -> Path:
    """Records as the server's API gives them."""
    rows = json.loads(files[0].read_text(encoding="utf-8"))
    for row in rows:
        row["responses"] = [
            {
                "id": judgement.annotation,
                "user_id": judgement.annotator,
                "status": "discarded" if judgement.verdict is Verdict.cancelled else "submitted",
                "values": {
                    name: {"value": value} for name, value in _argilla_values(judgement).items()
                },
                "inserted_at": judgement.time,
            }
            for judgement in said
            if judgement.task == row["id"]
        ] + [
            {
                "user_id": "drafter",
                "status": "draft",
                "values": {"preference": {"value": "response-0"}},
            }
        ]
    path = files[0].with_name("records.json")
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def _cells(said: Judgement, row: dict[str, Any]) -> dict[str, Any]:
    """What an annotator writes into a row."""
    words = {Verdict.left: "a", Verdict.right: "B", Verdict.tie: "Tie ", Verdict.skip: "SKIP"}
    ranking = " > ".join("=".join(str(place + 1) for place in group) for group in said.ranking)
    stars = {
        f"rating_{'ab'[place] if 'preference' in row else place + 1}": value
        for place, value in enumerate(said.ratings)
        if value is not None
    }
    value = ranking if said.verdict is Verdict.ranked else words[said.verdict]
    given = {
        "preference": value,
        "ranking": value,
        "annotator": said.annotator,
        "comment": said.comment,
        **stars,
    }
    return {key: cell for key, cell in given.items() if key in row}


def _filled(rows: list[dict[str, Any]], said: list[Judgement]) -> list[dict[str, Any]]:
    """A row for each judgement, and the untouched row where there is none."""
    out = []
    for row in rows:
        mine = [judgement for judgement in said if judgement.task == row["pair_id"]]
        out += [row | _cells(judgement, row) for judgement in mine] or [row]
    return out


def fill_csv(files: list[Path], said: list[Judgement]) -> Path:
    """As a spreadsheet saves it again: its own quotes, no byte order mark."""
    with files[0].open(encoding="utf-8-sig", newline="") as source:
        rows = list(csv.DictReader(source))
    out = StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(_filled(rows, said))
    path = files[0].with_name("filled.csv")
    path.write_bytes(out.getvalue().encode())
    return path


def fill_xlsx(files: list[Path], said: list[Judgement]) -> Path:
    """As Excel saves it: the cells that were not touched as they were, what is typed escaped in its
    way.
    """
    import openpyxl

    book = openpyxl.load_workbook(files[0])
    sheet_ = book.active
    names, *cells = [[cell.value or "" for cell in row] for row in sheet_.iter_rows()]
    rows = _filled([dict(zip(names, row, strict=True)) for row in cells], said)
    for number, row in enumerate(rows, start=2):
        for column, name in enumerate(names, start=1):
            cell, value = sheet_.cell(number, column), row[name]
            own = isinstance(value, str) and not name.startswith(("prompt", "tools", "response_"))
            cell.value = excel_text(value) if own else value
            if isinstance(value, str):
                cell.data_type = "s"
    path = files[0].with_name("filled.xlsx")
    book.save(path)
    return path


def fill_jsonl(files: list[Path], said: list[Judgement]) -> Path:
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").split("\n") if line]
    out = []
    for row in rows:
        for judgement in [judgement for judgement in said if judgement.task == row["pair_id"]] or [
            None
        ]:
            mine = {} if judgement is None else _cells(judgement, row)
            known = (
                {}
                if judgement is None
                else {
                    "seconds": judgement.seconds,
                    "time": judgement.time,
                    "annotation": judgement.annotation,
                }
            )
            out.append(row | mine | known)
    path = files[0].with_name("filled.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in out), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Tool:
    """What a tool can say, and how it says it."""

    target: LabelTarget
    fill: Callable[[list[Path], list[Judgement]], Path]
    verdicts: dict[LabelKind, list[Verdict]]
    equal: bool = True  # rankings with equal ones
    partial: bool = True  # rankings that leave some out
    clocked: bool = True  # seconds that it took
    timed: bool = True  # when it was said
    numbered: bool = True  # annotations have numbers
    chats: bool = False  # conversations stay lists of messages
    rank_ratings: bool = True  # ratings of rankings


_PAIR = [Verdict.left, Verdict.right, Verdict.tie, Verdict.skip]
_RANK = [Verdict.ranked, Verdict.tie, Verdict.skip]
_WORDS = {LabelKind.pair: _PAIR, LabelKind.ranking: _RANK}
_SKIPPED = {kind: [*verdicts, Verdict.cancelled] for kind, verdicts in _WORDS.items()}
TOOLS = [
    Tool(
        LabelTarget.label_studio,
        fill_label_studio,
        _SKIPPED,
        equal=False,
        partial=False,
        rank_ratings=False,
    ),
    Tool(
        LabelTarget.argilla,
        fill_argilla,
        _SKIPPED | {LabelKind.ranking: [Verdict.ranked, Verdict.cancelled]},
        clocked=False,
    ),
    Tool(LabelTarget.csv, fill_csv, _WORDS, clocked=False, timed=False, numbered=False),
    Tool(LabelTarget.xlsx, fill_xlsx, _WORDS, clocked=False, timed=False, numbered=False),
    Tool(LabelTarget.jsonl, fill_jsonl, _WORDS, chats=True),
]


def without_place(found: Any) -> Any:
    return replace(found, place="")
