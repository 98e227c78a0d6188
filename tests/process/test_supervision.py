"""Signals end a training run after a whole step that is saved; hangs end it with phase, rank and
stacks; the first cause is what is shown.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf import __main__ as command_line
from rlhf.cli import config
from rlhf.process import checkpoints, supervision
from rlhf.run import context as rlhf_run
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.types import Interrupted
from tests.selection import marked_full
from tests.stages.test_resume import options, rows, write_data

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["stage.steps=3", "stage.save_steps=0", "stage.minibatches=1"]


def program(text: str, **environment: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", text],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with supervision.Stopping() as stopping:
        assert stopping.agreed() is None
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while stopping.agreed() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stopping.agreed() == number
    assert signal.getsignal(number) is before


STUCK = """
import threading
from rlhf.process.supervision import Stopping

with Stopping():
    print("in", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    """Also where the main thread never comes back from a library."""
    with program(STUCK) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None, "the first one is only noted"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert process.stderr is not None
        said = process.stderr.read()
    assert "stops after this step" in said and "SIGTERM again: ended at once" in said


def test_a_signal_to_a_forked_child_is_not_the_runs() -> None:
    """A pool ends its workers by SIGTERM: they have to end, and the run has not to stop."""
    with supervision.terminable(), supervision.Stopping() as stopping:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ended[0] == child and os.waitstatus_to_exitcode(ended[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert stopping.received is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    write_data(folder)
    return folder


def run(given: list[str], signal_at: int | None = None, number: int = signal.SIGTERM) -> Path:
    """In this process; `number` arrives, once, while that step's metrics are written."""
    ctx = RunContext.open(config.compose(given), ())
    log = ctx.tracker.log
    sent: list[int] = []

    def signalled(step: int, metrics: Any) -> None:
        log(step, metrics)
        if step == signal_at and not sent:  # a step's evaluation joins its line
            sent.append(step)
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    ctx.tracker.log = signalled  # type: ignore[method-assign]
    module = importlib.import_module("rlhf.stages." + {"ppo": "online"}.get(ctx.stage, ctx.stage))
    module.run(ctx, stage_rows)
    return ctx.dir


@pytest.mark.parametrize(
    ("stage", "number", "at"),
    marked_full(
        [("ppo", signal.SIGTERM, 2), ("sft", signal.SIGINT, 3), ("sft", signal.SIGTERM, 5)],
        keep=[("ppo", signal.SIGTERM, 2), ("sft", signal.SIGINT, 3)],
    ),
)
def test_a_signal_saves_the_step_and_resume_goes_on_as_if_it_never_came(
    folder: Path, tiny_model: Callable[..., Path], stage: str, number: signal.Signals, at: int
) -> None:
    """At the last step, too, where nothing is left to train; it lies inside a pass over the
    rows.
    """
    name = f"{stage}-{at}"
    given = [
        *options(stage, folder, tiny_model(), name),
        *(SMALL if stage == "ppo" else ["stage.steps=5"]),
    ]
    straight = run([*given, f"run.name={name}-straight"])
    with pytest.raises(
        Interrupted,
        match=rf"stopped by {number.name} after step {at}, which is saved in .*-{at}\. Go on",
    ) as stop:
        # the trainers write a step's metrics after its end, so the next one stops
        run(given, at if stage == "ppo" else at - 1, number)
    assert stop.value.code == 128 + number
    place = folder / name / stage
    assert checkpoints.newest(place / "checkpoints")[0] == (
        place / "checkpoints" / f"{'step' if stage == 'ppo' else 'checkpoint'}-{at}",
        at,
    )
    assert (
        not (place / "summary.json").exists()
        and [row["step"] for row in rows(place / "metrics.jsonl")][-1] == at
    )
    run([*given, "run.resume=true"])
    if stage == "ppo":
        assert rows(place / "metrics.jsonl") == rows(straight / "metrics.jsonl")
    else:  # its last line before the signal has no evaluation where none was due
        assert [row["loss"] for row in rows(place / "metrics.jsonl") if "loss" in row] == [
            row["loss"] for row in rows(straight / "metrics.jsonl") if "loss" in row
        ]
    weights = "model/adapter_model.safetensors" if stage == "sft" else "model/model.safetensors"
    assert (place / weights).read_bytes() == (straight / weights).read_bytes()
    summaries = [
        json.loads((run_ / "summary.json").read_text(encoding="utf-8"))
        for run_ in (place, straight)
    ]
    kept = [
        {
            k: v
            for k, v in s["metrics"].items()
            if not k.startswith(("time", "memory/")) and "_per_s" not in k
        }
        for s in summaries
    ]
    assert kept[0] == kept[1] and summaries[0]["steps"] == summaries[1]["steps"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(Interrupted(signal.SIGTERM, 3, Path("c")), 143), (KeyboardInterrupt(), 130)],
)
def test_the_command_lines_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    error: BaseException,
    code: int,
) -> None:
    def stopped(cfg: Any, argv: Any) -> None:
        raise error

    monkeypatch.setattr(command_line, "execute", stopped)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    place = folder / f"error-{code}.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place))
    assert command_line.main(["stage=data", f"data.path={folder / 'sft.jsonl'}"]) == code
    assert "stopped by" in capsys.readouterr().err
    if isinstance(error, Interrupted):
        assert (
            "stopped by SIGTERM after step 3"
            in json.loads(place.read_text(encoding="utf-8"))["message"]
        ), "torchrun's last lines"


# ---- hangs ----

HANGS = """
import threading, time
from rlhf.process.supervision import Watchdog

def stuck():
    time.sleep(60)

threading.Thread(target=stuck, daemon=True).start()
with Watchdog(0.5) as dog:
    for name in ("build", "score", "rollout"):
        dog.phase(name)
        time.sleep(0.3 if name != "rollout" else 60)
"""


def test_a_hang_names_phase_and_rank_and_shows_every_stack(tmp_path: Path) -> None:
    place = tmp_path / "error.json"
    with program(HANGS, TORCHELASTIC_ERROR_FILE=str(place), RANK="3", WORLD_SIZE="4") as process:
        _, said = process.communicate(timeout=120)
        assert process.returncode == supervision.EXIT_HUNG == 124
    assert "error: rank 3: phase rollout took longer than run.phase_timeout_s=0.5" in said
    assert "in stuck" in said and said.count("most recent call first") == 3, (
        "the main thread's, the stuck one's, the watchdog's"
    )
    assert "rank 3: phase rollout" in json.loads(place.read_text(encoding="utf-8"))["message"]


LIVES = """
import time
from rlhf.process.supervision import Watchdog, alive

with Watchdog(0.6) as dog:
    dog.phase("rows")
    for _ in range(8):
        time.sleep(0.2)
        alive()
    dog.rest()
    time.sleep(1.2)
    dog.phase("outer")
    with Watchdog(60) as inner:
        inner.phase("inner")
        time.sleep(1.2)
    print("lives", flush=True)
    time.sleep(60)
"""


def test_a_sign_of_life_a_rest_and_an_inner_run_each_put_the_limit_off() -> None:
    with program(LIVES) as process:
        out, said = process.communicate(timeout=120)
    assert (
        out == "lives\n"
        and process.returncode == supervision.EXIT_HUNG
        and "phase outer took longer" in said
    )


STUCK_IN_C = """
import ctypes, time
from rlhf.process import supervision

supervision._GRACE_S = 0.2
with supervision.Watchdog(0.3):
    pass
time.sleep(1.0)
print("outlived", flush=True)
with supervision.Watchdog(0.3) as dog:
    dog.phase("c")
    ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock, so no thread of Python's can run
"""


def test_a_hang_that_keeps_the_interpreters_lock_ends_too_and_no_timer_outlives_its_run() -> None:
    with program(STUCK_IN_C) as process:
        out, said = process.communicate(timeout=120)
    assert (
        out == "outlived\n"
        and process.returncode == 1
        and "Timeout (0:00:00.5" in said
        and "most recent call first" in said
    )


def test_the_first_cause_is_the_one_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for message in ("the cause", "a consequence"):
        supervision.record_failure(message)
    assert (
        json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))["message"] == "the cause"
    )


class Ends(supervision.Watchdog):
    """Remembers when it would have ended the process."""

    at: float | None = None

    def _end(self) -> None:
        self.at, self._running = time.monotonic(), False


@pytest.mark.parametrize(
    ("waiting", "ranks", "least"), [(True, 2, 1.2), (False, 2, 0.2), (True, 1, 0.2)]
)
def test_a_rank_that_waits_for_others_ends_after_the_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch, waiting: bool, ranks: int, least: float
) -> None:
    """Else torchrun would show the first rank of those that end within a second as the cause."""
    monkeypatch.setattr(supervision, "_OTHERS_FIRST_S", 1.0)
    monkeypatch.setattr(supervision.distributed, "world_size", lambda: ranks)
    names: dict[str, Any] = {"sleep": time.sleep}
    exec(
        compile("def all_gather(s): sleep(s)", "torch/distributed/distributed_c10d.py", "exec"),
        names,
    )
    dog = Ends(0.2)
    with dog:
        began = time.monotonic()
        dog.phase("score")
        (names["all_gather"] if waiting else time.sleep)(1.5)
        assert dog.at is not None and least <= dog.at - began < least + 0.9
        assert dog._extended is (waiting and ranks > 1)


class Phases(supervision.Watchdog):
    """Remembers the phases in order, each once where it is repeated at once."""

    seen: list[str]

    def phase(self, name: str) -> None:
        if name not in Phases.seen[-1:]:
            Phases.seen.append(name)
        super().phase(name)


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Phases.seen = []
    monkeypatch.setattr(rlhf_run, "Watchdog", Phases)
    return Phases.seen


def test_every_phase_of_a_step_is_watched(
    folder: Path, tiny_model: Callable[..., Path], phases: list[str]
) -> None:
    run(
        [
            *options("ppo", folder, tiny_model(), "phases"),
            *SMALL,
            "stage.steps=1",
            "stage.save_steps=1",
        ]
    )
    step = ["rollout", "score", "prepare", "update", "sync", "log", "judge", "save"]
    assert phases == ["start", "build", "sync", "judge", *step, "finish"]


def test_every_phase_of_the_trainers_is_watched(
    folder: Path, tiny_model: Callable[..., Path], phases: list[str]
) -> None:
    run([*options("sft", folder, tiny_model(), "phases"), "stage.steps=2", "stage.eval_steps=1"])
    step = ["step", "log and save", "evaluate", "save"]
    assert phases == [
        "start",
        "data",
        "build",
        "start",
        "evaluate",
        "save",
        *step,
        *step,
        "save the model",
        "samples",
        "finish",
    ]


# ---- a chain ----

WAITS = """
import sys
from rlhf.process.supervision import run_child

child = '''
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print('in', flush=True)
time.sleep(60)
'''
print(run_child([sys.executable, "-c", child]), flush=True)
"""


def test_a_chain_passes_sigterm_on_and_waits_for_the_stage() -> None:
    with program(WAITS) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "143\n", "the stage's own exit code: it was not killed"
        assert process.wait(timeout=60) == 0
