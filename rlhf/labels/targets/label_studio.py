"""Label Studio: writes tasks to import with the labelling configuration, and reads its JSON export.

    label_studio_tasks.json   [{"data": {prompt, answer1, answer2, pair_id, swapped, export_id},
                              "predictions"}]; `items` for a ranking's answers
    label_studio_config.xml   Pairwise with choices for a tie and a skip, or Ranker; ratings and a
                              comment as the export asks for them

Where a prompt has functions to call, every task's data has `tools`: them as JSON, or "".
Texts are shown by <Text> and by an item's `body`, which the editor escapes; its HyperText, Markdown
and an item's `html` would not be escaped. The editor puts data in place of $name in attributes of
the configuration (parseValue of its utils/data.js), once: texts in the data are not looked at
again. A title or instructions that hold a $ are therefore put into the data themselves.

What is read is the export type JSON: an annotation is a Judgement. Drafts and predictions are no
labels. The editor's Ranker sends an order with every annotation, also where nothing was moved: so
where a tie or skip is chosen beside it, the choice counts.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from conf.choices import LabelKind
from rlhf.data.formats.label_studio import (
    LIST,
    PAIR,
    RANK,
    SIDES,
    Result,
    annotations_of,
    choices_of,
    data_of,
    items_of,
    last_ranking,
    of_type,
    pairwise_result,
    rank_of,
    ranker_items,
    ranker_result,
    results_of,
    sides_of,
)
from rlhf.data.rows import RowError, annotator_of, optional_text, text_of, value_of
from rlhf.labels.files import write_text
from rlhf.labels.records import (
    Export,
    Judgement,
    Ranking,
    Task,
    Unreadable,
    Verdict,
    as_text,
    tools_text,
)
from rlhf.labels.targets.shared import (
    MODEL_VERSION,
    check_texts,
    has_tools,
    read_rows,
    suggestion_for,
)
from rlhf.process.wording import describe
from rlhf.types import UserError

TASKS_FILE, CONFIG_FILE = "label_studio_tasks.json", "label_studio_config.xml"
# what an XML attribute holds and the editor shows as it is
_LITERAL = re.compile("[^$\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]*")
# spaces as they are: .htx-text is what the documentation and older editors have,
# .lsf-richtext__line what 1.23 has
_STYLE = """
.htx-text, .lsf-richtext__line { white-space: pre-wrap; overflow-wrap: anywhere; }
.htx-ranker-item p { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
_CARD = "flex: 1 1 0; min-width: 0; padding: 0.75em; border: 1px solid #ddd; border-radius: 6px;"
_CHOICES = {
    LabelKind.pair: {"tie": "Equally good", "skip": "Can't say"},
    LabelKind.ranking: {"tie": "All equally good", "skip": "Can't say"},
}

# ---- out ----


def write(export: Export, folder: Path) -> list[Path]:
    """Write tasks and configuration to `folder`; returns the files. Raises UserError for ratings of
    rankings, and for text that no encoding holds.
    """
    check_texts(export)
    folder.mkdir(parents=True, exist_ok=True)
    config = write_text(folder / CONFIG_FILE, config_xml(export))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in task_rows(export))
    return [write_text(folder / TASKS_FILE, f"[\n{lines}\n]\n"), config]


def task_rows(export: Export) -> list[dict[str, Any]]:
    """The tasks as Label Studio imports them."""
    functions = has_tools(export)
    return [_task_row(task, export, functions) for task in export.tasks]


def _task_row(task: Task, export: Export, functions: bool) -> dict[str, Any]:
    data: dict[str, Any] = {"prompt": as_text(task.prompt)}
    if functions:  # the configuration names them, so no task may lack them
        data["tools"] = tools_text(task.tools)
    if export.kind is LabelKind.pair:
        data |= dict(zip(SIDES, task.shown, strict=True))
        data["swapped"] = task.swapped
    else:
        items = {_item(slot): text for slot, text in enumerate(task.shown)}
        data["items"] = ranker_items(items)
    data |= {"pair_id": task.id, "export_id": export.id, **_by_name(export)}
    row: dict[str, Any] = {"data": data}
    predictions = _predictions(task, export)
    if predictions:
        row["predictions"] = predictions
    return row


def _item(slot: int) -> str:
    """An item's id: the editor shows it, and sorts ids that are numbers."""
    return f"answer{slot + 1}"


def _by_name(export: Export) -> dict[str, str]:
    """Title and instructions, where the configuration can only name them: those that an attribute
    can't hold, or that the editor would change.
    """
    texts = {"title": export.title, "instructions": export.instructions}
    return {name: text for name, text in texts.items() if not _LITERAL.fullmatch(text)}


def _predictions(task: Task, export: Export) -> list[dict[str, Any]]:
    suggested = suggestion_for(task, export)
    if suggested is None:
        return []
    if export.kind is LabelKind.pair:
        # the editor names the control itself in to_name; what is imported must name an object
        # (validate_prediction of label_studio_sdk)
        result = pairwise_result(suggested.order[0] + 1, target=SIDES[0])
    else:
        result = ranker_result([_item(slot) for slot in suggested.order])
    return [
        {
            "model_version": MODEL_VERSION,
            "score": suggested.probability,
            "result": [{"id": "suggestion", **result}],
        }
    ]


def config_xml(export: Export) -> str:
    """The labelling configuration. Raises UserError for ratings of rankings, which the Ranker does
    not have.
    """
    if export.ratings and export.kind is LabelKind.ranking:
        raise UserError(
            "label.ratings=true with label.kind=ranking: Label Studio's Ranker has no ratings of "
            "its items. Set label.ratings=false, or leave "
            "label_studio out of label.targets."
        )
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Style").text = _STYLE
    values = {"title": export.title, "instructions": export.instructions}
    values |= {name: f"${name}" for name in _by_name(export)}
    _add(view, "Header", value=values["title"], size="3")
    if export.instructions:
        _text(view, "instructions", values["instructions"])
    card = _add(view, "View", style=f"{_CARD} margin: 1em 0;")
    if has_tools(export):
        _add(card, "Header", value="Functions that the answers may call", size="6")
        _text(card, "tools", "$tools")
        _add(card, "Header", value="Prompt", size="6")
    _text(card, "prompt", "$prompt")
    if export.kind is LabelKind.pair:
        _add_pair(view, export.ratings)
    else:
        _add(view, "List", name=LIST, value="$items", title="Drag the best to the top")
        _add(view, "Ranker", name=RANK, toName=LIST)
    choices = _add(
        view, "Choices", name="verdict", toName="prompt", choice="single-radio", showInline="true"
    )
    for alias, shown in _CHOICES[export.kind].items():
        _add(choices, "Choice", alias=alias, value=shown)
    if export.comments:
        _add(
            view,
            "TextArea",
            name="comment",
            toName="prompt",
            placeholder="Comment",
            rows="2",
            maxSubmissions="1",
            editable="true",
        )
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _add(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, attributes)


def _text(parent: ElementTree.Element, name: str, value: str) -> None:
    """Add a text as it is: it is never taken for a link to a text, and nothing in it can be
    marked.
    """
    _add(parent, "Text", name=name, value=value, valueType="text", selectionEnabled="false")


def _add_pair(view: ElementTree.Element, ratings: bool) -> None:
    _add(view, "Header", value="Click on the better answer, or choose below", size="6")
    _add(view, "Pairwise", name=PAIR, toName=",".join(SIDES))
    sides = _add(view, "View", style="display: flex; gap: 1em;")
    for i, side in enumerate(SIDES, start=1):
        card = _add(sides, "View", style=_CARD)
        _text(card, side, f"${side}")
        if ratings:
            _add(card, "Rating", name=f"rating{i}", toName=side, maxRating="5")


# ---- back ----


def read(path: Path) -> Iterator[Judgement | Unreadable]:
    """Every annotation in a JSON export. Raises UserError where the file as a whole can't be
    read.
    """
    return read_rows(path, _of_row)


def _of_row(row: Mapping[str, Any], place: str) -> Iterator[Judgement | Unreadable]:
    task = ""
    try:
        data, annotations = data_of(row), annotations_of(row)
        task = text_of(data, "pair_id")
        prompt, tools = text_of(data, "prompt", empty=True), optional_text(data, "tools")
        if "items" in data:
            texts = items_of(data, empty=True)
        else:
            texts = {side: text_of(data, side, empty=True) for side in SIDES}
    except RowError as error:
        yield Unreadable(place, task, str(error))
        return
    for i, annotation in enumerate(annotations):
        where = f"{place}, annotation {annotation.get('id', i + 1)}"
        try:
            found = _judgement(annotation, f"annotations[{i}]", task, prompt, texts, where)
            yield replace(found, tools=tools or None)
        except RowError as error:
            yield Unreadable(where, task, str(error))


def _judgement(
    annotation: Mapping[str, Any],
    key: str,
    task: str,
    prompt: str,
    texts: dict[str, str],
    place: str,
) -> Judgement:
    results = results_of(annotation, key)
    verdict: Verdict = Verdict.cancelled
    ranking: Ranking = ()
    if not annotation.get("was_cancelled"):
        verdict, ranking = _verdict(results, list(texts))
    time, number = annotation.get("created_at"), annotation.get("id")
    return Judgement(
        task=task,
        annotator=annotator_of(annotation.get("completed_by")).get("annotator", ""),
        verdict=verdict,
        ranking=ranking,
        ratings=_ratings(results, list(texts)),
        comment=_comment(results),
        seconds=_seconds(annotation, key),
        time=None if time is None else str(time),
        annotation="" if number is None else str(number),
        place=place,
        prompt=prompt,
        shown=tuple(texts.values()),
    )


def _verdict(results: list[Result], names: list[str]) -> tuple[Verdict, Ranking]:
    """The verdict, with the ranking where it is one. Raises RowError for none, and for two."""
    choices, sides = choices_of(results), sides_of(results)
    ranking = last_ranking(results)
    unknown = next((choice for choice in choices if choice not in ("tie", "skip")), None)
    if unknown is not None:
        raise RowError(f"expected one of the choices tie and skip, found {unknown!r}")
    if len(set(choices)) + len(sides) > 1:
        verdicts = [f"answer{side} selected" for side in sides]
        verdicts += [f"{choice!r} chosen" for choice in choices]
        raise RowError(f"expected one verdict, found {' and '.join(verdicts)}")
    if choices:
        return Verdict(choices[0]), ()
    if sides:
        return (Verdict.left, Verdict.right)[sides[0] - 1], ()
    if ranking is None:
        raise RowError(
            "submitted without a verdict: expected a selected answer, an order, or a choice of "
            "tie or skip"
        )
    order = rank_of(ranking)
    if len(order) < 2 or len(set(order)) < len(order) or not set(order) <= set(names):
        raise RowError(
            f"expected each of {', '.join(names)} at most once and at least two of them, found "
            f"{', '.join(order) or 'none'}"
        )
    return Verdict.ranked, tuple((names.index(name),) for name in order)


def _ratings(results: Sequence[Result], names: Sequence[str]) -> tuple[int | None, ...]:
    """Stars (1 to 5) of the answers called `names`, from the results of the type rating; None for
    an answer without stars, and () where no answer has any. Raises RowError.
    """
    stars_of: dict[str, int] = {}
    for result in of_type(results, "rating"):
        stars = value_of(result.value, "rating")
        if isinstance(stars, bool) or stars not in range(6):
            raise RowError(
                f"key '{result.key}.value.rating': expected a whole number from 0 to 5, found "
                f"{describe(stars)}"
            )
        if result.target not in names:
            raise RowError(
                f"key '{result.key}.to_name': expected one of {', '.join(names)}, found "
                f"{describe(result.target)}"
            )
        if stars:
            stars_of[str(result.target)] = int(stars)
    return tuple(map(stars_of.get, names)) if stars_of else ()


def _comment(results: Sequence[Result]) -> str:
    """The texts of every result of the type textarea, a line each. Raises RowError."""
    lines: list[str] = []
    for result in of_type(results, "textarea"):
        texts = result.value.get("text")
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RowError(
                f"key '{result.key}.value.text': expected texts, found {describe(texts)}"
            )
        lines += texts
    return "\n".join(lines)


def _seconds(annotation: Mapping[str, Any], key: str) -> float | None:
    """How long an annotation took (lead_time), in seconds; None where it doesn't say. Raises
    RowError.
    """
    value = annotation.get("lead_time")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"key '{key}.lead_time': expected seconds, found {describe(value)}")
    return float(value)
