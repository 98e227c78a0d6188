"""The parts of the report of ``stage=eval_reward``, out of rows and scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conf.judging import EvalRewardStage
from eval.rewards import plots
from eval.rewards.accuracy import Judgements, accuracy
from eval.rewards.best_of import best_of_n
from eval.rewards.calibration import calibrated
from eval.rewards.ensembles import ensemble
from eval.rewards.fitting import Law, fit_draws, fit_points
from eval.rewards.sections import (
    accuracy_section,
    best_of_section,
    calibration_section,
    ensemble_section,
    overoptimisation_section,
)
from eval.sections import Section
from rlhf.stages.evaluation.reward_rows import PairRow, Sample
from rlhf.types import UserError

LENGTH = "length"  # the scorer that prefers the longer answer
Scores = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What all parts need."""

    stage: EvalRewardStage
    seed: int
    plots: Path


def pair_sections(rows: Sequence[PairRow], scores: Scores, asked: Asked) -> list[Section]:
    """Accuracy, calibration and agreement. `scores`: by model of the chosen answers, then of the
    rejected ones, in the order of `rows`. A pair with a text that some model can't read is left
    out for all, and counted.
    """
    count = len(rows)
    readable = [
        i for i in range(count) if all(_known(values, i, count) for values in scores.values())
    ]
    if not readable:
        raise UserError(
            f"stage.pairs={asked.stage.pairs}: each pair has a text that is longer than a model "
            "reads, so nothing is left to compare."
        )
    left_out = []
    if len(readable) < count:
        left_out.append(
            f"{count - len(readable):,} of {count:,} pairs have a text that is longer than one of "
            "the models reads; they are left out for all."
        )
    chosen, rejected = {}, {}
    for name, values in scores.items():
        chosen[name] = [_number(values[i]) for i in readable]
        rejected[name] = [_number(values[count + i]) for i in readable]
    kept = [rows[i] for i in readable]
    margins = {}
    for name, better in chosen.items():
        margins[name] = [a - b for a, b in zip(better, rejected[name], strict=True)]
    sections = [_accuracy(kept, margins, left_out, asked)]
    sections += _calibration(kept, margins, asked)
    if len(scores) > 1:
        sections.append(ensemble_section(ensemble(chosen, rejected)))
    return sections


def _known(values: Sequence[float | None], row: int, count: int) -> bool:
    return values[row] is not None and values[count + row] is not None


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _length(answer: object) -> int:
    """Characters of an answer."""
    if isinstance(answer, list):
        return sum(len(str(turn.get("content") or "")) for turn in answer)
    return len(str(answer))


def _accuracy(
    rows: Sequence[PairRow],
    margins: Mapping[str, Sequence[float]],
    left_out: Sequence[str],
    asked: Asked,
) -> Section:
    groups, subsets = [row.group for row in rows], [row.subset for row in rows]
    longer = [_length(row.chosen.answer) - _length(row.rejected.answer) for row in rows]
    found = {}
    for name, values in {**margins, LENGTH: longer}.items():
        given = Judgements(values, groups, subsets)
        found[name] = accuracy(given, resamples=asked.stage.bootstrap, seed=asked.seed)
    return accuracy_section(found, [*left_out, f"{LENGTH}: the longer answer, as a baseline."])


def _calibration(
    rows: Sequence[PairRow], margins: Mapping[str, Sequence[float]], asked: Asked
) -> list[Section]:
    groups, stage = [row.group for row in rows], asked.stage
    found = {}
    for name, values in margins.items():
        one = calibrated(
            values, groups, bins=stage.bins, resamples=stage.bootstrap, seed=asked.seed
        )
        if one is not None:
            found[name] = one
    if not found:
        text = "Not measured: fewer than two prompts, so there are no two halves."
        return [Section("Calibration", (text,))]
    picture = plots.plot_reliability(found, asked.plots / "reliability.png")
    return [calibration_section(found, picture)]


def best_of_part(
    samples: Sequence[Sample], scores: Scores, names: tuple[str, str], asked: Asked
) -> Section:
    """The curve of best-of-n by the scorers `names`, proxy and judge. `scores`: of those that are
    models, in the order of `samples`; the others are columns. Prompts with a text that a model
    can't read, or with one answer, are left out and counted. Raises UserError where none is left.
    """
    stage = asked.stage
    groups: dict[str, list[tuple[float | None, float | None]]] = {}
    for i, sample in enumerate(samples):
        values = []
        for name in names:
            values.append(scores[name][i] if name in scores else sample.numbers[name])
        groups.setdefault(sample.group, []).append((values[0], values[1]))
    proxy, judge = [], []
    for group in groups.values():
        known = [(a, b) for a, b in group if a is not None and b is not None]
        if len(known) == len(group) >= 2:
            proxy.append([a for a, _ in known])
            judge.append([b for _, b in known])
    if not proxy:
        raise UserError(
            f"stage.samples={stage.samples}: no prompt has two answers that all scorers read. "
            "Sample more answers to each, as stage=eval does with stage.samples_per_prompt=8."
        )
    curve = best_of_n(proxy, judge, resamples=stage.bootstrap, seed=asked.seed)
    fit = fit_draws(Law.best_of_n, curve.kl, curve.judge_draws)
    by_proxy = fit_draws(Law.best_of_n, curve.kl, curve.proxy_draws)
    pictures = {
        f"Best of n by {names[0]}: its own score, and {names[1]} (table above)": (
            plots.plot_best_of(curve, *names, asked.plots / "best_of_n.png")
        )
    }
    measured = [one.estimate for one in curve.judge]
    series = {
        names[0]: (curve.kl, [one.estimate for one in curve.proxy], by_proxy),
        names[1]: (curve.kl, measured, fit),
    }
    pictures["Best of n over the square root of KL, with the fitted laws"] = plots.plot_laws(
        series, asked.plots / "best_of_n_laws.png"
    )
    section = best_of_section(curve, fit, names, pictures)
    left = len(groups) - len(proxy)
    if not left:
        return section
    text = (
        f"{left:,} of {len(groups):,} prompts are left out: they have a single answer, or one that "
        "is longer than a scorer reads."
    )
    return replace(section, text=(*section.text, text))


def curve_section(points: Sequence[Sequence[float]], skipped: int, asked: Asked) -> Section:
    """The laws along a run. `points`: KL, proxy and judge of each row. Raises UserError for a run
    without rows, or with a negative KL.
    """
    stage = asked.stage
    if not points:
        raise UserError(
            f"stage.curve={stage.curve}: no row has all of {stage.curve_kl}, {stage.curve_proxy} "
            f"and {stage.curve_judge}."
        )
    negative = [row[0] for row in points if row[0] < 0 or not math.isfinite(row[0])]
    kl = [max(0.0, row[0]) for row in points]
    fits = {}
    for column, name in ((1, stage.curve_proxy), (2, stage.curve_judge)):
        scores = [row[column] for row in points]
        fits[name] = (kl, scores, fit_points(Law.reinforcement, kl, scores))
    picture = plots.plot_laws(fits, asked.plots / "overoptimisation.png")
    shows = {"Scores over the square root of KL, with the fitted laws": picture}
    section = overoptimisation_section(fits, skipped, str(stage.curve), shows)
    if not negative:
        return section
    text = (
        f"{len(negative):,} points have a KL below 0, down to {min(negative):.3g} nats, which an "
        "estimate may have near the start; they count as 0."
    )
    return replace(section, text=(*section.text, text))
