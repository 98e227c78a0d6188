"""Looking at a reward from outside while it trains: statistics of one step's responses, and rules
over the steps that warn or stop.

A policy that is trained against a proxy first improves what the proxy stands for and then only the
proxy (Gao, Schulman & Hilton 2022, arXiv:2210.10760). What shows it is a judge that training never
sees, on responses to prompts that it never sees either.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.choices import Action, Rule
from conf.stages import WatchConfig
from rlhf.process import distributed
from rlhf.types import Rollout, Scores

# rlhf.process.distributed.gather: one value per rank, on every rank
Gather = Callable[[Any], list[Any]]


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
    return sum(not (c.isalnum() or c.isspace()) for c in text) / len(text) if text else 0.0


@dataclass(frozen=True, slots=True)
class _Response:
    """What the statistics need of one response; small, since ranks exchange it."""

    prompt: str
    score: float
    tokens: int
    finished: bool
    markup: float


def response_statistics(
    rollouts: Sequence[Rollout], scores: Scores, gather: Gather = distributed.gather
) -> dict[str, float]:
    """Figures of one step's responses over all ranks; one collective. Every rank computes them from
    the same rows, so ranks agree exactly.

    reward/length_correlation, reward/finished_correlation, reward/format_correlation: of the score
    with the tokens of a response, with having ended by itself, with its share of punctuation and
    markdown. reward/truncated: share cut off at the length limit. group/std: mean over the prompts
    of the standard deviation of their responses' scores (dividing by their number). group/gain:
    mean over the prompts of the best score less the mean.
    """
    rows = [
        _Response(
            r.prompt.id, score, len(r.token_ids), r.finish_reason == "stop", markup_share(r.text)
        )
        for r, score in zip(rollouts, scores.total, strict=True)
    ]
    rows = [row for part in gather(rows) for row in part]
    totals = [row.score for row in rows]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row.score)
    return {
        "reward/length_correlation": correlation(totals, [float(row.tokens) for row in rows]),
        "reward/finished_correlation": correlation(totals, [float(row.finished) for row in rows]),
        "reward/format_correlation": correlation(totals, [row.markup for row in rows]),
        "reward/truncated": statistics.fmean(not row.finished for row in rows),
        "group/std": statistics.fmean(statistics.pstdev(g) for g in groups.values()),
        "group/gain": statistics.fmean(max(g) - statistics.fmean(g) for g in groups.values()),
    }


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
        return (
            self.slope / self.error
            if self.error
            else math.copysign(math.inf, self.slope)
            if self.slope
            else 0.0
        )


def slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """Of the least-squares line; exactly 0 for values that are all equal, which rounding would give
    a sign.
    """
    return 0.0 if min(values) == max(values) else statistics.linear_regression(steps, values).slope


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
        self.points: dict[int, Point] = {}
        # the last ones, at most cfg.divergence_judgements
        self._judgements: list[tuple[int, HeldOutScores]] = []
        self._truncated: list[float] = []  # shares of the last steps, at most cfg.window
        self._first_entropies: list[float] = []  # at most cfg.window
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
            (at, earlier)
            for at, earlier in self._judgements
            if len(earlier.scores) == len(judgement.scores)
        ]
        self._judgements = [*alike, (step, judgement)][-self.cfg.divergence_judgements :]
        return self._report(Rule.divergence, self.cfg.divergence, step, self._diverges())

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Update number `step` was made; `metrics` are those of its rollouts, which the policy
        after `step` - 1 updates wrote.
        """
        point = self._point(step - 1)
        point.kl, point.score = metrics.get("objective/kl"), metrics["objective/scores"]
        alarms = self._report(
            Rule.length, self.cfg.length, step, self._runs_on(metrics["reward/truncated"])
        )
        # nothing trained in this step, so neither KL nor entropy was measured
        if "objective/entropy" not in metrics:
            return alarms
        return [
            *self._report(Rule.kl, self.cfg.kl, step, self._strays(point.kl)),
            *alarms,
            *self._report(
                Rule.entropy, self.cfg.entropy, step, self._collapses(metrics["objective/entropy"])
            ),
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

    def _diverges(self) -> str | None:
        if len(self._judgements) < self.cfg.divergence_judgements:
            return None
        steps = [step for step, _ in self._judgements]
        proxy = trend(steps, [judgement.proxies for _, judgement in self._judgements])
        judge = trend(steps, [judgement.scores for _, judgement in self._judgements])
        if not (
            proxy.slope > 0 > judge.slope
            and proxy.errors >= self.cfg.divergence_sd
            and -judge.errors >= self.cfg.divergence_sd
        ):
            return None
        return (
            f"over the judgements of steps {', '.join(map(str, steps))} the score rose by "
            f"{proxy.slope:.3g} a step "
            f"({proxy.errors:.1f} standard errors) while the held-out judge fell by "
            f"{-judge.slope:.3g} a step ({-judge.errors:.1f} standard "
            "errors): the policy exploits the reward. The judge was highest at step "
            f"{self.best_step}."
        )

    def _strays(self, kl: float | None) -> str | None:
        # no reference, no KL: preflight refuses the rule then
        if kl is None or kl <= self.cfg.kl_max:
            return None
        return (
            f"objective/kl is {kl:.3g} nats per response, above "
            f"stage.watch.kl_max={self.cfg.kl_max:g}."
        )

    def _runs_on(self, truncated: float) -> str | None:
        self._truncated = [*self._truncated, truncated][-self.cfg.window :]
        share = statistics.fmean(self._truncated)
        if len(self._truncated) < self.cfg.window or share < self.cfg.length_share:
            return None
        return (
            f"{share:.0%} of the responses of the last {self.cfg.window} steps were cut off at "
            "rollout.max_response_length "
            f"(stage.watch.length_share={self.cfg.length_share:g})."
        )

    def _collapses(self, entropy: float) -> str | None:
        if len(self._first_entropies) < self.cfg.window:
            self._first_entropies.append(entropy)
            return None
        start = statistics.fmean(self._first_entropies)
        if entropy >= self.cfg.entropy_share * start:
            return None
        return (
            f"objective/entropy is {entropy:.3g} nats per token, below "
            f"stage.watch.entropy_share={self.cfg.entropy_share:g} of the {start:.3g} "
            f"of the first {self.cfg.window} steps."
        )

    def state_dict(self) -> dict[str, Any]:
        """What JSON holds exactly."""
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
