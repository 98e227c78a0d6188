"""What a file of rows holds: its format, how many rows it has for each use, the first rows as text
and as a model's tokens. Read in a process of its own, bounded in time: a file may be anything.

    python -m rlhf.board.looking RESULT.json FILE [MODEL]
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.types import UserError

ROWS = 20_000  # that are looked at
FIRST = 8  # rows that are shown
LIMIT_S = 120.0
_LONGEST_TEXT = 4_000  # characters of a cell that are shown
_LONGEST_ROW = 600  # tokens of a side that are shown
_REASONS = 3
_SEED = 0


def look(path: Path, model: str | None = None) -> dict[str, Any]:
    """What `inspect` gives. Raises UserError where the model can't be read, and for a file that
    takes too long or too much.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "rlhf.board.looking", str(result), str(path)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        try:
            ended = subprocess.run(
                [*command, model] if model else command,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=LIMIT_S,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{path}: looking at it took longer than {LIMIT_S:.0f} s.") from error
        if not result.is_file():
            lines = ended.stderr.decode("utf-8", "replace").strip().splitlines() or ["no output"]
            raise UserError(
                f"{path}: looking at it failed (exit code {ended.returncode}): {lines[-1][:500]}"
            )
        content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in content:
        raise UserError(content["error"])
    return content


# ---- in the child ----


def inspect(path: str, model: str | None) -> dict[str, Any]:
    """natural: the use that the rows have by themselves; uses: what each use makes of the first
    ROWS rows; first: the first rows as texts; tokens: the first rows as the model reads them.
    Raises UserError for a model that can't be read.
    """
    from conf.schema import DataConfig
    from rlhf.data.formats import Use
    from rlhf.data.prepare.ingest import natural_use

    data = DataConfig(path=path)
    out: dict[str, Any] = {"natural": None, "problem": None, "uses": [], "first": []}
    try:
        out["natural"] = natural_use(data).value
    except UserError as error:
        out["problem"] = str(error)
    out["uses"] = [_use(data, use) for use in Use]
    try:
        out["first"] = list(islice(_texts(data), FIRST))
    except UserError as error:
        out["problem"] = out["problem"] or str(error)
    if model is not None and out["natural"] is not None:
        out["tokens"] = _tokens(data, Use(out["natural"]), model)
    return out


def _use(data: Any, use: Any) -> dict[str, Any]:
    """What the rows are for one use; `problem` where they are nothing."""
    from rlhf.data.loading import convert
    from rlhf.data.sources import train_sources

    out: dict[str, Any] = {"use": use.value, "rows": 0, "problem": None}
    try:
        loaded = convert(train_sources(data), use, data, _SEED, ROWS)
    except UserError as error:
        return out | {"problem": str(error)}
    reasons = [f"{row.place}: {why}" for row, why in islice(loaded.rejected, _REASONS)]
    return out | {
        "rows": len(loaded.records),
        "read": loaded.rows,
        "format": ", ".join(dict.fromkeys(form.name for form in loaded.formats.values())),
        "left_out": len(loaded.rejected),
        "set_aside": len(loaded.set_aside),
        "reasons": reasons,
        "more": loaded.rows >= ROWS,
    }


def _texts(data: Any) -> Iterator[dict[str, Any]]:
    """Rows as they are in the file, each cell a text."""
    from rlhf.data.prepare.ingest import source_rows

    for row in source_rows(data, _SEED):
        cells = {str(key): _text(value) for key, value in row.columns.items()}
        yield {"number": row.number, "problem": row.problem, "cells": cells}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str, indent=1)
    if len(value) > _LONGEST_TEXT:
        return value[:_LONGEST_TEXT] + " …"
    return str(value)


def _tokens(data: Any, use: Any, model: str) -> list[dict[str, Any]]:
    """The first rows as tokens, with what each is to training. A row that the template can't take
    has its `problem`.
    """
    from conf.schema import ModelConfig
    from rlhf.data.formats.values import columns_of
    from rlhf.data.loading import convert
    from rlhf.data.preview import preview_row
    from rlhf.data.sources import train_sources
    from rlhf.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(path=model))
    records = convert(train_sources(data), use, data, _SEED, FIRST).records
    out: list[dict[str, Any]] = []
    for record in records:
        columns = columns_of(record.value, record.fields)
        try:
            row = preview_row(tokenizer, use, columns, record.place)
        except UserError as error:
            out.append({"place": record.place, "problem": str(error), "sides": []})
            continue
        sides = [_side(side) for side in row.sides]
        out.append({"place": row.place, "problem": None, "shared": row.shared, "sides": sides})
    return out


def _side(side: Any) -> dict[str, Any]:
    """A side's tokens, neighbours of one part together: [part, [text, ...]]."""
    runs: list[tuple[str, list[str]]] = []
    for token in side.tokens[:_LONGEST_ROW]:
        if not runs or runs[-1][0] != token.part.value:
            runs.append((token.part.value, []))
        runs[-1][1].append(token.text)
    return {
        "name": side.name,
        "runs": runs,
        "count": len(side.tokens),
        "trained": sum(token.trained for token in side.tokens),
        "bos": side.bos,
        "eos": side.eos,
        "shown": min(len(side.tokens), _LONGEST_ROW),
        "problems": side.problems,
    }


def main(arguments: Sequence[str]) -> int:
    """Write the result into its file."""
    result, path, *model = arguments
    try:
        content = inspect(path, model[0] if model else None)
    except (UserError, OSError, ValueError) as error:
        content = {"error": str(error)}
    text = json.dumps(content, ensure_ascii=False, default=str)
    beside = Path(result + ".part")
    # lone surrogates of a file's JSON have no UTF-8
    beside.write_text(text.encode("utf-8", "replace").decode("utf-8"), encoding="utf-8")
    beside.replace(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
