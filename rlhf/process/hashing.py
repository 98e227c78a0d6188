"""Hashes of files and of values."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Of a file's bytes; hexadecimal."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _one_line_end(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(value, Mapping):
        return {_one_line_end(key): _one_line_end(inner) for key, inner in value.items()}
    return [_one_line_end(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value's content; line ends are all one, since spreadsheets
    and browsers change them.
    """
    text = json.dumps(_one_line_end(value), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
