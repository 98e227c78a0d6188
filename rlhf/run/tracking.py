"""Metrics of a run: metrics.jsonl and samples.jsonl always, W&B or TensorBoard beside them. The
only importer of wandb.
"""

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from conf.choices import TrackingKind, WandbMode
from conf.schema import Config, TrackingConfig
from rlhf.process.hashing import digest
from rlhf.process.redaction import redact, redacted_arguments
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.run.tracking")
METRICS_FILE, SAMPLES_FILE, RUN_ID_FILE = "metrics.jsonl", "samples.jsonl", "run_id"


def split_nonfinite(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` with NaN and infinities as None (JSON has neither), and the names they had."""
    bad = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    return {k: None if k in bad else v for k, v in values.items()}, bad


_NAME_LENGTH = 128  # of an artifact, at W&B


def artifact_name(name: str) -> str:
    """`name` as W&B takes it: letters, digits, ``-``, ``_`` and ``.``, at most 128 of them; without
    what looks like a secret.
    """
    fits = re.sub(r"[^A-Za-z0-9_.]+", "-", str(redact("", name))).strip("-") or "artifact"
    return fits if len(fits) <= _NAME_LENGTH else f"{fits[: _NAME_LENGTH - 17]}-{digest(name)}"


def table_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns, and the cells of each row: numbers, texts, or null, one kind a column (else all as
    text); other values as JSON. Nothing secret.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(name: str, value: Any) -> Any:
        found = redact(name, _plain(value))
        if isinstance(found, float) and not math.isfinite(found):
            return None
        return (
            found
            if found is None or isinstance(found, (bool, int, float, str))
            else json.dumps(found, ensure_ascii=False, default=str)
        )

    def kind(value: Any) -> type:
        return (
            bool if isinstance(value, bool) else float if isinstance(value, (int, float)) else str
        )

    cells = [[cell(name, row.get(name)) for name in columns] for row in rows]
    for i in range(len(columns)):
        if len({kind(row[i]) for row in cells if row[i] is not None}) > 1:
            for row in cells:
                row[i] = None if row[i] is None else str(row[i])
    return columns, cells


def plain_config(cfg: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of JSON values (enumerations by value), without
    secrets.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    out: dict[str, Any] = redact("", plain(dataclasses.asdict(cfg)))
    return out


def _plain(value: Any) -> Any:
    """A numpy or one-element tensor scalar as a Python number; anything else as it is."""
    return value.item() if hasattr(value, "item") and not isinstance(value, (str, bytes)) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a file that `Tracker` wrote; a torn last line (a killed run) is left
    out. Raises UserError for any other damage.
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

    Raises UserError when the disk takes no more; nothing of the line is then left.
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
    Returns the lines dropped.
    """
    rows = read_jsonl(path)
    kept = [r for r in rows if r["step"] <= last_step]
    if path.exists():
        beside = path.with_suffix(".tmp")
        beside.write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8"
        )
        beside.replace(path)
    return len(rows) - len(kept)


def wandb_login() -> bool:
    """True where W&B finds credentials: WANDB_API_KEY, an identity token, netrc or its settings
    file. Uses no network.

    Raises UserError when W&B finds credentials of an invalid form.
    """
    from wandb import Settings
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    settings = Settings()
    settings.update_from_env_vars(os.environ)
    try:
        return (
            wbauth.authenticate_session(
                host=settings.base_url, source="rlhf", prompt=False, update_session=False
            )
            is not None
        )
    except AuthenticationError as error:
        raise UserError(
            f"tracking=wandb: the W&B login is invalid: {error}. Run `wandb login` again, or set "
            "tracking.mode=offline."
        ) from error


def wandb_mode(tracking: TrackingConfig) -> WandbMode:
    """The mode that a run will use: ``auto`` follows WANDB_MODE where it is set, else is online
    where a login exists.

    Raises UserError for ``online`` without a login and for a WANDB_MODE that is none of online,
    offline.
    """
    if tracking.mode is WandbMode.auto:
        chosen = os.environ.get("WANDB_MODE", "").strip().lower()
        if chosen:
            if chosen not in (WandbMode.online.value, WandbMode.offline.value):
                raise UserError(
                    f"WANDB_MODE={chosen} does not go with tracking=wandb: expected online or "
                    "offline (or set tracking=none)."
                )
            mode = WandbMode(chosen)
        else:
            mode = WandbMode.online if wandb_login() else WandbMode.offline
    else:
        mode = tracking.mode
    if mode is WandbMode.online and not wandb_login():
        raise UserError(
            "tracking.mode=online, but W&B finds no login: run `wandb login` or set "
            "WANDB_API_KEY, or set tracking.mode=offline."
        )
    return mode


def check(tracking: TrackingConfig) -> None:
    """What can be known of the tracker before a run starts. Raises UserError."""
    if tracking.kind is TrackingKind.wandb:
        _require("wandb", tracking.kind)
        wandb_mode(tracking)
    if tracking.kind is TrackingKind.tensorboard:
        _require("tensorboard", tracking.kind)


def _require(package: str, kind: TrackingKind) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"tracking={kind.value} needs the package {package}, which is not installed: `pip "
            f"install {package}`, or set tracking=none."
        )


class _Sink(Protocol):
    """What a tracker beside the files does."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

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


class _WandbSink:
    """One W&B run per stage; all of it lies in ``<run directory>/wandb``, silently."""

    def __init__(self, cfg: Config, directory: Path, stage: str, resume: bool) -> None:
        # vLLM imports clients of language-model services, at the sight of which W&B would advertise
        # its tracer on every run.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        import wandb

        self._wandb = wandb
        self._mode = wandb_mode(cfg.tracking)
        self._used: set[str] = set()
        self._home = directory / "wandb"
        self._home.mkdir(parents=True, exist_ok=True)
        id_file = self._home / RUN_ID_FILE
        run_id = (
            id_file.read_text(encoding="utf-8").strip()
            if resume and id_file.exists()
            else secrets.token_hex(4)
        )
        id_file.write_text(run_id, encoding="utf-8")
        options: dict[str, Any] = {
            "project": redact("", cfg.tracking.project),
            "entity": redact("", cfg.tracking.entity),
            "group": redact("", cfg.tracking.group or cfg.run.name),
            "tags": redact("", list(cfg.tracking.tags)) or None,
            "name": redact("", f"{cfg.run.name}/{stage}"),
            "job_type": stage,
            "id": run_id,
            "dir": str(directory),
            "config": plain_config(cfg),
            "settings": wandb.Settings(silent=True, console="off"),
        }
        if self._mode is WandbMode.online and resume:
            # offline, W&B joins runs of the same id when they are synced
            options["resume"] = "allow"
        try:
            self._run = self._start(self._mode, options)
        except wandb.errors.Error as error:
            if cfg.tracking.mode is WandbMode.online or self._mode is WandbMode.offline:
                raise UserError(
                    f"tracking=wandb could not start: {error}. Set tracking.mode=offline, or "
                    "tracking=none."
                ) from error
            # The user asked for `auto`, and the metrics are safe in files: go on offline, and say
            # so.
            LOG.warning(
                "W&B could not start online (%s); this run is tracked offline instead.", error
            )
            self._mode = WandbMode.offline
            wandb.teardown()  # else W&B's service takes the id for that of a run that goes on
            self._run = self._start(self._mode, options)

    def _start(self, mode: WandbMode, options: Mapping[str, Any]) -> Any:
        with redacted_arguments():  # W&B records the command line
            return self._wandb.init(
                mode="online" if mode is WandbMode.online else "offline", **options
            )

    @property
    def sync_command(self) -> str | None:
        """What uploads an offline run (the parts before a resume included); None when the run is
        online.
        """
        if self._mode is WandbMode.online:
            return None
        return "wandb sync " + " ".join(
            shlex.quote(str(p)) for p in sorted(self._home.glob("offline-run-*"))
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    @property
    def identity(self) -> dict[str, Any]:
        """Where the run is, for those who read its manifest."""
        return {
            "project": self._run.project,
            "entity": self._run.entity or None,
            "run_id": self._run.id,
            "mode": self._mode.value,
        }

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.table("samples", rows, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns, cells = table_cells(rows)
        self._run.log({name: self._wandb.Table(columns=columns, data=cells)}, step=step)

    def images(self, paths: Sequence[Path]) -> None:
        self._run.log({f"plots/{p.stem}": self._wandb.Image(str(p)) for p in paths})

    def artifact(
        self,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any],
        alias: str,
    ) -> None:
        artifact = self._wandb.Artifact(name, type=kind, metadata=dict(metadata))
        # immutable + skip_cache: read in place, no second copy of the weights in the user's home
        for inside, path in files.items():
            artifact.add_file(str(path.resolve()), name=inside, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", alias])

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None:
        reference = "/".join(
            [*(str(run[key]) for key in ("entity", "project") if run.get(key)), f"{name}:{alias}"]
        )
        # W&B can't look an artifact up offline
        if self._mode is WandbMode.offline or reference in self._used:
            return
        self._used.add(reference)
        try:
            self._run.use_artifact(reference)
        except (self._wandb.errors.Error, ValueError, OSError) as error:
            LOG.warning(
                "W&B does not know the artifact %s (%s): the lineage is in manifest.json only. "
                "Was its run synced?",
                reference,
                error,
            )

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        for name, value in summary.items():
            self._run.summary[name] = value
        self._run.finish(exit_code=exit_code)


class _TensorBoardSink:
    """Event files in ``<run directory>/tensorboard``."""

    sync_command, identity = None, None

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(directory / "tensorboard"))
        self._step = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.table("samples", rows, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        # TensorBoard renders Markdown: texts stand in indented blocks, where nothing is markup
        columns, cells = table_cells(rows)
        named = [
            (column, str(cell)) for row in cells for column, cell in zip(columns, row, strict=True)
        ]
        blocks = [
            f"{column}:\n\n" + "\n".join(f"    {line}" for line in text.splitlines())
            for column, text in named
        ]
        self._writer.add_text(name, "\n\n".join(blocks), step)

    def artifact(
        self,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any],
        alias: str,
    ) -> None:
        """TensorBoard has none; the run's manifest has them."""

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None:
        """Likewise."""

    def images(self, paths: Sequence[Path]) -> None:
        from matplotlib.image import imread

        for path in paths:
            self._writer.add_image(
                f"plots/{path.stem}", imread(path)[..., :3], self._step, dataformats="HWC"
            )

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        for name, value in summary.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"summary/{name}", value, self._step)
        self._writer.close()


class Tracker:
    """Writes a run's metrics and samples; does nothing when not `enabled` (every rank but the
    first).

    ``metrics.jsonl`` has one line per step: ``step``, ``time_s`` (wall seconds of the run, those
    before a resume included) and flat metric names. Metrics logged again for the same step (an
    evaluation after a training step) join that step's line. NaN and infinities are written as null
    and named under ``nonfinite``.

    A W&B that can't start raises UserError when the run asked for ``tracking.mode=online`` or is
    offline; under ``auto`` a failed online start is warned of and the run goes on offline. The
    files are written in any case.
    """

    def __init__(
        self, cfg: Config, dir: Path, stage: str, enabled: bool = True, resume: bool = False
    ) -> None:
        self.enabled = enabled
        self.dir = Path(dir)
        self._every = cfg.tracking.samples_every
        self._started = time.monotonic()
        # the last line, still open for metrics of the same step
        self._line: dict[str, Any] | None = None
        self._offset = 0  # where that line starts in the file
        # samples not yet in the tracker's table
        self._pending: tuple[int, list[dict[str, Any]]] | None = None
        self._tabled = False
        self._told = 0  # the highest step that the tracker beside the files knows
        self._sink: _Sink | None = None
        self._closed = False
        if not enabled:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        if resume:
            self._line, self._offset = _last_line(self.dir / METRICS_FILE)
            self._started -= float(self._line["time_s"]) if self._line else 0.0
        self._file = (self.dir / METRICS_FILE).open(
            "r+b" if (self.dir / METRICS_FILE).exists() else "w+b", buffering=0
        )
        self._file.seek(0, os.SEEK_END)
        if cfg.tracking.kind is TrackingKind.wandb:
            self._sink = _WandbSink(cfg, self.dir, stage, resume)
        elif cfg.tracking.kind is TrackingKind.tensorboard:
            self._sink = _TensorBoardSink(self.dir)

    def elapsed(self) -> float:
        """Wall seconds since the run began, those before a resume included."""
        return time.monotonic() - self._started

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's figures. Raises ValueError for a step before the last one, or for a value that
        isn't a number.
        """
        if not self.enabled:
            return
        plain = {k: _plain(v) for k, v in metrics.items()}
        for name, value in plain.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"metric {name} of step {step} is {value!r}: expected a number.")
        if self._line is not None and step < self._line["step"]:
            raise ValueError(
                f"step {step} was logged after step {self._line['step']}: steps may not go back."
            )
        finite, bad = split_nonfinite(plain)
        if self._line is not None and step == self._line["step"]:
            bad = [n for n in self._line.get("nonfinite", []) if n not in finite] + bad
            line = {**self._line, **finite}
        else:
            self._offset = self._file.seek(0, os.SEEK_END)
            line = {"step": step, "time_s": 0.0, **finite}
        line["time_s"] = round(self.elapsed(), 3)
        line.pop("nonfinite", None)
        if bad:
            line["nonfinite"] = bad
        self._line = line
        write_line(self._file, self._offset, json.dumps(line), self.dir / METRICS_FILE)
        # W&B takes no step twice; after a rewind it has those up to here already
        if self._sink is not None and step >= self._told:
            self._told = step
            self._sink.log(step, plain)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`, because the run went back to it. What a tracker
        beside the files has been told stays there.
        """
        if not self.enabled:
            return
        self._file.close()
        for name in (METRICS_FILE, SAMPLES_FILE):
            truncate(self.dir / name, step)
        self._line, self._offset = _last_line(self.dir / METRICS_FILE)
        self._file = (self.dir / METRICS_FILE).open("r+b", buffering=0)
        self._pending = None

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append `rows` to samples.jsonl; every ``tracking.samples_every`` steps (and at the first
        and the last) also to the tracker's table.
        """
        if not self.enabled or not rows:
            return
        clean = []
        for row in rows:
            values, bad = split_nonfinite({"step": step, **{k: _plain(v) for k, v in row.items()}})
            if bad:
                values["nonfinite"] = bad
            clean.append(values)
        with (self.dir / SAMPLES_FILE).open("ab", buffering=0) as out:
            write_line(
                out,
                out.tell(),
                "\n".join(json.dumps(values, ensure_ascii=False) for values in clean),
                self.dir / SAMPLES_FILE,
            )
        if self._sink is None or not self._every:
            return
        if not self._tabled or step % self._every == 0:
            self._sink.samples(step, clean)
            self._tabled, self._pending = True, None
        else:
            self._pending = (step, clean)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Rows as a table of the tracker (W&B: a Table; TensorBoard: text). Markup in texts stays
        text; what looks like a secret is left out.
        """
        if self._sink is not None and rows:
            self._sink.table(name, rows, step)

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        metadata: Mapping[str, Any],
        root: Path,
        alias: str,
    ) -> None:
        """Log a version of an artifact: `files`, named relative to `root`. By `alias`, a digest of
        their content, `use` finds this version.
        """
        if self._sink is not None:
            self._sink.artifact(
                name,
                kind,
                {path.relative_to(root).as_posix(): path for path in files},
                metadata,
                alias,
            )

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None:
        """Say that this run reads another run's artifact. `run`: that run's `wandb_run`. W&B online
        only, and no error where it does not know it.
        """
        if self._sink is not None:
            self._sink.use(name, alias, run)

    @property
    def wandb_run(self) -> dict[str, Any] | None:
        """project, entity, run_id and mode of the W&B run; None without one."""
        found: dict[str, Any] | None = getattr(self._sink, "identity", None)
        return found

    def images(self, paths: Sequence[Path]) -> None:
        """Show the plots in the tracker; the files themselves stay where they are."""
        if self._sink is not None and paths:
            self._sink.images(list(paths))

    @property
    def sync_command(self) -> str | None:
        """The command that uploads an offline W&B run; None where there is nothing to upload."""
        return getattr(self._sink, "sync_command", None)

    def finish(self, summary: Mapping[str, Any] | None = None, exit_code: int = 0) -> None:
        """Close everything once; `summary` becomes W&B's summary. Further calls do nothing."""
        if not self.enabled or self._closed:
            return
        self._closed = True
        self._file.close()
        if self._sink is not None:
            if self._pending is not None:
                self._sink.samples(*self._pending)
            self._sink.finish(split_nonfinite(summary or {})[0], exit_code)


def _last_line(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The last line of metrics.jsonl and the byte where it starts; (None, 0) when there is none."""
    if not path.exists():
        return None, 0
    content = path.read_bytes()
    if not content.strip():
        return None, 0
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    return json.loads(content[start:]), start
