"""Sizes and times as people read them."""

import time
from pathlib import Path

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(count: int) -> str:
    """1536 -> 1.5 KiB"""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    digits = 1 if unit and value < 100 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take; links are not followed."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def time_text(seconds: float) -> str:
    """Seconds since 1970 as local date and time: 2026-11-30 22:05"""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
