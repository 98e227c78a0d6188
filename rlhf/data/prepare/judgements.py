"""Rows that judge one thing, put together: what the steps `aggregate` and `review` share.

A row is one annotator's judgement. Of a pair the judgement is which side is chosen, and rows with
the sides exchanged judge the same pair; of a judged answer it is the column label; any other column
can be named.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from conf.preparation.annotation import JudgedOptions, Repeats
from rlhf.data.agreement import Label
from rlhf.data.formats import Use
from rlhf.data.formats.values import CONTENT
from rlhf.data.prepare.items import Context, Item
from rlhf.process.files import digest
from rlhf.types import UserError

REVIEWED = "reviewed"  # column of a row whose label a person has decided
SIDES = ("a", "b")  # labels of a pair's answers, in the order of their texts


@dataclass(slots=True)
class RowJudgement:
    """The judgement of one row."""

    item: Item
    annotator: str
    label: Any


@dataclass(slots=True)
class Subject:
    """What one or several rows judge: a pair, an answer, or any text."""

    id: str
    texts: dict[str, Any]  # content columns; of a pair prompt, a and b
    rows: list[Item] = field(default_factory=list)  # every row that judges it
    judgements: list[RowJudgement] = field(default_factory=list)  # one an annotator

    @property
    def reviewed(self) -> bool:
        """Whether a person has decided the item: the step `review` leaves a row that says so."""
        return any(row.columns.get(REVIEWED) is True for row in self.rows)

    def labels(self) -> list[Label]:
        return [Label(self.id, j.annotator, j.label) for j in self.judgements]


def by_side(options: JudgedOptions, kind: Use) -> bool:
    """Whether the judgement is which side of a pair is chosen."""
    return kind is Use.preference and options.label is None


def label_column(options: JudgedOptions, kind: Use) -> str:
    """The column that holds the judgement. Raises UserError where no column is named and rows of
    this kind have none of their own.
    """
    if options.label is not None:
        return options.label
    if kind is Use.unpaired:
        return "label"
    raise UserError(
        f"step {options.step}: label is not set: rows of kind {kind.value} hold no judgement of "
        "their own. Name its column."
    )


def texts_of(item: Item, options: JudgedOptions, kind: Use) -> dict[str, Any]:
    """The content that is judged, the same for every row that judges it."""
    content = {key: item.columns[key] for key in CONTENT if key in item.columns}
    if not by_side(options, kind):
        return content
    first, second = sorted((content.pop("chosen"), content.pop("rejected")), key=digest)
    return {**content, "a": first, "b": second}


def _judgement(
    item: Item, texts: dict[str, Any], options: JudgedOptions, kind: Use
) -> RowJudgement:
    """The judgement of a row. Raises ValueError with what the row lacks."""
    name = item.columns.get(options.annotator)
    if name is None or str(name).strip() == "":
        instead = "nothing" if options.annotator in item.columns else "no column"
        raise ValueError(f"column {options.annotator!r}: expected who judged, found {instead}")
    if by_side(options, kind):
        return RowJudgement(item, str(name), "a" if texts["a"] == item.columns["chosen"] else "b")
    column = label_column(options, kind)
    label = item.columns.get(column)
    if label is None or label == "":
        instead = "nothing" if column in item.columns else "no column"
        raise ValueError(f"column {column!r}: expected a label, found {instead}")
    if not isinstance(label, (str, bool, int, float)):
        raise ValueError(
            f"column {column!r}: expected a text, a number or true/false, found "
            f"{type(label).__name__}"
        )
    return RowJudgement(item, str(name), label)


def subject_id(item: Item, texts: dict[str, Any], options: JudgedOptions) -> str:
    """The value of the item column, or a hash of the texts. Raises ValueError for a row without the
    column.
    """
    if options.item is None:
        return digest(texts)
    value = item.columns.get(options.item)
    if value is None or str(value) == "":
        raise ValueError(f"column {options.item!r}: expected which item is judged, found nothing")
    return str(value)


def subjects(items: Iterable[Item], options: JudgedOptions, context: Context) -> list[Subject]:
    """Rows grouped by what they judge, in order of appearance; rows without a judgement go to
    `context.rejected`.

    An annotator's repeated equal judgements of an item count once. Raises UserError for repeated
    judgements that differ (unless the last is to count), for rows with the same item id and
    different texts, and where no row has a judgement.
    """
    out: dict[str, Subject] = {}
    lacking: list[str] = []
    if not by_side(options, context.kind):
        label_column(options, context.kind)
    for item in items:
        try:
            texts = texts_of(item, options, context.kind)
            key = subject_id(item, texts, options)
            judgement = _judgement(item, texts, options, context.kind)
        except ValueError as error:
            context.rejected(item, str(error))
            lacking.append(f"{item.place}: {error}")
            continue
        subject = out.setdefault(key, Subject(key, texts))
        if digest(subject.texts) != digest(texts):
            raise UserError(
                f"step {options.step}: {item.place} and {subject.judgements[0].item.place} have "
                f"{options.item}={key!r} and other texts: "
                "expected one item's rows to have the same."
            )
        subject.rows.append(item)
        _add(subject, judgement, options.repeats, options.step)
    if lacking and not out:
        raise UserError(
            f"step {options.step}: no row has a judgement. {lacking[0]}. The options item, "
            "annotator and label name the columns."
        )
    return list(out.values())


def _add(subject: Subject, judgement: RowJudgement, repeats: Repeats, step: str) -> None:
    at = next(
        (i for i, j in enumerate(subject.judgements) if j.annotator == judgement.annotator), None
    )
    if at is None:
        subject.judgements.append(judgement)
        return
    before = subject.judgements[at]
    if before.label == judgement.label:
        return
    if repeats is Repeats.error:
        raise UserError(
            f"step {step}: annotator {judgement.annotator!r} judges one item as {before.label!r} "
            f"in {before.item.place} and as "
            f"{judgement.label!r} in {judgement.item.place}. Expected one judgement; "
            "repeats=last lets the later one count."
        )
    subject.judgements[at] = judgement


def settled(
    subject: Subject, label: Any, options: JudgedOptions, kind: Use, extra: dict[str, Any]
) -> Item:
    """The row that an item becomes, with its label and the columns `extra`. Other columns are those
    of the item's first row, without its annotator. A pair's margin is the mean over the rows that
    chose its better side, where all of those have a margin.
    """
    first = subject.judgements[0].item
    columns = {key: value for key, value in first.columns.items() if key != options.annotator}
    if by_side(options, kind):
        columns["chosen"], columns["rejected"] = (
            subject.texts[side] for side in (SIDES if label == "a" else SIDES[::-1])
        )
        margins = [j.item.columns.get("margin") for j in subject.judgements if j.label == label]
        columns.pop("margin", None)
        if margins and all(margin is not None for margin in margins):
            columns["margin"] = sum(
                float(margin) for margin in margins if margin is not None
            ) / len(margins)
    else:
        columns[label_column(options, kind)] = label
    return Item({**columns, **extra}, first.origin, first.number, first.split)


def reject(subject: Subject, reason: str, context: Context) -> None:
    """Leave out every row of a subject, for one reason."""
    for row in subject.rows:
        context.rejected(row, reason)


def typed(text: str, labels: Iterable[Any]) -> Any:
    """The label among `labels` that `text` writes: a number or true/false where they are such; the
    text itself where there is none.
    """
    return next((label for label in labels if str(label).lower() == text.lower()), text)
