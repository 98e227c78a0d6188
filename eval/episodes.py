"""Figures of episodes, each a number for every rollout. Pure functions."""

from collections.abc import Sequence

from eval.tasks.estimators import pass_at
from rlhf.types import Rollout


def episode_figures(rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """For episodes by name, [B] each: their turns, their tokens (those of the environment
    included), and where the environment tells of success, that and `pass_at_k`. Empty for responses
    of one turn.
    """
    if not all(rollout.turns for rollout in rollouts):
        return {}
    figures = {
        "turns": [float(len(rollout.turns)) for rollout in rollouts],
        "tokens": [float(len(rollout.token_ids)) for rollout in rollouts],
    }
    if any(rollout.success is None for rollout in rollouts):
        return figures
    succeeded = [bool(rollout.success) for rollout in rollouts]
    figures["success"] = [float(success) for success in succeeded]
    return figures | pass_at_k([rollout.prompt.id for rollout in rollouts], succeeded)


def pass_at_k(ids: Sequence[str], succeeded: Sequence[bool]) -> dict[str, list[float]]:
    """``pass_at_<k>`` [B] for k = 2, 4, 8 and so on, up to the fewest samples of a prompt: the
    chance that at least one of k samples of a response's prompt succeeds, without bias
    (`eval.tasks.estimators.pass_at`). `ids` [B] name the prompts.
    """
    groups: dict[str, list[bool]] = {}
    for prompt, success in zip(ids, succeeded, strict=True):
        groups.setdefault(prompt, []).append(success)
    fewest = min(len(group) for group in groups.values())
    out: dict[str, list[float]] = {}
    k = 2
    while k <= fewest:
        chances = {}
        for prompt, group in groups.items():
            chances[prompt] = pass_at(len(group), sum(group), k)
        out[f"pass_at_{k}"] = [chances[prompt] for prompt in ids]
        k *= 2
    return out
