"""Argilla's records: a question `preference` about answers called response-0, response-1 ...

    {"fields": {prompt, response-0, response-1}, "metadata": {...}, "responses": {"preference":
    [{"value": "response-0", "user_id", "status"}]}}

Responses by user, as the server's API gives them ([{"user_id", "status", "values": {"preference":
{"value"}}}]), are read too. A label question's value is an answer's name (or tie), a ranking
question's a list of {value, rank}. Each submitted response gives pairs with the field `annotator`,
the record's metadata, and `position` (1 or 2: where the chosen answer was shown). A tie, a skip,
and a response that is not submitted give none: they are set aside with their reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.formats.base import (
    Format,
    Made,
    Several,
    Use,
    prompt_or_nothing,
    ranked,
)
from rlhf.data.formats.draft import Draft, Writer, own_columns_inside, shown_pair
from rlhf.data.formats.values import replaced, tools_outside
from rlhf.data.rows import (
    Row,
    RowError,
    annotator_of,
    number_of,
    optional_text,
    text_of,
    text_or_chat,
    value_of,
)
from rlhf.process.wording import describe, nearest

QUESTION = "preference"
STATUSES = ("submitted", "discarded", "draft")
# values of a label question that name no answer
_NO_ANSWER = ("tie", "both", "neither", "none", "equal", "skip", "same")

# ---- a record's parts ----


def answer_name(index: int) -> str:
    """The name of the answer at `index`, counted from 0: a field, and a value of the question."""
    return f"response-{index}"


def mapping_of(row: Row, key: str) -> Mapping[str, Any]:
    """An optional object; absent and null are an empty one. Raises RowError."""
    value = row.get(key) or {}
    if not isinstance(value, Mapping):
        raise RowError(f"key {key!r}: expected an object, found {describe(value)}")
    return value


def answers_of(fields: Mapping[str, Any], *, empty: bool = False) -> dict[str, str]:
    """The answers by their names: response-0, response-1 ..., in this order. Raises RowError;
    `empty` allows empty texts.
    """
    names = [name for name in fields if name.replace("_", "-").startswith("response-")]
    if len(names) < 2:
        raise RowError(
            "key 'fields': expected prompt, response-0 and response-1, found keys: "
            f"{', '.join(fields) or 'none'}"
        )
    in_order = sorted(names, key=lambda name: (len(name), name))
    return {name: text_of(fields, name, empty=empty) for name in in_order}


def responses_by_user(responses: Any) -> dict[str, dict[str, Any]]:
    """Each user's {"status", "values": {question: value}, and what else the response has}.

    `responses` are by question, as the SDK's to_json writes them ({"preference": [{"value",
    "user_id"}]}), or by user, as the server's API gives them ([{"user_id", "status", "values":
    {"preference": {"value"}}}]). Raises RowError.
    """
    if isinstance(responses, list):
        return _of_api(responses)
    return _of_sdk(mapping_of({"responses": responses}, "responses"))


def _user(answer: Mapping[str, Any]) -> str:
    return annotator_of(answer.get("user_id")).get("annotator", "")


def _of_api(responses: Sequence[Any]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for i, response in enumerate(responses):
        if not isinstance(response, Mapping):
            raise RowError(f"key 'responses[{i}]': expected an object, found {describe(response)}")
        answers = mapping_of(response, "values")
        values = {name: value_of(mapping_of(answers, name), "value") for name in answers}
        user = _user(response)
        if user in out:
            raise RowError(f"key 'responses[{i}]': a second response of user {user!r}")
        out[user] = {**response, "values": values}
    return out


def _of_sdk(responses: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for question, answers in responses.items():
        key = f"responses.{question}"
        if not isinstance(answers, list) or not all(isinstance(a, Mapping) for a in answers):
            raise RowError(
                f"key {key!r}: expected a list of objects with 'value' and 'user_id', found "
                f"{describe(answers)}"
            )
        for answer in answers:
            user, status = _user(answer), answer.get("status")
            response = out.setdefault(user, {"status": status, "values": {}})
            if question in response["values"]:
                raise RowError(f"key {key!r}: a second answer of user {user!r}")
            if status != response["status"]:
                raise RowError(
                    f"key {key!r}: user {user!r} has the statuses {response['status']} and {status}"
                )
            response["values"][question] = value_of(answer, "value")
    return out


# ---- the format: reading ----


def _by_question(responses: Any) -> Any:
    """The server's responses by user as `_of_sdk` reads them: by question, with null where a user
    did not answer one. Anything but a list as it stands. Raises RowError.
    """
    if not isinstance(responses, list):
        return responses
    users = list(_of_api(responses).values())
    questions = dict.fromkeys(name for user in users for name in user["values"]) or [QUESTION]
    out: dict[str, list[Any]] = {}
    for user in users:
        known: dict[str, Any] = {key: user[key] for key in ("user_id", "status") if key in user}
        for name in questions:
            answer = {**known, "value": user["values"].get(name)}
            out.setdefault(name, []).append(answer)
    return out


def _responses(responses: Mapping[str, Any]) -> list[Any]:
    """The responses to the question `preference`, or to the only one. Raises RowError."""
    if not responses:
        return []
    if QUESTION not in responses and len(responses) > 1:
        raise RowError(
            f"key 'responses': expected the question {QUESTION!r}, found the questions "
            f"{', '.join(responses)}"
        )
    given = responses.get(QUESTION, next(iter(responses.values())))
    if given is not None and not isinstance(given, list):
        raise RowError(f"key 'responses': expected a list of responses, found {describe(given)}")
    return given or []


def _ranked_answers(
    value: Any, shown: Mapping[str, str], key: str
) -> list[tuple[str, str, float]] | str:
    """(name, text, rank) of each ranked answer, or why there are none. The answer that a label
    question names ranks before all others. Raises RowError.
    """
    if isinstance(value, str):
        return _labelled_answers(value, shown, key)
    if not isinstance(value, list) or not value or not all(isinstance(v, Mapping) for v in value):
        raise RowError(
            f"key {key!r}: expected an answer's name or a list of {{value, rank}}, found "
            f"{describe(value)}"
        )
    ranks = {text_of(entry, "value"): number_of(entry, "rank") for entry in value}
    unknown = next((name for name in ranks if name not in shown), None)
    if unknown is not None:
        raise RowError(
            f"key {key!r}: expected ranks of {', '.join(shown)}, found one of {unknown!r}"
        )
    return [(name, text, ranks[name]) for name, text in shown.items() if name in ranks]


def _labelled_answers(
    value: str, shown: Mapping[str, str], key: str
) -> list[tuple[str, str, float]] | str:
    if value in shown:
        return [(name, text, 1.0 if name == value else 2.0) for name, text in shown.items()]
    if value.strip().lower() in _NO_ANSWER:
        return f"a tie or a skip: {value!r} was chosen"
    raise RowError(
        f"key {key!r}: expected one of {', '.join(shown)} (or tie), found {value!r}; "
        f"nearest: {nearest(value, list(shown))!r}"
    )


def _pairs_argilla(row: Row) -> Several:
    fields, out = value_of(row, "fields"), Several()
    if not isinstance(fields, Mapping):
        raise RowError(f"key 'fields': expected an object with the texts, found {describe(fields)}")
    metadata = mapping_of(row, "metadata")
    given: dict[str, Any] = {"responses": _by_question(row.get("responses"))}
    responses = mapping_of(given, "responses")
    shown, prompt = answers_of(fields), prompt_or_nothing(fields, "prompt")
    if QUESTION in responses:
        others = [question for question in responses if question != QUESTION]
        out.notes += [f"responses.{question} is not read" for question in others]
    for i, response in enumerate(_responses(responses)):
        key = f"responses[{i}]"
        if not isinstance(response, Mapping):
            raise RowError(
                f"key {key!r}: expected an object with 'value', found {describe(response)}"
            )
        who = annotator_of(response.get("user_id"))
        several = _pairs_of_response(response, prompt, shown, {**metadata, **who}, key)
        name = f"response {i + 1}"
        if who:
            name += f" by {who['annotator']}"
        for made in several.pairs:
            out.pairs.append(made)
            out.notes += replaced(metadata, made.fields)
        out.set_aside += [f"{name}: {reason}" for reason in several.set_aside]
    if not out.pairs and not out.set_aside:
        hint = " (a suggestion alone is no judgement)" if row.get("suggestions") else ""
        out.set_aside.append(f"no response yet{hint}")
    return out


def _pairs_of_response(
    response: Mapping[str, Any],
    prompt: Any,
    shown: Mapping[str, str],
    extra: Mapping[str, Any],
    key: str,
) -> Several:
    """The pairs of one response, with the fields `extra`. Raises RowError."""
    status, value = optional_text(response, "status") or "submitted", response.get("value")
    if status != "submitted":
        return Several(set_aside=[status])
    if value is None:
        return Several(set_aside=["without a value"])
    answers = _ranked_answers(value, shown, f"{key}.value")
    if isinstance(answers, str):
        return Several(set_aside=[answers])
    several = ranked(prompt, answers, extra)
    if not isinstance(value, str):
        return several
    # the answers that a label question doesn't name are not compared, so they are no ties and the
    # ranks say nothing
    if not several.pairs:
        return Several(set_aside=["the answers are the same text"])
    return Several([_without_ranks(made) for made in several.pairs])


def _without_ranks(made: Made) -> Made:
    ranks = ("rank_chosen", "rank_rejected")
    return Made(made.value, {key: v for key, v in made.fields.items() if key not in ranks})


# ---- the format: writing ----


def _write_pair(draft: Draft) -> list[dict[str, Any]]:
    draft.lose("margin", "a preference question has none")
    first, second, position = shown_pair(draft)
    who, record = draft.take("annotator"), draft.take("pair_id")
    ranks = [draft.take(name) for name in ("rank_chosen", "rank_rejected")]
    if any(rank is not None for rank in ranks):
        draft.notes.append("ranks become a choice of one answer")
    response = {"value": answer_name(position - 1)}
    if who is not None:
        response["user_id"] = who
    response["status"] = "submitted"
    metadata = own_columns_inside(draft)
    if record is not None:
        metadata["pair_id"] = record
    prompt = draft.columns["prompt"]
    out: dict[str, Any] = {
        "fields": {"prompt": prompt, answer_name(0): first, answer_name(1): second}
    }
    if metadata:
        out["metadata"] = metadata
    return [{**out, "responses": {QUESTION: [response]}}]


# of a response as the server's API gives it
_OF_RESPONSE = ("id", "record_id", "user_id", "status", "inserted_at", "updated_at")
ARGILLA = Format(
    "argilla",
    ("fields",),
    "fields of {prompt, response-0, response-1}, responses of {preference: [{value, user_id}]}",
    pairs=_pairs_argilla,
    prompt=lambda row: text_or_chat(value_of(row, "fields"), "prompt"),
    test=lambda row: isinstance(row["fields"], Mapping),
    flatten=tools_outside("fields"),
    read_inside=(
        "metadata.*",
        "fields.prompt",
        "fields.response?*",
        *(f"responses.*[].{key}" for key in ("value", "user_id", "status")),
        "responses[].values.*.value",
        *(f"responses[].{key}" for key in _OF_RESPONSE),
    ),
    ignored=("suggestions", "vectors"),
    consumed=(
        "fields",
        "id",
        "metadata",
        "suggestions",
        "responses",
        "vectors",
        "status",
        "_server_id",
    ),
)
WRITE_ARGILLA: dict[Use, Writer] = {Use.preference: _write_pair}
