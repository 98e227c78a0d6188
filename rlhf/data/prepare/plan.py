"""data.pipeline as typed steps: names, options, seeds and the checks that need no row."""

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from conf.preparation import STEPS
from conf.preparation.base import StepOptions
from rlhf.data.formats import Use
from rlhf.process.files import sha256
from rlhf.process.wording import describe, nearest_hint
from rlhf.types import UserError

READING_VERSION = 2  # raised whenever the same file gives other rows

# Steps that people ask for and that can't be: the reason, and what to do instead.
REFUSED = {
    "smote": "SMOTE interpolates between two rows' vectors, and a point between two embeddings "
    "is no text that a model could be trained on. "
    "Use step balance (over-sampling, under-sampling or weights) for texts; for a classifier "
    "head on embeddings call rlhf.data.prepare.smote.smote",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One step with its options, ready to run."""

    where: str  # for messages: data.pipeline[2] (length)
    options: StepOptions
    seed: int

    @property
    def name(self) -> str:
        return self.options.step


def step_seed(seed: int, name: str, occurrence: int) -> int:
    """A step's own seed: of the run's seed, its name and how many steps of that name come before,
    so that other steps don't change it.
    """
    return random.Random(f"{seed}:step:{name}:{occurrence}").getrandbits(31)


def plan(
    pipeline: Sequence[object], *, kind: Use | None = None, seed: int = 0, held_out: bool = False
) -> list[Planned]:
    """Steps of `pipeline` (mappings {step: NAME, option: value ...}, or bare names), in order.

    `kind`: what the rows are; None where that isn't known yet, and then not checked. `held_out`:
    rows of split eval come in, as after a split. Raises UserError: an unknown step or option (with
    the nearest), a value out of range, a step that can't take the rows, one for after the split
    before it, a second split, a file that is missing.
    """
    out: list[Planned] = []
    seen: Counter[str] = Counter()
    split_at = "data.eval_path" if held_out else None
    for index, entry in enumerate(pipeline):
        name, given = _entry(entry, f"data.pipeline[{index}]")
        where = f"data.pipeline[{index}] ({name})"
        options = _options(where, name, given)
        if options.after_split and split_at is None:
            raise UserError(
                f"{where}: runs after the split only, so that nothing made from a row can end on "
                "both sides. Put step split before it."
            )
        if kind is not None and kind.value not in options.kinds:
            raise UserError(
                f"{where}: takes rows of kind {', '.join(sorted(options.kinds))}; these are of "
                f"kind {kind.value}."
            )
        if options.splits and split_at is not None:
            raise UserError(
                f"{where}: {split_at} already says which rows are held out: expected one split."
            )
        _check_files(where, options)
        out.append(Planned(where, options, step_seed(seed, name, seen[name])))
        seen[name] += 1
        split_at = where if options.splits else split_at
    return out


def _entry(entry: object, where: str) -> tuple[str, Mapping[str, Any]]:
    """Name and options of one entry. Raises UserError."""
    given: Mapping[str, Any] = {}
    name = entry
    if isinstance(entry, Mapping):
        if "step" not in entry:
            hint = nearest_hint("step", [str(k) for k in entry], "; nearest key: '", "'")
            raise UserError(
                f"{where}: expected {{step: NAME, option: value ...}}, found no 'step'{hint}."
            )
        name, given = entry["step"], {str(k): v for k, v in entry.items() if k != "step"}
    if not isinstance(name, str):
        raise UserError(
            f"{where}: expected a step's name or {{step: NAME, option: value ...}}, found "
            f"{describe(name)}."
        )
    if name in REFUSED:
        raise UserError(f"{where}: step {name} is refused: {REFUSED[name]}.")
    if name not in STEPS:
        hint = nearest_hint(name, list(STEPS), " Nearest: ", ".")
        raise UserError(f"{where}: no such step {name!r}.{hint} Steps: {', '.join(STEPS)}.")
    return name, given


def _options(where: str, name: str, given: Mapping[str, Any]) -> StepOptions:
    """Typed options: OmegaConf checks the types, __post_init__ the ranges. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cls = STEPS[name]
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            hint = nearest_hint(key, known, " Nearest: ", ".")
            raise UserError(
                f"{where}: no such option {key!r}.{hint} Options: {', '.join(known) or 'none'}."
            )
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(given)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(options, StepOptions)
    return options


def _check_files(where: str, options: StepOptions) -> None:
    for option, name in options.files().items():
        path = Path(name).expanduser()
        if path.exists():
            continue
        hint = ""
        if path.parent.is_dir():
            names = [p.name for p in path.parent.iterdir()]
            hint = nearest_hint(path.name, names, f" Nearest in {path.parent}: ", ".")
        raise UserError(f"{where}: {option}={name}: no such file or directory.{hint}")


def option_values(options: StepOptions) -> dict[str, Any]:
    """Options as JSON can hold them, enumerations by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return {f.name: plain(getattr(options, f.name)) for f in dataclasses.fields(options)}


def digest(*parts: object) -> str:
    """32 hexadecimal digits of the hash of values that JSON can hold."""
    return hashlib.sha256(
        json.dumps(parts, ensure_ascii=True, sort_keys=True).encode()
    ).hexdigest()[:32]


def content_hash(name: str) -> str:
    """The hash of a file's bytes, or of all files below a directory with their names."""
    path = Path(name).expanduser()
    if path.is_file():
        return sha256(path)
    return digest(
        *([str(p.relative_to(path)), sha256(p)] for p in sorted(path.rglob("*")) if p.is_file())
    )


def keys(steps: Sequence[Planned], source: str, kind: Use) -> list[str]:
    """The key of each result, that of the reading first. A step's key depends on what came in and
    on its name, version, options, seed and files: equal keys mean equal rows.
    """
    out = [digest("read", READING_VERSION, source, kind.value)]
    for step in steps:
        options = step.options
        files = {option: content_hash(name) for option, name in sorted(options.files().items())}
        out.append(
            digest(out[-1], step.name, options.version, option_values(options), step.seed, files)
        )
    return out
