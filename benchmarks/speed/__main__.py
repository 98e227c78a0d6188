"""How fast whole steps are: `make bench`.

python -m benchmarks.speed                          every part (over an hour on 2 cores)
python -m benchmarks.speed --quick                  small models, few turns (minutes)
python -m benchmarks.speed --only a sft --rounds 9  the parts whose names begin so
python -m benchmarks.speed --page                   no measuring: the tables of docs/project/
                                                    performance.md from the figures in build/bench
python -m benchmarks.speed --growth                 response length x2, group x2, model x4

Parts:
  a               5M parameters, 8 prompts x 8 short answers of uneven length: in one process, with
                  a server taking turns, with a server one step ahead, one step ahead in one
                  process, and TRL's GRPOTrainer
  b-lora-*        SmolLM2-135M, 4 prompts x 4 answers x 48 tokens, LoRA of rank 8: two of them
  b-full-*        the same with full weights
  sft reward dpo  our stages beside bare TRL on the same rows, 5M parameters
  ranks servers   case a with one and two of them

Programs take turns, pinned to two cores: in one process, as TRL, both cores; a trainer with a
server one each. Time nothing beside it. The figures of every turn go to build/bench.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.speed import offline, online, scaling
from benchmarks.speed.models import case_a, case_of
from benchmarks.speed.results import Result, machine, read_all, write_page
from benchmarks.speed.turns import Contestant, cores_here, take_turns
from rlhf.types import UserError

PARTS = (*online.PARTS, *offline.STAGES, *scaling.PARTS)
QUICK = ("a", *offline.STAGES)
QUICK_ROUNDS = 2
SCALING_STEPS = 8


def chosen_parts(words: Sequence[str], *, quick: bool) -> list[str]:
    """The parts whose names begin with a word; without words all, or the quick ones."""
    if not words:
        return list(QUICK if quick else PARTS)
    unknown = [word for word in words if not any(part.startswith(word) for part in PARTS)]
    if unknown:
        parser().error(f"--only {unknown[0]}: expected the beginning of one of {', '.join(PARTS)}")
    return [part for part in PARTS if part.startswith(tuple(words))]


def measure(part: str, rounds: int, runs: Path, ways: Sequence[str], command: str) -> Result:
    """One part."""
    if part in online.PARTS:
        case = case_of(online.PARTS[part][0], runs)
        turns = online.measure(part, case, rounds, runs, ways)
        return Result.now(part, command, turns, online.facts_of(case))
    if part in scaling.PARTS:
        turns = scaling.measure(part, case_a(runs), max(1, rounds // 4), SCALING_STEPS, runs)
        return Result.now(part, command, turns, {})
    return Result.now(part, command, measure_offline(part, rounds, runs), {})


def measure_offline(stage: str, rounds: int, runs: Path) -> dict[str, list[dict[str, float]]]:
    """The turns of a stage on TRL's trainers, ours and TRL's."""
    (core,) = cores_here(1)
    contestants = {}
    for side, case in offline.cases_of(stage, runs).items():
        path = runs / f"case-{stage}-{side}.json"
        case.dump(path)
        contestants[side] = Contestant(offline.WORKER, path, core)
    turns = take_turns(stage, contestants, rounds, runs)
    offline.check_same(stage, turns["ours"], turns["trl"])
    return turns


def tables(results: Mapping[str, Result]) -> list[str]:
    """Everything that was measured, as markdown."""
    lines = []
    parts = (
        ("Online steps", online.online_tables(results)),
        ("Beside bare TRL", offline.offline_table(dict(results))),
        ("One and two", scaling.scaling_table(results)),
    )
    for title, block in parts:
        if block:
            lines += ["", f"### {title}", "", *block]
    return lines


def origins(results: Mapping[str, Result]) -> list[str]:
    """When, where and by which commands the figures were measured."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for part, result in results.items():
        found.setdefault((result.date, result.machine, result.command), []).append(part)
    lines = []
    for (date, where, command), parts in found.items():
        lines += [f"- {', '.join(parts)}: {date}, {where},", f"  `{command}`"]
    return lines


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts that begin so")
    out.add_argument("--ways", nargs="+", default=[], choices=online.NAMES, help="online: these")
    out.add_argument("--rounds", type=int, help="measured turns of each program (5; quick: 2)")
    out.add_argument("--quick", action="store_true", help="small models and few turns")
    out.add_argument("--page", action="store_true", help="write the page from figures that exist")
    out.add_argument("--growth", action="store_true", help="our growth with length, group, model")
    out.add_argument("--runs", type=Path, default=Path("runs/bench"), help="for models and logs")
    out.add_argument("--results", type=Path, default=Path("build/bench"), help="for the figures")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    if options.page:
        results = read_all(options.results)
        write_page([*tables(results), "", *origins(results), ""])
        return 0
    options.runs.mkdir(parents=True, exist_ok=True)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else 5)
    print(machine(), flush=True)
    if options.growth:
        print("\n".join(online.growth(options.runs, rounds)))
        return 0
    command = " ".join(["python -m benchmarks.speed", *given])
    failed = []
    for part in chosen_parts(options.only, quick=options.quick):
        try:
            result = measure(part, rounds, options.runs, options.ways, command)
        except (RuntimeError, UserError) as error:
            failed.append(part)
            print(f"{part} failed: {error}", file=sys.stderr, flush=True)
            continue
        result.write(options.results)
        print("\n".join(tables({part: result})), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
