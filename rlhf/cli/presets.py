"""The presets in conf/: which there are, what each is for, and which dataclass a stage's preset
fills. Needs neither Hydra nor YAML, so that the list of stages is quick.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import conf
from conf.schema import GROUPS as CONFIG_GROUPS
from conf.schema import ITEM_GROUPS
from conf.stages import FAMILIES, STAGES
from rlhf.types import UserError

CONF_DIR = Path(conf.__file__).resolve().parent
PRESET_GROUPS = ("stage", *CONFIG_GROUPS, *ITEM_GROUPS, "experiment")
# Schemas whose stage is in a module of another name.
_MODULES = {
    "ppo": "online",
    "dpo": "preference",
    "kto": "preference",
    "cpo": "preference",
    "orpo": "preference",
}
_SCHEMA = re.compile(r"^ *- /schema/stage/(\w+)@_here_", re.MULTILINE)


def choices(group: str) -> list[str]:
    """Names of the presets in ``conf/<group>``; stages first by what they build on, then by name,
    the schema's own preset before the others.
    """
    folder = CONF_DIR / group
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if group == "stage":
        order = list(STAGES)
        names.sort(key=lambda name: (order.index(stage_schema(name)), name not in STAGES))
    return names


def preset_text(group: str, name: str) -> str:
    """The YAML file of a preset."""
    return (CONF_DIR / group / f"{name}.yaml").read_text(encoding="utf-8")


def summary(group: str, name: str) -> str:
    """What is particular to a preset: the first comment of its file, up to the first full stop that
    ends a line. Empty for a file that begins otherwise.
    """
    lines: list[str] = []
    for line in preset_text(group, name).splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# ").strip())
        if line.endswith("."):
            break
    return " ".join(lines)


def stage_schema(preset: str) -> str:
    """The name in `STAGES` of the dataclass that ``conf/stage/<preset>.yaml`` fills (an online
    algorithm's preset fills that of ``ppo``). Raises UserError.
    """
    match = _SCHEMA.search(preset_text("stage", preset))
    if match is None:
        raise UserError(
            f"conf/stage/{preset}.yaml: its defaults list names no /schema/stage/<schema>@_here_."
        )
    return match[1]


def module_name(preset: str) -> str:
    """The module in rlhf/stages/ that runs a stage's preset. Raises UserError."""
    schema = stage_schema(preset)
    return _MODULES.get(schema, schema)


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is most like `word`; empty where none is known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return close[0] if close else ""


def list_stages() -> str:
    """What ``python -m rlhf`` prints: stages by what they are for, and the experiments."""
    stages = choices("stage")
    experiments = choices("experiment")
    width = max(len(f"experiment={name}") for name in experiments)
    width = max(width, *(len(f"stage={name}") for name in stages))
    lines = ["usage: python -m rlhf stage=NAME [group=PRESET ...] [option=value ...]"]
    for family, schemas in FAMILIES.items():
        lines += ["", family]
        for name in stages:
            if stage_schema(name) in schemas:
                lines.append(_row(f"stage={name}", summary("stage", name), width))
    lines += ["", "experiments: settings for several stages; stage=chain runs all of one"]
    lines += [
        _row(f"experiment={name}", summary("experiment", name), width) for name in experiments
    ]
    lines += [
        "",
        "python -m rlhf stage=NAME --help       every option of a stage, what it means, its range",
        "python -m rlhf stage=NAME --cfg job    the values that a run would have",
        "python -m rlhf -m stage=NAME k=1,2     a run for each value",
    ]
    return "\n".join(lines)


def _row(name: str, text: str, width: int) -> str:
    return f"  {name:<{width}}  {text}"
