"""Whether memory and disk have room for what a training stage holds and writes, asked before
anything loads.
"""

import bisect
import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.choices import (
    Advantage,
    CriticInit,
    Dtype,
    EngineKind,
    KTOLoss,
    ModelKind,
)
from conf.reward import EnvironmentConfig
from conf.schema import AdapterConfig, Config, ModelConfig, RolloutConfig, critic_adapter
from conf.stages import KTOStage, OfflineStage, OnlineStage, RewardStage
from conf.training import TrainStage
from rlhf.checks.launch import counts_rows, runs_vllm
from rlhf.checks.memory import moments
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import (
    Shapes,
    adapter_parameters,
    can_plan,
    shapes_of,
    trained_parts,
)
from rlhf.checks.memory.states import GIB
from rlhf.models.directories import START, contents, merges_first, trains_on_adapter
from rlhf.models.loading import resolve_dtype, starts_whole
from rlhf.process import distributed
from rlhf.process.files import json_object
from rlhf.run.directory import CHECKPOINTS, run_directory
from rlhf.types import UserError

# bytes of a checkpoint for a byte of a model's weights: at most 16 a parameter that trains and 4 of
# its reference, of 2 bytes each
_MOST = 10.0
_PLANNED_GIB = 0.25  # weights below which a run doesn't take the second for its memory plan
# Families whose attention vLLM computes from latents (its is_deepseek_mla), and the size of latent
# and rotated part that its kernel on a CPU is compiled for.
LATENT_IN_VLLM = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "kimi_k2",
        "kimi_linear",
        "longcat_flash",
    }
)
CPU_LATENT = (512, 64)

Models = Sequence[tuple[str, str]]  # option and directory of each reward model beside the policy


def memory_notes(cfg: Config, scoring: Models = ()) -> list[str]:
    """A note where the memory plan doesn't fit the devices: parts of it are assumed, so this is no
    error.
    """
    if cfg.run.dry_run or cfg.model.path is None:
        return []  # a dry run shows the plan itself
    if (weight_files(cfg.model.path) or 0) < _PLANNED_GIB * GIB:
        return []
    machine = moments.machine_of(cfg.engine, cfg.model.params, all_devices=False)
    shapes, _ = shapes_of(cfg.model, scoring)
    planned = plan(cfg, shapes, machine)
    if planned.fits:
        return []
    device = "device" if machine.cuda else "rank"
    return [
        f"the memory plan doesn't fit, {planned.usable_gib:.1f} GiB are usable on each "
        f"{device}: {planned.obstacle}. "
        f"`python -m rlhf stage=doctor stage.plan={cfg.stage.name}` with the same model and "
        "engine options says which setting does."
    ]


def fitting_micro_batch(cfg: Config) -> tuple[str, int] | None:
    """The option of `engine` that sizes the micro-batches of a stage on TRL's trainers, where it
    leaves them out, and the largest value whose memory plan fits the device: tokens, or rows where
    the stage counts rows (`launch.counts_rows`).

    None where the whole batch is taken: it fits, or the plan isn't asked (an option that is set, a
    model without a configuration to read, weights too small to matter).
    """
    stage, engine = cfg.stage, cfg.engine
    if not isinstance(stage, OfflineStage):
        return None
    if engine.micro_batch_size is not None or engine.micro_batch_tokens is not None:
        return None
    if cfg.model.path is None or not can_plan(cfg.model):
        return None
    if not cfg.run.dry_run and (weight_files(cfg.model.path) or 0) < _PLANNED_GIB * GIB:
        return None
    machine = moments.machine_of(engine, cfg.model.params, all_devices=False)
    rows, left = divmod(stage.batch_size, engine.groups(machine.ranks))
    if left:
        return None  # the stage's own check refuses it
    shapes, _ = shapes_of(cfg.model, ())

    def too_many(size: int) -> bool:
        smaller = dataclasses.replace(engine, micro_batch_size=size)
        return not plan(dataclasses.replace(cfg, engine=smaller), shapes, machine).fits

    fitting = bisect.bisect_left(range(1, rows + 1), True, key=too_many)
    if fitting == rows:
        return None
    if counts_rows(stage, engine) is None:
        return "micro_batch_tokens", max(1, fitting) * stage.max_length
    return "micro_batch_size", _whole_share(stage, rows, fitting)


def _whole_share(stage: OfflineStage, rows: int, fitting: int) -> int:
    """The largest number of rows, `fitting` at most, that divides a rank's `rows`, so that the
    optimizer step keeps them; where none fits 1, or 2 where rows are compared with each other.
    """
    compares = isinstance(stage, KTOStage) and stage.loss is KTOLoss.kto
    least = 2 if compares else 1
    sizes = [size for size in range(max(fitting, least), 0, -1) if rows % size == 0]
    return next((size for size in sizes if size >= least), rows)


def check_disk(cfg: Config, scoring: Models = ()) -> None:
    """The last checkpoints, one more while it is written, and the model fit on the disk of run.dir.
    Raises UserError.

    A model that is not on this disk, a GGUF file's and ``model=tiny`` without a path are not
    counted.
    """
    if cfg.run.dry_run or not distributed.is_main():
        return
    free = free_bytes(run_directory(cfg))
    count = count_checkpoints(cfg.stage, cfg.run.keep_checkpoints)
    weights = weight_bytes(cfg.model, cfg.stage, scoring)
    if weights is None or (count + 1) * _MOST * weights < free:
        return  # the usual case, without counting parameters
    need = need_of(cfg, shapes_of(cfg.model, scoring)[0])
    if need.total <= free:
        return
    remedy = ""
    if isinstance(cfg.stage, OnlineStage):
        remedy = " stage.save_steps=0 writes none, and a killed run then begins anew."
    raise UserError(
        f"run.dir={cfg.run.dir}: {free / GIB:.1f} GiB are free there, but the run needs "
        f"about {need.total / GIB:.1f}: the model, and "
        f"{need.count} checkpoints of {need.checkpoint / GIB:.1f} GiB at once "
        f"(run.keep_checkpoints={cfg.run.keep_checkpoints}, the one that is "
        "being written, and a trainer's best). Make room, set run.dir to another disk, lower "
        "run.keep_checkpoints, or train LoRA "
        f"(adapter=lora).{remedy}"
    )


@dataclass(frozen=True, slots=True)
class Need:
    """What a run writes to the disk, in bytes."""

    count: int  # checkpoints that lie there at one moment
    checkpoint: float
    model: float
    start: float = 0.0  # whole weights that the run starts from, where model.path has none

    @property
    def total(self) -> float:
        return self.count * self.checkpoint + self.model + self.start


def need_of(cfg: Config, shapes: Shapes) -> Need:
    """Checkpoints and model of a training stage."""
    width = weight_width(cfg.model.dtype)
    model = width * shapes.policy.parameters
    starts = int(writes_start(cfg.stage, cfg.model, cfg.adapter))
    if cfg.adapter.is_quantized and isinstance(cfg.stage, OnlineStage):
        starts += not starts_whole(cfg.model)  # as they were before rounding
    return Need(
        count=count_checkpoints(cfg.stage, cfg.run.keep_checkpoints),
        checkpoint=checkpoint_bytes(cfg.stage, cfg.engine.kind, cfg.adapter, width, shapes),
        model=model,
        start=model * starts,
    )


def writes_start(stage: TrainStage, model: ModelConfig, adapter: AdapterConfig) -> bool:
    """Whether the run writes the whole weights that it starts from to ``start/``: an online stage,
    since vLLM starts from nothing else, where model.path is an adapter, a GGUF file or missing;
    another stage where it trains an adapter on an adapter. All of them where the frozen weights are
    held rounded, or adapter.load has further adapters merged in.
    """
    if adapter.is_quantized:
        return True
    if isinstance(stage, OnlineStage):
        return merges_first(adapter) or not starts_whole(model)
    return trains_on_adapter(model.path, adapter)


def start_note(stage: TrainStage, model: ModelConfig, adapter: AdapterConfig) -> list[str]:
    """A note of the disk that ``start/`` takes, where model.path holds an adapter or is held
    rounded.
    """
    if model.path is None or not writes_start(stage, model, adapter):
        return []
    held, size = contents(model.path), weight_files(model.path)
    room = "a whole model's room" if size is None else f"about {size / GIB:.2g} GiB"
    if adapter.is_quantized:
        return [
            f"adapter.quantize={adapter.quantize.value}: the rounded weights are written in full "
            f"to {START}/ in the run's directory, which takes {room} on the disk."
        ]
    if not held.adapters:
        return []
    return [
        f"model.path={model.path} holds an adapter of {held.weights}: both are merged and written "
        f"to {START}/ in the run's directory, which takes {room} on the disk."
    ]


def free_bytes(directory: Path) -> float:
    """What the disk of a run's directory has, with what the run's earlier checkpoints hold, since
    new ones take their place.
    """
    free = shutil.disk_usage(existing_parent(directory)).free
    return free + size_of(directory / CHECKPOINTS)


def count_checkpoints(stage: TrainStage, keep: int) -> int:
    """Checkpoints on the disk at the same time: those that are kept (`keep`; 0: all), the one being
    written, and TRL's best.
    """
    if isinstance(stage, OnlineStage):
        if not stage.save_steps or stage.steps is None:
            return 0
        written = -(-stage.steps // stage.save_steps)  # the last step's too
        return written if keep == 0 else min(written, keep + 1)
    # how many evaluations there will be is known only when the rows are read
    return 2 if keep == 0 else keep + 2


def checkpoint_bytes(
    stage: TrainStage, engine: EngineKind, adapter: AdapterConfig, width: int, shapes: Shapes
) -> float:
    """Bytes of one checkpoint over all ranks: float32 masters and optimizer's state of what trains;
    weights of `width` bytes, where DeepSpeed or TRL's trainers write them; a moving reference.
    """
    whole = adapter_parameters(shapes.policy, adapter) or shapes.policy.parameters
    policy = whole
    if not stage.train.everything:
        classifier = isinstance(stage, RewardStage)
        policy = trained_parts(shapes.policy, stage.train, classifier=classifier).parameters
    deepspeed, state = engine is EngineKind.deepspeed, stage.optimizer.state_bytes(1.0, 0.0)
    if isinstance(stage, OfflineStage):
        kept = state + 4 * deepspeed if stage.save_optimizer else 0.0
        return kept * policy + width * whole
    assert isinstance(stage, OnlineStage)
    per_parameter = 4.0 + state + (width if deepspeed else 0)
    size = per_parameter * policy
    if stage.advantage is Advantage.gae:
        size += per_parameter * _critic_parameters(stage, adapter, shapes)
    if stage.reference_every:
        size += width * shapes.policy.parameters
    return size


def _critic_parameters(stage: OnlineStage, adapter: AdapterConfig, shapes: Shapes) -> int:
    """Parameters of the critic that train."""
    shape = shapes.policy
    if stage.critic_init is CriticInit.reward and shapes.rewards:
        shape = shapes.rewards[0][1]
    return adapter_parameters(shape, critic_adapter(stage, adapter)) or shape.classifier


def weight_width(dtype: Dtype) -> int:
    """Bytes of a weight."""
    return int(resolve_dtype(dtype).itemsize)


def weight_bytes(model: ModelConfig, stage: TrainStage, scoring: Models) -> int | None:
    """Size of the weight files of the policy, and of a critic's start at its largest; None where
    the policy's are not on this disk.
    """
    if model.path is None or model.gguf_file is not None:
        return None
    policy = weight_files(model.path)
    if policy is None or not isinstance(stage, OnlineStage):
        return policy
    if stage.advantage is not Advantage.gae:
        return policy
    critics = [policy] + [weight_files(path) or 0 for _, path in scoring]
    return policy + max(critics)


def weight_files(path: str) -> int | None:
    """Bytes of a model directory's weights, of an adapter's base for an adapter; None where there
    are none.
    """
    directory = Path(contents(path).weights)
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors") if file.is_file()]
    return sum(sizes) or None


def size_of(folder: Path) -> int:
    """Bytes of a folder's files; 0 where there is none."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def existing_parent(path: Path) -> Path:
    """The nearest directory that exists: where a run directory would be made."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


# ---- the generator's cache ----


def check_cache(
    rollout: RolloutConfig, model: ModelConfig, prompt: int, environment: EnvironmentConfig
) -> None:
    """vLLM's cache on a CPU holds the longest prompt with its response, and keeps what the model
    wants kept. On a GPU, where it shares the device, the memory plan tells. Raises UserError.
    """
    import torch

    if not runs_vllm(rollout.backend) or torch.cuda.is_available():
        return
    _check_latent(model)
    per_token = cache_bytes_per_token(model)
    if per_token is None:
        return
    response, option = environment.longest(rollout.max_response_length), environment.longest_option
    needed = per_token * (prompt + response) / GIB
    if needed > rollout.kv_cache_gib:
        raise UserError(
            f"rollout.kv_cache_gib={rollout.kv_cache_gib:g} doesn't hold one sequence: "
            f"data.max_prompt_length={prompt} + {option}={response} tokens take {needed:.3g} GiB. "
            f"Set rollout.kv_cache_gib={math.ceil(needed * 10) / 10:g} or more, or lower the "
            "lengths."
        )


def _check_latent(model: ModelConfig) -> None:
    """vLLM's latent attention on a CPU is compiled for one size. Raises UserError."""
    content = _model_config(model)
    if content is None or content.get("model_type") not in LATENT_IN_VLLM:
        return
    latent, positions = content.get("kv_lora_rank"), content.get("qk_rope_head_dim")
    if latent is not None and (latent, positions) != CPU_LATENT:
        raise UserError(
            f"rollout=vllm: on a CPU vLLM has latent attention for kv_lora_rank={CPU_LATENT[0]} "
            f"and qk_rope_head_dim={CPU_LATENT[1]} alone, and this {content['model_type']} has "
            f"{latent} and {positions}. Set rollout=hf."
        )


def _model_config(model: ModelConfig) -> dict[str, Any] | None:
    """The content of the model's config.json; None where there is none to read."""
    if model.path is None:
        return None
    config_path = Path(contents(model.path).weights) / "config.json"
    if not config_path.is_file():
        return None
    return json_object(config_path, "this model can't be loaded")


def cache_bytes_per_token(model: ModelConfig) -> int | None:
    """Bytes of a token's keys and values in all layers, by the model's config.json; None where
    there is none to read, or one that names its sizes otherwise.
    """
    width = 2 if model.dtype in (Dtype.bfloat16, Dtype.float16) else 4
    if model.path is None:
        if model.kind is not ModelKind.tiny:
            return None
        return 2 * model.tiny.layers * model.tiny.hidden_size * width
    content = _model_config(model)
    if content is None:
        return None
    sizes = []
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = content.get(name)
        if not isinstance(value, int) or value < 1:  # another family's names
            return None
        sizes.append(value)
    layers, heads, hidden = sizes
    if content.get("model_type") in LATENT_IN_VLLM and content.get("kv_lora_rank"):
        # one latent for all heads, keys and values alike
        return layers * sum(CPU_LATENT) * width
    size = content.get("head_dim") or hidden // heads
    kv_heads = content.get("num_key_value_heads") or heads
    if not isinstance(size, int) or not isinstance(kv_heads, int):
        return None
    return 2 * layers * kv_heads * size * width
