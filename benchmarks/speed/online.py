"""Whole online steps: in one process, with a server, one step ahead, and TRL's GRPOTrainer."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.speed.cases import Case
from benchmarks.speed.models import LARGE, SMALL, case_a, review_prompts, train_small
from benchmarks.speed.protocol import Figures
from benchmarks.speed.results import Result, Spread, number, ratios, spread, table
from benchmarks.speed.turns import Contestant, cores_here, take_turns

OURS, PEER = "benchmarks.speed.ours", "benchmarks.speed.trl_peer"
_PAIRS = (("turns", "trl"), ("turns", "server"), ("turns", "ahead"), ("ahead", "trl"))


def _parts() -> dict[str, tuple[str, tuple[str, ...]]]:
    """By name, a part's case and who takes turns in it: more than two models of 135M would not fit
    24 GiB.
    """
    parts: dict[str, tuple[str, tuple[str, ...]]] = {
        "a": ("a", ("turns", "server", "ahead", "here", "trl"))
    }
    for case in ("b-lora", "b-full"):
        for ways in _PAIRS:
            others = [way for way in ways if way != "turns"]
            parts["-".join([case, *others])] = (case, ways)
    return parts


PARTS = _parts()
NAMES = {
    "turns": "one process",
    "server": "server",
    "ahead": "server, one ahead",
    "here": "one process, one ahead",
    "trl": "TRL",
}
# slower and faster, and how many times as fast the second is to be
TARGETS = {
    ("a", "trl", "turns"): 3.0,
    ("b-lora", "trl", "turns"): 2.0,
    ("a", "turns", "ahead"): 1.3,
    ("b-lora", "turns", "ahead"): 1.0,
    ("b-full", "turns", "ahead"): 1.0,
    ("a", "trl", "ahead"): 4.0,
    ("b-lora", "trl", "ahead"): 2.5,
}


def contestants(case: Case, ways: Sequence[str], folder: Path) -> dict[str, Contestant]:
    """In one process, as TRL: both cores, a thread on each. With a server: the trainer on one core,
    the server on the other.
    """
    first, second = cores_here(2)
    out = {}
    for way in ways:
        given = case if way == "trl" else replace(case, way=way)
        if way in ("server", "ahead"):
            given = replace(given, server_cores=(second,), trainer_core=int(first))
        path = folder / f"case-{case.name}-{way}.json"
        given.dump(path)
        module = PEER if way == "trl" else OURS
        out[way] = Contestant(module, path, f"{first},{second}")
    return out


def measure(
    part: str, case: Case, rounds: int, folder: Path, ways: Sequence[str] = ()
) -> dict[str, list[Figures]]:
    """The turns of a part; ways: in place of all that belong to it."""
    taking = contestants(case, ways or PARTS[part][1], folder)
    return take_turns(part, taking, rounds, folder)


def facts_of(case: Case) -> dict[str, object]:
    """For the table's heading."""
    return {
        "case": case.name,
        "work": f"{len(case.prompts)} prompts x {case.samples} answers x {case.max_response} "
        f"tokens, {'LoRA' if case.lora else 'full weights'}",
    }


def way_row(part: str, way: str, rows: Sequence[Figures]) -> tuple[str, ...]:
    """A way's row of the table."""
    memory = max(row["peak_rss_mb"] + row.get("servers_mb", 0.0) for row in rows)
    return (
        part,
        NAMES[way],
        str(spread(rows, "step_s")),
        str(spread(rows, "response_tokens", "rollout_s")),
        str(spread(rows, "response_tokens", "update_s")),
        str(spread(rows, "response_tokens", "step_s")),
        number(memory),
    )


def ratio_rows(part: str, case: str, turns: Mapping[str, Sequence[Figures]]) -> list[list[str]]:
    """How many times as fast each way is as each slower one it took turns with."""
    order = [way for way in ("trl", "turns", "server", "ahead", "here") if way in turns]
    rows = []
    for place, slower in enumerate(order):
        for faster in order[place + 1 :]:
            step = ratios(turns[slower], turns[faster], lambda row: row["step_s"])
            token = ratios(turns[slower], turns[faster], seconds_a_token)
            target = TARGETS.get((case, slower, faster))
            rows.append(
                [
                    part,
                    f"{NAMES[slower]} / {NAMES[faster]}",
                    str(step),
                    str(token),
                    "" if target is None else f"{target:g}",
                ]
            )
    return rows


def seconds_a_token(row: Figures) -> float:
    return row["step_s"] / row["response_tokens"]


def own_row(part: str, way: str, rows: Sequence[Figures]) -> list[str]:
    """What only our side measures."""
    bare = Spread.of(row["bare_s"] / row["update_s"] for row in rows)
    sync = Spread.of(100 * row["sync_s"] / row["step_s"] for row in rows)
    gap = max(row["gap"] for row in rows)
    return [part, NAMES[way], str(bare), str(sync), f"{gap:.1e}"]


def online_tables(results: Mapping[str, Result]) -> list[str]:
    """Markdown of the online parts that were measured."""
    ways, compared, own, works = [], [], [], {}
    for part in PARTS:
        if part not in results:
            continue
        result = results[part]
        works[result.facts["case"]] = result.facts["work"]
        compared += ratio_rows(part, result.facts["case"], result.turns)
        for way, rows in result.turns.items():
            ways.append(way_row(part, way, rows))
            if way != "trl":
                own.append(own_row(part, way, rows))
    if not ways:
        return []
    cases = [f"- Case {case}: {work}." for case, work in works.items()]
    speeds = ("part", "", "step, s", "generation", "update", "whole step", "peak MiB")
    ratio = ("part", "", "times as fast, a step", "a token", "target")
    ours = ("part", "", "update against a bare pass", "sync, % of the step", "largest gap, nats")
    return [
        *cases,
        "",
        *table(speeds, ways),
        "",
        *table(ratio, compared),
        "",
        *table(ours, own),
    ]


def growth(folder: Path, rounds: int) -> list[str]:
    """Our step's time with one quantity changed at a time. The models hardly trained, so that
    answers run to the limit and a limit is a length.
    """
    small, large = (
        train_small(folder, name, shape, steps=1)
        for name, shape in (("growth-5m", SMALL), ("growth-20m", LARGE))
    )
    base = replace(
        case_a(folder), name="growth", model=small, prompts=review_prompts(folder, "growth-5m", 8)
    )
    cases = {
        "base": base,
        "response length x2": replace(
            base, name="growth-length", max_response=2 * base.max_response
        ),
        "group x2": replace(base, name="growth-group", samples=2 * base.samples),
        "model x4": replace(base, name="growth-model", model=large),
    }
    lines, first = [], None
    for label, case in cases.items():
        rows = measure(case.name, case, rounds, folder, ("turns",))["turns"]
        middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        first = first or middle["step_s"]
        lines.append(
            f"  {label:<18} step {middle['step_s']:6.3f} s ({middle['step_s'] / first:4.2f} x)   "
            f"{middle['response_tokens']:6.0f} response tokens   generation "
            f"{middle['rollout_s']:6.3f} s   update {middle['update_s']:6.3f} s   sync "
            f"{middle['sync_s']:6.3f} s"
        )
    return lines
