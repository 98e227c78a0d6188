"""Weights on their way into a generator: names and shapes are checked, and every tensor leaves a
checksum to compare with later.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.process.files import OwnFolder, memory_folder
from rlhf.types import AdapterWeights, SyncError

_BLOCK = 1 << 17  # words summed at a time: in 64 bits they fit a core's cache
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size
_SHOWN = 5  # names in one message
# Columns that are read back from a matrix which an engine has packed for its kernels, and what
# follows the matrix's name where a checksum is of those alone.
_COLUMNS = 8
SAMPLED = " (sampled columns)"
# Tensors that vLLM joins row by row, under the name of the joint one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a generator expects under one name."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class HubNames:
    """A model's tensors under the names of the hub's files, which are those that vLLM reads:
    transformers joins the experts of a layer into one tensor, and renames some layers.
    """

    def __init__(self, model: Any) -> None:
        """`model`: a transformers model, on the meta device, since only names and shapes are
        looked at.
        """
        self._model = model
        self._changed: set[str] = set()  # transformers' names that are not the hub's
        self.specs: dict[str, Spec] = {}  # by the hub's names
        self.copies: set[str] = set()  # second names of tied tensors
        self._names: dict[str, list[str]] = {}  # the hub's, by transformers'
        for name, tensor in model.state_dict().items():
            parts = self._parts(name, tensor)
            self._names[name] = list(parts)
            if list(parts) != [name]:
                self._changed.add(name)
            self.specs |= specs_of(parts)
            if name in model.all_tied_weights_keys:
                self.copies |= set(parts)

    @property
    def family(self) -> str:
        """transformers' model type."""
        return str(self._model.config.model_type)

    @property
    def joins(self) -> bool:
        """Whether a tensor of the model is several of the hub's."""
        return len(self.specs) > len(self._model.state_dict())

    def of(self, names: Iterable[str]) -> set[str]:
        """The hub's names of the tensors that transformers has under `names`."""
        return {own for name in names for own in self._names[name]}

    def __call__(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, those of another name renamed or cut into their parts."""
        for name, tensor in tensors:
            if name in self._changed:
                yield from self._parts(name, tensor).items()
            else:
                yield name, tensor

    def _parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        parts: dict[str, Tensor] = revert_weight_conversion(self._model, {name: tensor})
        return parts


def checksum(tensor: Tensor) -> str:
    """16 hexadecimal digits of sum_i (2 i + 1) bits_i modulo 2^64, computed where the tensor is.

    Odd weights are invertible modulo 2^64, so a change of any one element changes the sum, and so
    does a swap of unequal elements (unless 2^63 divides their distance times their difference). It
    tells a mistake from none; it is no defence against intent.
    """
    words = tensor.detach().contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
    odd = torch.arange(1, 2 * min(len(words), _BLOCK), 2, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK].long()
        total += (block * odd[: len(block)]).sum() + 2 * start * block.sum()
    return f"{int(total) % (1 << 64):016x}"


def weights_checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in tensors}


def sampled_columns(width: int, version: int) -> Tensor:
    """Columns of a matrix of this width, spread over it: the next ones at each version, so that
    every one has its turn.
    """
    count = min(_COLUMNS, width)
    return (torch.arange(count) * (width // count) + version) % width


def column_checksum(tensor: Tensor, dtype: torch.dtype, version: int) -> str:
    """Checksum of the sampled columns of a matrix [rows, width] in `dtype`."""
    columns = sampled_columns(tensor.shape[1], version).to(tensor.device)
    return checksum(tensor[:, columns].to(dtype))


class Incoming:
    """Iterates once over (name, tensor), passing on what fits the specs; `finish` raises on
    everything that didn't fit.

    The source is consumed to its end whatever is found in it: under ZeRO-3 each tensor is a
    collective, and a rank that stopped early would leave the others waiting.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        specs: Mapping[str, Spec],
        hashed: Container[str] | None = None,
        version: int = 0,
    ) -> None:
        """`hashed`: names that leave a checksum, a matrix's with SAMPLED behind it where that of
        its sampled columns is meant; None: all of them. A whole checksum takes about half as long
        as the copy that it guards. `version`: of the weights.
        """
        # of the hashed tensors that were passed on, in the dtype that the generator holds
        self.checksums: dict[str, str] = {}
        self.failed = False  # whether the source raised: the trainer's fault, not an engine's
        self._specs = specs
        self._hashed = hashed
        self._version = version
        self._seen: set[str] = set()
        self._wrong: list[str] = []
        self._passing = self._pass(self._watched(tensors))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._passing

    def _watched(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from tensors
        except Exception:
            self.failed = True
            raise

    def _pass(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            spec = self._specs.get(name)
            if spec is None:
                self._wrong.append(f"{name} (the generator's model has no such parameter)")
            elif name in self._seen:
                self._wrong.append(f"{name} (sent twice)")
            elif tuple(tensor.shape) != spec.shape:
                self._wrong.append(
                    f"{name} (shape {list(tensor.shape)}, expected {list(spec.shape)})"
                )
            else:
                self._seen.add(name)
                self._hash(name, tensor, spec.dtype)
                yield name, tensor

    def _hash(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if self._hashed is None or name in self._hashed:
            self.checksums[name] = checksum(tensor.to(dtype))
        columns = name + SAMPLED
        if tensor.dim() == 2 and (self._hashed is None or columns in self._hashed):
            self.checksums[columns] = column_checksum(tensor, dtype, self._version)

    def finish(self, version: int) -> None:
        """Consume what is left. Raises SyncError naming the parameters that are missing, unknown,
        doubled or of another shape.
        """
        for _ in self._passing:
            pass
        known = self._seen | {text.split(" ", 1)[0] for text in self._wrong}
        missing = [f"{name} (missing)" for name in self._specs if name not in known]
        wrong = self._wrong + missing
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise SyncError(
                f"weight sync {version}: the trainer's weights are not those of the generator's "
                f"model: {', '.join(wrong[:_SHOWN])}{more}."
            )


class AdapterFiles:
    """PEFT's two files of each LoRA adapter, in folders by their names, from which vLLM reads
    them.
    """

    def __init__(self, place: Path | None = None) -> None:
        """`place`: None: in memory, where there is such a folder."""
        self._folder = OwnFolder("adapter", memory_folder() if place is None else place)
        # of each name's first adapter, which all later ones of the name are like
        self._specs: dict[str, dict[str, Spec]] = {}
        self.specs: dict[str, Spec] = {}  # of the latest

    def folder(self, name: str) -> Path:
        return self._folder.path / name

    def write(self, weights: AdapterWeights, version: int) -> dict[str, Tensor]:
        """Write the files; returns the tensors that they hold.

        Raises SyncError naming every parameter that is missing, unknown or of another shape.
        """
        folder = self.folder(weights.name)
        if weights.name not in self._specs:
            _check_halves(weights.tensors, version)
            self._specs[weights.name] = specs_of(weights.tensors)
            folder.mkdir()
        self.specs = self._specs[weights.name]
        incoming = Incoming(weights.tensors.items(), self.specs, hashed=())
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in incoming}
        incoming.finish(version)
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        text = json.dumps(weights.config)
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        return tensors

    def close(self) -> None:
        """Delete the files."""
        self._folder.close()


def _check_halves(names: Iterable[str], version: int) -> None:
    """Each LoRA layer has both matrices, A and B. Raises SyncError naming the missing ones."""
    present = set(names)
    missing = sorted(other for other in map(_other_half, present) if other not in present)
    if missing:
        raise SyncError(
            f"weight sync {version}: the adapter's {', '.join(missing[:5])} is missing."
        )


def _other_half(name: str) -> str:
    if ".lora_A." in name:
        return name.replace(".lora_A.", ".lora_B.")
    return name.replace(".lora_B.", ".lora_A.")


def readable_checksums(
    model: nn.Module, specs: Mapping[str, Spec], version: int = 0
) -> dict[str, str]:
    """Checksums of those of `specs` that `model` holds as plain tensors, under the same name or
    joined with its neighbours (FUSED), and of the sampled columns (name with SAMPLED) of matrices
    that its layers have packed.

    Rows beyond a spec's own are padding. What an engine keeps under another name is left out.
    """
    held = dict(model.named_buffers(remove_duplicate=False))
    held |= dict(model.named_parameters(remove_duplicate=False))
    layers = dict(model.named_modules(remove_duplicate=False))
    checksums: dict[str, str] = {}
    # tied tensors, which stay where they are meanwhile, are summed once
    known: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], str] = {}
    for name, spec in specs.items():
        place = _place(held, name, specs)
        if place is None:
            continue
        tensor = _rows_of_spec(held[place.name], spec, place)
        if tensor is None:
            columns = None
            if held[place.name].numel() == 0:  # packed: the layer keeps its weights elsewhere
                columns = _packed_columns(layers, spec, place, version)
            if columns is not None:
                checksums[name + SAMPLED] = checksum(columns)
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), spec.dtype)
        if key not in known:
            known[key] = checksum(tensor.to(spec.dtype))
        checksums[name] = known[key]
    return checksums


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter lies in an engine's model: some rows of a tensor."""

    name: str
    start: int
    rows: int  # of the whole tensor; for one that isn't joined the least


def _place(held: Mapping[str, Tensor], name: str, specs: Mapping[str, Spec]) -> _Place | None:
    """Where the parameter `name` lies, under its own name or within a joint tensor (`FUSED`); None
    where there is neither.
    """
    if name in held:
        return _Place(name, 0, _length(specs[name]))
    for fused, parts in FUSED.items():
        for part in parts:
            prefix, dot, suffix = name.partition(f".{part}.")
            joined = f"{prefix}.{fused}.{suffix}"
            if not dot or joined not in held:
                continue
            rows = [_length(specs[f"{prefix}.{p}.{suffix}"]) for p in parts]
            return _Place(joined, sum(rows[: parts.index(part)]), sum(rows))
    return None


def _length(spec: Spec) -> int:
    return spec.shape[0] if spec.shape else 0


def _rows_of_spec(tensor: Tensor, spec: Spec, place: _Place) -> Tensor | None:
    """The rows of `tensor` that `spec` describes; None where the shape is another, as when it is
    packed.
    """
    if tensor.dim() == 0 or tensor.dim() != len(spec.shape):
        return None
    if tuple(tensor.shape[1:]) != spec.shape[1:] or tensor.shape[0] < place.rows:
        return None
    return tensor[place.start : place.start + spec.shape[0]]


@torch.no_grad()
def _packed_columns(
    layers: Mapping[str, Any], spec: Spec, place: _Place, version: int
) -> Tensor | None:
    """The sampled columns [rows, columns] of a matrix that its linear layer has packed: what the
    layer makes of unit vectors, which is exact in every number format. None where it is no such
    layer.
    """
    path, _, kind = place.name.rpartition(".")
    method: Any = getattr(layers[path], "quant_method", None)
    if kind != "weight" or len(spec.shape) != 2 or not hasattr(method, "apply"):
        return None
    if getattr(layers[path], "input_size_per_partition", spec.shape[1]) != spec.shape[1]:
        return None  # a part of the columns: several workers share the layer
    columns = sampled_columns(spec.shape[1], version)
    units = torch.zeros(len(columns), spec.shape[1], dtype=spec.dtype)
    units[torch.arange(len(columns)), columns] = 1
    product = method.apply(layers[path], units)  # [columns, rows of the joint tensor]
    if product.dim() != 2 or product.shape[1] < place.rows:
        return None
    return product[:, place.start : place.start + spec.shape[0]].t()
