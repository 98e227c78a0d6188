"""The report of a stage that evaluates: its files in the run's directory, its tables at the
tracker.
"""

from collections.abc import Sequence
from pathlib import Path

from eval.report.html import tracker_tables, write_report
from eval.sections import Section
from rlhf.run.tracking.tracker import Tracker


def publish_report(
    folder: Path, run_name: str, sections: Sequence[Section], tracker: Tracker
) -> Path:
    """Write report.html and report.json of the run `run_name` into `folder`, and show the tables
    in W&B or TensorBoard where there is one. Returns the page's path.
    """
    page = write_report(folder, f"Evaluation: {run_name}", sections)
    for name, rows in tracker_tables(sections).items():
        tracker.table(name, rows, 0)
    return page
