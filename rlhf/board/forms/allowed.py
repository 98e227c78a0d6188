"""What a visitor of the page may set. docs/reference/security.md says why.

Whoever has the link may train, and may read files of a few folders. What would run code of their
choice, reach out with this machine's secrets, or write elsewhere is left to the command line.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.board.paths import DEEPEST
from rlhf.cli.options import NAME

_TERM = f"reward.terms.{NAME}"
# Options of no form. Those that name code, other machines or their secrets, other places to write;
# and those that the page sets itself.
REFUSED = frozenset(
    {
        "run.dir",
        "run.dry_run",
        "reward.function",
        f"{_TERM}.function",
        f"{_TERM}.url",
        f"{_TERM}.token_env",
        f"{_TERM}.isolation",
        "stage.host",
        "stage.token_env",
        "stage.judge_function",
        "stage.llm_judge.url",
        "stage.llm_judge.token_env",
        "stage.watch.judge_function",
        "environment.path",
        "environment.url",
        "environment.token_env",
        "rollout.servers",
        "rollout.server.python",
        "rollout.server.token_env",
        "label.push",
        "label.pull",
        "label.url",
        "label.project",
        "label.token_env",
        "tracking.entity",
        "data.cache_dir",
        "engine.nvme_path",
    }
)
# Groups without a form: what starts processes elsewhere, and tasks.
NO_FORM = ("launch", "tasks")
# The presets give them; a memory plan alone reads the last.
_GIVEN = frozenset(
    {
        "adapter.kind",
        "engine.kind",
        "environment.kind",
        "model.kind",
        "rollout.backend",
        "tracking.kind",
        "model.params",
    }
)
REMOTE_CODE = "model.trust_remote_code"
_PRESETS = {"environment": ("python", "http")}  # refused ones
_VALUES = {f"{_TERM}.kind": ("function", "remote"), "stage.judges": ("function",)}
# What environment.tools may name: any other entry is a module's function.
TOOLS = ("calculator", "python", "lookup", "shell")

# Of data.pipeline's steps.
_STEP_PATHS = (
    "back",
    "decisions",
    "dictionary",
    "model",
    "reward_model",
    "synonyms",
    "there",
    "tokenizer",
    "words",
)
TRANSLATOR = f"data.pipeline.{NAME}.translator"  # may be a module's function elsewhere

# Options that name files or folders; <name> stands for an item's name.
PATHS = frozenset(
    {
        "data.path",
        "data.eval_path",
        f"data.sources.{NAME}.path",
        "data.registry",
        "data.image_dir",
        "data.join",
        "data.chat_template",
        "model.path",
        "reward.path",
        f"{_TERM}.paths",
        f"{_TERM}.schema_file",
        "stage.before",
        "stage.after",
        "stage.policies",
        "stage.models",
        "stage.pairs",
        "stage.samples",
        "stage.curve",
        "stage.judge_path",
        "stage.llm_judge.path",
        "stage.watch.judge_path",
        "adapter.load",
        "stage.adapters",
        "environment.files",
        "label.policies",
        "label.samples",
        "label.review",
        "label.gold_path",
        "label.instructions",
        "label.export",
        "label.files",
        *(f"data.pipeline.{NAME}.{option}" for option in _STEP_PATHS),
    }
)
# A text or a file; a template's name or a file.
_MAY_BE_TEXT = {"label.instructions": (".md", ".txt"), "data.chat_template": (".jinja", ".j2")}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_CAP = re.compile(r"#\d+$")  # data.path=rows.jsonl#500
_GLOB = re.compile(r"[*?\[]")
_RUN_NAME = re.compile(r"[^/\\.~\s][^/\\]{0,99}")  # one of the names between slashes


def may_set(key: str, *, remote_code: bool) -> bool:
    """Whether a form has the option, given with <name> for an item's name."""
    if key == REMOTE_CODE:
        return remote_code
    group = key.partition(".")[0]
    return group not in NO_FORM and key not in REFUSED and key not in _GIVEN


def presets(group: str, known: Sequence[str]) -> list[str]:
    """Those of a group's presets that a page may choose."""
    refused = _PRESETS.get(group, ())
    return [name for name in known if name not in refused]


def values(key: str, known: Sequence[str]) -> tuple[str, ...]:
    """Those of an option's values that a page may choose."""
    refused = _VALUES.get(key, ())
    return tuple(name for name in known if name not in refused)


def is_run_name(name: str) -> bool:
    """Whether it is the plain name of a folder, or of one below another (films/second)."""
    names = name.split("/")
    plain = all(_RUN_NAME.fullmatch(each) for each in names)
    return plain and ".." not in name and len(names) <= DEEPEST


def is_within(key: str, text: str, folders: Sequence[Path]) -> bool:
    """Whether what an option names lies inside one of the folders, links followed; an option that
    names no file, and the name of a model or a data set of a hub, always is.
    """
    if key not in PATHS or not text:
        return True
    ends = _MAY_BE_TEXT.get(key)
    if ends is not None and not text.strip().endswith(ends) and not Path(text).exists():
        return key != "data.chat_template" or _HUB_NAME.fullmatch(text) is not None
    text = _CAP.sub("", text.strip())
    if _HUB_NAME.fullmatch(text) and not Path(text).exists():
        return True
    return all(_is_inside(path, folders) for path in _named(text))


def _named(text: str) -> list[Path]:
    """The paths that a text names: of a glob its fixed beginning, and what it matches now."""
    path = Path(text).expanduser()
    if not _GLOB.search(text) or path.exists():
        return [path]
    fixed = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if _GLOB.search(part) or part == "..":
            break
        fixed /= part
    if ".." in path.parts:
        return [fixed, Path(path.anchor or "/")]
    return [fixed, *map(Path, glob.glob(str(path), recursive=True))]


def _is_inside(path: Path, folders: Sequence[Path]) -> bool:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links; a null byte
        return False
    return any(resolved == folder or folder in resolved.parents for folder in folders)
