"""What we use of Hydra beyond its public interface, in one file, so that an upgrade that removes it
is noticed here (tests/cli/test_hydra_private.py) and repaired here.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line as Hydra splits it."""

    overrides: list[str]  # option=value, in their order
    multirun: bool  # -m: a job for each combination of the values of sweeps


def split(arguments: Sequence[str]) -> CommandLine:
    """Overrides apart from Hydra's flags. Exits with Hydra's usage line for an unknown flag."""
    from hydra._internal.utils import get_args

    args = get_args(list(arguments))
    return CommandLine(overrides=list(args.overrides), multirun=bool(args.multirun))
