"""Two runs of one command, value by value."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.equality.cases import Run

NOT_COMPARED = re.compile(
    r"(^|.*/)(time|memory)/.*"  # phases of a step, resident memory
    r"|.*_s|.*_runtime|.*_per_second|.*tokens_per_s.*|.*rss.*"
)
_SHOWN = 5  # differences of a file that are printed


@dataclass(slots=True)
class Comparison:
    """What one file of a case says on both sides."""

    case: str
    name: str
    rows: int = 0
    keys: int = 0  # compared, over all rows
    differences: list[str] = field(default_factory=list)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects and lists by their path."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves |= flat(item, f"{prefix}.{key}" if prefix else key)
    return leaves


def compared(row: Any) -> dict[str, Any]:
    """The leaves of a row without those that no two runs share."""
    return {key: value for key, value in flat(row).items() if not NOT_COMPARED.fullmatch(key)}


def same(before: Any, after: Any) -> bool:
    """Equality in which NaN equals NaN."""
    if isinstance(before, float) and isinstance(after, float) and math.isnan(before):
        return math.isnan(after)
    return type(before) is type(after) and before == after


def rows_of(path: Path) -> list[Any]:
    """The rows of a .jsonl file, or the one object of a .json file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [json.loads(text)]
    return [json.loads(line) for line in text.splitlines() if line]


def compare_rows(case: str, name: str, before: Sequence[Any], after: Sequence[Any]) -> Comparison:
    """Every value of every row."""
    result = Comparison(case, name, rows=min(len(before), len(after)))
    if len(before) != len(after):
        result.differences.append(f"{len(before)} rows before, {len(after)} after")
    for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
        old_values, new_values = compared(old), compared(new)
        for key in sorted(old_values.keys() | new_values.keys()):
            if key not in old_values:
                result.differences.append(f"row {number}, {key}: only after ({new_values[key]!r})")
            elif key not in new_values:
                result.differences.append(f"row {number}, {key}: only before ({old_values[key]!r})")
            elif not same(old_values[key], new_values[key]):
                pair = f"{old_values[key]!r} before, {new_values[key]!r} after"
                result.differences.append(f"row {number}, {key}: {pair}")
            else:
                result.keys += 1
    return result


def compare_weights(case: str, stage: str, before: Path, after: Path) -> Comparison:
    """The bytes of every file of weights."""
    sums = []
    for folder in (before, after):
        files = sorted(folder.glob("model/*.safetensors"))
        sums.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    return compare_rows(case, f"{stage}/model", [sums[0]], [sums[1]])


def compare_run(case: str, run: Run, before: Path, after: Path) -> list[Comparison]:
    """One comparison for each file of a run, and one for its weights."""
    folders = [side / "runs" / "equality" / run.stage for side in (before, after)]
    results = []
    for name in run.files:
        sides = [rows_of(folder / name) for folder in folders]
        results.append(compare_rows(case, f"{run.stage}/{name}", *sides))
    if run.weights:
        results.append(compare_weights(case, run.stage, *folders))
    for result in results:
        if not result.keys and not result.differences:
            result.differences.append("nothing to compare")
    return results


def print_table(results: Sequence[Comparison]) -> None:
    """A line for each file, then the first differences of each."""
    print(f"{'case':8}{'file':24}{'rows':>8}{'keys':>10}{'differences':>14}")
    for result in results:
        counts = f"{result.rows:8}{result.keys:10}{len(result.differences):14}"
        print(f"{result.case:8}{result.name:24}{counts}")
    for result in results:
        for difference in result.differences[:_SHOWN]:
            print(f"{result.case} {result.name}: {difference}")
