"""Argilla 2: records with the settings of their data set, and records with responses read back.

    argilla_settings.json   rg.Settings.from_json: fields, questions, guidelines, how many people a
    record
    argilla_records.json    dataset.records.from_json: {"id", "fields": {prompt, response-0,
    response-1 ...}, "metadata", "suggestions", "responses"}

Fields are text without markdown, which Argilla's page would show as HTML. The question `preference`
is a LabelQuestion (response-0, response-1, tie, skip) or, for rankings, a RankingQuestion;
`rating-0` ... and `comment` are optional questions.

Read are both forms in which responses come: by question, as the SDK's to_json writes them
({"preference": [{"value", "user_id"}]}), and by user, as the server's API gives them ([{"user_id",
"status", "values": {"preference": {"value"}}}]). A response with the status discarded is a
cancelled judgement, and a draft is none. The SDK's to_json leaves out the status, so all of its
responses count as submitted, and the ranks of rankings, which are refused for it: a list of names
does not say whether its order is the ranking's, or which of them were equal. The API's form has
both.
"""

import json
from collections.abc import Iterator, Mapping
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
from rlhf.labels.records import Export, Judgement, Task, Unreadable, Verdict, as_text
from rlhf.labels.targets.shared import (
    MODEL_VERSION,
    check_texts,
    most_answers,
    read_rows,
    suggestion,
)
from rlhf.process.wording import describe

RECORDS_FILE, SETTINGS_FILE = "argilla_records.json", "argilla_settings.json"

# ---- out ----


def write(export: Export, folder: Path) -> list[Path]:
    """Records and settings into `folder`; the files. Raises UserError for text that no encoding
    holds.
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
    answers = {answer_name(place): text for place, text in enumerate(task.shown)}
    # Argilla's metadata has no true and false
    swapped = {"swapped": str(task.swapped).lower()} if export.kind is LabelKind.pair else {}
    return {
        "id": task.id,
        "fields": {"prompt": as_text(task.prompt), **answers},
        "metadata": {"pair_id": task.id, "export_id": export.id, **swapped},
        "suggestions": _suggestions(task, export),
        "responses": {},
    }


def _suggestions(task: Task, export: Export) -> dict[str, Any]:
    found = suggestion(task) if export.prelabel else None
    if found is None:
        return {}
    names = [answer_name(place) for place in found.order]
    # the SDK wants a ranking's names alone, in their order
    value = names[0] if export.kind is LabelKind.pair else names
    return {"preference": {"value": value, "score": found.probability, "agent": MODEL_VERSION}}


def _settings(export: Export) -> dict[str, Any]:
    names = {answer_name(place): f"Answer {place + 1}" for place in range(most_answers(export))}
    answers = [{"value": name, "text": text} for name, text in names.items()]
    if export.kind is LabelKind.pair:
        options = [
            *answers,
            {"value": "tie", "text": "Equally good"},
            {"value": "skip", "text": "Can't say"},
        ]
        questions = [
            _question(
                "preference",
                export.title,
                {"type": "label_selection", "options": options},
                required=True,
            )
        ]
    else:
        questions = [
            _question(
                "preference", export.title, {"type": "ranking", "options": answers}, required=True
            )
        ]
    if export.ratings:
        stars = {"type": "rating", "options": [{"value": value} for value in range(1, 6)]}
        questions += [
            _question(f"rating-{place}", f"Rating of {text}", stars)
            for place, text in enumerate(names.values())
        ]
    if export.comments:
        questions.append(_question("comment", "Comment", {"type": "text", "use_markdown": False}))
    fewest = min((len(task.answers) for task in export.tasks), default=2)
    fields = [_field("prompt", "Prompt", required=True)]
    fields += [
        _field(name, text, required=place < fewest)
        for place, (name, text) in enumerate(names.items())
    ]
    return {
        "guidelines": export.instructions or None,
        "fields": fields,
        "questions": questions,
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": export.overlap},
    }


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
    """Of every user's response to every record. Raises UserError where the file as a whole can't be
    read.
    """
    return read_rows(path, _of_record)


def _of_record(row: Mapping[str, Any], place: str) -> Iterator[Judgement | Unreadable]:
    task = ""
    try:
        fields, metadata = mapping_of(row, "fields"), mapping_of(row, "metadata")
        named = next((source for source in (metadata, row) if source.get("pair_id")), None)
        task = (
            text_of(named, "pair_id")
            if named
            else text_of(row, "external_id" if row.get("external_id") else "id")
        )
        prompt, answers = (
            text_of(fields, "prompt", empty=True),
            answers_of({k: v for k, v in fields.items() if v is not None}, empty=True),
        )
        users = responses_by_user(row.get("responses") or {})
    except RowError as error:
        yield Unreadable(place, task, str(error))
        return
    for user, response in users.items():
        where = f"{place}, user {user}"
        try:
            found = _judgement(response, user, answers)
        except RowError as error:
            yield Unreadable(where, task, str(error))
            continue
        if found is not None:
            verdict, ranking, ratings, comment = found
            time = response.get("updated_at") or response.get("inserted_at")
            yield Judgement(
                task, user, verdict, ranking, ratings, comment, time=time, annotation=str(response.get("id") or ""), place=where,
                prompt=prompt, shown=tuple(answers.values()),
            )  # fmt: skip


Said = tuple[Verdict, tuple[tuple[int, ...], ...], tuple[int | None, ...], str]


def _judgement(response: Mapping[str, Any], user: str, answers: Mapping[str, str]) -> Said | None:
    """Verdict, ranking, ratings and comment of a response; None for a draft. Raises RowError."""
    status, values = optional_text(response, "status") or "submitted", response["values"]
    if status not in STATUSES:
        raise RowError(f"key 'status': expected one of {', '.join(STATUSES)}, found {status!r}")
    if status == "draft":
        return None
    ratings, comment = _ratings(values, answers), optional_text(values, "comment")
    if status == "discarded":
        return Verdict.cancelled, (), ratings, comment
    value = values.get("preference")
    if value is None:
        raise RowError(
            "submitted without an answer to the question 'preference', found answers to: "
            f"{', '.join(values) or 'none'}"
        )
    if isinstance(value, str):
        return _choice(value, list(answers)), (), ratings, comment
    return Verdict.ranked, _ranking(value, list(answers)), ratings, comment


def _choice(value: str, names: list[str]) -> Verdict:
    if value in ("tie", "skip"):
        return Verdict(value)
    if value not in names or len(names) != 2:
        raise RowError(
            f"key 'preference': expected one of {', '.join(names)}, tie and skip, found {value!r}"
        )
    return (Verdict.left, Verdict.right)[names.index(value)]


def _ranking(value: Any, names: list[str]) -> tuple[tuple[int, ...], ...]:
    """Places by rank; a rank of an answer that the record has not (another task's was longer) says
    nothing. Raises RowError.
    """
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise RowError(
            f"key 'preference': expected a list of {{value, rank}}, found {describe(value)}: "
            "Argilla's to_json leaves out the ranks. Take the "
            "records as its API gives them, with their responses"
        )
    places: dict[float, list[int]] = {}
    seen: set[str] = set()
    for one in value:
        name = text_of(one, "value")
        if name in seen:
            raise RowError(f"key 'preference': {name!r} is ranked twice")
        seen.add(name)
        if name not in names and not (
            name.startswith("response-") and name.removeprefix("response-").isdecimal()
        ):
            raise RowError(
                f"key 'preference': expected ranks of {', '.join(names)}, found one of {name!r}"
            )
        if name in names and one.get("rank") is not None:
            places.setdefault(number_of(one, "rank"), []).append(names.index(name))
    if sum(map(len, places.values())) < 2:
        raise RowError(
            f"key 'preference': expected ranks of at least two of {', '.join(names)}, found "
            f"{describe(value)} with fewer"
        )
    return tuple(tuple(sorted(places[rank])) for rank in sorted(places))


def _ratings(values: Mapping[str, Any], answers: Mapping[str, str]) -> tuple[int | None, ...]:
    """By place, from the questions rating-0 ...; () where none was answered. Raises RowError."""
    out: list[int | None] = []
    for place in range(len(answers)):
        value = values.get(f"rating-{place}")
        if value is not None and (isinstance(value, bool) or value not in range(1, 6)):
            raise RowError(
                f"key 'rating-{place}': expected a whole number from 1 to 5, found "
                f"{describe(value)}"
            )
        out.append(None if value is None else int(value))
    return tuple(out) if any(value is not None for value in out) else ()
