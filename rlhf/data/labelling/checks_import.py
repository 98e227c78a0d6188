"""What can be known of label.mode=import before anything loads."""

from conf.schema import Config


def check_import(cfg: Config) -> None:
    """Raises UserError."""
    raise NotImplementedError
