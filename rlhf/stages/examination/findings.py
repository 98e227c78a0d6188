"""Findings of ``stage=doctor``, and the report of them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from rlhf.process.files import write_json
from rlhf.run.console import console


class State(Enum):
    """How a finding is meant. Only ``fail`` makes the command exit with 1."""

    ok = "ok"
    info = "info"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    found: str
    remedy: str = ""


def as_text(findings: Sequence[Finding]) -> str:
    """The report as plain lines."""
    width = max(len(f.name) for f in findings)
    return "\n".join(
        f"{f.state.value:<4}  {f.name:<{width}}  {f.found}"
        + (f"  -> {f.remedy}" if f.remedy else "")
        for f in findings
    )


def write(findings: Sequence[Finding], path: Path) -> None:
    """A JSON file {"findings": [{name, state, found, remedy}]}."""
    rows = [{**asdict(finding), "state": finding.state.value} for finding in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"findings": rows})


def print_table(findings: Iterable[Finding]) -> None:
    from rich.table import Table

    colours = {State.ok: "green", State.info: "dim", State.warn: "yellow", State.fail: "bold red"}
    table = Table(title="rlhf doctor")
    for heading in ("", "check", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(
            f"[{colours[finding.state]}]{finding.state.value}[/]",
            *(cell.replace("[", r"\[") for cell in (finding.name, finding.found, finding.remedy)),
        )
    console().print(table)
