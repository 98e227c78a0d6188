"""Hashes of files and of values."""

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Of a file's bytes; hexadecimal."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value's content; line ends are all one, since spreadsheets and browsers change them."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True).replace("\\r\\n", "\\n").replace("\\r", "\\n")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
