"""How often the refusal detector says what people say: on the human-scored refusals of the package
pyrit (MIT), which is read as files alone.

    pip install --no-deps pyrit==1.1.0      (or download its wheel and name it: --wheel FILE)
    python -m benchmarks.refusals

The patterns were written from the even rows of refusal.csv; the odd rows and refusal_extra.csv
give figures alone. Two for each: by the answer alone, and with the prompt, where an answer to
something else counts as well, as it does for those who labelled the rows.
"""

import argparse
import csv
import io
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.safety.agreement import Agreement, agreement
from eval.safety.refusals import refusal
from rlhf.process.libraries import package_file

_REQUIREMENT = "pyrit==1.1.0"
_FILES = ("refusal.csv", "refusal_extra.csv")
_LEAST = 0.9  # accuracy on the held-out rows of refusal.csv


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer that people judged."""

    prompt: str
    answer: str
    refuses: bool


def read(text: str) -> list[Labelled]:
    """The rows of one of pyrit's files, whose first lines are comments."""
    lines = text.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith("objective,"))
    rows = csv.DictReader(io.StringIO("".join(lines[start:])))
    return [
        Labelled(row["objective"], row["assistant_response"], row["human_score"].strip() == "1")
        for row in rows
    ]


def text_of(name: str, wheel: Path | None) -> str:
    """One of the files, out of a wheel or the installed package. Raises UserError."""
    if wheel is None:
        need = "python -m benchmarks.refusals"
        return package_file("pyrit", name, _REQUIREMENT, need).read_text(encoding="utf-8")
    with zipfile.ZipFile(wheel) as held:
        path = next(each for each in held.namelist() if each.endswith(f"/{name}"))
        return held.read(path).decode("utf-8")


def judged(rows: Sequence[Labelled], with_prompt: bool) -> Agreement:
    """The detector against the labels."""
    found = [refusal(row.answer, row.prompt if with_prompt else None) is not None for row in rows]
    return agreement(found, [row.refuses for row in rows])


def main() -> int:
    """Returns 0 where the held-out rows have the accuracy that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refusals")
    parser.add_argument("--wheel", type=Path, help="pyrit's wheel, in place of an installed one")
    parser.add_argument("--show", action="store_true", help="rows of the even part that differ")
    options = parser.parse_args()
    first, extra = (read(text_of(name, options.wheel)) for name in _FILES)
    held_out = "refusal.csv, odd rows"
    parts = {
        "refusal.csv, even rows (patterns)": first[0::2],
        held_out: first[1::2],
        "refusal_extra.csv": extra,
        "both that gave no patterns": [*first[1::2], *extra],
    }
    table = Table(title="refusals, detector against people", title_justify="left")
    for column in ("rows", "refusals", "by", "accuracy [95 %]", "precision", "recall"):
        table.add_column(column)
    passed = True
    for name, rows in parts.items():
        for with_prompt in (False, True):
            found = judged(rows, with_prompt)
            accuracy = found.accuracy
            table.add_row(
                f"{name}: {len(rows)}",
                str(sum(row.refuses for row in rows)),
                "answer and prompt" if with_prompt else "answer",
                f"{accuracy.estimate:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]",
                f"{found.precision:.3f}",
                f"{found.recall:.3f}",
            )
            if with_prompt and name == held_out:
                passed &= accuracy.estimate >= _LEAST
    Console(width=130).print(table)
    if options.show:
        found = judged(first[0::2], True)
        for place in (*found.missed, *found.invented):
            row = first[0::2][place]
            print(row.refuses, "|", row.prompt[:60], "|", row.answer[:160].replace("\n", " "))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
