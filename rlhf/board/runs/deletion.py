"""Deleting a run: out of sight at once, then file by file."""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhf.board import OWN
from rlhf.board.app import Place
from rlhf.board.runs.listing import Stage
from rlhf.types import UserError

_GOING = Path(OWN) / "deleted"  # in run.dir


def delete(place: Place, folder: Path, stages: Sequence[Stage]) -> None:
    """Delete the run whose checked folder is `folder`. stages: its stages. Raises UserError where
    one of them runs or waits, or where the folder can't be moved.
    """
    busy = [stage for stage in stages if stage.is_live]
    if busy:
        raise UserError(
            f"run.name={busy[0].run} stage={busy[0].stage}: a run is in it ({busy[0].state}). Stop "
            "it first."
        )
    if folder.is_symlink():  # what it leads to is another run
        folder.unlink()
        return
    going = place.runs / _GOING
    try:
        going.mkdir(parents=True, exist_ok=True)
        moved = folder.rename(going / secrets.token_hex(8))
        shutil.rmtree(moved)
    except OSError as error:
        raise UserError(f"{folder} can't be deleted: {error}.") from error
