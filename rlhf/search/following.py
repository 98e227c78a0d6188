"""A trial's metrics.jsonl, read while the trial writes it."""

import json
import math
from pathlib import Path
from typing import Any


class Follower:
    """The values of a metric in a file that grows, each step once and in order.

    The last line may be written anew, with an evaluation's figures beside the training's, and a run
    that goes on cuts off the lines after its checkpoint. So the last line is read again each time,
    and a file that has become shorter from its beginning.
    """

    def __init__(self, path: Path, metric: str | None) -> None:
        """`metric`: None: only the steps are of interest."""
        self.path, self.metric = path, metric
        self.step: int | None = None  # the last that was logged
        self._offset = 0  # where the last whole line starts
        self._told = -1  # the last step whose value was returned
        self._seen = (-1, -1)  # size and time of the file

    def values(self) -> list[tuple[int, float]]:
        """Steps and values that are new since the last call; NaN for a value that was no finite
        number.
        """
        try:
            state = self.path.stat()
        except OSError:
            return []
        if (state.st_size, state.st_mtime_ns) == self._seen:
            return []
        self._seen = (state.st_size, state.st_mtime_ns)
        new = []
        for row in self._rows(state.st_size):
            self.step = row["step"]
            value = self._value(row)
            if value is not None and row["step"] > self._told:
                self._told = row["step"]
                new.append((row["step"], value))
        return new

    def _rows(self, size: int) -> list[dict[str, Any]]:
        if size < self._offset:
            self._offset = 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        rows: list[dict[str, Any]] = []
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                # cut off and written anew between two looks: the next look starts at the beginning
                self._offset, self._seen = 0, (-1, -1)
                return rows
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        self._offset += whole.rstrip(b"\n").rfind(b"\n") + 1 if whole else 0
        return rows

    def _value(self, row: dict[str, Any]) -> float | None:
        """The metric of a line; None where it has none."""
        if self.metric is None:
            return None
        if self.metric in row.get("nonfinite", []):
            return math.nan
        value = row.get(self.metric)
        return float(value) if isinstance(value, (int, float)) else None
