"""The life of a run: opened, seeded, recorded, finished.

What other programs read of a run directory is fixed in the reference page "Run directory".
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import Config
from rlhf.models import directories
from rlhf.process import checkpoints, distributed, redaction
from rlhf.process.files import json_object, json_value, sha256, write_json
from rlhf.process.randomness import seed_everything
from rlhf.process.supervision import Watchdog, peak_rss_mb
from rlhf.run import console, plots
from rlhf.run.directory import (
    CHECKPOINTS,
    NO_MANIFEST,
    SUMMARY_FILE,
    AdaptCheckpoint,
    Opened,
    clear_halves,
    goes_on,
    open_directory,
    run_directory,
)
from rlhf.run.manifest import MANIFEST_FILE, Entry, Manifest, artifact_digest, origin
from rlhf.run.tracking.files import artifact_name
from rlhf.run.tracking.tracker import Tracker
from rlhf.types import Interrupted, UserError

LOG = logging.getLogger("rlhf.run.context")
MODEL = "model"  # kind of artifact
_CANT_WRITE = (
    "the run directory {} can't be written: {}. Make room there, or choose another run.dir."
)


def _is_same(first: Entry, second: Entry, mark: str) -> bool:
    """Whether two inputs are the same by `mark`, or by their paths where one has no mark."""
    if mark in first and mark in second:
        return bool(first[mark] == second[mark])
    return bool(first["path"] == second["path"])


def _shown(entry: Entry, mark: str) -> str:
    """An input for a message."""
    kind = entry.get("kind", "data")
    return f"{kind} {entry['path']} ({mark} {entry.get(mark, 'unknown')})"


class RunContext:
    """One stage's run. Every rank holds a context; only rank 0's writes to the disk.

    cfg: the configuration; stage: its name; dir: the run directory; tracker: metrics and samples;
    resume_from: the checkpoint to continue from, or None; model_dir, checkpoint_dir: where the
    stage saves; watchdog: of its phases, which begins with `closing`.
    """

    def __init__(self, cfg: Config, directory: Path, opened: Opened, argv: Sequence[str]) -> None:
        self.cfg = cfg
        self.argv = tuple(argv)
        self.watchdog = Watchdog(cfg.run.phase_timeout_s)
        self.stage: str = cfg.stage.name
        self.dir = directory
        self.resume_from = opened.resume_from
        self.enabled = distributed.is_main()
        self.summary: dict[str, Any] = {}  # further entries of summary.json
        self._manifest: Manifest | None = None
        if self.enabled:
            path = directory / MANIFEST_FILE
            resumed = opened.resumed and path.is_file()
            self._manifest = Manifest.start(
                directory,
                stage=self.stage,
                seed=cfg.run.seed,
                argv=argv,
                resume_from=opened.resume_from,
                earlier=json_object(path, NO_MANIFEST) if resumed else {},
                keep_entries=goes_on(cfg.stage, cfg.label),
            )
        self.tracker = Tracker(
            cfg, directory, self.stage, enabled=self.enabled, resume=opened.resumed
        )
        if self.tracker.identity is not None:
            self.record("wandb", self.tracker.identity)

    @classmethod
    def open(
        cls, cfg: Config, argv: Sequence[str] = (), adapt: AdaptCheckpoint | None = None
    ) -> "RunContext":
        """Create, resume or replace the run directory, and seed every random generator.

        A collective: every rank calls it, and a UserError is raised on every rank. `adapt` brings
        the checkpoint of a resumed run into a form that this launch can load.
        """
        directory = run_directory(cfg)
        opened = Opened()
        if distributed.is_main():
            try:
                opened = open_directory(directory, cfg, adapt)
            except UserError as error:  # the other ranks wait for the outcome, good or bad
                opened = Opened(error=str(error))
            except OSError as error:
                opened = Opened(error=_CANT_WRITE.format(directory, error))
        opened = distributed.broadcast(opened)
        if opened.error is not None:
            raise UserError(opened.error)
        seed_everything(cfg.run.seed)
        try:
            return cls(cfg, directory, opened, argv)
        except OSError as error:
            if not checkpoints.storage_error(error):
                raise
            raise UserError(_CANT_WRITE.format(directory, error)) from error

    @property
    def model_dir(self) -> Path:
        return self.dir / "model"

    @property
    def start_dir(self) -> Path:
        """Whole weights that the run starts from, where model.path has none."""
        return self.dir / directories.START

    @property
    def checkpoint_dir(self) -> Path:
        return self.dir / CHECKPOINTS

    def add_parent(self, kind: str, path: str | Path | None) -> None:
        """Record what this run builds on: its path, its summary's hash, the run that it comes from.

        kind: policy, reward, ...
        """
        if self._manifest is None or path is None:
            return
        parent = Path(path).expanduser()
        summaries = [parent / SUMMARY_FILE, parent.parent / SUMMARY_FILE]
        summary = next((file for file in summaries if file.is_file()), None)
        entry = {
            "kind": kind,
            "path": str(path),
            "summary_sha256": sha256(summary) if summary else None,
        }
        weights = directories.fingerprint(path)
        if weights is not None:
            entry["weights"] = weights
        self._tell_change("parents", "weights", entry)
        if parent.exists():
            entry |= self._origin(parent)
        self._manifest.add("parents", entry)

    def add_inputs(self, kind: str, files: Iterable[Path]) -> None:
        """Record what a training run reads: the model that it starts from, as `kind`, the adapters
        of adapter.load, and its data `files`.
        """
        self.add_parent(kind, self.cfg.model.path)
        for place in self.cfg.adapter.load:
            self.add_parent("adapter", place)
        for path in files:
            self.add_data(path)

    def _tell_change(self, key: str, mark: str, entry: Entry) -> None:
        """Warn where a resumed run reads something else than before its checkpoint; the manifest
        keeps both. `mark`: the key by which two entries of the manifest's list `key` are the same.

        Raises UserError for other rows where the tokenizer was trained on them.
        """
        assert self._manifest is not None
        before, step = self._manifest.before(key)
        before = [other for other in before if other.get("kind") == entry.get("kind")]
        if not before or any(_is_same(other, entry, mark) for other in before):
            return
        same_path = [other for other in before if other["path"] == entry["path"]]
        then = ", ".join(_shown(other, mark) for other in same_path or before)
        told = f"{_shown(entry, mark)} is not what it was up to step {step}: {then}"
        if key == "data" and self.cfg.model.path is None:
            raise UserError(
                f"run.resume=true: {told}. model=tiny without model.path trains its tokenizer on "
                "the rows, so that the checkpoint's tokens would mean something else. Restore the "
                "file, or begin anew: another run.name, or run.overwrite=true."
            )
        LOG.warning("resume: %s. The run goes on with it; manifest.json keeps both.", told)

    def _origin(self, path: Path, file_sha256: str | None = None) -> Entry:
        """The manifest entry ``from`` of an input; {} for an input that no run of ours made.

        The tracker records that this run uses it.
        """
        source = origin(path, self.dir, file_sha256)
        if source is None:
            return {}
        if source.get("changed"):
            LOG.warning(
                "%s was changed since the run in %s published it.",
                path,
                os.path.normpath(self.dir / source["run"]),
            )
        if "wandb" in source:
            for artifact in source["artifacts"]:
                self.tracker.use(artifact["name"], artifact["digest"], source["wandb"])
        return {"from": source}

    def record(self, key: str, value: Any) -> None:
        """Put an entry of the stage's own into the manifest."""
        if self._manifest is not None:
            self._manifest.set(key, value)

    def add_data(self, path: str | Path | None) -> str | None:
        """Record a data file with its hash, which rank 0 gets back (the others None).

        Raises UserError when there is no such file.
        """
        if self._manifest is None or path is None:
            return None
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"data file {file}: no such file.")
        file_sha256 = sha256(file)
        entry = {"path": str(path), "sha256": file_sha256, "bytes": file.stat().st_size}
        self._tell_change("data", "sha256", entry)
        entry |= self._origin(file, file_sha256)
        self._manifest.add("data", entry)
        return file_sha256

    def tell_found(self, model: Any) -> None:
        """Note what the method that trained `model` found out, where it tells something (its
        `found`), in the run's summary, and draw it.
        """
        found = getattr(model, "found", None)
        if found is None or not self.enabled:
            return
        self.summary["adapter"] = found()
        path = self.dir / "plots" / "adapter.png"
        plots.plot_blocks(self.summary["adapter"], path)
        self.tracker.images([path])

    def publish(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        metadata: Mapping[str, Any] | None = None,
        root: Path | None = None,
    ) -> None:
        """Record a versioned artifact of this run: its files with their hashes, and `metadata`.

        Further calls with a name add versions. The tracker gets the artifact too, its files named
        relative to `root` (the run directory); a model only with ``tracking.log_model``. Names are
        made to fit W&B, and what looks like a secret is removed from name and metadata.
        """
        if self._manifest is None:
            return
        known = redaction.redact("", json_value(dict(metadata or {})))
        listed = [self._manifest.describe(path) for path in files]
        entry = {"name": artifact_name(name), "kind": kind, "files": listed, "metadata": known}
        entry["digest"] = artifact_digest(entry)
        is_new = self._manifest.add("artifacts", entry)
        if is_new and (kind != MODEL or self.cfg.tracking.log_model):
            self.tracker.artifact(
                entry["name"], kind, files, known, root or self.dir, entry["digest"]
            )

    @contextlib.contextmanager
    def closing(self) -> Iterator["RunContext"]:
        """Around a stage: its phases are watched, and the tracker is closed whatever ends it.

        An exception marks the run as failed for the tracker and removes half-written files. A disk
        that is full or read-only becomes a UserError.
        """
        with self.watchdog:
            try:
                yield self
            except BaseException as error:
                self._close_failed(error)
                raise
            self.tracker.finish()

    def _close_failed(self, error: BaseException) -> None:
        self.watchdog.phase("close")
        if self.enabled:
            clear_halves(self.dir)
        self.tracker.finish(exit_code=error.code if isinstance(error, Interrupted) else 1)
        ours = True
        if isinstance(error, PermissionError):
            ours = str(error.filename).startswith(str(self.dir))
        if ours and checkpoints.storage_error(error):
            raise UserError(
                f"{self.dir} takes no more: {error}. Make room or give write access, then go on "
                "with run.resume=true."
            ) from error

    def finish(
        self,
        *,
        steps: int,
        metrics: Mapping[str, Any],
        model: str | None = "model",
        figures: Mapping[str, Any] | None = None,
        files: Mapping[str, Path | str] | None = None,
        next_command: str | None = None,
    ) -> None:
        """End the run: summary.json, plots, tracker and the closing panel.

        Rank 0 alone acts; no collective is inside.

        steps: optimizer steps or online iterations done; metrics: the run's final and initial
        figures; model: the model's directory inside the run directory, or None; figures, files,
        next_command: what the panel shows.
        """
        if not self.enabled:
            return
        model_dir = self.dir / model if model is not None else None
        if model_dir is not None and not model_dir.is_dir():
            raise FileNotFoundError(
                f"{self.stage}: {model_dir} was to be this run's model, but it was not saved."
            )
        wall_s, peak_mb = self.tracker.elapsed(), peak_rss_mb()
        images = plots.plot_run(self.dir)
        self.tracker.images(images)
        if model_dir is not None:
            self._publish_model(model_dir, steps)
        self.tracker.finish(json_value(metrics))
        summary = {
            "stage": self.stage,
            "steps": steps,
            "wall_s": round(wall_s, 3),
            "peak_rss_mb": round(peak_mb, 1),
            "metrics": dict(metrics),
            "model": model,
            **self.summary,
        }
        write_json(self.dir / SUMMARY_FILE, summary)  # last: whoever sees it sees a whole run
        shown: dict[str, Path | str] = {"run": self.dir}
        if model_dir is not None:
            shown["model"] = model_dir
        shown |= files or {}
        if images:
            shown["plots"] = self.dir / "plots"
        notes = []
        if self.tracker.sync_command:
            notes.append(f"tracked offline; upload with: {self.tracker.sync_command}")
        heading = (
            f"{self.stage}: {steps} steps in {console.duration(wall_s)}, "
            f"peak memory {peak_mb:.0f} MiB"
        )
        console.closing_panel(
            heading, metrics if figures is None else figures, shown, next_command, notes
        )

    def _publish_model(self, model_dir: Path, steps: int) -> None:
        weights = sorted(path for path in model_dir.rglob("*") if path.is_file())
        name = f"{self.cfg.run.name}-{self.stage}"
        self.publish(name, MODEL, weights, {"stage": self.stage, "steps": steps}, model_dir)
