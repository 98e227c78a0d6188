"""Worker: a stage of ours on TRL's trainers, or the same trainer of TRL's bare, some steps a
request (`python -m benchmarks.speed.offline_worker CASE READ WRITE`).

Bare is TRL's own class with two things told: the order of the rows, so that both sides train the
same ones, and that the rows are tokens already, where it would not see it (DPO).
"""

import dataclasses
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardTrainer, SFTConfig, SFTTrainer
from trl import RewardConfig as TRLRewardConfig

from benchmarks.speed.offline import OfflineCase
from benchmarks.speed.protocol import Figures, serve
from conf.schema import Config
from rlhf.cli import config
from rlhf.models.loading import load_causal_lm, load_classifier
from rlhf.offline import preference
from rlhf.offline.setup import EXPERTS, begin, trainer_arguments, training_dtype
from rlhf.offline.step_rows import WholeBatches
from rlhf.offline.training import fit
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.stages import methods, reward, sft
from rlhf.stages import preference as preference_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import EncodedRows

_OURS = {"sft": sft, "reward": reward, "dpo": preference_stage}


def overrides(case: OfflineCase) -> list[str]:
    """The case as command line options."""
    return [
        f"stage={case.stage}",
        "tracking=none",
        f"run.dir={case.folder}",
        "run.overwrite=true",
        f"model.path={case.model}",
        f"data.path={case.train}",
        f"data.eval_path={case.held_out}",
        f"stage.batch_size={case.batch}",
        f"stage.max_length={case.max_length}",
        f"stage.learning_rate={case.learning_rate}",
        "stage.scheduler=constant",
        "stage.warmup_ratio=0",
        f"stage.steps={case.steps}",
        f"stage.eval_steps={case.steps}",
        f"engine.micro_batch_size={case.batch}",
        "engine.threads=1",
    ]


class Turns(TrainerCallback):
    """Holds the trainer after every `steps` optimizer steps until it is asked for more. A turn is
    everything between: from the end of a step to the end of another.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.go: queue.Queue[None] = queue.Queue()
        self.done: queue.Queue[Figures] = queue.Queue()
        self.loaded = threading.Event()
        self.began = self.began_cpu = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.loaded.is_set():
            self.loaded.set()
            self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.done.put(
            {
                "step_s": (time.perf_counter() - self.began) / self.steps,
                "cpu_s": (time.process_time() - self.began_cpu) / self.steps,
                "loss": losses[-1] if losses else math.nan,  # of the step before
            }
        )
        self._wait()

    def _wait(self) -> None:
        self.go.get()
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def turn(self) -> Figures:
        """One turn, asked for by another thread than the trainer's."""
        self.go.put(None)
        return self.done.get()


def bare(kind: type, case: OfflineCase, seed: int) -> Any:
    """TRL's trainer `kind`, which is told the order of the rows and that they are tokens."""

    class Bare(kind):
        def _get_train_sampler(self, train_dataset: Any = None) -> WholeBatches:
            rows = len(self.train_dataset)
            return WholeBatches(rows, case.batch, seed, lambda: int(self.state.global_step))

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    return Bare


def bare_trainer(case: OfflineCase, ctx: RunContext, plan: Any, rows: EncodedRows) -> Any:
    """The same model, rows and arguments; no evaluation, no checkpoint."""
    cfg, stage = ctx.cfg, ctx.cfg.stage
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    source = dataclasses.replace(cfg.model, dtype=dtype)
    arguments = trainer_arguments(
        stage, plan, cfg.engine, cfg.run, cfg.model.dtype, ctx.checkpoint_dir
    )
    arguments |= {
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "lr_scheduler_type": "constant",
        "max_steps": case.steps,
    }
    given: dict[str, Any] = {"train_dataset": rows.train, "processing_class": rows.tokenizer}
    if case.stage == "reward":
        given["model"] = load_classifier(source, rows.tokenizer)
        centering = stage.centering_coef or None
        args = TRLRewardConfig(**arguments, center_rewards_coefficient=centering)
        return bare(RewardTrainer, case, cfg.run.seed)(args=args, **given)
    given["model"] = load_causal_lm(source, rows.tokenizer)
    if case.stage == "sft":
        args = SFTConfig(**arguments, completion_only_loss=False, **EXPERTS)
        return bare(SFTTrainer, case, cfg.run.seed)(args=args, **given)
    given["ref_model"] = preference.start_of(given["model"], cfg.adapter)
    args = DPOConfig(**arguments, beta=stage.beta, **EXPERTS)
    return bare(DPOTrainer, case, cfg.run.seed)(args=args, **given)


def trainer_of(case: OfflineCase, cfg: Config, ctx: RunContext) -> tuple[Any, Callable[[], Any]]:
    """The trainer, and what trains with it."""
    plan = begin(cfg.stage.batch_size, cfg.engine)
    rows = stage_rows.read_rows(cfg, plan.micro)
    if case.side == "ours":
        trainer = _OURS[case.stage].make_trainer(ctx, plan, rows)
        return trainer, lambda: fit(trainer, ctx)
    trainer = bare_trainer(case, ctx, plan, rows)
    return trainer, trainer.train


def main() -> None:
    methods.register()
    case = OfflineCase.load(sys.argv[1])
    Path(case.folder).mkdir(parents=True, exist_ok=True)
    cfg = config.compose(overrides(case))
    distributed.set_threads(cfg.engine.threads)
    ctx = RunContext.open(cfg, ())
    turns = Turns(case.turn_steps)

    def answer() -> None:
        turns.loaded.wait()
        serve(turns.turn)
        os._exit(0)  # the trainer waits in its main thread for a turn that will not come

    with ctx.closing():
        trainer, train = trainer_of(case, cfg, ctx)
        trainer.add_callback(turns)
        threading.Thread(target=answer, daemon=True).start()
        train()


if __name__ == "__main__":
    main()
