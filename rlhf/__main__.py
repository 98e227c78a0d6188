"""``python -m rlhf stage=...``: compose, validate, preflight, run one stage."""

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conf.schema import Config
from conf.stages import STAGES
from rlhf.cli import config
from rlhf.process import distributed, interrupts, redaction
from rlhf.process.quiet import quiet_libraries
from rlhf.process.watchdog import Watchdog, record_failure
from rlhf.types import Interrupted, UserError

# what a collective says whose peer is gone
_BROKEN_OFF = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "socket")
_WAIT_FOR_CAUSE_S = 5.0  # torchrun looks at its ranks every 0.1 s
_NO_STAGE_NEEDED = ("--help", "-h", "--hydra-help", "--version", "--info", "-i")
# Schemas whose stage lives in a module of another name.
_MODULES = {
    "ppo": "online",
    "dpo": "preference",
    "kto": "preference",
    "cpo": "preference",
    "orpo": "preference",
}
_SUMMARIES = {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in STAGES.items()}


def list_stages() -> str:
    """What ``python -m rlhf`` says without a stage."""
    rows = [
        f"  stage={name:<8} {_SUMMARIES[config.stage_schema(name)]}"
        for name in config.choices("stage")
    ]
    experiments = ", ".join(config.choices("experiment")) or "none"
    return "\n".join(
        [
            "usage: python -m rlhf stage=<stage> [option=value ...]",
            "",
            *rows,
            "",
            f"experiments: {experiments}   (stage=chain experiment=<name> runs all of one)",
            "All options of a stage with their values: python -m rlhf stage=<stage> --cfg job",
        ]
    )


def execute(cfg: Config, argv: Sequence[str]) -> None:
    """Run one stage in this process; bad input raises UserError before any weight loads."""
    # fork after threads would warn at every data worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if distributed.device().type == "cpu":
        # accelerate imports DeepSpeed, which would warn that it has to guess this
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    schema_name = config.stage_schema(cfg.stage.name)
    # it loads no model by itself, and transformers takes seconds to import
    if schema_name not in ("chain", "data", "doctor"):
        quiet_libraries()
    if schema_name in ("chain", "doctor"):
        stage = stage_module(cfg)
    else:
        stage = _check(cfg)
        if not cfg.run.dry_run:
            distributed.set_threads(cfg.engine.threads)
    if cfg.run.dry_run:
        if distributed.is_main():
            # it takes the place of the stage's run
            importlib.import_module("rlhf.stages.dry_run").show(cfg, argv, stage)
        return
    if schema_name == "doctor":
        stage.run(SimpleNamespace(cfg=cfg))  # it only looks, so it leaves no run directory
        return
    from rlhf.run.context import RunContext

    with Watchdog(cfg.run.phase_timeout_s) as watchdog:
        watchdog.phase("open the run")
        # stages whose checkpoints depend on the number of ranks have such a function
        adapt = getattr(stage, "adapt_checkpoint", None)
        ctx = RunContext.open(cfg, argv, adapt)
    stage.run(ctx)


def stage_module(cfg: Config) -> Any:
    """The module of rlhf/stages/ with the `check` and the `run` of the stage."""
    name = config.stage_schema(cfg.stage.name)
    return importlib.import_module(f"rlhf.stages.{_MODULES.get(name, name)}")


def _check(cfg: Config) -> Any:
    """Join the other ranks, make sure of the data, and check the configuration; returns the stage's
    module. Raises UserError on all ranks alike.
    """
    from rlhf.checks import preflight
    from rlhf.data.recipes import build as recipes

    limit = cfg.run.phase_timeout_s or 0.0
    with Watchdog(cfg.run.phase_timeout_s) as watchdog:
        watchdog.phase("launch")
        # Ranks that wait for one that hangs must outlive it: its watchdog tells the cause,
        # their timeout would tell a consequence.
        distributed.initialise(max(30.0, limit / 60 + 10.0))
        watchdog.phase("download")
        recipes.ensure(cfg)
        watchdog.phase("preflight")
        stage = stage_module(cfg)
        for note in preflight.check(stage.check, cfg):
            logging.getLogger("rlhf").warning(note)
    return stage


def _job(cfg: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        # A process per job: vLLM, DeepSpeed and torch keep state that a second job in the same
        # process would inherit.
        dataclass_cfg = config.to_dataclass(cfg)
        name = f"{dataclass_cfg.run.name}-{hydra.job.num}"
        group = dataclass_cfg.tracking.group or f"{dataclass_cfg.run.name}-sweep"
        task = [
            o for o in hydra.overrides.task if not o.startswith(("run.name=", "tracking.group="))
        ]
        command = [
            sys.executable,
            "-m",
            "rlhf",
            *task,
            f"run.name={name}",
            f"tracking.group={group}",
        ]
        _clean_sweep_file(Path(hydra.sweep.dir) / "multirun.yaml")
        code = interrupts.run_child(command)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise SystemExit(code)  # the job has said what it saved
        if code != 0:
            raise UserError(
                f"multirun job {hydra.job.num} ended with exit code {code}: {' '.join(command[1:])}"
            )
        return
    execute(config.to_dataclass(cfg), sys.argv[1:])


def _clean_sweep_file(place: Path) -> None:
    """What Hydra writes of a multirun holds the command line as it was typed."""
    if place.is_file():
        written = place.read_text(encoding="utf-8")
        place.write_text(redaction.text(written), encoding="utf-8")


def _fail(error: Exception) -> int:
    message = redaction.text(f"error: {error}")
    record_failure(message)
    print(message, file=sys.stderr)
    return 1


def _crash(error: BaseException) -> None:
    """A bug's traceback goes on its way, and into torchrun's report.

    A rank whose collective broke off because another rank ended waits a moment: torchrun shows the
    first failure that it sees as the cause, and that has to be the other one's.
    """
    if distributed.world_size() > 1 and any(word in str(error).lower() for word in _BROKEN_OFF):
        time.sleep(_WAIT_FOR_CAUSE_S)
    record_failure(redaction.text("".join(traceback.format_exception(error))))


def main(argv: Sequence[str] | None = None) -> int:
    """`_main` with signals that end it in order (rlhf/process/interrupts.py), and without secrets
    in what it logs (rlhf/process/redaction.py).
    """
    with redaction.redacted_logs(), interrupts.terminable():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    """Exit code 0; 1 for bad input or a stopped run, 2 for a missing stage; 130 after Ctrl-C and
    143 after SIGTERM (rlhf/process/interrupts.py), and 124 for a phase that hung
    (rlhf/process/watchdog.py).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # argparse, which Hydra uses, wants all overrides side by side: move them before the flags.
    arguments = sorted(
        given, key=lambda a: a.startswith("-") or ("=" not in a and not a.startswith("~"))
    )
    if not any(a.lstrip("+").startswith("stage=") for a in arguments) and not any(
        a in _NO_STAGE_NEEDED for a in arguments
    ):
        # a reader such as `head` may close the pipe early
        with contextlib.suppress(BrokenPipeError):
            print(list_stages(), flush=True)
        return 0 if not arguments else 2
    try:
        config.check_overrides(arguments)
        config.register()
        import hydra
        from hydra.errors import HydraException

        # Hydra would shorten a bug's traceback unless it is told not to, and comment on a job's bad
        # input unless it never sees it.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        sys.argv = [sys.argv[0], *config.merge_items(arguments)]
        failed: list[UserError] = []
        crashed: list[Exception] = []
        interrupted: list[Interrupted] = []

        def job(cfg: Any) -> None:
            try:
                _job(cfg)
            except UserError as error:
                failed.append(error)
            except Interrupted as error:
                interrupted.append(error)
            except Exception as error:  # noqa: BLE001 - past Hydra, which would print the overrides as they were typed, secrets included
                crashed.append(error)

        try:
            hydra.main(config_path=str(config.CONF_DIR), config_name="config", version_base="1.3")(
                job
            )()
        except HydraException as error:
            raise UserError(config.explain(error)) from error
        for crash in crashed:
            raise crash
        for failure in failed:
            _fail(failure)
        for stop in interrupted:
            record_failure(str(stop))
            if distributed.is_main():
                print(stop, file=sys.stderr)
            return stop.code
        return 1 if failed else 0
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, interrupts.Terminated) else signal.SIGINT
        print(
            f"stopped by {signal.Signals(number).name} outside of training; nothing was saved.",
            file=sys.stderr,
        )
        return 128 + number
    except Exception as error:
        _crash(error)
        raise
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    sys.excepthook = redaction.excepthook
    sys.exit(main())
