"""The JSON schema (draft 2020-12) of report.json: what other programs may rely on. Section figures
are named in their detectors' files.
"""

from typing import Any

from rlhf.data.report.records import VERSION, Severity, StandardResult

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_ROW = _object(
    {
        "file": _TEXT,
        "row": {"type": "integer", "minimum": 1},
        "split": {"enum": ["train", "eval"]},
        "note": {"type": "string", "description": "what is wrong in this row"},
        "excerpt": {"type": "string", "description": "the start of its text, on one line"},
    }
)

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Data report",
    **_object(
        {
            "version": {"const": VERSION},
            "kind": {"enum": ["sft", "preference", "unpaired", "prompt"]},
            "rows": _object({"train": _COUNT, "eval": _COUNT}),
            "sections": {
                "type": "object",
                "description": "by detector, in the order of the report",
                "additionalProperties": _object(
                    {
                        "title": _TEXT,
                        "unmeasured": {
                            "type": ["string", "null"],
                            "description": "why there is nothing to say, or null",
                        },
                        "figures": {"type": "object"},
                    }
                ),
            },
            "findings": {
                "type": "array",
                "description": "the gravest first",
                "items": _object(
                    {
                        "check": _TEXT,
                        "severity": {"enum": [s.value for s in Severity]},
                        "message": _TEXT,
                        "remedy": {
                            "type": "string",
                            "description": "what repairs it; options are in backticks",
                        },
                        "total": {
                            "type": "integer",
                            "minimum": 0,
                            "description": "rows that show it; 0: a matter of all rows together",
                        },
                        "rows": {
                            "type": "array",
                            "items": _ROW,
                            "description": "the first of them, at most data.report_rows",
                        },
                    }
                ),
            },
            "standards": {
                "type": "array",
                "items": _object(
                    {
                        "name": _TEXT,
                        "verdict": {"enum": [v.value for v in StandardResult]},
                        "found": _TEXT,
                        "expected": _TEXT,
                        "source": {"type": "string", "description": "who sets it"},
                        "remedy": _TEXT,
                    }
                ),
            },
        }
    ),
}
