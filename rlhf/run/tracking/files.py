"""The files that tracking writes into a run's directory: metrics.jsonl and samples.jsonl always, in
values that JSON can hold and lines that survive a kill; TensorBoard's where it is asked for.
"""

import contextlib
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from conf.schema import Config
from rlhf.process.files import digest
from rlhf.process.redaction import redact
from rlhf.types import UserError

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
_NAME_LENGTH = 128  # characters of an artifact's name, W&B's limit
_DIGEST_LENGTH = 16

# ---- values ----


def plain_number(value: Any) -> Any:
    """A numpy or one-element tensor scalar as a Python number; anything else as it is."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        return value.item()
    return value


def split_nonfinite(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` with NaN and infinities as None, which JSON has neither of, and their names."""
    bad = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    return {k: None if k in bad else v for k, v in values.items()}, bad


def artifact_name(name: str) -> str:
    """`name` as W&B takes it: at most 128 letters, digits, ``-``, ``_`` and ``.``, no secrets."""
    fits = re.sub(r"[^A-Za-z0-9_.]+", "-", str(redact("", name))).strip("-") or "artifact"
    if len(fits) <= _NAME_LENGTH:
        return fits
    return f"{fits[: _NAME_LENGTH - _DIGEST_LENGTH - 1]}-{digest(name)}"


def _cell(name: str, value: Any) -> Any:
    """A table's cell: a number, a text or None; other values as JSON. Secrets are removed."""
    clean = redact(name, plain_number(value))
    if isinstance(clean, float) and not math.isfinite(clean):
        return None
    if clean is None or isinstance(clean, (bool, int, float, str)):
        return clean
    return json.dumps(clean, ensure_ascii=False, default=str)


def _cell_kind(value: Any) -> type:
    if isinstance(value, bool):
        return bool
    return float if isinstance(value, (int, float)) else str


def table_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and the cells of each row.

    A column holds values of one kind: numbers, truth values or texts, and None for a missing
    value. A column of several kinds becomes text.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(name, row.get(name)) for name in columns] for row in rows]
    for i in range(len(columns)):
        kinds = {_cell_kind(row[i]) for row in cells if row[i] is not None}
        if len(kinds) <= 1:
            continue
        for row in cells:
            if row[i] is not None:
                row[i] = str(row[i])
    return columns, cells


def _plain_option(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain_option(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain_option(inner) for inner in value]
    return value


def plain_config(cfg: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of JSON values, without secrets."""
    out: dict[str, Any] = redact("", _plain_option(dataclasses.asdict(cfg)))
    return out


# ---- lines ----


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a file that a tracker wrote; [] where there is no file.

    A torn last line, which a killed run leaves, is left out. Raises UserError for any other
    damage.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # bytes: a line may be torn inside a character
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and isinstance(row.get("step"), int)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise UserError(
                f"{path}, line {number}: expected an object with a step, as a run writes it; "
                f"found {line[:60]!r}. Restore or remove it."
            )
        rows.append(row)
    return rows


def write_line(file: io.FileIO, offset: int, text: str, path: Path) -> None:
    """Replace what `file` (unbuffered) holds from `offset` on with `text` and a line end.

    Raises UserError when the disk is full or read-only; nothing of the line is then left.
    """
    rest = memoryview((text + "\n").encode())
    try:
        file.truncate(offset)
        file.seek(offset)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(offset)
        raise UserError(
            f"{path} can't be written: {error}. Make room there, then go on with run.resume=true."
        ) from error


def truncate(path: Path, last_step: int) -> int:
    """Keep the lines with ``step <= last_step``, so that a resumed run writes no step twice.

    Returns the number of lines that were removed.
    """
    rows = read_jsonl(path)
    kept = [row for row in rows if row["step"] <= last_step]
    if path.exists():
        beside = path.with_suffix(".tmp")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
        beside.write_text("".join(lines), encoding="utf-8")
        beside.replace(path)
    return len(rows) - len(kept)


def last_line(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The last line of metrics.jsonl and the byte where it starts; (None, 0) without a line."""
    if not path.exists():
        return None, 0
    content = path.read_bytes()
    if not content.strip():
        return None, 0
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    return json.loads(content[start:]), start


# ---- TensorBoard ----


class TensorBoard:
    """A backend beside the lines: event files in ``<run directory>/tensorboard`` with scalars,
    tables as text, and images.
    """

    sync_command: str | None = None
    identity: dict[str, Any] | None = None

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(directory / "tensorboard"))
        self._step = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        # TensorBoard renders Markdown: texts stand in indented blocks, where nothing is markup.
        columns, cells = table_cells(rows)
        blocks = []
        for row in cells:
            for column, cell in zip(columns, row, strict=True):
                indented = "\n".join(f"    {line}" for line in str(cell).splitlines())
                blocks.append(f"{column}:\n\n{indented}")
        self._writer.add_text(name, "\n\n".join(blocks), step)

    def artifact(
        self,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any],
        alias: str,
    ) -> None:
        """TensorBoard has no artifacts; the run's manifest has them."""

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None:
        """TensorBoard has no lineage; the run's manifest has it."""

    def images(self, paths: Sequence[Path]) -> None:
        from matplotlib.image import imread

        for path in paths:
            pixels = imread(path)[..., :3]  # without the alpha channel
            self._writer.add_image(f"plots/{path.stem}", pixels, self._step, dataformats="HWC")

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        for name, value in summary.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"summary/{name}", value, self._step)
        self._writer.close()
