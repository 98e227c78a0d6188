"""``stage=reward``: a pairwise reward model on TRL's RewardTrainer, judged on held-out pairs beside
a length-only baseline.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer

from conf.schema import Config
from policy.engines import resharding
from reward.model import (
    Manifest,
    load_reward_module,
    score_ids,
    template_hash,
    tokenizer_fingerprint,
    write_manifest,
)
from rlhf.data.reading import DataRequest, check_first_strength, preference_dataset
from rlhf.models.encoding import encode_answer, is_chat, require_template
from rlhf.models.loading import load_classifier, resolve_dtype
from rlhf.offline import checks
from rlhf.offline import row_weights as weights
from rlhf.offline import trainer as common
from rlhf.offline.guards import guarded
from rlhf.process import distributed, watchdog
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.reward")
adapt_checkpoint = resharding.adapt  # before a resume
_SAMPLES = 8  # held-out pairs in samples.jsonl
Rows = datasets.Dataset
_CONFIDENCE = (2.5, 97.5)  # percentiles of the bootstrap interval


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load; returns notes worth a warning. Raises
    UserError.
    """
    notes = checks.check(cfg)
    if cfg.stage.margin or cfg.stage.soft_label:
        check_first_strength(DataRequest.of(cfg))
    return notes


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs as the trainer reads them, and where each stands in the rows that they come from."""

    # chosen_ids, rejected_ids, margin or soft_label where the stage uses it, weight where the rows
    # have one
    data: datasets.Dataset
    rows: list[int]  # row number of each pair


def encode_pairs(
    tokenizer: Any,
    rows: datasets.Dataset,
    *,
    name: str,
    max_length: int,
    margin: bool,
    soft_label: bool = False,
) -> EncodedPairs:
    """Token ids of both answers of every pair; pairs longer than `max_length` tokens are left out
    and counted aloud.

    A pair is never cut: the score is read at its last token. Raises UserError for a pair that can't
    be encoded, a missing or non-finite margin, and when no pair is left.
    """
    chat = is_chat(rows[0]["chosen"])
    if chat:
        require_template(tokenizer, f"{name} pairs")
    if margin and "margin" not in rows.column_names:
        raise UserError(
            f"stage.margin=true, but the {name} pairs have no margin. Columns: "
            f"{', '.join(rows.column_names)}."
        )
    strength = "margin" if margin else weights.SOFT_LABEL if soft_label else None
    columns: dict[str, list[Any]] = {
        "chosen_ids": [],
        "rejected_ids": [],
        **({strength: []} if strength else {}),
    }
    row_weights: list[float] = []
    kept: list[int] = []
    for number, row in enumerate(rows):
        watchdog.alive()
        try:
            chosen = encode_answer(tokenizer, row.get("prompt"), row["chosen"])
            rejected = encode_answer(tokenizer, row.get("prompt"), row["rejected"])
        except ValueError as error:
            raise UserError(f"{name} pair {number}: {error}.") from error
        if margin and (row["margin"] is None or not math.isfinite(row["margin"])):
            raise UserError(
                f"{name} pair {number}: margin is {row['margin']!r}, expected a finite number."
            )
        if max(len(chosen), len(rejected)) > max_length:
            continue
        kept.append(number)
        columns["chosen_ids"].append(chosen)
        columns["rejected_ids"].append(rejected)
        row_weights.append(row.get(weights.COLUMN, 1.0))
        if strength:
            columns[strength].append(float(row[strength]))
    if not kept:
        raise UserError(
            f"{name}: each of the {len(rows)} pairs is longer than stage.max_length={max_length} "
            "tokens."
        )
    if len(kept) < len(rows):
        LOG.warning(
            "%s: %d of %d pairs are longer than stage.max_length=%d tokens and are left out",
            name,
            len(rows) - len(kept),
            len(rows),
            max_length,
        )
    data = weights.weigh(
        datasets.Dataset.from_dict(columns),
        row_weights if weights.COLUMN in rows.column_names else None,
    )
    return EncodedPairs(data, kept)


def padding_token(tokenizer: Any, *pairs: EncodedPairs) -> str:
    """A token that pads and occurs in no pair. Raises UserError when the whole vocabulary occurs.

    The classifier finds a row's last token as the last one that isn't padding. Were padding the
    end-of-sequence token, as it is for many tokenizers, training would read the score one token
    before the end and scoring at the end.
    """
    used = {
        token
        for group in pairs
        for column in ("chosen_ids", "rejected_ids")
        for ids in group.data[column]
        for token in ids
    }
    for token_id in (
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        *reversed(range(len(tokenizer))),
    ):
        if token_id is not None and token_id != tokenizer.eos_token_id and token_id not in used:
            return str(tokenizer.convert_ids_to_tokens(token_id))
    raise UserError(
        "every token of the tokenizer's vocabulary occurs in the pairs, so none is left for "
        "padding: add a pad token to the tokenizer."
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores of held-out pairs, the tokens of their two sides, and the probabilities that chosen is
    better, all of length N.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    soft_labels: np.ndarray | None = None  # None: each chosen answer is better


def bootstrap_interval(
    accuracy: float, count: int, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of an accuracy over `count` pairs.

    Resampling `count` zeros and ones with replacement draws a binomial number of ones, so it is
    drawn as such.
    """
    draws = np.random.default_rng(seed).binomial(count, accuracy, size=resamples) / count
    low, high = np.percentile(draws, _CONFIDENCE)
    return float(low), float(high)


def length_baseline(chosen_tokens: np.ndarray, rejected_tokens: np.ndarray) -> float:
    """Accuracy of "the longer side wins" in tokens; a tie counts one half. Far from 0.5 on either
    side, length tells the pairs apart.
    """
    return float(
        np.mean((chosen_tokens > rejected_tokens) + 0.5 * (chosen_tokens == rejected_tokens))
    )


def leaning(soft_labels: np.ndarray) -> np.ndarray:
    """1 where chosen is the better side of a held-out pair, -1 where rejected is, 0 for a tie; [N].
    Raises UserError when all are ties.
    """
    lean = np.sign(soft_labels - 0.5)
    if not lean.any():
        raise UserError(
            f"each of the {len(lean)} held-out pairs has soft_label 0.5, so none has a right "
            "answer to judge the model by. "
            "Give decided pairs as data.eval_path, or raise data.eval_fraction."
        )
    return lean


def judgement_metrics(judged: Judged, resamples: int, seed: int) -> dict[str, float]:
    """What a reward model is worth on held-out pairs; an equal score counts as wrong.

    With soft labels, pairs of exactly 1/2 have no right answer and are counted apart; below 1/2 the
    rejected side is the right one. Then eval/calibration_error is the mean distance of
    sigmoid(margin) from the soft label. Raises UserError when every pair is a tie.
    """
    margins = judged.chosen - judged.rejected
    lean = np.ones(len(margins)) if judged.soft_labels is None else leaning(judged.soft_labels)
    decided = lean != 0
    accuracy = float(np.mean((lean * margins > 0)[decided]))
    low, high = bootstrap_interval(accuracy, int(decided.sum()), resamples, seed)
    scores = np.concatenate([judged.chosen, judged.rejected])
    first = np.where(lean > 0, judged.chosen_tokens, judged.rejected_tokens)[decided]
    second = np.where(lean > 0, judged.rejected_tokens, judged.chosen_tokens)[decided]
    soft: dict[str, float] = {}
    if judged.soft_labels is not None:
        said = 0.5 * (1 + np.tanh(margins / 2))  # sigmoid, without overflow
        soft = {
            "eval/ties": float(np.sum(~decided)),
            "eval/calibration_error": float(np.mean(np.abs(said - judged.soft_labels))),
        }
    return {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/length_baseline": length_baseline(first, second),
        "eval/margin": float(np.mean(margins)),
        "eval/score_mean": float(np.mean(scores)),
        "eval/score_std": float(np.std(scores)),
        "eval/pairs": float(len(margins)),
        **soft,
    }


def judge(module: Any, pairs: datasets.Dataset, budget: int, device: torch.device) -> Judged:
    """Score held-out pairs with the saved model, the rows shared out over the ranks. Collective."""
    chosen, rejected = pairs["chosen_ids"], pairs["rejected_ids"]
    mine = range(distributed.rank(), len(pairs), distributed.world_size())
    scores = score_ids(
        module, [chosen[i] for i in mine] + [rejected[i] for i in mine], budget, device
    )
    sides = np.full((2, len(pairs)), np.nan)
    for numbers, values in distributed.gather((list(mine), scores)):
        sides[0, numbers], sides[1, numbers] = values[: len(numbers)], values[len(numbers) :]
    soft_labels = (
        np.array(pairs[weights.SOFT_LABEL]) if weights.SOFT_LABEL in pairs.column_names else None
    )
    return Judged(
        sides[0],
        sides[1],
        np.array([len(ids) for ids in chosen]),
        np.array([len(ids) for ids in rejected]),
        soft_labels,
    )


def plot_judged(judged: Judged, metrics: dict[str, float], directory: Path) -> Path:
    """Histograms of the margins, and of the scores of chosen and rejected answers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.hist(judged.chosen - judged.rejected, bins=40)
    left.axvline(0.0, color="black", linewidth=1)
    left.set_xlabel("score of chosen - score of rejected")
    left.set_ylabel("held-out pairs")
    left.set_title(
        f"accuracy {metrics['eval/accuracy']:.3f} [{metrics['eval/accuracy_low']:.3f}, "
        f"{metrics['eval/accuracy_high']:.3f}]"
    )
    right.hist([judged.chosen, judged.rejected], bins=40, label=["chosen", "rejected"])
    right.set_xlabel("score")
    right.legend()
    directory.mkdir(parents=True, exist_ok=True)
    place = directory / "held_out_pairs.png"
    figure.savefig(place, dpi=120)
    return place


def sample_rows(tokenizer: Any, pairs: datasets.Dataset, judged: Judged) -> list[dict[str, Any]]:
    """A few held-out pairs, a line per answer, as samples.jsonl has them; the prompt is part of the
    text.
    """
    out = []
    for i in range(min(_SAMPLES, len(pairs))):
        for side, scores in (("chosen", judged.chosen), ("rejected", judged.rejected)):
            ids = pairs[i][f"{side}_ids"]
            out.append(
                {
                    "pair": i,
                    "side": side,
                    "response": tokenizer.decode(ids),
                    "score": float(scores[i]),
                    "response_length": len(ids),
                }
            )
    return out


def manifest_of(
    cfg: Config, tokenizer: Any, *, conversational: bool, metrics: dict[str, float]
) -> Manifest:
    return Manifest(
        base=cfg.model.path or cfg.model.kind.value,
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        chat_template_hash=template_hash(tokenizer),
        conversational=conversational,
        max_length=cfg.stage.max_length,
        dtype=str(resolve_dtype(cfg.model.dtype)).removeprefix("torch."),
        score_mean=metrics["eval/score_mean"],
        score_std=metrics["eval/score_std"],
        held_out_texts=2 * int(metrics["eval/pairs"]),
    )


def pairs_shown(metrics: dict[str, float]) -> str:
    """How many held-out pairs there are, and how many of them the accuracy leaves out."""
    ties = metrics.get("eval/ties", 0.0)
    return f"{metrics['eval/pairs']:.0f}" + (
        f" ({ties:.0f} ties have no right answer and are not in the accuracy)" if ties else ""
    )


def run(ctx: RunContext) -> None:
    """Train, keep the best weights by held-out loss, save a self-contained model/ (and adapter/ for
    LoRA), judge it on held-out pairs.
    """
    with ctx.closing():
        _run(ctx)


def read(cfg: Config, tokenizer: Any) -> tuple[EncodedPairs, EncodedPairs, bool]:
    """Encoded training and held-out pairs, and whether they are conversations. Raises UserError."""
    stage = cfg.stage
    train_rows, eval_rows = preference_dataset(DataRequest.of(cfg))
    options = {
        "max_length": stage.max_length,
        "margin": stage.margin,
        "soft_label": stage.soft_label,
    }
    train = encode_pairs(tokenizer, train_rows, name="training", **options)
    return (
        train,
        encode_pairs(tokenizer, eval_rows, name="held-out", **options),
        is_chat(train_rows[0]["chosen"]),
    )


def count_trained(cfg: Config, tokenizer: Any, micro: int) -> int:
    """Pairs that train, for a dry run. Raises UserError as `read`."""
    return len(read(cfg, tokenizer)[0].data)


def _run(ctx: RunContext) -> None:
    cfg, stage = ctx.cfg, ctx.cfg.stage
    ctx.watchdog.phase("data")
    plan, tokenizer = common.begin(cfg)
    train, held_out, conversational = read(cfg, tokenizer)
    common.record_inputs(ctx, "policy")
    if stage.soft_label:
        # raises here rather than after training
        leaning(np.array(held_out.data[weights.SOFT_LABEL]))
    tokenizer.pad_token = padding_token(tokenizer, train, held_out)
    steps, metrics = _train(ctx, plan, tokenizer, train.data, held_out.data)
    ctx.watchdog.phase("judge")
    # The figures are those of the saved weights, read back as every later stage reads them.
    device = distributed.device()
    module = load_reward_module(ctx.model_dir, resolve_dtype(cfg.model.dtype)).to(device)
    judged = judge(module, held_out.data, cfg.reward.batch_tokens, device)
    metrics |= judgement_metrics(judged, stage.bootstrap, cfg.run.seed)
    if distributed.is_main():
        write_manifest(
            ctx.model_dir,
            manifest_of(cfg, tokenizer, conversational=conversational, metrics=metrics),
        )
        ctx.tracker.samples(steps, sample_rows(tokenizer, held_out.data, judged))
        plot = plot_judged(judged, metrics, ctx.dir / "plots")
        ctx.tracker.images([plot])
    shown = {
        "held-out accuracy": f"{metrics['eval/accuracy']:.3f} (95 %: "
        f"{metrics['eval/accuracy_low']:.3f} to "
        f"{metrics['eval/accuracy_high']:.3f})",
        "the longer side wins": f"{metrics['eval/length_baseline']:.3f}",
        "mean margin": metrics["eval/margin"],
        "held-out pairs": pairs_shown(metrics),
    }
    ctx.watchdog.phase("finish")
    following = (
        f"python -m rlhf stage=ppo model.path=<policy> reward.path={ctx.model_dir} "
        "data.path=<prompts>"
    )
    ctx.finish(steps=steps, metrics=metrics, figures=shown, next_command=following)


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
    model = load_classifier(
        dataclasses.replace(cfg.model, dtype=common.training_dtype(cfg)), tokenizer
    )
    longest = max(
        len(ids)
        for rows in (train, held_out)
        for side in ("chosen_ids", "rejected_ids")
        for ids in rows[side]
    )
    common.check_positions(model.config, longest)
    model = common.with_adapter(model, cfg, "SEQ_CLS")
    args = TRLRewardConfig(
        **common.trainer_arguments(ctx, plan),
        center_rewards_coefficient=stage.centering_coef or None,
    )
    trainer = guarded(weights.weighted_reward(RewardTrainer))(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    steps, metrics = common.fit_and_save(trainer, tokenizer, ctx)
    del trainer, model
    common.free_memory()
    return steps, metrics
