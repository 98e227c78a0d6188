"""Families of causal models against a plain forward, as tiny random models: ten of the most used
here, the rest with `make test-full`.
"""

import pytest

from benchmarks.families import tries
from benchmarks.families.build import causal_families, tiny
from policy.agreement import can_share_prompts
from rlhf.types import UserError
from tests.selection import marked_full

COMMON = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "granite",
)


@pytest.mark.parametrize("family", marked_full(causal_families(), COMMON))
def test_policy(family: str) -> None:
    """Log-probabilities and gradients, and rows that share a prompt, are right or refused."""
    try:
        model = tiny(family)
    # what transformers can't build from its own defaults says nothing of ours
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"{type(error).__name__}: {error}")
    try:
        assert tries.policy_gap(model) < 1e-4
    except UserError:
        assert family not in COMMON
        return
    if can_share_prompts(model):
        assert tries.packed_gap(model) < 1e-4
