"""``stage=label``: tasks for people go out (label.mode=export), their labels come back as preference data (label.mode=import)."""

from conf.choices import LabelMode
from rlhf.run import RunContext


def run(ctx: RunContext) -> None:
    """Export or import. Raises UserError for what does not fit."""
    with ctx.closing():
        if ctx.cfg.label.mode is LabelMode.export:
            from rlhf.stages.label_export import export

            export(ctx)
        else:
            from rlhf.stages.label_import import import_labels

            import_labels(ctx)
