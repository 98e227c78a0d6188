"""From another toolkit's keys to our options: a line for each key, nothing left out."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf import schema
from conf.stages import STAGES
from rlhf.migrate import reading, shell
from rlhf.migrate.reading import Request
from rlhf.migrate.tables import Answer, Fate, NotPossible, Settings, Toolkit
from rlhf.types import UserError

# Presets of ours whose schema has another name.
SCHEMAS = {
    "ipo": "dpo",
    "simpo": "cpo",
    **dict.fromkeys(
        ("grpo", "rloo", "online_dpo", "gspo", "cispo", "dapo", "dr_grpo", "reinforce_pp", "remax"),
        "ppo",
    ),
}


# What a value of another kind than expected raises where it is looked at.
UNREADABLE = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: a key of theirs, and what becomes of it."""

    key: str
    value: Any
    answer: Answer
    is_default: bool = False  # theirs, of a key that the file leaves out


@dataclass(slots=True)
class Migration:
    """All that is known of a file."""

    toolkit: Toolkit
    command: str
    stage: str  # ours
    ranks: int
    lines: list[Line] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def with_fate(self, fate: Fate) -> list[Line]:
        """The lines of the file's own keys with this fate."""
        return [one for one in self.lines if one.answer.fate is fate and not one.is_default]

    @property
    def stopped_by(self) -> list[Line]:
        """Keys of a task that no stage has."""
        return [line for line in self.lines if line.answer.stops]


def migrate(
    request: Request,
    toolkit: Toolkit,
    file: Path,
    *,
    stage: str | None = None,
    ranks: int | None = None,
    rows: int | None = None,
) -> Migration:
    """What becomes of a file's keys. stage: ours, where the file doesn't say; ranks, rows: what the
    computations need. Raises NotPossible for a task that no stage has, UserError where values don't
    tell the stage.
    """
    given = flattened(request.values, toolkit)
    settings = Settings(
        command=request.command,
        given={key: value for key, value in given.items() if not shell.is_shells(value)},
        defaults={},
        file=file,
        ranks=ranks or request.ranks or 1,
        rows=rows,
    )
    try:
        settings = dataclasses.replace(settings, defaults=toolkit.defaults(settings))
        ours = stage or toolkit.stage(settings)
    except UNREADABLE as error:
        raise UserError(f"{file}: one of its values can't be read: {error}.") from error
    settings = dataclasses.replace(settings, stage=ours, schema=SCHEMAS.get(ours, ours))
    result = Migration(toolkit, request.command, ours, settings.ranks)
    for key, value in given.items():
        _add(result, settings, key, value)
    for key, value in settings.defaults.items():
        if given.get(key) is None:
            _add(result, settings, key, value, is_default=True)
    _add_ranks(result)
    _leave_adapter_out(result)
    _leave_optimizer_out(result)
    if ours == "ppo" and "reward.path" not in result.options:
        result.options["stage.critic_init"] = "policy"
        answer = Answer(Fate.computed, {"stage.critic_init": "policy"}, "no reward model is named")
        result.lines.append(Line("(critic)", None, answer, is_default=True))
    if "tracking" not in result.options and settings.schema != "export":
        result.options["tracking"] = "none"
        answer = Answer(Fate.computed, {"tracking": "none"}, "no tracker is named")
        result.lines.append(Line("(tracker)", None, answer, is_default=True))
    return result


def flattened(values: Mapping[str, Any], toolkit: Toolkit) -> dict[str, Any]:
    """Keys as the tables have them: with _ for the - of command lines, and inner mappings taken
    apart where the table has their keys, or none of them.
    """
    names = [key.name for key in toolkit.keys]
    parents = {name.rpartition(".")[0] for name in names}
    plain = {key.replace("-", "_"): value for key, value in values.items()}
    return reading.flattened(plain, [name for name in names if name not in parents])


def _add(result: Migration, s: Settings, key: str, value: Any, *, is_default: bool = False) -> None:
    answer = _answer(result.toolkit, s, key, value)
    answer = _fitting(answer, s, result.options)
    if is_default and answer.fate not in (Fate.taken, Fate.computed):
        return
    for option, ours in answer.options.items():
        result.options.setdefault(option, ours)
    result.lines.append(Line(key, value, answer, is_default))


def _answer(toolkit: Toolkit, s: Settings, name: str, value: Any) -> Answer:
    key = toolkit.find(name)
    if not value and any(key.name.startswith(f"{name}.") for key in toolkit.keys):
        return Answer(Fate.idle, note="not set")
    if key is None:
        return Answer(Fate.unknown, note=f"no key of {toolkit.title} that is known here")
    if value is None:
        return Answer(Fate.idle, note="not set")
    if shell.is_shells(value):
        return Answer(
            Fate.impossible, note="only a shell knows this value: set the option yourself"
        )
    try:
        return key.convert(s, value)
    except UNREADABLE as error:
        return Answer(Fate.impossible, note=f"the value can't be read: {error}")


def _fitting(answer: Answer, s: Settings, options: Mapping[str, Any]) -> Answer:
    """The answer without options that the stage doesn't have, or that another key has set
    otherwise.
    """
    kept, notes = {}, [answer.note] if answer.note else []
    for option, value in answer.options.items():
        if not exists(option, s.schema):
            notes.append(f"stage={s.stage} has no {option}")
        elif options.get(option, value) != value:
            notes.append(f"{option} stays as another key sets it")
        else:
            kept[option] = value
    fate = answer.fate
    if answer.options and not kept and fate in (Fate.taken, Fate.computed):
        fate = Fate.impossible
    return Answer(fate, kept, "; ".join(notes), answer.stops)


def _add_ranks(result: Migration) -> None:
    """Several ranks need an engine that has them."""
    if result.ranks == 1:
        return
    options: dict[str, Any] = {"engine.gpus": result.ranks}
    if "engine" not in result.options:
        options["engine"] = "zero0"
    result.options |= options
    answer = Answer(Fate.computed, options, "data parallelism over all ranks")
    result.lines.append(Line("(ranks)", result.ranks, answer))


# Options of an adapter that say something without one.
_WITHOUT_ADAPTER = ("adapter.load", "adapter.load_weights", "adapter.merge_on_save")


# Losses that compare weights alone: TRL turns the model's dropout off for them, an adapter's too.
_WITHOUT_DROPOUT = ("dpo", "kto", "cpo", "orpo")


def _leave_out(result: Migration, option: str, reason: str, fate: Fate = Fate.idle) -> None:
    """Nothing reads the option, so the keys that set it have no effect."""
    result.options.pop(option, None)
    for at, line in enumerate(result.lines):
        if option in line.answer.options:
            answer = Answer(fate, note=reason)
            result.lines[at] = dataclasses.replace(line, answer=answer)


def _leave_adapter_out(result: Migration) -> None:
    """Where all weights train, nothing reads an adapter's options; without 4 bits nothing reads how
    their scales are held.
    """
    if result.options.get("adapter.quantize") != "nf4":
        _leave_out(result, "adapter.double_quantize", "nothing is held in 4 bits")
    if SCHEMAS.get(result.stage, result.stage) in _WITHOUT_DROPOUT:
        _leave_out(result, "adapter.dropout", "TRL trains this loss without dropout, as here")
    if result.options.get("adapter") != "none":
        return
    for at, line in enumerate(result.lines):
        idle = [key for key in line.answer.options if key.startswith("adapter.")]
        idle = [key for key in idle if key not in _WITHOUT_ADAPTER]
        if idle:
            answer = Answer(Fate.idle, note="all weights train, and no adapter")
            result.lines[at] = dataclasses.replace(line, answer=answer)
        for key in idle:
            result.options.pop(key, None)


def _leave_optimizer_out(result: Migration) -> None:
    """Under DeepSpeed AdamW alone steps, and its state is in every checkpoint."""
    engine = result.options.get("engine", "torch")
    if engine == "torch":
        return
    if result.options.get("stage.optimizer", "adamw") != "adamw":
        note = f"with engine={engine} AdamW alone steps, in 32 bits"
        _leave_out(result, "stage.optimizer", note, Fate.impossible)
    note = f"engine={engine} writes weights and optimizer's state together"
    _leave_out(result, "stage.save_optimizer", note, Fate.impossible)


def exists(option: str, stage: str) -> bool:
    """Whether an option is one of the configuration whose stage has the schema `stage`; a group's
    name counts as one.
    """
    first, *rest = option.split(".")
    if not rest:
        return first in schema.GROUPS
    config = {item.name: item.type for item in dataclasses.fields(schema.Config)}
    if first not in config:
        return False
    kind = STAGES[stage] if first == "stage" else config[first]
    return _has(kind, rest)


def _has(kind: Any, names: Sequence[str]) -> bool:
    if not names or typing.get_origin(kind) is dict:
        return True
    inner = kind if dataclasses.is_dataclass(kind) else None
    if inner is None or isinstance(kind, types.UnionType):
        return False
    fields = {item.name: item.type for item in dataclasses.fields(inner)}
    return names[0] in fields and _has(fields[names[0]], names[1:])


def toolkit_of(request: Request, known: Mapping[str, Toolkit], asked: str | None) -> Toolkit:
    """The toolkit of a file: the one that is asked for, the one whose command it is, or the one
    that its keys tell. Raises UserError.
    """
    name = asked or request.toolkit
    if name is not None:
        return known[name]
    telling = {}
    for title, toolkit in known.items():
        telling[title] = [key for key in request.values if key in toolkit.telltales]
    most = max(telling, key=lambda title: len(telling[title]))
    first = sorted((len(keys) for keys in telling.values()), reverse=True)
    if first[0] == 0 or first[0] == first[1]:
        raise UserError(
            "migrate.path: its keys don't tell whose they are. Set migrate.toolkit to one of "
            f"{', '.join(known)}."
        )
    return known[most]


__all__ = ["Line", "Migration", "NotPossible", "exists", "migrate", "toolkit_of"]
