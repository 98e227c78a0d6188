"""Label Studio's tasks and annotations: pairwise comparisons and rankings (the Ranker).

    {"data": {prompt, answer1, answer2, swapped}, "annotations": [{"completed_by", "was_cancelled",
    "lead_time", "result": [{"type": "pairwise", "value": {"selected": "left"}}]}]}
    {"data": {prompt, items: [{id, title, body}]}, "annotations": [{..., "result": [{"type":
    "ranker", "value": {"ranker": {"rank": [id, ...]}}}]}]}

Each annotation gives a pair of its own (a ranking several), with the fields `annotator` and
`position` (1 or 2: where the chosen answer was shown). A tie, a skip, a cancelled or missing
annotation is no training pair: it is set aside with its reason.

`swapped` says that answer1 is not the first of the answers as they were generated. The selected
side is the side as shown, so it decides alone, and `swapped` stays a field.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.formats.base import Format, Several, Use, of_two, prompt_or_nothing, ranked
from rlhf.data.formats.draft import Draft, Writer, own_columns_inside, ranks_of, shown_pair
from rlhf.data.formats.values import replaced, tools_outside
from rlhf.data.rows import Chat, Row, RowError, annotator_of, text_of, text_or_chat, value_of
from rlhf.process.wording import describe

SIDES = ("answer1", "answer2")  # keys of the two answers in a task's data, left and right
PAIR, RANK, LIST = "pw", "rank", "results"  # names of the controls
# other names under which the two answers may stand
_ANSWER_NAMES = (SIDES, ("response_a", "response_b"), ("answer_a", "answer_b"), ("text1", "text2"))


class Result(NamedTuple):
    """One result of an annotation."""

    type: str  # pairwise, ranker, choices, rating, textarea ...
    value: Mapping[str, Any]
    key: str  # for messages: annotations[0].result[1]
    target: Any = None  # to_name: the object that it is about


# ---- a task's parts ----


def data_of(row: Row) -> Mapping[str, Any]:
    """A task's data. Raises RowError."""
    data = value_of(row, "data")
    if not isinstance(data, Mapping):
        raise RowError(f"key 'data': expected an object with the task, found {describe(data)}")
    return data


def annotations_of(row: Row) -> list[Mapping[str, Any]]:
    """A task's annotations; an empty list where it has none. Raises RowError."""
    annotations = row.get("annotations") or []
    if not isinstance(annotations, list) or not all(isinstance(a, Mapping) for a in annotations):
        raise RowError(
            f"key 'annotations': expected a list of objects, found {describe(annotations)}"
        )
    return annotations


def results_of(annotation: Mapping[str, Any], key: str) -> list[Result]:
    """The results of an annotation, `key` being its own key. Raises RowError."""
    results = annotation.get("result") or []
    if not isinstance(results, list):
        raise RowError(f"key '{key}.result': expected a list, found {describe(results)}")
    out = []
    for i, result in enumerate(results):
        where = f"{key}.result[{i}]"
        if not isinstance(result, Mapping) or not isinstance(result.get("value"), Mapping):
            raise RowError(
                f"key {where!r}: expected an object with 'type' and 'value', found "
                f"{describe(result)}"
            )
        kind = str(result.get("type"))
        out.append(Result(kind, result["value"], where, result.get("to_name")))
    return out


def items_of(data: Mapping[str, Any], *, empty: bool = False) -> dict[str, str]:
    """The texts to rank by their ids, in the order as shown. Raises RowError; `empty` allows empty
    texts.
    """
    items = value_of(data, "items")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise RowError(
            "key 'data.items': expected a list of objects with 'id' and 'body', found "
            f"{describe(items)}"
        )
    return {str(value_of(item, "id")): text_of(item, "body", empty=empty) for item in items}


# ---- what the results of an annotation say ----


def of_type(results: Sequence[Result], kind: str) -> list[Result]:
    return [result for result in results if result.type == kind]


def choices_of(results: Sequence[Result]) -> list[str]:
    """What was chosen beside the answers, such as a tie: the only choice of each result of the type
    choices. Raises RowError.
    """
    out = []
    for result in of_type(results, "choices"):
        choices = result.value.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], str):
            raise RowError(
                f"key '{result.key}.value.choices': expected one choice, found {describe(choices)}"
            )
        out.append(choices[0])
    return out


def sides_of(results: Sequence[Result]) -> list[int]:
    """The sides that were selected, without repeats: 1 for left, 2 for right. Raises RowError."""
    selected = []
    for result in of_type(results, "pairwise"):
        side = result.value.get("selected")
        if side not in ("left", "right"):
            raise RowError(
                f"key '{result.key}.value.selected': expected left or right, found {describe(side)}"
            )
        selected.append(1 if side == "left" else 2)
    return list(dict.fromkeys(selected))


def rank_of(result: Result) -> list[str]:
    """The ids of a ranking from the best to the worst: {"ranker": {"rank": [...]}}, whatever its
    only list is called, or a bare list. Raises RowError.
    """
    order = result.value.get("ranker")
    if isinstance(order, Mapping):
        lists = [ids for ids in order.values() if ids]
        if len(lists) > 1:
            raise RowError(
                f"key '{result.key}.value.ranker': expected one ranked list, found the lists "
                f"{', '.join(map(str, order))}"
            )
        order = lists[0] if lists else order.get("rank")
    if not isinstance(order, list) or not all(isinstance(name, (str, int)) for name in order):
        raise RowError(
            f"key '{result.key}.value.ranker': expected a list of ids from the best to the worst, "
            f"found {describe(order)}"
        )
    return [str(name) for name in order]


def last_ranking(results: Sequence[Result]) -> Result | None:
    """The last result of the type ranker, which is the one that counts; None without any."""
    return next(reversed(of_type(results, "ranker")), None)


# ---- tasks and results to write ----


def pairwise_result(position: int, target: str = PAIR) -> dict[str, Any]:
    """A result that selects the answer at `position`: 1 (left) or 2 (right)."""
    value = {"selected": "left" if position == 1 else "right"}
    return {"from_name": PAIR, "to_name": target, "type": "pairwise", "value": value}


def ranker_result(order: Sequence[str]) -> dict[str, Any]:
    """A result that ranks items, `order` being their ids from the best to the worst."""
    value = {"ranker": {RANK: list(order)}}
    return {"from_name": RANK, "to_name": LIST, "type": "ranker", "value": value}


def ranker_items(texts: Mapping[str, str]) -> list[dict[str, str]]:
    """A task's items to rank, from texts by id."""
    return [{"id": name, "title": "", "body": text} for name, text in texts.items()]


# ---- the formats: reading ----


def _prompt_of_task(row: Row) -> str | Chat:
    return text_or_chat(data_of(row), "prompt")


class _Judged(NamedTuple):
    """An annotation that is no skip."""

    annotation: Mapping[str, Any]
    results: list[Result]
    who: dict[str, str]  # the field annotator, where known
    name: str  # for messages: annotation 1 by NAME


def _judged(row: Row, out: Several) -> Iterator[_Judged]:
    """Every annotation that is no skip; skips are set aside in `out`. Raises RowError."""
    for i, annotation in enumerate(annotations_of(row)):
        who = annotator_of(annotation.get("completed_by"))
        name = f"annotation {i + 1}"
        if who:
            name += f" by {who['annotator']}"
        if annotation.get("was_cancelled"):
            out.set_aside.append(f"{name}: skipped (was_cancelled)")
        else:
            yield _Judged(annotation, results_of(annotation, f"annotations[{i}]"), who, name)
    if not annotations_of(row):
        out.set_aside.append("not annotated yet")


def _side(results: Sequence[Result]) -> int | str:
    """1 (left) or 2 (right), or why there is none. Raises RowError."""
    selected, choices = sides_of(results), choices_of(results)
    if choices and selected:
        return f"a side was selected and {choices[0]!r} chosen too"
    if choices:
        return f"a tie or a skip: {choices[0]!r} was chosen"
    if not selected:
        return "no side was selected"
    if len(selected) > 1:
        return "both sides were selected"
    return selected[0]


def _pairs_label_studio(row: Row) -> Several:
    data, out = data_of(row), Several()
    names = next((names for names in _ANSWER_NAMES if data.keys() >= set(names)), SIDES)
    first, second = text_of(data, names[0]), text_of(data, names[1])
    prompt = prompt_or_nothing(data, "prompt")
    extra = {key: value for key, value in data.items() if key not in ("prompt", *names)}
    for judged in _judged(row, out):
        side = _side(judged.results)
        if isinstance(side, str):
            out.set_aside.append(f"{judged.name}: {side}")
            continue
        fields = {**extra, **judged.who}
        if judged.annotation.get("lead_time") is not None:
            fields["lead_time"] = judged.annotation["lead_time"]
        out.pairs.append(of_two(data, prompt, first, second, side, fields))
        out.notes += replaced(extra, out.pairs[-1].fields)
    return out


def _pairs_ranker(row: Row) -> Several:
    data, out = data_of(row), Several()
    items, prompt = items_of(data), prompt_or_nothing(data, "prompt")
    extra = {key: value for key, value in data.items() if key not in ("prompt", "items")}
    for judged in _judged(row, out):
        # the editor sends an order with every annotation, also where nothing was moved
        if choices := choices_of(judged.results):
            out.set_aside.append(f"{judged.name}: a tie or a skip: {choices[0]!r} was chosen")
            continue
        ranking = last_ranking(judged.results)
        if ranking is None:
            out.set_aside.append(f"{judged.name}: nothing was ranked")
            continue
        order = _known_order(ranking, items)
        ranks = {name: float(rank) for rank, name in enumerate(order, start=1)}
        shown = [(name, items[name], ranks[name]) for name in items if name in ranks]
        several = ranked(prompt, shown, {**extra, **judged.who})
        out.pairs += several.pairs
        for made in several.pairs:
            out.notes += replaced(extra, made.fields)
        reasons = [f"{name} was not ranked" for name in items if name not in ranks]
        reasons += several.set_aside
        if len(shown) < 2:
            reasons.append("fewer than two answers were ranked")
        out.set_aside += [f"{judged.name}: {reason}" for reason in reasons]
    return out


def _known_order(ranking: Result, items: Mapping[str, str]) -> list[str]:
    order = rank_of(ranking)
    if len(set(order)) != len(order) or not set(order) <= set(items):
        raise RowError(
            f"key '{ranking.key}.value.ranker': expected each of the ids {', '.join(items)} "
            f"at most once, found {', '.join(order)}"
        )
    return order


# ---- the formats: writing ----


def _annotation(draft: Draft, result: Mapping[str, Any]) -> dict[str, Any]:
    """A submitted annotation with the row's annotator and lead_time."""
    who, seconds = draft.take("annotator"), draft.take("lead_time")
    results = [{"id": "1", "origin": "manual", **result}]
    out: dict[str, Any] = {"was_cancelled": False, "result": results}
    if who is not None:
        out["completed_by"] = _user_id(str(who))
    if seconds is not None:
        out["lead_time"] = seconds
    return out


def _user_id(name: str) -> int | str:
    """A number where it reads back as the same text, as Label Studio's users have them."""
    if name.isascii() and name.isdigit() and str(int(name)) == name:
        return int(name)
    return name


def _write_pair(draft: Draft) -> list[dict[str, Any]]:
    first, second, position = shown_pair(draft)
    annotation = _annotation(draft, pairwise_result(position))
    swapped = draft.take("swapped", position == 2)
    own = own_columns_inside(draft, *SIDES, "items")
    data = {
        **own,
        "prompt": draft.columns["prompt"],
        SIDES[0]: first,
        SIDES[1]: second,
        "swapped": swapped,
        **draft.margin(),
    }
    return [{"data": data, "annotations": [annotation]}]


def _write_ranking(draft: Draft) -> list[dict[str, Any]]:
    draft.lose("margin", "a ranking has none")
    first, second, position = shown_pair(draft)
    if ranks_of(draft) != (1, 2):
        draft.notes.append("ranks become 1 and 2")
    order = ["m1", "m2"] if position == 1 else ["m2", "m1"]
    annotation = _annotation(draft, ranker_result(order))
    own = own_columns_inside(draft, "items")
    data = {**own, "prompt": draft.columns["prompt"]}
    data["items"] = ranker_items({"m1": first, "m2": second})
    return [{"data": data, "annotations": [annotation]}]


_TASK_KEYS = ("data", "id", "annotations", "predictions")
# who made what, when and in which project says nothing about a pair
_BOOKKEEPING = ("id", "unique_id", "*created*", "*updated*", "task", "project", "import_id")
_READ = ("result_count", "was_cancelled", "lead_time")
_USER = ("email", "username", "id", "*_name")
_RESULT = ("id", "from_name", "to_name", "type", "origin")
_VALUE = ("selected", "choices", "text", "ranker.*")
_INSIDE = (
    "data.*",
    *(f"annotations[].{key}" for key in (*_BOOKKEEPING, *_READ)),
    *(f"annotations[].completed_by.{key}" for key in _USER),
    *(f"annotations[].result[].{key}" for key in _RESULT),
    *(f"annotations[].result[].value.{key}" for key in _VALUE),
)
LABEL_STUDIO = Format(
    "label_studio",
    ("data",),
    "data of {prompt, answer1, answer2}, annotations with results of type pairwise",
    pairs=_pairs_label_studio,
    prompt=_prompt_of_task,
    test=lambda row: isinstance(row["data"], Mapping) and "items" not in row["data"],
    flatten=tools_outside("data"),
    consumed=_TASK_KEYS,
    read_inside=_INSIDE,
    ignored=("predictions",),
)
LABEL_STUDIO_RANKER = Format(
    "label_studio_ranker",
    ("data",),
    "data of {prompt, items of {id, title, body}}, annotations with results of type ranker",
    pairs=_pairs_ranker,
    prompt=_prompt_of_task,
    test=lambda row: isinstance(row["data"], Mapping) and "items" in row["data"],
    flatten=tools_outside("data"),
    consumed=_TASK_KEYS,
    read_inside=(*(f"data.items[].{key}" for key in ("id", "title", "body", "html")), *_INSIDE),
    ignored=("predictions",),
)
WRITE_LABEL_STUDIO: dict[Use, Writer] = {Use.preference: _write_pair}
WRITE_LABEL_STUDIO_RANKER: dict[Use, Writer] = {Use.preference: _write_ranking}
