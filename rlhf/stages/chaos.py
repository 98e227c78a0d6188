"""Whether a run survives what happens to runs: faults are put into real runs of a tiny model, which then go on with run.resume=true.

python -m rlhf.stages.chaos                        every fault (minutes)
python -m rlhf.stages.chaos --only torn disk       those whose name holds one of the words

Each fault has to end the process with the exit code that the documentation states, and the resumed run to finish with one line a step, each of
them equal to the straight run's (after a NaN and a rewind: one line a step). The steps that a resumed run takes again are those since its last
whole checkpoint, and no more.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import checkpoints, console
from rlhf.run import CHECKPOINTS, MANIFEST_FILE, SUMMARY_FILE
from rlhf.stages.chaos_child import FAULT
from rlhf.tracking import METRICS_FILE
from rlhf.watchdog import EXIT_HUNG

STEPS, EVERY = 6, 2  # steps of a run, and between its checkpoints
_TIMEOUT_S = 600
_TOLERANCE = 1e-6
_KILLED = -9
_OPTIONS = (
    "stage=ppo",
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.layers=2",
    "model.tiny.heads=1",
    "model.tiny.max_positions=64",
    "model.dtype=float32",
    "engine.threads=1",
    "data.max_prompt_length=32",
    "rollout=hf",
    "rollout.max_response_length=4",
    "reward.function=rlhf.stages.chaos_child:even_tokens",
    "stage.critic_init=policy",
    "stage.prompts_per_step=4",
    "stage.reward_normalise=true",
    "stage.kl_controller=adaptive",
    f"stage.steps={STEPS}",
    f"stage.save_steps={EVERY}",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, and how the process then has to end."""

    name: str
    code: int  # of the process that it happens to
    point: str = ""
    times: int = 0
    action: str = ""
    rank: int = 0
    ranks: int = 1
    options: tuple[str, ...] = ("tracking=none",)
    environment: dict[str, str] = field(default_factory=dict)
    after: Callable[[Path], None] | None = None  # done to the run directory before the resume
    says: str = ""  # what has to be read in the process's output
    same: bool = True  # the figures are those of the straight run
    lost: int = EVERY  # steps taken again, at most


def tear_newest(run: Path) -> None:
    """The newest checkpoint loses half of its largest file."""
    _, newest = checkpoints.numbered(run / CHECKPOINTS)[0]
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


_ZERO = ("engine=zero1", "tracking=none")
_NO_SERVER = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "10"}
FAULTS = (
    *(Fault(f"kill -9 in {phase}", _KILLED, phase, times, "kill") for phase, times in (("rollout", 4), ("score", 4), ("update", 4), ("sync", 5))),
    Fault("kill -9 in save", _KILLED, "seal", 2, "kill_now"),
    Fault("SIGTERM", 143, "update", 3, "terminate", says="stopped by SIGTERM after step 3", lost=0),
    Fault("Ctrl-C twice", 130, "update", 4, "interrupt_twice", says="ended at once"),
    Fault("torn checkpoint", _KILLED, "update", 6, "kill", after=tear_newest, lost=2 * EVERY - 1),
    Fault("full disk", 1, "save", 2, "fill_disk", says="could not be written"),
    Fault("hang", EXIT_HUNG, "rollout", 4, "hang", options=("tracking=none", "run.phase_timeout_s=60"), says="phase rollout took longer"),
    Fault("tracker down", 0, options=("tracking=wandb", "tracking.mode=auto"), environment=_NO_SERVER, says="tracked offline instead", lost=0),
    Fault("NaN, rewound", 0, "reward", 4, "nan", options=("tracking=none", "stage.on_nonfinite=rewind"), same=False, lost=0),
    Fault("NaN, stopped", 1, "reward", 4, "nan", says="returned nan"),
    Fault("one of two ranks killed", 1, "update", 4, "kill", rank=1, ranks=2, options=_ZERO, says="rank 1|rank      : 1", same=False),
)


@dataclass(slots=True)
class Outcome:
    """What a fault did."""

    fault: Fault
    code: int
    lost: int = 0  # steps taken again after the resume
    problems: list[str] = field(default_factory=list)


def run(folder: Path, name: str, fault: Fault, *, resume: bool) -> tuple[int, str]:
    """Start the run, with the fault unless it resumes; exit code and output."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | fault.environment
    env |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    if fault.action and not resume:
        env[FAULT] = json.dumps({"point": fault.point, "times": fault.times, "action": fault.action, "rank": fault.rank})
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={fault.ranks}"] if fault.ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "rlhf.stages.chaos_child", *_OPTIONS, *fault.options]
    command += [f"run.dir={folder}", f"run.name={name}", f"data.path={folder / 'prompts.jsonl'}", *(["run.resume=true"] if resume else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    return done.returncode, done.stdout + done.stderr


def lines(run_directory: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl; a torn one raises ValueError, also the last."""
    content = (run_directory / METRICS_FILE).read_text(encoding="utf-8")
    if content and not content.endswith("\n"):
        raise ValueError("its last line is torn")
    return [json.loads(line) for line in content.splitlines()]


def figures(row: dict[str, Any]) -> dict[str, float]:
    """A line without what the clock and the machine decide."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and not k.startswith(("time", "memory/")) and not k.endswith("_per_s")}


def differences(rows: Sequence[dict[str, Any]], straight: Sequence[dict[str, Any]]) -> list[str]:
    """The figures of a finished run that are not the straight run's, by step."""
    out = []
    for row, expected in zip(rows, straight, strict=True):
        ours, theirs = figures(row), figures(expected)
        wrong = [k for k in theirs.keys() | ours.keys() if k not in ours or k not in theirs or abs(ours[k] - theirs[k]) > _TOLERANCE]
        if wrong:
            out.append(f"step {row['step']}: {', '.join(sorted(wrong)[:3])} differ")
    return out


def try_fault(fault: Fault, folder: Path, straight: Sequence[dict[str, Any]]) -> Outcome:
    """Run into the fault, go on, and compare."""
    name = re.sub(r"[^a-z0-9]+", "_", fault.name.lower())
    place = folder / name / "ppo"
    code, said = run(folder, name, fault, resume=False)
    outcome = Outcome(fault, code)
    if code != fault.code:
        outcome.problems.append(f"exit code {code} instead of {fault.code}: {said[-300:]}")
    if fault.says and not re.search(fault.says, said):
        outcome.problems.append(f"its output does not say {fault.says!r}")
    if not (place / SUMMARY_FILE).exists():
        reached = max((row["step"] for row in _whole_lines(place)), default=0)
        if fault.after is not None:
            fault.after(place)
        code, said = run(folder, name, fault, resume=True)
        if code != 0:
            outcome.problems.append(f"the resumed run ended with exit code {code}: {said[-300:]}")
            return outcome
        outcome.lost = reached - _resumed_at(place)
        if outcome.lost > fault.lost:
            outcome.problems.append(f"{outcome.lost} steps were taken again, expected at most {fault.lost}")
    outcome.problems += check_finished(place, straight, same=fault.same)
    return outcome


def _whole_lines(place: Path) -> list[dict[str, Any]]:
    """As far as a killed run got; its last line may be torn."""
    content = (place / METRICS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in content.split("\n")[:-1]]


def _resumed_at(place: Path) -> int:
    """The step of the checkpoint that the last start went on from; 0 for none."""
    start = json.loads((place / MANIFEST_FILE).read_text(encoding="utf-8"))["starts"][-1]
    return int(start["resume_from"].rsplit("-", 1)[1]) if start["resume_from"] else 0


def check_finished(place: Path, straight: Sequence[dict[str, Any]], *, same: bool) -> list[str]:
    """What is wrong with a run that has ended: one line a step, whole checkpoints, nothing half-written, and (`same`) the straight run's figures."""
    try:
        rows = lines(place)
    except ValueError as error:
        return [f"{METRICS_FILE}: {error}"]
    if [row["step"] for row in rows] != [row["step"] for row in straight]:
        return [f"{METRICS_FILE} has the steps {[row['step'] for row in rows]}"]
    problems = differences(rows, straight) if same else []
    problems += [f"{path.name}: {wrong}" for _, path in checkpoints.numbered(place / CHECKPOINTS) if (wrong := checkpoints.problem(path))]
    problems += [f"{path} was left" for path in place.rglob("*.part")]
    if not (place / "model" / "model.safetensors").is_file():
        problems.append("no model was saved")
    return problems


def report(outcomes: Sequence[Outcome]) -> int:
    """The table; exit code 1 where a fault was not survived."""
    rows = [
        {
            "fault": o.fault.name,
            "exit code": o.code,
            "survived": "no" if o.problems else "yes",
            "steps taken again": o.lost,
            "at most": o.fault.lost,
        }
        for o in outcomes
    ]
    console.table(rows, title=f"runs of {STEPS} steps, a checkpoint every {EVERY}")
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"{outcome.fault.name}: {problem}", file=sys.stderr)
    survived = sum(not o.problems for o in outcomes)
    print(f"{len(outcomes)} faults tried, {survived} survived; {sum(o.lost for o in outcomes)} steps were taken again in all")
    return 0 if survived == len(outcomes) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="faults whose name holds one of these")
    parser.add_argument("--keep", metavar="DIR", help="leave the runs there")
    given = parser.parse_args(arguments)
    folder = Path(given.keep or tempfile.mkdtemp(prefix="chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": f"{word} {number}"} for number in range(8) for word in ("alpha", "beta", "gamma", "delta")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    try:
        code, said = run(folder, "straight", Fault("none", 0), resume=False)
        if code != 0:
            print(f"the straight run ended with exit code {code}: {said[-2000:]}", file=sys.stderr)
            return 1
        straight = lines(folder / "straight" / "ppo")
        chosen = [fault for fault in FAULTS if any(word in fault.name for word in given.only)]
        outcomes = []
        for fault in chosen:
            outcomes.append(try_fault(fault, folder, straight))
            print(f"{fault.name}: {'; '.join(outcomes[-1].problems) or 'survived'}", flush=True)
        return report(outcomes)
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
