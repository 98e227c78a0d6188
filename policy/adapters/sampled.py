"""EVA (Paischer et al. 2024, arXiv:2410.07170): a low-rank adapter's A, and each layer's rank, by
what the layer's inputs look like on rows of the task. B starts at 0, and the base stays.

PEFT computes the same from a stream of batches and hashes every input in Python; this goes through
the rows once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.types import UserError

# A layer may have up to so many times its rank (the authors' rho). The ranks that all layers have
# together go to the directions that explain most.
_MOST_RANKS = 2
# Bytes that the sums of one pass over the rows may take; layers beyond them wait for a further one.
_ROOM = 4 * 2**30

Rows = Sequence[Sequence[int]]  # token ids


class Moments:
    """Sums over the inputs x [in] that a layer got: how many, x [in], and x x^T [in, in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(width, device=device)
        self.products = torch.zeros(width, width, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add inputs [n, in]."""
        inputs = inputs.float()
        self.count += len(inputs)
        self.total += inputs.sum(dim=0)
        self.products += inputs.T @ inputs

    def covariance(self) -> Tensor:
        """[in, in]."""
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)


@dataclass(slots=True)
class _Watch:
    """Hooks that add layers' inputs to their moments. Layers that get the same tensor one after the
    other share them.
    """

    seen: dict[str, Moments]
    given: Tensor | None = None  # the latest input
    moments: Moments | None = None  # to which it was added

    def hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = inputs[0]
            if self.given is given and self.moments is not None:
                self.seen[name] = self.moments
                return
            width = given.shape[-1]
            if name not in self.seen:
                self.seen[name] = Moments(width, given.device)
            moments = self.seen[name]
            moments.add(given.reshape(-1, width))
            self.given, self.moments = given, moments

        return add


@torch.no_grad()
def moments(model: Any, names: Sequence[str], rows: Rows) -> dict[str, Moments]:
    """The inputs of the layers `names` while the model reads rows of token ids, one at a time."""
    training = model.training
    model.eval()
    found: dict[str, Moments] = {}
    for group in _groups(model, names):
        watch = _Watch({})
        handles = []
        for name in group:
            layer = model.get_submodule(name)
            handle = layer.register_forward_pre_hook(watch.hook(name))
            handles.append(handle)
        for row in rows:
            ids = torch.tensor([list(row)], device=model.device)
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        found |= watch.seen
    model.train(training)
    return found


def _groups(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """`names` in turn, as many at a time as `_ROOM` holds the sums of."""
    group: list[str] = []
    used = 0
    for name in names:
        layer = model.get_submodule(name)
        # GPT-2's layers hold their weight the other way round, and don't say its sizes
        width = getattr(layer, "in_features", layer.weight.shape[0])
        needed = 4 * width**2
        if group and used + needed > _ROOM:
            yield group
            group = []
            used = 0
        group.append(name)
        used += needed
    if group:
        yield group


def directions(covariance: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` directions [most, in] in which inputs vary most, and the share of the variance
    that each explains [most].
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0.0)
    shares = values / values.sum()
    largest = shares.flip(0)
    first = vectors.T.flip(0)
    return first[:most].contiguous(), largest[:most]


def shared_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many directions each layer gets of `budget` for all: those that explain most of their
    layer's variance, wherever they are. A layer may get none.
    """
    owners = []
    for name, own in shares.items():
        owners += [name] * len(own)
    values = torch.cat(list(shares.values()))
    order = values.argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for place in order[:budget].tolist():
        owner = owners[place]
        ranks[owner] += 1
    return ranks


def eva(model: Any, ranks: Mapping[str, int], rows: Rows) -> dict[str, Tensor]:
    """A [rank, in] of each layer of `ranks` (name -> rank), with ranks given out anew; layers that
    get none are left out. Raises UserError where the rows have too few tokens.
    """
    most = _MOST_RANKS * max(ranks.values())
    tokens = sum(map(len, rows))
    if tokens <= most:
        raise UserError(
            f"adapter.init=eva: the {len(rows)} rows have {tokens} tokens together, too few for "
            f"{most} directions. Raise adapter.sample_rows, or lower adapter.rank."
        )
    vectors: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    seen = moments(model, list(ranks), rows)
    # by moments and count: layers that get the same inputs have the same directions
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for name, own in seen.items():
        key = id(own), _MOST_RANKS * ranks[name]
        if key not in known:
            known[key] = directions(own.covariance(), key[1])
        found, explained = known[key]
        vectors[name] = found
        shares[name] = explained.cpu()
    given = shared_out(shares, sum(ranks.values()))
    chosen = {}
    for name, rank in given.items():
        if rank:
            chosen[name] = vectors[name][:rank]
    return chosen
