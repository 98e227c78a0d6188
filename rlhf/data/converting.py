"""Rows of files as records of a use: which format a file has, what each row gives, and which rows
don't fit or are set aside.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from conf.data import DataFormat
from rlhf.data.files import SourceRow
from rlhf.data.formats import (
    Format,
    Use,
    by_name,
    detect,
    judging_key,
    nearest_format,
    remedies,
    unread_columns,
)
from rlhf.data.formats import reading as formats_for
from rlhf.data.formats.unread import may_be_unread
from rlhf.data.formats.values import has_pictures, is_conversation, keys_of, with_default_system
from rlhf.data.media import picture_column
from rlhf.data.mixture import Part, Source
from rlhf.data.rows import RowError
from rlhf.data.telling import Seen
from rlhf.process.pixels import MOST_PIXELS
from rlhf.process.wording import describe
from rlhf.types import Tools, UserError

LOG = logging.getLogger("rlhf.data")
PROBE = 20  # first rows by which a file's format is recognised
USES = {
    Use.sft: "texts or prompts with completions",
    Use.preference: "pairs of a chosen and a rejected answer",
    Use.unpaired: "answers judged good or bad, or pairs of a chosen and a rejected answer",
    Use.prompt: "prompts",
}
_NAMED = 12  # columns that a message names
LeftOut = Callable[[SourceRow, str], None]  # a row, and why


@dataclass(frozen=True, slots=True)
class Record:
    """A value that a row gives (a row of judgements may give several), where the row is, and its
    columns that the value is not made of.
    """

    number: int
    value: Any
    fields: dict[str, Any]
    origin: str = ""

    @property
    def tools(self) -> Tools | None:
        """The functions that a prompt's answers may call, which are among its fields."""
        given = self.fields.get("tools")
        return given if isinstance(given, list) else None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.origin}, row {self.number}"

    def having(self, value: Any) -> "Record":
        """The record with another value."""
        return replace(self, value=value)


def choose_format(
    origin: str,
    rows: Sequence[SourceRow],
    use: Use | None,
    wanted: DataFormat,
    *,
    trusted: bool = False,
) -> Format:
    """The `wanted` format, or the first format for `use` (any for None) that one of the first rows
    has.

    Raises UserError for a format that the use can't take, for columns that fit none, with the
    nearest format and what it lacks, and for a column of a row's content that the format would not
    read; `trusted`: data.columns says what is what, so that such a column is counted only.
    """
    if wanted is not DataFormat.auto:
        chosen = by_name(wanted.value)
        if use is not None and not chosen.reads(use):
            raise UserError(
                f"data.format={chosen.name} can't be read as {USES[use]}. Formats that can: "
                f"{_names(use)}."
            )
        return chosen
    readable = [r for r in rows if r.problem is None]
    for row in readable:
        _refuse_tree(row)
        detected = detect(row.columns, use)
        if detected is not None:
            _refuse_judged(row, use or detected.natural_use, detected)
            if not trusted:
                _refuse_unread(readable, use, detected)
            return detected
    if not readable:
        raise UserError(f"{rows[0].place}: {rows[0].problem}.")
    raise _unknown(origin, readable[0], use)


def _names(use: Use) -> str:
    return ", ".join(f.name for f in formats_for(use))


def _refuse_tree(row: SourceRow) -> None:
    """Raises UserError for the single messages of a tree, which are no texts of their own."""
    if row.columns.keys() >= {"message_id", "parent_id", "text"}:
        raise UserError(
            f"{row.place}: each row is one message of a tree (message_id, parent_id, text): "
            "expected conversations. Give Open Assistant's file of whole trees "
            "(format message_tree), or messages joined along parent_id; data.format=text trains "
            "on every message by itself."
        )


def _refuse_judged(row: SourceRow, use: Use, detected: Format) -> None:
    """Raises UserError for judged answers where texts to train on are expected."""
    key = judging_key(row.columns)
    if use is Use.sft and key is not None:
        raise UserError(
            f"{row.place}: the column {key!r} judges each answer, so this is an "
            "unpaired preference file: SFT would also "
            "learn the bad answers. Keep the good rows in a file of their own, or set "
            f"data.format={detected.name} to train on all of them."
        )


def _refuse_unread(rows: Sequence[SourceRow], use: Use | None, detected: Format) -> None:
    """Raises UserError for the first row with a column of its content that the detected format
    would not read.
    """
    for row in rows:
        columns = _unread_of(detected, row, use)
        if not columns:
            continue
        shown = ", ".join(f"{key!r} ({describe(row.columns.get(key))})" for key in columns)
        cures = remedies(row.columns, use)
        if use is None and detected.reads(Use.prompt):
            cures.append("data.kind=prompt (answers are then a prompt's fields)")
        cures.append(f"data.format={detected.name} to go on without (counted in a warning)")
        raise UserError(
            f"{row.place}: its columns are those of format {detected.name} "
            f"({detected.columns}), which does not read {shown}: expected every column of the "
            f"content to be read. Say which is meant: {'; or '.join(cures)}."
        )


def _unread_of(format_: Format, row: SourceRow, use: Use | None) -> list[str]:
    """The columns of a row's content that are not read; none of a row that doesn't fit, whose
    trouble is told where it is read.
    """
    try:
        return unread_columns(format_, row.columns, use)
    except RowError:
        return []


def _unknown(origin: str, row: SourceRow, use: Use | None) -> UserError:
    """Why a row has no format for `use`, with the columns that would mend it and the nearest
    format.
    """
    other = detect(row.columns)
    if other is not None and other.name == "text" and use is Use.prompt:
        return UserError(
            f"{origin}: a file of whole texts (column 'text') can't be prompts: expected a "
            "column 'prompt' with the text to continue."
        )
    keys = [str(key) for key in row.columns]
    closest, missing, near = nearest_format(row.columns, use)
    cures = remedies(row.columns, use)
    if near is not None:
        cures.insert(0, f"data.columns='{{{missing}: {near}}}'")
    hint = "" if near is None else f" (nearest key found: '{near}')"
    what = "fit no format" if other is None else f"are those of format {other.name}"
    expected = "" if use is None else f"expected {USES[use]}, but "
    formats = "" if use is None else f" All formats that can be read so: {_names(use)}."
    cure = f" Say which column is what: {'; or '.join(cures)}." if cures else ""
    return UserError(
        f"{row.place}: {expected}its keys ({', '.join(keys) or 'none'}) {what}.{cure} "
        f"Nearest format: {closest.name} ({closest.columns}), which needs the key "
        f"{missing!r}{hint}.{formats}"
    )


def shape_of(value: Any) -> str:
    """Text or messages: what every row of a file must have in common."""
    if is_conversation(value):
        return "messages"
    return "text"


@dataclass(slots=True)
class _Unread:
    """The columns of a file's content that its format does not read."""

    format: Format
    use: Use
    trusted: bool  # the user said what is what: they are counted, and the row is read
    copies: set[str] = field(default_factory=set)  # read under another name, as first rows show
    _by_names: dict[tuple[Any, ...], list[str]] = field(default_factory=dict)

    def learn(self, rows: Sequence[SourceRow]) -> None:
        """See which columns are copies of what is read."""
        seen: set[str] = set()
        lost: set[str] = set()
        for row in rows:
            if row.problem is None:
                seen.update(self._candidates(row.columns))
                lost.update(_unread_of(self.format, row, self.use))
        self.copies = seen - lost

    def _candidates(self, columns: dict[str, Any]) -> list[str]:
        names = tuple(columns)
        if names not in self._by_names:
            try:
                self._by_names[names] = may_be_unread(self.format, columns, self.use)
            except RowError:  # told where the row is read
                return []
        return [
            key
            for key in self._by_names[names]
            if columns.get(key, True) and key not in self.copies
        ]

    def of(self, row: SourceRow) -> list[str]:
        """The columns of a row that are not read, without copies."""
        if not self._candidates(row.columns):
            return []
        columns = _unread_of(self.format, row, self.use)
        return [key for key in columns if key not in self.copies]


@dataclass(slots=True)
class Conversion:
    """Turns rows into records of one use, and hands over the rows that it leaves out. A file's
    format is recognised once, by its first rows.
    """

    use: Use
    sources: Sequence[Source]
    rejected: LeftOut  # rows that don't fit
    set_aside: LeftOut  # judgements that give no pair, such as ties: their rows fit
    probe: int = PROBE
    system: str | None = None  # data.system
    most_pixels: int = MOST_PIXELS
    store: Path | None = None  # where pictures go that rows hold as bytes; None: a temporary folder
    rows: int = 0  # that were given, fitting or not
    formats: dict[str, Format] = field(default_factory=dict)  # by origin
    keys: Seen = field(default_factory=Seen)  # of messages beside role and content, and tools
    notes: Seen = field(default_factory=Seen)  # on what was not read as it stands
    format_notes: list[str] = field(default_factory=list)  # by the first rows
    _unread: dict[str, _Unread] = field(default_factory=dict)  # by origin
    _pictured: set[str] = field(default_factory=set)  # origins whose first rows show pictures
    _shape: str | None = None
    _shape_where: str = ""  # of the first record

    def format_of(self, origin: str) -> Format:
        """A file's format. Raises UserError as `choose_format`, and for a file without rows."""
        if origin not in self.formats:
            source, part = self._part(origin)
            rows = list(islice(source.rows(part), self.probe))
            if not rows:
                raise UserError(
                    f"{source.key}={part.origin} holds no rows: expected {USES[self.use]}."
                )
            chosen = choose_format(
                origin, rows, self.use, source.format, trusted=source.named_columns
            )
            trusted = source.named_columns or source.format is not DataFormat.auto
            self.formats[origin] = chosen
            self._unread[origin] = _Unread(chosen, self.use, trusted)
            self._unread[origin].learn(rows)
            self.format_notes += _format_notes(origin, chosen, self.use, rows)
            if any(_shows_pictures(row) for row in rows):
                self._pictured.add(origin)
        return self.formats[origin]

    def _part(self, origin: str) -> tuple[Source, Part]:
        return next(
            (source, part)
            for source in self.sources
            for part in source.parts
            if part.origin == origin
        )

    def records(self, row: SourceRow) -> list[Record]:
        """The records that a row gives. Raises UserError where its file has no format."""
        self.rows += 1
        format_ = self.format_of(row.origin)
        if row.problem is not None:
            self.rejected(row, row.problem)
            return []
        self.notes.add(row.lost, row.place)
        unread_file = self._unread[row.origin]
        for key in unread_file.of(row):
            if not unread_file.trusted:
                reason = (
                    f"key {key!r}: expected nothing that format {format_.name} does not read, "
                    f"found {describe(row.columns.get(key))}"
                )
                self.rejected(row, reason)
                return []
            self.notes.add([f"format {format_.name} does not read {key!r}"], row.place)
        try:
            several = format_.read(row.columns, self.use)
            if row.origin in self._pictured:
                from rlhf.data.pictures import in_turns

                several.pairs = in_turns(several.pairs)
        except RowError as error:
            self.rejected(row, str(error))
            return []
        for reason in several.set_aside:
            self.set_aside(row, reason)
        self.notes.add(several.notes, row.place)
        keys = [keys_of(made.value, made.fields) for made in several.pairs]
        self.keys.add(set().union(*keys), row.place)
        out = []
        for made in several.pairs:
            shape = shape_of(made.value)
            if self._shape is None:
                where = f"row {row.number}" if len(self.formats) == 1 else row.place
                self._shape, self._shape_where = shape, where
            if shape != self._shape:
                reason = f"expected {self._shape} as in {self._shape_where}, found {shape}"
                self.rejected(row, reason)
                return []
            try:
                value = self._opened(self._begun(made.value), row.origin)
            except RowError as error:
                self.rejected(row, str(error))
                return []
            out.append(Record(row.number, value, made.fields, row.origin))
        return out

    def _begun(self, value: Any) -> Any:
        return value if self.system is None else with_default_system(value, self.system)

    def _opened(self, value: Any, origin: str) -> Any:
        """A value whose pictures were found and opened. Raises RowError."""
        if not has_pictures(value):
            return value
        from rlhf.data.picture_files import Pictures
        from rlhf.data.pictures import opened

        source, part = self._part(origin)
        folder = part.folder if source.image_dir is None else source.image_dir
        return opened(value, Pictures(folder, self.most_pixels, self.store))


def tell_columns(
    records: Sequence[Record], read: Collection[str | None], name: str, by: str
) -> None:
    """Log once the columns that rows have beside their value, other than those `read`."""
    seen = Seen()
    for record in records:
        held = [key for key, value in record.fields.items() if value is not None]
        seen.add([key for key in held if key not in read], record.place)
    if seen.counts:
        told = [
            f"{key!r} ({count} rows)" for key, (count, _) in islice(seen.counts.items(), _NAMED)
        ]
        more = len(seen.counts) - len(told)
        if more:
            told.append(f"{more} more")
        LOG.info("%s: columns that stage=%s does not read: %s", name, by, ", ".join(told))


def _shows_pictures(row: SourceRow) -> bool:
    try:
        return row.problem is None and picture_column(row.columns) is not None
    except RowError:  # told where the row is read
        return False


def _format_notes(origin: str, chosen: Format, use: Use, rows: Sequence[SourceRow]) -> list[str]:
    """What a format says of the first row that can be read."""
    row = next((row for row in rows if row.problem is None), None)
    if row is None or use is Use.prompt:
        return []
    said = chosen.note(row.columns)
    if not said:
        return []
    return [f"{origin}: {said}"]
