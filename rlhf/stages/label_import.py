"""Labels back: read, checked, aggregated, written as preference data."""

from rlhf.run import RunContext


def import_labels(ctx: RunContext) -> None:
    raise NotImplementedError
