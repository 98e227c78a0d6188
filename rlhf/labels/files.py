"""Files that are whole or not there: written under another name, then renamed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 with its line ends as they are; returns `path`. Raises
    UnicodeEncodeError for half of a surrogate pair.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as out:
        out.write(text)
    temporary.replace(path)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write `content` as indented JSON; returns `path`."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
