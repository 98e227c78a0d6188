"""What transformers' Trainer does not know: that a checkpoint may come from another number of
ranks, or from another ZeRO stage.
"""

import contextlib
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from conf.schema import EngineConfig
from policy.engines import resharding
from policy.engines.deepspeed import is_universal, mend_universal, reading
from policy.model import is_peft
from rlhf.process import checkpoints, distributed, randomness


class OtherRanks:
    """To be mixed into a Trainer, before it. The first checkpoint is made to fit when the run is
    opened (rlhf/run/context.py); the rest is here.
    """

    engine: EngineConfig  # of this launch
    # The trainer's:
    state: Any
    args: Any
    model: Any
    model_wrapped: Any
    is_deepspeed_enabled: bool

    def _load_best_model(self) -> None:
        """The best checkpoint may be of before a resume on another number of ranks."""
        best = self.state.best_model_checkpoint
        place = resharding.adapt_on_all_ranks(Path(best), self.engine)
        self.state.best_model_checkpoint = str(place)
        with (
            reading(self.model_wrapped, place)
            if self.is_deepspeed_enabled
            else contextlib.nullcontext()
        ):
            super()._load_best_model()  # type: ignore[misc]
        self.state.best_model_checkpoint = best
        distributed.barrier()
        if distributed.is_main():
            checkpoints.clear_universal(Path(best).parent)

    def _load_zero(self, checkpoint: Path) -> Path:
        """Weights and optimizer of a sealed checkpoint, whatever layout it has, into the living
        engine. Returns the folder they came from.
        """
        place = resharding.adapt_on_all_ranks(checkpoint, self.engine)
        with reading(self.model_wrapped, place):
            deepspeed_load_checkpoint(
                self.model_wrapped, str(place), load_module_strict=not is_peft(self.model)
            )
        return place

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called when DeepSpeed has loaded its part."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and is_universal(Path(checkpoint)):
            mend_universal(self.model_wrapped, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """transformers leaves out what it does not find, without a word."""
        saved = resharding.recorded(Path(checkpoint)) if checkpoint is not None else None
        if saved is None or saved.ranks == distributed.world_size():
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        else:
            randomness.begin_anew(saved.ranks, self.args.seed * 1_000_003 + self.state.global_step)
