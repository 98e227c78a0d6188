"""report.html: one file without any external resource, for light and dark screens; whatever a row
holds is shown, never run.

Everything that stands between tags goes through `_text`, and a content security policy forbids
scripts and requests besides.
"""

import base64
import html
from collections import Counter
from collections.abc import Iterable, Sequence

from rlhf.data.report.plots import draw
from rlhf.data.report.records import (
    Finding,
    Report,
    Section,
    Severity,
    Standard,
    StandardResult,
    Thumbnail,
)
from rlhf.data.report.texts import safe

_SHOWN = 20  # rows of a finding on the page; report.json has as many as data.report_rows
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f2f4f7;
  --line: #c9d0d8; --link: #1f5fa8;
  --fail: #a51d24; --warn: #7a4b00; --info: #1f5fa8; --pass: #17663a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #14171b; --soft: #20252b;
  --line: #454d57; --link: #8fbcf5;
  --fail: #ff9a9a; --warn: #f2c46d; --info: #8fbcf5; --pass: #84d6a3; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 72rem;
  padding: 1rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1.25rem; list-style: none; padding: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
th { background: var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td bdi { overflow-wrap: anywhere; }
.finding { border-left: .3rem solid var(--line); background: var(--soft); padding: .5rem .9rem;
  margin: .9rem 0; }
.finding.fail { border-color: var(--fail); }
.finding.warn { border-color: var(--warn); }
.finding.info { border-color: var(--info); }
.finding p { margin: .25rem 0; }
.mark { font-weight: 700; }
.fail .mark, .mark.fail { color: var(--fail); }
.warn .mark { color: var(--warn); }
.info .mark { color: var(--info); }
.mark.pass { color: var(--pass); }
code { font-size: .92em; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figcaption { font-weight: 600; }
svg { max-width: 100%; height: auto; }
summary { cursor: pointer; }
"""
_SHEET_STYLE = """.sheet { display: flex; flex-wrap: wrap; gap: .75rem; }
.thumb { margin: 0; width: 8rem; }
.thumb figcaption { font-weight: 400; font-size: .75rem; overflow-wrap: anywhere; }
"""


def render(report: Report) -> str:
    """The page."""
    numbers = iter(range(1, 1 + sum(len(section.plots) for section in report.sections)))
    count = sum(report.rows.values())
    links = "".join(
        f'<li><a href="#{_text(s.name)}">{_text(s.title)}</a></li>' for s in report.sections
    )
    body = [
        "<header><h1>Data report</h1>",
        f"<p>{count:,} rows read as {_text(report.kind)}: {report.rows['train']:,} to train on, "
        f"{report.rows['eval']:,} held out.</p></header>",
        '<nav aria-label="Sections"><ul><li><a href="#findings">Findings</a></li><li><a '
        'href="#standards">Quality standards</a></li>',
        f"{links}</ul></nav>",
        "<main>",
        _findings(report.findings()),
        _standards(report.standards),
        *(_section(section, numbers) for section in report.sections),
        "</main>",
    ]
    style = _STYLE
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if any(section.thumbnails for section in report.sections):
        policy += "; img-src data:"
        style += _SHEET_STYLE
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<meta name="viewport" '
        'content="width=device-width, initial-scale=1">\n'
        f"<title>Data report</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    """Any text, inert between tags and inside a quoted attribute."""
    return html.escape(safe(str(value)), quote=True)


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}"


def _cell(value: str | int | float | None) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{_number(value)}</td>'
    return f'<td><bdi dir="auto">{_text("" if value is None else value)}</bdi></td>'


def _table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str | int | float | None]]
) -> str:
    head = "".join(f'<th scope="col">{_text(c)}</th>' for c in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return _wide(f"<caption>{_text(title)}</caption>", head, body)


def _wide(caption: str, head: str, body: str) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    table = f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{table}</table></div>'


def _findings(findings: list[Finding]) -> str:
    counts = Counter(finding.severity for finding in findings)
    severities = (Severity.fail, Severity.warn, Severity.info)
    shown = ", ".join(f"{counts[severity]} {severity.value}" for severity in severities)
    inner = "".join(_finding(f) for f in findings) or "<p>Nothing was found.</p>"
    return f'<section id="findings"><h2>Findings</h2><p>{shown}.</p>{inner}</section>'


def _finding(finding: Finding) -> str:
    mark = finding.severity.value
    out = (
        f'<article class="finding {mark}"><p><span class="mark">{mark}</span> '
        f"<strong>{_text(finding.check)}</strong>: {_text(finding.message)}</p>"
    )
    out += f"<p>Repair: {_remedy(finding.remedy)}</p>"
    if finding.rows:
        shown = finding.rows[:_SHOWN]
        rows = [(f"{r.file}, row {r.row}", r.split, r.note, r.excerpt) for r in shown]
        title = f"All {finding.total:,} rows"
        if finding.total > len(shown):
            title = f"The first {len(shown)} of {finding.total:,} rows"
        table = _table(title, ("place", "split", "what", "text"), rows)
        out += f"<details><summary>{title}</summary>{table}</details>"
    return out + "</article>"


def _remedy(remedy: str) -> str:
    """Text, in which what is in backticks is set as code."""
    parts = remedy.split("`")
    return "".join(
        f"<code>{html.escape(part)}</code>" if i % 2 else html.escape(part)
        for i, part in enumerate(parts)
    )


def _standards(standards: Iterable[Standard]) -> str:
    marks = {
        StandardResult.passed: "pass",
        StandardResult.failed: "fail",
        StandardResult.unknown: "",
    }
    head = "".join(
        f'<th scope="col">{c}</th>'
        for c in ("standard", "verdict", "found", "expected", "set by", "remedy")
    )
    rows = "".join(
        f'<tr><th scope="row">{_text(s.name)}</th><td><span class="mark '
        f'{marks[s.verdict]}">{s.verdict.value}</span></td>'
        f"<td>{_text(s.found)}</td><td>{_text(s.expected)}</td><td>{_text(s.source)}</td>"
        f"<td>{_remedy(s.remedy)}</td></tr>"
        for s in standards
    )
    inner = _wide("", head, rows)
    return f'<section id="standards"><h2>Quality standards</h2>{inner}</section>'


def _sheet(thumbnails: Sequence[Thumbnail]) -> str:
    """A contact sheet: small copies of pictures, each with its row."""
    figures = []
    for one in thumbnails:
        source = f"data:image/jpeg;base64,{base64.b64encode(one.jpeg).decode()}"
        caption = _text(f"{one.place} ({one.split}), {one.size}")
        figures.append(
            f'<figure class="thumb"><img src="{source}" width="{one.width}" '
            f'height="{one.height}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        )
    return f'<h3>The first {len(thumbnails)}</h3><div class="sheet">{"".join(figures)}</div>'


def _section(section: Section, numbers: Iterable[int]) -> str:
    parts = [f'<section id="{_text(section.name)}"><h2>{_text(section.title)}</h2>']
    if section.unmeasured is not None:
        parts.append(f"<p>Not measured: {_text(section.unmeasured)}.</p>")
    parts += [_table(t.title, t.columns, t.rows) for t in section.tables]
    if section.thumbnails:
        parts.append(_sheet(section.thumbnails))
    for plot, number in zip(section.plots, numbers, strict=False):
        parts.append(
            f"<figure><figcaption>{_text(plot.title)}</figcaption>{draw(plot, number)}</figure>"
        )
    return "".join(parts) + "</section>"
