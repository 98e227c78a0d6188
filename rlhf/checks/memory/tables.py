"""Plans as tables."""

import shlex
from collections.abc import Sequence
from typing import Any

from conf.choices import EngineKind, Offload
from rlhf.checks.memory.fit import Row, names_of, recommended
from rlhf.checks.memory.moments import Machine, Plan
from rlhf.checks.memory.states import GIB, Bytes

_ORDER = (
    "policy",
    "reward model",
    "critic",
    "reference",
    "reward",
    "generator",
    "games",
    "process",
)


def gib(count: float) -> str:
    size = count / GIB
    return "" if size < 0.0005 else f"{size:.3f}" if size < 0.1 else f"{size:.1f}"


def roles_of(*plans: Plan) -> list[str]:
    """Every role of the plans, those that train first."""
    found = {role for plan in plans for moment in plan.moments for role in moment.roles}
    return sorted(found, key=lambda role: (_ORDER.index(role), role))


def plan_table(plan: Plan, title: str) -> Any:
    """GiB per device by role and phase, each phase at its worst moment; the host's below."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("GiB per device" if plan.machine.cuda else "GiB per rank")
    for phase in plan.phases:
        table.add_column(phase.value, justify="right")
    peaks = [plan.peak(phase) for phase in plan.phases]
    for role in roles_of(plan):
        table.add_row(role, *(gib(moment.roles.get(role, Bytes()).device) for moment in peaks))
    table.add_section()
    table.add_row("all", *(gib(moment.total.device) for moment in peaks), style="bold")
    if plan.machine.cuda:
        hosts = [
            max(m.total.host for m in plan.moments if m.phase is phase) for phase in plan.phases
        ]
        node = plan.machine.of_a_node
        label = "host, all ranks" if node == plan.machine.ranks else f"host, {node} ranks"
        table.add_row(label, *(gib(node * held) for held in hosts))
    return table


def fit_table(rows: Sequence[Row], title: str, width: int) -> Any:
    """A line for every way to train, engine and offload: GiB per device at the peak, and whether it
    fits; below it, the changes that its letters mean.

    Roles have columns where `width` characters hold them.
    """
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    letters: dict[str, str] = {}
    for row in rows:
        for text in _texts(row):
            letters.setdefault(text, chr(ord("a") + len(letters)))
    roles = roles_of(*(row.plan for row in rows))
    table = _fit_table(rows, title, letters, roles)
    if Console(width=1000).measure(table).maximum > width:
        table = _fit_table(rows, title, letters, [])
    legend = Table.grid(padding=(0, 1))
    for text, letter in letters.items():
        legend.add_row(f" {letter}", Text(text))
    return Group(table, legend)


def _texts(row: Row) -> tuple[str, ...]:
    """What the last column's letters of a row stand for: servers, its changes, and why it can't run
    whatever fits.
    """
    place = [shlex.join(row.place)] if row.place else []
    problem = [row.plan.problem] if row.plan.problem else []
    return (*place, *row.changes, *problem)


def _fit_table(
    rows: Sequence[Row], title: str, letters: dict[str, str], roles: Sequence[str]
) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for heading in ("engine", "offload", "trains"):
        table.add_column(heading, no_wrap=True)
    for heading in (*roles, "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("peak in", no_wrap=True)
    table.add_column("host", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("with", overflow="fold")
    best = [row for row in (recommended(rows, name) for name in names_of(rows)) if row is not None]
    previous = ""
    for row in rows:
        trained = row.way.name
        if previous not in ("", trained):
            table.add_section()
        previous = trained
        engine, moment = row.cfg.engine, row.plan.peak()
        name = "torch" if engine.kind is EngineKind.torch else f"zero{engine.zero_stage}"
        offload = "" if engine.offload is Offload.none else engine.offload.value
        cells = [gib(moment.roles.get(role, Bytes()).device) for role in roles]
        host = f"{row.plan.host_gib:.0f}" if row.plan.machine.cuda else ""
        fits = "[green]yes[/]" if row.plan.fits else "[red]no[/]"
        letter = " ".join(letters[text] for text in _texts(row)) + (" *" if row in best else "")
        style = "bold" if row in best else None
        table.add_row(
            name,
            offload,
            trained,
            *cells,
            gib(moment.total.device),
            moment.phase.value,
            host,
            fits,
            letter.strip(),
            style=style,
        )
    return table


def answers(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Whether it fits, and with which overrides: a line for each way to train."""
    where = (
        f"{machine.ranks} device{'s' if machine.ranks > 1 else ''} of {machine.device_gib:.3g} GiB"
    )
    if not machine.cuda:
        where = (
            f"{machine.host_gib:.0f} GiB of memory and {machine.ranks} "
            f"rank{'s' if machine.ranks > 1 else ''}"
        )
    out, each = [], " each" if machine.ranks > 1 else ""
    for name in names_of(rows):
        row, own = recommended(rows, name), [r for r in rows if r.way.name == name]
        text = own[0].way.text
        if row is None:
            least = min(own, key=lambda r: (r.plan.problem is not None, r.plan.device_gib))
            out.append(
                f"{text} doesn't fit on {where} with any engine. The least is with "
                f"{shlex.join(least.overrides)}: {least.plan.obstacle}."
            )
        else:
            host = f" and {row.plan.host_gib:.0f} of each host" if machine.cuda else ""
            train = row.plan.machine.ranks
            some = f", {train} of which train" if train < machine.ranks else ""
            out.append(
                f"{text} fits on {where}{some}, {row.plan.device_gib:.1f} GiB{each}{host}, with: "
                f"{shlex.join(row.overrides)}"
            )
    return out
