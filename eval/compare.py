"""Compares two policies' responses to the same prompts: figures before and after, and each
difference with its confidence interval. Pure functions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.episodes import episode_figures
from eval.statistics import Interval, bootstrap_mean, distinct_n, paired_difference, per_prompt
from rlhf.types import Rollout

DISTINCT = 2  # n of the diversity figure


@dataclass(frozen=True, slots=True)
class Answers:
    """A policy's responses, [B], and for each judge a list of B numbers; the reward model's list is
    called `score`.
    """

    rollouts: list[Rollout]
    judgements: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure of both policies, with the interval of the difference; None for a figure that is not
    an average over responses.
    """

    name: str
    before: float
    after: float
    interval: Interval | None

    @property
    def delta(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures of an evaluation."""

    differences: list[Difference]
    # change of the score, in standard deviations of the scores before; None without a score
    score_shift: Interval | None
    kl_per_token: float  # nats, KL(after || before) over the tokens that `after` wrote
    kl_per_response: Interval  # nats, summed over a response

    def metrics(self) -> dict[str, float]:
        """The figures by flat names: eval/<figure>_before, _after, _delta, and _low and _high, the
        bounds of the difference's 95 % interval.
        """
        out: dict[str, float] = {}
        for d in self.differences:
            out |= {
                f"eval/{d.name}_before": d.before,
                f"eval/{d.name}_after": d.after,
                f"eval/{d.name}_delta": d.delta,
            }
            if d.interval is not None:
                out |= {
                    f"eval/{d.name}_low": d.interval.low,
                    f"eval/{d.name}_high": d.interval.high,
                }
            if d.name == f"distinct_{DISTINCT}":
                out[f"eval/{d.name}_ratio"] = d.after / d.before if d.before else math.nan
        if self.score_shift is not None:
            shift = self.score_shift
            out |= {
                "eval/score_shift_sd": shift.estimate,
                "eval/score_shift_sd_low": shift.low,
                "eval/score_shift_sd_high": shift.high,
            }
        kl = self.kl_per_response
        out |= {"eval/kl_per_token": self.kl_per_token, "eval/kl_per_response": kl.estimate}
        return out | {"eval/kl_per_response_low": kl.low, "eval/kl_per_response_high": kl.high}


def compare(
    before: Answers, after: Answers, kl: Sequence[float], *, resamples: int, seed: int
) -> Comparison:
    """The figures of both policies.

    `kl` [B]: nats of each response of `after`, summed over its tokens. Raises ValueError unless
    both answered the same prompts in the same order, and were judged by the same judges.
    """
    ids = [rollout.prompt.id for rollout in before.rollouts]
    if ids != [rollout.prompt.id for rollout in after.rollouts]:
        raise ValueError("before and after must answer the same prompts in the same order")
    if before.judgements.keys() != after.judgements.keys():
        raise ValueError(
            f"before and after have different judges: {sorted(before.judgements)} and "
            f"{sorted(after.judgements)}"
        )

    def averaged(name: str, old: Sequence[float], new: Sequence[float]) -> Difference:
        interval = paired_difference(old, new, ids, resamples=resamples, seed=seed)
        return Difference(
            name, float(per_prompt(old, ids).mean()), float(per_prompt(new, ids).mean()), interval
        )

    differences = [
        averaged(name, before.judgements[name], after.judgements[name])
        for name in before.judgements
    ]
    differences.append(averaged("length", lengths(before.rollouts), lengths(after.rollouts)))
    differences.append(averaged("finished", finished(before.rollouts), finished(after.rollouts)))
    figures, theirs = episode_figures(before.rollouts), episode_figures(after.rollouts)
    for name in [name for name in figures if name in theirs]:
        differences.append(averaged(name, figures[name], theirs[name]))
    differences.append(
        Difference(
            f"distinct_{DISTINCT}", distinct(before.rollouts), distinct(after.rollouts), None
        )
    )
    score = next((d for d in differences if d.name == "score"), None)
    tokens = sum(rollout.length for rollout in after.rollouts)
    return Comparison(
        differences=differences,
        score_shift=None if score is None else _in_deviations(score, before.judgements["score"]),
        kl_per_token=math.fsum(kl) / tokens if tokens else math.nan,
        kl_per_response=bootstrap_mean(per_prompt(kl, ids), resamples=resamples, seed=seed),
    )


def _in_deviations(score: Difference, before: Sequence[float]) -> Interval | None:
    """The score's difference divided by the standard deviation of the scores before; None where
    they don't vary.
    """
    deviation = float(np.std(np.asarray(before, dtype=np.float64)))
    if score.interval is None or deviation == 0:
        return None
    return Interval(
        score.delta / deviation, score.interval.low / deviation, score.interval.high / deviation
    )


def lengths(rollouts: Sequence[Rollout]) -> list[float]:
    """Tokens that the policy wrote in each response, the end-of-sequence token included."""
    return [float(rollout.length) for rollout in rollouts]


def finished(rollouts: Sequence[Rollout]) -> list[float]:
    """1 where the policy or its environment ended the response, 0 where a limit did."""
    return [float(not rollout.truncated) for rollout in rollouts]


def distinct(rollouts: Sequence[Rollout]) -> float:
    """Distinct word pairs divided by all word pairs of the responses."""
    return distinct_n([rollout.text.split() for rollout in rollouts], DISTINCT)


def side_by_side(
    before: Answers, after: Answers, kl: Sequence[float]
) -> list[Mapping[str, object]]:
    """Rows of samples.jsonl, one for each pair of responses: prompt, both responses, figures."""
    rows: list[Mapping[str, object]] = []
    for i, (old, new) in enumerate(zip(before.rollouts, after.rollouts, strict=True)):
        row: dict[str, object] = {
            "prompt": old.prompt.text,
            "response_before": old.text,
            "response": new.text,
        }
        for name in before.judgements:
            row |= {f"{name}_before": before.judgements[name][i], name: after.judgements[name][i]}
        rows.append(
            row
            | {
                "kl": kl[i],
                "response_length": new.length,
                "finish_reason": new.finish_reason,
            }
        )
    return rows
