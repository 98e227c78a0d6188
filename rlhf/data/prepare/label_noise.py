"""The step `label_noise`: labels that a model contradicts with confidence, by confident learning
(Northcutt et al. 2021) with cleanlab.

A pair's label says that the chosen answer is the better one; a reward model gives that the
probability sigmoid(score chosen - score rejected) (Bradley and Terry 1952). Each pair enters in
both orders, as "the first is better" and as "the second is", so that neither class is rarer and the
result doesn't hang on an order. A judged answer's label is good or bad, and a column gives the
probability that it is good.

The scores must be out of sample: from a model that has not been trained on the rows that it scores,
else it has learned their wrong labels too. A reward model whose run trained on the same file is
refused, unless `seen` says that this is known. To score a whole file, split it into folds, train a
model without each, and name them by fold: `reward_model: runs/without_{fold}/reward/model`, `fold:
fold`.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from conf.preparation.annotation import Contradicted, LabelNoise
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Context, Item, require_free
from rlhf.data.rows import finite
from rlhf.process.files import sha256
from rlhf.process.libraries import require
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")
LEAST = 2  # labels of a kind, below which no threshold can be told
FLAGS = ("label_noise", "label_quality")  # columns of action=flag


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(values))
    return np.asarray(np.where(values >= 0, 1.0, small) / (1.0 + small))


def pair_issues(right: np.ndarray, method: str) -> np.ndarray:
    """[N] which pairs' labels are contradicted, from `right` [N], the probability that the chosen
    side is the better one.
    """
    labels = np.concatenate(
        [np.ones(len(right), dtype=np.int64), np.zeros(len(right), dtype=np.int64)]
    )
    return np.asarray(
        _issues(labels, np.concatenate([right, 1.0 - right]), method).reshape(2, -1).any(axis=0)
    )


def _issues(labels: np.ndarray, positive: np.ndarray, method: str) -> np.ndarray:
    """[2 N] which binary labels cleanlab flags, `positive` being the probability of label 1."""
    find_label_issues = require("cleanlab.filter", "data").find_label_issues
    probabilities = np.stack([1.0 - positive, positive], axis=1)
    return np.asarray(find_label_issues(labels, probabilities, filter_by=method, n_jobs=1))


def _number(item: Item, column: str) -> float:
    """The finite number in a column. Raises UserError that names the row."""
    value = item.columns.get(column)
    number = finite(value)
    if number is None:
        instead = repr(value) if column in item.columns else "no such column"
        raise UserError(
            f"step label_noise: {item.place}: column {column!r}: expected a finite number, found "
            f"{instead}."
        )
    return number


def trained_on(directory: Path) -> dict[str, str]:
    """The data files of the run that wrote the model directory, path by SHA-256, from the manifest
    above it; empty where there is no manifest.
    """
    manifest = directory.parent / "manifest.json"
    if not manifest.is_file():
        return {}
    return {
        entry["sha256"]: entry["path"]
        for entry in json.loads(manifest.read_text(encoding="utf-8")).get("data", [])
    }


def check_unseen(directory: str, items: Sequence[Item]) -> None:
    """Raises UserError when the model's run has read a file that the rows come from; without a
    manifest that is not known, which is logged.
    """
    seen = trained_on(Path(directory).expanduser())
    if not seen:
        LOG.warning(
            "label_noise: %s has no run manifest beside it, so whether it was trained on these "
            "rows is not known",
            directory,
        )
    for origin in dict.fromkeys(item.origin for item in items):
        file = Path(origin).expanduser()
        if file.is_file() and sha256(file) in seen:
            raise UserError(
                f"step label_noise: reward_model={directory} was trained on {origin}, whose rows "
                "it would judge: its scores have learned "
                "their labels, right and wrong. Expected a model that has not seen them: train "
                "one without each fold of the file "
                "(option fold), or set seen=true to use it all the same."
            )


def _pair_scores(options: LabelNoise, items: Sequence[Item], context: Context) -> np.ndarray:
    """[N, 2] scores of the chosen and the rejected side."""
    if options.reward_model is None:
        columns = (options.score_chosen, options.score_rejected)
        return np.array(
            [[_number(item, column) for column in columns] for item in items], dtype=np.float64
        )
    if context.score_pairs is None:
        raise UserError(
            "step label_noise: reward_model needs a stage that can load it: run stage=data, or "
            "give scores as columns."
        )
    folds: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        if options.fold is not None and item.columns.get(options.fold) in (None, ""):
            raise UserError(
                f"step label_noise: {item.place}: column {options.fold!r}: expected the row's "
                "fold, found nothing."
            )
        folds.setdefault(
            str(item.columns[options.fold]) if options.fold is not None else "", []
        ).append(i)
    scores = np.full((len(items), 2), np.nan)
    for fold, rows in folds.items():
        directory = options.reward_model.replace("{fold}", fold)
        if not options.seen:
            check_unseen(directory, [items[i] for i in rows])
        content = [items[i].columns for i in rows]
        pairs = [
            (c.get("prompt"), c.get("chosen"), c.get("rejected"), c.get("tools")) for c in content
        ]
        scores[rows] = np.array(context.score_pairs(directory, pairs), dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(bad):
        raise UserError(
            f"step label_noise: {items[bad[0]].place}: the reward model's scores are "
            f"{scores[bad[0]].tolist()}, expected numbers."
        )
    return scores


def _good_probability(options: LabelNoise, items: Sequence[Item]) -> np.ndarray:
    """[N] the probability that an answer is good, from the column that is named."""
    if options.probability is None:
        raise UserError(
            "step label_noise: probability is not set: judged answers need a column with the "
            "probability that one is good."
        )
    out = np.array([_number(item, options.probability) for item in items])
    for item, value in zip(items, out, strict=True):
        if not 0 <= value <= 1:
            raise UserError(
                f"step label_noise: {item.place}: column {options.probability!r}: expected a "
                f"number in [0, 1], found {value:g}."
            )
    return out


def judge(
    options: LabelNoise, items: Sequence[Item], context: Context
) -> tuple[np.ndarray, np.ndarray]:
    """[N] which labels are contradicted, and [N] the probability that each is right. Raises
    UserError for scores that are missing.
    """
    if context.kind is Use.preference:
        scores = _pair_scores(options, items, context)
        right = sigmoid(scores[:, 0] - scores[:, 1])
        return pair_issues(right, options.method.value), right
    good = _good_probability(options, items)
    labels = np.array([int(item.columns["label"]) for item in items])
    if min((labels == 1).sum(), (labels == 0).sum()) < LEAST:
        raise UserError(
            f"step label_noise: expected at least {LEAST} good and {LEAST} bad answers, found "
            f"{labels.sum()} good of {len(labels)}."
        )
    return _issues(labels, good, options.method.value), np.where(labels == 1, good, 1.0 - good)


def _weight(item: Item) -> float:
    if item.columns.get("weight") not in (None, ""):
        return _number(item, "weight")
    return 1.0


def label_noise(options: LabelNoise, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Yield every row but those that are rejected; `flag` and `weight` keep all rows and write the
    result into columns.

    The column label_quality is the model's probability that the label is right; label_noise says
    whether confident learning contradicts the label. Raises UserError where rows have one of them
    already.
    """
    rows = list(items)
    if not rows:
        return
    if options.action is Contradicted.flag:
        for column in FLAGS:
            require_free(rows, column, "label_noise")
    issues, right = judge(options, rows, context)
    context.figures.update(
        rows=len(rows),
        found=int(issues.sum()),
        share=float(issues.mean()),
        mean_quality=float(right.mean()),
        method=options.method.value,
        action=options.action.value,
    )
    for item, issue, quality in zip(rows, issues.tolist(), right.tolist(), strict=True):
        if options.action is Contradicted.reject:
            if issue:
                context.rejected(
                    item,
                    "the model contradicts its label, to which it gives the probability "
                    f"{quality:.3f}",
                )
                continue
        elif options.action is Contradicted.flag:
            item.columns = {**item.columns, **dict(zip(FLAGS, (issue, quality), strict=True))}
        else:
            item.columns = {**item.columns, "weight": _weight(item) * quality}
        yield item
