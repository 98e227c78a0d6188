"""``stage=search``: the best values of another stage's options, found by trials of it
(rlhf/search/), and written as an experiment.
"""

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from conf.methods import Pruner, Sampler, SearchStage
from conf.run import RunConfig, TrackingConfig
from conf.stages import FAMILIES
from rlhf.cli import config, presets
from rlhf.migrate import writing
from rlhf.process import distributed
from rlhf.process.files import exclusive
from rlhf.process.libraries import check_installed
from rlhf.process.supervision import Watchdog
from rlhf.run.tracking.tracker import Tracker
from rlhf.search import experiments, results
from rlhf.search.commands import TRIALS, Commands
from rlhf.search.loop import Goal, Rules, Search
from rlhf.search.running import is_held
from rlhf.search.space import Parameter, parameters
from rlhf.search.study import JOURNAL, Study
from rlhf.search.trials import Plan, State, Trial
from rlhf.search.workers import slots
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.search")
_LOCK = "search.lock"
# Stages whose summary.json has metrics that say how good a setting is.
SEARCHED = ("data", *FAMILIES["train"], *FAMILIES["online"], *FAMILIES["judge"])
# Overrides that change nothing of what a trial computes.
_HOW = ("run.keep_checkpoints", "run.phase_timeout_s", "tracking", "launch", "hydra")


class HasOptions(Protocol):
    """All that this stage takes of a configuration; the rest goes to the trials."""

    stage: Any
    run: RunConfig
    tracking: TrackingConfig


class SearchRun(Protocol):
    """All that this stage takes of a run."""

    @property
    def cfg(self) -> HasOptions: ...
    @property
    def argv(self) -> Sequence[str]: ...
    @property
    def dir(self) -> Path: ...
    @property
    def tracker(self) -> Tracker: ...
    @property
    def watchdog(self) -> Watchdog: ...
    @property
    def closing(self) -> Callable[[], AbstractContextManager[Any]]: ...
    @property
    def finish(self) -> Callable[..., None]: ...


def check(cfg: HasOptions) -> list[str]:
    """The space fits the searched stage, there are objectives, and nobody else is at this search.
    Raises UserError.
    """
    stage = cfg.stage
    assert isinstance(stage, SearchStage)
    remedy = "Run it without torchrun; launch=... starts the ranks of its trials."
    distributed.require_one_process("stage=search", remedy)
    check_installed("optuna", "search")
    _check_stage("stage.of", stage.of)
    if stage.then is not None:
        _check_stage("stage.then", stage.then)
    space = parameters(stage.space, stage.of)
    if stage.sampler is Sampler.grid:
        _check_grid(space)
    if not stage.objectives:
        raise UserError(
            "stage.objectives is empty: name what is made best, such as "
            "stage.objectives.eval_loss.direction=min."
        )
    slots(stage)
    folder = Path(cfg.run.dir).expanduser() / cfg.run.name / stage.name
    if is_held(folder / _LOCK):
        raise UserError(_in_use(folder))
    return []


def _check_stage(key: str, name: str) -> None:
    known = presets.choices("stage")
    if name not in known:
        close = presets.nearest(name, known)
        raise UserError(f"{key}={name}: no such stage. Nearest: {close}.")
    if presets.stage_schema(name) not in SEARCHED:
        able = [other for other in known if presets.stage_schema(other) in SEARCHED]
        raise UserError(
            f"{key}={name}: its runs have no metrics to search by. Expected one of "
            f"{', '.join(able)}."
        )


def _check_grid(space: Sequence[Parameter]) -> None:
    for parameter in space:
        parameter.grid()
        if parameter.when:
            raise UserError(
                f"stage.space: {parameter.key} has a condition, which stage.sampler=grid can't "
                "hold. Take tpe or random."
            )


def _in_use(folder: Path) -> str:
    return f"{folder}: another process searches there. Wait for it, or choose another run.name."


def run(ctx: SearchRun) -> None:
    """Run trials until there are enough; write what came of them. Raises UserError where no trial
    is complete, SystemExit after a signal.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    space = parameters(stage.space, stage.of)
    group = cfg.tracking.group or f"{cfg.run.name}-search"

    def refuse() -> None:
        raise UserError(_in_use(ctx.dir))

    with ctx.closing(), exclusive(ctx.dir / _LOCK, refuse):
        ctx.watchdog.phase("search")
        commands = Commands(stage, cfg.run, ctx.dir, ctx.argv, group)
        commands.check(space)
        study = Study(ctx.dir / JOURNAL, plan_of(stage, cfg.run.seed, space, commands.own()))
        ctx.watchdog.rest()  # each trial watches itself
        teller = _Teller(study, ctx.dir, ctx.tracker, stage.keep)
        teller.tell()
        code = Search(study, commands, rules_of(stage, study), teller.tell).run()
        if code is not None:
            ended = len(teller.told)
            print(f"search: stopped after {ended} ended trials; run.resume=true goes on.")
            raise SystemExit(128 + code)
        ctx.watchdog.phase("finish")
        _finish(ctx, study, commands.own())


def plan_of(
    stage: SearchStage, seed: int, space: Sequence[Parameter], shared: Sequence[str]
) -> Plan:
    """What is searched, and how. `shared`: the overrides that all trials have."""
    metrics = {goal.name: [goal.stage, goal.metric] for goal in _goals(stage)}
    own = [text for text in shared if not text.lstrip("+").startswith(_HOW)]
    return Plan(
        parameters=space,
        directions={name: goal.direction for name, goal in stage.objectives.items()},
        seed=seed,
        sampler=stage.sampler,
        startup=stage.startup,
        prune=stage.prune,
        facts={
            "stages": [stage.of, stage.then],
            "overrides": own,
            "then_options": stage.then_options,
            "metrics": metrics,
        },
    )


def rules_of(stage: SearchStage, study: Study) -> Rules:
    """How the trials run."""
    size = study.size()
    goals = _goals(stage)
    compared = None
    if stage.prune.kind is not Pruner.none:
        compared = stage.prune.metric or goals[0].metric
    return Rules(
        goals=goals,
        trials=stage.trials if size is None else min(size, stage.trials),
        slots=slots(stage),
        compared=compared,
        failures=stage.failures,
        grace_s=stage.grace_s,
    )


def _goals(stage: SearchStage) -> list[Goal]:
    last = stage.then or stage.of
    return [
        Goal(name=name, metric=given.metric or name, stage=given.stage or last)
        for name, given in stage.objectives.items()
    ]


class _Teller:
    """Writes what is known after each trial: its line, its metrics, and fewer weights."""

    def __init__(self, study: Study, folder: Path, tracker: Tracker, keep: int | None) -> None:
        self.study, self.folder, self.tracker, self.keep = study, folder, tracker, keep
        self.told: set[int] = set()

    def tell(self) -> None:
        """Tell of the trials that have ended since the last call."""
        results.write_trials(self.study, self.folder)
        for trial in self.study.trials():
            if trial.state is not State.running and trial.number not in self.told:
                self.told.add(trial.number)
                self.tracker.log(len(self.told), self._figures(trial))
        if self.keep is not None:
            results.drop_weights(self.study, self.folder / TRIALS, self.keep)

    def _figures(self, trial: Trial) -> dict[str, float]:
        figures = {"trial/number": float(trial.number)}
        for state in (State.complete, State.pruned, State.failed):
            figures[f"trial/{state.value}"] = float(trial.state is state)
        names = self.study.plan.directions
        if trial.values:
            for name, value in zip(names, trial.values, strict=True):
                figures[f"trial/{name}"] = value
        if trial.steps is not None:
            figures["trial/steps"] = float(trial.steps)
        return figures


def _finish(ctx: SearchRun, study: Study, shared: Sequence[str]) -> None:
    """The best settings as experiments, the table, the plots, the summary."""
    stage, best = ctx.cfg.stage, study.best()
    commands = [
        _write_experiment(ctx, stage.of, trial, shared, is_only=len(study.plan.directions) == 1)
        for trial in best
    ]
    shares = results.importances(study)
    plots = results.write_report(study, ctx.dir, shares, commands)
    ctx.tracker.images(plots)
    trials = study.trials()
    if not best:
        last = next((trial.reason for trial in reversed(trials) if trial.reason), "")
        raise UserError(
            f"{ctx.dir}: none of {len(trials)} trials is complete, so there is no best setting. "
            f"The last one's end: {last}"
        )
    metrics: dict[str, float] = {
        f"trials/{state}": float(number) for state, number in results.counts(trials).items()
    }
    metrics |= {f"best/{name}": value for name, value in _best_values(study, best).items()}
    metrics["best/trial"] = float(best[0].number)
    metrics["steps"] = float(results.steps_done(trials))
    ctx.finish(
        steps=len(trials),
        metrics=metrics,
        model=None,
        figures=_panel(study, best, shares),
        files={"table": ctx.dir / results.TABLE_FILE, "trials": ctx.dir / results.TRIALS_FILE},
        next_command=commands[0],
    )


def _best_values(study: Study, best: Sequence[Trial]) -> dict[str, float]:
    """The best value of each objective on its own."""
    out = {}
    for place, (name, direction) in enumerate(study.plan.directions.items()):
        better = min if direction.value == "min" else max
        out[name] = better(trial.values[place] for trial in best)
    return out


def _panel(
    study: Study, best: Sequence[Trial], shares: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for trial in best[:3]:
        values = zip(study.plan.directions, trial.values, strict=True)
        shown = ", ".join(f"{name} {value:.6g}" for name, value in values)
        setting = ", ".join(f"{key}={value}" for key, value in trial.setting.items())
        figures[f"trial {trial.number}"] = f"{shown}: {setting}"
    for name, of_options in shares.items():
        shown = ", ".join(f"{key} {share:.2f}" for key, share in of_options.items())
        figures[f"importance for {name}"] = shown or "not known"
    return figures


def _write_experiment(
    ctx: SearchRun, stage: str, trial: Trial, shared: Sequence[str], is_only: bool
) -> str:
    """The trial's setting as an experiment, in two files: what all stages read, and the options of
    the searched stage. Returns the command that runs it.
    """
    setting = experiments.setting_of(shared, trial.setting)
    name = experiments.experiment_name(ctx.cfg.run.name, None if is_only else trial.number)
    comment = f"Trial {trial.number} of the search in {ctx.dir}; for stage={stage}."
    folder = ctx.dir / "experiment"
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    of_stage = experiments.stage_base(setting, stage)
    files = {
        folder / f"{name}.yaml": writing.preset([comment], setting.groups, setting.base),
        folder / "stages" / f"{name}_{stage}.yaml": writing.preset(
            [comment], setting.stage, of_stage
        ),
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    overrides = experiments.command(name, stage, ctx.dir, setting.folders, ctx.cfg.run)
    config.compose(overrides)
    quoted = [config.quoting(text) or shlex.quote(text) for text in overrides]
    return f"python -m rlhf {' '.join(quoted)}"
