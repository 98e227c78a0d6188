"""Tasks of stage=eval beside lm-eval's vLLM backend: rows a second on the same local files and the
same model, and whether the figures agree.

python -m benchmarks.evaluation --model DIR --lm-eval PYTHON
python -m benchmarks.evaluation --model DIR --lm-eval PYTHON --rows 24 --rounds 1 --cases letters

PYTHON is the interpreter of an environment with lm-eval 0.4.13 and vLLM (docs/testing.md says how
one is made). Both answer the same rows: ours are written for lm-eval by stage.lm_eval. Each program
is timed on few rows and on many, in turns; the rows between them divided by the time between them
are rows a second without the start of the engine. The median over the rounds counts.

Three tasks of made-up text:
    letters   3 examples and 4 choices, whose letters are scored (MMLU's form)
    endings   a text and 4 endings, which are scored (HellaSwag's form)
    answers   up to 32 tokens are written (exact match)
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.encoding import sentence
from benchmarks.proofs.common import Check, report
from benchmarks.shared import environment, module, write_rows

FEW = 16  # rows of the short run
ENGINE = "dtype=float32,max_model_len=1024,enforce_eager=True"


@dataclass(frozen=True, slots=True)
class Case:
    """A task: its options, and lm-eval's name of its metric."""

    name: str
    options: tuple[str, ...]
    metric: str
    theirs: str


CASES = (
    Case(
        "letters",
        (
            "kind=loglikelihood",
            "metrics=[accuracy]",
            "letters_only=true",
            "fewshot=3",
            r"prompt='{question}\n{options}\nAnswer:'",
        ),
        "accuracy",
        "acc,none",
    ),
    Case(
        "endings",
        ("kind=loglikelihood", "metrics=[accuracy]"),
        "accuracy",
        "acc,none",
    ),
    Case(
        "answers",
        ("metrics=[exact]", "max_tokens=32", "answer=reply", r"stops=['\n\n']"),
        "exact",
        "exact_match,answer",
    ),
)


def made_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that fit every case."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [sentence(rng, 6) for _ in range(4)]
        row = {"question": sentence(rng, 16), "choices": choices, "gold": rng.randrange(4)}
        rows.append(row | {"reply": sentence(rng, 2)})
    return rows


def run(command: Sequence[str], log: Path, extra: dict[str, str] | None = None) -> float:
    """Seconds of a command. Raises RuntimeError with the end of its log where it fails."""
    began = time.monotonic()
    with log.open("wb") as out:
        done = subprocess.run(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(extra=extra),
            check=False,
        )
    if done.returncode != 0:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{' '.join(command)}:\n{text[-3000:]}")
    return time.monotonic() - began


def ours(case: Case, model: str, folder: Path, rows: int) -> float:
    """Seconds of stage=eval on the first rows."""
    key = f"tasks.{case.name}"
    options = [f"{key}.path={folder / 'rows.jsonl'}", f"{key}.rows={rows}"]
    options += [f"{key}.{option}" for option in case.options]
    command = module(
        "rlhf",
        "stage=eval",
        "rollout=vllm",
        "tracking=none",
        f"run.dir={folder}",
        f"run.name={case.name}-{rows}",
        "run.overwrite=true",
        "stage.lm_eval=true",
        "stage.bootstrap=100",
        f"stage.policies.model={model}",
        *options,
    )
    return run(command, folder / f"ours-{case.name}-{rows}.log")


def theirs(case: Case, python: str, model: str, engine: str, folder: Path, rows: int) -> float:
    """Seconds of lm-eval on the rows that `ours` wrote for it."""
    command = [
        *(python, "-m", "lm_eval", "--model", "vllm"),
        *("--model_args", f"pretrained={model},{engine}"),
        *("--include_path", str(folder / f"{case.name}-{rows}" / "eval" / "lm_eval")),
        *("--tasks", case.name, "--batch_size", "auto"),
        *("--output_path", str(folder / f"theirs-{case.name}-{rows}")),
    ]
    extra = {"HF_DATASETS_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    return run(command, folder / f"theirs-{case.name}-{rows}.log", extra)


def figures(case: Case, folder: Path, rows: int) -> tuple[float, float]:
    """Our figure and lm-eval's."""
    summary = folder / f"{case.name}-{rows}" / "eval" / "summary.json"
    metrics = json.loads(summary.read_text(encoding="utf-8"))["metrics"]
    newest = max((folder / f"theirs-{case.name}-{rows}").rglob("results_*.json"))
    results = json.loads(newest.read_text(encoding="utf-8"))["results"]
    mine: float = metrics[f"eval/{case.name}/model/{case.metric}"]
    return mine, float(results[case.name][case.theirs])


def measure(case: Case, options: argparse.Namespace, folder: Path) -> list[Check]:
    """Rows a second of both, and their figures."""
    speeds: dict[str, list[float]] = {"ours": [], "lm-eval": []}
    for number in range(options.rounds):
        seconds: dict[str, list[float]] = {"ours": [], "lm-eval": []}
        for rows in (FEW, options.rows):
            seconds["ours"].append(ours(case, options.model, folder, rows))
            seconds["lm-eval"].append(
                theirs(case, options.lm_eval, options.model, options.engine, folder, rows)
            )
        for name, (few, many) in seconds.items():
            speed = (options.rows - FEW) / (many - few)
            speeds[name].append(speed)
            print(
                f"{case.name}, round {number + 1}, {name}: {FEW} rows {few:.1f} s, "
                f"{options.rows} rows {many:.1f} s, {speed:.2f} rows/s",
                flush=True,
            )
    mine, other = (statistics.median(speeds[name]) for name in ("ours", "lm-eval"))
    own, their = figures(case, folder, options.rows)
    return [
        Check(f"{case.name}: rows/s, ours", mine, 0.0, strict=True),
        Check(f"{case.name}: rows/s, lm-eval", other, 0.0, strict=True),
        Check(f"{case.name}: ours / lm-eval", mine / other, 1.0),
        Check(f"{case.name}: {case.metric} less lm-eval's ({their:.4f})", own - their, 0.0, 0.0),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--lm-eval", required=True, help="an interpreter that has lm-eval")
    parser.add_argument("--engine", default=ENGINE, help="lm-eval's further model_args")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--folder", type=Path, help="keep rows, runs and logs here")
    options = parser.parse_args(argv)
    if options.rows <= FEW:
        parser.error(f"--rows: expected more than {FEW}")
    with tempfile.TemporaryDirectory(prefix="bench-evaluation-") as made:
        folder = (options.folder or Path(made)).resolve()
        write_rows(folder / "rows.jsonl", made_rows(options.rows))
        checks = []
        for case in CASES:
            if case.name in options.cases:
                checks += measure(case, options, folder)
    title = f"stage=eval beside lm-eval, {options.rows} rows, {options.rounds} rounds"
    return 0 if report(title, checks) else 1


if __name__ == "__main__":
    sys.exit(main())
