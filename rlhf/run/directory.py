"""The run directory: where it is, whether it may be used, how a run goes on in it, and where
batches go that must not be applied (a NaN, an infinity, a spike).
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from conf.choices import AdapterKind, LabelMode
from conf.schema import Config, EngineConfig, LabelConfig, ModelConfig
from conf.stages import LabelStage
from rlhf.models.directories import START, UNROUNDED, fingerprint
from rlhf.process import checkpoints, distributed
from rlhf.process.files import json_object
from rlhf.run.manifest import MANIFEST_FILE, read_manifest
from rlhf.run.tracking.files import METRICS_FILE, SAMPLES_FILE, plain_config, truncate
from rlhf.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

LOG = logging.getLogger("rlhf.run.context")
CONFIG_FILE, SUMMARY_FILE = "config.yaml", "summary.json"
CHECKPOINTS = "checkpoints"
LOOKED_UP = "looked_up.json"  # what a way to train found in the rows before it trained
STEPS_FOLDER = "steps"  # of stage=data
ANSWERS_FOLDER = "answers"  # of stage=label label.mode=export
# Files of stages that have no checkpoints: these stages check for themselves what is still valid.
# "export.json" is rlhf.labels.ledger.EXPORT_FILE, "trials.journal" rlhf.search.study.JOURNAL.
_OWN_PROGRESS = (STEPS_FOLDER, ANSWERS_FOLDER, "export.json", "trials.journal")
NO_MANIFEST = "the run can't go on: restore it, or remove it and lose what it says"
# Options of an adapter that its weights do not depend on.
_FREE_OF_ADAPTER = ("adapter.dropout", "adapter.merge_on_save")
# Options that say which weights train, and the groups that an optimizer has of them.
_PARTS = ("stage.train.", "stage.unfreeze.", "stage.depth_decay")
# Options that say how a run starts, not what it computes.
_START_OPTIONS = {"run.resume", "run.overwrite", "run.dry_run", "run.dir", "rollout.servers"}
_LAUNCH = "launch."  # what starts the processes changes nothing of what they do

# From a checkpoint and this launch's engine to the folder that the engine can load, and a warning
# or None. Raises UserError where there is no such folder. Stages whose checkpoints depend on the
# number of ranks bring one (policy.engines.resharding.adapt).
AdaptCheckpoint = Callable[[Path, EngineConfig], tuple[Path, str | None]]


def goes_on(stage: object, label: LabelConfig) -> bool:
    """Whether the run adds to its directory, whatever run.resume says.

    Labels come back a few at a time, into one ``labels`` directory.
    """
    return isinstance(stage, LabelStage) and label.mode is LabelMode["import"]


def run_directory(cfg: Config) -> Path:
    """``<run.dir>/<run.name>/<stage>``; labels that come back have a directory ``labels`` there."""
    name = "labels" if goes_on(cfg.stage, cfg.label) else cfg.stage.name
    return Path(cfg.run.dir).expanduser() / cfg.run.name / name


def check_directory(cfg: Config) -> None:
    """Refuse a run directory that exists, unless the run resumes or overwrites it.

    Raises UserError.
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
    if goes_on(cfg.stage, cfg.label):
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
            f"nor {CONFIG_FILE}, so no run of ours wrote it. Choose another run.name, or remove "
            "it yourself."
        )


def latest_checkpoint(directory: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a run directory and its step; None where there is none.

    Torn checkpoints that are newer are moved out of the way, with a warning.
    """
    folder = directory / CHECKPOINTS
    checkpoints.clear_parts(folder)
    newest, torn = checkpoints.newest(folder)
    instead = "there is no earlier one"
    if newest is not None:
        instead = f"the run goes on from {newest[0].name}"
    for path, problem in torn:
        LOG.warning(
            "resume: checkpoint %s is passed over: %s. It was moved to %s; %s.",
            path.name,
            problem,
            checkpoints.set_aside(path),
            instead,
        )
    return newest


def clear_halves(directory: Path) -> None:
    """Remove files and folders that were being written when a run ended (``*.tmp``)."""
    for path in directory.glob("*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted key."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def changed_options(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Options whose value differs between two plain configurations, as ``key: old -> new``.

    How a run starts (run.resume, run.overwrite, ...) does not count.
    """
    old, new = _flat(stored), _flat(config)
    keys = sorted((old.keys() | new.keys()) - _START_OPTIONS)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in keys
        if not key.startswith(_LAUNCH) and old.get(key) != new.get(key)
    ]


@dataclass(slots=True)
class Opened:
    """What rank 0 did when it opened the directory, for the other ranks."""

    error: str | None = None
    resume_from: Path | None = None
    resumed: bool = False


def _stored_config(path: Path) -> dict[str, Any]:
    """The configuration of the run so far.

    It only serves to tell what changed: an unreadable file is warned of and counts as empty.
    """
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        LOG.warning(
            "resume: %s can't be read (%s), so what changed in the configuration is not known.",
            path,
            str(error).splitlines()[0],
        )
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_other_weights(
    checkpoint: Path, stored: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """A checkpoint's weights and optimizer fit one adapter, one choice of weights that train, and
    one size of ``model=tiny``. Raises UserError for options, by dotted key, that ask for another.
    """
    keys = ["adapter.kind", "stage.critic_adapter", "model.add_tokens", "model.add_special_tokens"]
    keys += [key for key in config if key.startswith(_PARTS)]
    if stored.get("adapter.kind") != AdapterKind.none.value or stored.get("stage.critic_adapter"):
        adapter = [key for key in config if key.startswith("adapter.")]
        keys += [key for key in adapter if key not in (*keys, *_FREE_OF_ADAPTER)]
    if config["model.path"] is None or stored.get("model.path") is None:
        keys += ["model.path"]
    if config["model.path"] is None:
        keys += ["model.kind", *sorted(key for key in config if key.startswith("model.tiny."))]
    changed = [key for key in keys if key in stored and stored[key] != config.get(key)]
    if changed:
        was = " ".join(f"{key}={stored[key]}" for key in changed)
        now = " ".join(f"{key}={config.get(key)}" for key in changed)
        raise UserError(
            f"run.resume=true: the checkpoint {checkpoint} was trained with {was}, but this run "
            f"has {now}. Other weights train there. Resume with {was}, or begin a new run (another "
            "run.name): with model.path at model/ of this one, where that is whole weights."
        )


def _refuse_other_model(checkpoint: Path, directory: Path, model: ModelConfig) -> None:
    """A checkpoint goes on from the model that it was trained on: an adapter's changes, and a
    reference, mean nothing on another. Raises UserError where the weights differ by the
    fingerprint that the manifest holds, or where there is none and the path differs.
    """
    manifest = read_manifest(directory)
    policies = [entry for entry in (manifest or {}).get("parents", []) if entry["kind"] == "policy"]
    if not policies:
        return
    then = policies[-1]
    now = None if model.path is None else fingerprint(model.path)
    same = then["path"] == model.path
    if "weights" in then and now is not None:
        same = then["weights"] == now
    if not same:
        raise UserError(
            f"run.resume=true: the checkpoint {checkpoint} was trained on the model {then['path']} "
            f"(weights {then.get('weights', 'unknown')}), but this run has "
            f"model.path={model.path} (weights {now or 'unknown'}). Restore that model, or begin a "
            "new run (another run.name) with model.path at the weights of this one."
        )


def _refuse_weights_alone(checkpoint: Path) -> None:
    """Raises UserError for a checkpoint without its optimizer's state: going on from it would not
    be a run that never stopped.
    """
    if (checkpoint / checkpoints.WEIGHTS_ALONE).is_file():
        raise UserError(
            f"run.resume=true: the checkpoint {checkpoint} holds weights alone "
            "(stage.save_optimizer=false), so the run can't go on as if it had never stopped. "
            f"Begin a new run (another run.name) with model.path={checkpoint}: a fresh optimizer "
            "and schedule on these weights."
        )


def _resume(directory: Path, cfg: Config, adapt: AdaptCheckpoint | None) -> Opened:
    """Bring an existing run back to its newest checkpoint.

    Lines after it are removed from the run's files, and a summary of an earlier end too.
    """
    stored, config = _stored_config(directory / CONFIG_FILE), plain_config(cfg)
    newest = latest_checkpoint(directory)
    if newest is not None:
        _refuse_weights_alone(newest[0])
        _refuse_other_weights(newest[0], _flat(stored), _flat(config))
        _refuse_other_model(newest[0], directory, cfg.model)
    for change in changed_options(stored, config):
        LOG.warning("resume: the configuration differs from the run's: %s", change)
    own_progress = any((directory / name).exists() for name in _OWN_PROGRESS)
    if newest is None and not own_progress and (directory / SUMMARY_FILE).exists():
        raise UserError(
            f"{directory} is a finished run without a checkpoint, so there is nothing to resume. "
            "Run it anew with run.overwrite=true."
        )
    step = -1
    resume_from = None
    if newest is None:
        for name in (START, UNROUNDED):
            shutil.rmtree(directory / name, ignore_errors=True)  # maybe of another model
        (directory / LOOKED_UP).unlink(missing_ok=True)
    else:
        resume_from, step = newest
        if adapt is not None:
            resume_from, warning = adapt(resume_from, cfg.engine)
            if warning is not None:
                LOG.warning("resume: %s.", warning)
    removed = truncate(directory / METRICS_FILE, step)
    truncate(directory / SAMPLES_FILE, step)
    (directory / SUMMARY_FILE).unlink(missing_ok=True)
    if newest is not None:
        LOG.info(
            "resume: continuing from %s; %d metric lines after it were dropped.",
            newest[0],
            removed,
        )
    elif not own_progress:
        LOG.warning("resume: %s holds no checkpoint; the run starts from step 0.", directory)
    return Opened(resume_from=resume_from, resumed=True)


def open_directory(directory: Path, cfg: Config, adapt: AdaptCheckpoint | None) -> Opened:
    """Make the directory ready; rank 0 alone calls it. Raises UserError."""
    check_directory(cfg)
    opened = Opened()
    if directory.exists() and any(directory.iterdir()):
        if goes_on(cfg.stage, cfg.label):
            # Every line stays, but for a last line that a kill tore.
            truncate(directory / METRICS_FILE, sys.maxsize)
            opened = Opened(resumed=True)
        elif cfg.run.resume:
            opened = _resume(directory, cfg, adapt)
        else:
            shutil.rmtree(directory)
    elif cfg.run.resume and not goes_on(cfg.stage, cfg.label):
        LOG.warning("resume: %s does not exist yet; the run starts from step 0.", directory)
    directory.mkdir(parents=True, exist_ok=True)
    clear_halves(directory)  # of a start that was killed
    if opened.resumed and (directory / MANIFEST_FILE).exists():
        # A damaged manifest is refused here, where every rank learns of it.
        json_object(directory / MANIFEST_FILE, NO_MANIFEST)
    _write_config(directory / CONFIG_FILE, plain_config(cfg))
    return opened


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    beside = path.with_name(path.name + ".tmp")
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


KEPT = 5  # batches that get a name of their own; further ones replace each other


class BadBatches:
    """The names of a run's bad batches on this rank."""

    def __init__(
        self, directory: Path, name: str = "diverged-{}-rank-{}", step: str = "step-{}"
    ) -> None:
        """directory: the run's; name, step: patterns of a file's name and of its step."""
        self.directory = directory
        self.name, self.step = name, step
        self.count = 0

    def next_path(self, step: int) -> Path:
        """Where the bad batch of optimizer or online step `step` (from 1) goes, without a suffix:
        ``diverged-step-N-rank-R``, or ``diverged-last-rank-R`` after `KEPT` of them.
        """
        self.count += 1
        which = self.step.format(step) if self.count <= KEPT else "last"
        return self.directory / self.name.format(which, distributed.rank())


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write tensors by name into a safetensors file."""
    from safetensors.torch import save_file

    # clones, since safetensors refuses tensors that share memory
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, str(path))
