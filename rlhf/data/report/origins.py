"""Where the rows come from, and what was done to them."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rlhf.data.prepare.items import Item, shown_in
from rlhf.data.prepare.store import StepReport
from rlhf.data.report.looked import over
from rlhf.data.report.records import Section, Settings, Table

_MANY = 50  # different values from which a column `source` is text rather than a name


def places(items: list[Item]) -> Counter[tuple[str, str, str | None]]:
    """How many of some rows have this file, split and source."""
    out: Counter[tuple[str, str, str | None]] = Counter()
    for item in items:
        source = item.columns.get("source")
        named = None
        if isinstance(source, (str, int)):
            named = str(source)
        out[item.origin, item.split, named] += 1
    return out


def show_pictures(items: list[Item]) -> bool:
    """Whether some row shows a picture."""
    return any(shown_in(item.columns) for item in items)


def origins(items: Sequence[Item], settings: Settings, formats: Mapping[str, str]) -> Section:
    """Rows by split, file, format and source. `formats`: by file, the format that its columns
    showed.
    """
    by_file: Counter[str] = Counter()
    by_format: Counter[str] = Counter()
    by_split: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    splits: dict[str, Counter[str]] = {}
    for part in over(places, items):
        for (origin, split, source), count in part.items():
            by_file[origin] += count
            by_format[formats.get(origin, "unknown")] += count
            by_split[split] += count
            splits.setdefault(origin, Counter())[split] += count
            if source is not None:
                sources[source] += count
    if len(sources) > _MANY:
        sources = Counter()
    figures = {
        "total": len(items),
        "by_split": dict(by_split),
        "by_file": dict(by_file),
        "by_format": dict(by_format),
        "by_source": dict(sources.most_common()),
    }
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
