"""What was found of reward models as parts of the report, and figures by name
(``eval/<model>/...``).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.rewards.accuracy import SUBSETS, Accuracy
from eval.rewards.best_of import Curve
from eval.rewards.calibration import Calibrated, Calibration
from eval.rewards.ensembles import Ensemble
from eval.rewards.fitting import Fit
from eval.sections import Section, Table, with_interval
from eval.statistics import Interval

Figures = dict[str, float]


def shown(interval: Interval | None) -> str:
    """An interval as tables show it."""
    if interval is None:
        return "none"
    return with_interval(interval.estimate, interval.low, interval.high)


def named(name: str, interval: Interval) -> Figures:
    """An interval as figures: ``name``, and with ``_low`` and ``_high``."""
    return {
        name: interval.estimate,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
    }


def accuracy_section(found: Mapping[str, Accuracy], left_out: Sequence[str]) -> Section:
    """Accuracy of each scorer; `left_out`: sentences about rows that were not scored."""
    text = [
        "The share of pairs in which the chosen answer has the higher score; a tie is half. "
        "Intervals are 95 %, over resampled prompts.",
        *left_out,
    ]
    first = next(iter(found.values()))
    rows = []
    for name, one in found.items():
        rows.append(
            {
                "scorer": name,
                "accuracy [95 %]": shown(one.overall),
                "ties": f"{one.ties:,}",
                "pairs": f"{one.pairs:,}",
            }
        )
    tables = [Table.of("All pairs", rows)]
    if first.sections:
        tables.append(Table.of("RewardBench", _sections(found)))
        text.append(_published(first))
    if first.subsets:
        tables.append(Table.of("By subset", _subsets(found)))
    figures: Figures = {}
    for name, one in found.items():
        figures |= _accuracy_figures(name, one)
    return Section("Accuracy of reward models", tuple(text), tuple(tables), figures=figures)


def _published(one: Accuracy) -> str:
    text = (
        "Sections weigh their subsets as published (arXiv:2403.13787), and the prior sets count "
        "half; the published code counts ties as errors."
    )
    if one.missing:
        missing = len(one.missing)
        whole = missing + _present(one)
        names = ", ".join(one.missing)
        text += (
            f" {missing} of {whole} published subsets are not in these pairs ({names}): the score "
            "is not comparable with published ones."
        )
    return text


def _present(one: Accuracy) -> int:
    priors = {"anthropic_helpful", "anthropic_hhh", "shp", "summarize"}
    return sum(name in SUBSETS and name not in priors for name in one.subsets)


def _sections(found: Mapping[str, Accuracy]) -> list[dict[str, str]]:
    first = next(iter(found.values()))
    rows = []
    for title in first.sections:
        row = {"section": title}
        for name, one in found.items():
            row[name] = shown(one.sections[title])
        rows.append(row)
    score = {"section": "RewardBench score"}
    for name, one in found.items():
        score[name] = shown(one.score)
    rows.append(score)
    return rows


def _subsets(found: Mapping[str, Accuracy]) -> list[dict[str, str]]:
    first = next(iter(found.values()))
    rows = []
    for subset, size in sorted(first.sizes.items()):
        row = {"subset": subset, "pairs": f"{size:,}"}
        for name, one in found.items():
            row[name] = shown(one.subsets[subset])
        rows.append(row)
    return rows


def _accuracy_figures(name: str, one: Accuracy) -> Figures:
    out = named(f"eval/{name}/accuracy", one.overall)
    out[f"eval/{name}/ties"] = float(one.ties)
    for subset, interval in one.subsets.items():
        out[f"eval/{name}/subset/{subset}"] = interval.estimate
    for title, interval in one.sections.items():
        section = title.lower().replace(" ", "_")
        out |= named(f"eval/{name}/section/{section}", interval)
    if one.score is not None:
        out |= named(f"eval/{name}/rewardbench", one.score)
    return out


def calibration_section(found: Mapping[str, Calibrated], plot: Path | None) -> Section:
    """Calibration of each model on the half of the pairs that its temperature was not fitted on."""
    text = (
        "sigmoid(chosen - rejected) as the probability that the chosen answer is preferred. The "
        "temperature, by which scores are divided, was fitted on one half of the prompts; all "
        "figures are of the other half.",
        "ECE is the mean gap between confidence and accuracy over bins; a calibrated model with "
        "the same confidences would show the ECE by chance.",
    )
    rows = []
    figures: Figures = {}
    for name, one in found.items():
        figures[f"eval/{name}/temperature"] = one.tempered.temperature
        for label, which, suffix in (
            ("as it is", one.plain, ""),
            ("with its temperature", one.tempered, "_tempered"),
        ):
            rows.append(_calibration_row(name, label, which, one.at_bound))
            figures |= named(f"eval/{name}/ece{suffix}", which.ece)
            figures |= named(f"eval/{name}/brier{suffix}", which.brier)
            figures |= named(f"eval/{name}/log_loss{suffix}", which.log_loss)
            figures[f"eval/{name}/ece_by_chance{suffix}"] = which.ece_by_chance
    tables = [Table.of("Calibration on held-out pairs", rows)]
    for name, one in found.items():
        tables.append(Table.of(f"Reliability of {name} as it is", _bin_rows(one.plain)))
    plots = {}
    if plot is not None:
        shows = "Reliability: the share of right pairs at each confidence (tables above)"
        plots[shows] = plot
    return Section("Calibration", text, tuple(tables), plots, figures)


def _calibration_row(name: str, label: str, one: Calibration, at_bound: bool) -> dict[str, str]:
    temperature = f"{one.temperature:.3g}"
    if at_bound and one.temperature != 1:
        temperature += " (the bound)"
    return {
        "model": f"{name}, {label}",
        "temperature": temperature,
        "ECE [95 %]": shown(one.ece),
        "ECE by chance": f"{one.ece_by_chance:.3f}",
        "Brier score [95 %]": shown(one.brier),
        "log loss, nats [95 %]": shown(one.log_loss),
        "pairs": f"{one.pairs:,}",
    }


def _bin_rows(one: Calibration) -> list[dict[str, str]]:
    rows = []
    for bin in one.bins:
        rows.append(
            {
                "confidence": f"{bin.low:.3f} to {bin.high:.3f}",
                "pairs": f"{bin.count:,}",
                "mean confidence": f"{bin.confidence:.3f}",
                "share right [95 %]": shown(bin.right),
            }
        )
    return rows


def best_of_section(
    curve: Curve, fit: Fit | None, names: tuple[str, str], plots: Mapping[str, Path]
) -> Section:
    """The curve of best-of-n by the proxy `names[0]`, judged by `names[1]`."""
    proxy, judge = names
    text = [
        f"The best of n answers by {proxy}, as {judge} values it: exact means over all choices of "
        f"n answers, of {curve.prompts:,} prompts. KL is log n - (n - 1) / n.",
        *_peak(curve, judge),
    ]
    rows = []
    figures: Figures = {}
    for i, n in enumerate(curve.n):
        rows.append(
            {
                "n": str(n),
                "KL (nats)": f"{curve.kl[i]:.3f}",
                f"{proxy} [95 %]": shown(curve.proxy[i]),
                f"{judge} [95 %]": shown(curve.judge[i]),
            }
        )
        figures |= named(f"eval/best_of_{n}/proxy", curve.proxy[i])
        figures |= named(f"eval/best_of_{n}/judge", curve.judge[i])
    tables = [Table.of("Best of n", rows)]
    if fit is not None:
        tables.append(Table.of(f"Law of {judge}", [_law_row(judge, fit)]))
        figures |= _law_figures("eval/best_of", fit)
    return Section("Best of n", tuple(text), tuple(tables), plots, figures)


def _peak(curve: Curve, judge: str) -> list[str]:
    """Where the judge's value falls again, if it does."""
    values = [one.estimate for one in curve.judge]
    best = values.index(max(values))
    if best == len(values) - 1:
        return []
    falls = curve.judge_draws[:, best] - curve.judge_draws[:, -1]
    measured, again = falls[0], falls[1:]
    share = float((again > 0).mean())
    most, last = curve.n[best], curve.n[-1]
    return [
        f"{judge} is highest at n = {most} and {measured:.3f} lower at n = {last}; it is lower in "
        f"{share:.0%} of the resamples."
    ]


def overoptimisation_section(
    fits: Mapping[str, tuple[Sequence[float], Sequence[float], Fit | None]],
    skipped: int,
    source: str,
    plots: Mapping[str, Path],
) -> Section:
    """Scores against the distance along a run; `fits`: KL, scores and the law by score; `skipped`:
    rows without one of the numbers.
    """
    points = len(next(iter(fits.values()))[0])
    text = [f"{points:,} points from {source}; {skipped:,} rows without these numbers."]
    text.append(
        "The law is R = R0 + d (alpha - beta log d) with d = sqrt(KL), of Gao et al. 2022 "
        "(arXiv:2210.10760). A proxy that goes on rising where the judge falls is optimised past "
        "its worth. Intervals assume independent points; neighbours along a run are not quite."
    )
    rows = []
    figures: Figures = {}
    for name, (_, _, fit) in fits.items():
        if fit is None:
            text.append(f"{name}: fewer than four different distances, no law was fitted.")
            continue
        rows.append(_law_row(name, fit))
        figures |= _law_figures(f"eval/overoptimisation/{name}", fit)
    tables = []
    if rows:
        tables.append(Table.of("Laws", rows))
    return Section("Over-optimisation", tuple(text), tuple(tables), plots, figures)


def _law_row(name: str, fit: Fit) -> dict[str, str]:
    peak = "none"
    if fit.peak_kl is not None:
        peak = f"{fit.peak_kl:.3g}"
    return {
        "score": name,
        "law": fit.law.value,
        "alpha [95 %]": shown(fit.alpha),
        "beta [95 %]": shown(fit.beta),
        "start R0": f"{fit.start:.3f}",
        "KL of the highest score (nats)": peak,
        "variance explained": f"{fit.explained:.3f}",
    }


def _law_figures(name: str, fit: Fit) -> Figures:
    out = named(f"{name}/alpha", fit.alpha) | named(f"{name}/beta", fit.beta)
    out[f"{name}/explained"] = fit.explained
    if fit.peak_kl is not None and math.isfinite(fit.peak_kl):
        out[f"{name}/peak_kl"] = fit.peak_kl
    return out


def ensemble_section(found: Ensemble) -> Section:
    """How far the models agree, pair by pair."""
    text = ("Each model's scores are counted in their own standard deviations around their mean.",)
    rows = []
    figures: Figures = {}
    for one in found.agreements:
        mine, theirs = one.models
        rows.append(
            {
                "models": f"{mine}, {theirs}",
                "same preference": f"{one.same:.3f}",
                "Kendall's tau-b of the margins": f"{one.tau:.3f}",
                "both wrong": f"{one.both_wrong:.3f}",
            }
        )
        figures[f"eval/agreement/{mine}/{theirs}"] = one.same
        figures[f"eval/tau/{mine}/{theirs}"] = one.tau
    together = {
        "spread of a score over models (standard deviations)": found.spread,
        "pairs on which all models agree": found.unanimous,
        "accuracy of the mean score there": found.right_if_unanimous,
        "accuracy of the mean score on the other pairs": found.right_otherwise,
        "accuracy of the mean score": found.mean_accuracy,
    }
    shares = []
    for name, value in together.items():
        text_of = "none"
        if value is not None:
            text_of = f"{value:.3f}"
        shares.append({"figure": name, "value": text_of})
    figures["eval/ensemble/spread"] = found.spread
    figures["eval/ensemble/unanimous"] = found.unanimous
    figures["eval/ensemble/accuracy"] = found.mean_accuracy
    tables = (Table.of("Each two models", rows), Table.of("All models together", shares))
    return Section("Ensemble", text, tables, figures=figures)
