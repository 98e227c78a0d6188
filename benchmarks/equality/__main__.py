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
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.equality.cases import CASES, Run, write_data
from benchmarks.equality.compare import Comparison, compare_run, print_table
from benchmarks.shared import environment, module

_PACKAGES = ("conf", "rlhf", "reward", "policy", "rollout", "eval")
# Not taken from the composed configuration: what the command line gives anyway, and the mappings
# that a command line can't replace as a whole.
_NOT_PINNED = ("run", "tracking", "stage.name", "reward.terms", "data.sources", "data.columns")


def environment_of(checkout: Path) -> dict[str, str]:
    """The environment of a run of `checkout`: one thread unless OMP_NUM_THREADS says otherwise."""
    return environment(checkout, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def check_imports(checkout: Path, folder: Path) -> None:
    """Raises SystemExit unless every package comes from `checkout`."""
    program = f"import {', '.join(_PACKAGES)}\nfor m in ({', '.join(_PACKAGES)}): print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment_of(checkout),
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
        items = [literal(item) for item in value]
        return f"[{','.join(items)}]"
    if isinstance(value, dict):
        items = [f"{key}: {literal(item)}" for key, item in value.items()]
        return f"{{{','.join(items)}}}"
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
        module("rlhf", *own, "--cfg", "job", "--resolve"),
        cwd=folder,
        env=environment_of(checkout),
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
    command = module("rlhf", *options)
    if run.ranks > 1:
        launcher = ["--standalone", "--nproc_per_node", str(run.ranks)]
        command = module("torch.distributed.run", *launcher, "-m", "rlhf", *options)
    log = folder / f"{run.stage}.log"
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment_of(checkout),
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"stage={run.stage} of {checkout} failed ({log}):\n{tail}")


@dataclass(frozen=True, slots=True)
class Side:
    """A checkout, and the folder that its runs of a case stand in."""

    checkout: Path
    folder: Path


def prepare(checkout: Path, folder: Path) -> Side:
    """The folder with its rows. Raises SystemExit where another checkout would be imported."""
    side = Side(checkout.resolve(), folder.resolve())
    side.folder.mkdir(parents=True, exist_ok=True)
    write_data(side.folder)
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
