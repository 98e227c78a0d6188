"""The study: what has been tried and what comes next. optuna's, by ask and tell, in a journal file
that survives a kill of the search. The only importer of optuna.

Each trial's values are drawn by a sampler of its own, seeded by ``run.seed`` and the trial's
number: a search that goes on draws what it would have drawn without the stop.
"""

import datetime
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.methods import Direction, Pruner, Sampler
from rlhf.process.libraries import check_installed
from rlhf.search.space import Kind, Parameter, draw
from rlhf.search.trials import Plan, State, Trial, pareto_front
from rlhf.types import UserError

JOURNAL = "trials.journal"
_STUDY = "search"
_REASON, _PRUNED_AT, _STEPS = "reason", "pruned_at", "steps"
_TREES = 64  # of the forest behind the importances
# What a setting is drawn by. The rest may change until a trial has values.
_DRAWN = ("space", "objectives", "sampler", "seed")


class _NoLock:
    """optuna's lock of the journal: the search holds one of the whole directory, which ends with
    its process. optuna's own would keep the next search waiting for half a minute after a kill.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return


class Study:
    """The trials of a search, in a journal file."""

    def __init__(self, path: Path, plan: Plan) -> None:
        """`path`: the journal; a journal that is there goes on. Raises UserError where its search
        was another, or where optuna is missing.
        """
        check_installed("optuna", "search")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self.plan = optuna, plan
        cut_torn_line(path)
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_NoLock())
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=_STUDY,
            directions=[_direction(direction) for direction in plan.directions.values()],
            # values are drawn beside the study (`_propose`): this one never does
            sampler=optuna.samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )
        self._states = optuna.trial.TrialState
        self._open: dict[int, Any] = {}  # optuna's trials that run, by number
        stored = self._study.user_attrs.get("plan", plan.identity())
        with_values = (self._states.COMPLETE, self._states.PRUNED)
        has_values = bool(self._study.get_trials(deepcopy=False, states=with_values))
        _refuse_another(path, stored, plan.identity(), None if has_values else _DRAWN)
        self._study.set_user_attr("plan", plan.identity())

    # ---- asking ----

    def ask(self) -> Trial:
        """A new trial with its setting."""
        number = len(self._study.get_trials(deepcopy=False))
        # with all its values in one line of the journal, so that a kill leaves no part of them
        self._study.enqueue_trial(self._propose(number))
        return self._begin()

    def _begin(self) -> Trial:
        """The trial that was queued runs from now on."""
        trial = self._study.ask()
        return self._opened(trial)

    def running(self) -> list[Trial]:
        """The trials that a search left running when it ended. Those that were behind are told."""
        out = []
        for frozen in self._study.get_trials(deepcopy=False):
            if frozen.state is self._states.WAITING:
                out.append(self._begin())
            elif frozen.state is self._states.RUNNING:
                trial = self._opened(self._optuna.trial.Trial(self._study, frozen._trial_id))
                if _PRUNED_AT in frozen.user_attrs:
                    self.prune(trial.number)
                else:
                    out.append(trial)
        return out

    def _opened(self, trial: Any) -> Trial:
        """One of optuna's trials as ours; it gets the values that it was queued with."""
        self._open[trial.number] = trial

        def suggest(parameter: Parameter) -> Any:
            return _external(parameter, _suggest(trial, parameter))

        setting = draw(self.plan.parameters, suggest)
        return Trial(number=trial.number, state=State.running, setting=setting)

    def _propose(self, number: int) -> dict[str, Any]:
        """The values of trial `number` as optuna has them, drawn beside all trials so far."""
        optuna = self._optuna
        beside = optuna.create_study(
            directions=self._study.directions, sampler=self._sampler(number)
        )
        beside.add_trials(self._study.get_trials(deepcopy=False))
        trial = beside.ask()
        values: dict[str, Any] = {}

        def suggest(parameter: Parameter) -> Any:
            values[parameter.key] = _suggest(trial, parameter)
            return _external(parameter, values[parameter.key])

        draw(self.plan.parameters, suggest)
        return values

    def _sampler(self, number: int) -> Any:
        """What draws the values of trial `number`."""
        samplers, plan = self._optuna.samplers, self.plan
        if plan.sampler is Sampler.grid:
            values = {parameter.key: parameter.grid() for parameter in plan.parameters}
            return samplers.GridSampler(values, seed=_seed(plan.seed, 0))
        seed = _seed(plan.seed, number)
        if plan.sampler is Sampler.random:
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=plan.startup)

    # ---- telling ----

    def report(self, number: int, step: int, value: float) -> bool:
        """A running trial's value at a step. Returns whether the trial is to be stopped."""
        trial, known = self._open[number], self._frozen(number).intermediate_values
        if step not in known:
            trial.report(value, step)
        elif step != max(known):  # a search before this one was told
            return False
        self._study.pruner = self._pruner()
        if not trial.should_prune():
            return False
        trial.set_user_attr(_PRUNED_AT, step)
        return True

    def _pruner(self) -> Any:
        pruners, rule = self._optuna.pruners, self.plan.prune
        if rule.kind is Pruner.median:
            return pruners.MedianPruner(n_startup_trials=rule.startup, n_warmup_steps=rule.warmup)
        if rule.kind is Pruner.halving:
            return pruners.SuccessiveHalvingPruner(
                min_resource=rule.least, reduction_factor=rule.factor
            )
        return pruners.NopPruner()

    def tell(self, number: int, values: Sequence[float], steps: int | None = None) -> None:
        """A trial has ended with these values of the objectives."""
        self._finish(number, "COMPLETE", steps, list(values))

    def fail(self, number: int, reason: str, steps: int | None = None) -> None:
        """A trial has ended without values."""
        self._open[number].set_user_attr(_REASON, reason)
        self._finish(number, "FAIL", steps)

    def prune(self, number: int, steps: int | None = None) -> None:
        """A trial was stopped, since it was behind."""
        at = self._open[number].user_attrs.get(_PRUNED_AT)
        self._open[number].set_user_attr(_REASON, f"behind at step {at}")
        self._finish(number, "PRUNED", steps)

    def _finish(
        self, number: int, state: str, steps: int | None, values: list[float] | None = None
    ) -> None:
        trial = self._open.pop(number)
        if steps is not None:
            trial.set_user_attr(_STEPS, steps)
        self._study.tell(trial, values, state=self._states[state])

    # ---- looking ----

    def trials(self) -> list[Trial]:
        """All trials, in the order of their numbers."""
        return [self._trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def _frozen(self, number: int) -> Any:
        return self._study.get_trials(deepcopy=False)[number]

    def _trial(self, frozen: Any) -> Trial:
        named = {
            self._states.COMPLETE: State.complete,
            self._states.PRUNED: State.pruned,
            self._states.FAIL: State.failed,
        }
        state = named.get(frozen.state, State.running)
        known = {parameter.key: parameter for parameter in self.plan.parameters}
        setting = {}
        for key, value in frozen.params.items():
            setting[key] = _external(known[key], value)
        seconds = None
        if frozen.duration is not None:
            seconds = frozen.duration / datetime.timedelta(seconds=1)
        return Trial(
            number=frozen.number,
            state=state,
            setting=setting,
            values=tuple(frozen.values) if state is State.complete else (),
            last=_last(frozen) if state is State.pruned else None,
            reason=frozen.user_attrs.get(_REASON, ""),
            steps=frozen.user_attrs.get(_STEPS),
            seconds=seconds,
        )

    def size(self) -> int | None:
        """The number of trials that there can be; None without an end."""
        if self.plan.sampler is not Sampler.grid:
            return None
        return math.prod(len(parameter.grid()) for parameter in self.plan.parameters)

    def best(self) -> list[Trial]:
        """The best complete trial; with several objectives the Pareto front, in the order of the
        first one. Empty where no trial is complete.
        """
        ordered = self._ordered()
        if len(self.plan.directions) == 1:
            return ordered[:1]
        return pareto_front(ordered, self._losses)

    def best_first(self) -> list[Trial]:
        """All complete trials, the best or the front first."""
        best, ordered = self.best(), self._ordered()
        return [*best, *(trial for trial in ordered if trial not in best)]

    def _ordered(self) -> list[Trial]:
        complete = [trial for trial in self.trials() if trial.state is State.complete]
        # trials come by number, and sorting keeps the order of equal ones
        return sorted(complete, key=self._losses)

    def _losses(self, trial: Trial) -> tuple[float, ...]:
        """The values of a trial, smaller ones better."""
        out = []
        for direction, value in zip(self.plan.directions.values(), trial.values, strict=True):
            out.append(-value if direction is Direction.max else value)
        return tuple(out)

    def importance(self, objective: str) -> dict[str, float]:
        """Shares of an objective's variance over the complete trials that go back to each parameter
        (fANOVA; Hutter et al. 2014), the largest first. A parameter that some of them lack is left
        out. Empty where the trials say nothing: fewer than two, or all alike.
        """
        place = list(self.plan.directions).index(objective)
        values = set()
        for trial in self.trials():
            if trial.state is State.complete:
                values.add(trial.values[place])
        if len(values) < 2 or not all(math.isfinite(value) for value in values):
            return {}
        evaluator = self._optuna.importance.FanovaImportanceEvaluator(
            n_trees=_TREES, seed=self.plan.seed % 2**32
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = self._optuna.importance.get_param_importances(
                self._study, evaluator=evaluator, target=lambda trial: trial.values[place]
            )
        return {key: float(share) for key, share in shares.items()}


def _last(frozen: Any) -> float | None:
    values = frozen.intermediate_values
    if not values:
        return None
    latest = max(values)
    return float(values[latest])


def _external(parameter: Parameter, value: Any) -> Any:
    """A value as the option has it: optuna knows choices by their labels."""
    if parameter.kind is Kind.choice:
        return parameter.chosen(value)
    return value


def _suggest(trial: Any, parameter: Parameter) -> Any:
    """The value of a parameter as optuna has it."""
    key = parameter.key
    if parameter.kind is Kind.choice:
        return trial.suggest_categorical(key, parameter.labels)
    if parameter.kind is Kind.int:
        low, high = int(parameter.low), int(parameter.high)
        whole = 1
        if parameter.step is not None:
            whole = int(parameter.step)
        return trial.suggest_int(key, low, high, step=whole, log=parameter.log)
    return trial.suggest_float(
        key,
        parameter.low,
        parameter.high,
        step=parameter.step,
        log=parameter.log,
    )


def _direction(direction: Direction) -> str:
    return "minimize" if direction is Direction.min else "maximize"


def _seed(seed: int, number: int) -> int:
    """A seed in [0, 2**32) for each trial of a search."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def cut_torn_line(path: Path) -> None:
    """Cut off a last line of the journal that a kill tore."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _refuse_another(
    path: Path, stored: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str] | None
) -> None:
    """Raises UserError for a journal of a search that differs in one of `keys` (None: in anything),
    so that its trials can't be compared with this one's.
    """
    changed = []
    for key, value in now.items():
        before = stored.get(key)
        if before != value and (keys is None or key in keys):
            changed.append(f"{key} was {before}, is {value}")
    if changed:
        shown = "; ".join(changed)
        raise UserError(
            f"run.resume=true: {path} is of another search ({shown}). Its trials can't be compared "
            "with new ones: set it back, or begin anew with run.overwrite=true or another run.name."
        )
