"""Rows as token ids in an Arrow file: encoded once, by several processes, kept by their content,
and mapped into memory by every rank.

A file's name is a hash of all that its content depends on: the rows, the tokenizer with its
template, the encoder's options and code, the libraries' versions. So it is never out of date, and
rows that were encoded before are read again. On each node one rank encodes while the others wait.

A file is written beside its place and renamed; its hash stands in a second file, which is written
last. What was cut off or damaged is encoded anew. Of several runs that want the same rows one
encodes, under a lock that ends with its process, and the others wait. No rows are ever deleted
here: the folder may be removed at any time when no run reads it.
"""

import functools
import hashlib
import inspect
import json
import logging
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.data.converting import Record
from rlhf.data.loading import DataRequest
from rlhf.models import conversations, encoding, facts, templates, turns, words
from rlhf.process import distributed, parallel, supervision
from rlhf.process.files import exclusive, folder_until_exit, json_object, sha256
from rlhf.types import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

LOG = logging.getLogger("rlhf.data")
FOLDER = ".encoded"  # in run.dir
ROWS_FILE, ABOUT_FILE, LOCK_FILE = "rows.arrow", "about.json", "lock"
CHUNK = 256  # rows that a process encodes at a time, and a batch of the file
_CODE = (conversations, encoding, templates, turns, words)  # of a file's content
_LIBRARIES = ("tokenizers", "transformers", "pyarrow")
_NUMBER = "_number"  # column: which of the given rows this one is
_JSON = json.JSONEncoder(default=repr)


class Encoder(Protocol):
    """Makes the columns of one row. Its options are its other fields, and belong to the file's
    name.
    """

    @property
    def tokenizer(self) -> Any: ...

    def options(self) -> dict[str, Any]:
        """What the columns depend on beside row and tokenizer, as JSON can hold it."""
        ...

    def columns(self) -> Mapping[str, str]:
        """Column -> kind: ids, count, number, flag or text."""
        ...

    def __call__(self, value: Any, counts: Counter[str]) -> dict[str, Any] | list[Any] | None:
        """The columns, of each row that it becomes; None where it is left out. What happened to
        rows is counted by name. Raises ValueError or UserError for one that can't be encoded.
        """
        ...


@dataclass(frozen=True, slots=True)
class Store:
    """Where encoded rows are kept. folder: None for a temporary one, which this process removes."""

    folder: Path | None = None
    max_bad_rows: int = 0  # rows that may be refused, and are then left out
    processes: int | None = None  # None: as many as the cores

    @classmethod
    def of(cls, request: DataRequest) -> "Store":
        """As ``data.cache`` and ``data.cache_dir`` say; a dry run keeps nothing."""
        data, folder = request.data, None
        if data.cache and data.cache_dir is not None:
            folder = Path(data.cache_dir).expanduser()
        elif data.cache and request.run_dir is not None:
            folder = request.run_dir.parent / FOLDER
        return cls(folder, data.max_bad_rows)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded rows, mapped from their file."""

    data: "datasets.Dataset"  # those that were kept
    numbers: list[int]  # of each, its place among the rows given
    counts: Counter[str]  # as the encoder counted
    bad: int  # rows that were refused, and left out


def encoded(encode: Encoder, records: Sequence[Record], store: Store, name: str) -> Encoded:
    """The rows of `records`, `name` in messages, as `encode` makes them. A collective. Raises
    UserError, naming file and row, where more than `store.max_bad_rows` rows can't be encoded.
    """
    looked_at: Iterable[Record] = records
    if distributed.is_main():
        looked_at = facts.telling_noticed(encode.tokenizer, records, LOG, name)
    key = content_key(encode, looked_at)
    if len(set(distributed.gather(key))) > 1:
        raise UserError(
            f"{name}: the ranks have different rows or tokenizers. Expected the same files of "
            "data.path, data.eval_path and model.path on every node."
        )
    folder = folder_until_exit("encoded") if store.folder is None else store.folder / key

    def work(beat: Callable[[], None]) -> None:
        if not _is_whole(folder) and _built_here(folder, encode, records, store, name, beat):
            return
        if distributed.is_main():
            LOG.info("%s: %d rows were encoded before: read from %s", name, len(records), folder)

    distributed.once_per_node(work, supervision.alive)
    if store.folder is None:
        folder = _of_this_node(folder)
    return _read(folder, records, store, name)


# ---- the name of a file ----


def content_key(encode: Encoder, records: Iterable[Record]) -> str:
    """A hash of what the encoded rows depend on, hexadecimal."""
    about = {
        "code": [sha256(Path(inspect.getfile(part))) for part in (*_CODE, type(encode))],
        "libraries": {name: version(name) for name in _LIBRARIES},
        "encoder": type(encode).__name__,
        "options": encode.options(),
        "columns": dict(encode.columns()),
        "tokenizer": facts.tokenizer_state(encode.tokenizer),
    }
    digest = hashlib.sha256(json.dumps(about).encode())
    for record in records:
        # the order of keys counts: templates show objects as they are
        digest.update(b"\n")
        digest.update(_JSON.encode(record.value).encode())
    return digest.hexdigest()[:40]


# ---- where files are ----


def _of_this_node(mine: Path) -> Path:
    """The temporary folder of the rank that has encoded for this node. A collective."""
    host = socket.gethostname()
    for other, rank, folder in distributed.gather((host, distributed.local_rank(), str(mine))):
        if other == host and rank == 0:
            return Path(folder)
    return mine


def _is_whole(folder: Path) -> bool:
    """Whether the rows are there as they were written. Warns of damaged ones."""
    rows, about = folder / ROWS_FILE, folder / ABOUT_FILE
    if not about.exists():
        return False
    try:
        known = json_object(about, "its rows are encoded anew")
        whole = rows.stat().st_size == known["bytes"] and sha256(rows) == known["sha256"]
    except (UserError, OSError, KeyError) as error:
        LOG.warning("%s: encoded anew: %s", folder, error)
        return False
    if not whole:
        LOG.warning("%s is damaged (not the bytes that were written): encoded anew", rows)
    return whole


def _read(folder: Path, records: Sequence[Record], store: Store, name: str) -> Encoded:
    """The rows of a file that is whole, mapped. Raises UserError for too many refused ones."""
    import datasets

    about = json_object(folder / ABOUT_FILE, "the encoded rows can't be read")
    bad = [(number, reason) for number, reason in about["bad"]]
    _refuse(bad, records, store)
    if bad and distributed.is_main():
        LOG.warning(
            "%s: %d rows can't be encoded and are left out (data.max_bad_rows=%d): %s",
            name,
            len(bad),
            store.max_bad_rows,
            "; ".join(f"{records[number].place}: {reason}" for number, reason in bad),
        )
    data = datasets.Dataset.from_file(str(folder / ROWS_FILE))
    numbers = data.data.column(_NUMBER).to_pylist()
    return Encoded(data.remove_columns(_NUMBER), numbers, Counter(about["counts"]), len(bad))


def _refuse(bad: Sequence[tuple[int, str]], records: Sequence[Record], store: Store) -> None:
    """Raises UserError for more bad rows than may be left out."""
    if len(bad) <= store.max_bad_rows:
        return
    number, reason = bad[-1]
    rest = ""
    if store.max_bad_rows:
        rest = (
            f" {len(bad)} rows can't be encoded, the first is {records[bad[0][0]].place}: "
            f"data.max_bad_rows={store.max_bad_rows} allows no more."
        )
    raise UserError(f"{records[number].place}: {reason}.{rest}")


# ---- writing a file ----


def _built_here(
    folder: Path,
    encode: Encoder,
    records: Sequence[Record],
    store: Store,
    name: str,
    beat: Callable[[], None],
) -> bool:
    """Encode the rows into `folder`, unless another process is at it: then that one is waited for.
    Returns whether this one has. Raises UserError as `_build`.
    """

    def waiting() -> None:
        supervision.alive()
        beat()

    about = folder / ABOUT_FILE
    before = about.stat().st_mtime_ns if about.exists() else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / LOCK_FILE, waiting) as alone:
            after = about.stat().st_mtime_ns if about.exists() else None
            if after != before and _is_whole(folder):
                return False
            if alone:  # what killed processes have left
                for left in folder.glob("*.tmp"):
                    left.unlink(missing_ok=True)
            _build(folder, encode, records, store, name, beat)
    except OSError as error:
        raise UserError(
            f"{folder}: the encoded rows can't be written ({error}). Make room, set "
            "data.cache_dir to another folder, or data.cache=false for a temporary one."
        ) from error
    return True


def _build(
    folder: Path,
    encode: Encoder,
    records: Sequence[Record],
    store: Store,
    name: str,
    beat: Callable[[], None],
) -> None:
    """Encode the rows into `folder`. Raises UserError as `encoded`, and OSError for a disk that
    takes no more.
    """
    began = time.perf_counter()
    beside = folder / f"{ROWS_FILE}.{os.getpid()}-{uuid.uuid4().hex}.tmp"
    try:
        counts, bad = _write(beside, encode, records, store, name, beat)
        about = {
            "rows": len(records),
            "bytes": beside.stat().st_size,
            "sha256": sha256(beside),
            "counts": dict(counts),
            "bad": bad,
        }
        os.replace(beside, folder / ROWS_FILE)
        beside.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, folder / ABOUT_FILE)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    if distributed.is_main():
        seconds = time.perf_counter() - began
        LOG.info("%s: %d rows encoded in %.1f s: %s", name, len(records), seconds, folder)


def _write(
    path: Path,
    encode: Encoder,
    records: Sequence[Record],
    store: Store,
    name: str,
    beat: Callable[[], None],
) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Write the Arrow file. Returns what was counted, and the refused rows with their reasons."""
    import pyarrow as pa

    counts: Counter[str] = Counter()
    bad: list[tuple[int, str]] = []
    done = 0
    schema = _schema(encode)
    starts = range(0, len(records), CHUNK)
    chunk_at = functools.partial(_encode_chunk, encode, records, schema)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
        _bar(len(records), f"encode {name}") as update,
    ):
        chunks = parallel.in_order(
            chunk_at, starts, pieces=len(starts), processes=store.processes, waiting=beat
        )
        for chunk in chunks:
            writer.write_batch(chunk.batch)
            counts.update(chunk.counts)
            bad += chunk.bad
            _refuse(bad[: store.max_bad_rows + 1], records, store)
            done += chunk.rows
            update(done)
            supervision.alive()  # also where other processes do the work
            beat()
    return counts, bad


def _schema(encode: Encoder) -> "pa.Schema":
    import pyarrow as pa

    kinds = {
        "ids": pa.list_(pa.int32()),
        "count": pa.int32(),
        "number": pa.float64(),
        "flag": pa.bool_(),
        "text": pa.string(),
    }
    fields = [(column, kinds[kind]) for column, kind in encode.columns().items()]
    return pa.schema([*fields, (_NUMBER, pa.int32())])


@contextmanager
def _bar(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A progress bar in the main rank's terminal; yields a function that takes the rows done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    if total <= CHUNK or not console.is_terminal or not distributed.is_main():
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as shown:
        task = shown.add_task(title, total=total)
        yield lambda done: shown.update(task, completed=done)


@dataclass(frozen=True, slots=True)
class _Chunk:
    batch: "pa.RecordBatch"
    rows: int  # given
    counts: Counter[str]
    bad: list[tuple[int, str]]  # number and reason


def _encode_chunk(
    encode: Encoder, records: Sequence[Record], schema: "pa.Schema", start: int
) -> _Chunk:
    """Encode CHUNK rows from the row `start` on."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    counts: Counter[str] = Counter()
    bad: list[tuple[int, str]] = []
    stop = min(start + CHUNK, len(records))
    for number, record in enumerate(records[start:stop], start):
        supervision.alive()
        try:
            made = encode(record.value, counts)
        except (ValueError, UserError) as error:
            bad.append((number, str(error).rstrip(".")))
            continue
        except Exception as error:
            error.add_note(f"while encoding {record.place}")
            raise
        if made is not None:
            for row in made if isinstance(made, list) else [made]:
                for name, values in columns.items():
                    values.append(number if name == _NUMBER else row[name])
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return _Chunk(pa.record_batch(arrays, schema=schema), stop - start, counts, bad)
