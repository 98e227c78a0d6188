"""Data files as what stages take: TRL data sets, preference pairs, tokenised prompts. Says aloud which format it detected.

A row that doesn't fit is rejected with its file, row number, key, what was expected and what was found; the run stops when more than
``data.max_bad_rows`` are, and the rejected rows lie in ``data_rejected.jsonl`` in the run directory either way.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.choices import DataFormat
from conf.schema import Config, DataConfig
from conf.stages import CPOStage, KTOStage, OfflineStage, ORPOStage, PreferenceStage, RewardStage
from rlhf import distributed
from rlhf.data import encoding
from rlhf.data.files import SourceRow, check_file, read_rows, scan
from rlhf.data.formats import Format, Use, by_name, detect, judging_key, nearest_format, texts_in
from rlhf.data.formats import reading as formats_for
from rlhf.data.rows import RowError, nearest
from rlhf.types import JudgedAnswer, PreferencePair, Prompt, UserError

__all__ = [
    "check_first_rows",
    "judged_answers",
    "preference_dataset",
    "preference_pairs",
    "prompts",
    "read_rows",
    "sft_dataset",
    "sft_rows",
    "stage_texts",
    "unpaired_dataset",
    "use_of",
]

LOG = logging.getLogger("rlhf.data")
REJECTED_FILE = "data_rejected.jsonl"
_SHOWN = 3  # rejected rows quoted in an error
_PROBE = 20  # first rows among which the format is looked for
_USES = {
    Use.sft: "texts or prompts with completions",
    Use.preference: "pairs of a chosen and a rejected answer",
    Use.unpaired: "answers judged good or bad, or pairs of a chosen and a rejected answer",
    Use.prompt: "prompts",
}
_OF_PAIRS = (RewardStage, PreferenceStage, CPOStage, ORPOStage)


@dataclass(frozen=True, slots=True)
class Record:
    """A row that fits: its number, what it was turned into, and the columns that a prompt is not made of."""

    number: int
    value: Any
    fields: dict[str, Any]


@dataclass(slots=True)
class Loaded:
    """A file's rows in the form of one use."""

    path: Path
    format: Format
    records: list[Record] = field(default_factory=list)
    rejected: list[tuple[SourceRow, str]] = field(default_factory=list)

    def values(self) -> list[Any]:
        return [r.value for r in self.records]


def use_of(cfg: Config) -> Use:
    """What ``data.path`` is to the configured stage."""
    if isinstance(cfg.stage, _OF_PAIRS):
        return Use.preference
    if isinstance(cfg.stage, KTOStage):
        return Use.unpaired
    return Use.sft if isinstance(cfg.stage, OfflineStage) else Use.prompt


def choose_format(path: Path, rows: Sequence[SourceRow], use: Use, data: DataConfig) -> Format:
    """``data.format``, or the first format for `use` that one of the first rows shows.

    Raises UserError: a format that the use can't take; columns that fit none, with the nearest format and what it lacks.
    """
    if data.format is not DataFormat.auto:
        chosen = by_name(data.format.value)
        if chosen.converter(use) is None:
            names = ", ".join(f.name for f in formats_for(use))
            raise UserError(f"data.format={chosen.name} can't be read as {_USES[use]}. Formats that can: {names}.")
        return chosen
    readable = [r for r in rows if r.problem is None]
    for row in readable:
        found = detect(row.columns, use)
        if found is not None:
            mark = judging_key(row.columns)
            if use is Use.sft and mark is not None:
                raise UserError(
                    f"{path}, row {row.number}: the column {mark!r} judges each answer, so this is an unpaired preference file: SFT would also "
                    f"learn the bad answers. Keep the good rows in a file of their own, or set data.format={found.name} to train on all of them."
                )
            return found
    if not readable:
        row = rows[0]
        raise UserError(f"{path}, row {row.number}: {row.problem}.")
    first = readable[0]
    other = detect(first.columns)
    found_keys = ", ".join(map(str, first.columns)) or "none"
    if other is not None and other.name == "text" and use is Use.prompt:
        raise UserError(f"{path}: a file of whole texts (column 'text') can't be prompts: expected a column 'prompt' with the text to continue.")
    closest, missing = nearest_format(first.columns, use)
    near = nearest(missing, [str(k) for k in first.columns])
    what = "fit no format" if other is None else f"are format {other.name}"
    raise UserError(
        f"{path}, row {first.number}: expected {_USES[use]}, but its keys ({found_keys}) {what}. "
        f"Nearest format: {closest.name} ({closest.columns}), which needs the key {missing!r}{f' (nearest key found: {near!r})' if near else ''}. "
        f"All formats that can be read so: {', '.join(f.name for f in formats_for(use))}."
    )


def _shape(value: Any) -> str:
    """Text or conversations: what every row of a file must have in common."""
    part = value.chosen if isinstance(value, PreferencePair) else value.completion if isinstance(value, JudgedAnswer) else value
    if isinstance(part, dict):
        part = next(iter(part.values()))
    return "messages" if isinstance(part, list) else "text"


def convert(path: Path, rows: Iterable[SourceRow], format_: Format, use: Use) -> Loaded:
    """Turn rows into records of `use`; rows that don't fit are kept apart with their reason."""
    converter = format_.converter(use)
    assert converter is not None
    out = Loaded(path, format_)
    shape: tuple[str, int] | None = None
    for row in rows:
        if row.problem is not None:
            out.rejected.append((row, row.problem))
            continue
        try:
            value = converter(row.columns)
        except RowError as error:
            out.rejected.append((row, str(error)))
            continue
        found = _shape(value)
        shape = shape or (found, row.number)
        if found != shape[0]:
            out.rejected.append((row, f"expected {shape[0]} as in row {shape[1]}, found {found}"))
            continue
        out.records.append(Record(row.number, value, {k: v for k, v in row.columns.items() if k not in format_.consumed}))
    return out


def load(cfg: Config, path: str, use: Use, key: str) -> Loaded:
    """Read a whole file for `use`. Raises UserError for the file, and when more than ``data.max_bad_rows`` rows don't fit."""
    data = cfg.data
    rows = list(scan(path, data.max_rows, key))
    if not rows:
        raise UserError(f"{key}={path} holds no rows: expected {_USES[use]}.")
    place = Path(path).expanduser()
    loaded = convert(place, rows, choose_format(place, rows[: _PROBE + data.max_bad_rows], use, data), use)
    if loaded.rejected:
        kept = write_rejected(cfg, loaded)
        reasons = "; ".join(f"row {row.number}: {reason}" for row, reason in loaded.rejected[:_SHOWN])
        more = f"; and {len(loaded.rejected) - _SHOWN} more" if len(loaded.rejected) > _SHOWN else ""
        wanted = f"{loaded.format.name} ({loaded.format.columns})"
        said = f"{place}: {len(loaded.rejected)} of {len(rows)} rows don't fit format {wanted}: {reasons}{more}."
        if len(loaded.rejected) > data.max_bad_rows:
            raise UserError(f"{said} data.max_bad_rows={data.max_bad_rows} allows no more. Rejected rows: {kept}.")
        LOG.warning("%s They are left out and kept in %s.", said, kept)
    if not loaded.records:
        raise UserError(f"{key}={path} holds no row that fits: expected {_USES[use]}.")
    if distributed.is_main():
        LOG.info("%s: %d rows, read as %s (%s)", place, len(loaded.records), loaded.format.name, loaded.format.columns)
    return loaded


def write_rejected(cfg: Config, loaded: Loaded) -> Path:
    """Keep rejected rows: in the run directory where it exists, else beside it. Rows of an earlier read of the same file are replaced."""
    folder = Path(cfg.run.dir).expanduser() / cfg.run.name
    if (folder / cfg.stage.name).is_dir():
        folder = folder / cfg.stage.name
    path = folder / REJECTED_FILE
    if not distributed.is_main():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    source = str(loaded.path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["file"] != source]
    for row, reason in loaded.rejected:
        content = row.columns if row.problem is None else row.raw
        lines.append(json.dumps({"file": source, "row": row.number, "reason": reason, "content": content}, ensure_ascii=False, default=str))
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.replace(path)
    return path


def check_first_rows(cfg: Config, path: str, use: Use, key: str) -> None:
    """For preflight: the file is there, not empty, and its first rows have a format that fits. Raises UserError."""
    loaded = _first_rows(cfg, path, use, key)
    if len(loaded.rejected) > cfg.data.max_bad_rows:
        row, reason = loaded.rejected[0]
        raise UserError(f"{loaded.path}, row {row.number}: {reason} (read as format {loaded.format.name}: {loaded.format.columns}).")


def first_fields(cfg: Config, path: str, use: Use, key: str) -> list[tuple[str, dict[str, Any]]]:
    """For preflight: (place, columns beside the prompt) of the first rows that fit. Raises UserError as `check_first_rows`."""
    loaded = _first_rows(cfg, path, use, key)
    return [(f"{loaded.path}, row {record.number}", record.fields) for record in loaded.records]


def _first_rows(cfg: Config, path: str, use: Use, key: str) -> Loaded:
    place = check_file(path, key)
    rows = list(scan(path, _PROBE + cfg.data.max_bad_rows, key))
    if not rows:
        raise UserError(f"{key}={path} holds no rows: expected {_USES[use]}.")
    return convert(place, rows, choose_format(place, rows, use, cfg.data), use)


def check_first_margin(cfg: Config) -> None:
    """For preflight: the first row that fits has the margin that ``stage.margin=true`` needs. Raises UserError."""
    path = Path(required_path(cfg)).expanduser()
    rows = list(scan(path, _PROBE + cfg.data.max_bad_rows))
    _require_margins(convert(path, rows, choose_format(path, rows, Use.preference, cfg.data), Use.preference))


def _require_margins(loaded: Loaded) -> None:
    lacking = next((r for r in loaded.records if r.value.margin is None), None)
    if lacking is not None:
        raise UserError(
            f"{loaded.path}, row {lacking.number}: stage.margin=true, but the row has no margin: "
            "expected a column 'margin' (or score_chosen and score_rejected)."
        )


def required_path(cfg: Config) -> str:
    """``data.path``. Raises UserError when it isn't set."""
    if cfg.data.path is None:
        names = ", ".join(f.name for f in formats_for(use_of(cfg)))
        raise UserError(f"data.path is not set: stage={cfg.stage.name} needs a file of {_USES[use_of(cfg)]} (formats: {names}).")
    return cfg.data.path


def stable_hash(value: Any) -> str:
    """16 hexadecimal digits that depend on a prompt's content alone."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def split_rows(groups: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and held-out rows: whole groups (rows of one prompt) are drawn until `fraction` of the rows are held out.

    At least one group is on each side; a single group gives an empty second list.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        return list(range(len(groups))), []
    random.Random(f"{seed}:eval").shuffle(names)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    held: list[int] = []
    for name in names[:-1]:
        if held and len(held) >= fraction * len(groups):
            break
        held.extend(members[name])
    out = set(held)
    return [i for i in range(len(groups)) if i not in out], sorted(held)


def _train_and_eval(cfg: Config, use: Use, group: Callable[[Any], Any]) -> tuple[Loaded, Loaded]:
    """Training and held-out records: ``data.eval_path``, or a share of ``data.path`` drawn by ``run.seed``."""
    train = load(cfg, required_path(cfg), use, "data.path")
    if cfg.data.eval_path is not None:
        return train, load(cfg, cfg.data.eval_path, use, "data.eval_path")
    return _split(train, [stable_hash(group(r.value)) for r in train.records], cfg)


def _split(loaded: Loaded, groups: Sequence[str], cfg: Config) -> tuple[Loaded, Loaded]:
    kept, held = split_rows(groups, cfg.data.eval_fraction, cfg.run.seed)
    records = loaded.records
    return replace(loaded, records=[records[i] for i in kept]), replace(loaded, records=[records[i] for i in held])


def _require_eval(held: Loaded, cfg: Config) -> None:
    if not held.records:
        raise UserError(f"data.path={cfg.data.path}: all its rows have one prompt, so none can be held out. Give a second file as data.eval_path.")


def sft_rows(cfg: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows in TRL's columns: text, prompt and completion, or messages. Raises UserError."""

    def group(row: dict[str, Any]) -> Any:
        return row.get("prompt", row)

    train, held = _train_and_eval(cfg, Use.sft, group)
    if not held.records:  # one prompt in all rows, as in instruction data with a fixed instruction: then rows are held out
        train, held = _split(train, [str(r.number) for r in train.records], cfg)
    _require_eval(held, cfg)
    return train.values(), held.values()


def preference_pairs(cfg: Config) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Training and held-out pairs; pairs of one prompt (or one chosen text, without prompts) stay on one side. Raises UserError."""

    def group(pair: PreferencePair) -> Any:
        return pair.prompt or pair.chosen

    train, held = _train_and_eval(cfg, Use.preference, group)
    _require_eval(held, cfg)
    if isinstance(cfg.stage, RewardStage) and cfg.stage.margin:
        _require_margins(train)
        _require_margins(held)
    return train.values(), held.values()


def judged_answers(cfg: Config) -> tuple[list[JudgedAnswer], list[JudgedAnswer]]:
    """Training and held-out answers, a pair as its two sides; answers to one prompt stay on one side. Raises UserError."""

    def group(value: JudgedAnswer | PreferencePair) -> Any:
        return value.prompt or (value.chosen if isinstance(value, PreferencePair) else value.completion)

    def single(value: JudgedAnswer | PreferencePair) -> list[JudgedAnswer]:
        if isinstance(value, JudgedAnswer):
            return [value]
        return [JudgedAnswer(value.prompt, value.chosen, True), JudgedAnswer(value.prompt, value.rejected, False)]

    train, held = _train_and_eval(cfg, Use.unpaired, group)
    _require_eval(held, cfg)
    answers = [a for value in train.values() for a in single(value)]
    labels = {answer.good for answer in answers}
    if len(labels) == 1:
        found = "good" if labels == {True} else "bad"
        raise UserError(f"{train.path}: each of its {len(answers)} training answers is judged {found}: expected good ones and bad ones.")
    return answers, [a for value in held.values() for a in single(value)]


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def sft_dataset(cfg: Config) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset in TRL's SFT columns; strings or lists of messages. Raises UserError."""
    train, held = sft_rows(cfg)
    return _dataset(train), _dataset(held)


def preference_dataset(cfg: Config) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset: chosen, rejected, prompt where the rows have one, margin where every row has one. Raises UserError."""
    train, held = preference_pairs(cfg)
    both = [*train, *held]
    with_prompt = any(pair.prompt for pair in both)
    with_margin = all(pair.margin is not None for pair in both)

    def row(pair: PreferencePair) -> dict[str, Any]:
        return {
            **({"prompt": pair.prompt} if with_prompt else {}),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            **({"margin": pair.margin} if with_margin else {}),
        }

    return _dataset([row(p) for p in train]), _dataset([row(p) for p in held])


def unpaired_dataset(cfg: Config) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset: completion, label, prompt where the rows have one. Raises UserError."""
    train, held = judged_answers(cfg)
    with_prompt = any(answer.prompt for answer in [*train, *held])

    def row(answer: JudgedAnswer) -> dict[str, Any]:
        return {**({"prompt": answer.prompt} if with_prompt else {}), "completion": answer.completion, "label": answer.good}

    return _dataset([row(a) for a in train]), _dataset([row(a) for a in held])


def _tokenise(tokenizer: Any, loaded: Loaded, data: DataConfig) -> list[Prompt]:
    """Records as prompts of at most ``data.max_prompt_length`` tokens. Raises UserError naming the longest row otherwise."""
    limit, out, long = data.max_prompt_length, [], []
    for record in loaded.records:
        ids = encoding.prompt_ids(tokenizer, record.value)
        if not ids:
            raise UserError(f"{loaded.path}, row {record.number}: the prompt has no tokens, so there is nothing to continue.")
        cut = len(ids) > limit
        if cut:
            long.append((len(ids), record.number))
            ids = ids[-limit:]
        text = record.value if isinstance(record.value, str) and not cut else tokenizer.decode(ids)
        out.append(Prompt(id=stable_hash(record.value), text=text, token_ids=tuple(ids), source=record.value, fields=record.fields))
    if long and not data.truncate_prompts:
        tokens, number = max(long)
        raise UserError(
            f"{loaded.path}: {len(long)} of {len(out)} prompts are longer than data.max_prompt_length={limit} tokens; the longest is row {number} "
            f"with {tokens}. Raise data.max_prompt_length, or set data.truncate_prompts=true to keep each prompt's last tokens."
        )
    return out


def prompts(cfg: Config, tokenizer: Any, split: str = "train") -> list[Prompt]:
    """The training or held-out prompts (`split`: train, eval), tokenised for the policy.

    Texts get the special tokens that the tokenizer adds by itself; conversations go through its chat template with the generation prompt.
    With one prompt only and no ``data.eval_path`` that prompt trains, and asking for held-out ones raises UserError.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: expected train or eval")
    train, held = _train_and_eval(cfg, Use.prompt, lambda prompt: prompt)
    if split == "eval":
        _require_eval(held, cfg)
    chosen = train if split == "train" else held
    if isinstance(chosen.records[0].value, list):
        encoding.require_template(tokenizer, str(chosen.path))
    return _tokenise(tokenizer, chosen, cfg.data)


def stage_texts(cfg: Config) -> Iterable[str]:
    """Every text in the rows of ``data.path``, as the stage reads them: what a tiny model's tokenizer is trained on."""
    for record in load(cfg, required_path(cfg), use_of(cfg), "data.path").records:
        yield from texts_in(record.value)
