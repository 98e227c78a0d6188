"""What stage=data writes: train.jsonl and eval.jsonl, the same rows in other formats (data.to), and
each step as a line of metrics and of a table.
"""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.choices import FileKind
from conf.data import DataFormat, DataTarget
from conf.schema import DataConfig
from rlhf.data.converting import choose_format
from rlhf.data.files import SourceRow
from rlhf.data.formats import Use
from rlhf.data.prepare import store
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.store import StepReport
from rlhf.data.writing import file_kind, write_items
from rlhf.process import supervision
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")
SPLITS = ("train", "eval")
# the stage that prepared rows are for
_NEXT = {Use.sft: "sft", Use.preference: "reward", Use.unpaired: "kto", Use.prompt: "ppo"}
_EXAMPLES = 1000  # sets of columns that are looked at
_SHOWN = 3  # reasons of a step in the table


class Outputs:
    """train.jsonl and eval.jsonl in `folder`, which get their names when all rows are written."""

    def __init__(self, folder: Path) -> None:
        self._paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
        self._beside = {split: folder / f"{split}.jsonl.tmp" for split in SPLITS}
        self._files = {split: self._beside[split].open("w", encoding="utf-8") for split in SPLITS}
        self.rows = dict.fromkeys(SPLITS, 0)
        self._examples: dict[tuple[str, ...], dict[str, Any]] = {}  # by columns that hold something

    def write(self, item: Item) -> None:
        """Add a row to the file of its split."""
        self._files[item.split].write(store.columns_line(item))
        self.rows[item.split] += 1
        held = tuple(key for key, value in item.columns.items() if value not in (None, "", []))
        if held not in self._examples and len(self._examples) <= _EXAMPLES:
            self._examples[held] = item.columns

    @property
    def examples(self) -> list[dict[str, Any]]:
        """A row for each set of columns that hold something, up to a thousand."""
        return list(self._examples.values())

    def written(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, each of which is written as it passes."""
        for item in items:
            self.write(item)
            yield item

    def abandon(self) -> None:
        """The run fails: no half-written file stays."""
        for split, beside in self._beside.items():
            self._files[split].close()
            beside.unlink()

    def close(self, *, held_out: bool) -> dict[str, Path]:
        """The files by split; eval.jsonl only where rows are held out."""
        out = {}
        for split, path in self._paths.items():
            self._files[split].close()
            if split == "train" or held_out:
                self._beside[split].replace(path)
                out[split] = path
            else:
                self._beside[split].unlink()
                path.unlink(missing_ok=True)
        return out


def written_rows(path: Path) -> Iterator[Item]:
    """The rows of a file that the stage wrote."""
    with path.open(encoding="utf-8") as source:
        for number, text in enumerate(source, start=1):
            supervision.alive()
            yield Item(json.loads(text), str(path), number)


def next_command(
    kind: Use, files: Mapping[str, Path], data: DataConfig, examples: Sequence[Mapping[str, Any]]
) -> str:
    """A command that trains on what was written, of which `examples` have all columns: it names the
    format where another would be recognised by the rows' own columns, or one of them would be
    missed, and the options that the rows go on to need.
    """
    train = files["train"]
    arguments = [f"stage={_NEXT[kind]}", f"data.path={train}"]
    if "eval" in files:
        arguments.append(f"data.eval_path={files['eval']}")
    written = _format_of(kind, examples[0])
    if len(examples) > _EXAMPLES or not all(_read_as(written, row, kind) for row in examples):
        arguments.append(f"data.format={written}")
    if data.chat_template is not None:
        arguments.append(f"data.chat_template={data.chat_template}")
    weight = data.weight_column
    weighted = sum(row.get(weight) is not None for row in examples) if weight else 0
    if weight and kind is not Use.prompt and 0 < weighted < len(examples):
        LOG.warning(
            "%s: some rows have a weight (column %r), others have none: the next command leaves "
            "weights out (data.weight_column=null).",
            train,
            weight,
        )
        arguments.append("data.weight_column=null")
    elif weight not in (None, DataConfig().weight_column):
        arguments.append(f"data.weight_column={weight}")
    return f"python -m rlhf {shlex.join(arguments)}"


def _read_as(name: str, columns: Mapping[str, Any], kind: Use) -> bool:
    """Whether a row is read as the format `name` by its own columns, and whole."""
    row = SourceRow(1, dict(columns))
    try:
        return choose_format("", [row], kind, DataFormat.auto).name == name
    except UserError:
        return False


def _format_of(kind: Use, columns: Mapping[str, Any]) -> str:
    """The format of the toolkit's own columns."""
    if kind is not Use.sft:
        return kind.value
    layout = [key for key in ("text", "messages") if key in columns]
    return layout[0] if layout else "prompt_completion"


def write_targets(
    data: DataConfig, kind: Use, files: Mapping[str, Path], folder: Path
) -> dict[str, Path]:
    """The files of data.to and data.file, beside those that stages read. What a row loses in them
    is logged; rows that the format can't hold are added to the rejected rows.
    """
    to, container = data.to, file_kind(data.to, data.file)
    if to is DataTarget.trl and container is FileKind.jsonl:
        return {}
    out: dict[str, Path] = {}
    with files["rejected"].open("a", encoding="utf-8") as rejected:

        def leave_out(item: Item, reason: str) -> None:
            step = f"to {to.value}"
            row = store.rejected_row(step, reason, item.origin, item.number, item.columns)
            rejected.write(store.line(row))

        for split in SPLITS:
            if split not in files:
                continue
            target = folder / f"{split}.{to.value}.{container.value}"
            rows = written_rows(files[split])
            written = write_items(rows, kind, to, target, leave_out, data.file)
            for note, count in written.notes.most_common():
                LOG.warning("%s: %d rows: %s.", target.name, count, note)
            out[f"{split} as {to.value}"] = target
    return out


def step_metrics(report: StepReport) -> dict[str, float]:
    """A step's line of metrics.jsonl: its counts, its time, and those of its own figures that are
    numbers.
    """
    numbers = {
        name: value
        for name, value in report.figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    own = {f"{report.step}/{name}": value for name, value in numbers.items()}
    counts = {
        "data/rows_in": report.rows_in,
        "data/rows_out": report.rows_out,
        "data/rejected": report.rejected,
        "data/reused": int(report.reused),
    }
    return {**counts, "time/step_s": report.seconds, **own}


def table_row(report: StepReport) -> dict[str, Any]:
    """A step's line of the terminal's table."""
    reasons = sorted(report.reasons.items(), key=lambda pair: -pair[1])
    shown = [f"{count} {reason}" for reason, count in reasons[:_SHOWN]]
    if len(reasons) > _SHOWN:
        shown.append(f"{len(reasons) - _SHOWN} more reasons")
    return {
        "step": report.step,
        "in": report.rows_in,
        "out": report.rows_out,
        "left out": report.rejected,
        "seconds": "kept" if report.reused else f"{report.seconds:.1f}",
        "why": "; ".join(shown),
    }
