"""Text files that are whole or not there: written under another name, then renamed."""

from pathlib import Path


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 with its line ends as they are; returns `path`. Raises
    UnicodeEncodeError for half of a surrogate pair.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as out:
        out.write(text)
    temporary.replace(path)
    return path
