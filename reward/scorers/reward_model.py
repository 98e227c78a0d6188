"""Scores by a reward model, or by several as one score with their disagreement (Coste et al. 2023,
arXiv:2310.02743; Eisenstein et al. 2023, arXiv:2312.09244).
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from conf.choices import Combine, Dtype
from conf.schema import RewardConfig
from reward.base import Stateless, name_prompt, refuse_turns
from reward.model import (
    Holder,
    check_tokenizers,
    load_reward_module,
    load_reward_tokenizer,
    longest_text,
    reader_of,
    same_reading,
    score_rows,
    template_hash,
    text_ids,
)
from rlhf.models.directories import contents
from rlhf.models.encoding import is_chat
from rlhf.models.loading import resolve_dtype
from rlhf.types import NonFiniteScore, Rollout, Scores, UserError


class RewardModelScorer(Stateless):
    """Scores by a reward model, read at the last response token, in float32 at the head.

    Where the reward model has the policy's tokenizer and template, the policy's token ids are
    scored as they are. Otherwise the prompt's messages and the response's text are tokenised again,
    in the format that the reward model was trained on.
    """

    def __init__(
        self,
        path: str,
        reward_cfg: RewardConfig,
        device: torch.device,
        *,
        policy_tokenizer: Any,
        dtype: torch.dtype | None = None,
        key: str = "reward.path",
        holder: Holder | None = None,
    ) -> None:
        """Load the reward model of the directory `path`, which the option `key` holds. holder: how
        the ranks hold it together; None: each of them whole.
        """
        self.tokenizer, self.manifest = load_reward_tokenizer(path, key)
        check_tokenizers(path, self.tokenizer, self.manifest, policy_tokenizer, key)
        self.same_tokenizer = same_reading(self.manifest, policy_tokenizer)
        self.same_template = template_hash(policy_tokenizer) == self.manifest.chat_template_hash
        self.source = f"{key}={path}"
        self.budget = reward_cfg.batch_tokens
        self.device = device
        if dtype is None:
            dtype = resolve_dtype(Dtype.auto)
        self.module: Any = None
        load = functools.partial(self._load, path, dtype, key)
        if holder is not None and contents(str(path), key).is_native:
            holder = None  # an adapter that stays beside its base is put on whole weights
        self.read, self.passes = reader_of(load, device, holder)

    def _load(self, path: str, dtype: torch.dtype, key: str) -> Any:
        self.module = load_reward_module(path, dtype, key)
        self.limit = longest_text(self.module)
        return self.module

    def token_ids(self, rollout: Rollout) -> list[int]:
        """The tokens that the reward model reads: prompt, response, and the end-of-sequence token
        where the policy ended its response.
        """
        prompt, source = rollout.prompt, rollout.prompt.source
        if self.same_tokenizer and (self.same_template or not is_chat(source)):
            return [*prompt.token_ids, *rollout.token_ids]
        refuse_turns(rollout, self.source)
        text: Any = source
        if source is None or (is_chat(source) and not self.manifest.conversational):
            text = prompt.text
        return text_ids(
            self.tokenizer,
            self.manifest,
            text,
            rollout.text,
            finished=not rollout.truncated,
            tools=prompt.tools,
        )

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """The model's scores as one term, reward_model. Raises UserError naming the prompt of a
        text that is too long, or whose score is not finite.
        """
        rows = [self.token_ids(rollout) for rollout in rollouts]
        for rollout, row in zip(rollouts, rows, strict=True):
            if not 0 < len(row) <= self.limit:
                raise UserError(
                    f"{self.source}: {name_prompt(rollout)} with its response has {len(row)} "
                    f"tokens; expected 1 to {self.limit}."
                )
        scores = score_rows(self.read, rows, self.budget, self.device, self.passes)
        for rollout, score in zip(rollouts, scores, strict=True):
            if not math.isfinite(score):
                raise NonFiniteScore(
                    f"{self.source}: the score of a response to {name_prompt(rollout)} is "
                    f"{score}, expected a finite number."
                )
        return Scores(total=scores, terms={"reward_model": list(scores)})


def combine(
    members: Sequence[Sequence[float]], how: Combine, spread_coef: float = 1.0
) -> tuple[list[float], list[float]]:
    """Scores and spreads, [B] each, from the scores of `members` [models][B], which are on one
    scale.

    The spread is the population standard deviation over the models; Combine.pessimistic is mean -
    spread_coef x spread. (Coste et al. subtract the variance, equation 3; the standard deviation
    has the unit of the score, so that the coefficient means the same at every scale.)
    """
    columns = list(zip(*members, strict=True))
    means = [statistics.fmean(column) for column in columns]
    spreads = [statistics.pstdev(column) for column in columns]
    if how is Combine.minimum:
        return [min(column) for column in columns], spreads
    if how is Combine.pessimistic:
        pairs = zip(means, spreads, strict=True)
        return [mean - spread_coef * spread for mean, spread in pairs], spreads
    return means, spreads


class EnsembleScorer(Stateless):
    """Several reward models combined into one score; extras hold their `spread`.

    Zero and unit of a reward model's scores are arbitrary, because only differences were trained.
    So each score is first put on the scale of the model's held-out texts: (score - score_mean) /
    score_std of its manifest. Otherwise the minimum would always be that of the same model.
    """

    def __init__(
        self, members: Sequence[RewardModelScorer], how: Combine, spread_coef: float
    ) -> None:
        """Raises UserError for a member without held-out scores, or whose don't differ."""
        for member in members:
            if member.manifest.held_out_texts == 0:
                raise UserError(
                    f"{member.source}: it was trained without held-out pairs "
                    "(data.eval_fraction=0), so its scores can't be put on one scale with those "
                    "of the other models of the ensemble. Train it with data.eval_path."
                )
            spread = member.manifest.score_std
            if not (math.isfinite(spread) and spread > 0):
                raise UserError(
                    f"{member.source}: its score_std over held-out texts is {spread}, so it can't "
                    "be put on one scale with the other models of the "
                    "ensemble. Expected: a reward model whose scores differ."
                )
        self.members, self.how, self.spread_coef = list(members), how, spread_coef

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """The combined scores, in standard deviations of held-out texts. Raises UserError as the
        members do.
        """
        scaled = []
        for member in self.members:
            mean, std = member.manifest.score_mean, member.manifest.score_std
            scaled.append([(score - mean) / std for score in member.score(rollouts).total])
        total, spread = combine(scaled, self.how, self.spread_coef)
        return Scores(total=total, terms={"ensemble": list(total)}, extras={"spread": spread})
