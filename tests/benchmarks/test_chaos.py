"""The judge of `make chaos` sees torn, doubled, missing and changed lines, torn checkpoints, other
weights, processes that stay, a wrong cause.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.chaos import child as chaos_child
from benchmarks.chaos import compare, launch
from benchmarks.chaos import disk as chaos_disk
from benchmarks.chaos import harness as chaos
from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.kinds import STEPS, Disk, Fault, Kind, tear_newest
from rlhf.process import checkpoints
from rlhf.process.supervision import Resident
from tests.process.test_supervision import program

METRICS = [{"step": step, "time_s": 1.0, "loss/policy": 0.5 / step} for step in range(1, STEPS + 1)]
SAMPLES = [
    {"step": step, "prompt": f"p{i}", "response": "one\u2028line", "score": 0.5, "kl": None}
    for step in range(1, STEPS + 1)
    for i in range(2)
]


def finished(
    folder: Path,
    metrics: list[dict[str, Any]],
    samples: list[dict[str, Any]] = SAMPLES,
    end: str = "\n",
    weight: float = 1.0,
) -> Path:
    """A run directory as a finished run leaves it."""
    (folder / "model").mkdir(parents=True)
    save_file({"w": torch.full((2,), weight)}, str(folder / "model" / "model.safetensors"))
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end, encoding="utf-8"
        )
    with checkpoints.written(folder / "checkpoints" / "step-2", keep=2) as side:
        (side / "state").write_text("2" * 5000, encoding="utf-8")
    return folder


@pytest.fixture
def straight(tmp_path: Path) -> compare.Straight:
    return compare.Straight.of(finished(tmp_path / "straight", METRICS))


def test_a_run_like_the_straight_one_has_no_problem(
    tmp_path: Path, straight: compare.Straight
) -> None:
    rows = [
        row
        | {
            "time_s": 9.0,
            "memory/rss_mb": 3.0,
            "train/tokens_per_s": 1.0,
            "ahead/trainer_idle_s": 1.0,
            "loss/policy": row["loss/policy"] + 5e-7,
        }
        for row in METRICS
    ]
    assert compare.check_finished(finished(tmp_path / "run", rows), straight, same=STEPS) == []


@pytest.mark.parametrize(
    ("metrics", "samples", "end", "same", "said"),
    [
        (
            [*METRICS[:2], METRICS[1], *METRICS[2:]],
            SAMPLES,
            "\n",
            6,
            r"metrics.jsonl has the steps \[1, 2, 2, 3, 4, 5, 6\]",
        ),
        (METRICS[:5], SAMPLES, "\n", 6, r"has the steps \[1, 2, 3, 4, 5\]"),
        (METRICS, SAMPLES, "", 6, "metrics.jsonl: its last line is torn"),
        (
            [*METRICS[:5], METRICS[5] | {"loss/policy": 0.09}],
            SAMPLES,
            "\n",
            6,
            "step 6: loss/policy differ",
        ),
        (
            [*METRICS[:5], {"step": 6, "time_s": 1.0}],
            SAMPLES,
            "\n",
            6,
            "step 6: loss/policy differ",
        ),
        (
            [*METRICS[:2], METRICS[2] | {"loss/policy": 0.0}, *METRICS[3:]],
            SAMPLES,
            "\n",
            3,
            "step 3: loss/policy differ",
        ),
        (METRICS, SAMPLES[:-1], "\n", 6, "samples.jsonl lacks 1 rows"),
        (METRICS, [*SAMPLES, SAMPLES[-1]], "\n", 6, "samples.jsonl has 13 rows instead of 12"),
        (
            METRICS,
            [SAMPLES[0] | {"response": "other"}, *SAMPLES[1:]],
            "\n",
            6,
            "step 1: response differ",
        ),
        (METRICS, [SAMPLES[0] | {"kl": 0.1}, *SAMPLES[1:]], "\n", 6, "step 1: kl differ"),
    ],
)
def test_a_wrong_line_is_seen(
    tmp_path: Path,
    straight: compare.Straight,
    metrics: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    end: str,
    same: int,
    said: str,
) -> None:
    (problem,) = compare.check_finished(
        finished(tmp_path / "run", metrics, samples, end), straight, same=same
    )

    assert re.search(said, problem)


def test_figures_and_weights_may_differ_after_the_step_that_the_fault_changes(
    tmp_path: Path, straight: compare.Straight
) -> None:
    rows = [*METRICS[:3], METRICS[3] | {"loss/policy": 9.0}, *METRICS[4:]]
    assert (
        compare.check_finished(finished(tmp_path / "run", rows, weight=2.0), straight, same=3) == []
    )


def test_samples_of_a_step_that_was_left_out_are_not_lost(
    tmp_path: Path, straight: compare.Straight
) -> None:
    samples = [row for row in SAMPLES if row["step"] != 4]
    metrics = [*METRICS[:3], METRICS[3] | {"train/skipped": 1.0}, *METRICS[4:]]
    assert compare.lost_lines(metrics, samples, straight) == 0
    assert compare.lost_lines(METRICS, samples, straight) == 2, "the line has to say it"
    assert compare.lost_lines(METRICS[1:], SAMPLES[1:], straight) == 2, "a line and a row"


def test_torn_checkpoints_leftovers_other_weights_and_a_missing_model_are_seen(
    tmp_path: Path, straight: compare.Straight
) -> None:
    run = finished(tmp_path / "run", METRICS, weight=1.1)
    tear_newest(run)
    (run / "best.part").mkdir()
    (run / "summary.json.tmp").touch()
    problems = " | ".join(compare.check_finished(run, straight, same=STEPS))
    assert all(
        part in problems
        for part in (
            "step-2: ",
            "best.part was left",
            "summary.json.tmp was left",
            "the model's w differ",
        )
    ), problems
    (run / "model" / "model.safetensors").unlink()
    assert "no model was saved" in compare.check_finished(run, straight, same=STEPS)


LAST = """
{0}
Failures:
  rank      : {2} (local_rank: {2})
  traceback : Signal 15 (SIGTERM) received by PID 1
-----
Root Cause (first observed failure):
[0]:
  rank      : {1} (local_rank: {1})
  exitcode  : -9 (pid: 2)  (SIGKILL)
  traceback : Signal 9 (SIGKILL) received by PID 2
====="""


def test_the_first_cause_has_to_be_torchruns_last_word() -> None:
    fault = next(fault for fault in FAULTS if fault.name == "2 ranks: kill -9 of one in save")
    assert compare.check_output(fault, LAST.format("", 1, 0)) == []
    assert len(compare.check_output(fault, LAST.format("", 0, 1))) == 1, "the other rank"
    assert (
        len(compare.check_output(fault, LAST.format("", 1, 0).replace("Root Cause", "Failures")))
        == 1
    )
    assert len(compare.check_output(Fault("x", 1, says="could not be written"), "written")) == 1


def test_a_resumed_run_has_to_say_what_it_takes_again(tmp_path: Path) -> None:
    def started(resume_from: str | None) -> None:
        (tmp_path / "manifest.json").write_text(
            json.dumps({"starts": [{"resume_from": None}, {"resume_from": resume_from}]}),
            encoding="utf-8",
        )

    started("/x/checkpoints/step-2")
    said = (
        "INFO resume: continuing from /x/checkpoints/step-2; 1 metric lines after it were dropped."
    )
    assert compare.check_resumed(tmp_path, said, reached=3) == (1, [])
    again, problems = compare.check_resumed(tmp_path, said, reached=4)
    assert again == 2 and "does not say" in problems[0]
    started(None)
    assert compare.check_resumed(tmp_path, "the run starts from step 0.", reached=1) == (1, [])
    assert len(compare.check_resumed(tmp_path, "", reached=1)[1]) == 1


def test_a_refused_batch_has_to_be_whole(tmp_path: Path, straight: compare.Straight) -> None:
    assert "0 responses were saved, expected 2" in compare.check_dump(tmp_path, straight)[0]
    place = tmp_path / "diverged-step-4-rank-0"
    place.mkdir()
    row = {"prompt": "p", "token_ids": [1, 2], "rollout_logprobs": [-1.0, -1.0]}
    for second, problems in ((row | {"rollout_logprobs": [-1.0]}, 1), (row, 0)):
        (place / "rollouts.jsonl").write_text(
            "".join(json.dumps(each) + "\n" for each in (row, second)), encoding="utf-8"
        )
        assert len(compare.check_dump(tmp_path, straight)) == problems


def test_processes_that_stay_are_found_and_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "import time; print('in', flush=True); time.sleep(60)"]
    with subprocess.Popen(
        command, env={launch.RUN: str(tmp_path)}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        assert launch.left_behind(str(tmp_path / "other"), 0.0) == [] and process.poll() is None
        (found,) = launch.left_behind(str(tmp_path), 0.3)
        assert "time.sleep(60)" in found and process.wait(timeout=10) == -9
    assert launch.left_behind(str(tmp_path), 0.0) == []


def test_processes_that_ended_and_were_not_waited_for_are_found(tmp_path: Path) -> None:
    """The child's parent lives on outside the run."""
    waits = "import time; time.sleep(0.8)"
    starter = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {waits!r}], "
        f"env={{{launch.RUN!r}: sys.argv[1]}}); input()"
    )
    command = [sys.executable, "-S", "-c", starter, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        run = [sys.executable, "-S", "-c", "import time; time.sleep(1.5)"]
        with subprocess.Popen(run, env={launch.RUN: str(tmp_path)}) as process:
            assert launch._watched(process, str(tmp_path)) == 0
        (found,) = launch.left_behind(str(tmp_path), 0.3)
        parent.communicate(b"\n")
    assert "zombie" in found
    assert launch.left_behind(str(tmp_path), 5.0) == [], "with its parent it went as well"


def test_an_engines_own_process_is_found_among_the_descendants() -> None:
    inner = "import time; print('in', flush=True); time.sleep(60)"
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {inner!r}, "
        "'VLLM::EngineCore'])"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", child], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        engines = chaos_child.engine_processes()
        for engine in engines:
            os.kill(engine, 9)
        process.wait(timeout=10)
    assert len([engine for engine in engines if engine != process.pid]) == 1


LINES = """
import json, os
from pathlib import Path
from rlhf.run.tracking import tracker
from benchmarks.chaos import child as chaos_child
from benchmarks.chaos import compare, launch

chaos_child.ACTIONS["stop"] = lambda place: os._exit(7)
chaos_child._break_line(json.loads(os.environ["RLHF_CHAOS"]))
path = Path(os.environ["PLACE"]) / "metrics.jsonl"
with path.open("w+b", buffering=0) as file:
    for number in range(9):
        tracker.write_line(file, file.tell(), "x" * 1499, path)
"""


@pytest.mark.parametrize(
    ("action", "code", "size"), [("tear", -9, 1500 + 1499 // 2), ("stop", 7, 7500)]
)
def test_a_line_is_torn_in_its_middle_and_a_full_disk_meets_one_that_needs_a_page(
    tmp_path: Path, action: str, code: int, size: int
) -> None:
    """Pages of 4,096 bytes: of the lines from the fourth on (4,500 to 6,000 bytes), the sixth is
    the first to reach another one.
    """
    chosen = json.dumps(
        {"point": "metrics.jsonl", "times": 2 if action == "tear" else 4, "action": action}
    )
    with program(LINES, RLHF_CHAOS=chosen, PLACE=str(tmp_path)) as process:
        assert process.wait(timeout=60) == code
    assert (tmp_path / "metrics.jsonl").stat().st_size == size


MOUNTS = """
import sys
from pathlib import Path
from benchmarks.chaos import child as chaos_child
from benchmarks.chaos import compare, launch
from benchmarks.chaos import disk as chaos_disk

place = Path(sys.argv[1])
said = []
actions = {
    "full": lambda directory: None,
    "roomy": chaos_disk.enlarge,
    "sealed": chaos_disk.seal_off,
    "restored": chaos_disk.restore,
}
with chaos_disk.mounted(place, 64 * 1024):
    kept = (place / "kept").open("w")
    chaos_child.ACTIONS["fill"](str(place))
    for step, action in actions.items():
        action(place)
        try:
            (place / step).write_bytes(b"x" * 5000)
            said.append("yes")
        except OSError as error:
            said.append(error.strerror)
    kept.write("goes on")
    kept.close()
print("; ".join(said), chaos_disk._below(place), list(place.iterdir()))
"""


@pytest.mark.parametrize("way", chaos_disk._WAYS)
def test_a_disk_fills_up_grows_turns_read_only_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: tuple[str, ...]
) -> None:
    monkeypatch.setattr(chaos_disk, "_WAYS", (way,))
    prefix, why = chaos_disk.way()
    if not prefix:
        pytest.skip(f"nothing can be mounted here: {why}")
    done = subprocess.run(
        [*prefix, sys.executable, "-c", MOUNTS, str(tmp_path / "disk")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (
        done.stdout.strip() == "No space left on device; yes; Read-only file system; yes [] []"
    ), done.stderr
    assert chaos_disk._below(tmp_path) == [], "nothing is seen outside"


def test_where_nothing_can_be_mounted_the_fault_is_not_tried(
    tmp_path: Path,
    straight: compare.Straight,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(chaos_disk.INSIDE, raising=False)
    monkeypatch.setattr(chaos_disk, "_WAYS", (("no-such-program",), ("false",)))
    why = chaos_disk.enter([])
    assert "no-such-program" in why and "false: exit code 1" in why
    fault = next(fault for fault in FAULTS if fault.disk is Disk.small)
    outcome = chaos.try_fault(fault, tmp_path, straight, why)
    assert outcome.code is None and outcome.not_tried == why
    assert chaos.report([outcome]) == 0
    said = capsys.readouterr().out
    assert (
        "0 faults tried, 0 survived" in said
        and f"not tried: {fault.name}" in said
        and "false: exit code 1" in said
    )


def test_a_small_disk_holds_one_checkpoint_and_not_two(straight: compare.Straight) -> None:
    # a checkpoint's state and seal; metrics and samples
    one, rest = 2 * chaos_disk.PAGE + chaos_disk.PAGE, 2 * chaos_disk.PAGE
    assert straight.room(1.0) == one + rest and straight.room(1.5) == one * 3 // 2 + rest


def test_an_error_in_the_harness_is_this_faults_problem_and_the_others_are_tried(
    tmp_path: Path, straight: compare.Straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(fault: Fault, *given: Any) -> chaos.Outcome:
        if fault is FAULTS[1]:
            raise FileNotFoundError("metrics.jsonl")
        return chaos.Outcome(fault, fault.code)

    monkeypatch.setattr(chaos, "try_fault", tried)
    monkeypatch.setattr(chaos, "straight_run", lambda folder, kind: straight)
    outcomes = chaos.try_all(FAULTS, tmp_path, "")
    assert [outcome.fault.name for outcome in outcomes] == [fault.name for fault in FAULTS], (
        "each once, in order, whatever its kind"
    )
    assert [outcome.problems for outcome in outcomes if outcome.problems] == [
        ["FileNotFoundError: metrics.jsonl"]
    ] and outcomes[1].problems


def test_the_report_fails_for_a_fault_that_was_not_survived(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = chaos.Outcome(FAULTS[0], -9, again=1)
    bad = chaos.Outcome(FAULTS[1], 1, lost=3, problems=["exit code 1 instead of -9"])
    assert chaos.report([good]) == 0
    assert chaos.report([good, bad]) == 1
    figures = re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1])
    assert figures == ["2", "1", "1", "3"]  # tried, survived, steps taken again, lines lost


def test_every_fault_is_of_its_own_and_can_happen() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    known = {*chaos_child.ACTIONS, "nan", "tear", ""}
    apart = (Kind.server, Kind.ahead)
    for fault in FAULTS:
        assert fault.action in known and fault.rank < fault.kind.count, fault.name
        assert bool(fault.cause) <= (fault.kind is Kind.ranks), fault.name
        assert fault.action.endswith("_server") <= (fault.kind in apart), fault.name
        assert fault.link == (fault.action == "cut_link"), fault.name
        re.compile(fault.says), re.compile(fault.cause)
    killed = {fault.name for fault in FAULTS if fault.action.startswith("kill")}
    for phase in ("rollout", "score", "update", "sync", "save"):
        assert {f"kill -9 in {phase}", f"2 ranks: kill -9 of one in {phase}"} <= killed


def test_resident_memory_sees_what_is_allocated() -> None:
    resident = Resident()
    assert resident.figures()["memory/growth_mb"] == 0.0
    block = bytearray(b"x" * (64 * 2**20))
    figures = resident.figures()
    assert (
        50 < figures["memory/growth_mb"] < 90
        and figures["memory/peak_rss_mb"] >= figures["memory/rss_mb"] > 64
    )
    del block
