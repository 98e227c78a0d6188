"""Dictionaries, and lists of steps, as rows of a form: a name and a value, or a name and options.

A row's fields are named ``<option>#<number>`` (the name), ``<option>#<number>.value``, or
``<option>#<number>.<option of the item>``.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.options import MISSING
from rlhf.board.forms.fields import Field, Scalar, Widget, step_fields
from rlhf.board.forms.values import Problem, last, plain, read, scalar, shown, texts
from rlhf.cli.writing import WORDS

VALUE = "value"  # the field of a table's row
STEP = "step"  # the key of a step's name, as data.pipeline has it
ROWS = (Widget.table, Widget.items, Widget.steps)
_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}", re.ASCII)
_MOST = 200  # rows of one dictionary

Sent = Mapping[str, Sequence[str]]


@dataclass
class Row:
    """One row as texts; `fixed`: a preset gives it, and no override can take it away."""

    name: str
    texts: dict[str, list[str]]
    fixed: bool = False
    problems: dict[str, Problem] = field(default_factory=dict)  # by field; "" is the name

    @property
    def is_blank(self) -> bool:
        """Whether nothing was written into it."""
        return not self.name.strip()


def fields_of_row(of: Field, name: str) -> tuple[Field, ...]:
    """The fields beside a row's name."""
    if of.widget is Widget.items:
        return of.inner
    if of.widget is Widget.steps:
        return step_fields(name) if name in of.choices else ()
    return (Field(VALUE, Widget.text, of.scalar),)


# ---- from values ----


def rows_of(of: Field, value: Any) -> list[Row]:
    """The rows of a value that presets give."""
    if of.widget is Widget.steps:
        return [_step_row(of, step) for step in value]
    if of.widget is Widget.items:
        return [Row(name, _item_texts(of.inner, item), fixed=True) for name, item in value.items()]
    return [
        Row(name, {VALUE: [shown(inner, of.scalar)]}, fixed=True)
        for name, inner in _flat(of, value)
    ]


def blank(of: Field) -> Row:
    """A row that nothing was written into."""
    row = Row("", {})
    if of.widget is Widget.items:
        row.texts = _item_texts(of.inner, {})
    return row


def _flat(of: Field, value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The items of a dictionary of anything; of dictionaries inside it ``task.option``."""
    for name, inner in value.items():
        if of.scalar is Scalar.anything and isinstance(inner, dict) and inner:
            yield from _flat(of, inner, f"{before}{name}.")
        else:
            yield f"{before}{name}", inner


def _step_row(of: Field, step: Any) -> Row:
    given = {STEP: step} if isinstance(step, str) else step
    name = given[STEP]
    return Row(name, _item_texts(fields_of_row(of, name), given))


def _item_texts(inner: Sequence[Field], given: Mapping[str, Any]) -> dict[str, list[str]]:
    found = {}
    for each in inner:
        assert each.option is not None
        value = given.get(each.key, default_of(each))
        if each.widget is Widget.table:
            pairs = [f"{name}={shown(one)}" for name, one in (value or {}).items()]
            found[each.key] = ["\n".join(pairs)]
        else:
            found[each.key] = texts(each, value)
    return found


def default_of(of: Field) -> Any:
    """An option's default as JSON has it; None for one that has to be set."""
    assert of.option is not None
    return None if of.option.default == MISSING else plain(of.option.default)


# ---- from what was sent ----


def sent_rows(of: Field, sent: Sent) -> list[Row] | None:
    """The rows that came back; None where the form had none of the kind."""
    numbers = _numbers(of.key, sent)
    if not numbers and f"{of.key}#" not in sent:
        return None
    return [_sent_row(of, number, sent) for number in numbers[:_MOST]]


def _numbers(key: str, sent: Sent) -> list[int]:
    pattern = re.compile(rf"{re.escape(key)}#(\d{{1,4}})", re.ASCII)
    found = [pattern.fullmatch(name) for name in sent]
    return sorted({int(match[1]) for match in found if match})


def _sent_row(of: Field, number: int, sent: Sent) -> Row:
    prefix = f"{of.key}#{number}"
    name = sent[prefix][-1].strip()
    row = Row(name, {})
    for each in fields_of_row(of, name):
        given = sent.get(f"{prefix}.{each.key}")
        if given is not None:
            row.texts[each.key] = list(given)
    return row


def merged(given: Sequence[Row], old: Sequence[Row], came: Sequence[Row]) -> list[Row]:
    """The rows that presets give now, with what was changed of those that they gave before."""
    before = {row.name: row for row in old}
    rows = {row.name: Row(row.name, dict(row.texts), fixed=True) for row in given}
    more: list[Row] = []
    for row in came:
        known = before.get(row.name)
        if known is not None and _alike(known.texts, row.texts):
            continue
        if row.name in rows and rows[row.name].fixed:
            rows[row.name].texts |= row.texts
        else:
            more.append(row)
    return [*rows.values(), *more]


def alike(left: Sequence[Row], right: Sequence[Row]) -> bool:
    """Whether rows that came back are those that were shown."""
    if [row.name for row in left] != [row.name for row in right]:
        return False
    pairs = zip(left, right, strict=True)
    return all(_alike(shown_row.texts, row.texts) for shown_row, row in pairs)


def _alike(left: Mapping[str, Sequence[str]], right: Mapping[str, Sequence[str]]) -> bool:
    """Whether nothing of `right` differs; boxes send an empty text beside their values."""
    return all(_clean(left.get(key, ())) == _clean(values) for key, values in right.items())


def _clean(values: Sequence[str]) -> list[str]:
    return [value.replace("\r\n", "\n") for value in values if value]


# ---- to values ----

Look = Callable[[Field, Any, str], None]  # raises Problem for a value that a page may not set


def table(of: Field, rows: Sequence[Row], look: Look) -> dict[str, Any]:
    """The dictionary that a table's rows stand for; problems go into the rows."""
    result: dict[str, Any] = {}
    for row in rows:
        if row.is_blank and not "".join(row.texts.get(VALUE, [])):
            continue
        try:
            name = scalar(row.name, Scalar.text)
            _check_name(row, result, plain_name=False)
        except Problem as problem:
            row.problems[""] = problem
            continue
        try:
            text = row.texts.get(VALUE, [""])[-1]
            value = scalar(text, of.scalar)
            if text == "":
                raise Problem("forms.error.empty")
            look(of, value, name)
        except Problem as problem:
            row.problems[VALUE] = problem
            continue
        names = [name]
        if of.scalar is Scalar.anything:
            names = name.split(".")
        _put(result, names, value, row)
    return result


def _put(result: dict[str, Any], names: Sequence[str], value: Any, row: Row) -> None:
    inner = result
    for name in names[:-1]:
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            row.problems[""] = Problem("forms.error.twice", {"name": row.name})
            return
    inner[names[-1]] = value


def _check_name(row: Row, taken: Mapping[str, Any], *, plain_name: bool) -> None:
    if not row.name:
        raise Problem("forms.error.empty")
    word = row.name.lower() in WORDS
    if plain_name and (word or not _NAME.fullmatch(row.name)):
        raise Problem("forms.error.name", {"name": row.name})
    if row.name in taken:
        raise Problem("forms.error.twice", {"name": row.name})


def items(of: Field, rows: Sequence[Row], look: Look) -> dict[str, dict[str, Any]]:
    """The options of each item that were sent, by its name; problems go into the rows."""
    result: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.is_blank:
            written = any("".join(given) for given in row.texts.values())
            if written and not _is_untouched(of, row):
                row.problems[""] = Problem("forms.error.empty")
            continue
        try:
            _check_name(row, result, plain_name=True)
        except Problem as problem:
            row.problems[""] = problem
            continue
        result[row.name] = options_of_row(of.inner, row, look)
    return result


def _is_untouched(of: Field, row: Row) -> bool:
    return _alike(_item_texts(of.inner, {}), row.texts)


def steps(of: Field, rows: Sequence[Row], look: Look) -> list[Any]:
    """The list that a pipeline's rows stand for; problems go into the rows."""
    result: list[Any] = []
    for row in rows:
        if row.is_blank:
            continue
        if row.name not in of.choices:
            row.problems[""] = Problem("forms.error.choice", {"text": row.name})
            continue
        inner = fields_of_row(of, row.name)
        options = options_of_row(inner, row, look)
        usual = {each.key: default_of(each) for each in inner}
        changed = {key: value for key, value in options.items() if value != usual[key]}
        result.append({STEP: row.name, **changed} if changed else row.name)
    return result


def options_of_row(inner: Sequence[Field], row: Row, look: Look) -> dict[str, Any]:
    """The options of one item that were sent; problems go into the row."""
    result: dict[str, Any] = {}
    for each in inner:
        given = row.texts.get(each.key)
        try:
            if given is None and not each.required:
                continue
            value = _pairs(each, given) if each.widget is Widget.table else read(each, given or [])
            look(each, value, row.name)
            result[each.key] = value
        except Problem as problem:
            row.problems[each.key] = problem
    return result


def _pairs(of: Field, given: Sequence[str] | None) -> dict[str, Any]:
    """``name=value`` lines as a dictionary."""
    result: dict[str, Any] = {}
    for line in last(given or ()).splitlines():
        name, equals, text = line.partition("=")
        if not line.strip():
            continue
        if not equals or not name.strip() or not text.strip():
            raise Problem("forms.error.pair", {"text": line})
        result[scalar(name.strip(), Scalar.text)] = scalar(text.strip(), of.scalar)
    return result
