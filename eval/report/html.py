"""report.html and report.json: all sections of an evaluation in one page and one file of figures.

The page is a single file: pictures stand inside as data URIs, there is no script and no request to
any host (a content security policy forbids both), and whatever models, judges or rows say is text.
No meaning is told by colour alone.
"""

import base64
import html
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report.style import STYLE
from eval.sections import Section, Table
from rlhf.process.files import json_value, write_json

HTML_FILE, JSON_FILE = "report.html", "report.json"
FORMAT_VERSION = 1
_PNG = b"\x89PNG\r\n\x1a\n"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# a number with a sign, a unit or an interval behind it; the rest is text
_NUMBER = re.compile(r"[+-]?\d[\d.,]*( ?%)?( *\[.*\]| *\(.*\))?")
# they would reorder what stands beside the text
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write report.html and report.json into `folder`, and return the page's path.

    Raises ValueError for a picture that is no PNG, and for two sections of one title, which no
    reader could tell apart.
    """
    titles = [section.title for section in sections]
    doubled = sorted({name for name in titles if titles.count(name) > 1})
    if doubled:
        raise ValueError(f"expected a title for each section, found {doubled} more than once")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / HTML_FILE
    beside = page.with_suffix(".tmp")
    beside.write_text(render(title, sections), encoding="utf-8")
    beside.replace(page)
    write_json(folder / JSON_FILE, as_json(title, sections, folder))
    return page


def as_json(title: str, sections: Sequence[Section], folder: Path) -> dict[str, Any]:
    """The content of report.json. Pictures are paths, relative to `folder` where they lie in it;
    a figure that is not finite is null.
    """
    out = []
    for section in sections:
        tables = []
        for table in section.tables:
            rows = [list(row) for row in table.rows]
            tables.append({"title": table.title, "columns": list(table.columns), "rows": rows})
        plots = {}
        for shows, path in section.plots.items():
            inside = path.is_relative_to(folder)
            plots[shows] = str(path.relative_to(folder) if inside else path)
        out.append(
            {
                "title": section.title,
                "text": list(section.text),
                "tables": tables,
                "plots": plots,
                "figures": json_value(dict(section.figures)),
            }
        )
    report = {"format_version": FORMAT_VERSION, "title": title, "sections": out}
    whole: dict[str, Any] = _without_halves(report)
    return whole


def _without_halves(value: Any) -> Any:
    """`value` with halves of characters (lone surrogates), which no file holds, as \ufffd."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_halves(key): _without_halves(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_halves(inner) for inner in value]
    return value


def render(title: str, sections: Sequence[Section]) -> str:
    """The page. Raises ValueError for a picture that is no PNG."""
    body = [f"<header><h1>{_text(title)}</h1></header>"]
    if len(sections) > 1:
        links = []
        for number, section in enumerate(sections, start=1):
            links.append(f'<li><a href="#section-{number}">{_text(section.title)}</a></li>')
        body.append(f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>')
    body.append("<main>")
    body += [_section(section, number) for number, section in enumerate(sections, start=1)]
    body.append("</main>")
    inner = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{inner}\n</body>\n</html>\n"
    )


def safe(text: str) -> str:
    """`text` with its lines, and fit for any file or screen: control characters, lone surrogates
    and marks that reorder text as \ufffd.
    """
    out = []
    for character in text.replace("\r\n", "\n"):
        hidden = character in _REORDERING or unicodedata.category(character) in ("Cc", "Cs")
        out.append("\ufffd" if hidden and character not in "\n\t" else character)
    return "".join(out)


def _text(value: str) -> str:
    """Any text, inert between tags and inside a quoted attribute."""
    return html.escape(safe(value), quote=True)


def _section(section: Section, number: int) -> str:
    name = f"section-{number}"
    parts = [f'<section id="{name}" aria-labelledby="{name}-title">']
    parts.append(f'<h2 id="{name}-title">{_text(section.title)}</h2>')
    parts += [f"<p>{_text(paragraph)}</p>" for paragraph in section.text]
    parts += [_table(table) for table in section.tables]
    parts += [_figure(shows, path) for shows, path in section.plots.items()]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    """A table that scrolls by itself, with the keyboard too, where it is wider than the page."""
    title = _text(table.title)
    if not table.rows:
        return f"<p>{title}: no rows.</p>"
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = []
    for row in table.rows:
        cells = [_cell(cell, "td") for cell in row[1:]]
        rows.append(f"<tr>{_cell(row[0], 'th')}{''.join(cells)}</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="wide" role="region" aria-label="{title}" tabindex="0"><table>'
        f"<caption>{title}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
        "</table></div>"
    )


def _cell(text: str, tag: str) -> str:
    """A cell; `tag` th: it names its row."""
    mark = ' scope="row"' if tag == "th" else ""
    if tag == "td" and _NUMBER.fullmatch(text):
        mark = ' class="number"'
    return f'<{tag}{mark}><bdi dir="auto">{_text(text)}</bdi></{tag}>'


def _figure(shows: str, path: Path) -> str:
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"{path}: expected a PNG file, as Section.plots holds them")
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    caption = _text(shows)
    return (
        f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def tracker_tables(sections: Sequence[Section]) -> dict[str, list[dict[str, str]]]:
    """The tables of all sections as rows for a tracker, by ``report/<section>/<table>`` in plain
    letters, with a number where that is taken; a table without rows is left out.
    """
    out: dict[str, list[dict[str, str]]] = {}
    for section in sections:
        for table in section.tables:
            if not table.rows:
                continue
            plain = name = f"report/{_slug(section.title)}/{_slug(table.title)}"
            number = 1
            while name in out:
                number += 1
                name = f"{plain}_{number}"
            out[name] = table.as_rows()
    return out


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:60] or "untitled"
