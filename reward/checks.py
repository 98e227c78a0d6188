"""What can be known of a reward before its weights load: checks of the stages that score."""

from typing import Any

from conf.online import WatchConfig
from conf.schema import RewardConfig
from reward.base import model_paths
from reward.model import (
    check_tokenizers,
    load_reward_tokenizer,
    read_manifest,
    same_reading,
    template_hash,
)
from reward.scorers.function import load_function
from reward.terms import check_terms
from rlhf.types import UserError


def scoring_models(reward: RewardConfig, watch: WatchConfig) -> list[tuple[str, str]]:
    """(option, directory) of every reward model beside an online policy: those that score, and the
    judge of the watch.
    """
    paths = model_paths(reward)
    if watch.judge_path is not None:
        paths.append(("stage.watch.judge_path", watch.judge_path))
    return paths


def check_reward(reward: RewardConfig) -> None:
    """There is one source of scores, and its functions, fields and packages are there. Raises
    UserError.
    """
    check_terms(reward)
    if reward.function is not None:
        load_function(reward.function)


def check_reward_model(key: str, path: str, policy: Any, *, critic: bool = False) -> list[str]:
    """The directory `path` of the option `key` holds a reward model that can read what the policy
    writes. Returns a note where it reads texts, not the policy's tokens. Raises UserError.

    `policy` is the policy's tokenizer, None where it is not on the disk; the scorer compares again
    what it loaded. `critic`: the critic starts from this model, so it reads the policy's tokens.
    """
    manifest = read_manifest(path, key)
    if policy is None:
        return []
    tokenizer, _ = load_reward_tokenizer(path, key)
    check_tokenizers(path, tokenizer, manifest, policy, key)
    if critic:
        _check_critic(path, tokenizer, policy)
    return _reading_note(key, path, tokenizer, manifest, policy)


def _check_critic(path: str, tokenizer: Any, policy: Any) -> None:
    """The chat template has no part in what a critic reads, the vocabulary has."""
    if tokenizer.get_vocab() != policy.get_vocab():
        raise UserError(
            f"stage.critic_init=reward: the reward model {path} has another tokenizer "
            f"({len(tokenizer)} entries) than the policy "
            f"({len(policy)}), so its weights can't read the policy's tokens. Set "
            "stage.critic_init=policy."
        )


def _reading_note(key: str, path: str, tokenizer: Any, manifest: Any, policy: Any) -> list[str]:
    if not same_reading(manifest, policy):
        what = f"another tokenizer ({len(tokenizer)} entries) than the policy ({len(policy)})"
    elif template_hash(policy) != manifest.chat_template_hash and manifest.conversational:
        what = "another chat template than the policy"
    else:
        return []
    return [
        f"{key}={path}: the reward model has {what}, so prompts and responses go to it as text, "
        "which its own tokenizer and template put into tokens "
        "anew. To score the policy's own tokens, train it from the policy: stage=reward "
        "model.path=<the policy's model directory>."
    ]
