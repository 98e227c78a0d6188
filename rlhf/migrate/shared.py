"""Computations that several toolkits share: batches, steps, schedules, engines, trackers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.migrate.tables import Answer, Convert, Fate, Settings, flag, listing, number, whole

BATCH = ("stage.batch_size", "engine.micro_batch_size")
BATCH_ONLINE = ("stage.prompts_per_step", "stage.minibatches", "stage.samples_per_prompt")
LENGTH = ("stage.epochs", "stage.steps")
NEEDS_ROWS = "it depends on the number of rows: give migrate.rows"
OWN_TEMPLATE = "the model's own chat template is used"


def impossible(reason: str) -> Answer:
    """A value that has no counterpart."""
    return Answer(Fate.impossible, note=reason)


def computed(options: dict[str, Any], note: str = "") -> Answer:
    """Options that follow from several keys."""
    return Answer(Fate.computed, options, note)


# ---- batches and steps ----


def _micro(s: Settings) -> int:
    return whole(s.get("per_device_train_batch_size", "micro_batch_size") or 1)


def accumulation(s: Settings) -> int:
    """Micro-batches of one optimizer step."""
    return whole(s.get("gradient_accumulation_steps") or 1)


def groups(s: Settings) -> int:
    """Groups of ranks that have rows of their own."""
    names = ("sequence_parallel_size", "context_parallel_size", "sequence_parallel_degree")
    return max(1, s.ranks // max(1, whole(s.get(*names) or 1)))


def batch_size(s: Settings) -> int:
    """Rows of one optimizer step, over all ranks."""
    asked = s.get("global_batch_size", "batch_size")
    if asked is not None:
        return whole(asked)
    return _micro(s) * accumulation(s) * groups(s)


def batch(s: Settings) -> Answer:
    """The rows of a step, and of a micro-batch."""
    micro, rows = _micro(s), batch_size(s)
    ranks = groups(s)
    if rows % (micro * ranks):
        return impossible(f"{rows} rows are no multiple of {micro} on each of {ranks} ranks")
    if s.schema == "kto" and micro == 1 and rows % (2 * ranks) == 0:
        micro = 2  # KTO compares the answers of a micro-batch with each other's prompts
    options = {"stage.batch_size": rows, "engine.micro_batch_size": micro}
    steps = rows // (micro * ranks)
    return computed(
        options, f"{micro} rows x {steps} micro-batches x {ranks} ranks (migrate.ranks)"
    )


def steps_per_epoch(s: Settings) -> int | None:
    """Optimizer steps of one pass over the rows; None where their number isn't known."""
    return None if s.rows is None else max(1, math.ceil(s.rows / batch_size(s)))


def epochs_of(s: Settings) -> float:
    """Passes over the data."""
    return float(number(s.get("num_train_epochs", "num_epochs", "max_epochs") or 1))


def total_steps(s: Settings) -> int | None:
    """Optimizer steps of the whole run; None where their number isn't known."""
    most = s.get("max_steps", "train_iters")
    if most is not None and number(most) > 0:
        return whole(most)
    one = steps_per_epoch(s)
    return None if one is None else math.ceil(one * epochs_of(s))


def length(s: Settings) -> Answer:
    """How long a run is: steps, or passes over the data."""
    most = s.get("max_steps", "train_iters")
    if most is not None and number(most) > 0:
        return computed({"stage.steps": whole(most)})
    return computed({"stage.epochs": epochs_of(s)})


def warmup(s: Settings) -> Answer:
    """The share of the steps in which the rate rises."""
    share = s.given.get("warmup_ratio", s.given.get("lr_warmup_fraction"))
    steps = s.get("warmup_steps", "lr_warmup_iters")
    if share is not None or steps is None:
        share = s.get("warmup_ratio") if share is None else share
        return computed({"stage.warmup_ratio": number(share or 0)})
    if number(steps) < 1:  # transformers reads it as a share
        return computed({"stage.warmup_ratio": number(steps)})
    total = total_steps(s)
    if total is None:
        return impossible(f"{steps} warm-up steps as a share of all: {NEEDS_ROWS}")
    return computed({"stage.warmup_ratio": round(min(1.0, number(steps) / total), 6)})


def every(s: Settings, value: Any, option: str) -> Answer:
    """Steps between checkpoints or evaluations; below 1 they are a share of all steps."""
    steps = number(value)
    if steps >= 1:
        return Answer(Fate.taken, {option: whole(steps)})
    if steps <= 0:
        options = {option: 0} if option == "stage.save_steps" else {}
        return computed(options, "0 or less: none but those at evaluations")
    total = total_steps(s)
    if total is None:
        return impossible(f"a share of all steps: {NEEDS_ROWS}")
    return computed({option: max(1, round(steps * total))})


def saves(s: Settings) -> Answer:
    """save_strategy with save_steps, or saves_per_epoch."""
    return _at_times(s, "save", "stage.save_steps")


def weights_alone(s: Settings, value: Any) -> Answer:
    """save_only_model."""
    if not flag(value):
        return Answer(Fate.idle, note="checkpoints hold the optimizer's state, as here")
    if s.online:
        return impossible("the online loop's checkpoints hold the optimizer's state")
    return Answer(Fate.taken, {"stage.save_optimizer": False}, "such a run can't be resumed")


def evaluations(s: Settings) -> Answer:
    """eval_strategy with eval_steps, or evals_per_epoch."""
    return _at_times(s, "eval", "stage.eval_steps")


def _at_times(s: Settings, what: str, option: str) -> Answer:
    per_epoch = s.get(f"{what}s_per_epoch")
    strategy = str(s.get(f"{what}_strategy", f"{what}uation_strategy") or "steps").lower()
    never = strategy in ("no", "none", "false")
    if what == "eval" and never and not holds_out(s):
        return held_out(0)
    if what == "eval" and s.online:
        return Answer(Fate.idle, note="held-out prompts are looked at by stage.watch")
    steps = s.get(f"{what}_steps")
    if never:
        if option == "stage.save_steps":
            return computed({option: 0}, "one comes every stage.eval_steps all the same")
        return impossible("held-out rows are always evaluated; they choose the weights that stay")
    if per_epoch is None and strategy in ("epoch", "best"):
        per_epoch = 1
    if per_epoch is None:
        return every(s, 500 if steps is None else steps, option)
    if number(per_epoch) <= 0:
        return computed({}, "none but those at evaluations")
    one = steps_per_epoch(s)
    if one is None:
        return impossible(f"{per_epoch} in each epoch: {NEEDS_ROWS}")
    return computed({option: max(1, round(one / number(per_epoch)))})


# Files of held-out rows, and shares of rows that are held out.
_HELD_OUT = ("eval_dataset", "val_dataset", "test_datasets", "eval.dataset")
_SHARES = ("val_size", "val_set_size", "split_dataset_ratio")


def holds_out(s: Settings) -> bool:
    """Whether a file holds rows out from training."""
    return s.get(*_HELD_OUT) is not None or bool(number(s.get(*_SHARES) or 0))


def none_held_out(s: Settings, key: str) -> dict[str, Any]:
    """The default of `key` where a file names no held-out rows."""
    return {} if s.get(*_HELD_OUT) is not None else {key: 0}


def held_out(value: Any) -> Answer:
    """The share of rows that is held out."""
    share = number(value)
    if share == 0:
        return computed({"data.eval_fraction": 0}, "none: the last weights stay, as there")
    if share < 1:
        return Answer(Fate.taken, {"data.eval_fraction": share})
    return impossible(f"{value} rows: data.eval_fraction is a share of all, between 0 and 1")


def logging(s: Settings, value: Any) -> Answer:
    """Steps between logged lines."""
    if s.online:
        return Answer(Fate.idle, note="every step of the loop is logged")
    return Answer(Fate.taken, {"stage.log_steps": max(1, whole(value))})


def packing(s: Settings, value: Any) -> Answer:
    """Several rows in one sequence."""
    if s.online:
        return Answer(Fate.idle, note="micro-batches of the loop are packed")
    if not flag(value):
        return (
            Answer(Fate.idle, note="off, as here")
            if s.schema != "sft"
            else computed({"stage.packing": False})
        )
    if s.schema != "sft":
        return impossible("only SFT puts several rows into one sequence")
    return Answer(Fate.taken, {"stage.packing": True})


# ---- the schedule ----

SCHEDULE = (
    "stage.scheduler",
    "stage.schedule.cycles",
    "stage.schedule.power",
    "stage.schedule.decay_share",
    "stage.min_rate",
    "stage.warmup_ratio",
)
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine_restarts",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
    "reduce_lr_on_plateau": "plateau",
    "warmup_stable_decay": "warmup_stable_decay",
}


def schedule(s: Settings) -> Answer:
    """lr_scheduler_type (axolotl: lr_scheduler) with its own arguments."""
    name = str(s.get("lr_scheduler_type", "lr_scheduler", "lr_decay_style"))
    more = s.get("lr_scheduler_kwargs") or {}
    if not isinstance(more, Mapping):
        return impossible("lr_scheduler_kwargs: expected a mapping")
    if name == "constant":  # transformers' has no warm-up
        return computed({"stage.scheduler": "constant", "stage.warmup_ratio": 0})
    if name not in _SCHEDULES:
        return impossible(f"no schedule of that name here: {', '.join(_SCHEDULES)} have one")
    options: dict[str, Any] = {"stage.scheduler": _SCHEDULES[name]}
    if name == "polynomial":
        options["stage.schedule.power"] = number(more.get("power", 1.0))
    if name == "cosine_with_restarts":
        options["stage.schedule.cycles"] = whole(more.get("num_cycles", 1))
    lowest = _lowest_rate(s, more)
    if lowest:
        options["stage.min_rate"] = lowest
    return computed(options)


def _lowest_rate(s: Settings, more: Mapping[str, Any]) -> float:
    """The lowest rate, as a share of the highest."""
    ratio = more.get("min_lr_rate", s.get("cosine_min_lr_ratio"))
    if ratio is not None:
        return float(number(ratio))
    lowest, highest = more.get("min_lr", s.get("min_lr")), s.get("learning_rate", "lr")
    if lowest is None or highest is None:
        return 0.0
    return round(number(lowest) / number(highest), 6)


OPTIMIZER = ("stage.optimizer",)
PROJECTED = "a run that it steps can't be resumed: its state is read back by no safe loader"
_PLAIN = ("adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
_OPTIMIZERS = {
    **dict.fromkeys(_PLAIN, "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    "adamw_torch_4bit": "adamw_8bit",
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion_32bit"), "lion"),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), "lion_8bit"),
    "adafactor": "adafactor",
    "muon": "muon",
}


def optimizer(name: Any) -> Answer:
    """The optimizer by its name in transformers."""
    text = str(name).lower()
    if text.startswith(("galore", "apollo")):
        return impossible(PROJECTED)
    if text not in _OPTIMIZERS:
        return impossible("stage.optimizer has no such one")
    torchao = text in ("adamw_torch_8bit", "adamw_torch_4bit")
    note = "bitsandbytes' 8 bits in place of torchao's" if torchao else ""
    return Answer(Fate.taken, {"stage.optimizer": _OPTIMIZERS[text]}, note)


# ---- model, adapter, engine ----

TOKENS = ("model.add_tokens", "model.add_special_tokens")


def tokens(option: str) -> Convert:
    """Tokens that the tokenizer gets."""

    def convert(s: Settings, value: Any) -> Answer:
        given = listing(value)
        if not given:
            return Answer(Fate.idle, note="none")
        if any(token.endswith(".txt") for token in given):
            return impossible("tokens of a file: write them into the list")
        return Answer(Fate.taken, {option: given}, "their rows start at the mean of the others")

    return convert


def dtype(s: Settings) -> Answer:
    """The number format of the weights, of bf16, fp16 and the like."""
    named = s.get("torch_dtype", "dtype")
    words = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    if s.get("quantization_bit", "load_in_4bit") is None and named is not None:
        text = str(named).removeprefix("torch.")
        return computed({"model.dtype": words.get(text, text)})
    for key, name in (
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("pure_bf16", "bfloat16"),
        ("fp16", "float16"),
        ("float16", "float16"),
    ):
        value = s.get(key)
        if value == "auto" or (value is not None and flag(value)):
            return computed({"model.dtype": name})
    return computed({"model.dtype": "float32"})


def targets(value: Any) -> list[str]:
    """Modules that get an adapter."""
    return ["all-linear" if name == "all" else name for name in listing(value)]


def attention(value: Any) -> str | None:
    """transformers' name of an attention implementation; None for its own choice."""
    words = {
        "auto": None,
        "disabled": "eager",
        "fa2": "flash_attention_2",
        "fa3": "flash_attention_3",
        "flash_attn": "flash_attention_2",
        "flash_attention_2": "flash_attention_2",
        "true": "flash_attention_2",
        "flash": "flash_attention_2",
    }
    text = str(value).lower()
    return words.get(text, text)


def tracker(value: Any) -> Answer:
    """report_to."""
    names = [name.lower() for name in listing(value)]
    for name in ("wandb", "tensorboard"):
        if name in names or "all" in names:
            return Answer(Fate.taken, {"tracking": name})
    if not names or names == ["none"]:
        return Answer(Fate.taken, {"tracking": "none"})
    return Answer(
        Fate.impossible,
        {"tracking": "none"},
        "W&B and TensorBoard are the trackers; metrics.jsonl is always written",
    )


def resume(value: Any) -> Answer:
    """resume_from_checkpoint: true, or a checkpoint's path."""
    text = str(value).lower()
    if text in ("false", "none", ""):
        return Answer(Fate.idle, note="off, as here")
    if text in ("true", "latest", "auto"):
        return Answer(Fate.taken, {"run.resume": True})
    return impossible(
        "another toolkit's checkpoint can't be resumed; model.path can name its model"
    )


def revision(s: Settings, value: Any) -> Answer:
    """The branch or commit of a model."""
    if value == "main":
        return Answer(Fate.idle, note="the hub's default, as here")
    return Answer(Fate.taken, {"model.revision": str(value)})


RUN = ("run.dir", "run.name")


def run_directory(value: Any) -> Answer:
    """output_dir as run.dir and run.name."""
    path = Path(str(value))
    name = path.name or "default"
    return computed({"run.dir": str(path.parent), "run.name": name})
