"""Whether a run survives what happens to runs: faults are put into real runs of a tiny model, which
then go on with run.resume=true.

python -m benchmarks.chaos.harness                        every fault (minutes)
python -m benchmarks.chaos.harness --only torn disk       those whose name holds one of the words
python -m benchmarks.chaos.harness --ranks 2              those of runs with two ranks

Each fault has to end the process with the exit code that the documentation states and to leave no
process behind; with two ranks the first cause has to stand in torchrun's last lines. The resumed
run has to say where it goes on, and to finish with one line a step and one row a sample, each of
them equal to the straight run's, and with its weights (after a NaN that was rewound or left out: up
to the step before). The steps that a resumed run takes again are those since its last whole
checkpoint, and no more. Full and read-only disks are real ones: tmpfs, where this machine lets us
mount; elsewhere those faults are reported as not tried.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from benchmarks.chaos import disk as chaos_disk
from benchmarks.chaos.child import FAULT
from benchmarks.chaos.faults import EVERY, FAULTS, STEPS, Disk, Fault, Kind
from rlhf.process import checkpoints
from rlhf.run import console
from rlhf.run.directory import CHECKPOINTS, SUMMARY_FILE
from rlhf.run.manifest import MANIFEST_FILE
from rlhf.run.tracking.files import METRICS_FILE, SAMPLES_FILE, read_jsonl

_TIMEOUT_S = 600
_LEAVING_S = 20.0  # that a run's processes have after the first of them ended
_TOLERANCE = 1e-6
_RUN = "RLHF_CHAOS_RUN"  # in the environment of every process of a run
_CAUSE = "Root Cause (first observed failure):"


@dataclass(slots=True)
class Outcome:
    """What a fault did."""

    fault: Fault
    code: int | None = None
    again: int = 0  # steps taken again after the resume
    # lines of metrics.jsonl and rows of samples.jsonl that the straight run has and this one has
    # not
    lost: int = 0
    problems: list[str] = field(default_factory=list)
    not_tried: str = ""  # why


@dataclass(frozen=True, slots=True)
class Straight:
    """A run that nothing happened to."""

    place: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @staticmethod
    def of(place: Path) -> "Straight":
        return Straight(place, lines(place / METRICS_FILE), lines(place / SAMPLES_FILE))

    def room(self, checkpoints_: float) -> int:
        """Bytes of a tmpfs that holds the start of the run and so many checkpoints."""
        ends = [self.place / name for name in (CHECKPOINTS, "model", "plots")]
        one = chaos_disk.room(checkpoints.numbered(self.place / CHECKPOINTS)[0][1])
        return (
            chaos_disk.room(self.place)
            - sum(map(chaos_disk.room, ends))
            + round(checkpoints_ * one)
        )


# ---- starting runs ----


def launch(folder: Path, name: str, fault: Fault, *, resume: bool) -> tuple[int | None, str]:
    """Start the run, with the fault unless it resumes; exit code (None: it never ended) and
    output.
    """
    env = (
        os.environ
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        | fault.environment
    )
    env |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), _RUN: str(folder / name)}
    if fault.action and not resume:
        chosen = {
            "point": fault.point,
            "times": fault.times,
            "action": fault.action,
            "rank": fault.rank,
            "place": str(folder / name),
        }
        env[FAULT] = json.dumps(chosen)
    ranks = fault.kind.count
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    command = [
        sys.executable,
        *launcher,
        "-m",
        "benchmarks.chaos.child",
        *fault.kind.options,
        *fault.options,
    ]
    command += [
        f"run.dir={folder}",
        f"run.name={name}",
        f"data.path={folder / fault.kind.data}",
        *(["run.resume=true"] if resume else []),
    ]
    log = folder / f"{name}{'.resumed' if resume else ''}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        code: int | None = None
        try:
            code = process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")


def left_behind(token: str, patience: float) -> list[str]:
    """Command lines of the processes of a run that are still there after `patience` seconds; they
    are ended.
    """
    wanted = f"{_RUN}={token}".encode()

    def living() -> dict[int, str]:
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # a process that has just ended, or another user's
                if wanted in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = (
                        (place / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                        .strip()
                    )
        return found

    deadline = time.monotonic() + patience
    while (processes := living()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, 9)
    return list(processes.values())


# ---- comparing ----


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of metrics or samples; a torn one raises ValueError, also the last."""
    content = path.read_text(encoding="utf-8")
    if content and not content.endswith("\n"):
        raise ValueError(f"{path.name}: its last line is torn")
    try:
        # splitlines() would end a line at U+2028, too
        return [json.loads(line) for line in content.split("\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """A line without what the clock and the machine decide."""
    return {
        k: v
        for k, v in row.items()
        if not k.startswith(("time", "memory/")) and not k.endswith("_per_s")
    }


def _equal(one: Any, other: Any) -> bool:
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return abs(one - other) <= _TOLERANCE if numbers else bool(one == other)


def differences(rows: Sequence[dict[str, Any]], straight: Sequence[dict[str, Any]]) -> list[str]:
    """What in rows of metrics or samples is not the straight run's, by step."""
    out = []
    for row, expected in zip(rows, straight, strict=True):
        ours, theirs = figures(row), figures(expected)
        wrong = [
            k
            for k in theirs.keys() | ours.keys()
            if k not in ours or k not in theirs or not _equal(ours[k], theirs[k])
        ]
        if wrong:
            out.append(f"step {expected['step']}: {', '.join(sorted(wrong)[:3])} differ")
    return out


def lost_lines(
    metrics: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], straight: Straight
) -> int:
    """Steps without a line of metrics, and samples without a row. A step that says of itself that
    it was left out has no samples.
    """
    have = {row["step"] for row in metrics}
    left_out = {row["step"] for row in metrics if row.get("train/skipped")}
    lost = sum(row["step"] not in have for row in straight.metrics)
    for step in {row["step"] for row in straight.samples} - left_out:
        counts = [sum(row["step"] == step for row in rows) for rows in (straight.samples, samples)]
        lost += max(0, counts[0] - counts[1])
    return lost


def weights_differ(place: Path, straight: Path) -> str | None:
    """Which of the saved model's tensors are not the straight run's."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (place, straight))
    if ours.keys() != theirs.keys():
        return "the model has other tensors"
    wrong = [name for name in theirs if float((ours[name] - theirs[name]).abs().max()) > _TOLERANCE]
    return f"the model's {', '.join(wrong[:3])} differ" if wrong else None


def check_finished(place: Path, straight: Straight, *, same: int) -> list[str]:
    """What is wrong with a run that has ended: one line a step, the samples of each, whole
    checkpoints, nothing half-written, and up to step `same` the straight run's figures; with all of
    them its weights, too.
    """
    try:
        metrics, samples = lines(place / METRICS_FILE), lines(place / SAMPLES_FILE)
    except ValueError as error:
        return [str(error)]
    if [row["step"] for row in metrics] != [row["step"] for row in straight.metrics]:
        return [f"{METRICS_FILE} has the steps {[row['step'] for row in metrics]}"]
    problems = []
    if lost := lost_lines(metrics, samples, straight):
        problems.append(f"{SAMPLES_FILE} lacks {lost} rows")
    if len(samples) > len(straight.samples):
        problems.append(
            f"{SAMPLES_FILE} has {len(samples)} rows instead of {len(straight.samples)}"
        )
    for rows, expected in ((metrics, straight.metrics), (samples, straight.samples)):
        parts = [[row for row in part if row["step"] <= same] for part in (rows, expected)]
        if len(parts[0]) == len(parts[1]):  # else it was said above
            problems += differences(*parts)
    problems += [
        f"{path.name}: {wrong}"
        for _, path in checkpoints.numbered(place / CHECKPOINTS)
        if (wrong := checkpoints.problem(path))
    ]
    problems += [
        f"{path} was left" for pattern in ("*.part", "*.tmp") for path in place.rglob(pattern)
    ]
    if not (place / "model" / "model.safetensors").is_file():
        problems.append("no model was saved")
    elif same >= STEPS and (wrong := weights_differ(place, straight.place)):
        problems.append(wrong)
    return problems


def check_said(fault: Fault, said: str) -> list[str]:
    """What is wrong with a broken run's output."""
    problems = []
    if fault.says and not re.search(fault.says, said):
        problems.append(f"its output does not say {fault.says!r}")
    if fault.cause and not re.search(
        fault.cause, said.rpartition(_CAUSE)[2] if _CAUSE in said else ""
    ):
        problems.append(f"torchrun's last lines do not say {fault.cause!r}")
    return problems


def check_dump(place: Path, straight: Straight) -> list[str]:
    """What is wrong with the batches that were refused: each of the step's responses has to be
    there.
    """
    rows = [
        row for path in sorted(place.glob("diverged-step-*/rollouts.jsonl")) for row in lines(path)
    ]
    expected = sum(row["step"] == 1 for row in straight.samples)
    whole = [
        row
        for row in rows
        if row["token_ids"]
        and len(row["token_ids"]) == len(row["rollout_logprobs"])
        and "prompt" in row
    ]
    return (
        []
        if len(whole) >= expected
        else [
            f"of the batch that was refused {len(whole)} responses were saved, expected {expected}"
        ]
    )


def check_resumed(place: Path, said: str, reached: int) -> tuple[int, list[str]]:
    """The steps that a resumed run takes again, and what is wrong with what it says of that."""
    start = json.loads((place / MANIFEST_FILE).read_text(encoding="utf-8"))["starts"][-1]
    if not start["resume_from"]:
        return reached, [] if "the run starts from step 0" in said else [
            "the resumed run does not say that it starts from step 0"
        ]
    again = reached - int(start["resume_from"].rsplit("-", 1)[1])
    expected = f"continuing from {start['resume_from']}; {again} metric lines after it were dropped"
    return again, [] if expected in said else [f"the resumed run does not say {expected!r}"]


# ---- a fault ----


def try_fault(fault: Fault, folder: Path, straight: Straight, no_mounts: str = "") -> Outcome:
    """Run into the fault, go on, and compare. `no_mounts`: why nothing can be mounted, where that
    is so.
    """
    outcome = Outcome(fault)
    if fault.disk is not None and no_mounts:
        outcome.not_tried = no_mounts
        return outcome
    name = re.sub(r"[^a-z0-9]+", "_", fault.name.lower()).strip("_")
    if fault.disk is None:
        _break_and_resume(outcome, folder, name, straight)
        return outcome
    sizes = {Disk.small: straight.room(1.5), Disk.full: 2 * chaos_disk.PAGE}
    with chaos_disk.mounted(folder / name, sizes.get(fault.disk, chaos_disk.ROOMY // 4)):
        if fault.disk is Disk.sealed:
            chaos_disk.seal_off(folder / name)
        _break_and_resume(outcome, folder, name, straight)
    return outcome


def _break_and_resume(outcome: Outcome, folder: Path, name: str, straight: Straight) -> None:
    fault, place = outcome.fault, folder / name / outcome.fault.kind.stage
    outcome.code, said = launch(folder, name, fault, resume=False)
    left = left_behind(str(folder / name), _LEAVING_S)
    problems = outcome.problems
    problems += [f"left behind: {command[:150]}" for command in left]
    if outcome.code != fault.code:
        problems.append(f"exit code {outcome.code} instead of {fault.code}: {said[-300:]}")
    problems += check_said(fault, said)
    if fault.dumped:
        problems += check_dump(place, straight)
    if not (place / SUMMARY_FILE).exists():
        # the last line may be torn
        reached = max((row["step"] for row in read_jsonl(place / METRICS_FILE)), default=0)
        if fault.disk is not None:
            chaos_disk.restore(folder / name)
            chaos_disk.enlarge(folder / name)
        if fault.after is not None:
            fault.after(place)
        code, said = launch(folder, name, fault, resume=True)
        problems += [
            f"left behind by the resumed run: {command[:150]}"
            for command in left_behind(str(folder / name), _LEAVING_S)
        ]
        if code != 0:
            problems.append(f"the resumed run ended with exit code {code}: {said[-300:]}")
            return
        outcome.again, wrong = check_resumed(place, said, reached)
        problems += wrong
        if outcome.again > fault.lost:
            problems.append(
                f"{outcome.again} steps were taken again, expected at most {fault.lost}"
            )
    outcome.lost = lost_lines(
        read_jsonl(place / METRICS_FILE), read_jsonl(place / SAMPLES_FILE), straight
    )
    problems += check_finished(place, straight, same=fault.same)


# ---- all of them ----


def report(outcomes: Sequence[Outcome]) -> int:
    """The table; exit code 1 where a fault was not survived."""
    rows = [
        {
            "fault": o.fault.name,
            "exit code": "" if o.code is None else o.code,
            "survived": "not tried" if o.not_tried else "no" if o.problems else "yes",
            "steps taken again": "" if o.not_tried else o.again,
            "at most": o.fault.lost,
            "lines lost": "" if o.not_tried else o.lost,
        }
        for o in outcomes
    ]
    console.table(rows, title=f"runs of {STEPS} steps, a checkpoint every {EVERY}")
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"{outcome.fault.name}: {problem}", file=sys.stderr)
    tried = [o for o in outcomes if not o.not_tried]
    survived = sum(not o.problems for o in tried)
    print(
        f"{len(tried)} faults tried, {survived} survived; {sum(o.again for o in tried)} steps "
        "were taken again in all, and "
        f"{sum(o.lost for o in tried)} lines of metrics and samples lost"
    )
    for reason in sorted({o.not_tried for o in outcomes if o.not_tried}):
        names = ", ".join(o.fault.name for o in outcomes if o.not_tried == reason)
        print(f"not tried: {names}: nothing can be mounted here ({reason})")
    return 0 if survived == len(tried) else 1


def write_data(folder: Path) -> None:
    """The rows that the runs read."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(word, number) for number in range(8) for word in ("alpha", "beta", "gamma", "delta")]
    rows = {
        "prompts.jsonl": [{"prompt": f"{word} {number}"} for word, number in pairs],
        "texts.jsonl": [
            {"prompt": f"{word} {number}", "completion": f" {word} follows {number + 1}"}
            for word, number in pairs
        ],
    }
    for name, content in rows.items():
        (folder / name).write_text(
            "".join(json.dumps(row) + "\n" for row in content), encoding="utf-8"
        )


def straight_run(folder: Path, kind: Kind) -> Straight:
    """Raises RuntimeError where it fails."""
    code, said = launch(folder, f"straight-{kind.name}", Fault("none", 0, kind=kind), resume=False)
    if code != 0:
        raise RuntimeError(
            f"the straight run of {kind.name} ended with exit code {code}: {said[-2000:]}"
        )
    return Straight.of(folder / f"straight-{kind.name}" / kind.stage)


def attempt(fault: Fault, folder: Path, straight: Straight, no_mounts: str) -> Outcome:
    """`try_fault`, with what it did on the screen. An error in here is a problem of this fault's,
    and the others are tried all the same.
    """
    began = time.monotonic()
    try:
        outcome = try_fault(fault, folder, straight, no_mounts)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        outcome = Outcome(fault, problems=[f"{type(error).__name__}: {error}"])
    said = (
        f"not tried: {outcome.not_tried}"
        if outcome.not_tried
        else "; ".join(outcome.problems) or "survived"
    )
    print(f"{fault.name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return outcome


def try_all(chosen: Sequence[Fault], folder: Path, no_mounts: str) -> list[Outcome]:
    """Every fault after the straight runs of its kind, as many side by side as there are cores for
    their ranks.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    outcomes: dict[str, Outcome] = {}
    for ranks in sorted({fault.kind.count for fault in chosen}):
        with ThreadPoolExecutor(max(1, cores // ranks)) as pool:
            kinds = [
                kind
                for kind in Kind
                if kind.count == ranks and any(fault.kind is kind for fault in chosen)
            ]
            straight = dict(zip(kinds, pool.map(straight_run, repeat(folder), kinds), strict=True))
            now = [fault for fault in chosen if fault.kind.count == ranks]
            done = pool.map(
                attempt,
                now,
                repeat(folder),
                [straight[fault.kind] for fault in now],
                repeat(no_mounts),
            )
            outcomes |= {outcome.fault.name: outcome for outcome in done}
    return [outcomes[fault.name] for fault in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="faults whose name holds one of these",
    )
    parser.add_argument("--ranks", type=int, help="faults of runs with so many ranks")
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="leave the runs and their output there (what lay on a tmpfs goes)",
    )
    given = parser.parse_args(arguments)
    chosen = [
        f
        for f in FAULTS
        if any(word in f.name for word in given.only) and given.ranks in (None, f.kind.count)
    ]
    no_mounts = ""
    if any(fault.disk is not None for fault in chosen):
        no_mounts = chaos_disk.enter(sys.argv[1:] if arguments is None else arguments)
    began = time.monotonic()
    folder = Path(given.keep or tempfile.mkdtemp(prefix="chaos-")).resolve()
    try:
        write_data(folder)
        code = report(try_all(chosen, folder, no_mounts))
        print(f"in {console.duration(time.monotonic() - began)}")
        return code
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
