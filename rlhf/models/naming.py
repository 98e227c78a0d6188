"""What stage.train.modules may name of a model beside its own modules: kinds of weights that every
family has, and the regions of a model that reads pictures.
"""

import re
from collections.abc import Callable
from typing import Any

from rlhf.models.facts import is_picture_model

EMBEDDINGS, NORMS, HEAD = "embeddings", "norms", "head"  # names that every family's parts have
SCORE = "score"  # the head of a classifier
# of a model that reads pictures: what reads texts, what reads pictures, and what lies between
LANGUAGE, TOWER, PROJECTOR = "language", "tower", "projector"
_MERGER = "merger"  # in the names of Qwen's projectors, which lie in the tower


def matches(pattern: str) -> Callable[[str, str, str], bool]:
    """A test of a parameter's name, kind and region: the pattern names it, or a module around it,
    by the last parts of the name or by a regular expression of the whole name; or it names the kind
    or the region.
    """
    whole = re.compile(pattern)

    def test(name: str, kind: str, region: str) -> bool:
        if region and pattern == region:
            return True
        if pattern in (EMBEDDINGS, NORMS) and kind == pattern:
            return True
        if pattern == HEAD and kind in (HEAD, SCORE):
            return True
        places = name.split(".")
        around = [".".join(places[:end]) for end in range(1, len(places) + 1)]
        return any(
            one == pattern or one.endswith(f".{pattern}") or whole.fullmatch(one) is not None
            for one in around
        )

    return test


def regions(model: Any) -> Callable[[str], str] | None:
    """The region that a parameter of a transformers model is in, by its name: LANGUAGE (the head
    too), TOWER or PROJECTOR. None for a text model, and for one whose regions transformers doesn't
    tell apart.
    """
    if not is_picture_model(model.config):
        return None
    language = _name_of(model, model.get_decoder())
    tower = _name_of(model, model.get_encoder(modality="image"))
    if not language or not tower:
        return None
    head = _name_of(model, model.get_output_embeddings())

    def region(name: str) -> str:
        if _is_inside(name, language) or _is_inside(name, head) or name.startswith(f"{SCORE}."):
            return LANGUAGE
        if not _is_inside(name, tower):
            return PROJECTOR
        first = name.removeprefix(f"{tower}.").partition(".")[0]
        return PROJECTOR if _MERGER in first else TOWER

    return region


def _name_of(model: Any, wanted: Any) -> str:
    """The name of a module in `model`; "" for the model itself, and for none."""
    for name, module in model.named_modules():
        if module is wanted:
            return str(name)
    return ""


def _is_inside(name: str, module: str) -> bool:
    return bool(module) and name.startswith(f"{module}.")
