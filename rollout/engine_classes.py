"""Transformers' classes, given back as they were after vLLM has changed them.

For families that vLLM has no model of its own for (SmolLM3, OLMo, GPT-NeoX and more) it builds
transformers' model and decorates its decoder's class in place: a further base class, another
`__init__` and another `__call__`. Every other model of that class in this process, the trainer's
above all, would then fail ("Current vLLM config is not set", "no attribute 'do_not_compile'"). So
what vLLM adds moves into a subclass that only the engine's own modules have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_NAMES = ("__module__", "__qualname__", "__doc__")
_MISSING = object()


class KeptApart:
    """The classes that were decorated, each with its subclass once `give_back` has run."""

    def __init__(self) -> None:
        # class -> its attributes and bases of before
        self._before: dict[type, tuple[dict[str, Any], tuple[type, ...]]] = {}
        self._subclasses: dict[type, type] = {}

    def recording(self, decorator: Callable[..., Any]) -> Callable[..., Any]:
        """`decorator`, a function that makes class decorators, with a note of each class before it
        is changed.
        """

        def make(*args: Any, **kwargs: Any) -> Callable[[type], type]:
            decorate = decorator(*args, **kwargs)

            def noted(cls: type) -> type:
                self._before.setdefault(cls, (dict(vars(cls)), cls.__bases__))
                changed: type = decorate(cls)
                return changed

            return noted

        return make

    def give_back(self) -> None:
        """Make every class what it was before."""
        for cls, (attributes, bases) in self._before.items():
            self._subclasses[cls] = _moved_to_subclass(cls, attributes, bases)
        self._before.clear()

    def claim(self, model: nn.Module) -> None:
        """Let the modules of the engine's `model` have what was added to their classes."""
        for module in model.modules():
            subclass = self._subclasses.get(type(module))
            if subclass is not None:
                module.__class__ = subclass


@contextmanager
def kept_apart(backend: Any) -> Iterator[KeptApart]:
    """While an engine starts. `backend`: vLLM's module that builds transformers' models; its
    `support_torch_compile` decorates them.
    """
    kept, original = KeptApart(), backend.support_torch_compile
    backend.support_torch_compile = kept.recording(original)
    try:
        yield kept
    finally:
        backend.support_torch_compile = original
        kept.give_back()


def _moved_to_subclass(cls: type, attributes: dict[str, Any], bases: tuple[type, ...]) -> type:
    """Give `cls` its `attributes` and `bases` of before; returns a subclass with what was added."""
    added = {n: v for n, v in vars(cls).items() if attributes.get(n, _MISSING) is not v}
    for name in added:
        if name in attributes:
            setattr(cls, name, attributes[name])
        else:
            delattr(cls, name)
    further = tuple(base for base in cls.__bases__ if base not in bases)
    cls.__bases__ = bases
    names = {name: getattr(cls, name) for name in _NAMES}
    return type(cls.__name__, (cls, *further), added | names)
