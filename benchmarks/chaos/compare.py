"""A run that a fault broke and that went on, held against a run that nothing happened to."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos import disk as chaos_disk
from benchmarks.chaos.kinds import STEPS, Fault
from rlhf.process import checkpoints
from rlhf.run.directory import CHECKPOINTS
from rlhf.run.manifest import MANIFEST_FILE
from rlhf.run.tracking.files import METRICS_FILE, SAMPLES_FILE

_TOLERANCE = 1e-6
_CAUSE = "Root Cause (first observed failure):"  # of torchrun


@dataclass(frozen=True, slots=True)
class Straight:
    """A run that nothing happened to."""

    directory: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @staticmethod
    def of(directory: Path) -> "Straight":
        metrics, samples = lines(directory / METRICS_FILE), lines(directory / SAMPLES_FILE)
        return Straight(directory, metrics, samples)

    def room(self, count: float) -> int:
        """Bytes of a tmpfs that holds the start of the run and `count` checkpoints."""
        ends = [self.directory / name for name in (CHECKPOINTS, "model", "plots")]
        start = chaos_disk.room(self.directory) - sum(map(chaos_disk.room, ends))
        newest = checkpoints.numbered(self.directory / CHECKPOINTS)[0][1]
        return start + round(count * chaos_disk.room(newest))


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
        if not k.startswith(("time", "memory/")) and not k.endswith(("_per_s", "_idle_s"))
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


def weights_differ(run: Path, straight: Path) -> str | None:
    """Which of the saved model's tensors are not the straight run's."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, straight))
    if ours.keys() != theirs.keys():
        return "the model has other tensors"
    wrong = [name for name in theirs if float((ours[name] - theirs[name]).abs().max()) > _TOLERANCE]
    if not wrong:
        return None
    return f"the model's {', '.join(wrong[:3])} differ"


def check_finished(run: Path, straight: Straight, *, same: int) -> list[str]:
    """What is wrong with a run that has ended: one line a step, the samples of each, whole
    checkpoints, nothing half-written, and up to step `same` the straight run's figures; with all of
    them its weights, too.
    """
    try:
        metrics, samples = lines(run / METRICS_FILE), lines(run / SAMPLES_FILE)
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
        if len(parts[0]) == len(parts[1]):  # else the problem is listed above
            problems += differences(*parts)
    problems += [
        f"{path.name}: {wrong}"
        for _, path in checkpoints.numbered(run / CHECKPOINTS)
        if (wrong := checkpoints.problem(path))
    ]
    problems += [
        f"{path} was left" for pattern in ("*.part", "*.tmp") for path in run.rglob(pattern)
    ]
    if not (run / "model" / "model.safetensors").is_file():
        problems.append("no model was saved")
    elif same >= STEPS and (wrong := weights_differ(run, straight.directory)):
        problems.append(wrong)
    return problems


def check_output(fault: Fault, output: str) -> list[str]:
    """What is wrong with a broken run's output."""
    problems = []
    if fault.says and not re.search(fault.says, output):
        problems.append(f"its output does not say {fault.says!r}")
    last = output.rpartition(_CAUSE)[2] if _CAUSE in output else ""
    if fault.cause and not re.search(fault.cause, last):
        problems.append(f"torchrun's last lines do not say {fault.cause!r}")
    return problems


def check_dump(run: Path, straight: Straight) -> list[str]:
    """What is wrong with the batches that were refused: each of the step's responses has to be
    there.
    """
    rows = [
        row for path in sorted(run.glob("diverged-step-*/rollouts.jsonl")) for row in lines(path)
    ]
    expected = sum(row["step"] == 1 for row in straight.samples)
    whole = [
        row
        for row in rows
        if row["token_ids"]
        and len(row["token_ids"]) == len(row["rollout_logprobs"])
        and "prompt" in row
    ]
    if len(whole) >= expected:
        return []
    return [f"of the batch that was refused {len(whole)} responses were saved, expected {expected}"]


def check_resumed(run: Path, output: str, reached: int) -> tuple[int, list[str]]:
    """The steps that a resumed run takes again, and what is wrong with what its output says of
    that. `reached`: the last step before the fault.
    """
    start = json.loads((run / MANIFEST_FILE).read_text(encoding="utf-8"))["starts"][-1]
    if not start["resume_from"]:
        if "the run starts from step 0" in output:
            return reached, []
        return reached, ["the resumed run does not say that it starts from step 0"]
    again = reached - int(start["resume_from"].rsplit("-", 1)[1])
    expected = f"continuing from {start['resume_from']}; {again} metric lines after it were dropped"
    if expected in output:
        return again, []
    return again, [f"the resumed run does not say {expected!r}"]
