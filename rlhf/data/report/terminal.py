"""The report on a screen: short, as rich tables. Whatever a row holds is text, never markup."""

from pathlib import Path
from typing import Any

from rlhf.data.report.records import Report, Severity, StandardResult
from rlhf.data.report.texts import safe

_PLACES = 3  # rows that a finding names on a screen
_COLOURS = {Severity.fail: "bold red", Severity.warn: "yellow", Severity.info: "dim"}
_VERDICTS = {
    StandardResult.passed: "green",
    StandardResult.failed: "bold red",
    StandardResult.unknown: "dim",
}


def tables(report: Report) -> list[Any]:
    """rich.table.Table objects to print: findings, standards, and each section's tables."""
    from rich.table import Table
    from rich.text import Text

    def cell(value: object) -> Text:
        if isinstance(value, float):
            text = f"{value:.4g}"
        else:
            text = "" if value is None else safe(str(value))
        return Text(text, overflow="fold")

    def made(title: str, columns: tuple[str, ...]) -> Table:
        table = Table(title=Text(title), title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        return table

    out = []
    for section in report.sections:
        for shown in section.tables:
            table = made(shown.title, shown.columns)
            for row in shown.rows:
                table.add_row(*(cell(v) for v in row))
            out.append(table)
    standards = made("Quality standards", ("standard", "verdict", "found", "expected"))
    for s in report.standards:
        standards.add_row(
            cell(s.name),
            Text(s.verdict.value, style=_VERDICTS[s.verdict]),
            cell(s.found),
            cell(s.expected),
        )
    findings = made("Findings", ("", "check", "found", "rows", "repair"))
    for f in report.findings():
        rows = "; ".join(f"{Path(r.file).name}, row {r.row}" for r in f.rows[:_PLACES])
        if f.total > _PLACES:
            rows += " ..."
        findings.add_row(
            Text(f.severity.value, style=_COLOURS[f.severity]),
            cell(f.check),
            cell(f.message),
            cell(rows),
            cell(f.remedy),
        )
    return [*out, standards, findings]
