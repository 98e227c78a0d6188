"""Labels back: read, checked, stored, aggregated, written as a version of preference data.

The labels directory (runs/<run.name>/labels) holds, beside the files of every run,

    labels.jsonl     every label that was ever imported, once (rlhf.labels.store)
    refused.jsonl    every row that was refused, with its place, its id and why
    imports.jsonl    a line for each import: what was read, what it added, the version it led to
    pulled/          what label.pull=true fetched from a server
    exports/<id>     the ledgers that labels were checked against
    versions/<n>, latest    what the labels came to (rlhf.labels.versions)
"""

import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.labelling import LabelConfig
from rlhf.labels import import_figures, known_exports, server, versions
from rlhf.labels.ab_labels import ab_figures
from rlhf.labels.checks_export import access_token
from rlhf.labels.checks_import import export_folder, label_files, server_of
from rlhf.labels.incoming import Source, check_refused, read_incoming
from rlhf.labels.report import Situation, report
from rlhf.labels.report_tables import agreement_rows, annotator_rows, bias_rows
from rlhf.labels.store import Added, Lines, Store, keep_refused
from rlhf.run import console
from rlhf.run.context import RunContext

LOG = logging.getLogger("rlhf.stages.label")
IMPORTS_FILE, PULLED_FOLDER = "imports.jsonl", "pulled"


@dataclasses.dataclass(frozen=True, slots=True)
class Imported:
    """What an import did."""

    number: int  # of the import
    added: Added
    refused: int  # rows
    situation: Situation
    figures: dict[str, Any]  # the report
    version: versions.Version
    new: bool  # whether this import made the version


def import_labels(ctx: RunContext) -> None:
    """One import. Raises UserError where more rows than data.max_bad_rows are refused; then nothing
    of it is stored but refused.jsonl.
    """
    imported = _import(ctx)
    ctx.watchdog.phase("finish")
    situation, version = imported.situation, imported.version
    figures, added, refused = imported.figures, imported.added, imported.refused
    _show(figures)
    metrics = import_figures.metrics_of(situation, figures, added, refused, version)
    ctx.tracker.log(imported.number, metrics)
    ctx.tracker.table("labels", import_figures.table_rows(situation), imported.number)
    identity = version.card["identity"]
    ctx.record("version", {"number": version.number, "new": imported.new, "identity": identity})
    ctx.finish(
        steps=imported.number,
        metrics=metrics,
        model=None,
        figures=import_figures.shown_figures(
            len(situation.labels), figures["pairs"], added, refused, version, new=imported.new
        ),
        files=import_figures.shown_files(version, ctx.dir, refused),
        next_command=import_figures.training_command(version, ctx.cfg.label.strength),
    )


def _import(ctx: RunContext) -> Imported:
    """Read, check, store and aggregate; the version is published."""
    cfg, folder = ctx.cfg, ctx.dir
    export = export_folder(cfg.label, folder.parent)
    if export is not None:
        known_exports.copy(folder, export)
        ctx.add_parent("export", export)
    exports = known_exports.paths(folder)
    ledgers = known_exports.read(exports)
    settings = versions.settings_of(cfg.label)
    # held open, so that there is one import at a time
    with contextlib.closing(Lines(folder / IMPORTS_FILE)) as imports:
        number = len(imports.rows) + 1
        with Store(folder) as store:
            ctx.watchdog.phase("read")
            incoming = read_incoming(
                _paths(cfg.label, export, folder),
                ledgers,
                cfg.label.annotator,
                record=ctx.add_data,
                alive=ctx.watchdog.alive,
            )
            refused = len(incoming.refused)
            keep_refused(folder, incoming.refused, number)
            check_refused(incoming.refused, cfg.data.max_bad_rows, folder)
            ctx.watchdog.phase("aggregate")
            added = store.add(incoming.labels, number)
            situation = versions.settle(ledgers, store.stored, settings)
        figures = {**report(situation, cfg.run.seed), "ab": ab_figures(situation)}
        name = f"{Path(cfg.run.name).name}-labels"
        origins = _origins(imports.rows, incoming.sources)
        version, new = versions.newest_or_new(
            folder, name, situation, settings, figures, exports, origins
        )
        ctx.publish(
            name, "preference-data", version.files, _metadata(version.card), root=version.folder
        )
        row = {
            "import": number,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sources": [dataclasses.asdict(source) for source in incoming.sources],
            **dataclasses.asdict(added),
            "refused": refused,
            "version": version.number,
        }
        imports.append([row])
    return Imported(number, added, refused, situation, figures, version, new)


def _paths(label: LabelConfig, export: Path | None, labels_folder: Path) -> Iterator[Path]:
    """The files that come back; the last one is fetched from a server with ``label.pull``.
    `export`: the export's folder.
    """
    yield from label_files(label.files)
    if label.pull:
        url, project = server_of(label, export)
        yield server.pull(
            url=url,
            token=access_token(label.token_env, "label.pull=true"),
            project=project,
            folder=labels_folder / PULLED_FOLDER,
        )


def _origins(
    imports: Sequence[Mapping[str, Any]], sources: Sequence[Source]
) -> list[dict[str, Any]]:
    """Name and hash of all that was imported so far, each content once: `imports` are the earlier
    ones.
    """
    origins: dict[str | None, dict[str, Any]] = {}
    for row in imports:
        for source in row["sources"]:
            origins[source["sha256"]] = {key: source[key] for key in ("name", "sha256")}
    for source in sources:
        origins[source.sha256] = {"name": source.name, "sha256": source.sha256}
    return list(origins.values())


def _metadata(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker shows of a version."""
    return {
        "version": card["version"],
        "rows": {file.partition(".")[0]: entry["rows"] for file, entry in card["files"].items()},
        "settings": card["settings"],
        "exports": [export["id"] for export in card["exports"]],
        "identity": card["identity"],
    }


def _show(figures: Mapping[str, Any]) -> None:
    console.table(annotator_rows(figures["annotators"]), title="Annotators (95 % intervals)")
    console.table(bias_rows(figures["annotators"]), title="What their choices go with")
    console.table(agreement_rows(figures["agreement"]), title="Agreement")
    console.table([figures["pairs"]], title="Pairs, by what became of them")
    for comparison in figures["ab"]:
        title = f"A/B test of export {comparison['export']}"
        console.table([import_figures.ab_row(comparison)], title=title)
        LOG.info("A/B test: %s", comparison["rule"])
    for note in figures["notes"]:
        LOG.warning("%s", note)
