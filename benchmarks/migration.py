"""How far ``stage=migrate`` comes with the files of a directory: read, migrated, composed, and with
--dry-run checked as a run would be, on a small model without weights and rows of the right kind.

    python -m benchmarks.migration PEERS/LLaMA-Factory/examples/train_lora [...] [--dry-run]
"""

import argparse
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.cli import config
from rlhf.cli.presets import choices
from rlhf.migrate import converting, reading, shell, writing
from rlhf.migrate.converting import Migration
from rlhf.migrate.tables import Fate, NotPossible
from rlhf.migrate.toolkits import TOOLKITS
from rlhf.types import UserError

ENDS = (*reading.MAPPINGS, ".sh", ".py")
_NO_CONFIG = ("deepspeed", "accelerate", "requirements", "fsdp", "ds_config", "megatron_config")


@dataclass(slots=True)
class Tally:
    """What became of a toolkit's trainings."""

    found: int = 0
    other_tasks: Counter[str] = field(default_factory=Counter)  # reason: how many
    failed: Counter[str] = field(default_factory=Counter)
    composed: int = 0
    unknown: Counter[str] = field(default_factory=Counter)  # keys
    passed: int = 0  # the dry run
    refused: Counter[str] = field(default_factory=Counter)  # by the dry run
    fates: Counter[Fate] = field(default_factory=Counter)


def trainings(path: Path) -> Iterator[tuple[Path, int | None]]:
    """The files below a directory that may hold trainings, with the number of each command."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for file in files:
        if file.suffix not in ENDS or any(word in str(file.parent.name) for word in _NO_CONFIG):
            continue
        if file.suffix in reading.MAPPINGS:
            yield file, None
            continue
        words = shell.commands(shell.script_text(file))
        programs = [reading.find_program(command) for command in words]
        count = sum(program is not None for program in programs)
        yield from ((file, number) for number in range(1, count + 1))


def count(paths: Sequence[Path], *, dry_run: bool) -> dict[str, Tally]:
    """A tally for each toolkit; files that are no toolkit's are left out."""
    tallies = {name: Tally() for name in TOOLKITS}
    with tempfile.TemporaryDirectory() as scratch:
        for path in paths:
            for file, number in trainings(path):
                _one(file, number, tallies, Path(scratch), dry_run=dry_run)
    return tallies


def _one(
    file: Path, number: int | None, tallies: dict[str, Tally], scratch: Path, *, dry_run: bool
) -> None:
    try:
        request = reading.read(file, number)
        toolkit = converting.toolkit_of(request, TOOLKITS, None)
    except UserError as error:
        print(f"{file}: {error}", file=sys.stderr)
        return
    tally = tallies[toolkit.name]
    tally.found += 1
    stage = "sft" if toolkit.name == "trl" and not request.command else None
    try:
        migration = converting.migrate(request, toolkit, file, stage=stage)
    except NotPossible as error:
        tally.other_tasks[str(error)] += 1
        return
    for line in migration.stopped_by[:1]:
        tally.other_tasks[line.answer.note] += 1
    if migration.stopped_by:
        return
    tally.fates.update(line.answer.fate for line in migration.lines if not line.is_default)
    tally.unknown.update(line.key for line in migration.with_fate(Fate.unknown))
    _compose(file, migration, tally, scratch, dry_run=dry_run)


def _compose(
    file: Path, migration: Migration, tally: Tally, scratch: Path, *, dry_run: bool
) -> None:
    name = writing.experiment_name(file, None, choices("experiment"))
    preset = scratch / "experiment" / f"{name}.yaml"
    preset.parent.mkdir(exist_ok=True)
    preset.write_text(writing.experiment(migration, str(file)), encoding="utf-8")
    overrides = writing.overrides(migration, name, scratch)
    try:
        config.compose(overrides)
    except UserError as error:
        tally.failed[f"{file.name}: {error}"] += 1
        return
    tally.composed += 1
    if dry_run:
        from benchmarks.migration_dry_run import refusal

        reason = refusal(overrides, scratch)
        if reason is None:
            tally.passed += 1
        else:
            tally.refused[f"{file.name}: {reason}"] += 1


def report(tallies: dict[str, Tally], *, dry_run: bool) -> str:
    """The tallies as a Markdown table, and what stands in the way."""
    titles = ["toolkit", "trainings", "other tasks", "composed", "not composed", "unknown keys"]
    titles += ["dry run passes"] if dry_run else []
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for name, tally in tallies.items():
        cells = [TOOLKITS[name].title, tally.found, tally.other_tasks.total(), tally.composed]
        cells += [tally.failed.total(), len(tally.unknown)]
        cells += [tally.passed] if dry_run else []
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for name, tally in tallies.items():
        fates = ", ".join(f"{tally.fates[fate]} {fate.value}" for fate in Fate)
        lines += ["", f"{TOOLKITS[name].title}: keys {fates}"]
        for title in ("other_tasks", "failed", "refused", "unknown"):
            found = getattr(tally, title).most_common()
            lines += [f"  {title}: {many} x {what}" for what, many in found]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="directories or files of peers")
    parser.add_argument("--dry-run", action="store_true", help="check them as a run would")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    print(report(count(options.paths, dry_run=options.dry_run), dry_run=options.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
