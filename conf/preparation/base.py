"""What every preparation step has."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True, kw_only=True)
class StepOptions:
    """One step of data.pipeline. `apply` is loaded when the step runs: (options, items, context) -> items, see rlhf/data/prepare/items.py."""

    step: ClassVar[str]  # its name in data.pipeline
    apply: ClassVar[str]  # pkg.module:function
    streaming: ClassVar[bool] = False  # takes one item at a time; else it holds all of them in memory
    kinds: ClassVar[frozenset[str]] = frozenset({"sft", "preference", "unpaired", "prompt"})  # rows that it can take
    after_split: ClassVar[bool] = False  # refused before a split step
