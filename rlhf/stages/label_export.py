"""Tasks for people: candidates, choice, ledger, files."""

from rlhf.run import RunContext


def export(ctx: RunContext) -> None:
    raise NotImplementedError
