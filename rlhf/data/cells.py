"""Texts in the cells of sheets: CSV files that people open in spreadsheets, which take some texts
for formulas, and Excel files, which are XML and hold some characters as escapes only.
"""

import re

# full-width signs begin formulas where such are typed; a line end may be cut off before the rest is
# looked at
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001
CELL_LIMIT = 32_767  # what an Excel cell holds, in UTF-16 code units
# how Excel's files hold characters that XML can't (ECMA-376, ST_Xstring)
_ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")
_LIKE_ESCAPE = re.compile(r"_(?=x[0-9A-Fa-f]{4}_)")
_NOT_IN_XML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


def mark(text: str, starts: tuple[str, ...] = ()) -> str:
    """`text` after an apostrophe where it is empty, or begins with an apostrophe or with any of
    `starts`; `unmark` takes it off again.
    """
    if not text or text.startswith(("'", *starts)):
        return f"'{text}"
    return text


def unmark(cell: str) -> str:
    """The text that `mark` was given."""
    return cell.removeprefix("'")


def inert(text: str) -> str:
    """`text` after an apostrophe where a spreadsheet would take it for a formula; for readers that
    know the text and compare.
    """
    if text.startswith(FORMULA):
        return f"'{text}"
    return text


def bare(cell: str) -> str:
    """`cell` without the apostrophe that `inert` may have added; an apostrophe before anything else
    stays.
    """
    if cell.startswith("'") and cell[1:].startswith(FORMULA):
        return cell[1:]
    return cell


def excel_text(text: str) -> str:
    """`text` as an Excel cell holds it: what XML can't carry, a carriage return, and what looks
    like such an escape become _xHHHH_.
    """
    text = _LIKE_ESCAPE.sub("_x005F_", text)
    return _NOT_IN_XML.sub(lambda match: f"_x{ord(match[0]):04X}_", text)


def from_excel_text(cell: str) -> str:
    """The text that `excel_text` was given."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), cell)


def cell_length(cell: str) -> int:
    """UTF-16 code units of a text as an Excel cell holds it, which `CELL_LIMIT` limits."""
    return len(cell.encode("utf-16-le", "surrogatepass")) // 2
