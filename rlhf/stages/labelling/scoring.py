"""Scores of answers by the reward: those of rollouts, and those of answers that no policy wrote."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from conf.schema import ModelConfig, RewardConfig
from reward.terms import make_scorer
from rlhf.labels.asking import Question
from rlhf.models.encoding import answer_ids, prompt_ids
from rlhf.models.loading import load_tokenizer
from rlhf.process import distributed
from rlhf.types import Prompt, Rollout, Scores, UserError


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerScore:
    """What the reward says of an answer; None without a reward."""

    total: float | None = None
    spread: float | None = None  # standard deviation, where a term is an ensemble


def score(reward: RewardConfig, rollouts: Sequence[Rollout], tokenizer: Any) -> list[AnswerScore]:
    """What the reward says of each rollout. The reward is loaded for this call and freed after
    it.
    """
    if reward.path is None and reward.function is None and not reward.terms:
        return [AnswerScore()] * len(rollouts)
    scorer = make_scorer(
        reward, device=distributed.device(), policy_tokenizer=tokenizer, training=False
    )
    scores = scorer.score(rollouts)
    weights = {name: term.weight for name, term in reward.terms.items()}
    spreads: Sequence[float | None] = spread_of(scores, weights) or [None] * len(rollouts)
    return [AnswerScore(total, spread) for total, spread in zip(scores.total, spreads, strict=True)]


def spread_of(scores: Scores, weights: Mapping[str, float]) -> list[float] | None:
    """Standard deviation of each total, from those of the terms that are ensembles, which are taken
    to be independent; None where no term is an ensemble.
    """
    parts = []
    for name, weight in weights.items():
        spreads = scores.extras.get(f"{name}_spread")
        if spreads is not None:
            parts.append([weight * value for value in spreads])
    if not parts:
        return None
    return [math.hypot(*row) for row in zip(*parts, strict=True)]


def score_questions(
    questions: Sequence[Question],
    policy: ModelConfig,
    chat_template: str | None,
    reward: RewardConfig,
) -> list[Question]:
    """Questions whose answers no policy wrote, with the scores that the reward gives them as
    answers of `policy`. Raises UserError as the reward does, and for episodes.
    """
    for question in questions:
        if any(answer.episode for answer in question.answers):
            raise UserError(
                f"task {question.origin or question.id} asks about episodes, which no reward model "
                "reads as one text. Leave out reward.path and reward.terms."
            )
    tokenizer = load_tokenizer(policy, chat_template)
    rollouts = []
    for question in questions:
        ids = tuple(prompt_ids(tokenizer, question.prompt, question.tools))
        text = question.prompt if isinstance(question.prompt, str) else tokenizer.decode(ids)
        prompt = Prompt(question.id, text, ids, source=question.prompt, tools=question.tools)
        for answer in question.answers:
            tokens = answer_ids(tokenizer, question.prompt, answer.text, question.tools)
            rollouts.append(Rollout(prompt, answer.text, tokens, [], "stop", 0))
    scores = iter(score(reward, rollouts, tokenizer))
    scored = []
    for question in questions:
        answers = []
        for answer in question.answers:
            scored_answer = next(scores)
            answers.append(
                dataclasses.replace(answer, score=scored_answer.total, spread=scored_answer.spread)
            )
        scored.append(dataclasses.replace(question, answers=tuple(answers)))
    return scored
