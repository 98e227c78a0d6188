"""Training with one of our trainers (rlhf/offline/trainers.py), from the first step to its best
weights, and saving them: progress, metrics, signals, resume, model/ and adapter/, samples.
"""

import dataclasses
import gc
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from conf.choices import AdapterKind, EngineKind
from conf.schema import AdapterConfig, EngineConfig, ModelConfig
from policy import adapters
from policy.engines.base import GradientNoise, OptimSettings, Plateau
from policy.engines.deepspeed import gather_zero3
from policy.model import Gather, no_gather, trainable
from rlhf.checks.launch import count_steps, growth_note
from rlhf.models.loading import load_causal_lm, resolve_dtype
from rlhf.models.turns import end_ids, processor_of, response_text
from rlhf.offline.held_out import NO_HELD_OUT, Patience, watch_held_out
from rlhf.offline.picture_rows import seen_by
from rlhf.offline.private_hooks import (
    PREFIX_CHECKPOINT_DIR,
    TRAINER_STATE_NAME,
    unset_hf_deepspeed_config,
)
from rlhf.offline.setup import loader_for
from rlhf.offline.step_rows import Growth
from rlhf.offline.steps import (
    Guard,
    KnownCallbacks,
    NoiseWatch,
)
from rlhf.offline.trainers import StageTrainer
from rlhf.process import distributed
from rlhf.process.supervision import Resident, Stopping, Watchdog
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import EncodedRows, Interrupted, TrainingDiverged

LOG = logging.getLogger("rlhf.stages")
_TIMINGS = ("_runtime", "_per_second")  # how the names of evaluation's timings end
_SAMPLE_TOKENS = 48
_WEIGHTS_ALONE = (
    "It holds weights alone (stage.save_optimizer=false): the run can't be resumed, but a new one "
    "can start with model.path there."
)


# ---- training ----


class Reporter(TrainerCallback):
    """Logs TRL's metrics under their own names, with the training throughput; moves the progress
    bar; tells the watchdog the phase; asks for evaluation and checkpoints, and stops at a signal.
    """

    def __init__(
        self,
        bar: console.Bar,
        stopping: Stopping,
        watchdog: Watchdog,
        log: Callable[[int, dict[str, float]], None],
        save_steps: int | None,
        *,
        evaluates: bool = True,
    ) -> None:
        """log: takes a step and its metrics; save_steps: steps between checkpoints, beside those at
        evaluations; evaluates: whether there are held-out rows.
        """
        self.evaluates = evaluates
        self.bar, self.stopping, self.watchdog = bar, stopping, watchdog
        self.write, self.save_steps = log, save_steps
        self.signal: int | None = None  # that ended training
        self.resident = Resident()
        self.last: dict[str, float] = {}  # the latest value of each training metric
        self.tokens = 0.0  # trained by the last log
        self._busy_s = 0.0  # seconds in steps since the last log
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run knows the figures from before."""
        for entry in state.log_history:
            if "eval_loss" not in entry:
                self.last.update({k: float(v) for k, v in entry.items() if k != "step"})
        self.tokens = self.last.get("num_tokens", 0.0)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watchdog.phase("evaluate")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watchdog.phase("save")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watchdog.phase("step")
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._busy_s += time.perf_counter() - self._began
        if self.save_steps and state.global_step % self.save_steps == 0:
            control.should_save = True
        if state.global_step >= state.max_steps:
            control.should_log = control.should_save = True
            control.should_evaluate = self.evaluates
        self.signal = self.stopping.agreed()
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        self.watchdog.phase("log and save")
        # What the trainer sums up between two logs is not in its checkpoint.
        if control.should_save:
            control.should_log = True

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # The trainer's closing line repeats what the run's summary holds.
        if not logs or "train_runtime" in logs:
            return
        metrics = {
            key: float(value)
            for key, value in logs.items()
            if not (key.startswith("eval_") and key.endswith(_TIMINGS))
        }
        if "eval_loss" not in metrics:
            self._add_throughput(metrics)
            metrics |= self.resident.figures()  # of this rank
            self.last.update(metrics)
        self.write(state.global_step, metrics)
        self.bar.update(state.global_step, metrics)

    def _add_throughput(self, metrics: dict[str, float]) -> None:
        if self._busy_s <= 0:
            return
        tokens = metrics.get("num_tokens", self.tokens)
        metrics["train/tokens_per_s"] = (tokens - self.tokens) / self._busy_s
        self.tokens, self._busy_s = tokens, 0.0


def make_guard(ctx: RunContext) -> Guard:
    """The guard of a run, with the counts of the checkpoint that it goes on from."""
    guard = Guard(ctx.cfg.stage, ctx.dir, ctx.checkpoint_dir, ctx.tracker.log)
    if ctx.resume_from is not None:
        guard.load(ctx.resume_from)
    return guard


def fit(trainer: StageTrainer, ctx: RunContext) -> tuple[int, dict[str, float]]:
    """Train to the end, and load the best weights by ``eval_loss`` back. Without held-out rows the
    last weights stay.

    Returns the steps done and the run's figures: the latest of training, the evaluation of the
    weights that were loaded back, and the first evaluation on its rows under ``initial/``, before
    any step. Raises Interrupted after a signal, and TrainingDiverged without any finite evaluation.
    """
    stage, resume_from = ctx.cfg.stage, ctx.resume_from
    steps = count_steps(stage, len(trainer.train_dataset))
    plateau = Plateau.of(stage, higher_is_better=False)
    schedule = OptimSettings.from_stage(stage, total_steps=steps, from_zero=True)
    trainer.set_schedule(schedule, plateau)
    trainer.tended.tending.begin(steps)
    trainer.remove_callback(PrinterCallback)
    if stage.patience is not None:
        trainer.add_callback(Patience(stage.patience, stage.min_improvement))
    if stage.batch_growth.steps:
        for note in growth_note(stage, steps) if distributed.is_main() else []:
            LOG.warning(note)
        trainer.add_callback(Growth(stage, len(trainer.train_dataset)))
    if stage.noise_scale is not None:
        trainer.noise = GradientNoise(trainable(trainer.model), stage.noise_scale)
        trainer.add_callback(NoiseWatch(trainer.noise))
    held_out = watch_held_out(trainer, stage, plateau)
    trainer.add_callback(KnownCallbacks(trainer.callback_handler.callbacks))
    if resume_from is not None:
        trainer.restore_token_count(tokens_before(resume_from))
    with console.progress(steps, ctx.stage) as bar, Stopping() as stopping:
        reporter = Reporter(
            bar,
            stopping,
            ctx.watchdog,
            ctx.tracker.log,
            stage.save_steps,
            evaluates=held_out is not None,
        )
        trainer.add_callback(reporter)
        ctx.watchdog.phase("start")
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    # transformers remembers ZeRO-3 for the whole process: a model that one rank loads for itself
    # afterwards would wait for the other ranks.
    unset_hf_deepspeed_config()
    state = trainer.state
    ctx.tell_found(trainer.model)
    if reporter.signal is not None:
        checkpoint = ctx.checkpoint_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not stage.save_optimizer:
            raise Interrupted(reporter.signal, state.global_step, checkpoint, _WEIGHTS_ALONE)
        raise Interrupted(reporter.signal, state.global_step, checkpoint)
    first = None if held_out is None else held_out.since
    if held_out is None:
        ctx.summary |= NO_HELD_OUT
    return state.global_step, _figures(state, reporter.last, trainer.guard, first)


def _figures(
    state: Any, last: dict[str, float], guard: Guard, first: int | None
) -> dict[str, float]:
    """The run's figures, as `fit` returns them; `first`: the step of the first evaluation on the
    held-out rows, None without such rows. Raises TrainingDiverged.
    """
    left_out = {"train/skipped_total": float(guard.skipped), "train/rewinds": float(guard.rewinds)}
    if first is None:
        return {**last, **left_out}
    if not state.best_global_step:
        raise TrainingDiverged(
            f"eval_loss was not finite in any of the evaluations up to step {state.global_step}, "
            "so there are no best weights to keep."
        )
    evaluations = {
        entry["step"]: _evaluation(entry) for entry in state.log_history if "eval_loss" in entry
    }
    initial = {f"initial/{key}": value for key, value in evaluations.get(first, {}).items()}
    best = {**evaluations[state.best_global_step], "best_step": float(state.best_global_step)}
    return {**last, **left_out, **best, **initial}


def _evaluation(entry: dict[str, float]) -> dict[str, float]:
    """The figures of one evaluation among a log entry's, timings left out."""
    return {
        key: float(value)
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(_TIMINGS)
    }


def tokens_before(checkpoint: Path) -> float:
    """The tokens that were trained before a checkpoint of the trainer's: what the last log before
    it says, 0 where none does.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    for entry in reversed(state["log_history"]):
        if "num_tokens" in entry:
            tokens: float = entry["num_tokens"]
            return tokens
    return 0


# ---- what it leaves behind ----


def gather_of(engine: EngineConfig) -> Gather:
    """How whole weights are reached under an engine: ZeRO-3 has them in shards."""
    if engine.kind is EngineKind.deepspeed and engine.zero_stage == 3:
        return gather_zero3
    return no_gather


def can_name_base(model: ModelConfig) -> bool:
    """Whether an adapter can name its base: a model that PEFT loads again, neither built from a
    config (``model=tiny``) nor a GGUF file.
    """
    return model.path is not None and model.gguf_file is None


def saves_adapter_alone(adapter: AdapterConfig, model: ModelConfig) -> bool:
    """Whether SFT's ``model/`` holds the adapter, which names its base, not whole weights."""
    return (
        not adapter.merge_on_save and can_name_base(model) and adapter.kind is not AdapterKind.none
    )


def save_trained(
    trainer: StageTrainer,
    tokenizer: Any,
    run_dir: Path,
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    adapter_alone: bool = False,
) -> None:
    """``model/`` and, with an adapter, ``adapter/`` (`policy.adapters.save`). A collective.

    Whole weights are in ``model.dtype``, which need not be the dtype that they trained in.
    """
    adapters.save(
        trainer.accelerator.unwrap_model(trainer.model),
        adapter,
        tokenizer,
        run_dir,
        gather_of(trainer.engine),
        dtype=resolve_dtype(model.dtype),
        alone=adapter_alone,
    )


def free_memory() -> None:
    """Give back memory that nothing refers to any more: trainers and their models refer to each
    other.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def greedy_samples(
    model: ModelConfig, rows: EncodedRows, directory: Path, max_length: int, engine: EngineConfig
) -> list[dict[str, Any]]:
    """What the policy saved in `directory` writes after each of the rows' contexts, greedily, as
    rows of samples.jsonl; contexts that fill `max_length` tokens are left out.

    Under ZeRO-3 all ranks hold it together and write the same; elsewhere rank 0 does, and the
    others return nothing. A collective.
    """
    saved = dataclasses.replace(model, path=str(directory), gguf_file=None)
    loader = loader_for(saved, AdapterConfig(), engine)
    if not (loader.parts or distributed.is_main()):
        return []
    policy = loader.load(lambda: load_causal_lm(model, rows.tokenizer, str(directory), native=True))
    policy = policy.to(distributed.device()).eval()
    with loader.passing(policy):
        return _written(policy, rows, max_length)


def _written(policy: Any, rows: EncodedRows, max_length: int) -> list[dict[str, Any]]:
    tokenizer, out = rows.tokenizer, []
    for number, context in enumerate(rows.contexts):
        new_tokens = min(_SAMPLE_TOKENS, max_length - len(context))
        if not context or new_tokens < 1:
            continue
        input_ids = torch.tensor([context], device=policy.device)
        with torch.inference_mode():
            whole = policy.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                **_seen(rows, number, input_ids),
            )[0]
        response = whole[len(context) :].tolist()
        finished = not set(response).isdisjoint(end_ids(tokenizer))
        out.append(
            {
                "prompt": tokenizer.decode(context),
                "response": response_text(tokenizer, response, chat=False),
                "response_length": len(response),
                "finish_reason": "stop" if finished else "length",
            }
        )
    return out


def _seen(rows: EncodedRows, number: int, input_ids: torch.Tensor) -> dict[str, Any]:
    """What a picture model reads beside a context; nothing for others."""
    processor = processor_of(rows.tokenizer)
    if processor is None:
        return {}
    return seen_by(processor, rows.shown[number : number + 1], input_ids)
