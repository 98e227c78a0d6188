"""Offline preference optimisation on TRL's trainers: ``stage=dpo``, ``ipo``, ``kto``, ``cpo``,
``simpo`` and ``orpo``.

The losses are TRL's. Ours are the tokens (rlhf/models/encoding.py, as every stage has them), the
reference, the KL pairs of KTO, and what a run leaves behind.
"""

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from conf.choices import AdapterKind, FDivergence, KTOLoss, PreferenceLoss
from conf.schema import AdapterConfig, Config
from conf.stages import CPOStage, KTOStage, ORPOStage, PreferenceStage
from policy.engines import resharding
from policy.model import base_of, is_peft
from rlhf.checks import launch
from rlhf.data.reading import DataRequest, preference_dataset, unpaired_dataset
from rlhf.models.encoding import (
    IGNORED,
    Message,
    is_chat,
    prompt_ids,
    require_template,
    response_ids,
    split_answer,
)
from rlhf.models.loading import load_causal_lm
from rlhf.offline import checks
from rlhf.offline import row_weights as weights
from rlhf.offline import trainer as common
from rlhf.offline.guards import guarded
from rlhf.process import distributed, watchdog
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import UserError

_HEADS = ("lm_head", "embed_out")  # names of language-model heads
LOG = logging.getLogger("rlhf.stages.preference")
adapt_checkpoint = resharding.adapt  # before a resume
_SAMPLES = 4  # held-out prompts that the trained policy answers
_SORTING = (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
_BALANCE = (1.0, 4 / 3)  # KTO's equation 8: weighted good answers for each weighted bad one
Ids = list[int]


# ---- rows to tokens ----


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load; returns notes worth a warning. Raises
    UserError.
    """
    stage = cfg.stage
    notes = checks.check(cfg)
    check_adapter(stage, cfg.adapter)
    micro = cfg.engine.micro_batch_size
    where = "stage.batch_size / ranks" if micro is None else "engine.micro_batch_size"
    ranks = launch.count_ranks(cfg.engine, dry_run=cfg.run.dry_run)
    rows = launch.plan_batches(stage.batch_size, micro, ranks).micro
    if isinstance(stage, KTOStage) and stage.loss is KTOLoss.kto and rows < 2:
        raise UserError(
            f"{where} = {rows}: stage.loss=kto compares each answer of a forward pass with "
            "another's prompt. "
            "Expected at least 2, or stage.loss=apo_zero_unpaired."
        )
    if isinstance(stage, PreferenceStage) and rows != stage.batch_size:
        notes += sorting_note(stage, rows)
    return notes


def check_adapter(stage: Any, adapter: AdapterConfig) -> None:
    """The adapter has no dropout, and isn't put on a head that would not train. Raises
    UserError.
    """
    if adapter.kind is AdapterKind.none:
        return
    if adapter.dropout > 0:
        raise UserError(
            f"adapter.dropout={adapter.dropout}: TRL turns dropout off for stage={stage.name}, "
            "so that the losses compare weights alone. "
            "Set adapter.dropout=0."
        )
    heads = [name for name in adapter.targets if name in _HEADS]
    if heads and isinstance(stage, (PreferenceStage, KTOStage)):
        raise UserError(
            f"adapter.targets={list(adapter.targets)} holds the language-model head {heads[0]!r}, "
            f"where stage={stage.name} would never train an adapter: "
            "leave it out."
        )


def sorting_note(stage: PreferenceStage, rows: int) -> list[str]:
    """A note where a loss sorts the pairs of a forward pass, of `rows` pairs, not of the step."""
    sorting = (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
    names = [loss.value for loss in stage.losses if loss in sorting]
    if not names:
        return []
    return [
        f"stage.losses: {', '.join(names)} sorts the pairs of one forward pass, which "
        f"are {rows} of stage.batch_size={stage.batch_size}."
    ]


def encode_sides(
    tokenizer: Any, prompt: str | list[Message] | None, answers: Sequence[str | list[Message]]
) -> tuple[Ids, list[Ids]]:
    """Token ids of the context that all `answers` share, and of each answer, end-of-sequence
    included.

    Raises ValueError as `split_answer`, and for conversations that part before their last message.
    """
    parts = [split_answer(prompt, answer) for answer in answers]
    contexts = [context for context, _ in parts]
    if any(context != contexts[0] for context in contexts):
        raise ValueError(
            "the answers must differ in their last message only, found conversations that part "
            "earlier"
        )
    return prompt_ids(tokenizer, contexts[0]), [response_ids(tokenizer, text) for _, text in parts]


def encode_rows(
    tokenizer: Any, rows: datasets.Dataset, sides: Sequence[str], *, name: str, max_length: int
) -> datasets.Dataset:
    """``prompt_ids`` and ``<side>_ids`` of every row, and its ``label`` and ``weight`` where it has
    one.

    Rows with a side of more than `max_length` tokens are left out and counted aloud: an answer that
    is cut has no end to learn. Raises UserError for a row that can't be encoded and when no row is
    left.
    """
    if any(is_chat(rows[0].get(key)) for key in ("prompt", *sides)):
        require_template(tokenizer, f"{name} data")
    columns: dict[str, list[Any]] = {
        "prompt_ids": [],
        **{f"{side}_ids": [] for side in sides},
        **({"label": []} if "label" in rows[0] else {}),
    }
    row_weights: list[float] = []
    for number, row in enumerate(rows):
        watchdog.alive()
        try:
            context, answers = encode_sides(
                tokenizer, row.get("prompt"), [row[side] for side in sides]
            )
        except ValueError as error:
            raise UserError(f"{name} row {number}: {error}.") from error
        if len(context) + max(len(answer) for answer in answers) > max_length:
            continue
        values = {
            "prompt_ids": context,
            "label": row.get("label"),
            **{f"{side}_ids": ids for side, ids in zip(sides, answers, strict=True)},
        }
        for column, kept in columns.items():
            kept.append(values[column])
        row_weights.append(row.get(weights.COLUMN, 1.0))
    left = len(columns["prompt_ids"])
    if not left:
        raise UserError(
            f"{name}: each of the {len(rows)} rows is longer than stage.max_length={max_length} "
            "tokens."
        )
    if left < len(rows):
        LOG.warning(
            "%s: %d of %d rows are longer than stage.max_length=%d tokens and are left out",
            name,
            len(rows) - left,
            len(rows),
            max_length,
        )
    return weights.weigh(
        datasets.Dataset.from_dict(columns),
        row_weights if weights.COLUMN in rows.column_names else None,
    )


def longest_row(rows: datasets.Dataset, *, mixed: bool = False) -> int:
    """Tokens of the longest sequence that a trainer builds; `mixed`: any prompt may meet any answer
    (KTO's KL pairs).
    """
    sides = [c for c in rows.column_names if c.endswith("_ids") and c != "prompt_ids"]
    if mixed:
        return max(map(len, rows["prompt_ids"])) + max(
            len(ids) for side in sides for ids in rows[side]
        )
    return max(len(row["prompt_ids"]) + len(row[side]) for row in rows for side in sides)


def labelled(rows: datasets.Dataset) -> datasets.Dataset:
    """Pairs in the columns of TRL's CPO and ORPO collator: whole sequences, and labels that leave
    the prompt out.
    """

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {weights.COLUMN: row[weights.COLUMN]} if weights.COLUMN in row else {}
        for side in ("chosen", "rejected"):
            context, answer = row["prompt_ids"], row[f"{side}_ids"]
            out[f"{side}_input_ids"] = context + answer
            out[f"{side}_attention_mask"] = [1] * (len(context) + len(answer))
            out[f"{side}_labels"] = [IGNORED] * len(context) + answer
        return out

    return datasets.Dataset.from_list([columns(row) for row in rows])


# ---- KTO: mismatched pairs, batches of at least two, the balance of good and bad ----


def mismatch_shift(prompts: Sequence[Ids]) -> int:
    """By how many places to rotate the answers of a batch so that the fewest meet a prompt equal to
    their own; 0 for a single row.
    """
    count = len(prompts)
    return (
        min(range(1, count), key=lambda k: sum(prompts[i] == prompts[i - k] for i in range(count)))
        if count > 1
        else 0
    )


@dataclass(frozen=True, slots=True)
class KLPairs:
    """Gives each row of a batch the answer of another row, from which KTO estimates its KL
    divergence; then collates as TRL does.

    TRL pairs rows once for the whole file and then must read it in order. Paired here, a shuffled
    batch holds its own pairs, and both estimates of a batch come from the same answers.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        shift = mismatch_shift([row["prompt_ids"] for row in rows])
        return self.collate(
            [
                {**row, "KL_completion_ids": rows[i - shift]["completion_ids"]}
                for i, row in enumerate(rows)
            ]
        )


def without_lone_row(rows: datasets.Dataset, micro: int, name: str) -> datasets.Dataset:
    """`rows` of which no forward pass holds one alone, since its answer would meet its own prompt.
    Raises UserError for a single row.
    """
    if len(rows) % micro != 1:
        return rows
    if len(rows) == 1:
        raise UserError(
            f"{name}: one answer is too few: stage.loss=kto compares each with another's prompt."
        )
    LOG.warning(
        "%s: the last of %d rows is left out: it would be alone in its forward pass of %d rows",
        name,
        len(rows),
        micro,
    )
    return rows.select(range(len(rows) - 1))


def balance_note(
    good: int, bad: int, desirable_weight: float, undesirable_weight: float
) -> str | None:
    """What to set when the weighted counts of good and bad answers are out of the paper's range;
    None when they are within.
    """
    ratio = desirable_weight * good / (undesirable_weight * bad)
    low, high = _BALANCE
    if low <= round(ratio, 2) <= round(high, 2):
        return None
    wanted = undesirable_weight * bad / good
    return (
        f"{good} good and {bad} bad answers with weights {desirable_weight:g} and "
        f"{undesirable_weight:g}: the paper keeps their weighted ratio in "
        f"[1, 4/3], found {ratio:.2f}. Set stage.desirable_weight to a value in "
        f"[{low * wanted:.3g}, {high * wanted:.3g}]."
    )


# ---- trainers ----


def pretokenised(trainer_class: type) -> type:
    """`trainer_class` that takes data sets as they are: TRL would tokenise prompt and answer
    together and drop what it cuts.
    """

    class Pretokenised(trainer_class):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

    return Pretokenised


def counting(trainer_class: type) -> type:
    """`trainer_class` (CPO, ORPO) that also logs ``num_tokens``, as TRL's other trainers do: tokens
    trained on so far, over all ranks.
    """

    class Counting(trainer_class):
        tokens_seen = 0

        def get_batch_loss_metrics(
            self, model: Any, batch: dict[str, Any], train_eval: str = "train"
        ) -> Any:
            if train_eval == "train":
                counted = sum(
                    mask.sum() for key, mask in batch.items() if key.endswith("_attention_mask")
                )
                self.tokens_seen += int(self.accelerator.gather_for_metrics(counted).sum())
            return super().get_batch_loss_metrics(model, batch, train_eval=train_eval)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                logs["num_tokens"] = float(self.tokens_seen)
            super().log(logs, start_time)

    return Counting


def check_head(model: Any) -> None:
    """Raises UserError when an adapter sits on the language-model head, which TRL's fused
    log-probabilities would read without it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if is_peft(model) and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "adapter.targets holds the language-model head, where an adapter would never be "
            "trained here: leave it out."
        )


def start_of(model: Any) -> Any:
    """The frozen reference of a policy that has not been trained yet: a copy, or None where the
    adapter can be turned off.
    """
    if is_peft(model):
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


def _without_copy(trainer: Any) -> Any:
    """`trainer` whose reference is the adapter turned off; TRL adds a second adapter for it, equal
    to the base while ours is fresh.
    """
    if is_peft(trainer.model):
        trainer.model.delete_adapter("ref")
    return trainer


def dpo_trainer(
    stage: PreferenceStage, arguments: dict[str, Any], model: Any, reference: Any, **data: Any
) -> Any:
    """TRL's DPOTrainer with the stage's losses; `reference` is None for an adapter."""
    args = DPOConfig(
        **arguments,
        loss_type=[loss.value for loss in stage.losses],
        loss_weights=stage.weights,
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        f_divergence_type=stage.f_divergence.value,
        **(
            {"f_alpha_divergence_coef": stage.f_alpha}
            if stage.f_divergence is FDivergence.alpha_divergence and stage.f_alpha is not None
            else {}
        ),
        ld_alpha=stage.ld_alpha,
        discopop_tau=stage.discopop_tau,
    )
    check_head(model)
    return _without_copy(
        guarded(weights.weighted_gradients(pretokenised(DPOTrainer)))(
            model=model, ref_model=reference, args=args, **data
        )
    )


def kto_trainer(
    stage: KTOStage, arguments: dict[str, Any], model: Any, reference: Any, **data: Any
) -> Any:
    """TRL's KTOTrainer; `reference` is None for an adapter."""
    args = KTOConfig(
        **arguments,
        loss_type=stage.loss.value,
        beta=stage.beta,
        desirable_weight=stage.desirable_weight,
        undesirable_weight=stage.undesirable_weight,
    )
    check_head(model)
    collate = DataCollatorForUnpairedPreference(
        pad_token_id=data["processing_class"].pad_token_id, max_length=stage.max_length
    )
    collator = KLPairs(collate) if stage.loss is KTOLoss.kto else collate
    trainer = guarded(weights.weighted_gradients(pretokenised(KTOTrainer)))(
        model=model, ref_model=reference, args=args, data_collator=collator, **data
    )
    return _without_copy(trainer)


def cpo_trainer(
    stage: CPOStage | ORPOStage, arguments: dict[str, Any], model: Any, **data: Any
) -> Any:
    """TRL's CPOTrainer or ORPOTrainer, which need no reference."""
    # that they are experimental is known and their version is pinned
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    if isinstance(stage, ORPOStage):
        trainer_class, args = (
            ORPOTrainer,
            ORPOConfig(**arguments, remove_unused_columns=False, beta=stage.beta),
        )
    else:
        trainer_class = CPOTrainer
        args = CPOConfig(
            **arguments,
            remove_unused_columns=False,  # the collator takes what it knows
            loss_type=stage.loss.value,
            beta=stage.beta,
            cpo_alpha=stage.nll_coef,
            simpo_gamma=stage.gamma,
            label_smoothing=stage.label_smoothing,
        )
    return guarded(weights.weighted_gradients(counting(pretokenised(trainer_class))))(
        model=model, args=args, **data
    )


def make_trainer(
    stage: Any,
    arguments: dict[str, Any],
    model: Any,
    reference: Any,
    tokenizer: Any,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
) -> Any:
    """The trainer of one of this module's stages, on encoded rows. `arguments`: what TRL's configs
    have in common.
    """
    data = {"train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    if isinstance(stage, PreferenceStage):
        return dpo_trainer(stage, arguments, model, reference, **data)
    if isinstance(stage, KTOStage):
        return kto_trainer(stage, arguments, model, reference, **data)
    return cpo_trainer(
        stage,
        arguments,
        model,
        **(data | {"train_dataset": labelled(train), "eval_dataset": labelled(held_out)}),
    )


def has_reference(stage: Any) -> bool:
    return isinstance(stage, (PreferenceStage, KTOStage))


# ---- the stage ----


def read(cfg: Config, tokenizer: Any, micro: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Encoded training and held-out rows of the stage. Raises UserError."""
    stage = cfg.stage
    unpaired = isinstance(stage, KTOStage)
    sides = ("completion",) if unpaired else ("chosen", "rejected")
    raw = (
        unpaired_dataset(DataRequest.of(cfg))
        if unpaired
        else preference_dataset(DataRequest.of(cfg))
    )
    check_weights(cfg, raw[0])
    train, held_out = (
        encode_rows(tokenizer, rows, sides, name=name, max_length=stage.max_length)
        for name, rows in zip(("training", "held-out"), raw, strict=True)
    )
    if not unpaired:
        return train, held_out
    good = sum(train["label"])
    if not 0 < good < len(train):
        found = "good" if good else "bad"
        raise UserError(
            f"training: each of the {len(train)} answers of at most "
            f"stage.max_length={stage.max_length} tokens is judged {found}."
        )
    note = balance_note(good, len(train) - good, stage.desirable_weight, stage.undesirable_weight)
    if note is not None:
        LOG.warning("%s", note)
    # a file sorted by label would give passes with nothing to compare
    held_out = held_out.shuffle(seed=cfg.run.seed)
    if stage.loss is KTOLoss.kto:
        held_out = without_lone_row(held_out, micro, "held-out")
        if len(train) < stage.batch_size:  # otherwise every step is a whole batch
            train = without_lone_row(train, micro, "training")
    return train, held_out


def count_trained(cfg: Config, tokenizer: Any, micro: int) -> int:
    """Rows that train, for a dry run. Raises UserError as `read`."""
    return len(read(cfg, tokenizer, micro)[0])


def check_weights(cfg: Config, rows: datasets.Dataset) -> None:
    """Says what the rows' weights do. Raises UserError for the losses that compare the sorted rows
    of a batch.
    """
    if weights.COLUMN not in rows.column_names:
        return
    column = cfg.data.weight_column
    sorting = [loss.value for loss in getattr(cfg.stage, "losses", []) if loss in _SORTING]
    if sorting:
        raise UserError(
            f"stage.losses={sorting[0]} sorts the rows of a batch, so no row has a loss that its "
            f"weight (column {column!r}) could multiply. "
            "Use another loss, or set data.weight_column=null to weigh all rows the same."
        )
    LOG.info(
        "the column %r multiplies each row's gradient; the losses that are logged weigh all rows "
        "the same",
        column,
    )


def sample_contexts(held_out: datasets.Dataset) -> list[Ids]:
    """What the samples start from: prompts, each once; the first quarter of whole texts without
    one.
    """
    contexts: list[Ids] = []
    for row in held_out:
        ids = row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"]
        context = row["prompt_ids"] or ids[: max(1, len(ids) // 4)]
        if context not in contexts:
            contexts.append(context)
        if len(contexts) == _SAMPLES:
            break
    return contexts


def run(ctx: RunContext) -> None:
    """Train, keep the best weights by held-out loss, save whole weights as model/ (and adapter/ for
    LoRA), sample, summarise.
    """
    with ctx.closing():
        _run(ctx)


def _run(ctx: RunContext) -> None:
    cfg, stage = ctx.cfg, ctx.cfg.stage
    ctx.watchdog.phase("data")
    plan, tokenizer = common.begin(cfg)
    train, held_out = read(cfg, tokenizer, plan.micro)
    common.record_inputs(ctx, "policy")
    steps, metrics = _train(ctx, plan, tokenizer, train, held_out)
    ctx.watchdog.phase("samples")
    if distributed.is_main():
        samples = common.greedy_samples(
            cfg.model, tokenizer, ctx.model_dir, sample_contexts(held_out), stage.max_length
        )
        ctx.tracker.samples(steps, samples)
    shown = {
        "held-out loss before": metrics.get("initial/eval_loss"),
        "held-out loss": metrics["eval_loss"],
        "held-out accuracy": metrics.get("eval_rewards/accuracies"),
        "held-out margin": metrics.get("eval_rewards/margins"),
        "best step": int(metrics["best_step"]),
    }
    ctx.watchdog.phase("finish")
    following = (
        f"python -m rlhf stage=eval stage.before={cfg.model.path or '<the start>'} "
        f"stage.after={ctx.model_dir} data.path=<prompts>"
    )
    ctx.finish(
        steps=steps,
        metrics=metrics,
        figures={k: v for k, v in shown.items() if v is not None},
        next_command=following,
    )


def _train(
    ctx: RunContext,
    plan: common.BatchPlan,
    tokenizer: Any,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
) -> tuple[int, dict[str, float]]:
    """Train and save; nothing of the trainer is left when it returns. Steps and figures."""
    cfg, stage = ctx.cfg, ctx.cfg.stage
    ctx.watchdog.phase("build")
    seed_everything(cfg.run.seed)
    model = load_causal_lm(
        dataclasses.replace(cfg.model, dtype=common.training_dtype(cfg)), tokenizer
    )
    mixed = isinstance(stage, KTOStage) and stage.loss is KTOLoss.kto
    longest = max(longest_row(rows, mixed=mixed) for rows in (train, held_out))
    common.check_positions(base_of(model).config, min(longest, stage.max_length))
    model = common.with_adapter(model, cfg, "CAUSAL_LM")
    # Copied before the trainer's arguments exist: from then on transformers would load ZeRO-3
    # models in shards.
    reference = start_of(model) if has_reference(stage) else None
    trainer = make_trainer(
        stage, common.trainer_arguments(ctx, plan), model, reference, tokenizer, train, held_out
    )
    steps, metrics = common.fit_and_save(trainer, tokenizer, ctx)
    del trainer, model, reference
    common.free_memory()
    return steps, metrics
