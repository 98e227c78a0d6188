"""Rows with pictures on TRL's trainers: a collator that opens them and adds what the model reads.

TRL's own way to pictures wants a processor in the tokenizer's place, tokenises the conversations
itself and cuts what is too long. Our rows are token ids already (rlhf/models/processors.py), so TRL
is given them as rows of text, and the model's further arguments come from this collator. Text
models load nothing of it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from conf.schema import EngineConfig
from conf.stages import OfflineStage, RewardStage, SFTStage
from policy.model import is_peft
from rlhf.models.directories import contents
from rlhf.models.facts import is_picture_model, is_picture_policy, model_file
from rlhf.models.templates import processor_of, row_pictures
from rlhf.types import PICTURES, EncodedRows, Picture, UserError

Row = dict[str, Any]
# families of which TRL's log-probabilities are not those of transformers' model
_OTHERWISE = ("aya_vision",)
Shown = Sequence[Sequence[Picture]]
_IDS, _OTHERS = "input_ids", "KL_input_ids"  # KTO reads each prompt with another's answer too


def with_pictures(collate: Any, tokenizer: Any) -> Any:
    """A collator that adds a picture model's arguments; `collate` itself for other models."""
    processor = processor_of(tokenizer)
    return collate if processor is None else WithPictures(collate, processor)


@dataclass(frozen=True, slots=True)
class WithPictures:
    """A collator that adds the model's arguments for the rows' pictures to the batch. Both answers
    of a pair read them.

    CPO and ORPO join a pair's sides themselves: their batches hold the pictures (`seeing`).
    """

    collate: Callable[[list[Row]], Row]
    processor: Any

    def __call__(self, rows: list[Row]) -> Row:
        shown = [row_pictures(row) for row in rows]
        plain = [{key: value for key, value in row.items() if key != PICTURES} for row in rows]
        batch = dict(self.collate(plain))
        if _IDS not in batch:
            return {**batch, PICTURES: shown}
        times = len(batch[_IDS]) // len(shown)
        batch |= seen_by(self.processor, shown * times, batch[_IDS])
        if _OTHERS in batch:
            types = seen_by(self.processor, [], batch[_OTHERS])
            batch |= {f"KL_{name}": value for name, value in types.items()}
        return batch


def seeing(model: Any, tokenizer: Any, batch: Row) -> Any:
    """`model` as a function that reads the batch's pictures beside both sides' token ids; `model`
    itself for a batch of a text model.
    """
    shown = batch.get(PICTURES)
    if shown is None:
        return model

    def call(input_ids: Tensor, **options: Any) -> Any:
        seen = seen_by(processor_of(tokenizer), shown * 2, input_ids)
        return model(input_ids, **seen, **options)

    return call


def seen_by(processor: Any, shown: Shown, input_ids: Tensor) -> dict[str, Tensor]:
    """What a picture model reads beside token ids [B, L] and the pictures of their rows, on their
    device.
    """
    from rlhf.models.pictures import picture_inputs

    given = picture_inputs(processor, shown, input_ids)
    return {name: value.to(input_ids.device) for name, value in given.items()}


@contextmanager
def own_names(model: Any) -> Iterator[None]:
    """While a trainer writes a checkpoint: of a picture model under torch's names. transformers
    would write those of its hub's files, and pass over all of them when it loads the checkpoint.
    """
    if not hasattr(model, "config") or not is_picture_model(model.config) or is_peft(model):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


# ---- checks ----


def check(path: str | None, stage: OfflineStage, engine: EngineConfig, virtual: int) -> None:
    """What can't go with a model that reads pictures is refused by name. virtual: tokens that an
    adapter puts in front of every row. Raises UserError.
    """
    if path is None or not is_picture_policy(contents(path).weights):
        return
    kind = model_file(contents(path).weights, "config.json").get("model_type")
    if kind in _OTHERWISE and not isinstance(stage, RewardStage):
        raise UserError(
            f"stage={stage.name} model.path={path}: TRL multiplies the logits of {kind} by its "
            "logit_scale, and transformers' model does not, so another model would be trained than "
            "the one that writes. Expected another family."
        )
    reads = f"the model {path} reads pictures"
    if isinstance(stage, SFTStage) and stage.packing:
        raise UserError(
            f"stage.packing=true: {reads}, and joined rows would see each other's. Set "
            "stage.packing=false."
        )
    if engine.sequence_parallel > 1:
        raise UserError(
            f"engine.sequence_parallel={engine.sequence_parallel}: {reads}, and a row's pictures "
            "can't be parted over ranks. Set engine.sequence_parallel=1."
        )
    if getattr(stage, "cache_frozen", False):
        raise UserError(
            f"stage.cache_frozen=true: {reads}, and states are kept by the tokens of a text alone. "
            "Set stage.cache_frozen=false."
        )
    if virtual:
        raise UserError(
            f"adapter: {reads}, and its {virtual} virtual tokens would move the pictures' places. "
            "Set adapter=lora."
        )


def check_mixed(engine: EngineConfig, rows: EncodedRows) -> None:
    """Raises UserError for rows with and without pictures under ZeRO-3: a rank whose rows have none
    would not read the part for pictures, and the others would wait for it.
    """
    if engine.zero_stage < 3 or PICTURES not in rows.train.column_names:
        return
    parts = [rows.train] if rows.held_out is None else [rows.train, rows.held_out]
    shown = {bool(row_pictures(row)) for part in parts for row in part}
    if len(shown) > 1:
        raise UserError(
            "engine=zero3: some rows show pictures and others none, so ranks would wait for each "
            "other. Leave out one kind, or set engine=zero2."
        )
