"""The frozen blocks of a reward model, computed once for each text (``stage.cache_frozen``).

Below the lowest weight that trains, a forward pass of a text is the same in every step: the output
of the last block down there is kept in one file, mapped into memory, under a key of the weights and
texts that it came from. The frozen blocks then hand on what they get, and the last of them gives
what was kept. Texts are padded on the right and read causally, so a token's states depend on no
padding.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from conf.choices import AdapterKind
from conf.schema import AdapterConfig, ModelConfig
from conf.stages import RewardStage
from policy.model import has_dropout
from rlhf.models.loading import without_weights
from rlhf.models.parts import blocks_of, outline
from rlhf.offline.step_rows import (
    INDEX,
    STATES,
    FrozenStates,
    Texts,
    allocate_states,
    batches_of,
    mapped_states,
    padded,
    text_key,
)
from rlhf.process import distributed
from rlhf.types import EncodedRows, UserError

LOG = logging.getLogger("rlhf.stages")
Computing = Callable[[], AbstractContextManager[Any]]  # how a pass is computed: by autocast, or not


def check_cache(stage: RewardStage, model: ModelConfig, adapter: AdapterConfig) -> None:
    """Whether the frozen blocks say the same of a text in every step. Raises UserError."""
    why = None
    if adapter.kind is not AdapterKind.none:
        why = f"adapter={adapter.kind.value} trains inside the frozen blocks"
    elif stage.unfreeze.on:
        why = "stage.unfreeze has all blocks train in the end"
    elif stage.train.everything:
        why = "all weights train"
    if why is not None:
        raise UserError(
            f"stage.cache_frozen=true: {why}. Set adapter=none and stage.train.layers, or "
            "stage.cache_frozen=false."
        )
    empty = without_weights(model, classifier=True)
    if empty is None:
        return
    for module in empty.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # as TRL does for a reward model
    if has_dropout(empty):
        raise UserError(
            "stage.cache_frozen=true: the model's configuration has a dropout, with which no two "
            "passes of the frozen blocks are alike. Set it to 0 there, or stage.cache_frozen=false."
        )


class _Reached(Exception):
    """The hidden states that were wanted are there: the blocks above need not run."""


@dataclasses.dataclass(slots=True)
class FrozenPart:
    """The blocks of a model below its lowest weight that trains."""

    model: Any
    blocks: Sequence[Any]
    returned: int = 0  # elements of the tuple that a block returns; 0: the states themselves

    @staticmethod
    def of(model: Any) -> "FrozenPart":
        """Raises UserError where there are none."""
        parts = outline(model)
        trained = {name for name, param in model.named_parameters() if param.requires_grad}
        passed = max(parts.passed(weight) for weight in parts.weights if weight.name in trained)
        if passed == parts.count:
            raise UserError(
                "stage.cache_frozen=true: the lowest block, or something below it, trains, so no "
                "hidden states stay as they are. Set stage.train.layers below the number of "
                f"blocks ({parts.count}), or stage.cache_frozen=false."
            )
        return FrozenPart(model, list(blocks_of(model))[: parts.count - passed])

    def key(self, texts: Texts, half: bool) -> str:
        """A hash of what the states depend on: frozen weights, texts, and how they are computed."""
        config = self.model.config
        told = [len(self.blocks), half, str(config._attn_implementation), config.to_json_string()]
        told += [transformers.__version__, torch.__version__, str(distributed.device().type)]
        digest = hashlib.sha256(json.dumps(told).encode())
        for name, param in sorted(self.model.named_parameters()):
            if not param.requires_grad:
                digest.update(f"{name} {param.dtype}".encode())
                raw = param.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        for text in texts:
            digest.update(text_key(text))
        return digest.hexdigest()[:40]

    @torch.no_grad()
    def states(self, texts: Texts, computing: Computing) -> Tensor:
        """What the last frozen block says of texts, padded on the right: [B, L, H]."""
        found: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            self.returned = len(output) if isinstance(output, tuple) else 0
            found.append(output[0] if self.returned else output)
            raise _Reached

        ids, mask = padded(texts, self.model.config.pad_token_id)
        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            with computing():
                self.model(input_ids=ids, attention_mask=mask)
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        raise RuntimeError("the model did not call its blocks")

    def read(self, states: "FrozenStates") -> None:
        """From here on a pass of the model reads `states` in place of computing the blocks."""
        now: list[Tensor] = []  # those of the batch under way

        def look_up(model: Any, given: Any, options: dict[str, Any]) -> None:
            now[:] = [states.batch(options["input_ids"], options["attention_mask"])]

        self.model.register_forward_pre_hook(look_up, with_kwargs=True)
        for number, block in enumerate(self.blocks):
            block.forward = self._handing_on(now if number == len(self.blocks) - 1 else None)

    def _handing_on(self, now: list[Tensor] | None) -> Any:
        """A block's forward that gives back its input, or the only element of `now`."""

        def give(hidden_states: Tensor, *given: Any, **options: Any) -> Any:
            states = hidden_states if now is None else now[0]
            return (states, *[None] * (self.returned - 1)) if self.returned else states

        return give


def read_frozen_once(
    model: Any, rows: EncodedRows, place: Path, dtype: torch.dtype, *, casts: bool, budget: int
) -> None:
    """Let `model` read the states of its frozen blocks from a folder in `place`, where an earlier
    run may have left them. A collective. Raises UserError where the disk can't hold them, and by
    the family's name where they don't give the scores that the blocks give.

    dtype: that training computes in; casts: by autocast (DeepSpeed's weights are in half precision
    themselves); budget: padded tokens that are computed together.
    """
    part, texts = FrozenPart.of(model), _texts(rows)
    half = dtype is not torch.float32
    device = distributed.device()

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype) if casts and half else nullcontext()

    model.to(device).eval()
    tried = [min(texts, key=len), max(texts, key=len)]
    whole = _scores(model, tried, computing)
    folder = place / f"frozen-{part.key(texts, half)}"
    if not distributed.broadcast((folder / INDEX).is_file()):
        write_states(part, texts, folder, budget, computing)
    part.states(tried, computing)  # what form a block's output has
    part.read(FrozenStates(folder))
    again = _scores(model, tried, computing)
    tolerance = 5e-2 if half else 1e-4
    if not torch.allclose(again, whole, rtol=tolerance, atol=tolerance):
        raise UserError(
            f"stage.cache_frozen=true: {model.config.model_type} scores {again.tolist()} by the "
            f"kept states of its frozen blocks, and {whole.tolist()} by the blocks themselves. Set "
            "stage.cache_frozen=false."
        )


@torch.no_grad()
def _scores(model: Any, texts: Texts, computing: Computing) -> Tensor:
    ids, mask = padded(texts, model.config.pad_token_id)
    with computing():
        scores: Tensor = model(input_ids=ids, attention_mask=mask).logits.float().flatten().cpu()
    return scores


def _texts(rows: EncodedRows) -> Texts:
    """Every text that the trainer reads, once."""
    found: dict[tuple[int, ...], None] = {}
    for data in (rows.train, rows.held_out):
        if data is None:
            continue
        for column in ("chosen_ids", "rejected_ids"):
            found.update(dict.fromkeys(map(tuple, data[column])))
    return list(found)


def write_states(
    part: FrozenPart, texts: Texts, folder: Path, budget: int, computing: Computing
) -> None:
    """The states of `texts` into `folder`, which appears when it is whole; each rank computes a
    share. A collective. Raises UserError where the disk can't hold them.
    """
    first = part.states(texts[:1], computing)
    lengths = [len(text) for text in texts]
    ends = np.cumsum([0, *lengths])
    tokens, hidden = int(ends[-1]), first.shape[-1]
    side = folder.with_name(folder.name + ".part")
    problem = None
    if distributed.is_main():
        size = tokens * hidden * first.element_size()
        problem = allocate_states(side / STATES, size)
    problem = distributed.broadcast(problem)
    if problem is not None:
        raise UserError(problem)
    states = mapped_states(side / STATES, tokens, hidden, first.dtype)
    own = range(distributed.rank(), len(texts), distributed.world_size())
    for numbers in batches_of(texts, own, budget):
        found = part.states([texts[number] for number in numbers], computing).cpu()
        for row, number in enumerate(numbers):
            states[int(ends[number]) : int(ends[number + 1])] = found[row, : lengths[number]]
    distributed.barrier()
    if distributed.is_main():
        told = {"dtype": str(first.dtype).removeprefix("torch."), "hidden": hidden}
        keys = [text_key(text).hex() for text in texts]
        (side / INDEX).write_text(
            json.dumps({**told, "lengths": lengths, "keys": keys}), encoding="utf-8"
        )
        side.rename(folder)
        gib = (folder / STATES).stat().st_size / 2**30
        LOG.info("stage.cache_frozen: %.2f GiB of hidden states in %s", gib, folder)
    distributed.barrier()
