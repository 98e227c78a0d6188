"""The figures of one online step over all ranks, the rows of samples.jsonl, and the figures of a
whole run.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from conf.choices import KLEstimator
from conf.stages import OnlineStage
from policy.advantages import all_equal, rows_by_group
from policy.kl import kl_per_token
from policy.losses import importance_ratios
from policy.prepare import TrainBatch, correction
from rlhf.online.collect import Collected
from rlhf.process import distributed
from rlhf.types import Rollout, TrainingDiverged

_TERM = "term:"
_WINDOW = 5  # at most so many steps at each end of a run are averaged for its summary
_LEAST_VARIANCE = 1e-12  # of the returns, in squared units of the score, to explain any of it


def step_metrics(
    collected: Collected,
    batch: TrainBatch,
    estimator: KLEstimator,
    gap_tail: float,
) -> dict[str, float]:
    """Means over all ranks: scores and lengths over every response, logprobs and KL over those that
    train; gaps of sampler and trainer over tokens that the newest weights wrote, none where there
    is no such token. `gap_tail`: gaps in nats above it are counted. Collective.
    """
    members = rows_by_group(collected.groups)
    sizes = [len(rows) for rows in members]
    finals = collected.finals.tolist()
    sums = _response_sums(collected) | _token_sums(batch, estimator) | _value_sums(batch)
    fresh = _fresh(batch)
    gaps = torch.where(fresh, _gaps(batch), 0.0)
    sums["gap"], sums["gap_above"] = float(gaps.sum()), float((gaps > gap_tail).sum())
    sums["compared"] = float(fresh.sum())
    sums["groups"] = float(len(members))
    sums["equal"] = float(sum(all_equal(finals, rows) for rows in members))
    totals = dict(zip(sums, distributed.all_sum(list(sums.values())), strict=True))
    largest_gap, slowest_s, largest, smallest = distributed.all_max(
        [float(gaps.max()), collected.seconds, float(max(sizes)), -float(min(sizes))]
    )
    n = totals["responses"]
    mean = totals["scores"] / n
    metrics = {
        "objective/scores": mean,
        "objective/scores_std": math.sqrt(max(0.0, totals["scores_square"] / n - mean**2)),
        "rollout/response_length": totals["tokens"] / n,
        "rollout/response_tokens": totals["tokens"],
        "rollout/trained_responses": totals["trained"],
        "rollout/trained_tokens": totals["trained_tokens"],
        "rollout/finished": totals["finished"] / n,
        "rollout/draws": float(collected.draws),
        "rollout/tokens_per_s": totals["tokens"] / max(slowest_s, 1e-9),
        "group/equal": totals["equal"] / totals["groups"],
        "group/size_min": -smallest,
        "group/size_max": largest,
    }
    compared = totals["compared"]
    if compared or batch.staleness is None:
        metrics["rollout/logprob_gap"] = largest_gap
        metrics["rollout/logprob_gap_mean"] = totals["gap"] / max(compared, 1.0)
        metrics["rollout/logprob_gap_above"] = totals["gap_above"] / max(compared, 1.0)
    if batch.staleness is not None:
        metrics["ahead/fresh_tokens"] = compared
    metrics |= _trained_means(totals)
    for name, value in totals.items():
        if name.startswith(_TERM):
            metrics[f"reward/{name.removeprefix(_TERM)}"] = value / n
    metrics["reward/clipped"] = collected.clipped
    return metrics


def _response_sums(collected: Collected) -> dict[str, float]:
    """Over every response of this rank."""
    rollouts, scores = collected.rollouts, collected.scores
    total = torch.tensor(scores.total, dtype=torch.float64)
    sums = {
        "responses": float(len(rollouts)),
        "tokens": float(sum(r.length for r in rollouts)),
        "scores": float(total.sum()),
        "scores_square": float(total.square().sum()),
        "finished": float(sum(not r.truncated for r in rollouts)),
    }
    for name, values in {**scores.terms, **scores.extras}.items():
        sums[_TERM + name] = math.fsum(values)
    return sums


def _token_sums(batch: TrainBatch, estimator: KLEstimator) -> dict[str, float]:
    """Over this rank's rows and tokens that train."""
    mask = batch.train_mask
    assert batch.entropy is not None
    sums = {
        "trained": float(batch.keep.sum()),
        "trained_tokens": float(mask.sum()),
        "rlhf_reward": float(batch.rewards[batch.keep].sum()),
        "entropy": float(torch.where(mask, batch.entropy, 0.0).sum()),
    }
    kl = _kl(batch, estimator)
    if kl is not None:
        sums["kl"] = float(kl.sum())
    return sums


def _value_sums(batch: TrainBatch) -> dict[str, float]:
    """What the critic's explained variance is made of, over this rank's tokens that train."""
    if batch.returns is None or batch.values is None:
        return {}
    mask = batch.train_mask
    returns = batch.returns[mask].double()
    residual = (batch.returns - batch.values)[mask].double()
    return {
        "returns": float(returns.sum()),
        "returns_square": float(returns.square().sum()),
        "residual": float(residual.sum()),
        "residual_square": float(residual.square().sum()),
    }


def _kl(batch: TrainBatch, estimator: KLEstimator) -> Tensor | None:
    """KL of each token that trains [B, T] nats, 0 elsewhere; None without a reference."""
    if batch.ref_logprobs is None or batch.old_logprobs is None:
        return None
    kl = kl_per_token(batch.old_logprobs, batch.ref_logprobs, estimator)
    return torch.where(batch.train_mask, kl, 0.0)


def _gaps(batch: TrainBatch) -> Tensor:
    """Absolute differences [B, T] in nats between the sampler's logprobs and the trainer's, 0 where
    a token doesn't train.
    """
    assert batch.old_logprobs is not None
    gap = (batch.rollout_logprobs - batch.old_logprobs).abs()
    return torch.where(batch.train_mask, gap, 0.0)


def _fresh(batch: TrainBatch) -> Tensor:
    """[B, T] bool: tokens that train, written by the weights that they train."""
    if batch.staleness is None:
        return batch.train_mask
    return batch.train_mask & (batch.staleness == 0)


def stale_metrics(batch: TrainBatch, stage: OnlineStage) -> dict[str, float]:
    """How many versions the tokens that train are behind, how far the policy has moved since, and
    the weights that correct for it, over all ranks. Collective.

    ahead/ess is the effective sample size, the square of the weights' sum over the sum of their
    squares, as a share of the tokens.
    """
    mask = batch.train_mask
    assert batch.staleness is not None and batch.old_logprobs is not None
    behind = torch.where(mask, batch.staleness, 0.0)
    old, sampled = batch.old_logprobs, batch.rollout_logprobs
    sums = {"tokens": float(mask.sum()), "behind": float(behind.sum())}
    largest = {"staleness": float(behind.max()), "gap": float(_gaps(batch).max())}
    weights = correction(stage, old, sampled, mask)
    if weights is not None:
        ratios = importance_ratios(old, sampled, stage.importance_level, mask)
        applied = weights[mask].double()
        sums["weight"], sums["square"] = float(applied.sum()), float(applied.square().sum())
        sums["cut"] = float((weights != ratios)[mask].sum())
        largest["weight"] = float(torch.where(mask, ratios, 0.0).max())
    totals = dict(zip(sums, distributed.all_sum(list(sums.values())), strict=True))
    most = dict(zip(largest, distributed.all_max(list(largest.values())), strict=True))
    tokens = max(totals["tokens"], 1.0)
    figures = {
        "ahead/staleness": totals["behind"] / tokens,
        "ahead/staleness_max": most["staleness"],
        "ahead/moved": most["gap"],
    }
    if weights is not None:
        figures["ahead/weight"] = totals["weight"] / tokens
        figures["ahead/weight_max"] = most["weight"]
        figures["ahead/weight_cut"] = totals["cut"] / tokens
        squares = max(totals["square"], 1e-12)
        figures["ahead/ess"] = totals["weight"] ** 2 / (squares * tokens)
    return figures


def _trained_means(totals: Mapping[str, float]) -> dict[str, float]:
    """Means over the responses and tokens of all ranks that train.

    Where none is left to train there is nothing to take a mean of, and 0 would look like a
    collapse.
    """
    responses, tokens = max(totals["trained"], 1.0), max(totals["trained_tokens"], 1.0)
    metrics = {}
    if totals["trained_tokens"]:
        metrics["objective/rlhf_reward"] = totals["rlhf_reward"] / responses
        metrics["objective/entropy"] = totals["entropy"] / tokens
        if "kl" in totals:
            metrics["objective/kl"] = totals["kl"] / responses
            metrics["objective/kl_per_token"] = totals["kl"] / tokens
    if "returns" in totals:
        spread = totals["returns_square"] / tokens - (totals["returns"] / tokens) ** 2
        left = totals["residual_square"] / tokens - (totals["residual"] / tokens) ** 2
        explained = 0.0
        if spread > _LEAST_VARIANCE:
            explained = 1.0 - left / spread
        metrics["value/explained_variance"] = explained
    return metrics


def sample_rows(
    collected: Collected, batch: TrainBatch, estimator: KLEstimator, *, step: int, count: int
) -> list[dict[str, object]]:
    """The rows of samples.jsonl: this rank's first `count` responses of update number `step`, with
    their scores and, where they train, their KL (nats per response).
    """
    kl: dict[int, float] = {}
    per_token = _kl(batch, estimator)
    if per_token is not None:
        summed = per_token.sum(1)
        kl = {row: float(summed[i]) for i, row in enumerate(collected.rows)}
    columns = {**collected.scores.terms, **collected.scores.extras}
    rows: list[dict[str, object]] = []
    for i, rollout in enumerate(collected.rollouts[:count]):
        row: dict[str, object] = {
            "step": step,
            "prompt": rollout.prompt.text,
            "response": rollout.text,
            "score": collected.scores.total[i],
        }
        row |= {name: values[i] for name, values in columns.items()}
        row |= {
            "kl": kl.get(i),
            "response_length": rollout.length,
            "finish_reason": rollout.finish_reason,
        }
        if rollout.turns:
            row |= {"success": rollout.success, "turns": turn_rows(rollout)}
        if rollout.prompt.images:
            row["images"] = [picture["path"] for picture in rollout.prompt.images]
        rows.append(row)
    return rows


def turn_rows(rollout: Rollout) -> list[dict[str, object]]:
    """What an episode's policy and its environment wrote, in turn, with the rewards of turns."""
    rows: list[dict[str, object]] = []
    for turn in rollout.turns:
        rows.append({"role": "assistant", "text": turn.text, "reward": turn.reward})
        if turn.observation:
            said = {"text": turn.observation, "said": turn.said}
            rows.append({"role": "environment", **said})
    return rows


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's coefficient, in [-1, 1].

    0 where one side is constant, or there is one value only: the coefficient is then 0 / 0, and
    what never varies goes with nothing.
    """
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return 0.0
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:  # it varies by so little that the squares vanish
        return 0.0


def markup_share(text: str) -> float:
    """Share of characters that are neither letters, digits nor white space: punctuation and
    markdown, in [0, 1]; 0 for an empty text.
    """
    if not text:
        return 0.0
    return sum(not (c.isalnum() or c.isspace()) for c in text) / len(text)


def window(steps: int) -> int:
    """How many steps at each end of a run of `steps` are averaged for its summary."""
    return max(1, min(_WINDOW, steps // 2))


def run_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of a whole run for summary.json: each metric's mean over the last steps, and under
    ``<name>_first`` over the first. Raises TrainingDiverged where every step was left out.
    """
    size = window(len(history))
    metrics = {}
    for name in sorted(set().union(*history)):
        for key, part in ((f"{name}_first", history[:size]), (name, history[-size:])):
            # a step without an update has no figures of it
            values = [step[name] for step in part if name in step]
            if values:
                metrics[key] = sum(values) / len(values)
    if "objective/scores" not in metrics:
        raise TrainingDiverged(
            f"none of the {len(history)} steps had finite scores: each was left out "
            "(stage.on_nonfinite=skip)."
        )
    gaps = [step["rollout/logprob_gap"] for step in history if "rollout/logprob_gap" in step]
    if gaps:  # a step ahead of which all was written has none
        metrics["rollout/logprob_gap_max"] = max(gaps)
    metrics["train/skipped_total"] = sum(
        step.get("train/skipped", 0.0) + step.get("policy/skipped", 0.0) for step in history
    )
    return metrics


def closing_figures(metrics: Mapping[str, float], steps: int) -> dict[str, str]:
    """Lines of the closing panel; `steps` at each end of the run were averaged."""
    figures = {
        f"score, first {steps} steps": f"{metrics['objective/scores_first']:.3f}",
        f"score, last {steps} steps": f"{metrics['objective/scores']:.3f}",
    }
    if "objective/kl" in metrics:
        figures["KL per response (nats)"] = f"{metrics['objective/kl']:.2f}"
    gap = metrics.get("rollout/logprob_gap_max")
    if gap is not None:
        figures["largest sampler-trainer gap (nats)"] = f"{gap:.1e}"
    return figures
