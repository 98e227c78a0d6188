"""Learning rates that are left out are published ones; the dry run warns outside their range."""

import pytest

from conf import published
from conf.choices import AdapterKind
from conf.stages import STAGES, OnlineStage
from conf.training import TrainStage
from rlhf.cli import config, presets
from rlhf.types import UserError

TRAINING = [
    name
    for name in presets.choices("stage")
    if issubclass(STAGES[presets.stage_schema(name)], TrainStage)
]


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("stage", TRAINING)
def test_a_rate_that_is_left_out_is_inside_the_published_range(stage: str, adapter: str) -> None:
    preset, kind = config.stage_preset(stage), AdapterKind(adapter)
    known = published.published(preset, kind)
    published.fill(preset, kind)
    assert known is not None
    assert preset.learning_rate == known.value
    assert known.low <= known.value <= known.high
    assert known.source
    assert published.outside_range(preset, kind) == []


@pytest.mark.parametrize("adapter", published.OWN)
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_a_method_of_its_own_rates_has_them_or_asks_for_one(
    stage: str, adapter: AdapterKind
) -> None:
    known = published.OWN[adapter].get(stage)
    given = [f"stage={stage}", f"adapter={adapter.value}"]
    if known is not None:
        assert config.compose(given).stage.learning_rate == known.value
        return
    with pytest.raises(UserError, match=rf"stage\.learning_rate is not set.*{adapter.value}"):
        config.compose(given)
    cfg = config.compose([*given, "stage.learning_rate=1e-3"])
    assert published.outside_range(cfg.stage, adapter) == []


def test_a_configuration_has_the_published_rates() -> None:
    cfg = config.compose(["stage=ppo", "adapter=lora"])
    assert cfg.stage.learning_rate == published.LOW_RANK["ppo"].value
    assert cfg.stage.critic_learning_rate == published.FULL["critic"].value
    cfg = config.compose(["stage=ppo", "stage.critic_adapter=true"])
    assert cfg.stage.learning_rate == published.FULL["ppo"].value
    assert cfg.stage.critic_learning_rate == published.LOW_RANK["critic"].value


def test_a_low_rank_adapter_takes_a_higher_rate_than_all_weights() -> None:
    for method, full in published.FULL.items():
        assert published.LOW_RANK[method].value > full.value


def test_a_critic_is_low_rank_only_where_it_has_an_adapter() -> None:
    full = published.critic_learning_rate(OnlineStage())
    low_rank = published.critic_learning_rate(OnlineStage(critic_adapter=True))
    assert full == published.FULL["critic"].value
    assert low_rank == published.LOW_RANK["critic"].value


def test_a_rate_that_is_given_stays_and_is_compared() -> None:
    cfg = config.compose(["stage=ppo", "stage.learning_rate=1e-4", "stage.critic_learning_rate=1"])
    assert cfg.stage.learning_rate == 1e-4
    notes = published.outside_range(cfg.stage, cfg.adapter.kind)
    assert ["stage.learning_rate=0.0001" in notes[0], "arXiv" in notes[0]] == [True, True]
    assert "stage.critic_learning_rate=1" in notes[1]
    grpo = config.compose(["stage=grpo", "stage.critic_learning_rate=1"])
    assert published.outside_range(grpo.stage, grpo.adapter.kind) == []


def test_the_recipes_page_has_the_table() -> None:
    page = (presets.CONF_DIR.parent / "docs" / "tasks" / "recipes.md").read_text(encoding="utf-8")
    for method, full in published.FULL.items():
        low = published.LOW_RANK[method]
        cells = f"| {_rate(full.value)} | {_rate(low.value)} |"
        assert any(method in line and line.endswith(cells) for line in page.splitlines()), method


def _rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")
