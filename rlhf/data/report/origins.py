"""Where the rows come from, and what was done to them."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rlhf.data.prepare.items import Item
from rlhf.data.prepare.store import StepReport
from rlhf.data.report.records import Section, Settings, Table

_MANY = 50  # different values from which a column `source` is text rather than a name


def origins(items: Sequence[Item], settings: Settings, formats: Mapping[str, str]) -> Section:
    """Rows by split, file, format and source. `formats`: by file, the format that its columns
    showed.
    """
    by_file = Counter(item.origin for item in items)
    by_format = Counter(formats.get(item.origin, "unknown") for item in items)
    sources = Counter(
        str(item.columns["source"])
        for item in items
        if isinstance(item.columns.get("source"), (str, int))
    )
    if len(sources) > _MANY:
        sources = Counter()
    figures = {
        "total": len(items),
        "by_split": dict(Counter(item.split for item in items)),
        "by_file": dict(by_file),
        "by_format": dict(by_format),
        "by_source": dict(sources.most_common()),
    }
    splits: dict[str, Counter[str]] = {name: Counter() for name in by_file}
    for item in items:
        splits[item.origin][item.split] += 1
    files = tuple(
        (name, formats.get(name, "unknown"), count, splits[name]["train"], splits[name]["eval"])
        for name, count in by_file.most_common()
    )
    tables = [Table("Rows by file", ("file", "format", "rows", "train", "eval"), files)]
    if sources:
        tables.append(
            Table(
                "Rows by source",
                ("source", "rows", "share"),
                tuple((s, n, n / len(items)) for s, n in sources.most_common()),
            )
        )
    return Section("rows", "Rows", figures, tables=tuple(tables))


def preparation(steps: Sequence[StepReport]) -> Section:
    """What the steps of data.pipeline have done to the rows before they were examined."""
    title = "Preparation"
    if not steps:
        return Section("preparation", title, {}, unmeasured="no step has run")
    figures = {
        "steps": [
            {
                "step": s.step,
                "options": s.options,
                "rows_in": s.rows_in,
                "rows_out": s.rows_out,
                "rejected": s.rejected,
                "reasons": s.reasons,
            }
            for s in steps
        ]
    }
    shown = tuple(
        (
            s.step,
            s.rows_in,
            s.rows_out,
            s.rejected,
            max(s.reasons, key=lambda r: s.reasons[r], default=""),
        )
        for s in steps
    )
    table = Table("Steps", ("step", "rows in", "rows out", "rejected", "most often because"), shown)
    return Section("preparation", title, figures, tables=(table,))
