"""How stages end that are stopped or hang: a limit for each phase, signals outside of training,
nothing half-written left.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import __main__ as command_line
from rlhf.cli import config
from rlhf.data.prepare import outputs
from rlhf.labels.ledger import EXPORT_FILE
from rlhf.process import supervision
from rlhf.run.context import RunContext
from rlhf.stages import eval as eval_stage
from rlhf.stages import rows as stage_rows
from rlhf.stages import sft
from rlhf.stages.labelling import exporting as label_export
from rollout.hf import HFGenerator
from tests import toys
from tests.labels.label_steps import GROUPS
from tests.labels.label_steps import options as label_options
from tests.offline import trl_tools
from tests.stages.test_resume import COMMON

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # the watchdog's thread, which the tests end by SystemExit
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(30))
    return folder


def sft_options(folder: Path, model: Path) -> list[str]:
    steps = ["stage.steps=3", "stage.batch_size=8", "stage.max_length=48"]
    return [
        "stage=sft",
        f"model.path={model}",
        f"run.dir={folder}",
        f"data.path={folder / 'sft.jsonl'}",
        *COMMON,
        *steps,
    ]


def eval_options(folder: Path, model: Path) -> list[str]:
    lengths = [
        "rollout=hf",
        "data.max_prompt_length=24",
        "rollout.max_response_length=4",
        "stage.prompts=2",
        "stage.judges=[]",
    ]
    policies = [
        f"stage.before={model}",
        f"stage.after={model}",
        "model.dtype=float32",
        "engine.threads=1",
        "tracking=none",
    ]
    return [
        "stage=eval",
        f"run.dir={folder}",
        f"data.eval_path={folder / 'prompts.jsonl'}",
        *lengths,
        *policies,
    ]


# ---- hangs ----


class Freed(Exception):
    """The watchdog would have ended the process here."""


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunContext], None]:
    """Hangs with a limit of half a second, armed anew, until the watchdog ends the process; then
    raises Freed(exit code) in its place.
    """
    codes: list[int] = []
    ended = threading.Event()

    def exiting(code: int) -> None:
        codes.append(code)
        ended.set()
        raise SystemExit  # of the watchdog's thread

    monkeypatch.setattr(supervision.os, "_exit", exiting)

    def hangs(ctx: RunContext) -> None:
        ctx.watchdog.limit = 0.5
        ctx.watchdog._arm()
        if not ended.wait(30):
            raise AssertionError("nothing ended the hang")
        raise Freed(codes[0])

    return hangs


def test_a_hang_in_sfts_training_step_ends_it(
    folder: Path,
    tiny_model: Callable[..., Path],
    hang: Callable[[RunContext], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx = RunContext.open(config.compose([*sft_options(folder, tiny_model()), "run.name=hang"]), ())
    assert ctx.watchdog.limit == 3600, "the default"
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: hang(ctx))
    with pytest.raises(Freed, match=str(supervision.EXIT_HUNG)):
        sft.run(ctx, stage_rows)
    said = capfd.readouterr().err
    assert (
        "rank 0: phase step took longer than run.phase_timeout_s=0.5" in said and "in hangs" in said
    )


def test_a_hang_in_evals_generation_ends_it(
    folder: Path,
    tiny_model: Callable[..., Path],
    hang: Callable[[RunContext], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx = RunContext.open(
        config.compose([*eval_options(folder, tiny_model()), "run.name=hang"]), ()
    )
    calls: list[int] = []
    generate, close = HFGenerator.generate, HFGenerator.close
    closed: list[bool] = []

    def second(self: HFGenerator, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return generate(self, *args, **kwargs) if len(calls) == 1 else hang(ctx)

    monkeypatch.setattr(HFGenerator, "generate", second)
    monkeypatch.setattr(HFGenerator, "close", lambda self: (closed.append(True), close(self)))
    with pytest.raises(Freed, match=str(supervision.EXIT_HUNG)):
        eval_stage.run(ctx)
    said = capfd.readouterr().err
    assert (
        "rank 0: phase generate after took longer than" in said
        and "in hangs" in said
        and closed == [True]
    )


def test_a_tracker_that_does_not_close_is_a_hang_too(
    folder: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = RunContext.open(
        config.compose([*sft_options(folder, tiny_model()), "run.name=close"]), ()
    )
    seen: list[tuple[str, bool, int]] = []
    monkeypatch.setattr(
        ctx.tracker,
        "finish",
        lambda exit_code: seen.append((ctx.watchdog.name, ctx.watchdog._running, exit_code)),
    )
    with pytest.raises(RuntimeError, match="a bug of ours"), ctx.closing():
        raise RuntimeError("a bug of ours")
    assert seen == [("close", True, 1)]


# ---- the phases of stages without steps ----


def phases_of(given: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases that the command passes through, those before its stage included."""
    seen: list[str] = []

    class Phases(supervision.Watchdog):
        def phase(self, name: str) -> None:
            if name != "start":  # as every watchdog does
                seen.append(name)
            super().phase(name)

    for place in ("rlhf.run.context.Watchdog", "rlhf.cli.command.Watchdog"):
        monkeypatch.setattr(place, Phases)
    command_line.execute(config.compose(given), ())
    return seen


BEFORE = ["launch", "download", "preflight", "open the run"]


def test_every_phase_of_eval_is_watched(
    folder: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = phases_of([*eval_options(folder, tiny_model()), "run.name=phases"], monkeypatch)
    assert seen == [
        *BEFORE,
        "build",
        "generate before",
        "sync",
        "generate after",
        "judge",
        "kl",
        "compare",
    ]


def test_every_phase_of_data_is_watched_and_every_row_is_a_sign_of_life(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    monkeypatch.setattr(supervision.Watchdog, "alive", lambda self: alive.append(1))
    given = [
        "stage=data",
        f"data.path={folder / 'sft.jsonl'}",
        f"run.dir={folder}",
        "run.name=phases",
        "tracking=none",
    ]
    assert phases_of([*given, "data.pipeline=[repair,exact_duplicates]"], monkeypatch) == [
        *BEFORE,
        "hash",
        "steps",
        "write",
        "report",
    ]
    # each row as it is read; the one block of rows in which repair, a step of single rows, runs;
    # each row into exact_duplicates and out of it
    assert len(alive) == 30 + 1 + 2 * 30


def test_every_phase_of_an_export_is_watched(
    folder: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        *GROUPS,
        *label_options(folder, f"model.path={tiny_model()}", "label.responses=2"),
        "run.name=phases",
    ]
    assert phases_of(given, monkeypatch) == [
        *BEFORE,
        "rollout",
        "score",
        "choose",
        "write",
        "push",
        "finish",
    ]


# ---- signals outside of training ----


@pytest.fixture
def stopped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Runs a command line in this process, and checks how it ended; what it said."""
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    # a shell starts its background jobs with SIGINT ignored
    as_started = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(given: list[str], number: signal.Signals) -> str:
        assert command_line.main(given) == 128 + number
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        return capfd.readouterr().err

    yield run
    signal.signal(signal.SIGINT, as_started)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # the interpreter comes to the handler here
    raise AssertionError("the signal was passed over")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_data_and_leaves_nothing_half_written(
    folder: Path,
    stopped: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    write = outputs.Outputs.write
    given = [
        "stage=data",
        f"data.path={folder / 'sft.jsonl'}",
        f"run.dir={folder}",
        f"run.name=stopped-{number.name}",
        "tracking=none",
    ]

    def third(self: outputs.Outputs, item: Any) -> None:
        write(self, item)
        if self.rows["train"] == 3:
            send(number)

    with monkeypatch.context() as patched:
        patched.setattr(outputs.Outputs, "write", third)
        assert f"stopped by {number.name} outside of training; nothing was saved" in stopped(
            given, number
        )
    place = folder / f"stopped-{number.name}" / "data"
    assert {path.name for path in place.iterdir()} <= {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "steps",
    }
    assert command_line.main([*given, "run.resume=true"]) == 0
    assert len((place / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 30


def test_a_signal_while_eval_writes_closes_the_engine_and_leaves_no_result(
    folder: Path,
    tiny_model: Callable[..., Path],
    stopped: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(HFGenerator, "generate", lambda *_, **__: send(signal.SIGTERM))
    monkeypatch.setattr(HFGenerator, "close", lambda self: closed.append(True))
    stopped([*eval_options(folder, tiny_model()), "run.name=stopped"], signal.SIGTERM)
    assert closed == [True]
    assert {path.name for path in (folder / "stopped" / "eval").iterdir()} == {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
    }


def test_a_signal_while_an_export_writes_its_files_leaves_no_half_of_one(
    folder: Path,
    tiny_model: Callable[..., Path],
    stopped: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers and the ledger are there by then, so that the export goes on with the files that
    it lacks.
    """
    given = [
        *GROUPS,
        *label_options(folder, f"model.path={tiny_model()}", "label.responses=2"),
        "run.name=stopped",
    ]
    finish = label_export.write_files

    def halfway(made: Any, targets: Any, place: Path) -> Any:
        (place / "out.tmp" / "jsonl").mkdir(parents=True)
        (place / "out.tmp" / "jsonl" / "tasks.jsonl").write_text("{", encoding="utf-8")
        send(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(label_export, "write_files", halfway)
        stopped(given, signal.SIGTERM)
    place = folder / "stopped" / "label"
    assert (
        (place / EXPORT_FILE).is_file()
        and not list(place.rglob("*.tmp"))
        and not (place / "summary.json").exists()
    )
    made = json.loads((place / EXPORT_FILE).read_text(encoding="utf-8"))["id"]
    assert (
        label_export.write_files is finish and command_line.main([*given, "run.resume=true"]) == 0
    )
    assert json.loads((place / EXPORT_FILE).read_text(encoding="utf-8"))["id"] == made and list(
        (place / "out").iterdir()
    )


def test_a_signal_while_the_model_loads_ends_training_in_order(
    folder: Path,
    tiny_model: Callable[..., Path],
    stopped: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sft, "load_causal_lm", lambda *_, **__: send(signal.SIGTERM))
    assert "stopped by SIGTERM outside of training" in stopped(
        [*sft_options(folder, tiny_model()), "run.name=stopped"], signal.SIGTERM
    )
    assert not (folder / "stopped" / "sft" / "model").exists()


def test_sigterm_is_as_ctrl_c_to_what_cleans_up() -> None:
    """Libraries that catch KeyboardInterrupt alone do for both what they do for it."""
    with supervision.terminable(), pytest.raises(KeyboardInterrupt) as stop:
        send(signal.SIGTERM)
    assert stop.value.number == signal.SIGTERM  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
