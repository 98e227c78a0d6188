"""Labels back: read, checked, stored, aggregated, written as a version of preference data.

The labels directory (runs/<run.name>/labels) holds, beside the files of every run,

    labels.jsonl     every label that was ever imported, once (rlhf.labels.store)
    refused.jsonl    every row that was refused, with its place, its id and why
    imports.jsonl    a line an import: what was read, what it added, the version it led to
    pulled/          what label.pull=true fetched from a server
    exports/<id>     the ledgers that labels were checked against
    versions/<n>, latest    what the labels came to (rlhf.labels.versions)
"""

import dataclasses
import datetime
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.choices import Strength
from conf.labelling import LabelConfig
from rlhf.labels import known_exports, versions
from rlhf.labels.ab_labels import ab_figures
from rlhf.labels.checking import Checked, Ledgers, Refused, check
from rlhf.labels.checks_export import access_token
from rlhf.labels.checks_import import export_folder, label_files, server_of
from rlhf.labels.records import Judgement, Unreadable, as_text
from rlhf.labels.report import Situation, agreement_rows, annotator_rows, bias_rows, report
from rlhf.labels.store import Added, Lines, Store, keep_refused
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.label")
IMPORTS_FILE, PULLED_FOLDER = "imports.jsonl", "pulled"
_SHOWN = 3  # refused rows quoted in an error
_TABLE = 1000  # pairs in the tracker's table; report.json and labels.jsonl have all


@dataclasses.dataclass(slots=True)
class Source:
    """One file, or one project of a server: what it held."""

    name: str
    target: str
    sha256: str | None
    rows: int = 0
    refused: int = 0


def import_labels(ctx: RunContext) -> None:
    """One import. Raises UserError where more rows than data.max_bad_rows are refused; then nothing
    of it is stored but refused.jsonl.
    """
    cfg, folder = ctx.cfg, ctx.dir
    run_home = folder.parent
    export = export_folder(cfg.label, run_home)
    if export is not None:
        known_exports.copy(folder, export)
        ctx.add_parent("export", export)
    copies = known_exports.paths(folder)
    ledgers = known_exports.read(copies)
    imports = Lines(folder / IMPORTS_FILE)  # held open: one import at a time
    try:
        number = len(imports.rows) + 1
        with Store(folder) as store:
            ctx.watchdog.phase("read")
            sources, checked, refused = _read(ctx, ledgers, export)
            keep_refused(folder, refused, number)
            _check_refused(refused, cfg.data.max_bad_rows, folder)
            ctx.watchdog.phase("aggregate")
            added = store.add(checked, number)
            situation = versions.settle(ledgers, store.stored, settings_of(cfg.label))
        figures = {**report(situation, cfg.run.seed), "ab": ab_figures(situation)}
        earlier = [source for one in imports.rows for source in one["sources"]]
        read = {
            source["sha256"]: source for source in (*earlier, *map(dataclasses.asdict, sources))
        }
        version, made = _version(
            ctx,
            situation,
            figures,
            copies,
            [{key: source[key] for key in ("name", "sha256")} for source in read.values()],
        )
        row = {
            "import": number,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sources": [dataclasses.asdict(source) for source in sources],
            **dataclasses.asdict(added),
            "refused": len(refused),
            "version": version.number,
        }
        imports.append([row])
    finally:
        imports.close()
    ctx.watchdog.phase("finish")
    _finish(ctx, number, situation, figures, added, refused, version, made)


def settings_of(label: LabelConfig) -> versions.Settings:
    return versions.Settings(
        aggregate=label.aggregate,
        min_labels=label.min_labels,
        min_confidence=label.min_confidence,
        min_gold_accuracy=label.min_gold_accuracy,
        strength=label.strength,
        eval_fraction=label.eval_fraction,
    )


def _rows(
    ctx: RunContext, export: Path | None
) -> Iterator[tuple[Source, Iterable[Judgement | Unreadable]]]:
    """What comes back, source by source."""
    cfg = ctx.cfg
    for place in label_files(cfg.label.files):
        yield _source(ctx, place)
    if cfg.label.pull:
        from rlhf.labels.server import pull

        url, project = server_of(cfg.label, export)
        place = pull(
            url=url,
            token=access_token(cfg.label.token_env, "label.pull=true"),
            project=project,
            folder=ctx.dir / PULLED_FOLDER,
        )
        yield _source(ctx, place)


def _source(ctx: RunContext, place: Path) -> tuple[Source, Iterable[Judgement | Unreadable]]:
    from rlhf.labels.targets import read_labels

    target, rows = read_labels(place)
    LOG.info("%s: read as %s", place, target.value)
    return Source(str(place), target.value, ctx.add_data(place)), rows


def _read(
    ctx: RunContext, ledgers: Ledgers, export: Path | None
) -> tuple[list[Source], list[Checked], list[Refused]]:
    sources: list[Source] = []
    checked: list[Checked] = []
    refused: list[Refused] = []
    for source, rows in _rows(ctx, export):
        for one in check(rows, ledgers, ctx.cfg.label.annotator):
            ctx.watchdog.alive()
            source.rows += 1
            if isinstance(one, Refused):
                source.refused += 1
                refused.append(one)
            else:
                checked.append(one)
        sources.append(source)
    return sources, checked, refused


def _check_refused(refused: Sequence[Refused], allowed: int, folder: Path) -> None:
    if not refused:
        return
    quoted = "\n".join(
        f"  {one.place}, task {one.task or '(no id)'}: {one.reason}" for one in refused[:_SHOWN]
    )
    more = f"\n  and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    if len(refused) > allowed:
        raise UserError(
            f"{len(refused)} rows are no labels of this export, more than "
            f"data.max_bad_rows={allowed}; nothing was imported.\n{quoted}{more}\n"
            f"All of them, with what they held: {folder / 'refused.jsonl'}. Mend the file, or "
            f"allow them with data.max_bad_rows={len(refused)}."
        )
    LOG.warning(
        "%d rows were refused (data.max_bad_rows=%d):\n%s%s", len(refused), allowed, quoted, more
    )


def _version(
    ctx: RunContext,
    situation: Situation,
    figures: Mapping[str, Any],
    copies: Mapping[str, Path],
    sources: Sequence[Mapping[str, Any]],
) -> tuple[versions.Version, bool]:
    """The newest version, and whether this import made it."""
    cfg, folder = ctx.cfg, ctx.dir
    settings = settings_of(cfg.label)
    name = f"{Path(cfg.run.name).name}-labels"
    before = versions.newest(folder)
    if before is not None and before.card["identity"] == versions.identity(
        situation.ledgers, situation.stored, settings
    ):
        # a kill may have come between the version and its link
        versions.point(folder, before.number)
        _publish(ctx, name, before)
        return before, False
    made = versions.write(folder, name, situation, settings, figures, copies, sources)
    _publish(ctx, name, made)
    return made, True


def _publish(ctx: RunContext, name: str, version: versions.Version) -> None:
    card = version.card
    rows = {file.partition(".")[0]: found["rows"] for file, found in card["files"].items()}
    exports = [export["id"] for export in card["exports"]]
    metadata = {
        "version": version.number,
        "rows": rows,
        "settings": card["settings"],
        "exports": exports,
        "identity": card["identity"],
    }
    ctx.publish(name, "preference-data", version.files, metadata, root=version.folder)


# ---- what is shown ----


def metrics_of(
    situation: Situation,
    figures: Mapping[str, Any],
    added: Added,
    refused: int,
    version: versions.Version,
) -> dict[str, float]:
    """The import's line of metrics.jsonl."""
    agreement, card = figures["agreement"], version.card
    counted: dict[str, float | None] = {
        "label/new": added.new,
        "label/revised": added.revised,
        "label/known": added.known,
        "label/refused": refused,
        "label/total": len(situation.labels),
        "label/annotators": len(figures["annotators"]),
        "label/version": version.number,
        **{f"label/pairs_{name}": count for name, count in figures["pairs"].items()},
        **{
            f"label/rows_{name.partition('.')[0]}": card["files"][name]["rows"]
            for name in ("train.jsonl", "eval.jsonl", "review.jsonl")
        },
        "label/agreement": agreement["observed"]["value"],
        "label/fleiss_kappa": agreement["fleiss_kappa"]["value"],
        "label/krippendorff_alpha": agreement["krippendorff_alpha"]["value"],
    }
    return {name: value for name, value in counted.items() if value is not None}


def table_rows(situation: Situation) -> list[dict[str, Any]]:
    """The tracker's table of labelled pairs: the first answer in the place in which no side counts,
    and who said what.
    """
    said: dict[str, list[str]] = {}
    for vote in situation.votes.votes:
        said.setdefault(vote.pair, []).append(f"{vote.annotator}: {vote.outcome.value}")
    rows = []
    for result in situation.aggregated.results[:_TABLE]:
        first, second = result.pair.answers
        row = {
            "prompt": as_text(result.pair.prompt),
            "first": first.text,
            "second": second.text,
            "verdict": "split" if result.outcome is None else result.outcome.value,
            "confidence": result.confidence,
            "first_better": result.first_better,
            "labels": "; ".join(said[result.pair.id]),
            "fate": situation.fates[result.pair.id].value,
            "first_policy": first.policy,
            "second_policy": second.policy,
            "task": result.pair.task,
        }
        rows.append(row)
    return rows


def next_command(version: versions.Version, strength: Strength) -> str | None:
    """What trains on the rows; None without any."""
    rows = {name: found["rows"] for name, found in version.card["files"].items()}
    if not rows["train.jsonl"]:
        return None
    held = f" data.eval_path={version.file('eval.jsonl')}" if rows["eval.jsonl"] else ""
    option = {
        Strength.margin: " stage.margin=true",
        Strength.soft_label: " stage.soft_label=true",
    }.get(strength, "")
    return f"python -m rlhf stage=reward data.path={version.file('train.jsonl')}{held}{option}"


def _show(figures: Mapping[str, Any]) -> None:
    console.table(annotator_rows(figures["annotators"]), title="Annotators (95 % intervals)")
    console.table(bias_rows(figures["annotators"]), title="What their choices go with")
    console.table(agreement_rows(figures["agreement"]), title="Agreement")
    console.table([figures["pairs"]], title="Pairs, by what became of them")
    for one in figures["ab"]:
        rate = (
            ""
            if one["win_rate"] is None
            else f"{one['win_rate']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"
        )
        row = {
            "a": one["a"],
            "b": one["b"],
            "a wins": one["a_wins"],
            "ties": one["ties"],
            "b wins": one["b_wins"],
            "win rate of b": rate,
            "e-value": one["e_value"],
            "decision": one["decision"],
        }
        console.table([row], title=f"A/B test of export {one['export']}")
        LOG.info("A/B test: %s", one["rule"])


def _finish(
    ctx: RunContext,
    number: int,
    situation: Situation,
    figures: Mapping[str, Any],
    added: Added,
    refused: Sequence[Refused],
    version: versions.Version,
    made: bool,
) -> None:
    _show(figures)
    for note in figures["notes"]:
        LOG.warning("%s", note)
    metrics = metrics_of(situation, figures, added, len(refused), version)
    ctx.tracker.log(number, metrics)
    ctx.tracker.table("labels", table_rows(situation), number)
    ctx.record(
        "version", {"number": version.number, "new": made, "identity": version.card["identity"]}
    )
    review = version.card["files"]["review.jsonl"]["rows"]
    pairs = Counter(figures["pairs"])
    shown = {
        "labels": f"{len(situation.labels)}: {added.new} new, {added.revised} revised, "
        f"{added.known} known; {len(refused)} rows refused",
        "pairs": f"{pairs['used']} used of {pairs['judged']} judged, {review} tasks for review",
        "version": f"{version.number}{'' if made else ' (nothing changed)'}",
    }
    files: dict[str, Path | str] = {
        "train": version.file("train.jsonl"),
        "held out": version.file("eval.jsonl"),
        "card": version.file("card.md"),
    }
    if review:
        files["review"] = version.file("review.jsonl")
    if refused:
        files["refused"] = ctx.dir / "refused.jsonl"
    ctx.finish(
        steps=number,
        metrics=metrics,
        model=None,
        figures=shown,
        files=files,
        next_command=next_command(version, ctx.cfg.label.strength),
    )
