"""What each choice costs: a sentence each, as keys of the words and what stands in them."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from conf.choices import AdapterKind, Advantage, Judge, LabelMode, Quantization, TrackingKind
from conf.schema import (
    AdapterConfig,
    DataConfig,
    EngineConfig,
    EnvironmentConfig,
    LabelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrackingConfig,
    facts_of,
)
from conf.stages import (
    DataStage,
    EvalRewardStage,
    EvalStage,
    ExportStage,
    KTOStage,
    LabelStage,
    OfflineStage,
    OnlineStage,
    PreferenceStage,
    ServeStage,
    TrainStage,
)

Cost = tuple[str, dict[str, str]]


class Settings(Protocol):
    """The groups that costs are read from."""

    stage: Any
    run: RunConfig
    adapter: AdapterConfig
    engine: EngineConfig
    rollout: RolloutConfig
    environment: EnvironmentConfig
    reward: RewardConfig
    data: DataConfig
    label: LabelConfig
    tracking: TrackingConfig


def costs(cfg: Settings) -> list[Cost]:
    """The sentences for a configuration; the keys begin with ``forms.cost.``."""
    return [(f"forms.cost.{word}", values) for word, values in _costs(cfg)]


def _costs(cfg: Settings) -> Iterator[Cost]:
    stage = cfg.stage
    if isinstance(stage, TrainStage):
        yield from _training(cfg)
    for kind, of_kind in _OF.items():
        if isinstance(stage, kind):
            yield from of_kind(cfg)
    if cfg.tracking.kind is TrackingKind.wandb:
        yield "wandb", {}
    if cfg.run.overwrite:
        yield "overwrite", {}
    if cfg.run.resume:
        yield "resume", {}


def _training(cfg: Settings) -> Iterator[Cost]:
    if cfg.adapter.kind is AdapterKind.none:
        yield "full", {}
    else:
        yield "adapter", {"kind": cfg.adapter.kind.value}
    if cfg.adapter.quantize is not Quantization.none:
        yield "quantized", {"kind": cfg.adapter.quantize.value}
    if cfg.engine.gradient_checkpointing:
        yield "checkpointing", {}


def _offline(cfg: Settings) -> Iterator[Cost]:
    stage: OfflineStage = cfg.stage
    yield "length", {"tokens": str(stage.max_length)}
    yield "batch", {"rows": str(stage.batch_size)}
    if stage.steps is None:
        yield "epochs", {"epochs": f"{stage.epochs:g}"}
    else:
        yield "steps", {"steps": str(stage.steps)}
    if isinstance(stage, (PreferenceStage, KTOStage)):
        yield _reference(cfg), {}


def _online(cfg: Settings) -> Iterator[Cost]:
    stage: OnlineStage = cfg.stage
    count = stage.prompts_per_step * stage.samples_per_prompt
    tokens = cfg.environment.longest(cfg.rollout.max_response_length)
    yield "responses", {"count": str(count), "tokens": str(tokens), "steps": str(stage.steps)}
    if stage.advantage is Advantage.gae:
        yield "critic", {}
    if cfg.reward.path is not None:
        yield "reward_model", {}
    if stage.kl_coef == 0:
        yield "no_kl", {}
    if stage.reference:
        yield _reference(cfg), {}


def _reference(cfg: Settings) -> str:
    return "reference_free" if facts_of(cfg.adapter).off_is_start else "reference"


def _eval(cfg: Settings) -> Iterator[Cost]:
    stage: EvalStage = cfg.stage
    count = stage.prompts * stage.samples_per_prompt
    yield "eval", {"count": str(count), "tokens": str(cfg.rollout.max_response_length)}
    if cfg.reward.path is not None:
        yield "reward_model", {}
    if Judge.classifier in stage.judges:
        yield "judge_classifier", {}


def _eval_reward(_: Settings) -> Iterator[Cost]:
    yield "eval_reward", {}


def _label(cfg: Settings) -> Iterator[Cost]:
    if cfg.label.mode is LabelMode.export:
        yield "label", {"tasks": str(cfg.label.budget), "people": str(cfg.label.overlap)}
    else:
        yield "label_import", {}


def _serve(_: Settings) -> Iterator[Cost]:
    yield "serve", {}


def _export(_: Settings) -> Iterator[Cost]:
    yield "export", {}


def _data(cfg: Settings) -> Iterator[Cost]:
    yield "data", {"steps": str(len(cfg.data.pipeline))}


_OF: dict[type, Callable[[Settings], Iterator[Cost]]] = {
    OfflineStage: _offline,
    OnlineStage: _online,
    EvalStage: _eval,
    EvalRewardStage: _eval_reward,
    LabelStage: _label,
    ExportStage: _export,
    ServeStage: _serve,
    DataStage: _data,
}
