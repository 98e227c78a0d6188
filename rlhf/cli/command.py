"""The command line from its arguments to an exit code: list, help, or a job, and how it ends."""

import contextlib
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
from typing import Any

from conf.schema import Config
from rlhf.cli import config, options, presets
from rlhf.cli.config import check_overrides, prepare
from rlhf.process import distributed, redaction, supervision
from rlhf.process.supervision import record_failure
from rlhf.types import Interrupted, UserError

Execute = Callable[[Config, Sequence[str]], None]

# what a collective says whose peer is gone
_BROKEN_OFF = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "socket")
_WAIT_FOR_CAUSE_S = 5.0  # torchrun looks at its ranks every 0.1 s
_OURS = ("run.name=", "tracking.group=")  # options that each job of a sweep gets from here
_HELP = ("--help", "-h")
_HYDRAS_OWN = ("--hydra-help", "--version", "--info", "-i")  # flags that need no stage


def main(argv: Sequence[str], execute: Execute) -> int:
    """Run a command line; `execute` runs the stage that it composes. Signals end it in order
    (rlhf/process/supervision.py), and nothing that it logs holds a secret.

    Returns 0; 1 for bad input or a stopped run, 2 for a missing stage; 130 after Ctrl-C, 143 after
    SIGTERM, 124 for a phase that hung (rlhf/process/supervision.py).
    """
    with redaction.redacted_logs(), supervision.terminable():
        try:
            return _main(argv, execute)
        except UserError as error:
            return _fail(error)
        except KeyboardInterrupt as stop:
            return _stopped(stop)
        except Exception as error:
            _record_crash(error)
            raise
        finally:
            distributed.shutdown()


def _main(argv: Sequence[str], execute: Execute) -> int:
    check_shell(argv)
    # argparse, which Hydra uses, wants all overrides side by side: move them before the flags.
    arguments = sorted(argv, key=_is_flag)
    has_stage = any(argument.lstrip("+").startswith("stage=") for argument in arguments)
    if any(argument in _HELP for argument in arguments):
        return _print_help(arguments, has_stage)
    if not has_stage and not any(argument in _HYDRAS_OWN for argument in arguments):
        _print(presets.list_stages())
        return 2 if arguments else 0
    return _run(arguments, execute)


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


class _Job:
    """What Hydra calls with the composed configuration. Errors are kept until Hydra is through: it
    would comment on bad input, and print the overrides as they were typed, secrets included.
    """

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
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
            run_sweep_job(cfg, hydra)
        else:
            self._execute(cfg, sys.argv[1:])


def run_sweep_job(cfg: Config, hydra: Any) -> None:
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


def _run(arguments: Sequence[str], execute: Execute) -> int:
    check_overrides(arguments)
    config.register()
    import hydra
    from hydra.errors import HydraException

    # Hydra would shorten a bug's traceback unless it is told not to.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *prepare(arguments)]
    job = _Job(execute)
    run = hydra.main(config_path=str(presets.CONF_DIR), config_name="config", version_base="1.3")
    try:
        run(job)()
    except HydraException as error:
        raise UserError(config.explain(error)) from error
    return _exit_code(job.errors)


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
