"""Every preset composes to dataclasses; ranges are checked there."""

from pathlib import Path

import pytest

from conf import published
from conf.choices import EngineKind
from conf.schema import GROUPS
from conf.stages import FAMILIES, GROUPS_OF, STAGES, OnlineStage, SFTStage
from rlhf.cli import config, presets
from rlhf.types import UserError
from tests.composing import composed

_CHOICES = {group: presets.choices(group) for group in GROUPS}
# Each preset once, those of different groups together: groups know nothing of each other.
_ROUNDS = [
    {group: names[number % len(names)] for group, names in _CHOICES.items() if names}
    for number in range(max(map(len, _CHOICES.values())))
]
_STAGES = presets.choices("stage")


@pytest.mark.parametrize("stage", _STAGES)
def test_every_stage_composes_to_its_own_schema(stage: str) -> None:
    cfg = composed(f"stage={stage}")
    assert type(cfg.stage) is STAGES[presets.stage_schema(stage)]
    assert cfg.stage.name == stage
    preset = config.stage_preset(stage)
    published.fill(preset, cfg.adapter.kind)
    assert preset == cfg.stage


@pytest.mark.parametrize("chosen", _ROUNDS, ids=lambda chosen: "-".join(chosen.values()))
def test_every_preset_of_every_group_composes(chosen: dict[str, str]) -> None:
    given = [f"{group}={name}" for group, name in chosen.items()]
    # a rate that is published for no method of its own
    cfg = config.compose(["stage=ppo", "stage.learning_rate=1e-5", *given])
    kinds = {
        "model": cfg.model.kind,
        "tracking": cfg.tracking.kind,
        "rollout": cfg.rollout.backend,
    }
    for group, kind in kinds.items():
        assert kind.value == chosen[group]
    preset = presets.CONF_DIR / "adapter" / f"{chosen['adapter']}.yaml"
    assert f"kind: {cfg.adapter.kind.value}\n" in preset.read_text(encoding="utf-8")
    zero = f"zero{cfg.engine.zero_stage}"
    assert chosen["engine"] == ("torch" if cfg.engine.kind is EngineKind.torch else zero)


def _experiments() -> list[tuple[str, str]]:
    """Each experiment with the stages that it has a file for; the first with one that it has none
    for.
    """
    folder = presets.CONF_DIR / "experiment" / "stages"
    pairs = []
    for experiment in presets.choices("experiment"):
        stages = [stage for stage in _STAGES if (folder / f"{experiment}_{stage}.yaml").is_file()]
        pairs += [(experiment, stage) for stage in stages]
    return [*pairs, (presets.choices("experiment")[0], "doctor")]


@pytest.mark.parametrize(("experiment", "stage"), _experiments())
def test_every_experiment_composes_with_its_stages(experiment: str, stage: str) -> None:
    cfg = composed(f"stage={stage}", f"experiment={experiment}")
    assert cfg.run.name == experiment


def test_every_file_of_an_experiment_belongs_to_a_stage() -> None:
    files = {path.stem for path in (presets.CONF_DIR / "experiment" / "stages").glob("*.yaml")}
    assert files == {f"{name}_{stage}" for name, stage in _experiments()} & files


def test_experiment_settings_belong_to_one_stage_and_yield_to_the_command_line() -> None:
    sft = config.compose(["stage=sft", "experiment=reviews"])
    assert sft.data.path == "runs/reviews/recipe/sft.jsonl"
    ppo = config.compose(["stage=ppo", "experiment=reviews"])
    assert ppo.data.path == "runs/reviews/recipe/prompts.jsonl"
    named = config.compose(["stage=ppo", "experiment=reviews", "run.name=x"])
    assert named.model.path == "runs/x/sft/model"
    mine = config.compose(["stage=ppo", "experiment=reviews", "data.path=mine.jsonl"])
    assert mine.data.path == "mine.jsonl"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stage.gamma=1.5", "stage.gamma"),
        ("stage.steps=0", "stage.steps"),
        ("stage.kl_coef=-0.1", "stage.kl_coef"),
        ("stage.minibatches=3", "stage.minibatches"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("rollout.top_p=0", "rollout.top_p"),
        ("adapter.rank=0", "adapter.rank"),
        ("engine.offload=cpu", "engine.offload"),
        ("run.name=../up", "run.name"),
        ("run.name=/tmp/x", "run.name"),
        ("run.name=.", "run.name"),
        ("model.gguf_file=../x.gguf", "model.gguf_file"),
        ("data.eval_fraction=1", "data.eval_fraction"),
    ],
)
def test_ranges_are_checked_when_the_config_becomes_dataclasses(override: str, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}=.*out of range"):
        config.compose(["stage=ppo", override])


def test_each_schema_is_in_one_family_and_groups_exist() -> None:
    members = [schema for schemas in FAMILIES.values() for schema in schemas]
    assert sorted(members) == sorted(STAGES)
    groups = {*GROUPS, "run", "label", "migrate", "tasks"}
    assert all(set(named) <= groups for named in GROUPS_OF.values())


def test_the_stage_as_what_it_is_and_as_nothing_else() -> None:
    cfg = config.compose(["stage=grpo"])
    assert cfg.stage_as(OnlineStage) is cfg.stage
    with pytest.raises(TypeError, match=r"SFTStage.*OnlineStage"):
        cfg.stage_as(SFTStage)


def test_an_experiment_with_a_wrong_key_is_told_by_key(tmp_path: Path) -> None:
    text = "# @package _global_\nreward:\n  terms:\n    praise:\n      kind: model\n      path: x\n"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    overrides = ["stage=grpo", "experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"]
    with pytest.raises(UserError, match=r"'experiment/mine'.*'path' not in 'RewardTerm'") as told:
        config.compose(overrides)
    assert "reward.terms.praise.path" in str(told.value)
