"""The doctor of data sets (stage=data data.report=true): what is in the rows, what is wrong with
them, and which option mends it.

`make` examines rows and writes report.json and report.html; `terminal.tables` shows the same on a
screen.
"""

from rlhf.data.report.making import make
from rlhf.data.report.records import (
    Finding,
    Named,
    Report,
    Section,
    Severity,
    Standard,
    StandardResult,
)

__all__ = [
    "Finding",
    "Named",
    "Report",
    "Section",
    "Severity",
    "Standard",
    "StandardResult",
    "make",
]
