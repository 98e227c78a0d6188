"""The trainer of a reward model, and what the model is worth on held-out pairs: accuracy with its
interval beside a baseline that looks at length alone, margins, calibration, and their pictures.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from trl import RewardTrainer

from reward.model import Reader, See, score_rows
from rlhf.models.templates import row_pictures
from rlhf.offline import step_rows
from rlhf.offline.picture_rows import seen_by
from rlhf.offline.trainers import Carried, Inputs, Loss, StageTrainer
from rlhf.process import distributed
from rlhf.types import SOFT_LABEL, WEIGHT, Picture, UserError

_CONFIDENCE = (2.5, 97.5)  # percentiles of the bootstrap interval
_SAMPLES = 8  # held-out pairs in samples.jsonl


@dataclass(frozen=True, slots=True)
class Judged:
    """Held-out pairs as a reward model scores them; arrays of length N."""

    chosen: np.ndarray  # scores
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    soft_labels: np.ndarray | None = None  # probability that chosen is better; None: 1 each


def judge(
    read: Reader,
    pairs: datasets.Dataset,
    budget: int,
    device: torch.device,
    passes: Callable[[int], int] = int,
    processor: Any = None,
) -> Judged:
    """Score held-out pairs with a saved model, the rows shared out over the ranks. A collective.

    read, passes: of the model, as `score_rows` takes them; budget: tokens of one forward pass,
    padding included; processor: of a picture model.
    """
    chosen, rejected = pairs["chosen_ids"], pairs["rejected_ids"]
    mine = range(distributed.rank(), len(pairs), distributed.world_size())
    texts = [chosen[i] for i in mine] + [rejected[i] for i in mine]
    see: See | None = None
    if processor is not None:
        shown = [row_pictures(pairs[i]) for i in mine] * 2

        see = functools.partial(_seen, processor, shown)

    scores = score_rows(read, texts, budget, device, passes, see)
    sides = np.full((2, len(pairs)), np.nan)
    for numbers, values in distributed.gather((list(mine), scores)):
        sides[0, numbers] = values[: len(numbers)]
        sides[1, numbers] = values[len(numbers) :]
    soft_labels = np.array(pairs[SOFT_LABEL]) if SOFT_LABEL in pairs.column_names else None
    return Judged(
        sides[0],
        sides[1],
        np.array([len(ids) for ids in chosen]),
        np.array([len(ids) for ids in rejected]),
        soft_labels,
    )


def _seen(
    processor: Any, shown: Sequence[list[Picture]], numbers: Sequence[int], input_ids: Tensor
) -> dict[str, Tensor]:
    """What the model reads beside the token ids of the rows of these numbers."""
    return seen_by(processor, [shown[number] for number in numbers], input_ids)


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
    longer = chosen_tokens > rejected_tokens
    return float(np.mean(longer + 0.5 * (chosen_tokens == rejected_tokens)))


def better_side(soft_labels: np.ndarray) -> np.ndarray:
    """1 where chosen is the better side of a held-out pair, -1 where rejected is, 0 for a tie; [N].
    Raises UserError when all are ties.
    """
    better = np.sign(soft_labels - 0.5)
    if not better.any():
        raise UserError(
            f"each of the {len(better)} held-out pairs has soft_label 0.5, so none has a right "
            "answer to judge the model by. "
            "Give decided pairs as data.eval_path, or raise data.eval_fraction."
        )
    return better


def judgement_metrics(judged: Judged, resamples: int, seed: int) -> dict[str, float]:
    """What a reward model is worth on held-out pairs; an equal score counts as wrong.

    With soft labels, pairs of exactly 1/2 have no right answer and are counted apart; below 1/2 the
    rejected side is the right one. Then eval/calibration_error is the mean distance of
    sigmoid(margin) from the soft label. Raises UserError when every pair is a tie.
    """
    margins = judged.chosen - judged.rejected
    if judged.soft_labels is None:
        better = np.ones(len(margins))
    else:
        better = better_side(judged.soft_labels)
    decided = better != 0
    accuracy = float(np.mean((better * margins > 0)[decided]))
    low, high = bootstrap_interval(accuracy, int(decided.sum()), resamples, seed)
    scores = np.concatenate([judged.chosen, judged.rejected])
    right_tokens = np.where(better > 0, judged.chosen_tokens, judged.rejected_tokens)
    wrong_tokens = np.where(better > 0, judged.rejected_tokens, judged.chosen_tokens)
    metrics = {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/length_baseline": length_baseline(right_tokens[decided], wrong_tokens[decided]),
        "eval/margin": float(np.mean(margins)),
        "eval/score_mean": float(np.mean(scores)),
        "eval/score_std": float(np.std(scores)),
        "eval/pairs": float(len(margins)),
    }
    if judged.soft_labels is not None:
        probability = 0.5 * (1 + np.tanh(margins / 2))  # sigmoid, without overflow
        metrics["eval/ties"] = float(np.sum(~decided))
        metrics["eval/calibration_error"] = float(np.mean(np.abs(probability - judged.soft_labels)))
    return metrics


def plot_judged(judged: Judged, metrics: dict[str, float], directory: Path) -> Path:
    """Histograms of the margins, and of the scores of chosen and rejected answers. Returns the
    picture's file.
    """
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
    path = directory / "held_out_pairs.png"
    figure.savefig(path, dpi=120)
    return path


def sample_rows(tokenizer: Any, pairs: datasets.Dataset, judged: Judged) -> list[dict[str, Any]]:
    """A few held-out pairs as rows of samples.jsonl, a row per answer; the prompt is part of the
    text.
    """
    rows = []
    for i in range(min(_SAMPLES, len(pairs))):
        for side, scores in (("chosen", judged.chosen), ("rejected", judged.rejected)):
            ids = pairs[i][f"{side}_ids"]
            rows.append(
                {
                    "pair": i,
                    "side": side,
                    "response": tokenizer.decode(ids),
                    "score": float(scores[i]),
                    "response_length": len(ids),
                }
            )
    return rows


def shown(metrics: dict[str, float]) -> dict[str, Any]:
    """The figures of `judgement_metrics` that the closing panel shows."""
    low, high = metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]
    pairs = f"{metrics['eval/pairs']:.0f}"
    ties = metrics.get("eval/ties", 0.0)
    if ties:
        pairs += f" ({ties:.0f} ties have no right answer and are not in the accuracy)"
    return {
        "held-out accuracy": f"{metrics['eval/accuracy']:.3f} (95 %: {low:.3f} to {high:.3f})",
        "the longer side wins": f"{metrics['eval/length_baseline']:.3f}",
        "mean margin": metrics["eval/margin"],
        "held-out pairs": pairs,
    }


# ---- the trainer ----


class Reward(StageTrainer, RewardTrainer):
    """A pairwise reward model. Rows with weights or soft labels have the loss
    `step_rows.pair_loss`; the metrics stay TRL's, except that pairs without a right answer are
    not in the accuracy.
    """

    def weighted_loss(
        self, plain: Loss, model: Any, inputs: Inputs, carried: Carried, return_outputs: bool
    ) -> Any:
        _, outputs = plain(model, inputs, return_outputs=True)
        chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)  # [B] each
        soft_label = carried.get(SOFT_LABEL)
        loss = step_rows.pair_loss(
            chosen,
            rejected,
            carried.get(WEIGHT),
            inputs.get("margin"),
            self.args.center_rewards_coefficient,
            soft_label,
        )
        if soft_label is not None:
            self.count_decided(chosen - rejected, soft_label)
        return (loss, outputs) if return_outputs else loss

    def count_decided(self, difference: Tensor, soft_label: Tensor) -> None:
        """Replace what TRL just added to its accuracy, where every pair counts as won by chosen,
        with this batch's pairs that have a right answer, each by itself. A collective.

        difference: score of chosen - score of rejected, [B]. A soft label [B] of exactly 1/2 has
        no right answer.
        """
        lean = soft_label - 0.5
        right = (lean * difference.detach() > 0).to(lean.dtype)
        pairs = self.accelerator.gather_for_metrics(torch.stack([lean, right], dim=1))
        metrics = self.batch_metrics()
        metrics["accuracy"].pop()
        metrics["accuracy"].extend(pairs[pairs[:, 0] != 0, 1].tolist())
        if not metrics["accuracy"]:
            del metrics["accuracy"]
