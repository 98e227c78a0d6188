"""What each choice costs, by the configuration."""

import pytest

from rlhf.board.forms.basic import stages
from rlhf.board.forms.costs import costs
from rlhf.board.rendering import LANGUAGES, translator
from tests.composing import composed

_CHOSEN = [
    ("stage=sft", "stage.steps=3", "engine.gradient_checkpointing=true", "run.resume=true"),
    ("stage=dpo", "adapter=qlora", "run.overwrite=true"),
    ("stage=ppo", "adapter=lora", "reward.path=x", "stage.kl_coef=0"),
    ("stage=eval", "stage.judges=[classifier]", "reward.path=x"),
    ("stage=label", "label.mode=import"),
    *((f"stage={name}",) for name in stages()),
]


def words_of(*overrides: str) -> list[str]:
    return [word.removeprefix("forms.cost.") for word, _ in costs(composed(*overrides))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_is_there_in_both_languages(language: str) -> None:
    t = translator(language)
    seen = set()
    for chosen in _CHOSEN:
        found = costs(composed(*chosen))
        assert found
        seen |= {word for word, _ in found}
        assert all("{" not in t(word, **values) for word, values in found)
    from rlhf.board.rendering import words

    assert seen == {key for key in words(language) if key.startswith("forms.cost.")}


def test_costs_follow_the_choices() -> None:
    assert words_of("stage=sft")[:2] == ["full", "length"]
    assert "reference_free" in words_of("stage=dpo", "adapter=lora")
    assert "reference" in words_of("stage=dpo")
    assert "critic" in words_of("stage=ppo") and "critic" not in words_of("stage=grpo")
    assert "wandb" not in words_of("stage=sft", "tracking=none")
    (responses,) = [v for w, v in costs(composed("stage=grpo")) if w == "forms.cost.responses"]
    assert responses == {"count": "1024", "tokens": "1024", "steps": "100"}
