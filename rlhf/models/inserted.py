"""Small layers that an adapter puts into a model where no change of its weights does the same:
bottlenecks and mixtures of low-rank experts. The trainer and vLLM's engine compute them by this
code, so that both write the same tokens.

Each place in the model, named by the path of a module, has an `Insert`: it gets what that module
read and what it gave, and returns what goes on in place of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOTTLENECK, MOLORA = "BOTTLENECK", "MOLORA"  # PEFT's types of these adapters
# PEFT's type -> the attribute of an adapted layer that holds its inserts. In PEFT's names what
# stands before it is the place.
ATTRIBUTES = {BOTTLENECK: "bottleneck_inserts", MOLORA: "molora_inserts"}
PEFT_PREFIX = "base_model.model."  # of PEFT's names
PARALLEL = "parallel"  # the placement whose blocks read what the module read, not what it gave
STACK, FUSE = "stack", "fuse"
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_SPREAD = 0.02  # standard deviation of fresh routers, experts' A, queries and keys


class Insert(nn.Module):
    """What an adapter adds at one place."""

    def forward(self, read: Tensor, gave: Tensor) -> Tensor:
        """What goes on in place of `gave` [..., out], the output of a module that read `read`
        [..., in]: [..., out] in the dtype of `gave`.
        """
        raise NotImplementedError

    def at_start(self, read: Tensor, gave: Tensor) -> Tensor:
        """`forward` without what trains: what was there before the adapter was made."""
        return gave

    def freeze_held(self) -> None:
        """Let those parameters not train that came from adapters trained before."""


# ---- bottlenecks ----


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One bottleneck, as an adapter's configuration holds it."""

    name: str
    size: int  # m, the width between the projections
    nonlinearity: str  # relu, gelu, silu or tanh
    scale: float = 1.0  # factor of what the block adds


class Bottleneck(nn.Module):
    """scale * U f(D h + d) + u (Houlsby et al. 2019, arXiv:1902.00751), without the residual. U and
    u start at 0, so that a fresh block adds nothing; 2 m h + m + h parameters for a width h.
    """

    def __init__(self, width: int, spec: BlockSpec, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = spec.scale
        self.function = _FUNCTIONS[spec.nonlinearity]
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width, spec.size)
        self.up = nn.Linear(spec.size, width)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., h] -> what the block adds, [..., h] in the dtype of its weights."""
        hidden = self.dropout(hidden.to(self.down.weight.dtype))
        added: Tensor = self.up(self.function(self.down(hidden)))
        return added * self.scale


class Fusion(nn.Module):
    """Attention over what N blocks add (AdapterFusion, Pfeiffer et al. 2021, arXiv:2005.00247):
    sum_n softmax_n(h Q . z_n K) z_n V with z_n the output of block n, 3 h^2 parameters.

    V starts as the identity, Q and K near 0: at first each block has nearly the same share. The
    penalty on V that the authors' library has is left out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.query.weight, std=_SPREAD)
        nn.init.normal_(self.key.weight, std=_SPREAD)
        nn.init.eye_(self.value.weight)

    def forward(self, hidden: Tensor, added: Tensor) -> Tensor:
        """`hidden` [..., h] and what the blocks add [..., N, h] -> [..., h]."""
        query = self.query(hidden.to(added.dtype))
        scores = (query.unsqueeze(-2) * self.key(added)).sum(dim=-1)  # [..., N]
        shares = scores.softmax(dim=-1).unsqueeze(-1)
        return (shares * self.value(added)).sum(dim=-2)


class BottleneckInsert(Insert):
    """The blocks of one place, one behind the other or fused.

    Stacked blocks behind a module each read what the one before gave; beside it (`parallel`) all
    read what the module read, and their outputs add up. Fused blocks read the same.
    """

    def __init__(
        self,
        width: int,
        blocks: Sequence[BlockSpec],
        *,
        parallel: bool,
        fuse: bool,
        held: Sequence[str] = (),
        dropout: float = 0.0,
    ) -> None:
        """`held`: names of blocks that came from other adapters and don't train."""
        super().__init__()
        self.parallel = parallel
        self.held = tuple(held)
        # A prefix, since a ModuleDict takes no names such as "keys".
        made = {f"block_{spec.name}": Bottleneck(width, spec, dropout) for spec in blocks}
        self.blocks = nn.ModuleDict(made)
        self.fusion = Fusion(width) if fuse else None

    def forward(self, read: Tensor, gave: Tensor) -> Tensor:
        hidden = read if self.parallel else gave
        if self.fusion is not None:
            added = torch.stack([block(hidden) for block in self.blocks.values()], dim=-2)
            return gave + self.fusion(hidden, added).to(gave.dtype)
        for block in self.blocks.values():
            gave = gave + block(read if self.parallel else gave).to(gave.dtype)
        return gave

    def at_start(self, read: Tensor, gave: Tensor) -> Tensor:
        """With the blocks of earlier adapters, unless they are fused by what trains."""
        if self.fusion is not None:
            return gave
        for name in self.held:
            block = self.blocks[f"block_{name}"]
            gave = gave + block(read if self.parallel else gave).to(gave.dtype)
        return gave

    def freeze_held(self) -> None:
        for name in self.held:
            self.blocks[f"block_{name}"].requires_grad_(False)


# ---- mixtures of low-rank experts ----


class Router(nn.Linear):
    """Shares of the experts, computed in float32 at least: half precision would round them."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in] -> shares [..., experts], which add up to 1."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype)).softmax(dim=-1)


class ExpertsInsert(Insert):
    """alpha / r sum_e softmax(R x)_e B_e A_e x beside a linear layer (MoLoRA, Zadouri et al. 2023,
    arXiv:2309.05444): every expert takes part, E (r (in + out) + in) parameters.

    As the authors' code: A and R ~ N(0, 0.02), B = 0, so that a fresh mixture adds nothing; no
    auxiliary loss.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.experts, self.scale = experts, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.a = nn.Linear(width_in, experts * rank, bias=False)  # rows e r to (e + 1) r are A_e
        self.b = nn.Linear(experts * rank, width_out, bias=False)  # columns likewise
        self.router = Router(width_in, experts, bias=False)
        nn.init.normal_(self.a.weight, std=_SPREAD)
        nn.init.normal_(self.router.weight, std=_SPREAD)
        nn.init.zeros_(self.b.weight)

    def forward(self, read: Tensor, gave: Tensor) -> Tensor:
        shares = self.router(read)  # [..., E]
        low = self.a(self.dropout(read.to(self.a.weight.dtype)))  # [..., E r]
        low = low.unflatten(-1, (self.experts, -1)) * shares.to(low.dtype).unsqueeze(-1)
        return gave + (self.b(low.flatten(-2)) * self.scale).to(gave.dtype)


# ---- around a module ----


def insert_into(
    insert: Callable[[Tensor, Tensor], Tensor],
    arguments: Sequence[Any],
    named: Mapping[str, Any],
    output: Any,
) -> Any:
    """A module's `output` with `insert` applied, where the module was called with these
    `arguments` and `named` ones. The first argument is what it read; of an output of several
    values the first one goes on changed.
    """
    read = arguments[0] if arguments else next(iter(named.values()))
    if isinstance(output, tuple):
        return (insert(read, output[0]), *output[1:])
    return insert(read, output)


def make_insert(config: Mapping[str, Any], width_in: int, width_out: int) -> Insert:
    """A fresh insert for a module of these widths, by the fields of an adapter_config.json."""
    if config["peft_type"] == MOLORA:
        return ExpertsInsert(
            width_in,
            width_out,
            experts=config["experts"],
            rank=config["r"],
            alpha=config["alpha"],
            dropout=config["dropout"],
        )
    return BottleneckInsert(
        width_out,
        [BlockSpec(**block) for block in config["blocks"]],
        parallel=config["placement"] == PARALLEL,
        fuse=config["combine"] == FUSE,
        held=config["held"],
        dropout=config["dropout"],
    )


def split_name(name: str, kind: str) -> tuple[str, str] | None:
    """The place and the rest of a tensor's name in PEFT's saved form, for an adapter of PEFT's type
    `kind`; None for what is no part of an insert.
    """
    path, found, rest = name.partition(f".{ATTRIBUTES[kind]}.")
    if not found:
        return None
    return path.removeprefix(PEFT_PREFIX), rest


def read_inserts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Insert], list[str]]:
    """The inserts of a saved adapter by their places, with copies of its tensors, in evaluation
    mode and without gradients; and the names of tensors that are no part of them.
    """
    kind = config["peft_type"]
    grouped: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        parts = split_name(name, kind)
        if parts is None:
            others.append(name)
        else:
            path, rest = parts
            grouped.setdefault(path, {})[rest] = tensor.detach().clone()
    inserts: dict[str, Insert] = {}
    for path, state in grouped.items():
        widths = _widths(state, kind)
        with torch.device("meta"):
            insert = make_insert(config, *widths)
        insert.load_state_dict(state, assign=True)
        inserts[path] = insert.eval().requires_grad_(False)
    return inserts, others


def _widths(state: Mapping[str, Tensor], kind: str) -> tuple[int, int]:
    """Of the module that an insert stands at: in and out."""
    if kind == MOLORA:
        return state["a.weight"].shape[1], state["b.weight"].shape[0]
    down = next(tensor for name, tensor in state.items() if name.endswith(".down.weight"))
    return down.shape[1], down.shape[1]
