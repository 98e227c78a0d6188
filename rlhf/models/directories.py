"""What a model directory holds, and what its weights mean: `contents`. Everything that takes a
model's path asks here, so that every stage reads the same model from the same directory.

A directory holds whole weights, GGUF files, or an adapter, which is a change to the weights of a
base. The base is a directory or a hub's name, and may hold an adapter itself: then both are merged,
the base's first.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.choices import AdapterKind
from conf.schema import AdapterConfig, ModelConfig, facts_of
from rlhf.process import files
from rlhf.types import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "name"  # the key of adapter.name in the metadata of an adapter's file of weights
START = "start"  # folder of a run: the whole weights that it starts from, where model.path has none
# folder of a run: the same before rounding, where start/ holds rounded weights (adapter.quantize)
UNROUNDED = "unrounded"
CLASSIFIER = "SEQ_CLS"  # PEFT's task type of a reward model's adapter
# how the names of input embeddings end in the model families
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
# PEFT's types whose update no weights can hold: they stay beside their base
NATIVE = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "BOTTLENECK", "MOLORA")
# those that nothing here can run
_UNREADABLE = ("MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A directory that holds an adapter."""

    directory: Path
    base: str  # the directory or hub's name that it changes
    task: str | None  # PEFT's task type
    kind: str = "LORA"  # PEFT's type
    ahead: int = 0  # virtual tokens, which take so many positions in front of every row

    @property
    def is_native(self) -> bool:
        """Whether the adapter stays beside its base, since no weights can hold it."""
        return self.kind in NATIVE


@dataclass(frozen=True, slots=True)
class Contents:
    """What a path stands for: whole weights, and the adapters that are merged into them in turn."""

    path: str
    weights: str  # the directory or hub's name of the whole weights, or of a GGUF file
    adapters: tuple[Adapter, ...]  # in the order in which they were trained; () for whole weights
    has_config: bool  # whether `weights` is a directory with a config.json

    @property
    def is_local(self) -> bool:
        """Whether the weights are in a directory rather than on a hub."""
        return Path(self.weights).is_dir()

    @property
    def loads_as_it_is(self) -> bool:
        """Whether transformers, PEFT and vLLM all start from `path`.

        They do from whole weights' directory and from a hub's name. GGUF files and adapters have to
        be written out first: of an adapter on an adapter these libraries would read only the last.
        """
        return not self.adapters and (self.has_config or not self.is_local)

    @property
    def is_native(self) -> bool:
        """Whether the model is weights with an adapter beside them that they can't hold."""
        return any(adapter.is_native for adapter in self.adapters)

    def tokenizer_place(self) -> str:
        """Where the tokenizer is: an adapter that was saved without one has its base's."""
        for adapter in reversed(self.adapters):
            if any(adapter.directory.glob("tokenizer*")):
                return str(adapter.directory)
        return self.weights

    def files(self) -> list[Path]:
        """The files that make the model: configurations and weights, of the base and of every
        adapter; none for a hub's name.
        """
        folders = [adapter.directory for adapter in self.adapters]
        if self.is_local:
            folders.insert(0, Path(self.weights))
        out: list[Path] = []
        for folder in folders:
            for pattern in ("config.json", ADAPTER_CONFIG, "*.safetensors", "*.gguf"):
                out += sorted(folder.glob(pattern))
        return out


def contents(path: str | Path, key: str = "model.path") -> Contents:
    """What `path`, a directory or a hub's name, holds; `key` is its option, for messages.

    Raises UserError for a directory that is no model's, for weights that exist only as pickles, and
    for an adapter whose base is not told, is gone, or leads back to itself.
    """
    path = str(path)
    adapters: list[Adapter] = []
    where, name = path, f"{key}={path}"
    while True:
        if may_be_hub_name(where):
            return Contents(path, where, tuple(reversed(adapters)), has_config=False)
        directory = Path(where).expanduser()
        _check_directory(directory, name)
        if not _holds_adapter(directory, name):
            has_config = (directory / "config.json").is_file()
            found = tuple(reversed(adapters))
            return Contents(path, str(directory), found, has_config=has_config)
        adapter = _read_adapter(directory, name)
        known = [known.directory.resolve() for known in adapters]
        if directory.resolve() in known:
            raise UserError(
                f"{name}: its {ADAPTER_CONFIG} leads back to an adapter that rests on it. Expected "
                "a base_model_name_or_path that ends at whole weights."
            )
        adapters.append(adapter)
        where = adapter.base
        name = f"{directory / ADAPTER_CONFIG}: base_model_name_or_path={where}"


def trains_on_adapter(path: str | None, adapter: AdapterConfig) -> bool:
    """Whether a new adapter would stand on others: on that which the model's `path` holds, or on
    those of adapter.load, merged first.
    """
    if adapter.kind is AdapterKind.none:
        return False
    return merges_first(adapter) or (path is not None and bool(contents(path).adapters))


def fingerprint(path: str | Path) -> str | None:
    """16 hexadecimal digits that change when the model of a directory does; None for a hub's name
    and for what is no model.
    """
    try:
        return files.fingerprint(contents(path).files())
    except UserError:
        return None


def check_model_path(path: str | None, key: str = "model.path") -> Contents:
    """`contents` of an option that must be set. Raises UserError."""
    if path is None:
        raise UserError(f"{key} is not set: give the directory of a model (or model=tiny).")
    return contents(path, key)


def may_be_hub_name(path: str) -> bool:
    """Whether `path` looks like ``owner/name`` or ``name`` of a model hub."""
    looks_local = os.path.isabs(path) or path.startswith((".", "~", "runs/"))
    return not looks_local and path.count("/") <= 1 and not Path(path).exists()


def pinned(name: str, revision: str) -> str:
    """The local copy of a hub's model at a branch, tag or commit. Raises UserError."""
    from huggingface_hub import snapshot_download

    what = f"model.path={name} model.revision={revision}"
    if not may_be_hub_name(name):
        raise UserError(f"{what}: that is no hub's name. Leave model.revision out.")
    try:
        return snapshot_download(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: can't be downloaded ({error}).") from error


def _check_directory(directory: Path, name: str) -> None:
    """`directory` is there, and holds a model that can be read without running code."""
    if not directory.is_dir():
        raise UserError(f"{name}: no such directory.{_directories_beside(directory)}")
    configs = ("config.json", ADAPTER_CONFIG)
    has_config = any((directory / config).exists() for config in configs)
    if not has_config and not any(directory.glob("*.gguf")):
        raise UserError(
            f"{name}: holds no config.json, {ADAPTER_CONFIG} or *.gguf, so it is not a "
            "model directory."
        )
    _refuse_pickles(directory, name)


def _directories_beside(missing: Path) -> str:
    """A hint for a message: the directories beside the one that is missing."""
    if not missing.parent.is_dir():
        return ""
    names = sorted(path.name for path in missing.parent.iterdir() if path.is_dir())
    return f" Directories in {missing.parent}: {', '.join(names[:8])}." if names else ""


def _refuse_pickles(directory: Path, what: str) -> None:
    """Weights that exist only as pickles are refused: loading a pickle can run code."""
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.gguf")):
        return
    pickles = []
    for suffix in ("*.bin", "*.pt", "*.pth"):
        pickles += [path.name for path in directory.glob(suffix)]
    pickles = sorted(name for name in pickles if name != "training_args.bin")
    if pickles:
        raise UserError(
            f"{what}: its weights are {', '.join(pickles[:3])}, pickles, which can run "
            "code when they are loaded. Expected *.safetensors: "
            "have whoever made them save them so (save_pretrained does)."
        )


def _holds_adapter(directory: Path, name: str) -> bool:
    """Whether a directory holds an adapter. Some trainers put the base's config.json beside it;
    with whole weights beside it nobody can tell which of the two is meant.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return False
    whole = sorted(path.name for path in directory.glob("model*.safetensors"))
    if whole and (directory / "config.json").is_file():
        raise UserError(
            f"{name}: holds whole weights ({whole[0]}) and an adapter ({ADAPTER_CONFIG}), so which "
            "model is meant can't be told: the weights may have the adapter merged in already. "
            "Expected one of the two: move the other to a directory of its own."
        )
    return True


def _read_adapter(directory: Path, name: str) -> Adapter:
    file = directory / ADAPTER_CONFIG
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        base, kind = content["base_model_name_or_path"], content["peft_type"]
        task = content.get("task_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name}: its {ADAPTER_CONFIG} can't be read ({type(error).__name__}: {error}). "
            "Expected PEFT's, with peft_type and base_model_name_or_path."
        ) from error
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{file}: base_model_name_or_path is {base!r}, so the adapter names no base. Expected "
            "the directory of the weights that it was trained on."
        )
    if kind in _UNREADABLE:
        raise UserError(
            f"{name}: an adapter of the kind {kind} can't be read here. Expected LoRA or another "
            "kind that PEFT merges, or a kind of adapter that this toolkit trains."
        )
    ahead = content.get("num_virtual_tokens") or 0
    return Adapter(directory, base, task if isinstance(task, str) else None, str(kind), ahead)


# ---- further adapters of one base (adapter.load) ----


def merges_first(adapter: AdapterConfig) -> bool:
    """Whether the weights that the run starts from have further adapters merged in."""
    return bool(adapter.load) and not facts_of(adapter).stacks


def further(adapter: AdapterConfig) -> Iterator[tuple[str, Adapter, float]]:
    """Each directory of adapter.load, what it holds, and its weight. Raises UserError."""
    weights = adapter.load_weights or [1.0] * len(adapter.load)
    for place, weight in zip(adapter.load, weights, strict=True):
        held = contents(place, "adapter.load").adapters
        if not held:
            raise UserError(
                f"adapter.load: {place} holds whole weights. Expected the directory of an adapter, "
                "such as adapter/ of a run."
            )
        yield place, held[-1], weight


def check_further(model: ModelConfig, adapter: AdapterConfig, task: str) -> None:
    """The directories of adapter.load hold adapters of the model, for PEFT's `task`, whose updates
    weights can hold; other weights than 1 are for low-rank updates. Raises UserError.
    """
    if not merges_first(adapter):
        return
    for place, held, weight in further(adapter):
        if held.is_native:
            raise UserError(
                f"adapter.load: {place} holds an adapter of the kind {held.kind}, which no weights "
                f"can hold, so none of the kind {adapter.kind.value} can stand on it."
            )
        if (held.task == CLASSIFIER) is not (task == CLASSIFIER):
            raise UserError(
                f"adapter.load: {place} was trained for another task ({held.task}) than this "
                f"stage's ({task}). Give it as model.path of this stage in place of adapter.load."
            )
        if not _stands_on(held, model):
            raise UserError(
                f"adapter.load: {place} was trained on {held.base}, not on "
                f"model.path={model.path}. Expected adapters of one base."
            )
        if weight != 1 and not _is_linear(held):
            raise UserError(
                f"adapter.load_weights: {weight:g} for {place}, an adapter of the kind "
                f"{held.kind} whose update can't be taken in part. Expected 1, or a LoRA without "
                "magnitudes (DoRA) and without modules of its own."
            )
        if not math.isfinite(weight):
            raise UserError(f"adapter.load_weights: {weight} for {place}: expected a number.")


def _stands_on(held: Adapter, model: ModelConfig) -> bool:
    """Whether the adapter changes the model of model.path."""
    if model.path is None or held.base == model.path:
        return model.path is not None
    if Path(held.base).resolve() == Path(model.path).expanduser().resolve():
        return True
    known = fingerprint(model.path)
    return known is not None and fingerprint(held.base) == known


def _is_linear(held: Adapter) -> bool:
    """Whether a share of the update is the update times that share."""
    from peft import PeftConfig

    with readable(f"the adapter {held.directory}"):
        config: Any = PeftConfig.from_pretrained(str(held.directory))
    if held.kind != "LORA":
        return False
    return not config.use_dora and not config.modules_to_save


# ---- what can be read ----


def check_native_taken(held: Contents, taken: bool) -> None:
    """Raises UserError for a model whose adapter no weights can hold, where it isn't `taken`, and
    where another adapter stands on it.
    """
    native = [adapter for adapter in held.adapters if adapter.is_native]
    if not native:
        return
    if not taken:
        raise UserError(
            f"{held.path}: its adapter {native[0].directory} of the kind {native[0].kind} can't be "
            "merged into weights, so nothing can be trained on it here. Expected whole weights or "
            f"an adapter that merges; {held.weights} is its base. It can be evaluated and score."
        )
    if native != [held.adapters[-1]]:
        raise UserError(
            f"{held.path}: an adapter stands on {native[0].directory}, which can't be merged into "
            "weights. Expected it to be the last one."
        )


def adapter_name(adapter: Adapter) -> str | None:
    """The name among several under which this toolkit saved an adapter (adapter.name); None of
    another program's, and of one that is no such name.
    """
    from safetensors import safe_open

    file = adapter.directory / "adapter_model.safetensors"
    with readable(f"the adapter {adapter.directory}"), safe_open(str(file), "pt") as held:
        name = str((held.metadata() or {}).get(ADAPTER_NAME, ""))
    return name if re.fullmatch(r"[\w-]+", name) else None


def embedding_rows(adapter: Adapter) -> int | None:
    """The rows of the embedding that an adapter brings beside its updates; None where it brings
    none, as most.
    """
    from safetensors import safe_open

    with (
        readable(f"the adapter {adapter.directory}"),
        safe_open(str(adapter.directory / "adapter_model.safetensors"), "pt") as file,
    ):
        for key in file.keys():  # noqa: SIM118
            if key.removesuffix(".weight").endswith(_EMBEDDINGS):
                return int(file.get_slice(key).get_shape()[0])
    return None


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Around a library that reads model files: any error becomes a UserError about `what`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    # Damaged files raise errors of JSON, safetensors, tokenizers (Rust) and torch, and of code that
    # relies on a number.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} can't be read ({type(error).__name__}: {first}). Restore its files, or give "
            "another directory."
        ) from error
