"""Our SFT trainer for ranks that share rows (engine.sequence_parallel, policy/sequence.py): which
rows a rank reads, what it computes of them, and how losses and figures add up.

transformers' Trainer, accelerate and TRL have a way of their own to do this. It divides each
micro-batch's loss by that micro-batch's tokens, so that an update would depend on how a step is
split, it hands every rank rows of its own, and it evaluates without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conf.schema import EngineConfig
from policy.sequence import Sharing
from rlhf.offline.step_rows import Inputs
from rlhf.offline.trainers import SFT


def sharing_sft(model: Any, engine: EngineConfig) -> type[SFT]:
    """The trainer's class for `model`, which attends by heads from now on. Raises UserError for a
    family whose rows can't be shared. A collective.
    """
    place = Sharing(engine.sequence_parallel)
    place.take(model)

    class Shared(SharedSFT):
        sharing = place

    return Shared


class SharedSFT(SFT):
    """SFT on a part of each row."""

    sharing: Sharing
    accelerator: Any

    @property
    def unit(self) -> int:  # rows of a batch of the loader, over all groups
        return int(self.args.per_device_train_batch_size) * self.sharing.groups

    def get_train_dataloader(self) -> Any:
        with self._same_rows():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._same_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    @contextmanager
    def _same_rows(self) -> Iterator[None]:
        """While inside, accelerate makes loaders that hand the ranks of a group the same rows."""
        state = self.accelerator.state
        state.ds_device_mesh = self.sharing.mesh
        try:
            yield
        finally:
            del state.ds_device_mesh

    def repeated(self) -> bool:
        state, rows = self.accelerator.gradient_state, self.args.eval_batch_size
        if not state.end_of_dataloader or state.remainder <= 0:
            return False
        return bool(self.sharing.own_group * rows >= state.remainder)

    def compute_loss(
        self,
        model: Any,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss of this rank's part of the rows; over the ranks of a group the mean is the
        whole rows' loss. What is divided by are the tokens of whole rows, not of the part.

        TRL multiplies by the number of all ranks, since DeepSpeed averages over them.
        """
        ranks = self.sharing.ranks
        if num_items_in_batch is not None:
            tokens = num_items_in_batch / ranks  # each rank of a group has counted the same rows
        else:
            tokens = self.eval_sum(1.0, inputs)[1] * self.sharing.groups
        part = self.sharing.split(inputs)
        with self._every_figure():
            loss = super().compute_loss(model, part, return_outputs, tokens)
        if self.model.training:
            self.guard.micro_batches[-1] = inputs
        return loss

    @contextmanager
    def _every_figure(self) -> Iterator[None]:
        """While inside, accelerate drops no rank's figures at the end of the held-out rows, where
        it takes them for those of repeated rows. Repeated rows are in TRL's own figures then.
        """
        loader = self.accelerator.gradient_state.active_dataloader
        if loader is None:
            yield
            return
        remainder, loader.remainder = loader.remainder, -1
        try:
            yield
        finally:
            loader.remainder = remainder
