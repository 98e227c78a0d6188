"""The commands of trials: where they live, what they read, and a setting as an experiment."""

from pathlib import Path

import pytest

from conf.methods import SearchStage
from conf.run import RunConfig
from rlhf.cli import config
from rlhf.migrate.writing import preset
from rlhf.search.commands import Commands
from rlhf.search.experiments import command, experiment_name, setting_of, stage_base
from rlhf.search.space import parameters
from rlhf.types import UserError

ARGV = [
    "stage=search",
    "stage.of=sft",
    "++stage.space={learning_rate:{low:1e-5,high:1e-3}}",
    "experiment=reviews",
    "adapter=lora",
    "tracking=none",
    "run.name=mine",
    "run.resume=true",
]


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    stage = SearchStage(
        of="sft",
        options={"steps": 7, "stage.batch_size": 4},
        then="eval",
        then_options={"after": f"{tmp_path}/mine/sft/model", "rollout": "hf"},
    )
    run = RunConfig(dir=str(tmp_path), name="mine")
    return Commands(stage, run, tmp_path / "mine" / "search", ARGV, "mine-search")


def test_a_trial_lives_in_the_search_and_reads_the_project(
    commands: Commands, tmp_path: Path
) -> None:
    trained, judged = commands.stages(3, {"stage.learning_rate": 1e-4, "adapter.rank": 4})
    folder = tmp_path / "mine" / "search" / "trials" / "0003"
    assert (trained.stage, trained.directory) == ("sft", folder / "sft")
    assert (judged.stage, judged.directory) == ("eval", folder / "eval")
    cfg = config.compose(trained.command[3:])
    assert (cfg.stage.learning_rate, cfg.stage.steps, cfg.stage.batch_size) == (1e-4, 7, 4)
    assert (cfg.adapter.rank, cfg.adapter.kind.value) == (4, "lora")
    assert cfg.tracking.group == "mine-search" and not cfg.run.resume
    # made once for all trials, by the search
    assert cfg.data.path == f"{tmp_path}/mine/recipe/sft.jsonl" and cfg.data.recipe.value == "none"
    after = config.compose(judged.command[3:])
    assert after.stage.after == f"{folder}/sft/model"
    assert after.rollout.backend.value == "hf"
    # the same for every trial: what is searched is not passed on
    assert after.adapter.rank != 4


def test_presets_are_searched_too(commands: Commands) -> None:
    space = {"adapter": {"choices": ["lora", "none"]}}
    commands.check(parameters(space, "sft"))
    (trained, _) = commands.stages(0, {"adapter": "none"})
    assert config.compose(trained.command[3:]).adapter.kind.value == "none"
    space["adapter"]["choices"].append("lorra")
    with pytest.raises(UserError, match=r"adapter=lorra: no such preset.*Nearest: adapter=lora"):
        commands.check(parameters(space, "sft"))


def test_a_setting_is_an_experiment_that_builds_on_the_one_that_was_searched(
    tmp_path: Path,
) -> None:
    overrides = [*ARGV[3:6], "stage.steps=7"]
    setting = setting_of(overrides, {"stage.learning_rate": 1e-4, "adapter.rank": 4})
    assert setting.base == "reviews" and setting.groups == {"adapter": "lora", "adapter.rank": 4}
    name = experiment_name("mine/b", None)
    folder = tmp_path / "experiment" / "stages"
    folder.mkdir(parents=True)
    text = preset(["a"], setting.groups, setting.base)
    (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    base = stage_base(setting, "sft")
    assert base == "reviews_sft" and stage_base(setting, "kto") is None
    (folder / f"{name}_sft.yaml").write_text(preset(["a"], setting.stage, base))
    run = RunConfig(dir=str(tmp_path), name="mine")
    cfg = config.compose(command(name, "sft", tmp_path, [], run))
    assert (cfg.stage.learning_rate, cfg.stage.steps, cfg.stage.max_length) == (1e-4, 7, 40)
    assert (cfg.adapter.rank, cfg.model.tiny.max_positions) == (4, 512)
    assert cfg.data.path == f"{tmp_path}/mine/recipe/sft.jsonl"


def test_dictionaries_of_several_overrides_are_put_together() -> None:
    given = ["++reward.terms={a:{kind:length}}", "++reward.terms={b:{kind:regex}}"]
    setting = setting_of(given, {"reward.terms.a.weight": 0.5})
    assert set(setting.groups["reward.terms"]) == {"a", "b"}
