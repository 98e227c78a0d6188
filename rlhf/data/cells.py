"""Texts in the cells of CSV files that people open in spreadsheets, which take some for
formulas.
"""

# full-width signs begin formulas where such are typed; a line end may be cut off before the rest is
# looked at
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001


def mark(text: str, starts: tuple[str, ...] = ()) -> str:
    """`text` with an apostrophe before it where it is empty, begins with one, or with any of
    `starts`.
    """
    return f"'{text}" if not text or text.startswith(("'", *starts)) else text


def unmark(cell: str) -> str:
    """What `mark` was given."""
    return cell.removeprefix("'")


def inert(text: str) -> str:
    """`text` with an apostrophe before it where a spreadsheet would take it for a formula; for
    readers that know the text and compare.
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def bare(cell: str) -> str:
    """`cell` without the apostrophe that `inert` may have put there; one that stands before
    anything else stays.
    """
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell
