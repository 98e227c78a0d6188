"""Adapters that are layers of their own inside vLLM's engine, family by family: its layers have
other names, are joined, or compute by other code than transformers'.

A file of its own: vLLM starts no mixture of experts beside a living engine of another family.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from policy.saving import adapter_weights
from rlhf.types import UserError
from tests.online.families import FAMILIES, tiny_family
from tests.rollout.test_modules import KINDS, MOLORA, PROBE, load, logprobs_of, start, train, worst

pytestmark = [pytest.mark.vllm, pytest.mark.full]
LATENT = ("deepseek_v2", "deepseek_v3")
# beside the whole feed-forward layer, which vLLM calls otherwise where it is a mixture
BESIDE = ("llama", "mixtral", "gpt_oss", "gpt_neox")
CASES = [(family, kind) for family in FAMILIES for kind in ("houlsby", "molora")]
CASES += [(family, "parallel") for family in BESIDE]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_as_near_to_transformers_as_without_an_adapter(
    family: str, kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Or refused by name."""
    directory = tiny_family(family, tiny_model(), tmp_path / "model")
    if kind == "molora" and family in LATENT:
        with pytest.raises(UserError, match=r"_proj, .* vLLM.*Set rollout=hf"):
            start("vllm", MOLORA, directory)
        return
    generator = start("vllm", KINDS[kind], directory)
    try:
        base = logprobs_of(load(directory))
        before = worst(generator.logprobs(PROBE), base)
        model = train(load(directory, KINDS[kind]), 1)
        generator.sync(adapter_weights(model), 1)
        after = worst(generator.logprobs(PROBE), logprobs_of(model))
        assert worst(logprobs_of(model), base) > 0.05
        assert after < 2 * before + 2e-6 < 2e-5
    finally:
        generator.close()
