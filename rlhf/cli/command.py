"""The command line from its arguments to an exit code: list, help, or a job, and how it ends.

A job runs one stage in this process (`execute`): the ranks join, the data is there, the stage's
check passes, the run directory opens, the stage runs.
"""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conf import published
from conf.choices import Recipe
from conf.run import LaunchKind
from conf.schema import Config
from conf.stages import TrainStage
from rlhf.cli import config, options, presets
from rlhf.cli.config import check_overrides, prepare
from rlhf.cli.presets import module_name, stage_schema
from rlhf.models.directories import pinned
from rlhf.process import distributed, redaction, supervision
from rlhf.process.libraries import quiet_libraries
from rlhf.process.supervision import Watchdog, record_failure
from rlhf.types import Interrupted, UserError

# Runs the stage of a configuration; the command line goes into the manifest.
RunJob = Callable[[Config, Sequence[str]], None]
# From the name of a module in rlhf/stages/ to the module, imported: rlhf/__main__.py has it.
Modules = Callable[[str], Any]

LOG = logging.getLogger("rlhf")

# what a collective says whose peer is gone
_BROKEN_OFF = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "socket")
_WAIT_FOR_CAUSE_S = 5.0  # torchrun looks at its ranks every 0.1 s
_OURS = ("run.name=", "tracking.group=")  # options that each job of a sweep gets from here
_HELP = ("--help", "-h")
_HYDRAS_OWN = ("--hydra-help", "--version", "--info", "-i")  # flags that need no stage
# Modules of rlhf/stages/ that are no stages. A stage that trains gets its rows by the first, and is
# looked at by the second; the others are for the runs that ask for them.
_ROWS, _MEMORY, _DRY_RUN, _RECIPE = "rows", "memory", "dry_run", "recipe"
_LAUNCH = "launch"  # starts the processes of a stage, in place of running it here
_REGISTERED = "registered"  # for options that name a version of the registry
_METHODS = "methods"  # makes adapters known, before any stage that loads a model
# torch takes seconds to import: a chain needs none, and stage=data imports it for the steps that
# load a model
_WITHOUT_TORCH = ("board", "chain", "data", "gateway", "migrate", "registry", "search")
# they leave no run directory: they make nothing that another stage reads
_WITHOUT_DIRECTORY = ("board", "doctor", "migrate", "chat", "serve", "registry", "gateway")
_VERSION = "registry:"  # begins a text that names a version of the registry


def main(argv: Sequence[str], run_job: RunJob) -> int:
    """Run a command line; `run_job` runs the stage that it composes. Signals end it in order
    (rlhf/process/supervision.py), and nothing that it logs holds a secret.

    Returns 0; 1 for bad input or a stopped run, 2 for a missing stage; 130 after Ctrl-C, 143 after
    SIGTERM, 124 for a phase that hung (rlhf/process/supervision.py).
    """
    with redaction.redacted_logs(), supervision.terminable():
        try:
            return _main(argv, run_job)
        except UserError as error:
            return _fail(error)
        except KeyboardInterrupt as stop:
            return _stopped(stop)
        except Exception as error:
            _record_crash(error)
            raise
        finally:
            distributed.shutdown()


def _main(argv: Sequence[str], run_job: RunJob) -> int:
    check_shell(argv)
    # argparse, which Hydra uses, wants all overrides side by side: move them before the flags.
    arguments = sorted(argv, key=_is_flag)
    has_stage = any(argument.lstrip("+").startswith("stage=") for argument in arguments)
    if any(argument in _HELP for argument in arguments):
        return _print_help(arguments, has_stage)
    if not has_stage and not any(argument in _HYDRAS_OWN for argument in arguments):
        _print(presets.list_stages())
        return 2 if arguments else 0
    return _run_jobs(arguments, run_job)


# ---- arguments ----

_OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@-]*=")


def check_shell(arguments: Sequence[str]) -> None:
    """Raises UserError where the shell took an override apart: at its blanks, or at the commas of
    its braces. The message has the quoting that keeps it whole.
    """
    before, flag = "", False
    for at, argument in enumerate(arguments):
        if not _is_whole(argument) and not flag and before:
            split = [before, *takewhile(lambda word: not _is_whole(word), arguments[at:])]
            raise UserError(
                f"{argument!r} stands alone on the command line: expected option=value. If it "
                f"belongs to what stands before it{_quoted(' '.join(split))}"
            )
        flag = argument.startswith("-")
        before = "" if flag else argument
    _check_braces([argument for argument in arguments if _OVERRIDE.match(argument)])


def _is_whole(argument: str) -> bool:
    """An override or a flag by itself."""
    return argument.startswith(("-", "~")) or _OVERRIDE.match(argument) is not None


def _quoted(argument: str) -> str:
    quoted = shlex.quote(argument) if config.is_readable(argument) else config.quoting(argument)
    return "." if quoted is None else f", quote the whole for the shell: {quoted}"


def _shared(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    at = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:at]


def _check_braces(overrides: Sequence[str]) -> None:
    """bash makes 'data.columns={a: x,b: y}' without its quotes into data.columns=a:x and
    data.columns=b:y.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        values.setdefault(key, []).append(value)
    for key, several in values.items():
        start = re.match(r"(?:.*[\[{,])?", _shared(several))
        backwards = [value[::-1] for value in several]
        end = re.match(r"(?:.*[\]},])?", _shared(backwards))
        assert start is not None and end is not None  # both match the empty text
        inner = [value[start.end() : len(value) - end.end()] for value in several]
        items = len(inner) > 1 and all(re.fullmatch(r"\w+:[^:]*", item) for item in inner)
        if items and (start[0] or config.is_dictionary(key.lstrip("+"))):
            whole = f"{key}={start[0]}{{{', '.join(inner)}}}{end[0][::-1]}"
            raise UserError(
                f"{key} is given {len(several)} times ({', '.join(several)}): a shell makes that "
                f"of braces without quotes{_quoted(whole)}"
            )


def _is_flag(argument: str) -> bool:
    """A flag, or a flag's value; not an override."""
    return argument.startswith("-") or ("=" not in argument and not argument.startswith("~"))


def _print(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # a reader such as `head` may close the pipe early
        print(text, flush=True)


def _print_help(arguments: Sequence[str], has_stage: bool) -> int:
    overrides = [argument for argument in arguments if not _is_flag(argument)]
    _print(options.stage_help(config.compose(overrides)) if has_stage else options.general_help())
    return 0


# ---- jobs ----


class _Job:
    """What Hydra calls with the composed configuration. Errors are kept until Hydra is through: it
    would comment on bad input, and print the overrides as they were typed, secrets included.
    """

    def __init__(self, run_job: RunJob) -> None:
        self._run_job = run_job
        self.errors: list[Exception] = []

    def __call__(self, cfg: Any) -> None:
        try:
            self._run(config.to_dataclass(cfg))
        except Exception as error:  # noqa: BLE001 - raised again, past Hydra
            self.errors.append(error)

    def _run(self, cfg: Config) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra = HydraConfig.get()
        if hydra.mode is RunMode.MULTIRUN:
            run_sweep_job(cfg.run.name, cfg.tracking.group, hydra)
        else:
            self._run_job(cfg, sys.argv[1:])


def run_sweep_job(name: str, group: str | None, hydra: Any) -> None:
    """Run the job of a sweep that Hydra has just composed; `hydra` is its own configuration.
    `name`, `group`: run.name and tracking.group.

    A process of its own, since vLLM, DeepSpeed and torch keep state that a second job in the same
    process would inherit. Raises UserError for a job that failed, SystemExit for one that was
    stopped.
    """
    overrides = [text for text in hydra.overrides.task if not text.startswith(_OURS)]
    group = group or f"{name}-sweep"
    command = [sys.executable, "-m", "rlhf", *overrides]
    command += [f"run.name={name}-{hydra.job.num}", f"tracking.group={group}"]
    clean_sweep_file(Path(hydra.sweep.dir) / "multirun.yaml")
    code = supervision.run_child(command)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise SystemExit(code)  # the job has printed what it saved
    if code != 0:
        raise UserError(
            f"multirun job {hydra.job.num} ended with exit code {code}: {' '.join(command[1:])}"
        )


def clean_sweep_file(path: Path) -> None:
    """Take secrets out of the file in which Hydra keeps a multirun's command line as typed."""
    if path.is_file():
        written = path.read_text(encoding="utf-8")
        path.write_text(redaction.text(written), encoding="utf-8")


def _run_jobs(arguments: Sequence[str], run_job: RunJob) -> int:
    check_overrides(arguments)
    config.register()
    import hydra
    from hydra.errors import HydraException

    # Hydra would shorten a bug's traceback unless it is told not to.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *prepare(arguments)]
    job = _Job(run_job)
    run = hydra.main(config_path=str(presets.CONF_DIR), config_name="config", version_base="1.3")
    try:
        run(job)()
    except HydraException as error:
        raise UserError(config.explain(error)) from error
    return _exit_code(job.errors)


# ---- a stage in this process ----


def execute(cfg: Config, argv: Sequence[str], modules: Modules) -> None:
    """Run the stage of `cfg`. `argv` is the command line, for the manifest. Raises UserError for
    bad input, before any weights load.
    """
    if cfg.launch.kind is not LaunchKind.none:
        launcher = modules(_LAUNCH)
        launcher.check(cfg.launch, cfg.stage)
        if launcher.applies(cfg.stage, cfg.launch.kind):
            groups = (cfg.launch, cfg.engine, cfg.rollout, cfg.run)
            cfg.engine.gpus = launcher.start(*groups, cfg.stage, argv)
            if not cfg.run.dry_run:
                return
    # fork after threads would warn at every data worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if _VERSION in repr(cfg):
        modules(_REGISTERED).resolve(cfg, cfg.run)
    schema, name = stage_schema(cfg.stage.name), module_name(cfg.stage.name)
    if schema not in _WITHOUT_TORCH:
        distributed.name_accelerator()
    if schema not in (*_WITHOUT_TORCH, "doctor"):
        # The others load no model by themselves, and transformers takes seconds to import.
        quiet_libraries()
        modules(_METHODS).register()
    if schema in ("chain", "doctor"):
        stage = modules(name)
    else:
        stage = _checked(cfg, name, modules)
        if not cfg.run.dry_run and schema not in _WITHOUT_TORCH:
            distributed.set_threads(cfg.engine.threads)
    if cfg.run.dry_run:
        if distributed.is_main():
            modules(_DRY_RUN).show(cfg, argv)
    elif schema in _WITHOUT_DIRECTORY:
        stage.run(SimpleNamespace(cfg=cfg))
    else:
        _run_stage(cfg, argv, stage, modules)


def checks_of(stage: Any, modules: Modules) -> list[Any]:
    """The checks of a stage, given by its options: its own, then those of its rows and of its
    memory where it trains.
    """
    checks = [modules(module_name(stage.name)).check]
    if isinstance(stage, TrainStage):
        checks += [modules(_ROWS).check, modules(_MEMORY).check]
    return checks


def _checked(cfg: Config, name: str, modules: Modules) -> Any:
    """Join the other ranks, make sure of the data, and check the configuration. Returns the stage's
    module. Raises UserError on all ranks alike.
    """
    from rlhf.checks import launch

    limit = cfg.run.phase_timeout_s or 0.0
    with Watchdog(cfg.run.phase_timeout_s) as watchdog:
        watchdog.phase("launch")
        # Ranks that wait for one that hangs must outlive it: its watchdog tells the cause, their
        # timeout would tell a consequence.
        distributed.initialise(max(30.0, limit / 60 + 10.0))
        watchdog.phase("download")
        if cfg.model.revision is not None and cfg.model.path is not None:
            # a directory from here on: config.yaml names the very commit
            cfg.model.path, cfg.model.revision = pinned(cfg.model.path, cfg.model.revision), None
        if cfg.data.recipe is not Recipe.none:
            modules(_RECIPE).ensure(cfg.data, cfg.run)
        watchdog.phase("preflight")
        stage = modules(name)
        if isinstance(cfg.stage, TrainStage):
            modules(_MEMORY).choose_micro_batch(cfg)
        has_directory = stage_schema(cfg.stage.name) not in _WITHOUT_DIRECTORY
        for note in launch.check_stage(checks_of(cfg.stage, modules), cfg, has_directory):
            LOG.warning(note)
        rates = published.taken(cfg.stage, cfg.adapter.kind)
        if rates and distributed.is_main():
            LOG.info(rates)
    return stage


def _run_stage(cfg: Config, argv: Sequence[str], stage: Any, modules: Modules) -> None:
    from rlhf.run.context import RunContext

    with Watchdog(cfg.run.phase_timeout_s) as watchdog:
        watchdog.phase("open the run")
        # stages whose checkpoints depend on the number of ranks have such a function
        adapt = getattr(stage, "adapt_checkpoint", None)
        ctx = RunContext.open(cfg, argv, adapt)
    if isinstance(cfg.stage, TrainStage):
        stage.run(ctx, modules(_ROWS))
    else:
        stage.run(ctx)


# ---- how it ends ----


def _exit_code(errors: Sequence[Exception]) -> int:
    """Report what ended the jobs. Raises the first error that is a bug."""
    failures = [error for error in errors if isinstance(error, UserError)]
    stops = [error for error in errors if isinstance(error, Interrupted)]
    for error in errors:
        if not isinstance(error, (UserError, Interrupted)):
            raise error
    for failure in failures:
        _fail(failure)
    for stop in stops:
        record_failure(str(stop))
        if distributed.is_main():
            print(stop, file=sys.stderr)
        return stop.code
    return 1 if failures else 0


def _fail(error: Exception) -> int:
    message = redaction.text(f"error: {error}")
    record_failure(message)
    print(message, file=sys.stderr)
    return 1


def _stopped(stop: KeyboardInterrupt) -> int:
    number = stop.number if isinstance(stop, supervision.Terminated) else signal.SIGINT
    print(
        f"stopped by {signal.Signals(number).name} outside of training; nothing was saved.",
        file=sys.stderr,
    )
    return 128 + number


def _record_crash(error: BaseException) -> None:
    """Put a bug's traceback into torchrun's report.

    A rank whose collective broke off because another rank ended waits a moment: torchrun shows the
    first failure that it sees as the cause, and that has to be the other rank's.
    """
    if distributed.world_size() > 1 and any(word in str(error).lower() for word in _BROKEN_OFF):
        time.sleep(_WAIT_FOR_CAUSE_S)
    record_failure(redaction.text("".join(traceback.format_exception(error))))
