"""report.json and report.html of a report."""

import json
from pathlib import Path
from typing import Any

from rlhf.data.report import page
from rlhf.data.report.records import VERSION, Finding, Report, Section, Standard


def finding_json(finding: Finding) -> dict[str, Any]:
    rows = [
        {"file": r.file, "row": r.row, "split": r.split, "note": r.note, "excerpt": r.excerpt}
        for r in finding.rows
    ]
    return {
        "check": finding.check,
        "severity": finding.severity.value,
        "message": finding.message,
        "remedy": finding.remedy,
        "total": finding.total,
        "rows": rows,
    }


def standard_json(standard: Standard) -> dict[str, Any]:
    return {
        "name": standard.name,
        "verdict": standard.verdict.value,
        "found": standard.found,
        "expected": standard.expected,
        "source": standard.source,
        "remedy": standard.remedy,
    }


def section_json(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "unmeasured": section.unmeasured,
        "figures": dict(section.figures),
    }


def as_json(report: Report) -> dict[str, Any]:
    """The report by the schema in rlhf/data/report/schema.py."""
    return {
        "version": VERSION,
        "kind": report.kind,
        "rows": dict(report.rows),
        "sections": {section.name: section_json(section) for section in report.sections},
        "findings": [finding_json(f) for f in report.findings()],
        "standards": [standard_json(s) for s in report.standards],
    }


def write(report: Report, folder: Path) -> dict[str, Path]:
    """Write both files into `folder`; returns them by kind. An interrupted write leaves the old
    file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(as_json(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "html": page.render(report),
    }
    out = {}
    for suffix, text in texts.items():
        path = folder / f"report.{suffix}"
        beside = path.with_suffix(f".{suffix}.tmp")
        # a lone surrogate becomes its JSON escape
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(path)
        out[suffix] = path
    return out
