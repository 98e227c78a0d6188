"""The options of ``label.mode=import``: the files, the export and the server that they name.

`run_home` is what the runs of one run.name share, ``<run.dir>/<run.name>``.
"""

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from conf.labelling import LabelConfig
from rlhf.labels import known_exports
from rlhf.labels.checks_export import access_token, check_address
from rlhf.labels.ledger import EXPORT_FILE, SERVER_FILE, read_export
from rlhf.labels.store import LABELS_FILE
from rlhf.labels.targets import detect
from rlhf.types import UserError


def labels_folder(run_home: Path) -> Path:
    """The labels directory (rlhf.run.context.run_directory)."""
    return run_home / "labels"


def export_folder(label: LabelConfig, run_home: Path) -> Path | None:
    """``label.export``, or the export of the same run.name. None where neither exists but the
    labels directory knows exports from earlier imports.

    Raises UserError.
    """
    if label.export is not None:
        return Path(label.export).expanduser()
    own = run_home / "label"
    if (own / EXPORT_FILE).is_file():
        return own
    if known_exports.paths(labels_folder(run_home)):
        return None
    raise UserError(
        f"label.export is not set, and {own} holds no export: expected the run directory of "
        "stage=label label.mode=export. "
        "Name it with label.export=DIRECTORY, or give the run.name of the export."
    )


def label_files(patterns: Sequence[str]) -> list[Path]:
    """The files that ``label.files`` names, each once; a pattern such as inbox/*.json stands for
    all files that it matches. Raises UserError.
    """
    files: list[Path] = []
    for given in patterns:
        path = Path(given).expanduser()
        if path.is_dir():
            raise UserError(
                f"label.files: {given} is a directory: expected a file, or a pattern such as "
                f"{path}/*.json."
            )
        if path.is_file():
            files.append(path)
            continue
        matches = sorted(glob.glob(str(path), recursive=True))
        matching_files = [Path(match) for match in matches if Path(match).is_file()]
        if not matching_files:
            raise UserError(
                f"label.files: {given}: no such file. Expected what came back from annotators, "
                "in any format of label.targets."
            )
        files.extend(matching_files)
    return list(dict.fromkeys(files))


def server_of(label: LabelConfig, export: Path | None) -> tuple[str, int]:
    """Address and project of the server: ``label.url`` and ``label.project``, or those that the
    export in the folder `export` was pushed to. Raises UserError.
    """
    url, project = label.url, label.project
    if url is not None:
        check_address(url)
    if url is not None and project is not None:
        return url, project
    remedy = "Set label.url=ADDRESS and label.project=NUMBER."
    path = export / SERVER_FILE if export is not None else None
    if path is None or not path.is_file():
        raise UserError(
            f"label.pull=true: the export was not pushed to a server ({path or SERVER_FILE}: no "
            f"such file). {remedy}"
        )
    try:
        pushed = json.loads(path.read_text(encoding="utf-8"))
        if url is None:
            url = str(pushed["url"])
        if project is None:
            project = int(pushed["project"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} can't be read: {type(error).__name__}: {error}. {remedy}"
        ) from error
    return url, project


def check_import(label: LabelConfig, run_home: Path) -> None:
    """There is an export that labels belong to, and there are labels: new ones, or those of
    earlier imports. Raises UserError.
    """
    export = export_folder(label, run_home)
    if export is not None:
        read_export(export)
    files = label_files(label.files)
    for path in files:
        detect(path)
    if label.pull:
        server_of(label, export)
        access_token(label.token_env, "label.pull=true")
    earlier = (labels_folder(run_home) / LABELS_FILE).is_file()
    if not files and not label.pull and not earlier:
        raise UserError(
            "label.mode=import has nothing to read: expected label.files=[FILE, ...], or "
            "label.pull=true for a Label Studio project."
        )
