"""The pictures of prepared rows: each a file of the run directory, images/<sha256>.<ending>, which
rows name below that directory. So the directory is whole by itself, and may be moved.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rlhf.data.formats.values import on_messages
from rlhf.types import Message, Picture

IMAGES = "images"  # below the run directory


def kept_in(value: Any, folder: Path) -> Any:
    """A value of a use whose pictures are files of `folder`/images, named below `folder`: links to
    the files of its rows, or copies where the file system has no such links.
    """

    def keep_each(message: Message) -> Message:
        if "images" not in message:
            return message
        return {**message, "images": [_kept(picture, folder) for picture in message["images"]]}

    return on_messages(value, keep_each)


def _kept(picture: Picture, folder: Path) -> Picture:
    source = Path(picture["path"])
    name = f"{IMAGES}/{picture['sha256']}{source.suffix.lower()}"
    target = folder / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(source, target)
    return {**picture, "path": name}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without such links
        handle, beside = tempfile.mkstemp(dir=target.parent, prefix=".new-")
        os.close(handle)
        shutil.copyfile(source, beside)
        os.replace(beside, target)
