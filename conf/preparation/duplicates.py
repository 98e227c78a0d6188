"""Steps of data.pipeline: exact and near duplicates."""

from conf.preparation.base import StepOptions

STEPS: tuple[type[StepOptions], ...] = ()
