"""Whole online steps of this project and of TRL's GRPOTrainer on the same work, taking turns on one
machine: ``make bench``.

python -m benchmarks.speed                       cases a, b-lora and b-full, five measured steps
each (about 25 minutes on 2 cores) python -m benchmarks.speed --cases a --rounds 9 python -m
benchmarks.speed --growth              how our cost grows: response length x2, group x2, model x4

Case a: a 5M-parameter model trained for a minute on review sentences, 8 prompts x 8 short answers
of uneven length. Case b: SmolLM2-135M-Instruct, 4 chat prompts x 4 answers of up to 48 tokens, with
LoRA (rank 8, all linear layers) and with full weights. Time nothing beside it.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.shared import environment, module
from benchmarks.speed.cases import Case
from benchmarks.speed.protocol import Figures, Worker
from rlhf.cli import config
from rlhf.data.recipes import build as recipes
from rlhf.types import UserError

OURS, PEER = "benchmarks.speed.ours", "benchmarks.speed.trl_peer"
WARM_UP = 1  # steps of each program that are not counted
PAUSE_S = 0.5  # between turns: threads of the other program stop spinning
SMALL = [
    "model.tiny.vocab_size=8000",
    "model.tiny.hidden_size=256",
    "model.tiny.intermediate_size=704",
    "model.tiny.layers=4",
    "model.tiny.heads=4",
]
LARGE = [
    "model.tiny.vocab_size=8000",
    "model.tiny.hidden_size=512",
    "model.tiny.intermediate_size=1408",
    "model.tiny.layers=6",
    "model.tiny.heads=8",
]
TARGETS = {"a": 3.0, "b-lora": 2.0}  # whole step against TRL's


def train_small(folder: Path, name: str, shape: Sequence[str], steps: int = 120) -> str:
    """A tiny model that writes review sentences, so that answers end by themselves; trained once
    per folder.
    """
    model = folder / name / "sft" / "model"
    if not model.is_dir():
        shared = ["stage=sft", "experiment=reviews", f"run.dir={folder}", f"run.name={name}"]
        recipes.ensure(config.compose(shared))
        # a few rows: this model only has to end its sentences
        held_out = folder / name / "held_out.jsonl"
        lines = (
            (folder / name / "recipe" / "sft_eval.jsonl")
            .read_text(encoding="utf-8")
            .split("\n")[:32]
        )
        held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = module(
            "rlhf",
            *shared,
            "run.overwrite=true",
            "tracking=none",
            f"stage.steps={steps}",
            f"stage.eval_steps={steps}",
        )
        command += [f"data.eval_path={held_out}", *shape]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment()
        )
        if done.returncode != 0:
            raise UserError(f"training the model of case a failed:\n{done.stderr[-2000:]}")
    return str(model)


def review_prompts(folder: Path, name: str, count: int) -> list[str]:
    lines = (
        (folder / name / "recipe" / "prompts_eval.jsonl").read_text(encoding="utf-8").split("\n")
    )
    return [json.loads(line)["prompt"] for line in lines[:count]]


def case_a(folder: Path) -> Case:
    model = train_small(folder, "bench-5m", SMALL)
    return Case(
        name="a",
        model=model,
        prompts=review_prompts(folder, "bench-5m", 8),
        samples=8,
        max_response=48,
        max_prompt=32,
        lora=False,
        micro_batch=64,
    )


def case_b(folder: Path, *, lora: bool) -> Case:
    recipes.ensure(
        config.compose(
            ["stage=ppo", "experiment=smollm2", f"run.dir={folder}", "run.name=bench-135m"]
        )
    )
    recipe = folder / "bench-135m" / "recipe"
    rows = []
    for line in (recipe / "prompts.jsonl").read_text(encoding="utf-8").split("\n")[:4]:
        review = json.loads(line)["prompt"][-1]["content"]
        question = f"Continue this review of a film in your own words: {review}"
        rows.append([{"role": "user", "content": question}])
    return Case(
        name="b-lora" if lora else "b-full",
        model=str(recipe / "smollm2"),
        prompts=rows,
        samples=4,
        max_response=48,
        max_prompt=96,
        lora=lora,
        micro_batch=16,
    )


def take_turns(
    case: Case, rounds: int, folder: Path, *, peer: bool = True
) -> dict[str, list[Figures]]:
    """Measured steps of each program, one after the other in turn; both are loaded all the while
    and the idle one waits on a pipe.
    """
    path = folder / f"case-{case.name}.json"
    case.dump(path)
    workers = {"ours": Worker.start(OURS, path, folder / f"{case.name}-ours.log")}
    out: dict[str, list[Figures]] = {"ours": []}
    if peer:
        workers["trl"] = Worker.start(PEER, path, folder / f"{case.name}-trl.log")
        out["trl"] = []
    try:
        for number in range(WARM_UP + rounds):
            for name, worker in workers.items():
                time.sleep(PAUSE_S)
                figures = worker.step()
                if number >= WARM_UP:
                    out[name].append(figures)
                print(
                    f"  {case.name} {name:<5} {number - WARM_UP + 1:>2}  step "
                    f"{figures['step_s']:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        for worker in workers.values():
            worker.close()
    return out


def median(rows: Sequence[Figures], name: str, per: str | None = None) -> float:
    return statistics.median(row[name] / (row[per] if per else 1.0) for row in rows)


def report(case: Case, results: dict[str, list[Figures]]) -> list[str]:
    """The case's lines of the table, and its ratios."""
    ours, trl = results["ours"], results["trl"]
    lines = [
        f"case {case.name}: {len(case.prompts)} prompts x {case.samples} x {case.max_response} "
        f"tokens, {'LoRA' if case.lora else 'full'}"
    ]
    for label, rows in (("ours", ours), ("TRL", trl)):
        lines.append(
            f"  {label:<5} step {median(rows, 'step_s'):7.3f} s   generation "
            f"{median(rows, 'response_tokens', 'rollout_s'):7.1f} tokens/s   "
            f"update {median(rows, 'response_tokens', 'update_s'):7.1f} response tokens/s   "
            f"whole step {median(rows, 'response_tokens', 'step_s'):7.1f} tokens/s   peak memory "
            f"{max(r['peak_rss_mb'] for r in rows):6.0f} MiB"
        )
    pairs = [b["step_s"] / a["step_s"] for a, b in zip(ours, trl, strict=True)]
    target = f" (target {TARGETS[case.name]:g})" if case.name in TARGETS else ""
    speed = [
        a["response_tokens"] / a["step_s"] / (b["response_tokens"] / b["step_s"])
        for a, b in zip(ours, trl, strict=True)
    ]
    bare = statistics.median(row["bare_s"] / row["update_s"] for row in ours)
    sync = statistics.median(row["sync_s"] / row["step_s"] for row in ours)
    memory = max(r["peak_rss_mb"] for r in ours) / max(r["peak_rss_mb"] for r in trl)
    lines += [
        f"  whole step, TRL's time / ours: {statistics.median(pairs):.2f} [{min(pairs):.2f}, "
        f"{max(pairs):.2f}]{target}; "
        f"per token {statistics.median(speed):.2f}",
        f"  update against a bare forward and backward over the same real tokens: {bare:.2f} "
        "(target 0.9)",
        f"  sync's share of the step: {100 * sync:.1f} % (target below 5 on b); peak memory "
        f"against TRL's: {memory:.2f} (target 1)",
        f"  largest gap between sampler and trainer: {max(row['gap'] for row in ours):.1e} nats",
    ]
    return lines


def growth(folder: Path, rounds: int) -> list[str]:
    """Our step's time with one quantity changed at a time. The models hardly trained, so that
    answers run to the limit and a limit is a length.
    """
    small, large = (
        train_small(folder, name, shape, steps=1)
        for name, shape in (("growth-5m", SMALL), ("growth-20m", LARGE))
    )
    base = replace(
        case_a(folder), name="growth", model=small, prompts=review_prompts(folder, "growth-5m", 8)
    )
    cases = {
        "base": base,
        "response length x2": replace(
            base, name="growth-length", max_response=2 * base.max_response
        ),
        "group x2": replace(base, name="growth-group", samples=2 * base.samples),
        "model x4": replace(base, name="growth-model", model=large),
    }
    lines, first = [], None
    for label, case in cases.items():
        rows = take_turns(case, rounds, folder, peer=False)["ours"]
        seconds, tokens = median(rows, "step_s"), median(rows, "response_tokens")
        first = first or seconds
        lines.append(
            f"  {label:<18} step {seconds:6.3f} s ({seconds / first:4.2f} x)   {tokens:6.0f} "
            "response tokens   "
            f"generation {median(rows, 'rollout_s'):6.3f} s   update "
            f"{median(rows, 'update_s'):6.3f} s   sync {median(rows, 'sync_s'):6.3f} s"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cases", nargs="+", default=["a", "b-lora", "b-full"], choices=["a", "b-lora", "b-full"]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each program")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/bench"), help="where models and logs go"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="our growth with length, group and model instead of the comparison",
    )
    options = parser.parse_args(arguments)
    options.runs.mkdir(parents=True, exist_ok=True)
    print(f"{datetime.date.today()}, {platform.platform()}, {_processor()}", flush=True)
    if options.growth:
        print("\n".join(growth(options.runs, options.rounds)))
        return 0
    for name in options.cases:
        case = case_a(options.runs) if name == "a" else case_b(options.runs, lora=name == "b-lora")
        results = take_turns(case, options.rounds, options.runs)
        (options.runs / f"{name}-results.json").write_text(
            json.dumps(results, indent=1) + "\n", encoding="utf-8"
        )
        print("\n".join(report(case, results)), flush=True)
    return 0


def _processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else "unknown processor"


if __name__ == "__main__":
    sys.exit(main())
