"""The regions of models that read pictures, as stage.train.modules names them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.schedule import TrainPart
from conf.schema import ModelConfig
from rlhf.models.loading import without_weights
from rlhf.models.parts import chosen, outline
from rlhf.types import UserError
from tests import vision
from tests.models.test_parts import empty, llama

# what names of weights begin with, by family and region
FAMILIES = {
    "idefics3": ("model.text_model.", "model.vision_model.", "model.connector."),
    "llava": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "llava_next": ("model.language_model.", "model.vision_tower.", "model."),
    "qwen2_vl": ("model.language_model.", "model.visual.", "model.visual.merger"),
    "qwen3_vl": ("model.language_model.", "model.visual.", "model.visual."),
    "internvl": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "gemma3": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
}
SHORT = ("idefics3", "qwen2_vl")


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Any]:
    def loaded(family: str) -> Any:
        directory = vision.tiny_vision(family, tmp_path / family)
        return without_weights(ModelConfig(path=str(directory)))

    return loaded


def region_of(model: Any, *modules: str) -> set[str]:
    weights = chosen(outline(model), TrainPart(modules=list(modules)))
    return {name for weight in weights for name in weight.names}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in SHORT else pytest.mark.full) for f in FAMILIES],
)
def test_each_weight_is_in_one_region(family: str, load: Callable[[str], Any]) -> None:
    model = load(family)
    language, tower, projector = (
        region_of(model, region) for region in ("language", "tower", "projector")
    )
    beginnings = FAMILIES[family]
    assert all(name.startswith((beginnings[0], "lm_head.")) for name in language)
    assert tower and all(name.startswith(beginnings[1]) for name in tower)
    assert projector and all(name.startswith(beginnings[2]) for name in projector)
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert language | tower | projector == everything
    assert len(language) + len(tower) + len(projector) == len(everything)
    assert region_of(model, "language", "projector") == language | projector


def test_the_projector_of_qwen_is_its_merger(load: Callable[[str], Any]) -> None:
    found = region_of(load("qwen2_vl"), "projector")
    assert all(".merger." in name for name in found)


def test_a_text_model_has_no_regions() -> None:
    with pytest.raises(UserError, match="named 'tower'"):
        chosen(outline(empty(llama())), TrainPart(modules=["tower"]))
