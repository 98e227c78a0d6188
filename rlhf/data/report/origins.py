"""Where the rows come from."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rlhf.data.prepare.items import Item
from rlhf.data.report.records import Section, Settings, Table

_MANY = 50  # different values from which a column `source` is text rather than a name


def origins(items: Sequence[Item], settings: Settings, formats: Mapping[str, str]) -> Section:
    """Rows by split, file, format and source. `formats`: by file, the format that its columns showed."""
    by_file = Counter(item.origin for item in items)
    by_format = Counter(formats.get(item.origin, "unknown") for item in items)
    sources = Counter(str(item.columns["source"]) for item in items if isinstance(item.columns.get("source"), (str, int)))
    if len(sources) > _MANY:
        sources = Counter()
    figures = {
        "total": len(items),
        "by_split": dict(Counter(item.split for item in items)),
        "by_file": dict(by_file),
        "by_format": dict(by_format),
        "by_source": dict(sources.most_common()),
    }
    splits = {name: Counter(item.split for item in items if item.origin == name) for name in by_file}
    files = tuple((name, formats.get(name, "unknown"), count, splits[name]["train"], splits[name]["eval"]) for name, count in by_file.most_common())
    tables = [Table("Rows by file", ("file", "format", "rows", "train", "eval"), files)]
    if sources:
        tables.append(Table("Rows by source", ("source", "rows", "share"), tuple((s, n, n / len(items)) for s, n in sources.most_common())))
    return Section("rows", "Rows", figures, tables=tuple(tables))
