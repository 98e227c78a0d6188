"""Configurations that several tests look at, composed once: Hydra takes a third of a second each.
Tests that change one compose their own.
"""

import functools

from conf.schema import Config
from rlhf.cli import config


@functools.cache
def composed(*overrides: str) -> Config:
    return config.compose(overrides)
