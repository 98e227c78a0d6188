"""Hashes of files and of values."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """The hash of a file's bytes, hexadecimal."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _unix_line_ends(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(value, Mapping):
        return {_unix_line_ends(key): _unix_line_ends(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unix_line_ends(inner) for inner in value]
    return value


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value's content.

    Line ends don't count, since spreadsheets and browsers change them.
    """
    text = json.dumps(_unix_line_ends(value), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
