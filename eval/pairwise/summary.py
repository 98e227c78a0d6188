"""A judge's verdicts for people and for gates: the part of the report, and figures by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.pairwise.biases import Biases, biases
from eval.pairwise.rates import Bounds, PairRate, pair_rates, untrusted, win_rates
from eval.pairwise.strengths import Strengths, design, fit
from eval.pairwise.verdicts import Judged
from eval.sections import Section, Table, with_interval
from eval.statistics import Interval

_CUT = 400  # characters of a text in a table


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who wins, by a judge that can be trusted."""

    pairs: list[PairRate]
    win_rate: dict[str, Interval]  # both orders averaged, ties as half
    plain: Strengths  # Bradley and Terry's
    controlled: Strengths  # the same at equal lengths and without a first place


@dataclass(frozen=True, slots=True)
class Judgement:
    """All that a judge's verdicts say. `ranking` is None where `reasons` say why there is none."""

    judge: str
    policies: tuple[str, ...]
    biases: Biases
    reasons: list[str]
    ranking: Ranking | None

    def metrics(self) -> dict[str, float]:
        """``eval/<judge>/<figure>`` and ``eval/<judge>/<policy>/<figure>``, with ``_low`` and
        ``_high`` of the 95 % interval. A judge that ranks nobody has figures of its own alone.
        """
        own, found = f"eval/{self.judge}", self.biases
        out = {
            f"{own}/pairs": float(found.pairs),
            f"{own}/identical": float(found.identical),
            f"{own}/unread": float(found.unread + found.too_long),
            f"{own}/ranked": float(self.ranking is not None),
        }
        shares = {
            "consistency": found.consistency,
            "first_share": found.first,
            "longer_share": found.longer,
        }
        for name, interval in shares.items():
            if interval is not None:
                out |= _named(f"{own}/{name}", interval)
        if found.ties is not None:
            out[f"{own}/tie_share"] = found.ties
        if self.ranking is None:
            return out
        for policy in self.policies:
            here, ranking = f"{own}/{policy}", self.ranking
            out |= _named(f"{here}/win_rate", ranking.win_rate[policy])
            controlled = ranking.controlled.win_rate[policy]
            out |= _named(f"{here}/win_rate_controlled", controlled)
            out |= _named(f"{here}/strength", ranking.plain.strength[policy])
        return out


def judgement(
    name: str,
    policies: Sequence[str],
    judged: Sequence[Judged],
    bounds: Bounds,
    *,
    resamples: int,
    seed: int,
) -> Judgement:
    """What the verdicts of the judge `name` say of the policies."""
    found = biases(judged, resamples=resamples, seed=seed)
    reasons = untrusted(found, bounds)
    if reasons:
        return Judgement(name, tuple(policies), found, reasons, None)
    rows = design(judged, policies)
    ranking = Ranking(
        pair_rates(judged, resamples=resamples, seed=seed),
        win_rates(judged, policies, resamples=resamples, seed=seed),
        fit(rows, place=False, length=False, resamples=resamples, seed=seed),
        fit(rows, place=True, length=True, resamples=resamples, seed=seed),
    )
    return Judgement(name, tuple(policies), found, [], ranking)


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {
        name: interval.estimate,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
    }


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return "not seen"
    return with_interval(interval.estimate, interval.low, interval.high)


def section(found: Judgement, judged: Sequence[Judged], about: str, shown: int) -> Section:
    """The part of the report. `about` says in sentences who judged, and how; `shown`: pairs."""
    text = [about, *_verdict_on_judge(found)]
    tables = [Table.of(f"How far the judge {found.judge} can be trusted", _trust_rows(found))]
    if found.ranking is not None:
        tables.append(Table.of("Who wins", _policy_rows(found)))
        tables.append(Table.of("Each two policies", _pair_rows(found.ranking.pairs)))
    unread = [one for one in judged if one.wins is None and one.shown is not None]
    if unread:
        title = f"Replies without a clear verdict, the first of {len(unread):,}"
        tables.append(Table.of(title, [_reply_row(one) for one in unread[:shown]]))
    split = [one for one in judged if one.wins is not None and one.wins[0] != one.wins[1]]
    if split:
        title = f"Pairs on which the two orders contradict each other, the first of {len(split):,}"
        tables.append(Table.of(title, [_reply_row(one) for one in split[:shown]]))
    title = f"Judge: {found.judge}"
    return Section(title, tuple(text), tuple(tables), figures=found.metrics())


def _verdict_on_judge(found: Judgement) -> list[str]:
    if found.reasons:
        why = "; ".join(found.reasons)
        return [f"NOT RANKED. The judge's verdicts rank nobody: {why}."]
    return [
        "A pair is a whole win only where both orders name the same policy: a win rate is the "
        "mean of both orders, with a tie as half. The win rate at equal lengths is that of a model "
        "in which length and place are terms of their own.",
        "Intervals are 95 %, over resampled prompts.",
    ]


def _trust_rows(found: Judgement) -> list[dict[str, str]]:
    own = found.biases
    ties = "not seen" if own.ties is None else f"{own.ties:.3f}"
    figures = {
        "same winner in both orders (consistency)": _shown(own.consistency),
        "choices of the answer shown first (0.5: no bias)": _shown(own.first),
        "wins of the longer answer (length preference)": _shown(own.longer),
        "ties among verdicts": ties,
        "pairs": f"{own.pairs:,}",
        "pairs of equal answers, counted as ties": f"{own.identical:,}",
        "pairs too long for the judge": f"{own.too_long:,}",
        "pairs without a clear verdict": f"{own.unread:,}",
    }
    if found.ranking is not None:
        fitted = found.ranking.controlled
        figures["taste for the first place (log-odds)"] = _shown(fitted.first_place)
        figures["taste for length (log-odds)"] = _shown(fitted.length)
    return [{"figure": name, "value [95 %]": value} for name, value in figures.items()]


def _policy_rows(found: Judgement) -> list[dict[str, str]]:
    assert found.ranking is not None
    ranking = found.ranking

    def by_strength(name: str) -> float:
        return ranking.plain.strength[name].estimate

    rows = []
    for name in sorted(found.policies, key=by_strength, reverse=True):
        rows.append(
            {
                "policy": name,
                "win rate [95 %]": _shown(ranking.win_rate[name]),
                "win rate at equal lengths [95 %]": _shown(ranking.controlled.win_rate[name]),
                "Bradley-Terry strength, log-odds [95 %]": _shown(ranking.plain.strength[name]),
            }
        )
    return rows


def _pair_rows(pairs: Sequence[PairRate]) -> list[dict[str, str]]:
    rows = []
    for pair in pairs:
        one, other = pair.policies
        rows.append(
            {
                "policies": f"{one} against {other}",
                "win rate of the first [95 %]": _shown(pair.win_rate),
                "pairs": f"{pair.pairs:,}",
                "other winner in the other order": f"{pair.split:,}",
                "ties": f"{pair.ties:,}",
            }
        )
    return rows


def _reply_row(one: Judged) -> dict[str, str]:
    assert one.shown is not None and one.swapped is not None
    mine, theirs = one.pair.policies
    texts = {
        "prompt": one.pair.prompt,
        "answer shown first": one.pair.answers[0],
        "answer shown second": one.pair.answers[1],
        "reply": one.shown.text,
        "reply in the other order": one.swapped.text,
    }
    cut = {name: _cut(text) for name, text in texts.items()}
    return {"policies": f"{mine}, {theirs}", **cut}


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT]} ..."


def rows_of(judged: Sequence[Judged]) -> list[Mapping[str, object]]:
    """Lines of judgements.jsonl: both policies, prompt, replies and verdicts in both orders."""
    out: list[Mapping[str, object]] = []
    for one in judged:
        row: dict[str, object] = {
            "prompt_id": one.pair.prompt_id,
            "prompt": one.pair.prompt,
            "policies": list(one.pair.policies),
            "answers": list(one.pair.answers),
            "unasked": one.unasked,
        }
        for name, reply in (("shown", one.shown), ("swapped", one.swapped)):
            verdict = reply.verdict if reply is not None else None
            row[f"reply_{name}"] = reply.text if reply is not None else None
            row[f"verdict_{name}"] = verdict.value if verdict is not None else None
        out.append(row)
    return out
