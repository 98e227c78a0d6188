"""``stage=migrate``: another toolkit's configuration as an experiment of ours, its command, and the
table of what became of every key (rlhf/migrate/). Nothing of it runs.
"""

import shlex
from pathlib import Path
from typing import Protocol

from conf.data import MigrateConfig
from conf.run import RunConfig
from rlhf.cli import config
from rlhf.cli.presets import choices
from rlhf.migrate import converting, reading, writing
from rlhf.migrate.converting import Migration
from rlhf.migrate.tables import Fate, NotPossible
from rlhf.migrate.toolkits import TOOLKITS
from rlhf.process import distributed
from rlhf.types import UserError


class HasOptions(Protocol):
    """All that this stage takes of a configuration: it trains nothing."""

    migrate: MigrateConfig
    run: RunConfig


class HasConfig(Protocol):
    """All that this stage takes of a run: it needs no run directory."""

    cfg: HasOptions


def check(cfg: HasOptions) -> list[str]:
    """There is a file to read. Raises UserError."""
    distributed.require_one_process("stage=migrate", "Run it without torchrun.")
    path_of(cfg.migrate)
    return []


def run(ctx: HasConfig) -> None:
    """Write the experiment and the table, print the command. Raises UserError for a file that can't
    be read or is for another task, for an experiment that doesn't compose, and, once all is
    written, where keys are unknown.
    """
    options = ctx.cfg.migrate
    path = path_of(options)
    folder = Path(options.out or Path(ctx.cfg.run.dir) / "migrated").expanduser()
    migration = migrated(options, path)
    name = writing.experiment_name(path, options.name, choices("experiment"))
    overrides = writing.overrides(migration, name, folder)
    quoted = [config.quoting(text) or shlex.quote(text) for text in overrides]
    command = f"python -m rlhf {' '.join(quoted)}"
    presets = folder / "experiment"
    presets.mkdir(parents=True, exist_ok=True)
    preset, table = presets / f"{name}.yaml", folder / f"{name}.md"
    preset.write_text(writing.experiment(migration, str(path)), encoding="utf-8")
    table.write_text(writing.table(migration, str(path), command), encoding="utf-8")
    print(writing.summary(migration))
    print(f"experiment: {preset}\nevery key:  {table}\n\n{command}")
    config.compose(overrides)
    unknown = [line.key for line in migration.with_fate(Fate.unknown)]
    if unknown:
        raise UserError(
            f"{path}: keys that are unknown here and were left out: {', '.join(unknown)}. The "
            "experiment has the others."
        )


def path_of(options: MigrateConfig) -> Path:
    """The file that is to be read. Raises UserError."""
    if options.path is None:
        raise UserError("migrate.path is not set: name the file of another toolkit.")
    path = Path(options.path).expanduser()
    if not path.is_file():
        raise UserError(f"migrate.path={options.path}: no such file.")
    return path


def migrated(options: MigrateConfig, path: Path) -> Migration:
    """What becomes of the file's keys. Raises UserError, also for a task that no stage has."""
    request = reading.read(path, options.number)
    toolkit = converting.toolkit_of(request, TOOLKITS, options.toolkit)
    if options.stage is not None and options.stage not in choices("stage"):
        raise UserError(f"migrate.stage={options.stage}: no such stage.")
    try:
        migration = converting.migrate(
            request,
            toolkit,
            path,
            stage=options.stage,
            ranks=options.ranks,
            rows=options.rows,
        )
    except NotPossible as error:
        raise UserError(f"{path} ({toolkit.title}) can't be migrated: {error}.") from error
    stopping = [f"{line.key}: {line.answer.note}" for line in migration.stopped_by]
    if stopping:
        raise UserError(f"{path} ({toolkit.title}) can't be migrated: {'; '.join(stopping)}.")
    return migration
