"""From a planned process to the command that its node runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.launch import machine
from rlhf.launch.children import Command
from rlhf.launch.commands import (
    TOKEN_ENV,
    rank_arguments,
    rank_variables,
    server_arguments,
)
from rlhf.launch.plan import Plan, Planned

_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all processes of a run are started with."""

    argv: Sequence[str]  # the command line of the launch
    run: str  # run.name
    stage: str
    python: str
    logs: Path  # directory of what servers print
    working_directory: str
    environment: Mapping[str, str]
    threads: int | None  # engine.threads
    token: str | None  # of servers; None where none are started


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where processes find each other."""

    address: str  # of rank 0
    port: int
    urls: str | None  # servers', separated by commas


def _variables(setup: Setup, process: Planned) -> dict[str, str]:
    """What the environments of servers and ranks have in common."""
    out = dict(setup.environment)
    if setup.token is not None:
        out[TOKEN_ENV] = setup.token
    if process.devices is not None:
        out[_DEVICES] = process.devices
    return out


def _words(setup: Setup, arguments: Sequence[str]) -> list[str]:
    return [setup.python, "-m", "rlhf", *arguments]


def _cores(key: str, process: Planned) -> set[int] | None:
    return None if process.cores is None else machine.parse_cores(key, process.cores)


def server_command(setup: Setup, process: Planned, host: str, port: int) -> Command:
    """A server that listens on `host`:`port`. What it prints goes to a log."""
    number = str(process.number)
    arguments = server_arguments(setup.argv, setup.run, number, host, str(port), process.cores)
    return Command(
        name=process.name,
        arguments=_words(setup, arguments),
        environment=_variables(setup, process),
        cores=_cores("rollout.server.cores", process),
        log=setup.logs / f"{setup.stage}-server-{process.number}.log",
        folder=setup.working_directory,
    )


def rank_command(
    setup: Setup, planned: Plan, process: Planned, meeting: Meeting, failures: Path
) -> Command:
    """A rank that meets the others at `meeting` and records its failure in a file in `failures`."""
    arguments = rank_arguments(setup.argv, meeting.urls)
    cores = _cores("launch.cores", process)
    if cores is not None and setup.threads is None:
        # a rank would share its own cores out among all ranks of the machine
        arguments.append(f"engine.threads={len(cores)}")
    numbers = rank_variables(
        process.number, process.local, len(planned.ranks), planned.ranks_per_node
    )
    meet = {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
    return Command(
        name=process.name,
        arguments=_words(setup, arguments),
        environment={**_variables(setup, process), **numbers, **meet},
        cores=cores,
        folder=setup.working_directory,
        error_file=failures / f"rank-{process.number}.json",
    )
