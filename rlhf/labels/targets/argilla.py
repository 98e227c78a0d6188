"""Argilla 2: writes records with the settings of their data set, and reads records with responses.

    argilla_settings.json   rg.Settings.from_json: fields, questions, guidelines, how many people
                            judge a record
    argilla_records.json    dataset.records.from_json: {"id", "fields": {prompt, response-0,
                            response-1 ...}, "metadata", "suggestions", "responses"}

Where a prompt has functions to call, a field `tools` holds them as JSON.
Fields are text without markdown, which Argilla's page would show as HTML. The question `preference`
is a LabelQuestion (response-0, response-1, tie, skip) or, for rankings, a RankingQuestion;
`rating-0` ... and `comment` are optional questions.

Responses come in two forms, and both are read: by question, as the SDK's to_json writes them
({"preference": [{"value", "user_id"}]}), and by user, as the server's API gives them ([{"user_id",
"status", "values": {"preference": {"value"}}}]). A response with the status discarded is a
cancelled judgement, and a draft is none.

The SDK's to_json leaves out the status, so all of its responses count as submitted. It also leaves
out the ranks, so its rankings are refused: a list of names does not say whether its order is the
ranking's, or which of them were equal. The API's form has both.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.choices import LabelKind
from rlhf.data.formats.argilla import (
    STATUSES,
    answer_name,
    answers_of,
    mapping_of,
    responses_by_user,
)
from rlhf.data.rows import RowError, number_of, optional_text, text_of
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
    given_ratings,
    has_tools,
    most_answers,
    read_rows,
    suggestion_for,
)
from rlhf.process.wording import describe

RECORDS_FILE, SETTINGS_FILE = "argilla_records.json", "argilla_settings.json"

# ---- out ----


def write(export: Export, folder: Path) -> list[Path]:
    """Write records and settings to `folder`; returns the files. Raises UserError for text that no
    encoding holds.
    """
    check_texts(export)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(
        json.dumps(_record(task, export), ensure_ascii=False) for task in export.tasks
    )
    settings = json.dumps(_settings(export), ensure_ascii=False, indent=2)
    return [
        write_text(folder / RECORDS_FILE, f"[\n{lines}\n]\n"),
        write_text(folder / SETTINGS_FILE, settings + "\n"),
    ]


def _record(task: Task, export: Export) -> dict[str, Any]:
    answers = {answer_name(slot): text for slot, text in enumerate(task.shown)}
    functions = {"tools": tools_text(task.tools)} if task.tools else {}
    # Argilla's metadata has no true and false
    swapped = {"swapped": str(task.swapped).lower()} if export.kind is LabelKind.pair else {}
    return {
        "id": task.id,
        "fields": {"prompt": as_text(task.prompt), **functions, **answers},
        "metadata": {"pair_id": task.id, "export_id": export.id, **swapped},
        "suggestions": _suggestions(task, export),
        "responses": {},
    }


def _suggestions(task: Task, export: Export) -> dict[str, Any]:
    suggested = suggestion_for(task, export)
    if suggested is None:
        return {}
    names = [answer_name(slot) for slot in suggested.order]
    # the SDK wants a ranking's names alone, in their order
    value = names[0] if export.kind is LabelKind.pair else names
    score = suggested.probability
    return {"preference": {"value": value, "score": score, "agent": MODEL_VERSION}}


def _settings(export: Export) -> dict[str, Any]:
    names = {answer_name(slot): f"Answer {slot + 1}" for slot in range(most_answers(export))}
    # a shorter task's record has no text in the last fields
    fewest = min((len(task.answers) for task in export.tasks), default=2)
    fields = [_field("prompt", "Prompt", required=True)]
    if has_tools(export):
        fields.append(_field("tools", "Functions that the answers may call", required=False))
    for slot, (name, title) in enumerate(names.items()):
        fields.append(_field(name, title, required=slot < fewest))
    return {
        "guidelines": export.instructions or None,
        "fields": fields,
        "questions": _questions(export, names),
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": export.overlap},
    }


def _questions(export: Export, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """What annotators are asked about the answers, whose titles are `names` by field."""
    options = [{"value": name, "text": title} for name, title in names.items()]
    if export.kind is LabelKind.pair:
        options += [
            {"value": "tie", "text": "Equally good"},
            {"value": "skip", "text": "Can't say"},
        ]
        preference = {"type": "label_selection", "options": options}
    else:
        preference = {"type": "ranking", "options": options}
    questions = [_question("preference", export.title, preference, required=True)]
    if export.ratings:
        stars = {"type": "rating", "options": [{"value": value} for value in range(1, 6)]}
        for slot, title in enumerate(names.values()):
            questions.append(_question(f"rating-{slot}", f"Rating of {title}", stars))
    if export.comments:
        questions.append(_question("comment", "Comment", {"type": "text", "use_markdown": False}))
    return questions


def _field(name: str, title: str, *, required: bool) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "required": required,
        "settings": {"type": "text", "use_markdown": False},
    }


def _question(
    name: str, title: str, settings: dict[str, Any], *, required: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "description": None,
        "required": required,
        "settings": settings,
    }


# ---- back ----


def read(path: Path) -> Iterator[Judgement | Unreadable]:
    """Every user's response to every record. Raises UserError where the file as a whole can't be
    read.
    """
    return read_rows(path, _of_record)


def _of_record(row: Mapping[str, Any], place: str) -> Iterator[Judgement | Unreadable]:
    task = ""
    try:
        fields, metadata = mapping_of(row, "fields"), mapping_of(row, "metadata")
        task = _task_id(row, metadata)
        prompt, tools = text_of(fields, "prompt", empty=True), optional_text(fields, "tools")
        filled = {name: value for name, value in fields.items() if value is not None}
        answers = answers_of(filled, empty=True)
        users = responses_by_user(row.get("responses") or {})
    except RowError as error:
        yield Unreadable(place, task, str(error))
        return
    for user, response in users.items():
        where = f"{place}, user {user}"
        try:
            judgement = _judgement(response, answers)
        except RowError as error:
            yield Unreadable(where, task, str(error))
            continue
        if judgement is not None:
            yield replace(
                judgement,
                task=task,
                annotator=user,
                place=where,
                prompt=prompt,
                shown=tuple(answers.values()),
                tools=tools or None,
            )


def _task_id(row: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The task of a record: a pair_id, or else the record's own id. Raises RowError."""
    for source in (metadata, row):
        if source.get("pair_id"):
            return text_of(source, "pair_id")
    return text_of(row, "external_id" if row.get("external_id") else "id")


def _judgement(response: Mapping[str, Any], answers: Mapping[str, str]) -> Judgement | None:
    """A response as a judgement without its task; None for a draft. Raises RowError."""
    status, values = optional_text(response, "status") or "submitted", response["values"]
    if status not in STATUSES:
        raise RowError(f"key 'status': expected one of {', '.join(STATUSES)}, found {status!r}")
    if status == "draft":
        return None
    ratings, comment = _ratings(values, answers), optional_text(values, "comment")
    verdict: Verdict = Verdict.cancelled
    ranking: Ranking = ()
    if status != "discarded":
        verdict, ranking = _preference(values, list(answers))
    return Judgement(
        task="",
        annotator="",
        verdict=verdict,
        ranking=ranking,
        ratings=ratings,
        comment=comment,
        time=response.get("updated_at") or response.get("inserted_at"),
        annotation=str(response.get("id") or ""),
    )


def _preference(values: Mapping[str, Any], names: list[str]) -> tuple[Verdict, Ranking]:
    """The answer to the question `preference`. Raises RowError where there is none."""
    value = values.get("preference")
    if value is None:
        raise RowError(
            "submitted without an answer to the question 'preference', found answers to: "
            f"{', '.join(values) or 'none'}"
        )
    if isinstance(value, str):
        return _choice(value, names), ()
    return Verdict.ranked, _ranking(value, names)


def _choice(value: str, names: list[str]) -> Verdict:
    if value in ("tie", "skip"):
        return Verdict(value)
    if value not in names or len(names) != 2:
        raise RowError(
            f"key 'preference': expected one of {', '.join(names)}, tie and skip, found {value!r}"
        )
    return (Verdict.left, Verdict.right)[names.index(value)]


def _ranking(value: Any, names: list[str]) -> Ranking:
    """Slots by rank. A rank of an answer that the record does not have is ignored: longer tasks
    have more. Raises RowError.
    """
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise RowError(
            f"key 'preference': expected a list of {{value, rank}}, found {describe(value)}: "
            "Argilla's to_json leaves out the ranks. Take the "
            "records as its API gives them, with their responses"
        )
    slots: dict[float, list[int]] = {}
    seen: set[str] = set()
    for entry in value:
        name = text_of(entry, "value")
        if name in seen:
            raise RowError(f"key 'preference': {name!r} is ranked twice")
        seen.add(name)
        if name not in names and not re.fullmatch("response-[0-9]+", name):
            raise RowError(
                f"key 'preference': expected ranks of {', '.join(names)}, found one of {name!r}"
            )
        if name in names and entry.get("rank") is not None:
            slots.setdefault(number_of(entry, "rank"), []).append(names.index(name))
    if sum(map(len, slots.values())) < 2:
        raise RowError(
            f"key 'preference': expected ranks of at least two of {', '.join(names)}, found "
            f"{describe(value)} with fewer"
        )
    return tuple(tuple(sorted(slots[rank])) for rank in sorted(slots))


def _ratings(values: Mapping[str, Any], answers: Mapping[str, str]) -> tuple[int | None, ...]:
    """By slot, from the questions rating-0 ...; () where none was answered. Raises RowError."""
    ratings: list[int | None] = []
    for slot in range(len(answers)):
        value = values.get(f"rating-{slot}")
        if value is None:
            ratings.append(None)
            continue
        if isinstance(value, bool) or value not in range(1, 6):
            raise RowError(
                f"key 'rating-{slot}': expected a whole number from 1 to 5, found {describe(value)}"
            )
        ratings.append(int(value))
    return given_ratings(ratings)
