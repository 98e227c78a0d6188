"""What the stages on TRL's trainers share: batch arithmetic, precision, DeepSpeed's configuration,
metrics, divergence, saving.
"""

import gc
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conf.choices import AdapterKind, Dtype, EngineKind, ModelKind, Offload, Scheduler
from conf.schema import Config, EngineConfig, ModelConfig
from policy.adapters import attach
from policy.engines.deepspeed import ensure_process_group, gather_zero3, is_universal, prepare_cpu
from policy.model import Gather, is_peft, no_gather
from policy.saving import save_adapter, save_model
from rlhf.checks import launch
from rlhf.checks.launch import BatchPlan, count_steps, plan_batches
from rlhf.data.reading import DataRequest, stage_texts
from rlhf.data.sources import data_files
from rlhf.models.loading import load_causal_lm, load_tokenizer, resolve_dtype, train_tokenizer
from rlhf.models.templates import template_text
from rlhf.offline.guards import Guard
from rlhf.process import distributed
from rlhf.process.interrupts import Stopping
from rlhf.process.quiet import quiet_libraries
from rlhf.process.resident import Resident
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import Interrupted, TrainingDiverged, UserError

LOG = logging.getLogger("rlhf.stages")
_SAMPLE_TOKENS = 48
_SCHEDULERS = {
    Scheduler.constant: "constant_with_warmup",
    Scheduler.linear: "linear",
    Scheduler.cosine: "cosine",
}


def prepare_engine(engine: EngineConfig) -> None:
    """The torch engine is one process; DeepSpeed any number, and its process group is made here.
    Raises UserError.
    """
    if engine.kind is EngineKind.torch:
        distributed.require_one_process("engine=torch", launch.ONE_PROCESS_REMEDY)
        return
    prepare_cpu()
    ensure_process_group()


def load_stage_tokenizer(cfg: Config) -> Any:
    """The model's tokenizer; for ``model=tiny`` without a path one trained on the stage's own
    texts. ``data.chat_template`` wins.
    """
    if cfg.model.kind is not ModelKind.tiny or cfg.model.path is not None:
        return load_tokenizer(cfg.model, cfg.data.chat_template)
    tokenizer = train_tokenizer(
        stage_texts(DataRequest.of(cfg)), cfg.model.tiny.vocab_size, cfg.model.tiny.max_positions
    )
    if cfg.data.chat_template is not None:
        tokenizer.chat_template = template_text(cfg.data.chat_template)
    return tokenizer


def begin(cfg: Config) -> tuple[BatchPlan, Any]:
    """How every stage on TRL opens: batch plan and tokenizer, and DeepSpeed's process group where
    it is the engine. Raises UserError.
    """
    plan = plan_batches(cfg.stage.batch_size, cfg.engine.micro_batch_size, distributed.world_size())
    prepare_engine(cfg.engine)
    quiet_libraries()
    return plan, load_stage_tokenizer(cfg)


def check_positions(model_config: Any, longest: int) -> None:
    """Raises UserError when the longest row, in tokens, doesn't fit into the model's positions."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"the data has rows of {longest} tokens, but the model has {limit} positions. Set "
            f"stage.max_length={limit}."
        )


def training_dtype(cfg: Config) -> Dtype:
    """What the weights are held in while they train.

    The torch engine steps the weights themselves, and half-precision weights lose small updates:
    full training holds them in float32 and computes in half precision by autocast. A frozen base
    under LoRA may stay in half precision, and DeepSpeed keeps float32 copies of its own.
    """
    full = cfg.adapter.kind is AdapterKind.none and cfg.engine.kind is EngineKind.torch
    return Dtype.float32 if full else cfg.model.dtype


def with_adapter(model: Any, cfg: Config, task: str) -> Any:
    """`model` with the configured adapter, its base recorded so that the adapter loads from any
    directory.
    """
    model = attach(model, cfg.adapter, task=task)
    if is_peft(model) and cfg.model.path is not None and Path(cfg.model.path).expanduser().is_dir():
        model.peft_config["default"].base_model_name_or_path = str(
            Path(cfg.model.path).expanduser().resolve()
        )
    return model


def deepspeed_config(engine: EngineConfig, *, universal: bool = False) -> dict[str, Any] | None:
    """The dict for ``TrainingArguments(deepspeed=...)``; "auto" is filled in by transformers from
    the other arguments. None for torch.

    universal: the checkpoint to resume from is in DeepSpeed's universal form.
    """
    if engine.kind is EngineKind.torch:
        return None
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        # "auto": from the hidden size. With the library's fixed default a small model's weights
        # would all stay whole on every rank.
        zero |= {
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if engine.offload is not Offload.none:
        place = {
            "device": engine.offload.value,
            **({"nvme_path": engine.nvme_path} if engine.nvme_path else {}),
        }
        zero["offload_optimizer"] = dict(place)
        if engine.zero_stage == 3:
            zero["offload_param"] = dict(place)
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        # torch's AdamW rather than DeepSpeed's, which would be compiled at the first run
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }


def trainer_arguments(ctx: RunContext, plan: BatchPlan) -> dict[str, Any]:
    """Keyword arguments common to TRL's configs. Their defaults turn on bf16 and gradient
    checkpointing, which is set here explicitly.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    on_cpu = not torch.cuda.is_available()
    dtype = resolve_dtype(cfg.model.dtype)
    return {
        "output_dir": str(ctx.checkpoint_dir),
        "per_device_train_batch_size": plan.micro,
        "per_device_eval_batch_size": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "dataloader_pin_memory": not on_cpu,
        "learning_rate": stage.learning_rate,
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.adam_beta1,
        "adam_beta2": stage.adam_beta2,
        "adam_epsilon": stage.adam_eps,
        "optim": "adamw_torch",
        "max_grad_norm": stage.max_grad_norm,
        "lr_scheduler_type": _SCHEDULERS[stage.scheduler],
        "max_length": stage.max_length,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": on_cpu,
        "gradient_checkpointing": cfg.engine.gradient_checkpointing,
        "deepspeed": deepspeed_config(
            cfg.engine, universal=ctx.resume_from is not None and is_universal(ctx.resume_from)
        ),
        "seed": cfg.run.seed,
        "data_seed": cfg.run.seed,
        "logging_steps": stage.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would log the last finite loss in place of a NaN
        "eval_strategy": "steps",
        "eval_steps": stage.eval_steps,
        "eval_on_start": ctx.resume_from is None,
        "save_strategy": "steps",
        "save_steps": stage.eval_steps,
        # the last ones, and the best
        "save_total_limit": cfg.run.keep_checkpoints + 1 if cfg.run.keep_checkpoints else None,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


class Reporter(TrainerCallback):
    """TRL's metrics under their own names to the tracker and the progress bar, with the training
    throughput; marks the last step for evaluation.
    """

    def __init__(self, ctx: RunContext, bar: console.Bar, stopping: Stopping) -> None:
        self.ctx, self.bar, self.stopping, self.watchdog = ctx, bar, stopping, ctx.watchdog
        self.signal: int | None = None  # that ended training
        self.resident = Resident()
        self.last: dict[str, float] = {}  # the latest value of each training metric
        self._busy_s = 0.0  # seconds in steps since the last log
        self.tokens = 0.0
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
        every = self.ctx.cfg.stage.save_steps
        if every and state.global_step % every == 0:
            control.should_save = True
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        self.signal = self.stopping.agreed()
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        self.watchdog.phase("log and save")
        # what the trainer sums up between two logs is not in its checkpoint
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
        # the trainer's closing line repeats what the run's summary holds
        if not logs or "train_runtime" in logs:
            return
        metrics = {
            k: float(v)
            for k, v in logs.items()
            if not k.startswith("eval_") or not k.endswith(("_runtime", "_per_second"))
        }
        evaluated = "eval_loss" in metrics
        if not evaluated and self._busy_s > 0:
            metrics["train/tokens_per_s"] = (
                metrics.get("num_tokens", self.tokens) - self.tokens
            ) / self._busy_s
            self.tokens, self._busy_s = metrics.get("num_tokens", self.tokens), 0.0
        if not evaluated:
            metrics |= self.resident.figures()  # of this rank
            self.last.update(metrics)
        self.ctx.tracker.log(state.global_step, metrics)
        self.bar.update(state.global_step, metrics)


def fit(trainer: Any, ctx: RunContext) -> tuple[int, dict[str, float]]:
    """Train to the end, with the best weights by ``eval_loss`` loaded back.

    Returns the steps done and the run's figures: the latest of training, the evaluation of the
    weights that were loaded back, and the evaluation before any step under ``initial/``.
    """
    stage = ctx.cfg.stage
    steps = count_steps(stage, len(trainer.train_dataset))
    trainer.args.max_steps = steps
    trainer.args.warmup_steps = math.ceil(stage.warmup_ratio * steps)
    trainer.global_batch, trainer.engine = stage.batch_size, ctx.cfg.engine
    trainer.guard = guard = Guard(stage, ctx.dir, ctx.checkpoint_dir, ctx.tracker.log)
    if ctx.resume_from is not None:
        guard.load(ctx.resume_from)
    trainer.remove_callback(PrinterCallback)
    if stage.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=stage.patience))
    # TRL counts tokens, and forgets them
    if ctx.resume_from is not None and hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tokens_before(ctx.resume_from)
    with console.progress(steps, ctx.stage) as bar, Stopping() as stopping:
        reporter = Reporter(ctx, bar, stopping)
        trainer.add_callback(reporter)
        ctx.watchdog.phase("start")
        trainer.train(
            resume_from_checkpoint=str(ctx.resume_from) if ctx.resume_from is not None else None
        )
    # transformers remembers ZeRO-3 for the whole process: a model that one rank loads for itself
    # afterwards would wait for the others
    unset_hf_deepspeed_config()
    state = trainer.state
    if reporter.signal is not None:
        raise Interrupted(
            reporter.signal,
            state.global_step,
            ctx.checkpoint_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
        )
    if not state.best_global_step:
        raise TrainingDiverged(
            f"eval_loss was not finite in any of the evaluations up to step {state.global_step}, "
            "so there are no best weights to keep."
        )
    evaluations = {
        entry["step"]: _evaluation(entry) for entry in state.log_history if "eval_loss" in entry
    }
    initial = {f"initial/{k}": v for k, v in evaluations.get(0, {}).items()}
    left_out = {"train/skipped_total": float(guard.skipped), "train/rewinds": float(guard.rewinds)}
    best = {**evaluations[state.best_global_step], "best_step": float(state.best_global_step)}
    return state.global_step, {**reporter.last, **left_out, **best, **initial}


def _evaluation(entry: dict[str, float]) -> dict[str, float]:
    """The figures of one evaluation among a log entry's, timings left out."""
    return {
        k: float(v)
        for k, v in entry.items()
        if k.startswith("eval_") and not k.endswith(("_runtime", "_per_second"))
    }


def tokens_before(checkpoint: Path) -> float:
    """The tokens that were trained before a checkpoint of the Trainer's, as its last log before it
    says.
    """
    history = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))[
        "log_history"
    ]
    return next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), 0)


def gather_of(cfg: Config) -> Gather:
    """How whole weights are reached under the configured engine."""
    return (
        gather_zero3
        if cfg.engine.kind is EngineKind.deepspeed and cfg.engine.zero_stage == 3
        else no_gather
    )


def save_whole(model: Any, tokenizer: Any, directory: Path, cfg: Config) -> None:
    """Whole weights in ``model.dtype``, which need not be the dtype that they trained in."""
    save_model(model, tokenizer, directory, gather_of(cfg), resolve_dtype(cfg.model.dtype))


def fit_and_save(trainer: Any, tokenizer: Any, ctx: RunContext) -> tuple[int, dict[str, float]]:
    """`fit`, then whole weights as ``model/`` and, for LoRA, ``adapter/``. Steps and figures."""
    steps, metrics = fit(trainer, ctx)
    ctx.watchdog.phase("save the model")
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft(trained):
        save_adapter(trained, ctx.dir / "adapter", gather_of(ctx.cfg))
    save_whole(trained, tokenizer, ctx.model_dir, ctx.cfg)
    return steps, metrics


def free_memory() -> None:
    """Give back what no name holds any more: trainers and their models hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def base_directory(cfg: Config) -> bool:
    """Whether an adapter can name its base: a model that PEFT loads again, neither built from a
    config nor a GGUF file.
    """
    return cfg.model.path is not None and cfg.model.gguf_file is None


def save_policy(model: Any, tokenizer: Any, ctx: RunContext) -> None:
    """``model/`` and, for LoRA, ``adapter/``.

    model/ holds whole weights, except for LoRA without ``adapter.merge_on_save``: then it holds the
    adapter, which names its base. Where the base is no directory or hub name (``model=tiny`` built
    from a config, GGUF), whole weights are written all the same.
    """
    cfg = ctx.cfg
    if not is_peft(model):
        save_whole(model, tokenizer, ctx.model_dir, cfg)
        return
    save_adapter(model, ctx.dir / "adapter", gather_of(cfg))
    if cfg.adapter.merge_on_save or not base_directory(cfg):
        save_whole(model, tokenizer, ctx.model_dir, cfg)
        return
    save_adapter(model, ctx.model_dir, gather_of(cfg))
    if distributed.is_main():
        tokenizer.save_pretrained(ctx.model_dir)
    distributed.barrier()


def greedy_samples(
    model_cfg: ModelConfig,
    tokenizer: Any,
    directory: Path,
    contexts: Sequence[list[int]],
    max_length: int,
) -> list[dict[str, Any]]:
    """What the saved policy writes after each of `contexts` (token ids), greedily, as samples.jsonl
    has it; contexts without room are left out.
    """
    model = load_causal_lm(model_cfg, tokenizer, str(directory)).to(distributed.device()).eval()
    out = []
    for context in contexts:
        room = min(_SAMPLE_TOKENS, max_length - len(context))
        if not context or room < 1:
            continue
        input_ids = torch.tensor([context], device=model.device)
        with torch.inference_mode():
            whole = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=room,
            )[0]
        written = whole[len(context) :].tolist()
        out.append(
            {
                "prompt": tokenizer.decode(context),
                "response": tokenizer.decode(written, skip_special_tokens=True),
                "response_length": len(written),
                "finish_reason": "stop" if tokenizer.eos_token_id in written else "length",
            }
        )
    return out


def record_inputs(ctx: RunContext, kind: str) -> None:
    """The run's manifest names what it read: the model it starts from (as `kind`) and its data
    files.
    """
    ctx.add_parent(kind, ctx.cfg.model.path)
    for path in data_files(ctx.cfg.data):
        ctx.add_data(path)
