"""A sheet for people without a tool, as CSV or Excel file; and the filled-in sheet read back.

    pairs      pair_id, prompt, response_a, response_b, preference, annotator, comment
               preference: a, b, tie or skip
    rankings   pair_id, prompt, response_1, response_2 ..., ranking, annotator, comment
               ranking: 2>1=3, tie or skip

Where a prompt has functions to call, a column tools behind the prompt holds them as JSON.
Where the export asks for ratings, rating_a, rating_b or rating_1 ... (1 to 5) come before the
annotator. A row without a preference or ranking is not labelled yet and gives nothing. Several
annotators are several files, or several rows with the same pair_id; the annotator of a row whose
column annotator is empty is "". Columns may be left out or moved, and others added: only pair_id
and preference or ranking are needed.

Prompt and responses are written so that spreadsheets show them and the reader gets them exactly:
- In CSV a text that a spreadsheet would take for a formula (it begins with = + - @, a tab or a line
  end) has an apostrophe before it. In Excel files every cell is of the type text, which is never a
  formula, so there it needs none.
- In both a text that begins with an apostrophe, and an empty one, has one more. The reader takes
  one leading apostrophe off.
- In Excel files what XML can't hold is written as _xHHHH_, Excel's own way, and a cell holds 32,767
  characters.
"""

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from conf.choices import LabelKind
from rlhf.data.formats.sheet import SIDES, response_column, response_columns
from rlhf.data.rows import RowError, number_of, optional_text, text_of, value_of
from rlhf.data.tables import CELL_LIMIT, FORMULA, cell_length, excel_text, mark, unmark
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
    check_texts,
    given_ratings,
    guidance,
    has_tools,
    most_answers,
    read_rows,
)
from rlhf.process.libraries import require
from rlhf.process.wording import describe
from rlhf.types import UserError

CSV_FILE, XLSX_FILE, GUIDE_FILE = "label_sheet.csv", "label_sheet.xlsx", "label_sheet.txt"
_PREFERENCES = {"a": Verdict.left, "b": Verdict.right, "tie": Verdict.tie, "skip": Verdict.skip}
HOW = {
    LabelKind.pair: "Fill in the column preference: a (response_a is better), b (response_b is "
    "better), tie or skip (you can't say).",
    LabelKind.ranking: "Fill in the column ranking with the numbers of the responses, the best "
    "first: 2>1=3 says that the second is the best and the "
    "other two are equal. Or write tie (all are equal) or skip (you can't say).",
}
_REST = (
    "Leave what you have not decided empty. Write your name into the column annotator. Do "
    "not change the columns pair_id, prompt, tools and responses."
)

# takes the columns of a row; its prompt and responses, None where it has none
Texts = Callable[[Mapping[str, Any]], tuple[Any, tuple[str, ...] | None]]

# ---- out ----


def write_csv(export: Export, folder: Path) -> list[Path]:
    """The sheet and its instructions; UTF-8 with a byte order mark, which tells spreadsheets so.
    Raises UserError for text that no encoding holds.
    """
    check_texts(export)
    folder.mkdir(parents=True, exist_ok=True)
    out = StringIO(newline="")
    writer = csv.DictWriter(out, columns(export), quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writeheader()
    for task in export.tasks:
        texts = {name: mark(text, FORMULA) for name, text in texts_of(task, export.kind).items()}
        writer.writerow({"pair_id": task.id, **texts})
    return [write_text(folder / CSV_FILE, "\ufeff" + out.getvalue()), _guide(export, folder)]


def write_xlsx(export: Export, folder: Path) -> list[Path]:
    """The sheet and its instructions. Raises UserError for text that a cell can't hold, naming the
    task.
    """
    openpyxl = require("openpyxl", "labels")
    from openpyxl.utils import get_column_letter

    check_texts(export)
    folder.mkdir(parents=True, exist_ok=True)
    book, names = openpyxl.Workbook(), columns(export)
    sheet = book.active
    sheet.title = "labels"
    _fill_row(sheet, 1, names, dict(zip(names, names, strict=True)), bold=True)
    for row, task in enumerate(export.tasks, start=2):
        _fill_row(sheet, row, names, _excel_row(task, export.kind))
    for column, name in enumerate(names, start=1):
        wide = name in ("prompt", "tools") or name.startswith("response_")
        sheet.column_dimensions[get_column_letter(column)].width = 60 if wide else 14
    sheet.freeze_panes = "B2"
    if export.kind is LabelKind.pair and export.tasks:
        letter = get_column_letter(names.index("preference") + 1)
        _offer_preferences(sheet, f"{letter}2:{letter}{len(export.tasks) + 1}")
    path = folder / XLSX_FILE
    temporary = path.with_name(path.name + ".tmp")
    book.save(temporary)
    temporary.replace(path)
    return [path, _guide(export, folder)]


def _fill_row(
    sheet: Any, row: int, names: Sequence[str], cells: Mapping[str, str], *, bold: bool = False
) -> None:
    """Write the texts `cells` to a row of an Excel sheet with the columns `names`."""
    from openpyxl.styles import Alignment, Font

    for column, name in enumerate(names, start=1):
        cell = sheet.cell(row, column)
        cell.number_format, cell.alignment = "@", Alignment(wrap_text=True, vertical="top")
        if name in cells:
            cell.value = cells[name]
            cell.data_type = "s"  # never a formula, whatever it begins with
        if bold:
            cell.font = Font(bold=True)


def _offer_preferences(sheet: Any, cells: str) -> None:
    """Let a range of cells take preferences only."""
    from openpyxl.worksheet.datavalidation import DataValidation

    choices = f'"{",".join(_PREFERENCES)}"'
    validation = DataValidation("list", formula1=choices, allow_blank=True, showErrorMessage=True)
    validation.add(cells)
    sheet.add_data_validation(validation)


def _guide(export: Export, folder: Path) -> Path:
    return write_text(folder / GUIDE_FILE, guidance(export, f"{HOW[export.kind]} {_REST}"))


def columns(export: Export) -> list[str]:
    """The sheet's columns in their order."""
    slots = _slots(export.kind, most_answers(export))
    names = ["pair_id", "prompt"]
    if has_tools(export):
        names.append("tools")
    names += [*map(response_column, slots), answer_column(export.kind)]
    if export.ratings:
        names += [f"rating_{slot}" for slot in slots]
    names.append("annotator")
    if export.comments:
        names.append("comment")
    return names


def answer_column(kind: LabelKind) -> str:
    """The column that people fill in."""
    return "preference" if kind is LabelKind.pair else "ranking"


def _slots(kind: LabelKind, count: int) -> list[str]:
    """What `count` responses are called in the names of columns."""
    if kind is LabelKind.pair:
        return list(SIDES)
    return [str(slot + 1) for slot in range(count)]


def texts_of(task: Task, kind: LabelKind) -> dict[str, str]:
    """Prompt, tools and responses by column, as they are shown."""
    texts = {"prompt": as_text(task.prompt)}
    if task.tools:
        texts["tools"] = tools_text(task.tools)
    for slot, text in zip(_slots(kind, len(task.answers)), task.shown, strict=True):
        texts[response_column(slot)] = text
    return texts


def _excel_row(task: Task, kind: LabelKind) -> dict[str, str]:
    """Raises UserError for a text that a cell can't hold."""
    out = {"pair_id": task.id}
    for name, text in texts_of(task, kind).items():
        out[name] = excel_text(mark(text))
        if (length := cell_length(out[name])) > CELL_LIMIT:
            raise UserError(
                f"task {task.id}: its {name} has {length:,} characters as an Excel cell, which "
                f"holds {CELL_LIMIT:,}. Leave xlsx out of label.targets "
                "(csv and page hold more), or take shorter texts."
            )
    return out


# ---- back ----


def read(path: Path) -> Iterator[Judgement | Unreadable]:
    """Every filled-in row. Raises UserError where the file as a whole can't be read."""
    return judgements(path, _sheet_texts)


def judgements(path: Path, texts: Texts) -> Iterator[Judgement | Unreadable]:
    """Every row with a preference or a ranking. `texts` gets a row's prompt and responses. Raises
    UserError where the file as a whole can't be read.
    """

    def of_row(row: Mapping[str, Any], place: str) -> Iterator[Judgement | Unreadable]:
        task = row.get("pair_id")
        try:
            judgement = _judgement(row, place, texts)
        except RowError as error:
            yield Unreadable(place, task if isinstance(task, str) else "", str(error))
            return
        if judgement is not None:
            yield judgement

    return read_rows(path, of_row)


def _sheet_texts(row: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...] | None]:
    """Prompt and responses of a sheet's row, without the apostrophes. Cells without text at the end
    of a shorter task's row are left out.
    """
    prompt = None
    if "prompt" in row:
        prompt = unmark(text_of(row, "prompt", empty=True))
    names = response_columns(row)
    if not names:
        return prompt, None
    cells = [text_of(row, name, empty=True) for name in names]
    while cells and not cells[-1]:
        cells.pop()
    return prompt, tuple(map(unmark, cells))


def _judgement(row: Mapping[str, Any], place: str, texts: Texts) -> Judgement | None:
    """A row's judgement; None where it is not labelled yet. Raises RowError."""
    column = "ranking" if "ranking" in row else "preference"
    if value_of(row, column) is None:
        return None
    answer = text_of(row, column, empty=True).strip().lower()
    if not answer:
        return None
    prompt, shown = texts(row)
    count = None if shown is None else len(shown)
    verdict, ranking = _verdict(answer, column, count)
    timed = row.get("seconds") not in (None, "")
    return Judgement(
        task=text_of(row, "pair_id"),
        annotator=optional_text(row, "annotator").strip(),
        verdict=verdict,
        ranking=ranking,
        ratings=_ratings(row, count),
        comment=optional_text(row, "comment"),
        seconds=number_of(row, "seconds") if timed else None,
        time=optional_text(row, "time") or None,
        annotation=optional_text(row, "annotation"),
        place=place,
        prompt=prompt,
        shown=shown,
        tools=row.get("tools") or None,
    )


def _verdict(text: str, column: str, count: int | None) -> tuple[Verdict, Ranking]:
    """What the `text` of a cell means. `count`: how many responses the row has; None where it has
    no columns for them. Raises RowError.
    """
    if column == "preference":
        if text not in _PREFERENCES:
            raise RowError(
                "key 'preference': expected a, b, tie, skip, or nothing where it is not "
                f"labelled yet, found {describe(text)}"
            )
        return _PREFERENCES[text], ()
    if text in ("tie", "skip"):
        return Verdict(text), ()
    groups = [[number.strip() for number in group.split("=")] for group in text.split(">")]
    numbers = [number for group in groups for number in group]
    last = math.inf if count is None else count
    whole = all(
        re.fullmatch("[1-9][0-9]{0,3}", number) and int(number) <= last for number in numbers
    )
    if not whole or len(set(numbers)) < len(numbers) or len(numbers) < 2:
        known = "of the responses" if count is None else f"from 1 to {count}"
        raise RowError(
            f"key 'ranking': expected at least two numbers {known}, each once, with > or = "
            "between them, such as 2>1, or tie, skip, or nothing where "
            f"it is not labelled yet, found {describe(text)}"
        )
    ranking = [tuple(sorted(int(number) - 1 for number in group)) for group in groups]
    return Verdict.ranked, tuple(ranking)


def _ratings(row: Mapping[str, Any], count: int | None) -> tuple[int | None, ...]:
    """From the columns rating_a and rating_b, or rating_1 ..., of `count` responses; () where none
    is given. Raises RowError.
    """
    names = [name for name in row if re.fullmatch(r"rating_([ab]|[1-9][0-9]{0,3})", name)]
    names.sort(key=lambda name: (len(name), name))
    ratings: list[int | None] = []
    for slot, name in enumerate(names):
        value = row[name]
        if value is None or value == "":
            ratings.append(None)
            continue
        stars = number_of(row, name)
        if stars not in range(1, 6):
            raise RowError(
                f"key {name!r}: expected a whole number from 1 to 5, or nothing, found "
                f"{describe(value)}"
            )
        if count is not None and slot >= count:
            raise RowError(
                f"key {name!r}: expected nothing, since the row has {count} responses, found "
                f"{describe(value)}"
            )
        ratings.append(int(stars))
    return given_ratings(ratings)[:count]
