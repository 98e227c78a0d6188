"""Online stages on one CUDA device, in at most ten minutes: `benchmarks/gpu.sh`.

PPO and GRPO of models of 135M to 1.5B parameters, built from a configuration with random weights,
with vLLM in the process, with a server, and one step ahead. Each trial is a run of its own; one
that fails, or for which no time is left, is reported, and the others go on. Ends with a JSON file
and a table: tokens a second, the share of the device's peak (MFU), the gap between sampler and
trainer, and memory beside what the planner says. Exit code 1 where a trial failed or was not tried.

With TINY=1 in the environment the same trials run with a tiny model, on the CPU where there is no
device.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import models, trials
from benchmarks.gpu.device import MemoryWatch
from benchmarks.gpu.trials import Outcome, Trial
from benchmarks.shared import environment, module, write_rows
from benchmarks.speed.results import number, table
from rlhf.run.tracking.files import METRICS_FILE, read_jsonl

LEAST_S = 45.0  # left of the time for a trial to be tried
_TAIL = 600  # characters of a failed trial's output
HEAD = (
    "trial",
    "step, s",
    "generation, tokens/s",
    "update, tokens/s",
    "sync, s",
    "MFU (sheet, matmul)",
    "largest gap",
    "GiB used",
    "planned",
)


class Runner:
    """Runs the trials within a limit of time."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.deadline = folder, time.monotonic() + limit_s
        self.device: dict[str, Any] = {}
        self.built: dict[str, str] = {}  # size -> problem, or nothing

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def call(self, command: Sequence[str], log: Path, watch: MemoryWatch | None = None) -> str:
        """Run to the end of the command or of the time. Returns what is wrong, or nothing."""
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        if watch is not None:
            watch.process = process.pid
        try:
            code = process.wait(max(1.0, self.left()))
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):  # nothing of it stays
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if code == 0:
            return ""
        ending = f"exit code {code}" if code is not None else "out of time"
        return f"{ending}: {log.read_text(encoding='utf-8', errors='replace')[-_TAIL:]}"

    def look_at_device(self) -> str:
        """Fill in `device`. Returns what is wrong, or nothing."""
        log = self.folder / "device.log"
        problem = self.call(module("benchmarks.gpu.device"), log)
        if not problem:
            self.device = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        return problem

    def build(self, size: str) -> str:
        """The model of a size, once. Returns what is wrong, or nothing."""
        if size not in self.built:
            command = module("benchmarks.gpu.models", str(self.folder / size), size)
            self.built[size] = self.call(command, self.folder / f"build-{size}.log")
        return self.built[size]

    def run(self, trial: Trial) -> Outcome:
        """One trial."""
        outcome = Outcome(trial)
        if self.left() < LEAST_S:
            outcome.problems.append("not tried: no time was left")
            return outcome
        began = time.monotonic()
        problem = self.build(trial.size)
        if problem:
            outcome.problems.append(f"its model could not be built: {problem}")
            return outcome
        work = trials.TINY if trial.size == "tiny" else trials.FULL
        texts = models.texts(4 * work["prompts"], work["words"])
        prompts = write_rows(
            self.folder / f"prompts-{trial.size}.jsonl", [{"prompt": text} for text in texts]
        )
        cuda = bool(self.device.get("cuda"))
        runs, notes = self.folder / "runs", self.folder / f"{trial.name}.notes.json"
        options = trials.options(trial, self.folder / trial.size, prompts, runs, cuda=cuda)
        watch = MemoryWatch(cuda=cuda)
        watch.start()
        command = module("benchmarks.gpu.child", str(notes), *options)
        problem = self.call(command, self.folder / f"{trial.name}.log", watch)
        used = watch.stop()
        outcome.seconds = time.monotonic() - began
        if problem:
            outcome.problems.append(problem)
        try:
            rows = read_jsonl(runs / trial.name / trial.stage / METRICS_FILE)
            told = json.loads(notes.read_text(encoding="utf-8"))
            tokens = self.prompt_tokens(trial.size, texts)
            outcome.figures = trials.figures_of(rows, told, trial, tokens, self.peaks())
        except (OSError, ValueError, KeyError) as error:
            outcome.problems.append(f"no figures: {type(error).__name__}: {error}")
            return outcome
        outcome.figures["used_gib"] = used
        wrong = trials.gap_problem(outcome.figures)
        if wrong:
            outcome.problems.append(wrong)
        return outcome

    def peaks(self) -> dict[str, float | None]:
        """FLOP/s of the device by source."""
        out: dict[str, float | None] = {}
        for source in ("sheet", "matmul"):
            rate = self.device.get(f"{source}_tflops")
            out[source] = None if rate is None else 1e12 * float(rate)
        return out

    def prompt_tokens(self, size: str, texts: Sequence[str]) -> float:
        """Tokens of a prompt, on average."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / size)
        return sum(len(tokenizer(text)["input_ids"]) for text in texts) / len(texts)


def row(outcome: Outcome) -> list[str]:
    """A trial's row of the table."""
    figures = outcome.figures
    if not figures:
        return [outcome.trial.name, "failed", *[""] * (len(HEAD) - 2)]

    def shown(name: str) -> str:
        value = figures.get(name)
        return "-" if value is None else number(value)

    shares = [figures.get(f"mfu_{source}") for source in ("sheet", "matmul")]
    mfu = ", ".join("-" if share is None else f"{100 * share:.1f} %" for share in shares)
    gap = figures.get("gap")
    return [
        outcome.trial.name + (" (failed)" if outcome.problems else ""),
        shown("step_s"),
        shown("generation_tokens_per_s"),
        shown("update_tokens_per_s"),
        shown("sync_s"),
        mfu,
        "-" if gap is None else f"{gap:.1e}",
        shown("used_gib"),
        shown("plan_gib"),
    ]


def as_json(device: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "device": dict(device),
        "trials": [
            {
                "name": one.trial.name,
                "seconds": round(one.seconds, 1),
                "problems": one.problems,
                "figures": one.figures,
            }
            for one in outcomes
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="trials whose names")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for all of it (600)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="where all of it goes")
    given = parser.parse_args(arguments)
    small = os.environ.get("TINY", "") not in ("", "0")
    given.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(given.out.resolve(), given.limit)
    problem = runner.look_at_device()
    print(f"device: {problem or json.dumps(runner.device)}", flush=True)
    if not small and not runner.device.get("cuda"):
        print("torch sees no CUDA device. TINY=1 runs tiny models on the CPU.", file=sys.stderr)
        return 1
    outcomes = []
    for trial in trials.chosen(given.only, small=small):
        outcomes.append(runner.run(trial))
        state = "; ".join(outcomes[-1].problems) or "done"
        print(f"{trial.name}: {outcomes[-1].seconds:.0f} s, {state}", flush=True)
    results = given.out / "results.json"
    held = as_json(runner.device, outcomes)
    results.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(held))
    print("\n".join(table(HEAD, map(row, outcomes))))
    failed = [one.trial.name for one in outcomes if one.problems]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} trials passed; {results}")
    return 1 if failed or problem or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
