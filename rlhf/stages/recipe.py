"""``data.recipe=...``: rows made from a package, before the stage that reads them."""

from conf.schema import DataConfig, RunConfig
from rlhf.data.recipes import build


def ensure(data: DataConfig, run: RunConfig) -> None:
    """Make the recipe's files where they are missing. A collective; raises UserError."""
    build.ensure(data, run)
