"""Whole data files as records of one use, with the weights and soft labels that a stage takes from
further columns. Logs which format each file is read as.

A row that doesn't fit is rejected with its file, row number, key, what was expected and what the
row holds instead. Loading stops when more than ``data.max_bad_rows`` rows are rejected. Either way
the rejected rows are written into ``data_rejected.jsonl`` in the run directory; so are judgements
that give no pair (ties, skips), which fit and are counted apart.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from conf.schema import Config, DataConfig
from conf.stages import CPOStage, KTOStage, OfflineStage, ORPOStage, PreferenceStage, RewardStage
from rlhf.data.converting import PROBE, USES, Conversion, Record
from rlhf.data.files import SourceRow
from rlhf.data.formats import Format, Use
from rlhf.data.formats import reading as formats_for
from rlhf.data.mixture import Source, mixed
from rlhf.data.prepare.held import gathered
from rlhf.data.rows import finite
from rlhf.data.sources import train_sources
from rlhf.data.telling import Seen, refuse_pictures, tell
from rlhf.models.templates import processor_of, template_reads
from rlhf.process import distributed
from rlhf.process.wording import describe
from rlhf.types import SOFT_LABEL, UserError

LOG = logging.getLogger("rlhf.data")
REJECTED_FILE = "data_rejected.jsonl"
IMAGES = ".images"  # in run.dir: pictures that rows hold as bytes
_IDENTITIES = ("name", "tool_call_id")  # of messages: few templates show them
_SHOWN = 3  # rejected rows quoted in an error
_OF_PAIRS = (RewardStage, PreferenceStage, CPOStage, ORPOStage)


@dataclass(frozen=True, slots=True)
class DataRequest:
    """Which rows are read, and for which stage."""

    data: DataConfig
    stage: Any  # the stage's options (conf/stages.py)
    seed: int
    run_dir: Path | None  # where rejected rows are written; None: nowhere, as in a dry run
    keys: Seen = field(default_factory=Seen)  # of the messages that were loaded

    @classmethod
    def of(cls, cfg: Config) -> "DataRequest":
        """The rows that a configuration asks for."""
        run_dir = Path(cfg.run.dir).expanduser() / cfg.run.name
        return cls(cfg.data, cfg.stage, cfg.run.seed, None if cfg.run.dry_run else run_dir)

    @property
    def use(self) -> Use:
        """What ``data.path`` is to the stage."""
        if isinstance(self.stage, _OF_PAIRS):
            return Use.preference
        if isinstance(self.stage, KTOStage):
            return Use.unpaired
        if isinstance(self.stage, OfflineStage):
            return Use.sft
        return Use.prompt


@dataclass(slots=True)
class Loaded:
    """All rows of one split (training, held out) as records of one use."""

    name: str  # for messages: the file, or the option
    rows: int = 0  # of the files, fitting or not
    formats: dict[str, Format] = field(default_factory=dict)  # by file
    records: Sequence[Record] = field(default_factory=list)  # many: in a file
    rejected: list[tuple[SourceRow, str]] = field(default_factory=list)
    set_aside: list[tuple[SourceRow, str]] = field(default_factory=list)
    keys: Seen = field(default_factory=Seen)  # of messages beside role and content, and tools
    notes: Seen = field(default_factory=Seen)  # on what was not read as it stands
    format_notes: list[str] = field(default_factory=list)  # by the first rows

    def values(self) -> list[Any]:
        """The records' values, in their order."""
        return [record.value for record in self.records]

    def quote(self, rows: Sequence[tuple[SourceRow, str]]) -> str:
        """The first few of `rows` with their reasons, for a message."""
        quoted = []
        for row, reason in rows[:_SHOWN]:
            where = row.place if len(self.formats) > 1 else f"row {row.number}"
            quoted.append(f"{where}: {reason}")
        if len(rows) > _SHOWN:
            quoted.append(f"and {len(rows) - _SHOWN} more")
        return "; ".join(quoted)

    def layout(self) -> str:
        """The formats that the files have, for a message."""
        return " and ".join(dict.fromkeys(f"{f.name} ({f.columns})" for f in self.formats.values()))


def required_sources(request: DataRequest) -> list[Source]:
    """The sources of the training rows. Raises UserError when none is set."""
    sources = train_sources(request.data)
    if not sources:
        names = ", ".join(f.name for f in formats_for(request.use))
        raise UserError(
            f"data.path is not set: stage={request.stage.name} needs a file of "
            f"{USES[request.use]} (formats: {names})."
        )
    return sources


def convert(
    sources: Sequence[Source],
    use: Use,
    data: DataConfig,
    seed: int,
    max_rows: int | None,
    store: Path | None = None,
) -> Loaded:
    """The first `max_rows` rows (all for None) as records of `use`. Rows that don't fit, and
    judgements that give no pair, are kept apart with their reasons. store: where pictures go that
    rows hold as bytes; None: a temporary folder.
    """
    out = Loaded(_name(sources))
    conversion = Conversion(
        use,
        sources,
        rejected=lambda row, reason: out.rejected.append((row, reason)),
        set_aside=lambda row, reason: out.set_aside.append((row, reason)),
        probe=PROBE + data.max_bad_rows,
        system=data.system,
        most_pixels=data.max_image_pixels,
        store=store,
    )
    rows = islice(mixed(sources, seed), max_rows)
    out.records = gathered(chain.from_iterable(map(conversion.records, rows)))
    out.rows, out.formats, out.keys = conversion.rows, conversion.formats, conversion.keys
    out.notes, out.format_notes = conversion.notes, conversion.format_notes
    if not out.rows:
        raise UserError(f"{sources[0].key}={sources[0].name} holds no rows: expected {USES[use]}.")
    return out


def _name(sources: Sequence[Source]) -> str:
    origins = [part.origin for source in sources for part in source.parts]
    if len(origins) == 1:
        return origins[0]
    return ", ".join(source.name for source in sources)


def load(request: DataRequest, sources: Sequence[Source], use: Use) -> Loaded:
    """Read whole files for `use`. Raises UserError for a file that can't be read, and when more
    than ``data.max_bad_rows`` rows don't fit.
    """
    if distributed.is_main():
        for source in sources:
            for note in source.all_notes():
                LOG.info(note)
    data, store = request.data, None
    if request.run_dir is not None:
        store = request.run_dir.parent / IMAGES
    loaded = convert(sources, use, data, request.seed, data.max_rows, store)
    _report_left_out(loaded, request)
    if not loaded.records:
        raise UserError(
            f"{sources[0].key}={sources[0].name} holds no row that fits: expected {USES[use]}."
        )
    if distributed.is_main():
        counts = Counter(record.origin for record in loaded.records)
        for origin, form in loaded.formats.items():
            rows = counts[origin]
            LOG.info("%s: %d rows, read as %s (%s)", origin, rows, form.name, form.columns)
        for note in loaded.format_notes:
            LOG.warning("%s", note)
        tell(loaded.notes, loaded.name)
    request.keys.merge(loaded.keys)
    loaded = with_weights(loaded, request.data.weight_column, request.stage, use)
    return with_soft_labels(loaded, request.stage)


def tell_unread(keys: Seen, tokenizer: Any, name: str) -> None:
    """Warn of each of `keys` that neither we nor the tokenizer's chat template read.

    Raises UserError where calls are among them, since turns would be trained, and read, as if they
    were empty; and pictures, where the model reads texts alone.
    """
    for key in keys.counts:
        if key == "images":
            if processor_of(tokenizer) is None:
                why = "the model of model.path reads texts alone. Give one that reads pictures"
                refuse_pictures(keys, name, why)
            continue
        if key in _IDENTITIES or template_reads(tokenizer, key):
            continue
        if key == "tool_calls":
            raise UserError(
                f"{name}: messages hold tool_calls ({keys.told(key)}), but the tokenizer's chat "
                "template never reads them. Set data.chat_template to one that does, such as "
                "hermes."
            )
        _warn("%s: nothing reads the key %r of messages (%s)", name, key, keys.told(key))


def _report_left_out(loaded: Loaded, request: DataRequest) -> None:
    """Write and log the rows that are left out. Raises UserError when too many don't fit."""
    written = None
    if request.run_dir is not None and (loaded.rejected or loaded.set_aside):
        written = write_rejected(loaded, request.run_dir, request.stage.name)
    if loaded.set_aside:
        LOG.warning(
            "%s: %d judgements give no pair and are set aside in %s: %s.",
            loaded.name,
            len(loaded.set_aside),
            written,
            loaded.quote(loaded.set_aside),
        )
    if not loaded.rejected:
        return
    problem = (
        f"{loaded.name}: {len(loaded.rejected)} of {loaded.rows} rows don't fit format "
        f"{loaded.layout()}: {loaded.quote(loaded.rejected)}."
    )
    most = request.data.max_bad_rows
    if len(loaded.rejected) > most:
        raise UserError(
            f"{problem} data.max_bad_rows={most} allows no more. Rejected rows: {written}."
        )
    LOG.warning("%s They are left out and kept in %s.", problem, written)


def write_rejected(loaded: Loaded, run_dir: Path, stage: str) -> Path:
    """Write the rows that are left out: into the stage's directory in `run_dir` where it exists,
    else into `run_dir`. Rows of an earlier reading of the same files are replaced.
    """
    folder = run_dir / stage if (run_dir / stage).is_dir() else run_dir
    path = folder / REJECTED_FILE
    if not distributed.is_main():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for line in _lines(path) if json.loads(line)["file"] not in loaded.formats]
    for set_aside, rows in ((False, loaded.rejected), (True, loaded.set_aside)):
        for row, reason in rows:
            entry = {
                "file": row.origin,
                "row": row.number,
                "reason": reason,
                "set_aside": set_aside,
                "content": row.columns if row.problem is None else row.raw,
            }
            lines.append(json.dumps(entry, ensure_ascii=False, default=str))
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.replace(path)
    return path


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        # not splitlines: a text may hold other line ends
        yield from (line for line in path.read_text(encoding="utf-8").split("\n") if line)


# ---- weights and soft labels ----


def with_weights(loaded: Loaded, column: str | None, stage: Any, use: Use) -> Loaded:
    """`loaded` with each row's weight from `column` (``data.weight_column``) in its value, where
    the rows have that column. Logs it, also where the stage has no use for weights.

    Raises UserError for a row that lacks a weight, or has one that is no finite number of at least
    0, and for weights that are all 0.
    """
    if column is None or not any(column in record.fields for record in loaded.records):
        return loaded
    if use is Use.prompt or not isinstance(stage, OfflineStage):
        if use is Use.prompt:
            _warn(
                "%s: the column %r weighs no prompt: stage=%s has no loss that takes it",
                loaded.name,
                column,
                stage.name,
            )
        return loaded
    weights = [_weight(record, column) for record in loaded.records]
    if not any(weights):
        raise UserError(
            f"{loaded.name}: column {column!r}: every weight is 0, so nothing would be trained."
        )
    if distributed.is_main():
        LOG.info(
            "%s: the column %r weighs the rows in the loss, from %g to %g",
            loaded.name,
            column,
            min(weights),
            max(weights),
        )
    return _with_values(loaded, map(_weighed, loaded.records, weights))


def _warn(message: str, *values: object) -> None:
    if distributed.is_main():
        LOG.warning(message, *values)


def _with_values(loaded: Loaded, values: Iterable[Any]) -> Loaded:
    """`loaded` with other values of its records."""
    pairs = zip(loaded.records, values, strict=True)
    return replace(
        loaded, records=gathered(replace(record, value=value) for record, value in pairs)
    )


def _weighed(record: Record, weight: float) -> Any:
    if isinstance(record.value, dict):
        return {**record.value, "weight": weight}
    return replace(record.value, weight=weight)


def _weight(record: Record, column: str) -> float:
    remedy = "Set data.weight_column=null if the column means something else."
    return _number(record, column, lambda weight: weight >= 0, "a weight of at least 0", remedy)


def _number(
    record: Record, column: str, fits: Callable[[float], bool], expected: str, remedy: str
) -> float:
    """A column's finite number for which `fits` holds, also as a table's text. Raises UserError."""
    value = record.fields.get(column)
    number = finite(value)
    if number is not None and fits(number):
        return number
    if column in record.fields:
        instead = describe(value)
    else:
        instead = "no such column, which other rows have"
    raise UserError(
        f"{record.place}: column {column!r}: expected {expected}, found {instead}. {remedy}"
    )


def with_soft_labels(loaded: Loaded, stage: Any) -> Loaded:
    """`loaded` with each row's column soft_label in its value, where ``stage.soft_label=true`` asks
    for it. Warns where rows have the column and nobody asks.

    Raises UserError for a row that lacks a soft label, or has one that is no probability.
    """
    if not isinstance(stage, RewardStage):
        return loaded
    if not stage.soft_label:
        if any(SOFT_LABEL in record.fields for record in loaded.records):
            _warn(
                "%s: the column %r is not read, each chosen answer counts as better: "
                "stage.soft_label=true reads it",
                loaded.name,
                SOFT_LABEL,
            )
        return loaded
    labels = [soft_label(record) for record in loaded.records]
    if distributed.is_main():
        LOG.info(
            "%s: soft labels from %g to %g, %d of %d are ties",
            loaded.name,
            min(labels),
            max(labels),
            sum(label == 0.5 for label in labels),
            len(labels),
        )
    values = (replace(r.value, soft_label=p) for r, p in zip(loaded.records, labels, strict=True))
    return _with_values(loaded, values)


def soft_label(record: Record) -> float:
    """The probability that a pair's chosen answer is the better one. Raises UserError."""
    if SOFT_LABEL not in record.fields:
        raise UserError(
            f"{record.place}: stage.soft_label=true, but the row has no column {SOFT_LABEL!r}: "
            "expected the probability that chosen is better "
            "(stage=label label.mode=import label.strength=soft_label writes it). Set "
            "stage.soft_label=false to take every chosen answer as better."
        )
    remedy = "It is the probability that chosen is better; 0.5 is a tie."
    return _number(record, SOFT_LABEL, lambda p: 0 <= p <= 1, "a probability from 0 to 1", remedy)


def require_margins(loaded: Loaded) -> None:
    """Raises UserError for the first pair without a margin, which ``stage.margin=true`` needs."""
    lacking = next((r for r in loaded.records if r.value.margin is None), None)
    if lacking is not None:
        raise UserError(
            f"{lacking.place}: stage.margin=true, but the row has no margin: expected a column "
            "'margin' (or score_chosen and score_rejected)."
        )
