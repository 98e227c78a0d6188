"""Whether a run survives what happens to runs: faults are put into real runs of a tiny model, which
then go on with run.resume=true.

python -m benchmarks.chaos                        every fault (minutes)
python -m benchmarks.chaos --only torn disk       those whose name holds one of the words
python -m benchmarks.chaos --ranks 2              those of runs with two ranks

Each fault has to end the process with the exit code that the documentation states and to leave no
process behind; with two ranks the first cause has to stand in torchrun's last lines. The resumed
run has to say where it goes on, and to finish with one line a step and one row a sample, each of
them equal to the straight run's, and with its weights (after a NaN that was rewound or left out: up
to the step before). The steps that a resumed run takes again are those since its last whole
checkpoint, and no more. Full and read-only disks are real ones: tmpfs, where this machine lets us
mount; a link that is cut is one between two network namespaces. Elsewhere those faults are reported
as not tried. A vLLM server that a run starts itself may be killed or hang: the run restarts it and
takes no step again.
"""

import argparse
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

from benchmarks.chaos import disk as chaos_disk
from benchmarks.chaos import network
from benchmarks.chaos.compare import (
    Straight,
    check_dump,
    check_finished,
    check_output,
    check_resumed,
    lost_lines,
)
from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.kinds import EVERY, SERVED, STEPS, Disk, Fault, Kind
from benchmarks.chaos.launch import launch, left_behind, write_data
from benchmarks.chaos.network import Host, Hosts
from rlhf.run import console
from rlhf.run.directory import SUMMARY_FILE
from rlhf.run.tracking.files import METRICS_FILE, SAMPLES_FILE, read_jsonl

_LEAVING_S = 20.0  # that a run's processes have after the first of them ended


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


def try_fault(
    fault: Fault, folder: Path, straight: Straight, no_mounts: str = "", no_hosts: str = ""
) -> Outcome:
    """Run into the fault, go on, and compare. `no_mounts`, `no_hosts`: why nothing can be mounted,
    and no hosts be made, where that is so.
    """
    outcome = Outcome(fault)
    if fault.disk is not None and no_mounts:
        outcome.not_tried = no_mounts
        return outcome
    if fault.link and no_hosts:
        outcome.not_tried = no_hosts
        return outcome
    name = re.sub(r"[^a-z0-9]+", "_", fault.name.lower()).strip("_")
    if fault.link:
        with network.hosts() as hosts:
            model = straight.directory / "model"
            with network.served(hosts.far, model, SERVED, folder):
                _break_and_resume(outcome, folder, name, straight, hosts)
        return outcome
    if fault.disk is None:
        _break_and_resume(outcome, folder, name, straight)
        return outcome
    sizes = {Disk.small: straight.room(1.5), Disk.full: 2 * chaos_disk.PAGE}
    with chaos_disk.mounted(folder / name, sizes.get(fault.disk, chaos_disk.ROOMY // 4)):
        if fault.disk is Disk.sealed:
            chaos_disk.seal_off(folder / name)
        _break_and_resume(outcome, folder, name, straight)
    return outcome


def _break_and_resume(
    outcome: Outcome, folder: Path, name: str, straight: Straight, hosts: Hosts | None = None
) -> None:
    """Run into the fault and go on; problems and figures go into `outcome`. hosts: of the run and
    of its server, where there are two.
    """
    fault, run = outcome.fault, folder / name / outcome.fault.kind.stage
    problems = outcome.problems
    host = None if hosts is None else hosts.near
    outcome.code, output = launch(folder, name, fault, resume=False, host=host)
    left = left_behind(str(folder / name), _LEAVING_S)
    problems += [f"left behind: {command[:150]}" for command in left]
    if outcome.code != fault.code:
        problems.append(f"exit code {outcome.code} instead of {fault.code}: {output[-300:]}")
    problems += check_output(fault, output)
    if fault.dumped:
        problems += check_dump(run, straight)
    if hosts is not None:
        hosts.restore()
    if not (run / SUMMARY_FILE).exists() and not _resume(outcome, folder, name, host):
        return
    outcome.lost = lost_lines(
        read_jsonl(run / METRICS_FILE), read_jsonl(run / SAMPLES_FILE), straight
    )
    problems += check_finished(run, straight, same=fault.same)


def _resume(outcome: Outcome, folder: Path, name: str, host: Host | None) -> bool:
    """Let the broken run go on; whether it finished. Problems go into `outcome`."""
    fault, run = outcome.fault, folder / name / outcome.fault.kind.stage
    problems = outcome.problems
    # read_jsonl leaves out a last line that is torn
    reached = max((row["step"] for row in read_jsonl(run / METRICS_FILE)), default=0)
    if fault.disk is not None:
        chaos_disk.restore(folder / name)
        chaos_disk.enlarge(folder / name)
    if fault.after is not None:
        fault.after(run)
    code, output = launch(folder, name, fault, resume=True, host=host)
    left = left_behind(str(folder / name), _LEAVING_S)
    problems += [f"left behind by the resumed run: {command[:150]}" for command in left]
    if code != 0:
        problems.append(f"the resumed run ended with exit code {code}: {output[-300:]}")
        return False
    outcome.again, wrong = check_resumed(run, output, reached)
    problems += wrong
    if outcome.again > fault.lost:
        problems.append(f"{outcome.again} steps were taken again, expected at most {fault.lost}")
    return True


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
        print(f"not tried: {names}: this machine does not allow it ({reason})")
    return 0 if survived == len(tried) else 1


def straight_run(folder: Path, kind: Kind) -> Straight:
    """Raises RuntimeError where it fails."""
    code, output = launch(
        folder, f"straight-{kind.name}", Fault("none", 0, kind=kind), resume=False
    )
    if code != 0:
        raise RuntimeError(
            f"the straight run of {kind.name} ended with exit code {code}: {output[-2000:]}"
        )
    return Straight.of(folder / f"straight-{kind.name}" / kind.stage)


def attempt(
    fault: Fault, folder: Path, straight: Straight, no_mounts: str, no_hosts: str = ""
) -> Outcome:
    """`try_fault`, with what it did on the screen. An error in here is a problem of this fault's,
    and the others are tried all the same.
    """
    began = time.monotonic()
    try:
        outcome = try_fault(fault, folder, straight, no_mounts, no_hosts)
    except (OSError, ValueError, KeyError, RuntimeError, subprocess.SubprocessError) as error:
        outcome = Outcome(fault, problems=[f"{type(error).__name__}: {error}"])
    result = "; ".join(outcome.problems) or "survived"
    if outcome.not_tried:
        result = f"not tried: {outcome.not_tried}"
    print(f"{fault.name}: {result} ({time.monotonic() - began:.0f} s)", flush=True)
    return outcome


def try_all(
    chosen: Sequence[Fault], folder: Path, no_mounts: str, no_hosts: str = ""
) -> list[Outcome]:
    """Every fault after the straight runs of its kind, as many side by side as there are cores for
    their ranks and servers.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    outcomes: dict[str, Outcome] = {}
    for needed in sorted({fault.kind.cores for fault in chosen}):
        with ThreadPoolExecutor(max(1, cores // needed)) as pool:
            kinds = [
                kind
                for kind in Kind
                if kind.cores == needed and any(fault.kind is kind for fault in chosen)
            ]
            straight = dict(zip(kinds, pool.map(straight_run, repeat(folder), kinds), strict=True))
            now = [fault for fault in chosen if fault.kind.cores == needed]
            done = pool.map(
                attempt,
                now,
                repeat(folder),
                [straight[fault.kind] for fault in now],
                repeat(no_mounts),
                repeat(no_hosts),
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
    no_hosts = network.why_not() if any(fault.link for fault in chosen) else ""
    began = time.monotonic()
    folder = Path(given.keep or tempfile.mkdtemp(prefix="chaos-")).resolve()
    try:
        write_data(folder)
        code = report(try_all(chosen, folder, no_mounts, no_hosts))
        print(f"in {console.duration(time.monotonic() - began)}")
        return code
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
