"""What annotation tools give back: Label Studio (pairwise and ranker), Argilla, and plain sheets
for people without a tool.

A tie, a skip, a cancelled or missing annotation is no training pair: it is set aside with its
reason. Each annotation gives a pair of its own, with the fields `annotator`, `pair_id` where the
tool has one, and `position` (1 or 2: where the chosen answer was shown).

Label Studio's `swapped` says that answer1 is not the first of the answers as they were generated;
the selected side is the side as shown, so it decides alone, and `swapped` stays a field.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.data.formats.base import Format, Made, Several, of_two, prompt_or_nothing, ranked
from rlhf.data.rows import (
    Chat,
    Row,
    RowError,
    number_of,
    optional_text,
    text_of,
    text_or_chat,
    value_of,
)
from rlhf.process.wording import describe, nearest

# ---- Label Studio ----


def data_of(row: Row) -> Mapping[str, Any]:
    """A task's data. Raises RowError."""
    data = value_of(row, "data")
    if not isinstance(data, Mapping):
        raise RowError(f"key 'data': expected an object with the task, found {describe(data)}")
    return data


def _prompt_of_task(row: Row) -> str | Chat:
    return text_or_chat(data_of(row), "prompt")


def annotations_of(row: Row) -> list[Mapping[str, Any]]:
    """A task's annotations; none is an empty list. Raises RowError."""
    annotations = row.get("annotations") or []
    if not isinstance(annotations, list) or not all(isinstance(a, Mapping) for a in annotations):
        raise RowError(
            f"key 'annotations': expected a list of objects, found {describe(annotations)}"
        )
    return annotations


def _judging(
    row: Row, out: Several
) -> Iterator[tuple[Mapping[str, Any], dict[str, str], str, str]]:
    """(annotation, who, how messages call it, its place) of every annotation that is no skip; skips
    are set aside in `out`. Raises RowError.
    """
    for i, annotation in enumerate(annotations_of(row)):
        who = annotator_of(annotation.get("completed_by"))
        said = f"annotation {i + 1}{' by ' + who['annotator'] if who else ''}"
        if annotation.get("was_cancelled"):
            out.aside.append(f"{said}: skipped (was_cancelled)")
        else:
            yield annotation, who, said, f"annotations[{i}]"


def annotator_of(value: Any) -> dict[str, str]:
    """Who judged: a number, a name, or an object with one of them."""
    if isinstance(value, Mapping):
        value = value.get("email") or value.get("username") or value.get("id")
    return {} if value is None else {"annotator": str(value)}


def results_of(
    annotation: Mapping[str, Any], place: str
) -> list[tuple[str, Mapping[str, Any], str]]:
    """(type, value, place) of an annotation's results. Raises RowError."""
    results = annotation.get("result") or []
    if not isinstance(results, list):
        raise RowError(f"key '{place}.result': expected a list, found {describe(results)}")
    out = []
    for i, result in enumerate(results):
        where = f"{place}.result[{i}]"
        if not isinstance(result, Mapping) or not isinstance(result.get("value"), Mapping):
            raise RowError(
                f"key {where!r}: expected an object with 'type' and 'value', found "
                f"{describe(result)}"
            )
        out.append((str(result.get("type")), result["value"], where))
    return out


def choice_of(value: Mapping[str, Any], place: str) -> str:
    """The one choice of a result of the type choices. Raises RowError."""
    choices = value.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], str):
        raise RowError(
            f"key '{place}.value.choices': expected one choice, found {describe(choices)}"
        )
    return choices[0]


def choices_of(results: list[tuple[str, Mapping[str, Any], str]]) -> list[str]:
    """What was chosen beside the answers, such as a tie. Raises RowError."""
    return [choice_of(value, place) for kind, value, place in results if kind == "choices"]


def sides_of(results: list[tuple[str, Mapping[str, Any], str]]) -> list[int]:
    """The sides that were selected, without repeats: 1 for left, 2 for right. Raises RowError."""
    selected = []
    for kind, value, place in results:
        if kind == "pairwise":
            side = value.get("selected")
            if side not in ("left", "right"):
                raise RowError(
                    f"key '{place}.value.selected': expected left or right, found {describe(side)}"
                )
            selected.append(1 if side == "left" else 2)
    return list(dict.fromkeys(selected))


def _side(results: list[tuple[str, Mapping[str, Any], str]]) -> int | str:
    """1 (left) or 2 (right), or why there is none. Raises RowError."""
    selected, choices = sides_of(results), choices_of(results)
    if choices and selected:
        return f"a side was selected and {choices[0]!r} chosen too"
    if choices:
        return f"a tie or a skip: {choices[0]!r} was chosen"
    if not selected:
        return "no side was selected"
    return selected[0] if len(selected) == 1 else "both sides were selected"


def _task_fields(data: Mapping[str, Any], shown: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in shown}


def _pairs_label_studio(row: Row) -> Several:
    data, out = data_of(row), Several()
    names = next((n for n in _ANSWER_NAMES if all(k in data for k in n)), _ANSWER_NAMES[0])
    first, second = text_of(data, names[0]), text_of(data, names[1])
    prompt = prompt_or_nothing(data, "prompt")
    extra = _task_fields(data, ("prompt", *names))
    for annotation, who, said, place in _judging(row, out):
        side = _side(results_of(annotation, place))
        if isinstance(side, str):
            out.aside.append(f"{said}: {side}")
            continue
        seconds = (
            {"lead_time": annotation["lead_time"]}
            if annotation.get("lead_time") is not None
            else {}
        )
        out.pairs.append(of_two(data, prompt, first, second, side, {**extra, **who, **seconds}))
    if not out.pairs and not out.aside:
        out.aside.append("not annotated yet")
    return out


_ANSWER_NAMES = (
    ("answer1", "answer2"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("text1", "text2"),
)
LABEL_STUDIO = Format(
    "label_studio",
    ("data",),
    "data of {prompt, answer1, answer2}, annotations with results of type pairwise",
    pairs=_pairs_label_studio,
    prompt=_prompt_of_task,
    test=lambda row: isinstance(row["data"], Mapping) and "items" not in row["data"],
    consumed=("data", "id", "annotations", "predictions"),
)


def rank_of(value: Mapping[str, Any], place: str) -> list[str]:
    """Ids from the best to the worst: {"ranker": {"rank": [...]}}, whatever the one list is called,
    or a bare list. Raises RowError.
    """
    found = value.get("ranker")
    if isinstance(found, Mapping):
        lists = list(found.values())
        if len(lists) != 1 and "rank" not in found:
            raise RowError(
                f"key '{place}.value.ranker': expected one ranked list, found the lists "
                f"{', '.join(map(str, found))}"
            )
        found = found.get("rank", lists[0] if lists else None)
    if not isinstance(found, list) or not all(isinstance(one, (str, int)) for one in found):
        raise RowError(
            f"key '{place}.value.ranker': expected a list of ids from the best to the worst, "
            f"found {describe(found)}"
        )
    return [str(one) for one in found]


def items_of(data: Mapping[str, Any], *, empty: bool = False) -> dict[str, str]:
    """Texts to rank by their ids, in the order as shown. Raises RowError."""
    items = value_of(data, "items")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise RowError(
            "key 'data.items': expected a list of objects with 'id' and 'body', found "
            f"{describe(items)}"
        )
    return {str(value_of(item, "id")): text_of(item, "body", empty=empty) for item in items}


def _pairs_ranker(row: Row) -> Several:
    data, out = data_of(row), Several()
    items, prompt = items_of(data), prompt_or_nothing(data, "prompt")
    extra = _task_fields(data, ("prompt", "items"))
    for annotation, who, said, place in _judging(row, out):
        results = results_of(annotation, place)
        # the editor sends an order with every annotation, also where nothing was moved
        if choices := choices_of(results):
            out.aside.append(f"{said}: a tie or a skip: {choices[0]!r} was chosen")
            continue
        lists = [(value, where) for kind, value, where in results if kind == "ranker"]
        if not lists:
            out.aside.append(f"{said}: nothing was ranked")
            continue
        order = rank_of(*lists[-1])
        unknown = next((one for one in order if one not in items), None)
        if unknown is not None or len(set(order)) != len(order):
            raise RowError(
                f"key '{lists[-1][1]}.value.ranker': expected each of the ids {', '.join(items)} "
                f"at most once, found {', '.join(order)}"
            )
        out.aside += [f"{said}: {one} was not ranked" for one in items if one not in order]
        shown = [(one, items[one], float(order.index(one) + 1)) for one in items if one in order]
        several = ranked(prompt, shown, {**extra, **who})
        out.pairs += several.pairs
        out.aside += [f"{said}: {reason}" for reason in several.aside]
        if len(shown) < 2:
            out.aside.append(f"{said}: fewer than two answers were ranked")
    if not out.pairs and not out.aside:
        out.aside.append("not annotated yet")
    return out


LABEL_STUDIO_RANKER = Format(
    "label_studio_ranker",
    ("data",),
    "data of {prompt, items of {id, title, body}}, annotations with results of type ranker",
    pairs=_pairs_ranker,
    prompt=_prompt_of_task,
    test=lambda row: isinstance(row["data"], Mapping) and "items" in row["data"],
    consumed=("data", "id", "annotations", "predictions"),
)

# ---- Argilla ----


def answers_of(fields: Mapping[str, Any], *, empty: bool = False) -> dict[str, str]:
    """The answers by their names: response-0, response-1 ..., in this order. Raises RowError."""
    names = sorted(
        (k for k in fields if k.replace("_", "-").startswith("response-")),
        key=lambda k: (len(k), k),
    )
    if len(names) < 2:
        raise RowError(
            "key 'fields': expected prompt, response-0 and response-1, found keys: "
            f"{', '.join(fields) or 'none'}"
        )
    return {name: text_of(fields, name, empty=empty) for name in names}


def _question(responses: Mapping[str, Any]) -> list[Any]:
    """The responses to the question `preference`, or to the only one. Raises RowError."""
    if not responses:
        return []
    if "preference" not in responses and len(responses) > 1:
        raise RowError(
            "key 'responses': expected the question 'preference', found the questions "
            f"{', '.join(responses)}"
        )
    found = responses.get("preference", next(iter(responses.values())))
    if found is not None and not isinstance(found, list):
        raise RowError(f"key 'responses': expected a list of responses, found {describe(found)}")
    return found or []


def _argilla_ranks(
    value: Any, shown: Mapping[str, str], place: str
) -> list[tuple[str, str, float]] | str:
    """(name, text, rank) of each ranked answer; why there are none. The chosen one of a label
    question stands before all others.
    """
    if isinstance(value, str):
        if value in shown:
            return [(name, text, 1.0 if name == value else 2.0) for name, text in shown.items()]
        if value.strip().lower() in ("tie", "both", "neither", "none", "equal", "skip", "same"):
            return f"a tie or a skip: {value!r} was chosen"
        raise RowError(
            f"key {place!r}: expected one of {', '.join(shown)} (or tie), found {value!r}; "
            f"nearest: {nearest(value, list(shown))!r}"
        )
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        out = [(text_of(one, "value"), number_of(one, "rank")) for one in value]
        unknown = next((name for name, _ in out if name not in shown), None)
        if unknown is not None:
            raise RowError(
                f"key {place!r}: expected ranks of {', '.join(shown)}, found one of {unknown!r}"
            )
        ranks = dict(out)
        return [(name, text, ranks[name]) for name, text in shown.items() if name in ranks]
    raise RowError(
        f"key {place!r}: expected an answer's name or a list of {{value, rank}}, found "
        f"{describe(value)}"
    )


def _pairs_argilla(row: Row) -> Several:
    fields, out = value_of(row, "fields"), Several()
    if not isinstance(fields, Mapping):
        raise RowError(f"key 'fields': expected an object with the texts, found {describe(fields)}")
    responses, metadata = row.get("responses") or {}, row.get("metadata") or {}
    if not isinstance(responses, Mapping) or not isinstance(metadata, Mapping):
        raise RowError("keys 'responses' and 'metadata': expected objects, found something else")
    shown, prompt = answers_of(fields), prompt_or_nothing(fields, "prompt")
    for i, response in enumerate(_question(responses)):
        if not isinstance(response, Mapping):
            raise RowError(
                f"key 'responses[{i}]': expected an object with 'value', found {describe(response)}"
            )
        who = annotator_of(response.get("user_id"))
        said = f"response {i + 1}{' by ' + who['annotator'] if who else ''}"
        status = optional_text(response, "status") or "submitted"
        if status != "submitted" or response.get("value") is None:
            out.aside.append(f"{said}: {status if status != 'submitted' else 'without a value'}")
            continue
        found = _argilla_ranks(response["value"], shown, f"responses[{i}].value")
        if isinstance(found, str):
            out.aside.append(f"{said}: {found}")
            continue
        label = isinstance(response["value"], str)
        several = ranked(prompt, found, {**metadata, **who})
        out.pairs += [_unranked(made) for made in several.pairs] if label else several.pairs
        # Of a label question the answers that lost are not compared with each other, so they are no
        # ties.
        out.aside += [] if label else [f"{said}: {reason}" for reason in several.aside]
        if label and not several.pairs:
            out.aside.append(f"{said}: the answers are the same text")
    if not out.pairs and not out.aside:
        hint = " (a suggestion alone is no judgement)" if row.get("suggestions") else ""
        out.aside.append(f"no response yet{hint}")
    return out


def _unranked(made: Made) -> Made:
    return Made(
        made.value,
        {
            key: value
            for key, value in made.fields.items()
            if key not in ("rank_chosen", "rank_rejected")
        },
    )


ARGILLA = Format(
    "argilla",
    ("fields",),
    "fields of {prompt, response-0, response-1}, responses of {preference: [{value, user_id}]}",
    pairs=_pairs_argilla,
    prompt=lambda row: text_or_chat(value_of(row, "fields"), "prompt"),
    test=lambda row: isinstance(row["fields"], Mapping),
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

# ---- sheets ----


def _pairs_sheet(row: Row) -> Several:
    said = optional_text(row, "preference").strip().lower()
    if not said:
        return Several(aside=["not labelled yet"])
    if said in ("tie", "skip"):
        return Several(aside=[f"a {said}"])
    if said not in ("a", "b"):
        raise RowError(
            f"key 'preference': expected a, b, tie or skip, found {describe(row['preference'])}"
        )
    prompt = prompt_or_nothing(row, "prompt")
    return Several(
        [
            of_two(
                row,
                prompt,
                text_of(row, "response_a"),
                text_of(row, "response_b"),
                1 if said == "a" else 2,
            )
        ]
    )


LABEL_SHEET = Format(
    "label_sheet",
    ("prompt", "response_a", "response_b", "preference"),
    "prompt, response_a, response_b, preference (a, b, tie, skip; and pair_id, annotator, comment)",
    pairs=_pairs_sheet,
    prompt=lambda row: text_or_chat(row, "prompt"),
    consumed=("prompt",),
    answers=("response_a", "response_b", "preference", "margin"),
)
