"""Watching a reward from outside while it trains: rules over the steps of a run that warn or stop.

A policy that is trained against a proxy first improves what the proxy stands for and then only the
proxy (Gao, Schulman & Hilton 2022, arXiv:2210.10760). What shows it is a judge that training never
sees, on responses to prompts that it never sees either.

Each rule is a pure function: it returns a message where it holds, else None. `Watch` remembers what
the rules compare.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.choices import Action, Rule
from conf.stages import WatchConfig
from rlhf.online.metrics import correlation, markup_share
from rlhf.process import distributed
from rlhf.types import Rollout, Scores

# rlhf.process.distributed.gather: one value per rank, on every rank
Gather = Callable[[Any], list[Any]]
_LIMITS = ("length", "turns", "time")  # what may end a response beside its policy and environment
_MOST_TURNS = 8  # that have a return of their own in the metrics


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """What held-out responses are worth, one entry per prompt: the same prompts in the same order
    each time.
    """

    scores: list[float]  # the judge's
    proxies: list[float]  # of the reward that trains, on the same responses
    lengths: list[int]  # tokens
    truncated: list[bool]

    def metrics(self) -> dict[str, float]:
        """Means, and the judge's standard error over the prompts."""
        return {
            "judge/score": statistics.fmean(self.scores),
            "judge/score_se": statistics.stdev(self.scores) / math.sqrt(len(self.scores)),
            "judge/proxy": statistics.fmean(self.proxies),
            "judge/length": statistics.fmean(self.lengths),
            "judge/truncated": statistics.fmean(self.truncated),
        }


@dataclass(frozen=True, slots=True)
class Alarm:
    """A rule that began to hold."""

    rule: Rule
    action: Action
    step: int  # updates done
    message: str


@dataclass(slots=True)
class Point:
    """One state of the policy on the frontier of score against KL; None where it was not
    measured.
    """

    step: int  # updates done
    kl: float | None = None  # nats per response
    score: float | None = None  # the reward that trains
    judge: float | None = None


@dataclass(frozen=True, slots=True)
class Trend:
    """Mean slope per step over the held-out prompts, and its standard error."""

    slope: float
    error: float

    @property
    def errors(self) -> float:
        """The slope in standard errors; infinite where all prompts agree."""
        if self.error:
            return self.slope / self.error
        return math.copysign(math.inf, self.slope) if self.slope else 0.0


def slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line; exactly 0 for values that are all equal, which rounding
    would give a sign.
    """
    if min(values) == max(values):
        return 0.0
    return statistics.linear_regression(steps, values).slope


def trend(steps: Sequence[int], values: Sequence[Sequence[float]]) -> Trend:
    """A line is fitted to each prompt's values by least squares; its slopes are averaged over the
    prompts.

    steps [K], values [K][prompts]. The standard error is that of the prompts' slopes, not of one
    line's residuals: judgements are few, and with three of them a line's residuals have one degree
    of freedom, while prompts are many and independent, and each is compared with itself (summary
    measures: Matthews, Altman, Campbell & Royston 1990, BMJ 300:230).
    """
    slopes = [slope(steps, series) for series in zip(*values, strict=True)]
    return Trend(statistics.fmean(slopes), statistics.stdev(slopes) / math.sqrt(len(slopes)))


Judged = tuple[int, HeldOutScores]  # after so many updates


def divergence(judgements: Sequence[Judged], standard_errors: float, best_step: int) -> str | None:
    """The proxy rises and the judge falls over `judgements`, each by at least `standard_errors`.
    `best_step`: when the judge was highest, for the message.
    """
    steps = [step for step, _ in judgements]
    proxy = trend(steps, [scores.proxies for _, scores in judgements])
    judge = trend(steps, [scores.scores for _, scores in judgements])
    rises = proxy.slope > 0 and proxy.errors >= standard_errors
    falls = judge.slope < 0 and -judge.errors >= standard_errors
    if not (rises and falls):
        return None
    return (
        f"over the judgements of steps {', '.join(map(str, steps))} the score rose by "
        f"{proxy.slope:.3g} a step ({proxy.errors:.1f} standard errors) while the held-out judge "
        f"fell by {-judge.slope:.3g} a step ({-judge.errors:.1f} standard errors): the policy "
        f"exploits the reward. The judge was highest at step {best_step}."
    )


def high_kl(kl: float, limit: float) -> str | None:
    """The KL, in nats per response, is above `limit`."""
    if kl <= limit:
        return None
    return f"objective/kl is {kl:.3g} nats per response, above stage.watch.kl_max={limit:g}."


def long_responses(truncated: Sequence[float], limit: float) -> str | None:
    """Over these steps at least the share `limit` of the responses was cut off; `truncated`: the
    share of each step.
    """
    share = statistics.fmean(truncated)
    if share < limit:
        return None
    return (
        f"{share:.0%} of the responses of the last {len(truncated)} steps were cut off at "
        f"rollout.max_response_length (stage.watch.length_share={limit:g})."
    )


def low_entropy(entropy: float, first: Sequence[float], share: float) -> str | None:
    """The entropy is below `share` of its mean over the first steps; all in nats per token."""
    start = statistics.fmean(first)
    if entropy >= share * start:
        return None
    return (
        f"objective/entropy is {entropy:.3g} nats per token, below "
        f"stage.watch.entropy_share={share:g} of the {start:.3g} of the first {len(first)} steps."
    )


class Watch:
    """The rules over one run. Every rank feeds it the same figures, so all ranks raise the same
    alarms.

    divergence: over the last ``divergence_judgements`` judgements the proxy rises and the judge
    falls, each by ``divergence_sd`` standard errors. kl: a step's objective/kl is above ``kl_max``.
    length: of the responses of the last ``window`` steps at least ``length_share`` were cut off.
    entropy: a step's objective/entropy is below ``entropy_share`` of the mean over the first
    ``window`` steps. A rule is reported when it begins to hold, and again only after it had stopped
    holding.
    """

    def __init__(self, cfg: WatchConfig) -> None:
        self.cfg = cfg
        self.points: dict[int, Point] = {}  # by step
        self._judgements: list[Judged] = []  # the last cfg.divergence_judgements
        self._truncated: list[float] = []  # shares of the last cfg.window steps
        self._first_entropies: list[float] = []  # of the first cfg.window steps
        self._holding: set[Rule] = set()

    @property
    def best_step(self) -> int | None:
        """The last of the judged steps at which the judge was highest: of two that it values alike
        the later one has the higher score.
        """
        judged = [
            (point.judge, step) for step, point in self.points.items() if point.judge is not None
        ]
        return max(judged)[1] if judged else None

    def judged(self, step: int, judgement: HeldOutScores) -> list[Alarm]:
        """The policy after `step` updates was judged (0: before the first)."""
        self._point(step).judge = statistics.fmean(judgement.scores)
        # A resumed run may have been told to judge more prompts: only the same prompts make a
        # trend.
        alike = [
            (earlier_step, earlier)
            for earlier_step, earlier in self._judgements
            if len(earlier.scores) == len(judgement.scores)
        ]
        self._judgements = [*alike, (step, judgement)][-self.cfg.divergence_judgements :]
        message = None
        best = self.best_step
        if len(self._judgements) == self.cfg.divergence_judgements and best is not None:
            message = divergence(self._judgements, self.cfg.divergence_sd, best)
        return self._report(Rule.divergence, self.cfg.divergence, step, message)

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Update number `step` was made; `metrics` are those of its rollouts, which the policy
        after `step` - 1 updates wrote.
        """
        point = self._point(step - 1)
        point.kl, point.score = metrics.get("objective/kl"), metrics["objective/scores"]
        length = self._length(metrics["reward/truncated"])
        alarms = self._report(Rule.length, self.cfg.length, step, length)
        # nothing trained in this step, so neither KL nor entropy was measured
        if "objective/entropy" not in metrics:
            return alarms
        kl = None
        if point.kl is not None:  # without a reference there is no KL, and preflight refuses
            kl = high_kl(point.kl, self.cfg.kl_max)
        entropy = self._entropy(metrics["objective/entropy"])
        return [
            *self._report(Rule.kl, self.cfg.kl, step, kl),
            *alarms,
            *self._report(Rule.entropy, self.cfg.entropy, step, entropy),
        ]

    def _point(self, step: int) -> Point:
        return self.points.setdefault(step, Point(step))

    def _report(self, rule: Rule, action: Action, step: int, message: str | None) -> list[Alarm]:
        """An alarm where `message` says that the rule holds and it did not hold before."""
        if message is None or action is Action.off:
            self._holding.discard(rule)
            return []
        if rule in self._holding:
            return []
        self._holding.add(rule)
        return [Alarm(rule, action, step, message)]

    def _length(self, truncated: float) -> str | None:
        self._truncated = [*self._truncated, truncated][-self.cfg.window :]
        if len(self._truncated) < self.cfg.window:
            return None
        return long_responses(self._truncated, self.cfg.length_share)

    def _entropy(self, entropy: float) -> str | None:
        if len(self._first_entropies) < self.cfg.window:
            self._first_entropies.append(entropy)
            return None
        return low_entropy(entropy, self._first_entropies, self.cfg.entropy_share)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; JSON keeps every number exactly."""
        return {
            "points": [[p.step, p.kl, p.score, p.judge] for p in self.points.values()],
            "judgements": [
                [step, j.scores, j.proxies, j.lengths, j.truncated] for step, j in self._judgements
            ],
            "truncated": list(self._truncated),
            "first_entropies": list(self._first_entropies),
            "holding": sorted(rule.value for rule in self._holding),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points = {values[0]: Point(*values) for values in state["points"]}
        self._judgements = [(step, HeldOutScores(*values)) for step, *values in state["judgements"]]
        self._truncated = list(state["truncated"])
        self._first_entropies = list(state["first_entropies"])
        self._holding = {Rule(name) for name in state["holding"]}


# ---- what the rules compare, of one step's responses ----


@dataclass(frozen=True, slots=True)
class _Response:
    """What the statistics need of one response; small, since ranks exchange it."""

    prompt: str
    score: float
    tokens: int
    finished: bool
    markup: float
    reason: str  # why it ended
    observed: int  # tokens that an environment wrote
    rewards: tuple[float, ...]  # of an episode's turns
    took_s: float  # its environment, all turns
    success: bool | None
    info: dict[str, float]  # what the environment counted


def response_statistics(
    rollouts: Sequence[Rollout],
    scores: Scores,
    turn_discount: float = 1.0,
    gather: Gather = distributed.gather,
) -> dict[str, float]:
    """Figures of one step's responses over all ranks; one collective. Every rank computes them from
    the same rows, so ranks agree exactly.

    reward/length_correlation, reward/finished_correlation, reward/format_correlation: of the score
    with the tokens of a response, with having ended by itself, with its share of punctuation and
    markdown. reward/truncated: share cut off by a limit. group/std: mean over the prompts
    of the standard deviation of their responses' scores (dividing by their number). group/gain:
    mean over the prompts of the best score less the mean. Of episodes also what `_episode_figures`
    tells.
    """
    own = [
        _Response(
            prompt=r.prompt.id,
            score=score,
            tokens=r.length,
            finished=not r.truncated,
            markup=markup_share(r.text),
            reason=r.finish_reason,
            observed=len(r.token_ids) - r.length,
            rewards=tuple(turn.reward for turn in r.turns),
            took_s=math.fsum(turn.took_s for turn in r.turns),
            success=r.success,
            info=r.info,
        )
        for r, score in zip(rollouts, scores.total, strict=True)
    ]
    rows = [row for part in gather(own) for row in part]
    totals = [row.score for row in rows]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row.score)
    figures = {
        "reward/length_correlation": correlation(totals, [float(row.tokens) for row in rows]),
        "reward/finished_correlation": correlation(totals, [float(row.finished) for row in rows]),
        "reward/format_correlation": correlation(totals, [row.markup for row in rows]),
        "reward/truncated": statistics.fmean(not row.finished for row in rows),
        "group/std": statistics.fmean(statistics.pstdev(g) for g in groups.values()),
        "group/gain": statistics.fmean(max(g) - statistics.fmean(g) for g in groups.values()),
    }
    return figures | _episode_figures(rows, turn_discount)


def _episode_figures(rows: Sequence[_Response], turn_discount: float) -> dict[str, float]:
    """Figures of the episodes among `rows`; none where there is none.

    rollout/turns: turns of an episode. rollout/observed_tokens: tokens of an episode that its
    environment wrote. rollout/ended_<limit>: share of episodes that it ended. environment/success:
    share of those that say so. environment/<name>: what it counted, per episode. turn/reward: mean
    over turns. time/environment_turn_s: seconds that the environment took for a turn, mean.
    turn/return_<k>: rewards from turn k on, each later turn's discounted once more,
    mean over the episodes that have the turn.
    """
    episodes = [row for row in rows if row.rewards]
    if not episodes:
        return {}
    every = [reward for row in episodes for reward in row.rewards]
    figures = {
        "rollout/turns": statistics.fmean(len(row.rewards) for row in episodes),
        "rollout/observed_tokens": statistics.fmean(row.observed for row in episodes),
        "turn/reward": statistics.fmean(every),
        "time/environment_turn_s": math.fsum(row.took_s for row in episodes) / len(every),
    }
    for limit in _LIMITS:
        share = statistics.fmean(row.reason == limit for row in episodes)
        figures[f"rollout/ended_{limit}"] = share
    known = [row.success for row in episodes if row.success is not None]
    if known:
        figures["environment/success"] = statistics.fmean(known)
    for name in sorted(set().union(*(row.info for row in episodes))):
        counted = statistics.fmean(row.info.get(name, 0.0) for row in episodes)
        figures[f"environment/{name}"] = counted
    returns = [_returns(row.rewards, turn_discount) for row in episodes]
    for k in range(min(_MOST_TURNS, max(map(len, returns)))):
        reached = [values[k] for values in returns if len(values) > k]
        figures[f"turn/return_{k + 1}"] = statistics.fmean(reached)
    return figures


def _returns(rewards: Sequence[float], discount: float) -> list[float]:
    """The discounted sum of the rewards from each turn on."""
    out: list[float] = []
    to_come = 0.0
    for reward in reversed(rewards):
        to_come = reward + discount * to_come
        out.append(to_come)
    return out[::-1]
