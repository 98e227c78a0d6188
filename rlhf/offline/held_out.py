"""The held-out rows of a run that is resumed: losses on other rows than before are not compared."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rlhf.offline.private_hooks import PREFIX_CHECKPOINT_DIR
from rlhf.offline.row_weights import CARRIED
from rlhf.process import distributed

LOG = logging.getLogger("rlhf.stages")


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
        self._changed = False

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
        self._changed, self.since = True, state.global_step
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
        if not self._changed:
            return
        self._changed = False
        loss = kwargs["metrics"]["eval_loss"]
        if math.isfinite(loss):
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            state.best_metric, state.best_global_step = loss, state.global_step
            state.best_model_checkpoint = str(folder)


class KnownCallbacks(TrainerCallback):
    """A checkpoint from before a callback was there holds no state of it, such as one without
    ``stage.patience``: transformers fails with a KeyError when it writes the next one.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = [one for one in callbacks if isinstance(one, ExportableState)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the states that are missing."""
        for callback in self.callbacks:
            state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
