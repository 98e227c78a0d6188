"""Tasks written for every labelling tool and filled in by a simulated annotator give back exactly
what was said; what no file holds is refused.
"""

import csv
import json
import math
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.choices import LabelKind, LabelTarget
from rlhf.data import formats, tables
from rlhf.labels.records import Answer, Export, Judgement, Task, Unreadable, Verdict
from rlhf.labels.targets import LABEL_TOOLS, detect, label_studio, read_labels
from rlhf.labels.targets.shared import suggestion
from rlhf.process.files import digest
from rlhf.types import UserError
from tests.labels.label_exports import (
    NASTY,
    TEXT,
    TOOLS,
    Tool,
    export,
    exports,
    fill_label_studio,
    judgements,
    task,
    without_place,
)

BOTH = list(LabelKind)
FAST = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
by_tool = pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.target.value)
by_kind = pytest.mark.parametrize("kind", BOTH, ids=lambda kind: kind.value)


def one_task(
    kind: LabelKind = LabelKind.pair, scores: list[float] | None = None, **fields: Any
) -> Export:
    texts = ["first answer", "second answer", "third answer"][: 2 if kind is LabelKind.pair else 3]
    return export(kind, [task(1, "What?", texts, scores=scores)], **fields)


def write_rows(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Judgement | Unreadable]:
    return list(read_labels(path)[1])


# ---- out, filled in, back ----


@by_tool
@by_kind
@given(data=st.data())
@FAST
def test_labels_come_back_exactly(tool: Tool, kind: LabelKind, data: st.DataObject) -> None:
    """Any texts, any order, any number of annotators, whatever the tool can say of them."""
    ratings = data.draw(st.booleans()) and (kind is LabelKind.pair or tool.rank_ratings)
    out = data.draw(exports(kind, ratings))
    said = data.draw(judgements(out, tool))
    with TemporaryDirectory() as folder:
        files = LABEL_TOOLS[tool.target].write(out, Path(folder))
        path = tool.fill(files, said)
        target, found = read_labels(path)
        assert target is tool.target
        assert [without_place(one) for one in found] == said


@by_tool
@by_kind
def test_nothing_is_said_before_anybody_said_it(
    tool: Tool, kind: LabelKind, tmp_path: Path
) -> None:
    """The files as they are written, suggestions included, hold no judgement; each is detected and
    read as what it is.
    """
    out = one_task(
        kind, scores=[0.0, 1.0, 2.0][: 2 if kind is LabelKind.pair else 3], prelabel=True
    )
    files = LABEL_TOOLS[tool.target].write(out, tmp_path)
    assert all(path.parent == tmp_path and path.is_file() for path in files)
    assert detect(files[0]) is tool.target and read(files[0]) == []


@by_tool
@by_kind
def test_annotators_learn_nothing_hidden(tool: Tool, kind: LabelKind, tmp_path: Path) -> None:
    """Without suggestions two exports that differ only in what is hidden are the same files: who
    wrote, scores, roles, how a task was chosen.
    """
    one = one_task(kind, scores=[0.0, 1.0, 2.0][: 2 if kind is LabelKind.pair else 3])
    other = replace(one, details={"seed": 1}, tasks=tuple(_hidden_otherwise(t) for t in one.tasks))
    contents = []
    for number, out in enumerate((one, other)):
        files = LABEL_TOOLS[tool.target].write(out, tmp_path / str(number))
        contents.append([_content(path) for path in files])
    assert contents[0] == contents[1]
    assert not any(b"secret-policy" in part for file in contents[0] for part in file)


def _hidden_otherwise(one: Task) -> Task:
    answers = tuple(
        Answer(answer.text, policy="other", score=9.0, spread=1.0) for answer in one.answers
    )
    return replace(
        one, answers=answers, role=type(one.role).gold, best=1, chosen_by="uncertainty", repeats="x"
    )


def _content(path: Path) -> list[bytes]:
    """Bytes, of an Excel file those of its sheets: the file itself holds the time."""
    if path.suffix != ".xlsx":
        return [path.read_bytes()]
    with zipfile.ZipFile(path) as book:
        return [book.read(name) for name in sorted(book.namelist()) if name.startswith("xl/")]


@by_tool
@pytest.mark.parametrize("place", ["title", "instructions", "prompt", "answer"])
def test_what_no_encoding_holds_is_refused(tool: Tool, place: str, tmp_path: Path) -> None:
    half = "half \ud83d"
    out = one_task(**({place: half} if place in ("title", "instructions") else {}))
    if place == "prompt":
        out = export(LabelKind.pair, [task(1, [{"role": "user", "content": half}], ["a", "b"])])
    if place == "answer":
        out = replace(out, tasks=(replace(out.tasks[0], answers=(Answer(half), Answer("b"))),))
    with pytest.raises(UserError, match=r"surrogate pair") as error:
        LABEL_TOOLS[tool.target].write(out, tmp_path)
    assert (
        f"label.{place}" if place in ("title", "instructions") else "task 0123456789ab-1"
    ) in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---- suggestions ----


def test_a_suggestion_is_the_models_order_with_its_probability() -> None:
    """Against hand-computed values: sigmoid(0.5) = 0.6224593; e/(e+1+1/e) * 1/(1+1/e) with scores
    1, 0, -1.
    """
    pair = suggestion(task(1, "p", ["a", "b"], scores=[1.5, 2.0]))
    assert (
        pair is not None
        and pair.order == (1, 0)
        and math.isclose(pair.probability, 0.6224593312018546)
    )
    three = suggestion(task(1, "p", ["a", "b", "c"], scores=[0.0, 1.0, -1.0]))
    assert (
        three is not None
        and three.order == (1, 0, 2)
        and math.isclose(three.probability, 0.6652409557748219 * 0.7310585786300049)
    )
    far = suggestion(task(1, "p", ["a", "b"], scores=[-4000.0, 4000.0]))
    assert far is not None and far.probability == 1.0
    assert suggestion(task(1, "p", ["a", "b"], scores=[1.0, 1.0])) is None
    assert suggestion(task(1, "p", ["a", "b"])) is None


def test_suggestions_reach_the_tools_that_show_them(tmp_path: Path) -> None:
    scores = [0.5, 0.0, 1.5]
    pair, three = (
        one_task(scores=scores[:2], prelabel=True),
        one_task(LabelKind.ranking, scores, prelabel=True),
    )
    label = [label_studio.task_rows(out)[0]["predictions"][0] for out in (pair, three)]
    assert [one["result"][0]["value"] for one in label] == [
        {"selected": "left"},
        {"ranker": {"rank": ["answer3", "answer1", "answer2"]}},
    ]
    assert math.isclose(label[0]["score"], 0.6224593312018546)
    found = []
    for out in (pair, three):
        argilla, jsonl = (
            LABEL_TOOLS[target].write(out, tmp_path)[0]
            for target in (LabelTarget.argilla, LabelTarget.jsonl)
        )
        found += [
            json.loads(argilla.read_text())[0]["suggestions"]["preference"],
            json.loads(jsonl.read_text())["suggestion"],
        ]
    assert [one.get("value", one.get("preference", one.get("ranking"))) for one in found] == [
        "response-0",
        "a",
        ["response-2", "response-0", "response-1"],
        "3>1>2",
    ]
    assert "predictions" not in label_studio.task_rows(one_task(scores=scores[:2]))[0]


@by_kind
def test_label_studio_takes_configuration_and_suggestions(kind: LabelKind) -> None:
    """By the SDK's own check, which its server makes at an import."""
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface
    out = one_task(kind, [0.0, 1.0, 2.0][: 2 if kind is LabelKind.pair else 3], prelabel=True)
    config = interface(label_studio.config_xml(out))
    config.validate()
    row = label_studio.task_rows(out)[0]
    assert config.validate_prediction(row["predictions"][0], return_errors=True) == []


# ---- Label Studio ----


def shown_by_editor(value: str, data: dict[str, Any]) -> str:
    """What the editor shows of an attribute `value` (parseValue in
    web/libs/editor/src/utils/data.js).
    """
    variable = r"\$[\w[\].{}]+"
    if re.fullmatch(variable, value):
        return data.get(value[1:], "")
    return re.sub(variable, lambda match: str(data.get(match[0][1:], "undefined")), value)


@given(title=TEXT.filter(str.strip), instructions=TEXT, answer=TEXT)
@FAST
def test_label_studio_shows_texts_as_they_are(title: str, instructions: str, answer: str) -> None:
    """Through XML, and through the editor's own $names; by tags that show text and not markup."""
    out = export(
        LabelKind.pair,
        [task(1, "p", [answer, answer + "x"])],
        title=title,
        instructions=instructions,
    )
    view, data = (
        ElementTree.fromstring(label_studio.config_xml(out)),
        label_studio.task_rows(out)[0]["data"],
    )
    assert {tag.tag for tag in view.iter()} <= {
        "View",
        "Style",
        "Header",
        "Text",
        "Pairwise",
        "Rating",
        "Choices",
        "Choice",
        "TextArea",
    }
    header = view.find("Header")
    assert header is not None and shown_by_editor(header.attrib["value"], data) == title
    texts = {tag.attrib["name"]: tag.attrib for tag in view.iter("Text")}
    assert (
        shown_by_editor(texts["answer1"]["value"], data) == answer
        and texts["answer1"]["valueType"] == "text"
    )
    assert (
        instructions == "" or shown_by_editor(texts["instructions"]["value"], data) == instructions
    )


def test_label_studio_ratings_of_rankings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"label\.ratings=true with label\.kind=ranking: Label Studio's Ranker"
    ):
        LABEL_TOOLS[LabelTarget.label_studio].write(
            one_task(LabelKind.ranking, ratings=True), tmp_path
        )


def selected(side: str) -> dict[str, Any]:
    return {"from_name": "pw", "to_name": "pw", "type": "pairwise", "value": {"selected": side}}


def chosen(*choices: str) -> dict[str, Any]:
    return {
        "from_name": "verdict",
        "to_name": "prompt",
        "type": "choices",
        "value": {"choices": list(choices)},
    }


def ordered(*names: str) -> dict[str, Any]:
    return {
        "from_name": "rank",
        "to_name": "results",
        "type": "ranker",
        "value": {"ranker": {"rank": list(names)}},
    }


@pytest.mark.parametrize(
    ("kind", "result", "reason"),
    [
        (LabelKind.pair, [], "submitted without a verdict"),
        (
            LabelKind.pair,
            [{"from_name": "c", "to_name": "p", "type": "textarea", "value": {"text": ["hm"]}}],
            "submitted without a verdict",
        ),
        (
            LabelKind.pair,
            [selected("left"), chosen("tie")],
            "found answer1 selected and 'tie' chosen",
        ),
        (
            LabelKind.pair,
            [selected("left"), selected("right")],
            "found answer1 selected and answer2 selected",
        ),
        (LabelKind.pair, [chosen("tie"), chosen("skip")], "expected one verdict"),
        (LabelKind.pair, [chosen("tie", "skip")], "expected one choice"),
        (
            LabelKind.pair,
            [chosen("both")],
            "choices tie and skip, found 'both'",
        ),
        (LabelKind.pair, [selected("up")], "expected left or right, found text 'up'"),
        (
            LabelKind.pair,
            [selected("left"), {"to_name": "answer1", "type": "rating", "value": {"rating": 6}}],
            "from 0 to 5",
        ),
        (LabelKind.ranking, [ordered("answer1", "answer1")], "at most once"),
        (
            LabelKind.ranking,
            [ordered("answer1", "answer9")],
            "expected each of answer1, answer2, answer3",
        ),
        (LabelKind.ranking, [ordered("answer1")], "at least two"),
        (LabelKind.ranking, "left", "expected a list, found text 'left'"),
    ],
)
def test_label_studio_annotations_that_say_nothing_clear(
    kind: LabelKind, result: Any, reason: str, tmp_path: Path
) -> None:
    """None is dropped, and one does not take the others of its task with it."""
    rows = label_studio.task_rows(one_task(kind))
    good = (
        [selected("right")]
        if kind is LabelKind.pair
        else [ordered("answer2", "answer1", "answer3")]
    )
    rows[0]["annotations"] = [
        {"id": 7, "completed_by": 1, "result": result},
        {"id": 8, "completed_by": 1, "result": good},
    ]
    first, second = read(write_rows(tmp_path / "x.json", rows))
    assert (
        isinstance(first, Unreadable) and first.task == "0123456789ab-1" and reason in first.reason
    )
    assert first.place.endswith("x.json, row 1, annotation 7")
    assert isinstance(second, Judgement) and second.annotation == "8"


@pytest.mark.parametrize(
    ("who", "name"),
    [
        (3, "3"),
        ("a@b.c", "a@b.c"),
        ({"id": 3, "email": "a@b.c"}, "a@b.c"),
        ({"id": 3}, "3"),
        (None, ""),
    ],
)
def test_label_studio_annotators(who: Any, name: str, tmp_path: Path) -> None:
    rows = label_studio.task_rows(one_task())
    rows[0]["annotations"] = [{"id": 1, "completed_by": who, "was_cancelled": True, "result": []}]
    found = read(write_rows(tmp_path / "x.json", rows))
    assert [(one.annotator, one.verdict) for one in found if isinstance(one, Judgement)] == [
        (name, Verdict.cancelled)
    ]


def test_label_studio_no_stars_are_no_rating(tmp_path: Path) -> None:
    """The editor's key for ratings goes from five stars to none, which it sends as 0."""
    rows = label_studio.task_rows(one_task())
    stars = [
        {"to_name": f"answer{place}", "type": "rating", "value": {"rating": count}}
        for place, count in ((1, 0), (2, 3))
    ]
    rows[0]["annotations"] = [
        {"id": 1, "result": [selected("left"), *stars]},
        {"id": 2, "result": [selected("left"), stars[0]]},
    ]
    found = read(write_rows(tmp_path / "x.json", rows))
    assert [one.ratings for one in found if isinstance(one, Judgement)] == [(None, 3), ()]


def test_a_choice_counts_before_the_order_that_every_annotation_has(tmp_path: Path) -> None:
    """The editor's Ranker sends the order as shown where nothing was moved: with a skip it is none,
    here and in stage=data.
    """
    rows = label_studio.task_rows(one_task(LabelKind.ranking))
    rows[0]["annotations"] = [
        {
            "id": 1,
            "completed_by": 1,
            "result": [ordered("answer1", "answer2", "answer3"), chosen("skip")],
        }
    ]
    (found,) = read(write_rows(tmp_path / "x.json", rows))
    assert isinstance(found, Judgement) and found.verdict is Verdict.skip and found.ranking == ()
    format_ = formats.detect(rows[0], formats.Use.preference)
    assert format_ is not None
    several = format_.read(rows[0], formats.Use.preference)
    assert several.pairs == [] and several.set_aside == [
        "annotation 1 by 1: a tie or a skip: 'skip' was chosen"
    ]


def test_stage_data_reads_what_was_labelled(tmp_path: Path) -> None:
    """The exported tasks with annotations are of the formats that stage=data knows."""
    out = one_task()
    said = Judgement("0123456789ab-1", "3", Verdict.right, annotation="1", shown=out.tasks[0].shown)
    row = json.loads(
        fill_label_studio(
            LABEL_TOOLS[LabelTarget.label_studio].write(out, tmp_path), [said]
        ).read_text()
    )[0]
    format_ = formats.detect(row, formats.Use.preference)
    assert format_ is not None and format_.name == "label_studio"
    (pair,) = format_.read(row, formats.Use.preference).pairs
    assert (pair.value.chosen, pair.value.rejected) == ("second answer", "first answer")


# ---- Argilla ----


def argilla_rows(responses: Any, kind: LabelKind, tmp_path: Path) -> list[Judgement | Unreadable]:
    rows = json.loads(
        LABEL_TOOLS[LabelTarget.argilla].write(one_task(kind), tmp_path)[0].read_text()
    )
    rows[0]["responses"] = responses
    return read(write_rows(tmp_path / "x.json", rows))


def test_argilla_by_question_as_its_sdk_writes_it(tmp_path: Path) -> None:
    """to_json: {question: [{value, user_id}]}; two users, of whom one discarded, with a status
    where the file has one.
    """
    responses = {
        "preference": [
            {"value": "response-1", "user_id": "u"},
            {"value": "tie", "user_id": "v", "status": "discarded"},
        ],
        "comment": [{"value": "so", "user_id": "u"}],
        "rating-1": [{"value": 4, "user_id": "u"}],
    }
    first, second = argilla_rows(responses, LabelKind.pair, tmp_path)
    assert isinstance(first, Judgement) and (first.verdict, first.comment, first.ratings) == (
        Verdict.right,
        "so",
        (None, 4),
    )
    assert isinstance(second, Judgement) and (second.annotator, second.verdict) == (
        "v",
        Verdict.cancelled,
    )


@pytest.mark.parametrize(
    ("responses", "kind", "reason"),
    [
        (
            {"comment": [{"value": "so", "user_id": "u"}]},
            LabelKind.pair,
            "without an answer to the question 'preference'",
        ),
        (
            {"preference": [{"value": "response-7", "user_id": "u"}]},
            LabelKind.pair,
            "expected one of response-0, response-1, tie and skip",
        ),
        (
            {"preference": [{"value": "tie", "user_id": "u", "status": "pending"}]},
            LabelKind.pair,
            "expected one of submitted, discarded, draft",
        ),
        (
            {"preference": [{"value": "tie", "user_id": "u"}] * 2},
            LabelKind.pair,
            "a second answer of user 'u'",
        ),
        (
            {"preference": [{"value": ["response-1", "response-0"], "user_id": "u"}]},
            LabelKind.ranking,
            "to_json leaves out the ranks",
        ),
        (
            {"preference": [{"value": [{"value": "response-1", "rank": 1}], "user_id": "u"}]},
            LabelKind.ranking,
            "at least two",
        ),
        (
            [{"user_id": "u", "values": {"preference": {"value": "tie"}}}] * 2,
            LabelKind.pair,
            "a second response of user 'u'",
        ),
        (
            {"preference": {"value": "tie"}},
            LabelKind.pair,
            "objects with 'value' and 'user_id'",
        ),
        (
            {
                "preference": [{"value": "tie", "user_id": "u"}],
                "rating-0": [{"value": 9, "user_id": "u"}],
            },
            LabelKind.pair,
            "from 1 to 5",
        ),
    ],
)
def test_argilla_responses_that_are_no_label(
    responses: Any, kind: LabelKind, reason: str, tmp_path: Path
) -> None:
    (found,) = argilla_rows(responses, kind, tmp_path)
    assert (
        isinstance(found, Unreadable) and reason in found.reason and found.task == "0123456789ab-1"
    )


def test_argilla_settings_ask_what_the_export_asks(tmp_path: Path) -> None:
    """Fields without markdown, and questions by what the export wants; names and shapes as
    argilla.Settings.from_json reads them.
    """
    rows = [task(1, "p", ["a", "b", "c"]), task(2, "p", ["a", "b"])]
    made = json.loads(
        LABEL_TOOLS[LabelTarget.argilla]
        .write(export(LabelKind.ranking, rows, ratings=True, overlap=3), tmp_path)[1]
        .read_text()
    )
    assert [(one["name"], one["required"]) for one in made["fields"]] == [
        ("prompt", True),
        ("response-0", True),
        ("response-1", True),
        ("response-2", False),
    ]
    assert all(one["settings"] == {"type": "text", "use_markdown": False} for one in made["fields"])
    assert [one["settings"]["type"] for one in made["questions"]] == [
        "ranking",
        "rating",
        "rating",
        "rating",
        "text",
    ]
    assert made["distribution"] == {"strategy": "overlap", "min_submitted": 3}
    pair = json.loads(
        LABEL_TOOLS[LabelTarget.argilla]
        .write(one_task(ratings=False, comments=False), tmp_path)[1]
        .read_text()
    )
    (only,) = pair["questions"]
    assert [option["value"] for option in only["settings"]["options"]] == [
        "response-0",
        "response-1",
        "tie",
        "skip",
    ]


# ---- sheets ----

FORMULA = re.compile(r"\s*[=+\-@\t\r＝＋－＠]")  # noqa: RUF001


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    """In CSV none begins like one; in Excel files every cell is a text, also after somebody edits
    it.
    """
    import openpyxl

    tasks = [task(i, text or "p", [text, text + "."]) for i, text in enumerate(NASTY)]
    out = export(LabelKind.pair, tasks)
    with (
        LABEL_TOOLS[LabelTarget.csv]
        .write(out, tmp_path)[0]
        .open(encoding="utf-8-sig", newline="") as source
    ):
        cells = [cell for row in csv.reader(source) for cell in row]
    assert len(cells) > 100 and not [
        cell for cell in cells if FORMULA.match(cell) and not cell.startswith(" ")
    ]
    book = openpyxl.load_workbook(LABEL_TOOLS[LabelTarget.xlsx].write(out, tmp_path)[0])
    found = [cell for row in book.active.iter_rows() for cell in row]
    assert {cell.data_type for cell in found if cell.value is not None} == {"s"} and {
        cell.number_format for cell in found
    } == {"@"}


@given(text=TEXT)
@FAST
def test_marks_come_off(text: str) -> None:
    for starts in ((), tables.FORMULA):
        marked = tables.mark(text, starts)
        assert (
            marked and tables.unmark(marked) == text and not (starts and marked.startswith(starts))
        )
    assert not tables.inert(text).startswith(tables.FORMULA) and (
        tables.inert(text) == text or tables.bare(tables.inert(text)) == text
    )


def test_a_sheet_saved_as_csv_from_excel_reads_the_same(tmp_path: Path) -> None:
    """Texts of the Excel file, which need no mark for formulas, through a CSV file of a
    spreadsheet's.
    """
    from rlhf.data.files import read_rows

    out = export(
        LabelKind.pair, [task(i, text, [text, text + "."]) for i, text in enumerate(NASTY)]
    )
    rows = [
        row | {"preference": "a"}
        for row in read_rows(LABEL_TOOLS[LabelTarget.xlsx].write(out, tmp_path)[0])
    ]
    with (tmp_path / "saved.csv").open("w", encoding="utf-8-sig", newline="") as target:
        writer = csv.DictWriter(target, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = read(tmp_path / "saved.csv")
    assert [one.shown for one in found if isinstance(one, Judgement)] == [
        one.shown for one in out.tasks
    ]


def test_line_ends_that_a_spreadsheet_changes_leave_the_digest(tmp_path: Path) -> None:
    out = export(LabelKind.pair, [task(1, "a\r\nb\rc\n", ["x\r\ny", "z\n"])])
    path = LABEL_TOOLS[LabelTarget.csv].write(out, tmp_path)[0]
    text = (
        path.read_bytes()
        .decode("utf-8-sig")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace('"","","",""', '"tie","","",""')
    )
    path.write_text(text.replace('"z\n","",', '"z\n","tie",'), encoding="utf-8", newline="\n")
    (found,) = read(path)
    assert isinstance(found, Judgement) and found.prompt != "a\r\nb\rc\n"
    assert digest(found.prompt) == digest("a\r\nb\rc\n") and [
        digest(one) for one in found.shown or ()
    ] == [digest(one) for one in out.tasks[0].shown]


@pytest.mark.parametrize(
    "text",
    ["x" * 32_768, "👩" * 16_384, "\x00" * 4_682],
    ids=["plain", "two units each", "escaped"],
)
def test_an_excel_cell_that_is_too_small_is_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"task 0123456789ab-1: .*response_b .*32,7[0-9]{2} .*32,767\.",
    ):
        LABEL_TOOLS[LabelTarget.xlsx].write(
            export(LabelKind.pair, [task(1, "p", ["a", text])]), tmp_path
        )
    assert list(tmp_path.iterdir()) == []
    LABEL_TOOLS[LabelTarget.xlsx].write(
        export(LabelKind.pair, [task(1, "p", ["a", text[: len(text) - 6]])]), tmp_path
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"preference": "left"},
            "key 'preference': expected a, b, tie, skip",
        ),
        (
            {"preference": "a", "rating_a": "6"},
            "key 'rating_a': expected a whole number from 1 to 5",
        ),
        ({"preference": "a", "rating_a": "good"}, "key 'rating_a': expected a finite number"),
        (
            {"ranking": "2>1", "rating_3": "2"},
            "key 'rating_3': expected nothing, since the row has 2 responses",
        ),
        ({"preference": "a", "pair_id": ""}, "key 'pair_id': expected text, found an empty one"),
        ({"ranking": "3>1"}, "key 'ranking': expected at least two numbers from 1 to 2"),
        ({"ranking": "1"}, "expected at least two numbers"),
        ({"ranking": "1>1"}, "each once"),
        ({"ranking": "1>two"}, "found text '1>two'"),
        ({"ranking": "2>>1"}, "with > or = between them"),
    ],
)
def test_cells_that_say_nothing_clear(row: dict[str, str], reason: str, tmp_path: Path) -> None:
    """With the file and the row; the rows beside it are read."""
    ranking = "ranking" in row
    names = ["response_1", "response_2"] if ranking else ["response_a", "response_b"]
    said = {"ranking": "2=1"} if ranking else {"preference": "B"}
    good = {"pair_id": "x-1", "prompt": "p", names[0]: "a", names[1]: "b", **said}
    empty = dict.fromkeys(("rating_1", "rating_2", "rating_3"), "") if ranking else {"rating_a": ""}
    rows = [good | empty, good | empty | row]
    path = tmp_path / "labels.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    first, second = read(path)
    assert isinstance(first, Judgement) and isinstance(second, Unreadable)
    assert (
        reason in second.reason
        and second.place == f"{path}, row 2"
        and second.task == row.get("pair_id", "x-1")
    )


def test_label_rows_of_their_own(tmp_path: Path) -> None:
    """JSON lines with an id and a verdict are enough; what is not said is not made up. A sheet may
    lack columns as well.
    """
    (tmp_path / "labels.jsonl").write_text(
        '{"pair_id": "x-1", "preference": "b"}\n{"pair_id": "x-2", "preference": null}\n',
        encoding="utf-8",
    )
    (tmp_path / "labels.csv").write_text("ranking;pair_id\n2>1;x-1\n", encoding="utf-8")
    (found,) = read(tmp_path / "labels.jsonl")
    assert found == Judgement("x-1", "", Verdict.right, place=f"{tmp_path / 'labels.jsonl'}, row 1")
    (ranked,) = read(tmp_path / "labels.csv")
    assert ranked == Judgement(
        "x-1", "", Verdict.ranked, ((1,), (0,)), place=f"{tmp_path / 'labels.csv'}, row 1"
    )


# ---- which file is which ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.html", "<html>", "is a page"),
        ("a.json", "[]", "holds no row"),
        ("a.jsonl", '{"x": 1}', "found the columns x"),
        ("a.csv", "prompt,chosen\na,b\n", "found the columns prompt, chosen"),
        ("a.doc", "x", "expected a file that ends with"),
        ("a.txt", "x", "found the columns text"),
        (
            "a.json",
            '[{"id": 1, "prompt": "p", "annotation_id": 1, "annotator": 1, "lead_time": 2.0, '
            '"pw": "left"}]',
            "of the type JSON-MIN",
        ),
        (
            "a.csv",
            "annotation_id,annotator,answer1,id,lead_time,pair_id,pw\n1,1,a,1,2.0,x,left\n",
            "of the type CSV",
        ),
    ],
)
def test_files_of_no_labels(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        read_labels(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("indent", [None, 2])
def test_the_pages_labels_are_told_by_their_format(indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(
        json.dumps(
            {"format": "rlhf-labels", "version": 1, "annotator": "a", "labels": []}, indent=indent
        ),
        encoding="utf-8",
    )
    assert detect(path) is LabelTarget.page
    path.write_text(json.dumps({"format": "other", "labels": []}, indent=indent), encoding="utf-8")
    with pytest.raises(UserError, match="the page downloads"):
        detect(path)


def test_every_target_has_a_writer_and_a_reader() -> None:
    assert set(LABEL_TOOLS) == set(LabelTarget)
    assert {tool.target for tool in TOOLS} == set(LabelTarget) - {LabelTarget.page}
