"""The study: what it draws, what it keeps in its journal, what it says of the trials."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conf.methods import Direction, Sampler
from rlhf.search import results
from rlhf.search.space import Kind, Parameter
from rlhf.search.study import Study
from rlhf.search.trials import Plan, State
from rlhf.types import UserError
from tests.search.quick import SPACE, plan

TWO = {"loss": Direction.min, "score": Direction.max}


def told(path: Path, values: Sequence[Sequence[float]], which: Plan) -> Study:
    study = Study(path, which)
    for each in values:
        study.tell(study.ask().number, each, steps=10)
    return study


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    space = [
        Parameter(key="stage.a", kind=Kind.choice, choices=("x", "y")),
        Parameter(key="stage.b", kind=Kind.int, low=1, high=3),
    ]
    study = Study(tmp_path / "j", plan(sampler=Sampler.grid, space=space))
    assert study.size() == 6
    for _ in range(6):
        study.tell(study.ask().number, [0.0])
    settings = {tuple(trial.setting.values()) for trial in study.trials()}
    assert settings == {(a, b) for a in "xy" for b in (1, 2, 3)}


def test_tpe_goes_where_it_was_good(tmp_path: Path) -> None:
    """After 30 trials on (x - 0.3)^2 the last ten are nearer to 0.3 than random ones."""
    distances: dict[Sampler, list[float]] = {}
    for sampler in (Sampler.tpe, Sampler.random):
        distances[sampler] = []
        for seed in range(3):
            which = plan(startup=5, seed=seed, sampler=sampler)
            study = Study(tmp_path / f"{sampler.value}{seed}", which)
            for _ in range(30):
                trial = study.ask()
                study.tell(trial.number, [(trial.setting["stage.x"] - 0.3) ** 2])
            last = study.trials()[-10:]
            distances[sampler] += [abs(trial.setting["stage.x"] - 0.3) for trial in last]
    assert sum(distances[Sampler.tpe]) < 0.7 * sum(distances[Sampler.random])


def test_another_search_in_the_same_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    told(path, [[1.0]], plan())
    for other in (plan(seed=1), plan(sampler=Sampler.random), plan(space=SPACE[:1])):
        with pytest.raises(UserError, match=r"is of another search \((seed|sampler|space) was"):
            Study(path, other)
    with pytest.raises(UserError, match=r"overrides was None, is \['a=1'\]"):
        Study(path, replace(plan(), facts={"overrides": ["a=1"]}))
    # before there are values, what a trial runs may be put right
    started = tmp_path / "k"
    Study(started, replace(plan(), facts={"overrides": ["a=1"]})).ask()
    Study(started, replace(plan(), facts={"overrides": ["a=2"]}))
    with pytest.raises(UserError, match="seed was 0, is 1"):
        Study(started, plan(seed=1))


def test_the_front_of_two_objectives(tmp_path: Path) -> None:
    values = [[1.0, 1.0], [2.0, 3.0], [2.0, 2.0], [0.5, 0.0], [3.0, 3.0]]
    study = told(tmp_path / "j", values, replace(plan(), directions=TWO))
    assert [trial.number for trial in study.best()] == [3, 0, 1]
    assert [trial.number for trial in study.best_first()] == [3, 0, 1, 2, 4]
    text = results.table(study, results.importances(study), ["python -m rlhf x"])
    assert "## Pareto front" in text and "5 trials: 5 complete; 50 steps." in text


def test_importance_finds_the_option_that_matters(tmp_path: Path) -> None:
    study = Study(tmp_path / "j", plan(sampler=Sampler.random))
    for _ in range(25):
        trial = study.ask()
        study.tell(trial.number, [trial.setting["stage.x"] ** 2 + 0.01 * trial.setting["stage.n"]])
    shares = study.importance("value")
    assert list(shares) == ["stage.x", "stage.n"] and shares["stage.x"] > 0.9
    assert sum(shares.values()) == pytest.approx(1.0)
    assert study.importance("value") == shares
    assert told(tmp_path / "k", [[1.0], [1.0]], plan()).importance("value") == {}


def test_what_a_search_leaves(tmp_path: Path) -> None:
    study = told(tmp_path / "j", [[3.0], [1.0], [2.0]], plan())
    study.fail(study.ask().number, "a | b\nc")
    for number in range(4):
        for name in ("model", "plots"):
            (tmp_path / "trials" / f"{number:04d}" / "sft" / name).mkdir(parents=True)
    results.write_trials(study, tmp_path)
    lines = (tmp_path / results.TRIALS_FILE).read_text().splitlines()
    assert len(lines) == 4 and '"state": "failed"' in lines[3] and '"value": 1.0' in lines[1]
    shares = results.importances(study)
    plots = results.write_report(study, tmp_path, shares, ["python -m rlhf x"])
    assert {path.name for path in plots} == {"history_value.png", "importance_value.png"}
    text = (tmp_path / results.TABLE_FILE).read_text()
    assert "a \\| b c" in text and text.index("| 1 | complete") < text.index("## Other trials")
    assert results.drop_weights(study, tmp_path / "trials", 2) == [0, 3]
    kept = sorted(path.parent.parent.name for path in tmp_path.glob("trials/*/sft/model"))
    assert kept == ["0001", "0002"] and len(list(tmp_path.glob("trials/*/sft/plots"))) == 4


def test_a_trial_that_runs_is_found_with_its_setting(tmp_path: Path) -> None:
    first = Study(tmp_path / "j", plan())
    asked = [first.ask() for _ in range(2)]
    first.tell(0, [1.0])
    (left,) = Study(tmp_path / "j", plan()).running()
    assert left == asked[1] and left.state is State.running
