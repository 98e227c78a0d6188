"""``stage=label``: tasks for people go out (label.mode=export), their labels come back as
preference data (label.mode=import).
"""

from conf.choices import LabelMode
from rlhf.run.context import RunContext


def run(ctx: RunContext) -> None:
    """Export or import. Raises UserError for what does not fit."""
    with ctx.closing():
        if ctx.cfg.label.mode is LabelMode.export:
            from rlhf.stages.labelling.exporting import export

            export(ctx)
        else:
            from rlhf.stages.labelling.importing import import_labels

            import_labels(ctx)
