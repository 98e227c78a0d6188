"""The steps of data.pipeline and their options: one dataclass a step, with the conventions of
conf/schema.py. Standard library only.
"""

from conf.preparation import annotation, augmentation, cleaning, duplicates, sampling
from conf.preparation.base import StepOptions

STEPS: dict[str, type[StepOptions]] = {
    options.step: options
    for module in (cleaning, duplicates, sampling, annotation, augmentation)
    for options in module.STEPS
}
