"""Preparation: a pipeline of steps over rows (data.pipeline), each with its count in and out and a
reason for every row that it leaves out.
"""

from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.pipeline import Prepared, run, stream
from rlhf.data.prepare.store import StepReport

__all__ = ["Context", "Item", "Prepared", "StepReport", "run", "stream"]
