"""The check before training, and the logits that it rests on."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.families.build import tiny
from policy import agreement
from policy.agreement import check_agreement, packs_agree
from policy.forward import Layout
from policy.model import PolicyModule, take_segments
from rlhf.types import UserError

SCALED = ("cohere", "granite", "hyperclovax", "minicpm3", "falcon_h1")
CAPPED = ("gemma2", "gemma4", "recurrent_gemma")


def module_of(family: str) -> PolicyModule:
    return PolicyModule(tiny(family), chunk=5, temperature=0.7)


@pytest.mark.parametrize("family", [*SCALED, *CAPPED])
def test_the_head_is_the_models_own(family: str) -> None:
    module = module_of(family)
    assert not module.plain_head
    check_agreement(module, 4096)
    module.plain_head = True  # as if the last layer were all of it
    with pytest.raises(UserError, match=rf"model\.path: {family}"):
        check_agreement(module, 4096)


def test_a_plain_head_is_called_itself() -> None:
    module = module_of("llama")
    assert module.plain_head
    check_agreement(module, 4096)
    assert module.temperature == 0.7


def test_what_is_not_causal_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"stage\.after: bert .*no causal model"):
        check_agreement(module_of("bert"), 4096, "stage.after")


def test_a_family_whose_code_fails_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("llama")

    def broken(**kwargs: Any) -> None:
        raise KeyError("langs")

    monkeypatch.setattr(module.model.model, "forward", broken)
    with pytest.raises(UserError, match=r"model\.path: llama .*KeyError.*langs"):
        check_agreement(module, 4096)


def test_half_precision_is_allowed_what_rounding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the usual bound, by what is measured alone."""
    module = module_of("llama").to(torch.bfloat16)
    monkeypatch.setattr(agreement, "_HALF_GAP", 0.0)
    check_agreement(module, 4096)
    monkeypatch.setattr(agreement, "rounding_otherwise", nullcontext)
    with pytest.raises(UserError, match=r"model\.path: llama"):
        check_agreement(module, 4096)


def test_modes_are_left_as_they_were() -> None:
    module = module_of("gpt2")  # the module trains by default, the model inside does not
    before = [part.training for part in module.modules()]
    assert len(set(before)) == 2
    state = torch.get_rng_state()
    check_agreement(module, 4096)
    assert [part.training for part in module.modules()] == before
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("family", "equal"), [("olmo", True), ("bart", False), ("lfm2_moe", False)]
)
def test_shared_prompts_are_measured(family: str, equal: bool) -> None:
    layout = Layout(4096, shared=True, hidden_size=64)
    module = module_of(family)
    assert packs_agree(module, layout) is equal
    if equal:
        assert take_segments(module.model)
        assert packs_agree(module, replace(layout, longest_dense=0))
