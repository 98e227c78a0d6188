"""The private parts of transformers and TRL that we use: each is in the installed version, and a
missing one is named.
"""

import functools
import inspect
import types
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import Trainer

from rlhf.offline import private_hooks
from rlhf.offline.private_hooks import USED, USED_CODE, Part, PrivateHooks


def problems(
    used: Sequence[Part] = USED, code: Sequence[tuple[type, str]] = USED_CODE
) -> list[str]:
    """What of `used` and `code` the installed versions no longer have, a sentence each."""
    missing = [problem for part in used if (problem := _problem(part)) is not None]
    for owner, line in code:
        if line not in _source(owner):
            missing.append(f"{_name(owner)}: its code no longer holds {line!r}")
    return missing


def _problem(part: Part) -> str | None:
    whole = f"{_name(part.owner)}.{part.name}"
    source = _source(part.owner)
    if part.parameters is None:
        if f"self.{part.name} = " in source:
            return None
        return f"{whole}: the attribute is gone"
    function = getattr(part.owner, part.name, None)
    if function is None:
        return f"{whole}: it is gone"
    parameters = tuple(inspect.signature(function).parameters)
    if isinstance(part.owner, type):
        parameters = parameters[1:]  # self
        if f"self.{part.name}" not in source:
            return f"{whole}: its class no longer calls it"
    if parameters != part.parameters:
        return (
            f"{whole}: it takes ({', '.join(parameters)}), expected ({', '.join(part.parameters)})"
        )
    return None


@functools.cache
def _source(owner: type | ModuleType) -> str:
    return inspect.getsource(owner)


def _name(owner: type | ModuleType) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"


def test_the_installed_versions_have_all_of_them() -> None:
    assert problems() == [], (
        "transformers or TRL changed what rlhf/offline/private_hooks.py relies on: look there"
    )


class Changed:
    """A library's class after an upgrade."""

    def __init__(self) -> None:
        self._kept = 1
        self._called(1)

    def _called(self, model: Any, norm: Any = None) -> None: ...

    def _never_called(self, model: Any) -> None: ...


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Part(Changed, "_gone", ("model",)), ("Changed._gone", "gone")),
        (Part(Changed, "_called", ("model",)), ("Changed._called", "(model, norm)", "(model)")),
        (Part(Changed, "_never_called", ("model",)), ("Changed._never_called", "no longer calls")),
        (Part(Changed, "_attribute"), ("Changed._attribute", "attribute is gone")),
        (Part(types, "renamed", ()), ("types.renamed", "gone")),
    ],
)
def test_what_an_upgrade_changed_is_named(part: Part, words: tuple[str, ...]) -> None:
    (problem,) = problems([part], [])
    assert all(word in problem for word in words)


def test_what_stayed_is_no_problem() -> None:
    stayed = [Part(Changed, "_called", ("model", "norm")), Part(Changed, "_kept")]
    assert problems(stayed, [(Changed, "self._called(1)")]) == []
    (problem,) = problems([], [(Changed, "self._called(2)")])
    assert "Changed" in problem and "self._called(2)" in problem


def test_every_private_method_that_is_overridden_is_listed() -> None:
    listed = {part.name for part in USED}
    private = {
        name
        for name, value in vars(PrivateHooks).items()
        if name.startswith("_") and not name.startswith("__") and callable(value)
    }
    assert private <= listed, f"add to USED: {sorted(private - listed)}"
    assert "_get_train_sampler" in private and hasattr(Trainer, "_get_train_sampler")


def test_no_other_file_of_ours_knows_a_private_name() -> None:
    folder = Path(private_hooks.__file__).parent
    names = {part.name for part in USED if part.name.startswith("_")}
    for path in sorted(folder.glob("*.py")):
        if path.name == "private_hooks.py":
            continue
        text = path.read_text(encoding="utf-8")
        used = [name for name in names if f".{name}" in text or f"def {name}(" in text]
        assert not used, f"{path}: {used}: only rlhf/offline/private_hooks.py may use them"
