"""Our SFT trainer for packed rows (stage.packing) whose attention runs document by document.

TRL puts rows behind each other, and transformers keeps them apart by a mask of all tokens with all
tokens: of 32,768 tokens that is a gigabyte, and attention computes all of it. The online loop has
attention by segments for samples that share a prompt (`policy.model.attend_by_segments`); rows are
segments behind a prompt of no tokens. So each row is a call of its own, causal and without a mask,
for which a GPU has its fastest kernel.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import EngineConfig
from policy.agreement import can_share_prompts
from policy.model import LONGEST_DENSE, base_of, take_segments
from rlhf.offline.step_rows import Inputs
from rlhf.offline.trainers import SFT
from rlhf.process import distributed

LOG = logging.getLogger("rlhf.stages")
_LENGTHS = (9, 1, 6)  # of the proof's rows
_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def packed_sft(model: Any, engine: EngineConfig) -> type[SFT]:
    """The trainer's class for `model`: rows attend by themselves where the model can, which is
    proved, else behind a mask. A collective.
    """
    lm = base_of(model.to(distributed.device()))
    if can_share_prompts(lm) and take_segments(lm) and _agree(model):
        return PackedSFT
    if distributed.is_main():
        LOG.info("stage.packing: rows of %s are kept apart by a mask", lm.config.model_type)
    return SFT


class PackedSFT(SFT):
    """SFT on packed rows, each of which attends by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = WithLengths(self.data_collator)

    def compute_loss(
        self,
        model: Any,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss."""
        return super().compute_loss(on_host(model), inputs, return_outputs, num_items_in_batch)


@dataclass(frozen=True, slots=True)
class WithLengths:
    """A collator of packed rows [1, L] that adds their lengths as a mask, where they are longer
    than what a mask of all tokens is as fast for.
    """

    collate: Callable[[list[Inputs]], Inputs]

    def __call__(self, rows: list[Inputs]) -> Inputs:
        batch = self.collate(rows)
        if batch["input_ids"].shape[1] > LONGEST_DENSE:
            batch["attention_mask"] = lengths_mask(batch["cu_seq_lens_q"].diff())
        return batch


def lengths_mask(lengths: Tensor) -> Tensor:
    """[1, 1, 1, 1 + rows] long: a prompt of no tokens, and the rows behind it."""
    return torch.cat((lengths.new_zeros(1), lengths)).long()[None, None, None]


def on_host(model: Any) -> Callable[..., Any]:
    """`model` as a function that reads lengths from the host: each layer asks for them."""

    def call(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.dtype is torch.long:
            attention_mask = attention_mask.cpu()
        return model(*args, attention_mask=attention_mask, **kwargs)

    return call


def _agree(model: Any) -> bool:
    """Whether rows that share a sequence get the logits that they get by themselves, by three made-
    up ones. A collective under ZeRO-3.
    """
    vocabulary = int(base_of(model).config.get_text_config().vocab_size)
    device = distributed.device()
    lengths = torch.tensor(_LENGTHS)
    ids = (7 * torch.arange(int(lengths.sum()), device=device)).remainder(vocabulary)[None]
    places = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            mask = lengths_mask(lengths)
            given = {"position_ids": places, "attention_mask": mask, "use_cache": False}
            together = model(input_ids=ids, **given).logits[0].float()
            parts = ids.split(list(_LENGTHS), dim=1)
            alone = [model(input_ids=part, use_cache=False).logits[0].float() for part in parts]
    # A family's code may read the mask by itself.
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    apart = torch.cat(alone)
    gap = float((together - apart).abs().mean() / apart.std().clamp(min=1e-3))
    return gap <= _GAP.get(next(iter(model.parameters())).dtype, 1e-4)
