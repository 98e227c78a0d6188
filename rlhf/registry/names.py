"""Models by their names in the registry: ``registry:NAME@ALIAS`` or ``registry:NAME@NUMBER`` where
an option takes a model's directory.
"""

from pathlib import Path

from rlhf.registry.files import check_unchanged
from rlhf.registry.records import PREFIX, Version
from rlhf.registry.store import Registry
from rlhf.types import UserError


def split_name(text: str, key: str) -> tuple[str, str]:
    """The model's name and the alias or number in NAME@ALIAS; `key`: the option, for messages.
    Raises UserError.
    """
    name, at, which = text.removeprefix(PREFIX).partition("@")
    if not name or not at or not which:
        raise UserError(
            f"{key}={text}: expected NAME@ALIAS or NAME@NUMBER, such as mine@production or mine@3."
        )
    return name, which


def version_of(text: str, key: str, file: Path) -> Version:
    """The version that NAME@ALIAS or NAME@NUMBER means now. Raises UserError."""
    name, which = split_name(text, key)
    with Registry(file) as registry:
        return registry.version(name, which)


def directory_of(text: str, key: str, file: Path) -> str:
    """The directory of a version, whose files are what was registered. Raises UserError."""
    version = version_of(text, key, file)
    check_unchanged(version.draft, f"{key}={text} ({version.label})")
    return version.draft.path
