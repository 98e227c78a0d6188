"""Plans as tables."""

from collections.abc import Sequence
from typing import Any

from conf.choices import AdapterKind, EngineKind, Offload
from rlhf.memory import GIB, Bytes
from rlhf.memory.fit import Row, recommended
from rlhf.memory.machine import Machine
from rlhf.memory.plan import Plan
from rlhf.memory.shapes import Shape

_ORDER = ("policy", "reward model", "critic", "reference", "reward", "generator", "process")
_NF4_BITS = 4.127  # a 4-bit weight with its share of doubly quantised constants (Dettmers et al. 2023, arXiv:2305.14314, section 3)


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
        hosts = [max(m.total.host for m in plan.moments if m.phase is phase) for phase in plan.phases]
        table.add_row("host, all ranks", *(gib(plan.machine.ranks * held) for held in hosts))
    return table


def fit_table(rows: Sequence[Row], title: str) -> Any:
    """A line for every engine, offload and adapter: GiB per device by role at the peak, and whether it fits."""
    from rich.table import Table

    roles = roles_of(*(row.plan for row in rows))
    table = Table(title=title, title_justify="left")
    for heading in ("engine", "offload", "trains"):
        table.add_column(heading)
    for heading in (*roles, "all", "peak in", "host"):
        table.add_column(heading, justify="left" if heading == "peak in" else "right")
    table.add_column("fits")
    table.add_column("with", overflow="fold")
    previous: AdapterKind | None = None
    for row in rows:
        engine, adapter, moment = row.cfg.engine, row.cfg.adapter.kind, row.plan.peak()
        if previous not in (None, adapter):
            table.add_section()
        previous = adapter
        name = "torch" if engine.kind is EngineKind.torch else f"zero{engine.zero_stage}"
        offload = "" if engine.offload is Offload.none else engine.offload.value
        cells = [gib(moment.roles.get(role, Bytes()).device) for role in roles]
        fits = "[green]yes[/]" if row.plan.fits else "[red]no[/]"
        host = f"{row.plan.host_gib:.0f}" if row.plan.machine.cuda else ""
        changes = " ".join(row.changes) if row.plan.fits else row.plan.problem or ""
        trains = "all" if adapter is AdapterKind.none else f"LoRA r={row.cfg.adapter.rank}"
        table.add_row(name, offload, trains, *cells, gib(moment.total.device), moment.phase.value, host, fits, changes.replace("[", r"\["))
    return table


def answers(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Whether it fits, and with which overrides: a line for full training and one for LoRA."""
    where = f"{machine.ranks} device{'s' if machine.ranks > 1 else ''} of {machine.device_gib:.0f} GiB"
    if not machine.cuda:
        where = f"{machine.host_gib:.0f} GiB of memory and {machine.ranks} rank{'s' if machine.ranks > 1 else ''}"
    out = []
    for adapter, name in ((AdapterKind.none, "full training"), (AdapterKind.lora, "LoRA")):
        row = recommended(rows, adapter)
        if row is None:
            least = min((r for r in rows if r.cfg.adapter.kind is adapter), key=lambda r: r.plan.device_gib)
            why = f": {least.plan.problem}" if least.plan.problem else f": {least.plan.device_gib:.1f} GiB at the least"
            out.append(f"{name} doesn't fit on {where} with any engine{why}.")
        else:
            out.append(f"{name} fits on {where}, {row.plan.device_gib:.1f} GiB each, with: {' '.join(row.overrides)}")
    return out


def qlora_note(shape: Shape) -> str:
    """What a 4-bit base would save; the toolkit doesn't train one."""
    linear = sum(one.inputs * one.outputs for one in shape.linears)
    quantised = linear * _NF4_BITS / 8 + 2 * (shape.parameters - linear)
    return (
        f"QLoRA: this toolkit doesn't train on a 4-bit base. It would hold the frozen weights in {quantised / GIB:.1f} GiB in place of "
        f"{2 * shape.parameters / GIB:.1f}."
    )
