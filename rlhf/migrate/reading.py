"""What a file of another toolkit says: YAML, JSON, or the command lines of a script, as one mapping
of keys to values.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.migrate import shell
from rlhf.types import UserError

MAPPINGS = (".yaml", ".yml", ".json")
# Programs, as they stand in a command: the toolkit, and what a word has to end with or be.
_SCRIPTS = {
    "llama_factory": ("llamafactory-cli", "lmf", "src/train.py", "llamafactory/launcher.py"),
    "swift": ("swift", "megatron", "swift/cli/*.py", "swift.cli.*"),
    "axolotl": ("axolotl", "axolotl.cli.*"),
    "trl": ("trl", "trl/scripts/*.py", "examples/scripts/*.py", "examples/scripts/ppo/*.py"),
    "openrlhf": ("openrlhf.cli.*",),
}
# Launchers whose options come before the program, and the ones that say how many ranks start.
_RANKS = ("nproc_per_node", "nproc-per-node", "num_processes", "num_gpus", "NPROC_PER_NODE")
_NODES = ("nnodes", "num_nodes", "num_machines", "NNODES")
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Request:
    """A training, as another toolkit's file asks for it."""

    toolkit: str | None  # None where the file doesn't say
    command: str  # theirs, such as rlhf or train_dpo; "" where the file doesn't say
    values: dict[str, Any] = field(default_factory=dict)
    ranks: int | None = None


def read(path: Path, wanted: int | None) -> Request:
    """The training that a file asks for; `wanted` is its number (from 1) in a script of several.
    Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"migrate.path={path}: no such file.")
    if path.suffix in MAPPINGS:
        return Request(None, "", mapping(path))
    found = list(_requests(path))
    if not found:
        raise UserError(
            f"migrate.path={path}: no command of LLaMA-Factory, ms-swift, axolotl, TRL or OpenRLHF "
            "was found in it. Expected a YAML or JSON file, or a script with such a command."
        )
    if wanted is None and len(found) > 1:
        listed = [f"{at}: {one.toolkit} {one.command}" for at, one in enumerate(found, 1)]
        raise UserError(
            f"migrate.path={path} has {len(found)} commands ({'; '.join(listed)}). Choose one with "
            "migrate.number."
        )
    number = wanted or 1
    if number > len(found):
        raise UserError(f"migrate.number={number}: {path} has {len(found)} commands.")
    return found[number - 1]


def mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file. Raises UserError."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: it can't be read: {reason}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys with values, not {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}


def _requests(path: Path) -> Iterator[Request]:
    try:
        text = shell.script_text(path)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"migrate.path={path}: it can't be read as a script: {error}.") from error
    for words in shell.commands(text):
        program = find_program(words)
        if program is not None:
            yield _request(words, program, path)


@dataclass(frozen=True, slots=True)
class Program:
    """Where a toolkit's program stands in a command."""

    toolkit: str
    command: str
    after: int  # index of its first argument


def find_program(words: Sequence[str]) -> Program | None:
    """The program of a toolkit that trains in a command; None where there is none."""
    for at, word in enumerate(words):
        if word in ("pip", "pip3", "cd", "echo", "git") and at == 0:
            return None
        for toolkit, names in _SCRIPTS.items():
            if any(_matches(word, name) for name in names):
                return _program(toolkit, words, at)
    return None


def _matches(word: str, name: str) -> bool:
    pattern = re.escape(name).replace(r"\*", r"\w+")
    return re.fullmatch(rf"(?:.*/)?{pattern}", word) is not None


def _program(toolkit: str, words: Sequence[str], at: int) -> Program:
    word = words[at]
    if word.endswith(".py") or "." in word.rpartition("/")[2]:
        command = word.removesuffix(".py").replace("/", ".").rpartition(".")[2]
        if "megatron" in word:
            command = f"megatron {command}"
        return Program(toolkit, command, at + 1)
    has_command = at + 1 < len(words) and not words[at + 1].startswith("-")
    command = words[at + 1] if has_command else ""
    if word.rpartition("/")[2] == "megatron":
        command = f"megatron {command}"
    return Program(toolkit, command, at + 1 + has_command)


def _request(words: Sequence[str], program: Program, path: Path) -> Request:
    before, after = words[: program.after], words[program.after :]
    values: dict[str, Any] = {}
    files: list[str] = []
    overrides: list[str] = []
    arguments = list(after)
    while arguments and not arguments[0].startswith("-"):
        word = arguments.pop(0)
        (overrides if "=" in word else files).append(word)
    given = _options(arguments)
    files += [str(given.pop("config"))] if "config" in given else []
    for name in files:
        values |= mapping(beside(path, name)) if name.endswith(MAPPINGS) else {"argument": name}
    for word in overrides:
        key, _, value = word.partition("=")
        values[key] = scalar(value)
    launched = _launch_options(before)
    if "config_file" in launched:
        values["accelerate_config"] = launched["config_file"]
    environment = values.pop("ENV", None) or values.pop("env", None)
    ranks = _ranks(before)
    if isinstance(environment, Mapping) and ranks is None:
        ranks = _ranks([f"{key}={value}" for key, value in environment.items()])
    return Request(program.toolkit, program.command, values | given, ranks)


def beside(script: Path, name: str) -> Path:
    """A file that a script names: from the working directory, or from one that holds the script.
    Raises UserError.
    """
    folders = [Path(), *script.resolve().parents]
    if shell.is_shells(name):  # "$HERE"/x.yaml, as scripts name their neighbours
        folders, name = [script.parent], Path(name).name
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{script} names {name}, which is neither here nor in a folder above it.")


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """--key value, --key=value, --key (true), and --key with several values."""
    values: dict[str, Any] = {}
    key = None
    for word in arguments:
        if re.match(r"--?[A-Za-z]", word):
            key, equals, text = word.lstrip("-").partition("=")
            values[key] = [scalar(text)] if equals else []
        elif key is not None:
            values[key].append(scalar(word))
    return {key: _one(several) for key, several in values.items()}


def _one(several: list[Any]) -> Any:
    if not several:
        return True
    return several[0] if len(several) == 1 else several


def scalar(text: str) -> Any:
    """A word of a command line as YAML would read it, numbers with an exponent included."""
    if text.startswith(("{", "[")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    words = {"true": True, "false": False, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _ranks(words: Sequence[str]) -> int | None:
    """Ranks that a command starts, by its launcher's options or by its devices; None where it
    doesn't say.
    """
    said = _launch_options(words)
    nodes = _count(said, _NODES) or 1
    each = _count(said, _RANKS)
    if each is not None:
        alone = "num_processes" in said  # accelerate counts those of all nodes
        return each if alone else each * nodes
    for name in _DEVICES:
        devices = said.get(name)
        if devices and not shell.is_shells(devices):
            return len(str(devices).split(",")) * nodes
    return None


def _launch_options(words: Sequence[str]) -> dict[str, str]:
    said = {}
    for at, word in enumerate(words):
        key, equals, value = word.lstrip("-").partition("=")
        if equals:
            said[key] = value
        elif word.startswith("--") and at + 1 < len(words):
            said[key] = words[at + 1]
    return said


def _count(said: Mapping[str, str], names: Sequence[str]) -> int | None:
    for name in names:
        text = str(said.get(name, ""))
        if text.isdigit() and int(text) > 0:
            return int(text)
    return None


def flattened(values: Mapping[str, Any], whole: Sequence[str]) -> dict[str, Any]:
    """Keys of inner mappings joined by dots, and of lists of mappings by ``[].``; those named in
    `whole` stay as they are. Of a list, a key's value is the list of its items' values.
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in whole or not value:
            out[key] = value
        elif isinstance(value, Mapping):
            inner = {f"{key}.{name}": held for name, held in value.items()}
            out |= flattened(inner, whole)
        elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            out[key] = value
            out |= _of_items(key, value)
        else:
            out[key] = value
    return out


def _of_items(key: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for item in items for name in item))
    out = {}
    for name in names:
        held = [item[name] for item in items if name in item]
        out[f"{key}[].{name}"] = held[0] if len(held) == 1 else held
    return out
