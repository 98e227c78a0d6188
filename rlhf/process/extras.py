"""Libraries that only some of the toolkit needs: they come with an extra of the package (see
pyproject.toml) and are imported where they are used.
"""

import importlib
from types import ModuleType

from rlhf.types import UserError


def require(module: str, extra: str) -> ModuleType:
    """The module of a library that comes with `extra`, imported now.

    Raises UserError with the command that installs the extra where the library is missing.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # a library that is there but lacks one of its own is another defect, with its own message
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise UserError(
            f"The library {library} is not installed; it comes with the extra {extra!r}: "
            f"pip install 'rlhf-toolkit[{extra}]'"
        ) from error
