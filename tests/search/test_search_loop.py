"""The search's loop, with trials that are quick: same seed same trials, failures, pruning, a search
that is killed at any point and goes on.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conf.methods import PruneConfig, Pruner, Sampler
from rlhf.search.study import JOURNAL, Study
from rlhf.search.trials import State
from rlhf.types import UserError
from tests.search.quick import SPACE, QuickCommands, plain, plan, search
from tests.search.stand_in import value_at

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 4
FAILING = [sys.executable, "-S", "-c", "import sys; sys.exit('error: too large')"]


def run(folder: Path, trials: int, **options: object) -> Study:
    """A whole search. Returns its study."""
    making = {key: options.pop(key) for key in ("steps", "pause_s", "commands") if key in options}
    started = search(folder, trials, QuickCommands(folder, **making), **options)
    assert started.run() is None
    return started.study


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A search that nothing stops."""
    return run(tmp_path_factory.mktemp("whole"), TRIALS)


def test_trials_have_the_values_of_their_runs(whole: Study) -> None:
    trials = whole.trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    for trial in trials:
        assert trial.state is State.complete and trial.steps == 3
        assert trial.values == (value_at(trial.setting["stage.x"], 3),)
    (best,) = whole.best()
    assert best.values == min(trial.values for trial in trials)


def test_the_same_seed_gives_the_same_trials(tmp_path: Path, whole: Study) -> None:
    assert plain(run(tmp_path / "again", TRIALS).trials()) == plain(whole.trials())
    other = run(tmp_path / "other", TRIALS, seed=1).trials()
    assert [trial.setting for trial in other] != [trial.setting for trial in whole.trials()]


@pytest.mark.parametrize("sampler", [Sampler.random, Sampler.grid])
def test_workers_change_no_trial_of_random_and_grid(tmp_path: Path, sampler: Sampler) -> None:
    space = SPACE if sampler is Sampler.random else SPACE[1:]
    one = Study(tmp_path / "one", plan(sampler=sampler, space=space))
    several = Study(tmp_path / "several", plan(sampler=sampler, space=space))
    settings = []
    for _ in range(2):
        trial = one.ask()
        settings.append(trial.setting)
        one.tell(trial.number, [1.0])
    assert [several.ask().setting for _ in range(2)] == settings
    assert len({str(setting) for setting in settings}) == 2


def test_several_workers_run_at_once(tmp_path: Path) -> None:
    """Each of three trials ends only when all three are there."""
    waiting = (
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True)\n"
        "end = time.monotonic() + 30\n"
        "while len(list(folder.parents[1].glob('*/stand_in'))) < 3 and time.monotonic() < end:\n"
        "    time.sleep(0.02)\n"
        "assert time.monotonic() < end\n"
        "(folder / 'summary.json').write_text('{\"metrics\": {\"value\": 1}}')"
    )
    commands = {}
    for number in range(3):
        directory = str(tmp_path / "trials" / f"{number:04d}" / "stand_in")
        commands[number] = [sys.executable, "-S", "-c", waiting, directory]
    study = run(tmp_path, 3, workers=3, commands=commands)
    assert [trial.state for trial in study.trials()] == [State.complete] * 3


# ---- failures ----


def test_a_failed_trial_is_told_with_its_reason(tmp_path: Path) -> None:
    study = run(tmp_path, 3, commands={1: FAILING})
    first, failed, last = study.trials()
    assert failed.state is State.failed and "too large" in failed.reason and not failed.values
    assert first.state is last.state is State.complete
    with pytest.raises(UserError, match=r"stage\.failures=1: 1 trials have failed.*too large"):
        run(tmp_path / "b", 3, commands={1: FAILING}, failures=1)


def test_what_refuses_the_first_trial_ends_the_search(tmp_path: Path) -> None:
    refusing = [
        sys.executable,
        "-S",
        "-c",
        "import json, os\n"
        "path = os.environ['TORCHELASTIC_ERROR_FILE']\n"
        "open(path, 'w').write(json.dumps({'message': 'error: no such file'}))\n"
        "raise SystemExit(1)",
    ]
    with pytest.raises(UserError, match=r"trial 0 could not start.*no such file.*run\.resume"):
        run(tmp_path, 2, commands={0: refusing})
    # put right, the same trial is tried again
    assert [trial.state for trial in run(tmp_path, 2).trials()] == [State.complete] * 2
    # later on, it is one trial's misfortune
    study = run(tmp_path / "b", 2, commands={1: refusing})
    assert study.trials()[1].state is State.failed


def test_a_value_that_is_no_number_fails_its_trial(tmp_path: Path) -> None:
    write = (
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True)\n"
        "(folder / 'summary.json').write_text('{{\"metrics\": {metrics}}}')"
    )
    directory = str(tmp_path / "trials" / "0001" / "stand_in")
    nan = [sys.executable, "-S", "-c", write.format(metrics='{"value": null}'), directory]
    study = run(tmp_path, 2, commands={1: nan})
    assert study.trials()[1].reason == "value is no finite number: None"
    directory = str(tmp_path / "b" / "trials" / "0000" / "stand_in")
    other = [sys.executable, "-S", "-c", write.format(metrics='{"loss": 1.0}'), directory]
    with pytest.raises(UserError, match=r"stand_in has no metric value\. It has: loss"):
        run(tmp_path / "b", 2, commands={0: other})


# ---- pruning ----


def test_trials_that_are_behind_are_stopped(tmp_path: Path) -> None:
    rule = PruneConfig(kind=Pruner.median, startup=2, warmup=2)
    options = {"prune": rule, "compared": "value", "sampler": Sampler.random, "seed": 3}
    study = run(tmp_path / "a", 6, steps=5, pause_s=0.08, **options)
    trials = study.trials()
    stopped = [trial for trial in trials if trial.state is State.pruned]
    assert stopped and all(trial.last is not None for trial in stopped)
    assert all(trial.reason == "behind at step 2" for trial in stopped)
    unpruned = run(tmp_path / "b", 6, steps=5, sampler=Sampler.random, seed=3)
    assert study.best()[0].setting == unpruned.best()[0].setting
    # a trial that ends before it is looked at has the same verdict
    quick = run(tmp_path / "c", 6, steps=5, pause_s=0.0, **options).trials()
    assert [(t.state, t.setting, t.last) for t in quick] == [
        (t.state, t.setting, t.last) for t in trials
    ]


# ---- stops and kills ----


def start(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.search.quick", str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def check_goes_on(folder: Path, whole: Study) -> None:
    """A search that was ended goes on to what it would have been without that."""
    study = run(folder, TRIALS, pause_s=0.05)
    assert plain(study.trials()) == plain(whole.trials())
    assert not list(folder.glob("trials/*/stand_in/doubled"))
    assert len(list(folder.glob("trials/*"))) == TRIALS


# a search of four trials writes about thirty times
WRITES = [1, 2, 4, 6, 13]


@pytest.mark.parametrize("write", WRITES)
def test_a_killed_search_goes_on(tmp_path: Path, whole: Study, write: int) -> None:
    killed = start(tmp_path, str(TRIALS), str(write))
    assert killed.wait(60) == -signal.SIGKILL
    check_goes_on(tmp_path, whole)


@pytest.mark.full
@pytest.mark.parametrize("write", [number for number in range(1, 30) if number not in WRITES])
def test_a_killed_search_goes_on_from_any_write(tmp_path: Path, whole: Study, write: int) -> None:
    killed = start(tmp_path, str(TRIALS), str(write))
    killed.wait(60)
    check_goes_on(tmp_path, whole)


def test_a_torn_line_of_the_journal_is_cut(tmp_path: Path, whole: Study) -> None:
    run(tmp_path, 2)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"worker_i')
    check_goes_on(tmp_path, whole)


def test_a_signal_lets_the_trials_save(tmp_path: Path) -> None:
    started = search(tmp_path, 1, QuickCommands(tmp_path, steps=60, pause_s=0.1))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert started.run() == signal.SIGTERM
    directory = tmp_path / "trials" / "0000" / "stand_in"
    saved = int((directory / "checkpoint").read_text())
    assert 0 < saved < 60
    (trial,) = started.study.trials()
    assert trial.state is State.running
    study = run(tmp_path, 1, steps=60)
    assert study.trials()[0].state is State.complete
    assert len((directory / "starts").read_text().split()) == 2
