"""Whether two checkouts of this repository compute the same numbers: the same commands in both, on
one machine with one seed, and then every figure, sample and weight compared.

    python -m benchmarks.equality --before DIR --after DIR
    python -m benchmarks.equality --before DIR --after DIR --cases dpo data

    demo    SFT, reward model and ten PPO steps of experiment=reviews (stage=chain in single stages,
            because a chain can't be told how many steps each of its stages takes)
    zero2   PPO on two ranks under DeepSpeed ZeRO-2, a tiny model
    dpo     DPO of a tiny model
    data    stage=data data=clean with a report

Every option of a run is composed in the checkout BEFORE and given to both explicitly, so that a
default that changed in between changes nothing. `--skip KEY` leaves out an option that AFTER no
longer has, `--only-after KEY=VALUE` sets one that BEFORE doesn't have yet.

Times, memory and throughput are not compared. Exit code 1 on any difference.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NOT_COMPARED = re.compile(
    r"(^|.*/)(time|memory)/.*"  # phases of a step, resident memory
    r"|.*_s|.*_runtime|.*_per_second|.*tokens_per_s.*|.*rss.*"
)
_PACKAGES = ("conf", "rlhf", "reward", "policy", "rollout", "eval")
# Not taken from the composed configuration: what the command line gives anyway, and the mappings
# that a command line can't replace as a whole.
_NOT_PINNED = ("run", "tracking", "stage.name", "reward.terms", "data.sources", "data.columns")
_SHOWN = 5  # differences of a file that are printed
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")

_TINY = (
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=64",
    "model.tiny.layers=2",
    "model.tiny.heads=2",
    "model.tiny.max_positions=128",
)
_WORDS = ("red", "blue", "green", "round", "small", "loud", "warm", "late")


@dataclass(frozen=True, slots=True)
class Run:
    """One command of a case, and the files of its run directory that are compared."""

    stage: str
    overrides: tuple[str, ...]
    files: tuple[str, ...] = ("metrics.jsonl", "samples.jsonl")
    weights: bool = True  # compare the bytes of model/*.safetensors
    ranks: int = 1


@dataclass(slots=True)
class Comparison:
    """What one file of a case says on both sides."""

    case: str
    name: str
    rows: int = 0
    keys: int = 0  # compared, over all rows
    differences: list[str] = dataclasses.field(default_factory=list)


CASES: dict[str, tuple[Run, ...]] = {
    "demo": (
        Run(
            "sft",
            (
                "experiment=reviews",
                "stage.steps=60",
                "stage.eval_steps=30",
                "engine.micro_batch_size=32",
            ),
            files=("metrics.jsonl",),
        ),
        Run(
            "reward",
            (
                "experiment=reviews",
                "stage.steps=30",
                "stage.eval_steps=15",
                "engine.micro_batch_size=32",
            ),
            files=("metrics.jsonl",),
        ),
        Run("ppo", ("experiment=reviews", "stage.steps=10")),
    ),
    "zero2": (
        Run(
            "ppo",
            (
                *_TINY,
                "engine=zero2",
                "rollout=hf",
                "data.path=prompts.jsonl",
                "data.max_prompt_length=32",
                "rollout.max_response_length=12",
                "stage.steps=4",
                "stage.prompts_per_step=8",
                "stage.epochs=2",
                "stage.minibatches=2",
                "stage.critic_init=policy",
                "stage.learning_rate=1e-3",
                "stage.critic_learning_rate=1e-3",
                "+reward.terms.length.kind=length",
                "reward.terms.length.low=8",
                "reward.terms.length.high=12",
                "reward.terms.length.ramp=30",
                "reward.terms.length.unit=characters",
            ),
            ranks=2,
        ),
    ),
    "dpo": (
        Run(
            "dpo",
            (
                *_TINY,
                "data.path=pairs.jsonl",
                "stage.steps=12",
                "stage.batch_size=8",
                "stage.max_length=64",
                "stage.learning_rate=1e-3",
                "stage.eval_steps=6",
                "stage.log_steps=1",
                "engine.micro_batch_size=4",
            ),
            files=("metrics.jsonl",),
        ),
    ),
    "data": (
        Run(
            "data",
            ("data=clean", "data.path=pairs.jsonl", "data.report=true"),
            files=(
                "metrics.jsonl",
                "train.jsonl",
                "eval.jsonl",
                "rejected.jsonl",
                "report.json",
            ),
            weights=False,
        ),
    ),
}


# --- running


def write_rows(folder: Path) -> None:
    """prompts.jsonl and pairs.jsonl, with some repeated and some damaged rows."""
    prompts = [{"prompt": f"{word} {number}"} for number in range(8) for word in _WORDS]
    pairs: list[dict[str, str]] = []
    for number in range(16):
        for word in _WORDS:
            prompt = f"Which thing is {word}? ({number})"
            chosen = f"The {word} one is the {_WORDS[number % len(_WORDS)]} thing, number {number}."
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": f"No, {word * 2}"})
    pairs += pairs[:3]  # duplicates
    pairs.append({"prompt": "Who?", "chosen": "Write to a@example.org.", "rejected": "Nobody."})
    pairs.append({"prompt": "Broken\u00c3\u00a9?", "chosen": "yes  yes yes", "rejected": "no"})
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def environment(checkout: Path) -> dict[str, str]:
    """Variables under which `python -m rlhf` is that of `checkout`, whatever is installed."""
    given = {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} | given


def check_imports(checkout: Path, folder: Path) -> None:
    """Raises SystemExit unless every package comes from `checkout`."""
    program = f"import {', '.join(_PACKAGES)}\nfor m in ({', '.join(_PACKAGES)}): print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(checkout),
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        if not Path(line).resolve().is_relative_to(checkout):
            raise SystemExit(f"{line} was imported, expected a file of {checkout}")


def literal(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(literal(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return str(value)


def pinned(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every option of a composed configuration as an override."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in _NOT_PINNED:
            continue
        if isinstance(value, dict):
            yield from pinned(value, f"{key}.")
        else:
            yield f"{key}={literal(value)}"


def options_of(run: Run, checkout: Path, folder: Path, skipped: Sequence[str]) -> list[str]:
    """The overrides of a run: its own, then every option as `checkout` composes it."""
    own = [f"stage={run.stage}", *run.overrides]
    own += ["run.name=equality", "run.dir=runs", "run.seed=0", "run.overwrite=true"]
    own += ["tracking=none"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *own, "--cfg", "job", "--resolve"],
        cwd=folder,
        env=environment(checkout),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{checkout} can't compose stage={run.stage}:\n{done.stderr}")
    given = {override.lstrip("+").split("=")[0] for override in own}
    every = pinned(yaml.safe_load(done.stdout))
    left_out = given | set(skipped)
    return own + [option for option in every if option.split("=")[0] not in left_out]


def start(run: Run, options: Sequence[str], checkout: Path, folder: Path) -> None:
    """Run a stage of `checkout` in `folder`. Raises SystemExit where it fails."""
    launcher: list[str] = []
    if run.ranks > 1:
        launcher = [*_TORCHRUN, str(run.ranks)]
    log = folder / f"{run.stage}.log"
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "rlhf", *options],
            cwd=folder,
            env=environment(checkout),
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"stage={run.stage} of {checkout} failed ({log}):\n{tail}")


# --- comparing


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects and lists by their path."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in items:
        leaves |= flat(item, f"{prefix}.{key}" if prefix else key)
    return leaves


def compared(row: Any) -> dict[str, Any]:
    """The leaves of a row without those that no two runs share."""
    return {key: value for key, value in flat(row).items() if not NOT_COMPARED.fullmatch(key)}


def same(before: Any, after: Any) -> bool:
    """Equality in which NaN equals NaN."""
    if isinstance(before, float) and isinstance(after, float) and math.isnan(before):
        return math.isnan(after)
    return type(before) is type(after) and before == after


def rows_of(path: Path) -> list[Any]:
    """The rows of a .jsonl file, or the one object of a .json file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [json.loads(text)]
    return [json.loads(line) for line in text.splitlines() if line]


def compare_rows(case: str, name: str, before: Sequence[Any], after: Sequence[Any]) -> Comparison:
    """Every value of every row."""
    found = Comparison(case, name, rows=min(len(before), len(after)))
    if len(before) != len(after):
        found.differences.append(f"{len(before)} rows before, {len(after)} after")
    for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
        old_values, new_values = compared(old), compared(new)
        for key in sorted(old_values.keys() | new_values.keys()):
            if key not in old_values:
                found.differences.append(f"row {number}, {key}: only after ({new_values[key]!r})")
            elif key not in new_values:
                found.differences.append(f"row {number}, {key}: only before ({old_values[key]!r})")
            elif not same(old_values[key], new_values[key]):
                pair = f"{old_values[key]!r} before, {new_values[key]!r} after"
                found.differences.append(f"row {number}, {key}: {pair}")
            else:
                found.keys += 1
    return found


def compare_weights(case: str, stage: str, before: Path, after: Path) -> Comparison:
    """The bytes of every file of weights."""
    sums = []
    for folder in (before, after):
        files = sorted(folder.glob("model/*.safetensors"))
        sums.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    return compare_rows(case, f"{stage}/model", [sums[0]], [sums[1]])


def compare_run(case: str, run: Run, before: Path, after: Path) -> list[Comparison]:
    """One comparison for each file of a run, and one for its weights."""
    folders = [side / "runs" / "equality" / run.stage for side in (before, after)]
    results = []
    for name in run.files:
        sides = [rows_of(folder / name) for folder in folders]
        results.append(compare_rows(case, f"{run.stage}/{name}", *sides))
    if run.weights:
        results.append(compare_weights(case, run.stage, *folders))
    for result in results:
        if not result.keys and not result.differences:
            result.differences.append("nothing to compare")
    return results


def print_table(results: Sequence[Comparison]) -> None:
    """A line for each file, then the first differences of each."""
    print(f"{'case':8}{'file':24}{'rows':>8}{'keys':>10}{'differences':>14}")
    for result in results:
        counts = f"{result.rows:8}{result.keys:10}{len(result.differences):14}"
        print(f"{result.case:8}{result.name:24}{counts}")
    for result in results:
        for difference in result.differences[:_SHOWN]:
            print(f"{result.case} {result.name}: {difference}")


@dataclass(frozen=True, slots=True)
class Side:
    """A checkout, and the folder that its runs of a case stand in."""

    checkout: Path
    folder: Path


def prepare(checkout: Path, folder: Path) -> Side:
    """The folder with its rows. Raises SystemExit where another checkout would be imported."""
    side = Side(checkout.resolve(), folder.resolve())
    side.folder.mkdir(parents=True, exist_ok=True)
    write_rows(side.folder)
    check_imports(side.checkout, side.folder)
    return side


def compare_case(
    case: str, before: Side, after: Side, skipped: Sequence[str], only_after: Sequence[str]
) -> list[Comparison]:
    """Run a case in both checkouts, and compare."""
    results = []
    for run in CASES[case]:
        options = options_of(run, before.checkout, before.folder, skipped)
        for side, own in ((before, ()), (after, only_after)):
            print(f"{case}: stage={run.stage} of {side.checkout} ...", flush=True)
            start(run, [*options, *own], side.checkout, side.folder)
        results += compare_run(case, run, before.folder, after.folder)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where both checkouts computed the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, required=True, help="the other checkout")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--work", type=Path, default=Path("runs/equality"), help="for the runs")
    parser.add_argument("--skip", nargs="*", default=[], metavar="KEY")
    parser.add_argument("--only-after", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    results: list[Comparison] = []
    for case in given.cases:
        before = prepare(given.before, given.work / case / "before")
        after = prepare(given.after, given.work / case / "after")
        results += compare_case(case, before, after, given.skip, given.only_after)
    print_table(results)
    return int(any(result.differences for result in results))


if __name__ == "__main__":
    sys.exit(main())
