"""Further adapters of one base (adapter.load): merged into what a run starts from, by weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.choices import AdapterKind
from conf.schema import AdapterConfig, ModelConfig
from policy.saving import with_further
from rlhf.models.directories import check_further
from rlhf.types import UserError

IDS = torch.arange(40, 100)[None]


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(input_ids=IDS).logits
    return out


def make_adapter(base: Path, directory: Path, seed: int, **options: Any) -> Path:
    """A LoRA that has trained, as it were."""
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(loaded(base), config)
    torch.manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(0.05 * torch.randn_like(param))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    first = make_adapter(base, folder / "first", 1, r=4, lora_alpha=8)
    second = make_adapter(base, folder / "second", 2, r=2, lora_alpha=6)
    return [str(first), str(second)]


def options(two: list[str], *weights: float) -> AdapterConfig:
    return AdapterConfig(kind=AdapterKind.lora, load=two, load_weights=list(weights))


def test_a_weighted_sum_is_the_one_that_peft_makes_side_by_side(base: Path, two: list[str]) -> None:
    adapted = PeftModel.from_pretrained(loaded(base), two[0], adapter_name="first")
    adapted.load_adapter(two[1], adapter_name="second")
    adapted.add_weighted_adapter(["first", "second"], [0.25, -1.5], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    adapter = options(two, 0.25, -1.5)
    check_further(ModelConfig(path=str(base)), adapter, "CAUSAL_LM")
    merged = with_further(loaded(base), adapter)
    assert type(merged) is type(loaded(base))
    assert all(param.requires_grad for param in merged.parameters())
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    assert (logits(merged) - logits(loaded(base))).abs().max() > 0.1


def test_without_weights_each_counts_once_and_alone_it_is_the_adapter(
    base: Path, two: list[str]
) -> None:
    for place in two:
        merged = with_further(loaded(base), options([place]))
        alone = PeftModel.from_pretrained(loaded(base), place)
        torch.testing.assert_close(logits(merged), logits(alone), rtol=0, atol=1e-5)
    assert torch.equal(
        logits(with_further(loaded(base), options(two))),
        logits(with_further(loaded(base), options(two, 1.0, 1.0))),
    )


def test_what_is_refused_before_weights_load(
    base: Path, two: list[str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def refused(adapter: AdapterConfig, path: Path = base, task: str = "CAUSAL_LM") -> str:
        with pytest.raises(UserError) as error:
            check_further(ModelConfig(path=str(path)), adapter, task)
        return str(error.value)

    assert "Expected adapters of one base" in refused(options(two), tiny_model(tied=False))
    assert "another task" in refused(options(two), task="SEQ_CLS")
    assert "holds whole weights" in refused(options([str(base)]))
    assert "no such directory" in refused(options([str(tmp_path / "nowhere")]))
    dora = make_adapter(base, tmp_path / "dora", 3, r=2, use_dora=True)
    assert "can't be taken in part" in refused(options([str(dora)], 0.5))
    check_further(ModelConfig(path=str(base)), options([str(dora)]), "CAUSAL_LM")


def test_a_copy_of_the_base_elsewhere_is_the_base(
    base: Path, two: list[str], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "copy")
    check_further(ModelConfig(path=str(tmp_path / "copy")), options(two), "CAUSAL_LM")
