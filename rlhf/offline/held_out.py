"""The held-out rows of a run on TRL's trainers: what looks at their loss, what a resumed run with
other ones compares, and what a run without any says instead.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conf.stages import OfflineStage
from policy.engines.base import Plateau
from rlhf.offline.step_rows import CARRIED
from rlhf.offline.steps import GroupRates
from rlhf.offline.trainers import StageTrainer
from rlhf.process import distributed

LOG = logging.getLogger("rlhf.stages")
# of a run with data.eval_fraction=0: in the closing panel and in summary.json
NO_HELD_OUT = {"weights": "the last ones: no held-out rows"}


def content_hash(rows: datasets.Dataset) -> str:
    """A hash of the tokens, labels and weights of encoded rows, hexadecimal."""
    columns = [name for name in sorted(rows.column_names) if _is_content(name)]
    digest = hashlib.sha256(json.dumps(columns).encode())
    for row in rows.select_columns(columns):
        digest.update(json.dumps([row[name] for name in columns]).encode())
    return digest.hexdigest()[:40]


def _is_content(column: str) -> bool:
    return column.endswith("ids") or column.startswith("label") or column in CARRIED


class HeldOutRows(TrainerCallback, ExportableState):
    """Writes into each checkpoint which rows its held-out loss was measured on.

    A resumed run with other ones evaluates before its first step: its best weights are those with
    the lowest loss from there on, where the checkpoint that it resumes from counts too.
    """

    def __init__(self, rows: str) -> None:
        """rows: a hash of this launch's held-out rows."""
        self.rows = rows
        self.since = 0  # the step of the first evaluation on them
        self.changed = False  # this launch's rows, since the checkpoint that it resumes from

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        return {"args": {"rows": self.rows}, "attributes": {"since": self.since}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare with the checkpoint's rows, where it says which they were."""
        known = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step == 0 or known is None:
            return
        self.since = known["attributes"]["since"]
        if known["args"]["rows"] == self.rows:
            return
        self.changed, self.since = True, state.global_step
        args.eval_on_start = True
        # before stage.patience compares with it
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if distributed.is_main():
            LOG.warning(
                "resume: the held-out rows are not those of the checkpoint at step %d, so losses "
                "from before don't compare: the best weights are those of the lowest loss on the "
                "new rows, from step %d on.",
                state.global_step,
                state.global_step,
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint that the run resumes from is the best so far."""
        if not self.changed:
            return
        self.changed = False
        loss = kwargs["metrics"]["eval_loss"]
        if math.isfinite(loss):
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            state.best_metric, state.best_global_step = loss, state.global_step
            state.best_model_checkpoint = str(folder)


# ---- what looks at their loss ----


class StallWatch(TrainerCallback, ExportableState):
    """stage.unfreeze.patience: unfreezes more blocks when the held-out loss stalls, and keeps what
    it knows in the checkpoints.
    """

    def __init__(self, groups: GroupRates, stage: OfflineStage, held_out: HeldOutRows) -> None:
        """held_out: added to the trainer before this."""
        self.groups, self.stage, self.held_out = groups, stage, held_out
        self.best: float | None = None
        self.waited = 0  # evaluations since the best

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        known = {"best": self.best, "waited": self.waited, "stalls": self.groups.stalls}
        return {"args": {}, "attributes": known}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step == 0 or known is None:
            return
        self.groups.stalls = known["attributes"]["stalls"]
        if not self.held_out.changed:
            self.best, self.waited = (known["attributes"][name] for name in ("best", "waited"))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = float(kwargs["metrics"]["eval_loss"])
        least = self.stage.min_improvement
        if math.isfinite(loss) and (self.best is None or self.best - loss > least):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        patience = self.stage.unfreeze.patience
        if patience is not None and self.waited >= patience:
            self.groups.stalls += 1
            self.waited = 0


class PlateauWatch(TrainerCallback, ExportableState):
    """Shows each held-out loss to the schedule, and keeps what it knows in the checkpoints."""

    def __init__(self, plateau: Plateau, held_out: HeldOutRows) -> None:
        """held_out: added to the trainer before this."""
        self.plateau, self.held_out = plateau, held_out

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        return {"args": {}, "attributes": self.plateau.state_dict()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run goes on from its checkpoint's figures, if they are of the same rows."""
        known = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step == 0 or known is None:
            return
        self.plateau.load_state_dict(known["attributes"])
        if self.held_out.changed:
            self.plateau.forget()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next step has the new rate already."""
        if not self.plateau.look(kwargs["metrics"]["eval_loss"]):
            return
        kwargs["lr_scheduler"].refresh()
        if distributed.is_main():
            LOG.info(
                "step %d: the held-out loss stalls, the learning rate is %.3g of the highest now "
                "(stage.plateau).",
                state.global_step,
                self.plateau.scale,
            )


class Patience(EarlyStoppingCallback):
    """stage.patience: transformers counts evaluations without improvement, but forgets the count
    in a resumed run.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        for name in (type(self).__name__, EarlyStoppingCallback.__name__):
            known = state.stateful_callbacks.get(name)
            if state.global_step and known is not None:
                attributes = known["attributes"]
                self.early_stopping_patience_counter = attributes["early_stopping_patience_counter"]
                return


def watch_held_out(
    trainer: StageTrainer, stage: Any, plateau: Plateau | None
) -> HeldOutRows | None:
    """Add what looks at evaluations; None where no rows are held out."""
    if trainer.eval_dataset is None:
        if distributed.is_main():
            LOG.info("no held-out rows (data.eval_fraction=0): the last weights are the model.")
        return None
    held_out = HeldOutRows(content_hash(trainer.eval_dataset))
    trainer.add_callback(held_out)
    if plateau is not None:
        trainer.add_callback(PlateauWatch(plateau, held_out))
    if trainer.group_rates is not None and stage.unfreeze.patience is not None:
        trainer.add_callback(StallWatch(trainer.group_rates, stage, held_out))
    return held_out


# ---- what a run says of them ----


def shown_figures(metrics: Mapping[str, float], more: Mapping[str, str]) -> dict[str, Any]:
    """The figures of the closing panel by what it says of them; `more`: a stage's own."""
    if "eval_loss" not in metrics:
        return dict(NO_HELD_OUT)
    named = {"held-out loss before": "initial/eval_loss", "held-out loss": "eval_loss", **more}
    shown: dict[str, Any] = {}
    for label, name in named.items():
        if name in metrics:
            shown[label] = metrics[name]
    return {**shown, "best step": int(metrics["best_step"])}
