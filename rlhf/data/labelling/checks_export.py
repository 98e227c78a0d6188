"""What can be known of label.mode=export before anything loads."""

from conf.schema import Config


def check_export(cfg: Config) -> None:
    """Raises UserError."""
    raise NotImplementedError
