"""Steps of data.pipeline: balance and split."""

from conf.preparation.base import StepOptions

STEPS: tuple[type[StepOptions], ...] = ()
