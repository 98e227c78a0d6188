"""Tokenizers of the policy and of the reward models, side by side."""

import functools
from collections.abc import Callable
from typing import Any

from conf.schema import ModelConfig, RewardConfig
from reward.base import model_paths
from reward.model import Manifest, load_reward_tokenizer, same_reading, template_hash
from reward.model import check_tokenizers as require_compatible
from rlhf.models.loading import load_tokenizer
from rlhf.stages.examination.findings import Finding, State
from rlhf.types import UserError


def compare_tokenizers(path: str, reward: Any, manifest: Manifest, policy: Any) -> Finding:
    """What the scorer of an online stage would say of the two, and how they differ where it would
    accept them.
    """
    differences = []
    if not same_reading(manifest, policy):
        differences.append(f"vocabularies of {len(policy)} and {len(reward)} entries")
        differences += [
            f"{name} {getattr(policy, name)!r} and {getattr(reward, name)!r}"
            for name in ("bos_token", "eos_token")
            if getattr(policy, name) != getattr(reward, name)
        ]
    if template_hash(policy) != manifest.chat_template_hash:
        differences.append("chat templates")
    if not differences:
        return Finding(
            "tokenizers", State.ok, f"policy and reward model share one, {len(policy)} entries"
        )
    found = f"policy and reward model differ: {'; '.join(differences)}"
    try:
        require_compatible(path, reward, manifest, policy)
    except UserError as error:
        return Finding("tokenizers", State.fail, found, str(error))
    return Finding(
        "tokenizers",
        State.warn,
        found,
        "intended? Responses are scored through the reward model's own tokenizer and template",
    )


def load_side(key: str, load: Callable[[], Any]) -> tuple[Any, Finding]:
    """One tokenizer, or None and why not. `load` returns a tokenizer, or a tokenizer and its reward
    model's manifest.
    """
    try:
        loaded = load()
    # transformers raises the latter two for a directory that it can't read
    except (UserError, OSError, ValueError) as error:
        return None, Finding(
            key,
            State.fail,
            str(error).strip().split("\n", 1)[0],
            "name a directory that a stage wrote, or a model's own",
        )
    tokenizer = loaded[0] if isinstance(loaded, tuple) else loaded
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    return loaded, Finding(
        key, State.ok, f"{type(tokenizer).__name__}, {len(tokenizer)} entries, {template}"
    )


def check_tokenizers(
    model: ModelConfig, reward: RewardConfig, chat_template: str | None
) -> list[Finding]:
    """Load the tokenizers of the policy and of every reward model, and compare them."""
    out = []
    policy = None
    if model.path is not None:
        policy, finding = load_side("model.path", lambda: load_tokenizer(model, chat_template))
        out.append(finding)
    if policy is not None:
        out.append(
            Finding(
                "reference",
                State.info,
                "the policy's start, so it has the policy's tokenizer and template",
            )
        )
        if policy.pad_token_id == policy.eos_token_id:
            out.append(
                Finding(
                    "padding",
                    State.info,
                    f"is the end-of-sequence token {policy.eos_token!r}: masks come from "
                    "lengths, so ends still train",
                )
            )
    for key, path in model_paths(reward):
        loaded, finding = load_side(key, functools.partial(load_reward_tokenizer, path, key))
        out.append(finding)
        if policy is not None and loaded is not None:
            tokenizer, manifest = loaded
            out.append(compare_tokenizers(path, tokenizer, manifest, policy))
    return out
