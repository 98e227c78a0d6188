"""The tracker of a run: files on every run, a backend beside them where one is configured."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from conf.choices import TrackingKind
from conf.schema import Config, TrackingConfig
from rlhf.process.libraries import require
from rlhf.run.tracking.files import (
    METRICS_FILE,
    SAMPLES_FILE,
    TensorBoard,
    last_line,
    plain_config,
    plain_number,
    split_nonfinite,
    truncate,
    write_line,
)


class Backend(Protocol):
    """What a tracker beside the files does. `step` counts updates from 1 (0: before the first)."""

    @property
    def identity(self) -> dict[str, Any] | None:
        """Where the run can be looked up; None where there is no such thing."""

    @property
    def sync_command(self) -> str | None:
        """The command that uploads what was written offline; None where nothing is to upload."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...

    def images(self, paths: Sequence[Path]) -> None: ...

    def artifact(
        self,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any],
        alias: str,
    ) -> None: ...

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None: ...

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None: ...


def make_backend(
    tracking: TrackingConfig,
    run_name: str,
    stage: str,
    config: Mapping[str, Any],
    directory: Path,
    resume: bool,
) -> Backend | None:
    """The backend that `tracking` asks for; None for ``tracking=none``.

    config: the configuration as a backend may show it.
    """
    match tracking.kind:
        case TrackingKind.none:
            return None
        case TrackingKind.wandb:
            from rlhf.run.tracking.wandb import WeightsAndBiases

            return WeightsAndBiases(tracking, run_name, stage, config, directory, resume)
        case TrackingKind.tensorboard:
            return TensorBoard(directory)
        case _:
            raise NotImplementedError(f"no backend for tracking={tracking.kind.value}")


def check(tracking: TrackingConfig) -> None:
    """What can be known of the tracker before a run starts. Raises UserError.

    metrics.jsonl is written without any of these libraries (tracking=none).
    """
    if tracking.kind is TrackingKind.wandb:
        from rlhf.run.tracking.wandb import wandb_mode

        require("wandb", "tracking")
        wandb_mode(tracking)
    if tracking.kind is TrackingKind.tensorboard:
        require("tensorboard", "tracking")


class Tracker:
    """Writes a run's metrics and samples; does nothing where it is not `enabled`.

    It is enabled on rank 0 only. ``metrics.jsonl`` has one line a step: ``step``, ``time_s`` (wall
    seconds of the run, those before a resume included) and flat metric names. Metrics that are
    logged again for the same step (an evaluation after a training step) join that step's line. NaN
    and infinities are written as null and named under ``nonfinite``.

    A W&B that can't start raises UserError where the run asked for ``tracking.mode=online`` or
    ``offline``; under ``auto`` the run warns and goes on offline. The files are written in any
    case.
    """

    def __init__(
        self, cfg: Config, dir: Path, stage: str, enabled: bool = True, resume: bool = False
    ) -> None:
        self.enabled = enabled
        self.dir = Path(dir)
        self._samples_every = cfg.tracking.samples_every
        self._started = time.monotonic()
        # The last line, still open for metrics of the same step, and where it starts in the file.
        self._line: dict[str, Any] | None = None
        self._offset = 0
        # Samples that are not in the backend's table yet.
        self._pending: tuple[int, list[dict[str, Any]]] | None = None
        self._has_table = False
        self._backend_step = 0  # the highest step that the backend knows
        self._backend: Backend | None = None
        self._closed = False
        if not enabled:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        metrics = self.dir / METRICS_FILE
        if resume:
            self._line, self._offset = last_line(metrics)
            self._started -= float(self._line["time_s"]) if self._line else 0.0
        if not metrics.exists():
            metrics.touch()
        self._file = metrics.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)
        self._backend = make_backend(
            cfg.tracking, cfg.run.name, stage, plain_config(cfg), self.dir, resume
        )

    def elapsed(self) -> float:
        """Wall seconds since the run began, those before a resume included."""
        return time.monotonic() - self._started

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the figures of a step.

        Raises ValueError for a step before the last logged step, or for a value that is no number.
        """
        if not self.enabled:
            return
        figures = {name: plain_number(value) for name, value in metrics.items()}
        for name, value in figures.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"metric {name} of step {step} is {value!r}: expected a number.")
        if self._line is not None and step < self._line["step"]:
            raise ValueError(
                f"step {step} was logged after step {self._line['step']}: steps may not go back."
            )
        self._line = self._joined(step, figures)
        write_line(self._file, self._offset, json.dumps(self._line), self.dir / METRICS_FILE)
        # W&B takes no step twice; after a rewind it has the steps up to here already.
        if self._backend is not None and step >= self._backend_step:
            self._backend_step = step
            self._backend.log(step, figures)

    def _joined(self, step: int, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The line of `step`: the open line with `figures` added, or a new one after it."""
        finite, bad = split_nonfinite(figures)
        if self._line is not None and step == self._line["step"]:
            bad = [name for name in self._line.get("nonfinite", []) if name not in finite] + bad
            line = {**self._line, **finite}
        else:
            self._offset = self._file.seek(0, os.SEEK_END)
            line = {"step": step, "time_s": 0.0, **finite}
        line["time_s"] = round(self.elapsed(), 3)
        line.pop("nonfinite", None)
        if bad:
            line["nonfinite"] = bad
        return line

    def rewind(self, step: int) -> None:
        """Remove what was logged after `step`, because the run went back to it.

        What the backend has been sent stays there.
        """
        if not self.enabled:
            return
        self._file.close()
        for name in (METRICS_FILE, SAMPLES_FILE):
            truncate(self.dir / name, step)
        self._line, self._offset = last_line(self.dir / METRICS_FILE)
        self._file = (self.dir / METRICS_FILE).open("r+b", buffering=0)
        self._pending = None

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append `rows` to samples.jsonl.

        Every ``tracking.samples_every`` steps, and at the first and the last step, they also become
        a table of the backend.
        """
        if not self.enabled or not rows:
            return
        clean = [_sample(step, row) for row in rows]
        text = "\n".join(json.dumps(values, ensure_ascii=False) for values in clean)
        with (self.dir / SAMPLES_FILE).open("ab", buffering=0) as out:
            write_line(out, out.tell(), text, self.dir / SAMPLES_FILE)
        if self._backend is None or not self._samples_every:
            return
        if not self._has_table or step % self._samples_every == 0:
            self._backend.table("samples", clean, step)
            self._has_table, self._pending = True, None
        else:
            self._pending = (step, clean)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show rows as a table of the backend; texts are never read as markup."""
        if self._backend is not None and rows:
            self._backend.table(name, rows, step)

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        metadata: Mapping[str, Any],
        root: Path,
        alias: str,
    ) -> None:
        """Log a version of an artifact: `files`, named relative to `root`.

        `alias` is a digest of their content, by which `use` refers to this version.
        """
        if self._backend is None:
            return
        named = {path.relative_to(root).as_posix(): path for path in files}
        self._backend.artifact(name, kind, named, metadata, alias)

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None:
        """Record that this run reads another run's artifact; `run` is that run's `identity`.

        Only W&B online has such a record. An artifact that it does not know is no error.
        """
        if self._backend is not None:
            self._backend.use(name, alias, run)

    @property
    def identity(self) -> dict[str, Any] | None:
        """What the tracker knows this run by (W&B: project, entity, run_id and mode); None where
        there is nothing of the kind.
        """
        return self._backend.identity if self._backend is not None else None

    def images(self, paths: Sequence[Path]) -> None:
        """Show the plots in the backend; the files stay where they are."""
        if self._backend is not None and paths:
            self._backend.images(list(paths))

    @property
    def sync_command(self) -> str | None:
        """The command that uploads an offline W&B run; None where there is nothing to upload."""
        return self._backend.sync_command if self._backend is not None else None

    def finish(self, summary: Mapping[str, Any] | None = None, exit_code: int = 0) -> None:
        """Close everything; `summary` becomes the backend's summary. Further calls do nothing."""
        if not self.enabled or self._closed:
            return
        self._closed = True
        self._file.close()
        if self._backend is None:
            return
        if self._pending is not None:
            step, rows = self._pending
            self._backend.table("samples", rows, step)
        self._backend.finish(split_nonfinite(summary or {})[0], exit_code)


def _sample(step: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of samples.jsonl."""
    plain = {name: plain_number(value) for name, value in row.items()}
    values, bad = split_nonfinite({"step": step, **plain})
    if bad:
        values["nonfinite"] = bad
    return values
