"""Steps of data.pipeline: text repair, language, lengths, quality."""

from conf.preparation.base import StepOptions

STEPS: tuple[type[StepOptions], ...] = ()
