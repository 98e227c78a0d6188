"""What is particular to the preference stages (DPO and its family, KTO, CPO, SimPO, ORPO): their
checks, their reference, and their trainers, configured with the stage's options.
"""

import copy
from collections.abc import Callable
from typing import Any

import datasets
from trl import DPOConfig, KTOConfig

from conf.choices import AdapterKind, FDivergence, KTOLoss
from conf.schema import AdapterConfig, facts_of
from conf.stages import CPOStage, KTOStage, OfflineStage, ORPOStage, PreferenceStage
from conf.training import SORTING
from policy.model import is_peft, make_whole
from rlhf.models.encoding import IGNORED
from rlhf.offline.kto import KTO, KLPairs
from rlhf.offline.likelihood import CPO, DPO, ORPO
from rlhf.offline.private_hooks import CPOConfig, DataCollatorForUnpairedPreference, ORPOConfig
from rlhf.offline.setup import EXPERTS, unbalanced
from rlhf.offline.trainers import StageTrainer
from rlhf.types import PICTURES, WEIGHT, UserError

AnyPreferenceStage = PreferenceStage | KTOStage | CPOStage | ORPOStage


# ---- checks ----


def check_preference_adapter(stage: OfflineStage, adapter: AdapterConfig) -> None:
    """Raises UserError for an adapter with dropout."""
    if adapter.kind is AdapterKind.none:
        return
    if adapter.dropout > 0:
        raise UserError(
            f"adapter.dropout={adapter.dropout}: TRL turns dropout off for stage={stage.name}, "
            "so that the losses compare weights alone. "
            "Set adapter.dropout=0."
        )


def check_kto_rows(stage: KTOStage, micro_batch_size: int | None, rows: int) -> None:
    """A forward pass of `rows` answers holds two at least, where the loss compares them. Raises
    UserError.
    """
    if stage.loss is not KTOLoss.kto or rows >= 2:
        return
    key = "stage.batch_size / ranks" if micro_batch_size is None else "engine.micro_batch_size"
    raise UserError(
        f"{key} = {rows}: stage.loss=kto compares each answer of a forward pass with another's "
        "prompt. Expected at least 2, or stage.loss=apo_zero_unpaired."
    )


def sorting_note(stage: PreferenceStage, rows: int) -> list[str]:
    """A note where a loss sorts the pairs of a forward pass (of `rows` pairs), not of the step."""
    names = [loss.value for loss in stage.losses if loss in SORTING]
    if not names or [rows] == stage.step_sizes():
        return []
    return [
        f"stage.losses: {', '.join(names)} sorts the pairs of one forward pass, which "
        f"are {rows} of stage.batch_size={stage.batch_size}."
    ]


# ---- trainers ----


def has_reference(stage: AnyPreferenceStage) -> bool:
    """Whether the stage's loss compares the policy with a frozen reference."""
    return isinstance(stage, (PreferenceStage, KTOStage))


def start_of(model: Any, adapter: AdapterConfig, again: Callable[[], Any] | None = None) -> Any:
    """The frozen reference of a policy that has not been trained yet: a copy, or None where turning
    the adapter off gives it. again: loads the policy's model once more; needed where the ranks hold
    it in parts, of which no copy can be made.
    """
    if facts_of(adapter).off_is_start:
        return None
    copied = copy.deepcopy(model) if again is None else again()
    if is_peft(copied):  # TRL reads a transformers model
        merges = facts_of(adapter).merges
        make_whole(copied)
        # what can't be merged stays in the layers
        copied = copied.merge_and_unload() if merges else copied.get_base_model()
    return copied.eval().requires_grad_(False)


def make_trainer(
    stage: AnyPreferenceStage,
    arguments: dict[str, Any],
    model: Any,
    reference: Any,
    tokenizer: Any,
    train: datasets.Dataset,
    held_out: datasets.Dataset | None,
    **ours: Any,
) -> StageTrainer:
    """The stage's trainer on encoded rows.

    arguments: what TRL's configs have in common; reference: None for an adapter, and for losses
    without one; ours: what `StageTrainer` takes beside TRL's arguments.
    """
    if isinstance(stage, (CPOStage, ORPOStage)):
        train = labelled(train)
        held_out = None if held_out is None else labelled(held_out)
    given = {
        "model": model,
        "train_dataset": train,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        **ours,
    }
    with unbalanced(model):
        return _trainer(stage, arguments, given, reference, tokenizer)


def _trainer(
    stage: AnyPreferenceStage,
    arguments: dict[str, Any],
    given: dict[str, Any],
    reference: Any,
    tokenizer: Any,
) -> StageTrainer:
    """`given`: what all trainers take."""
    if isinstance(stage, PreferenceStage):
        dpo = DPO(ref_model=reference, args=dpo_config(stage, arguments), **given)
        return _without_reference_adapter(dpo, reference)
    if isinstance(stage, KTOStage):
        collator = kto_collator(stage, tokenizer)
        args = kto_config(stage, arguments)
        kto = KTO(ref_model=reference, args=args, data_collator=collator, **given)
        return _without_reference_adapter(kto, reference)
    if isinstance(stage, ORPOStage):
        return ORPO(args=ORPOConfig(**_own_columns(arguments), beta=stage.beta), **given)
    return CPO(args=cpo_config(stage, arguments), **given)


def labelled(rows: datasets.Dataset) -> datasets.Dataset:
    """Encoded pairs in the columns of TRL's CPO and ORPO collator: whole sequences, and labels that
    leave the prompt out.
    """

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {name: row[name] for name in (WEIGHT, PICTURES) if name in row}
        for side in ("chosen", "rejected"):
            context, answer = row["prompt_ids"], row[f"{side}_ids"]
            out[f"{side}_input_ids"] = context + answer
            out[f"{side}_attention_mask"] = [1] * (len(context) + len(answer))
            out[f"{side}_labels"] = [IGNORED] * len(context) + answer
        return out

    return rows.map(columns, remove_columns=rows.column_names)


def _without_reference_adapter(trainer: StageTrainer, reference: Any) -> StageTrainer:
    """TRL adds an adapter where it got no `reference`."""
    if is_peft(trainer.model) and reference is None:
        trainer.drop_reference_adapter()
    return trainer


def _own_columns(arguments: dict[str, Any]) -> dict[str, Any]:
    """CPO's and ORPO's collator takes the columns that it knows; transformers would drop them."""
    return {**arguments, "remove_unused_columns": False}


def dpo_config(stage: PreferenceStage, arguments: dict[str, Any]) -> DPOConfig:
    extra: dict[str, Any] = {}
    if stage.f_divergence is FDivergence.alpha_divergence and stage.f_alpha is not None:
        extra["f_alpha_divergence_coef"] = stage.f_alpha
    return DPOConfig(
        **arguments,
        **EXPERTS,
        loss_type=[loss.value for loss in stage.losses],
        loss_weights=stage.weights,
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        f_divergence_type=stage.f_divergence.value,
        ld_alpha=stage.ld_alpha,
        discopop_tau=stage.discopop_tau,
        **extra,
    )


def kto_config(stage: KTOStage, arguments: dict[str, Any]) -> KTOConfig:
    return KTOConfig(
        **arguments,
        **EXPERTS,
        loss_type=stage.loss.value,
        beta=stage.beta,
        desirable_weight=stage.desirable_weight,
        undesirable_weight=stage.undesirable_weight,
    )


def kto_collator(stage: KTOStage, tokenizer: Any) -> Any:
    """TRL's collator; for ``stage.loss=kto`` each row gets an answer for the KL estimate."""
    collate = DataCollatorForUnpairedPreference(
        pad_token_id=tokenizer.pad_token_id, max_length=stage.max_length
    )
    return KLPairs(collate) if stage.loss is KTOLoss.kto else collate


def cpo_config(stage: CPOStage, arguments: dict[str, Any]) -> CPOConfig:
    return CPOConfig(
        **_own_columns(arguments),
        loss_type=stage.loss.value,
        beta=stage.beta,
        cpo_alpha=stage.nll_coef,
        simpo_gamma=stage.gamma,
        label_smoothing=stage.label_smoothing,
    )
