"""What can be known of label.mode=import before anything loads, and where its options lead."""

import glob
import json
from pathlib import Path

from conf.schema import Config
from rlhf.labels import known
from rlhf.labels.checks_export import access_token, check_address
from rlhf.labels.ledger import EXPORT_FILE, SERVER_FILE, read_export
from rlhf.labels.store import LABELS_FILE
from rlhf.types import UserError


def home(cfg: Config) -> Path:
    """What the runs of one run.name share."""
    return Path(cfg.run.dir).expanduser() / cfg.run.name


def labels_folder(cfg: Config) -> Path:
    """The labels directory (rlhf.run.context.run_directory)."""
    return home(cfg) / "labels"


def export_folder(cfg: Config) -> Path | None:
    """The export of label.export, or that of the same run.name; None where there is none but the
    labels directory knows exports already.

    Raises UserError.
    """
    if cfg.label.export is not None:
        return Path(cfg.label.export).expanduser()
    own = home(cfg) / "label"
    if (own / EXPORT_FILE).is_file():
        return own
    if known.places(labels_folder(cfg)):
        return None
    raise UserError(
        f"label.export is not set, and {own} holds no export: expected the run directory of "
        "stage=label label.mode=export. "
        "Name it with label.export=DIRECTORY, or give the run.name of the export."
    )


def label_files(cfg: Config) -> list[Path]:
    """label.files, patterns such as inbox/*.json resolved, each file once. Raises UserError."""
    out: list[Path] = []
    for given in cfg.label.files:
        place = Path(given).expanduser()
        if place.is_dir():
            raise UserError(
                f"label.files: {given} is a directory: expected a file, or a pattern such as "
                f"{place}/*.json."
            )
        if place.is_file():
            out.append(place)
            continue
        found = [
            Path(path)
            for path in sorted(glob.glob(str(place), recursive=True))
            if Path(path).is_file()
        ]
        if not found:
            raise UserError(
                f"label.files: {given}: no such file. Expected what came back from annotators, "
                "in any format of label.targets."
            )
        out.extend(found)
    return list(dict.fromkeys(out))


def server_of(cfg: Config, export: Path | None) -> tuple[str, int]:
    """Address and project: label.url and label.project, or those that the export was pushed to.
    Raises UserError.
    """
    url, project = cfg.label.url, cfg.label.project
    if url is not None:
        check_address(url)
    if url is not None and project is not None:
        return url, project
    remedy = "Set label.url=ADDRESS and label.project=NUMBER."
    place = export / SERVER_FILE if export is not None else None
    if place is None or not place.is_file():
        raise UserError(
            f"label.pull=true: the export was not pushed to a server ({place or SERVER_FILE}: no "
            f"such file). {remedy}"
        )
    try:
        pushed = json.loads(place.read_text(encoding="utf-8"))
        return url or str(pushed["url"]), int(pushed["project"]) if project is None else project
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place} can't be read: {type(error).__name__}: {error}. {remedy}"
        ) from error


def check_import(cfg: Config) -> None:
    """An export that labels belong to, and labels, new ones or some that are there already. Raises
    UserError.
    """
    export = export_folder(cfg)
    if export is not None:
        read_export(export)
    files = label_files(cfg)
    if files:
        from rlhf.labels.targets import detect

        for place in files:
            detect(place)
    if cfg.label.pull:
        server_of(cfg, export)
        access_token(cfg.label, "label.pull=true")
    if not files and not cfg.label.pull and not (labels_folder(cfg) / LABELS_FILE).is_file():
        raise UserError(
            "label.mode=import has nothing to read: expected label.files=[FILE, ...], or "
            "label.pull=true for a Label Studio project."
        )
