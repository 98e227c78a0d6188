"""One job of a multirun (``-m``), in a process of its own."""

import signal
import sys
from pathlib import Path
from typing import Any

from conf.schema import Config
from rlhf.process import interrupts, redaction
from rlhf.types import UserError

_OURS = ("run.name=", "tracking.group=")  # options that each job gets from here


def run_job(cfg: Config, hydra: Any) -> None:
    """Run the job of a sweep that Hydra has just composed; `hydra` is its own configuration.

    A process of its own, since vLLM, DeepSpeed and torch keep state that a second job in the same
    process would inherit. Raises UserError for a job that failed, SystemExit for one that was
    stopped.
    """
    overrides = [text for text in hydra.overrides.task if not text.startswith(_OURS)]
    group = cfg.tracking.group or f"{cfg.run.name}-sweep"
    command = [sys.executable, "-m", "rlhf", *overrides]
    command += [f"run.name={cfg.run.name}-{hydra.job.num}", f"tracking.group={group}"]
    clean_sweep_file(Path(hydra.sweep.dir) / "multirun.yaml")
    code = interrupts.run_child(command)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise SystemExit(code)  # the job has said what it saved
    if code != 0:
        raise UserError(
            f"multirun job {hydra.job.num} ended with exit code {code}: {' '.join(command[1:])}"
        )


def clean_sweep_file(path: Path) -> None:
    """Take secrets out of the file in which Hydra keeps a multirun's command line as typed."""
    if path.is_file():
        written = path.read_text(encoding="utf-8")
        path.write_text(redaction.text(written), encoding="utf-8")
