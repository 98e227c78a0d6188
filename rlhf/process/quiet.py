"""Fewer lines from libraries: one progress bar, of ours, is enough."""

import logging
import os
import sys


def quiet_libraries() -> None:
    """No progress bar for every model that transformers loads or saves and for every map of a data
    set, and only errors from their logs.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    # read when datasets is imported, which an online run may never do
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        datasets.disable_progress_bars()
