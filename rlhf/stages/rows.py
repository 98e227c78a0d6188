"""The rows of every stage that trains: looked at before weights load, then read and encoded.

No stage of its own. rlhf/cli/command.py gives this module to the stages, so that what trains knows
no format of a file.
"""

import logging
from collections.abc import Sequence
from typing import Any

from conf.choices import Scheduler
from conf.online import OnlineStage
from conf.schema import Config, ModelConfig
from conf.stages import OfflineStage, RewardStage, SFTStage, TrainStage
from reward import terms
from rlhf.checks import inputs
from rlhf.data import reading
from rlhf.data.reading import DataRequest
from rlhf.data.sources import data_files
from rlhf.models.facts import added_tokens
from rlhf.models.loading import load_or_train_tokenizer
from rlhf.process import distributed
from rlhf.rows import pairs, preferences, sft
from rlhf.types import EncodedPrompts, EncodedRows, Prompt

LOG = logging.getLogger("rlhf.stages")


def check(cfg: Config) -> list[str]:
    """Training files exist, are not empty, and their first rows fit the stage. Raises UserError."""
    request = DataRequest.of(cfg)
    inputs.check_template(cfg.data)
    inputs.check_held_out(cfg.data, _looks_at_held_out(cfg.stage))
    reading.required_sources(request)
    reading.check_first_rows(request)
    inputs.refuse_pipeline(cfg.data, cfg.stage.name)
    if isinstance(cfg.stage, RewardStage):
        pairs.check_first(request)
    if isinstance(cfg.stage, OnlineStage) and cfg.reward.terms:
        terms.check_rows(cfg.reward, reading.first_fields(request))
    return []


def _looks_at_held_out(stage: TrainStage) -> dict[str, Any]:
    """What a stage is asked for that needs held-out rows, by its option; false or null: not."""
    if isinstance(stage, OnlineStage):
        judges = ("judge_path", "judge_function")
        return {f"stage.watch.{name}": getattr(stage.watch, name) for name in judges}
    needs: dict[str, Any] = {"stage.unfreeze.patience": stage.unfreeze.patience}
    if stage.scheduler is Scheduler.plateau:
        needs["stage.scheduler"] = stage.scheduler.value
    if isinstance(stage, OfflineStage):
        needs["stage.patience"] = stage.patience
    return needs


def tokenizer_of(model: ModelConfig, request: DataRequest) -> Any:
    """The model's tokenizer; a tiny model's is trained on the stage's rows. Raises UserError."""
    texts = reading.stage_texts(request)
    tokenizer = load_or_train_tokenizer(model, request.data.chat_template, texts)
    added = added_tokens(tokenizer)
    if added is not None and distributed.is_main():
        LOG.info("model.add_tokens: %d tokens are new", len(added.new))
        if added.known:
            LOG.warning(
                "model.add_tokens: %d tokens are in the vocabulary already, and keep their rows: "
                "%s",
                len(added.known),
                ", ".join(map(repr, added.known[:8])),
            )
    return tokenizer


def read_rows(cfg: Config, micro: int) -> EncodedRows:
    """Rows for a stage on TRL's trainers, `micro` of them in a forward pass. Raises UserError."""
    tokenizer = tokenizer_of(cfg.model, DataRequest.of(cfg))
    return encoded_rows(DataRequest.of(cfg), tokenizer, micro)


def encoded_rows(request: DataRequest, tokenizer: Any, micro: int) -> EncodedRows:
    """`read_rows` with a tokenizer that is there."""
    if isinstance(request.stage, SFTStage):
        return sft.read(request, tokenizer)
    if isinstance(request.stage, RewardStage):
        return pairs.read(request, tokenizer)
    return preferences.read(request, tokenizer, micro)


def read_prompts(cfg: Config) -> EncodedPrompts:
    """Prompts for an online stage, and the held-out ones where its watch has a judge. Raises
    UserError.
    """
    stage = cfg.stage_as(OnlineStage)
    tokenizer = tokenizer_of(cfg.model, DataRequest.of(cfg))
    train = reading.prompts(DataRequest.of(cfg), tokenizer, split="train")
    held_out: Sequence[Prompt] = ()
    if stage.watch.has_judge:
        held_out = reading.prompts(DataRequest.of(cfg), tokenizer, split="eval")
    return EncodedPrompts(tokenizer, train, held_out, files=tuple(data_files(cfg.data)))


def count_trained(request: DataRequest, tokenizer: Any, micro: int) -> int:
    """Rows of an offline stage that train, packed where it packs them, for a dry run. Raises
    UserError as `read_rows`.
    """
    stage = request.stage
    rows = encoded_rows(request, tokenizer, micro).train
    if not isinstance(stage, SFTStage) or not stage.packing:
        return len(rows)
    from trl import SFTConfig
    from trl.data_utils import pack_dataset

    return len(pack_dataset(rows, stage.max_length, SFTConfig.packing_strategy))
