"""TensorBoard as a tracking backend: event files in ``<run directory>/tensorboard``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.run.tracking.files import table_cells


class TensorBoard:
    """Scalars, tables as text, and images."""

    sync_command: str | None = None
    identity: dict[str, Any] | None = None

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(directory / "tensorboard"))
        self._step = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        # TensorBoard renders Markdown: texts stand in indented blocks, where nothing is markup.
        columns, cells = table_cells(rows)
        blocks = []
        for row in cells:
            for column, cell in zip(columns, row, strict=True):
                indented = "\n".join(f"    {line}" for line in str(cell).splitlines())
                blocks.append(f"{column}:\n\n{indented}")
        self._writer.add_text(name, "\n\n".join(blocks), step)

    def artifact(
        self,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any],
        alias: str,
    ) -> None:
        """TensorBoard has no artifacts; the run's manifest has them."""

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None:
        """TensorBoard has no lineage; the run's manifest has it."""

    def images(self, paths: Sequence[Path]) -> None:
        from matplotlib.image import imread

        for path in paths:
            pixels = imread(path)[..., :3]  # without the alpha channel
            self._writer.add_image(f"plots/{path.stem}", pixels, self._step, dataformats="HWC")

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        for name, value in summary.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"summary/{name}", value, self._step)
        self._writer.close()
