"""Steps of data.pipeline: terms, labels of several annotators, label noise."""

from conf.preparation.base import StepOptions

STEPS: tuple[type[StepOptions], ...] = ()
