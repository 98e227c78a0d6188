"""The whole configuration. Each group's options are in the module of its name:

    run, tracking  conf/run.py          reward  conf/reward.py
    model, adapter conf/model.py        data    conf/data.py, conf/preparation/
    engine         conf/engine.py       label   conf/labelling.py
    rollout        conf/rollout.py      stage   conf/stages.py, conf/training.py, conf/online.py

Conventions of all of them: every field is an ``option(...)`` (conf/options.py); ``slots`` and
``kw_only``, so that OmegaConf refuses unknown keys (also those added with ``+``); enumerations
instead of ``Literal``, which OmegaConf refuses; relations between options in ``__post_init__``, so
that a bad value is reported before anything loads. ``None`` always means "not set". Standard
library only.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from conf import published
from conf.data import DataConfig, GymConfig, SourceConfig
from conf.engine import EngineConfig
from conf.labelling import LabelConfig
from conf.model import AdapterConfig, ModelConfig, TinyConfig
from conf.options import MISSING, nested, option
from conf.reward import RewardConfig, RewardTerm
from conf.rollout import RolloutConfig
from conf.run import RunConfig, TrackingConfig

__all__ = [
    "GROUPS",
    "MISSING",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "GymConfig",
    "LabelConfig",
    "ModelConfig",
    "RewardConfig",
    "RewardTerm",
    "RolloutConfig",
    "RunConfig",
    "SourceConfig",
    "TinyConfig",
    "TrackingConfig",
]

_Stage = TypeVar("_Stage")


@dataclass(slots=True, kw_only=True)
class Config:
    """The whole configuration; ``stage`` holds one of the stage dataclasses."""

    # Any, since OmegaConf takes neither a union of dataclasses nor a type variable; functions that
    # need a certain stage call `stage_as`.
    stage: Any = option(MISSING, "The stage and its options (conf/stages.py).")
    run: RunConfig = nested(RunConfig)
    model: ModelConfig = nested(ModelConfig)
    adapter: AdapterConfig = nested(AdapterConfig)
    engine: EngineConfig = nested(EngineConfig)
    rollout: RolloutConfig = nested(RolloutConfig)
    reward: RewardConfig = nested(RewardConfig)
    data: DataConfig = nested(DataConfig)
    label: LabelConfig = nested(LabelConfig)
    tracking: TrackingConfig = nested(TrackingConfig)

    def __post_init__(self) -> None:
        """Learning rates that are left out become the published ones for stage and adapter."""
        published.fill(self.stage, self.adapter.kind)

    def stage_as(self, kind: type[_Stage]) -> _Stage:
        """The stage's options, typed. Raises TypeError for a stage of another kind."""
        if not isinstance(self.stage, kind):
            raise TypeError(f"expected a {kind.__name__}, not a {type(self.stage).__name__}")
        return self.stage


# The groups with presets in conf/<group>/, beside `stage` and `experiment`.
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "engine": EngineConfig,
    "rollout": RolloutConfig,
    "reward": RewardConfig,
    "data": DataConfig,
    "tracking": TrackingConfig,
}
