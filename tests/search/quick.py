"""A search of quick trials (tests/search/stand_in.py), in this process or in one of its own.

    python -m tests.search.quick FOLDER TRIALS [KILL_AT]

KILL_AT: the write to the journal after which the process kills itself, as kill -9 does.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.methods import Direction, PruneConfig, Sampler
from rlhf.search.commands import StageRun
from rlhf.search.loop import Goal, Rules, Search
from rlhf.search.running import Slot
from rlhf.search.space import Kind, Parameter
from rlhf.search.study import JOURNAL, Study
from rlhf.search.trials import Plan, Trial

SCRIPT = Path(__file__).with_name("stand_in.py")
SPACE = (
    Parameter(key="stage.x", kind=Kind.float, low=0.0, high=1.0),
    Parameter(key="stage.n", kind=Kind.choice, choices=(1, 2)),
)


class QuickCommands:
    """Trials that are stand-ins. `commands`: what a trial runs in its place, by number."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int = 3,
        pause_s: float = 0.0,
        commands: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.folder, self.steps, self.pause_s = folder, steps, pause_s
        self.commands = commands or {}

    def stages(self, number: int, setting: Mapping[str, Any]) -> list[StageRun]:
        directory = self.folder / "trials" / f"{number:04d}" / "stand_in"
        words = [str(directory), str(setting["stage.x"]), str(self.steps), str(self.pause_s)]
        command = [sys.executable, "-S", "-E", str(SCRIPT), *words]
        given = self.commands.get(number, command)
        return [StageRun(stage="stand_in", directory=directory, command=tuple(given))]


def plan(
    *,
    seed: int = 0,
    sampler: Sampler = Sampler.tpe,
    startup: int = 2,
    prune: PruneConfig | None = None,
    space: Sequence[Parameter] = SPACE,
) -> Plan:
    return Plan(
        parameters=space,
        directions={"value": Direction.min},
        seed=seed,
        sampler=sampler,
        startup=startup,
        prune=prune or PruneConfig(),
    )


def search(
    folder: Path,
    trials: int,
    commands: QuickCommands,
    *,
    workers: int = 1,
    failures: int | None = None,
    compared: str | None = None,
    **plan_options: Any,
) -> Search:
    """A search in `folder`, which goes on where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(folder / JOURNAL, plan(**plan_options))
    rules = Rules(
        goals=[Goal(name="value", metric="value", stage="stand_in")],
        trials=trials,
        slots=[Slot(number=number) for number in range(workers)],
        compared=compared,
        failures=failures,
        grace_s=5.0,
    )
    return Search(study, commands, rules, lambda: None)


def plain(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """What must be the same in two searches."""
    return [
        (trial.number, trial.state, dict(trial.setting), trial.values, trial.last, trial.steps)
        for trial in trials
    ]


def kill_at(study: Study, write: int) -> None:
    """Let the process kill itself after the journal's `write`-th write from here on."""
    backend = study._study._storage._backend
    append, count = backend.append_logs, [0]

    def counted(logs: list[dict[str, Any]]) -> None:
        append(logs)
        count[0] += 1
        if count[0] == write:
            os.kill(os.getpid(), signal.SIGKILL)

    backend.append_logs = counted


def main(folder: Path, trials: int, write: int | None) -> None:
    started = search(folder, trials, QuickCommands(folder, pause_s=0.05))
    if write is not None:
        kill_at(started.study, write)
    started.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
