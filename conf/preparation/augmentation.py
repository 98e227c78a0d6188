"""Steps of data.pipeline: new rows from old ones, after the split."""

from conf.preparation.base import StepOptions

STEPS: tuple[type[StepOptions], ...] = ()
