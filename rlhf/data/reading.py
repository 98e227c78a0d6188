"""Data files as what stages take: TRL data sets, preference pairs, tokenised prompts. Says aloud
which format it detected.

A row that doesn't fit is rejected with its file, row number, key, what was expected and what was
found; the run stops when more than ``data.max_bad_rows`` are, and the rejected rows lie in
``data_rejected.jsonl`` in the run directory either way. So do judgements that give no pair (ties,
skips), which fit and are counted apart.
"""

import hashlib
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from conf.schema import Config, DataConfig
from conf.stages import CPOStage, KTOStage, OfflineStage, ORPOStage, PreferenceStage, RewardStage
from rlhf.data.converting import PROBE, USES, Conversion, Record
from rlhf.data.files import SourceRow, read_rows
from rlhf.data.formats import Format, Use, texts_in
from rlhf.data.formats import reading as formats_for
from rlhf.data.formats.base import both_sides
from rlhf.data.mixture import Source, mixed
from rlhf.data.sources import eval_sources, given, train_sources
from rlhf.models import encoding
from rlhf.process import distributed
from rlhf.process.wording import describe
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
SOFT_LABEL = "soft_label"  # column
_SHOWN = 3  # rejected rows quoted in an error
_OF_PAIRS = (RewardStage, PreferenceStage, CPOStage, ORPOStage)


@dataclass(slots=True)
class Loaded:
    """All rows of one side (training, held out) in the form of one use."""

    place: str  # for messages: the file, or the option
    rows: int = 0  # of the files, fitting or not
    formats: dict[str, Format] = field(default_factory=dict)  # by file
    records: list[Record] = field(default_factory=list)
    rejected: list[tuple[SourceRow, str]] = field(default_factory=list)
    aside: list[tuple[SourceRow, str]] = field(default_factory=list)

    def values(self) -> list[Any]:
        return [r.value for r in self.records]

    def quote(self, rows: Sequence[tuple[SourceRow, str]]) -> str:
        """The first few rows with their reasons, for a message."""
        several = len(self.formats) > 1
        reasons = "; ".join(
            f"{row.place if several else f'row {row.number}'}: {reason}"
            for row, reason in rows[:_SHOWN]
        )
        return f"{reasons}{f'; and {len(rows) - _SHOWN} more' if len(rows) > _SHOWN else ''}"

    def layout(self) -> str:
        """The formats that the files have, for a message."""
        return " and ".join(dict.fromkeys(f"{f.name} ({f.columns})" for f in self.formats.values()))


def use_of(cfg: Config) -> Use:
    """What ``data.path`` is to the configured stage."""
    if isinstance(cfg.stage, _OF_PAIRS):
        return Use.preference
    if isinstance(cfg.stage, KTOStage):
        return Use.unpaired
    return Use.sft if isinstance(cfg.stage, OfflineStage) else Use.prompt


def _convert(sources: Sequence[Source], use: Use, cfg: Config, max_rows: int | None) -> Loaded:
    """Read rows and turn them into records of `use`; those that don't fit, and ties, are kept apart
    with their reasons.
    """
    names = [part.origin for source in sources for part in source.parts]
    out = Loaded(
        names[0]
        if len(names) == 1
        else sources[0].name
        if len(sources) == 1
        else ", ".join(source.name for source in sources)
    )
    conversion = Conversion(
        use,
        sources,
        rejected=lambda row, reason: out.rejected.append((row, reason)),
        aside=lambda row, reason: out.aside.append((row, reason)),
        probe=PROBE + cfg.data.max_bad_rows,
    )
    for row in islice(mixed(sources, cfg.run.seed), max_rows):
        out.rows += 1
        out.records.extend(conversion.records(row))
    out.formats = conversion.formats
    if not out.rows:
        raise UserError(f"{sources[0].key}={sources[0].name} holds no rows: expected {USES[use]}.")
    return out


def load(cfg: Config, sources: Sequence[Source], use: Use) -> Loaded:
    """Read whole files for `use`. Raises UserError for a file, and when more than
    ``data.max_bad_rows`` rows don't fit.
    """
    for note in (note for source in sources for note in source.notes):
        if distributed.is_main():
            LOG.info(note)
    loaded = _convert(sources, use, cfg, cfg.data.max_rows)
    # a dry run leaves nothing behind
    kept = (
        None
        if cfg.run.dry_run or not (loaded.rejected or loaded.aside)
        else write_rejected(cfg, loaded)
    )
    if loaded.aside:
        LOG.warning(
            "%s: %d judgements give no pair and are set aside in %s: %s.",
            loaded.place,
            len(loaded.aside),
            kept,
            loaded.quote(loaded.aside),
        )
    if loaded.rejected:
        said = (
            f"{loaded.place}: {len(loaded.rejected)} of {loaded.rows} rows don't fit format "
            f"{loaded.layout()}: {loaded.quote(loaded.rejected)}."
        )
        if len(loaded.rejected) > cfg.data.max_bad_rows:
            raise UserError(
                f"{said} data.max_bad_rows={cfg.data.max_bad_rows} allows no more. Rejected "
                f"rows: {kept}."
            )
        LOG.warning("%s They are left out and kept in %s.", said, kept)
    if not loaded.records:
        raise UserError(
            f"{sources[0].key}={sources[0].name} holds no row that fits: expected {USES[use]}."
        )
    if distributed.is_main():
        counts = Counter(record.origin for record in loaded.records)
        for origin, format_ in loaded.formats.items():
            LOG.info(
                "%s: %d rows, read as %s (%s)",
                origin,
                counts[origin],
                format_.name,
                format_.columns,
            )
    return with_soft_labels(with_weights(loaded, cfg, use), cfg)


def with_weights(loaded: Loaded, cfg: Config, use: Use) -> Loaded:
    """`loaded` with each row's ``data.weight_column`` in its value, where the rows have that
    column; said aloud, used or not.

    Raises UserError for a row that lacks a weight, or has one that is no finite number of at least
    0, and for weights that are all 0.
    """
    column = cfg.data.weight_column
    if column is None or not any(column in record.fields for record in loaded.records):
        return loaded
    if use is Use.prompt or not isinstance(cfg.stage, OfflineStage):
        if use is Use.prompt and distributed.is_main():
            LOG.warning(
                "%s: the column %r weighs no prompt: stage=%s has no loss that takes it",
                loaded.place,
                column,
                cfg.stage.name,
            )
        return loaded
    weights = [_weight(record, column) for record in loaded.records]
    if not any(weights):
        raise UserError(
            f"{loaded.place}: column {column!r}: every weight is 0, so nothing would be trained."
        )
    if distributed.is_main():
        LOG.info(
            "%s: the column %r weighs the rows in the loss, from %g to %g",
            loaded.place,
            column,
            min(weights),
            max(weights),
        )
    records = [
        replace(record, value=_weighed(record.value, weight))
        for record, weight in zip(loaded.records, weights, strict=True)
    ]
    return replace(loaded, records=records)


def _weight(record: Record, column: str) -> float:
    remedy = "Set data.weight_column=null if the column means something else."
    return _number(record, column, lambda weight: weight >= 0, "a weight of at least 0", remedy)


def _number(
    record: Record, column: str, fits: Callable[[float], bool], expected: str, remedy: str
) -> float:
    """A finite number, also as a table's text. Raises UserError."""
    value = record.fields.get(column)
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and fits(number)):
        found = (
            describe(value) if column in record.fields else "no such column, which other rows have"
        )
        raise UserError(
            f"{record.place}: column {column!r}: expected {expected}, found {found}. {remedy}"
        )
    return number


def _weighed(value: Any, weight: float) -> Any:
    return {**value, "weight": weight} if isinstance(value, dict) else replace(value, weight=weight)


def with_soft_labels(loaded: Loaded, cfg: Config) -> Loaded:
    """`loaded` with each row's column soft_label in its value, where ``stage.soft_label=true`` asks
    for it; said aloud where nobody asks.

    Raises UserError for a row that lacks one, or has one that is no probability.
    """
    if not isinstance(cfg.stage, RewardStage):
        return loaded
    if not cfg.stage.soft_label:
        if any(SOFT_LABEL in record.fields for record in loaded.records) and distributed.is_main():
            LOG.warning(
                "%s: the column %r is not read, each chosen answer counts as better: "
                "stage.soft_label=true reads it",
                loaded.place,
                SOFT_LABEL,
            )
        return loaded
    labels = [_soft_label(record) for record in loaded.records]
    if distributed.is_main():
        ties = sum(label == 0.5 for label in labels)
        LOG.info(
            "%s: soft labels from %g to %g, %d of %d are ties",
            loaded.place,
            min(labels),
            max(labels),
            ties,
            len(labels),
        )
    return replace(
        loaded,
        records=[
            replace(r, value=replace(r.value, soft_label=p))
            for r, p in zip(loaded.records, labels, strict=True)
        ],
    )


def _soft_label(record: Record) -> float:
    if SOFT_LABEL not in record.fields:
        raise UserError(
            f"{record.place}: stage.soft_label=true, but the row has no column {SOFT_LABEL!r}: "
            "expected the probability that chosen is better "
            "(stage=label label.mode=import label.strength=soft_label writes it). Set "
            "stage.soft_label=false to take every chosen answer as better."
        )
    remedy = "It is the probability that chosen is better; 0.5 is a tie."
    return _number(record, SOFT_LABEL, lambda p: 0 <= p <= 1, "a probability from 0 to 1", remedy)


def write_rejected(cfg: Config, loaded: Loaded) -> Path:
    """Keep rejected rows: in the run directory where it exists, else beside it. Rows of an earlier
    read of the same files are replaced.
    """
    folder = Path(cfg.run.dir).expanduser() / cfg.run.name
    if (folder / cfg.stage.name).is_dir():
        folder = folder / cfg.stage.name
    path = folder / REJECTED_FILE
    if not distributed.is_main():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # a text may hold other line ends
    lines = (
        [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        if path.exists()
        else []
    )
    lines = [line for line in lines if json.loads(line)["file"] not in loaded.formats]
    for set_aside, rows in ((False, loaded.rejected), (True, loaded.aside)):
        for row, reason in rows:
            content = row.columns if row.problem is None else row.raw
            entry = {
                "file": row.origin,
                "row": row.number,
                "reason": reason,
                "set_aside": set_aside,
                "content": content,
            }
            lines.append(json.dumps(entry, ensure_ascii=False, default=str))
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.replace(path)
    return path


def _sides(cfg: Config) -> list[list[Source]]:
    return [sources for sources in (train_sources(cfg.data), eval_sources(cfg.data)) if sources]


def check_first_rows(cfg: Config, use: Use) -> None:
    """For preflight: each file is there, not empty, and its first rows have a format that fits.
    Raises UserError.
    """
    for sources in _sides(cfg):
        check_sources(cfg, sources, use)


def check_sources(cfg: Config, sources: Sequence[Source], use: Use) -> None:
    """For preflight: `check_first_rows` of these files. Raises UserError."""
    for loaded in _first_rows(cfg, sources, use):
        if len(loaded.rejected) > cfg.data.max_bad_rows:
            row, reason = loaded.rejected[0]
            raise UserError(f"{row.place}: {reason} (read as format {loaded.layout()}).")


def first_fields(cfg: Config, use: Use) -> list[tuple[str, dict[str, Any]]]:
    """For preflight: (place, columns beside the prompt) of each file's first rows that fit. Raises
    UserError as `check_first_rows`.
    """
    firsts = [loaded for sources in _sides(cfg) for loaded in _first_rows(cfg, sources, use)]
    return [(record.place, record.fields) for loaded in firsts for record in loaded.records]


def _first_rows(cfg: Config, sources: Sequence[Source], use: Use) -> list[Loaded]:
    """The first rows of each file by itself."""
    alone = [
        replace(source, parts=(part,), cap=None, weight=None)
        for source in sources
        for part in source.parts
    ]
    return [_convert([source], use, cfg, PROBE + cfg.data.max_bad_rows) for source in alone]


def check_first_strength(cfg: Config) -> None:
    """For preflight: the first rows that fit have what ``stage.margin=true`` or
    ``stage.soft_label=true`` needs. Raises UserError.
    """
    for sources in _sides(cfg):
        for loaded in _first_rows(cfg, sources, Use.preference):
            if cfg.stage.margin:
                _require_margins(loaded)
            for record in loaded.records if cfg.stage.soft_label else ():
                _soft_label(record)


def _require_margins(loaded: Loaded) -> None:
    lacking = next((r for r in loaded.records if r.value.margin is None), None)
    if lacking is not None:
        raise UserError(
            f"{lacking.place}: stage.margin=true, but the row has no margin: expected a column "
            "'margin' (or score_chosen and score_rejected)."
        )


def required_sources(cfg: Config) -> list[Source]:
    """The training rows' sources. Raises UserError when none is set."""
    sources = train_sources(cfg.data)
    if not sources:
        names = ", ".join(f.name for f in formats_for(use_of(cfg)))
        raise UserError(
            f"data.path is not set: stage={cfg.stage.name} needs a file of {USES[use_of(cfg)]} "
            f"(formats: {names})."
        )
    return sources


def stable_hash(value: Any) -> str:
    """16 hexadecimal digits that depend on a prompt's content alone."""
    return hashlib.sha256(
        json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    ).hexdigest()[:16]


def split_rows(groups: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and held-out rows: whole groups (rows of one prompt) are drawn until
    `fraction` of the rows are held out.

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
    """Training and held-out records: ``data.eval_path``, or a share of ``data.path`` drawn by
    ``run.seed``.
    """
    train = load(cfg, required_sources(cfg), use)
    if cfg.data.eval_path is not None:
        return train, load(cfg, eval_sources(cfg.data), use)
    return _split(train, [stable_hash(group(r.value)) for r in train.records], cfg)


def _split(loaded: Loaded, groups: Sequence[str], cfg: Config) -> tuple[Loaded, Loaded]:
    kept, held = split_rows(groups, cfg.data.eval_fraction, cfg.run.seed)
    records = loaded.records
    return replace(loaded, records=[records[i] for i in kept]), replace(
        loaded, records=[records[i] for i in held]
    )


def _require_eval(held: Loaded, cfg: Config) -> None:
    if not held.records:
        raise UserError(
            f"{given(cfg.data)}: all its rows have one prompt, so none can be held out. Give a "
            "second file as data.eval_path."
        )


def sft_rows(cfg: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows in TRL's columns: text, prompt and completion, or messages. Raises
    UserError.
    """

    def group(row: dict[str, Any]) -> Any:
        return row.get("prompt", {key: value for key, value in row.items() if key != "weight"})

    train, held = _train_and_eval(cfg, Use.sft, group)
    # one prompt in all rows, as in instruction data with a fixed instruction: then rows are held
    # out
    if not held.records:
        train, held = _split(train, [r.place for r in train.records], cfg)
    _require_eval(held, cfg)
    return train.values(), held.values()


def preference_pairs(cfg: Config) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Training and held-out pairs; pairs of one prompt (or one chosen text, without prompts) stay
    on one side. Raises UserError.
    """

    def group(pair: PreferencePair) -> Any:
        return pair.prompt or pair.chosen

    train, held = _train_and_eval(cfg, Use.preference, group)
    _require_eval(held, cfg)
    if isinstance(cfg.stage, RewardStage) and cfg.stage.margin:
        _require_margins(train)
        _require_margins(held)
    return train.values(), held.values()


def judged_answers(cfg: Config) -> tuple[list[JudgedAnswer], list[JudgedAnswer]]:
    """Training and held-out answers, a pair as its two sides; answers to one prompt stay on one
    side. Raises UserError.
    """

    def group(value: JudgedAnswer | PreferencePair) -> Any:
        return value.prompt or (
            value.chosen if isinstance(value, PreferencePair) else value.completion
        )

    def single(value: JudgedAnswer | PreferencePair) -> list[JudgedAnswer]:
        if isinstance(value, JudgedAnswer):
            return [value]
        return both_sides(value)

    train, held = _train_and_eval(cfg, Use.unpaired, group)
    _require_eval(held, cfg)
    answers = [a for value in train.values() for a in single(value)]
    labels = {answer.good for answer in answers}
    if len(labels) == 1:
        found = "good" if labels == {True} else "bad"
        raise UserError(
            f"{train.place}: each of its {len(answers)} training answers is judged {found}: "
            "expected good ones and bad ones."
        )
    return answers, [a for value in held.values() for a in single(value)]


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def sft_dataset(cfg: Config) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset in TRL's SFT columns; strings or lists of messages; weight
    where rows have one. Raises UserError.
    """
    train, held = sft_rows(cfg)
    return _dataset(train), _dataset(held)


def preference_dataset(cfg: Config) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset: chosen, rejected, prompt, weight and soft_label where the
    rows have one, margin where every row has one.

    Raises UserError.
    """
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
            **({"weight": pair.weight} if pair.weight is not None else {}),
            **({SOFT_LABEL: pair.soft_label} if pair.soft_label is not None else {}),
        }

    return _dataset([row(p) for p in train]), _dataset([row(p) for p in held])


def unpaired_dataset(cfg: Config) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset: completion, label, prompt and weight where the rows have
    one. Raises UserError.
    """
    train, held = judged_answers(cfg)
    with_prompt = any(answer.prompt for answer in [*train, *held])

    def row(answer: JudgedAnswer) -> dict[str, Any]:
        weight = {"weight": answer.weight} if answer.weight is not None else {}
        return {
            **({"prompt": answer.prompt} if with_prompt else {}),
            "completion": answer.completion,
            "label": answer.good,
            **weight,
        }

    return _dataset([row(a) for a in train]), _dataset([row(a) for a in held])


def _tokenise(tokenizer: Any, loaded: Loaded, data: DataConfig) -> list[Prompt]:
    """Records as prompts of at most ``data.max_prompt_length`` tokens. Raises UserError naming the
    longest row otherwise.
    """
    limit, out, long = data.max_prompt_length, [], []
    for record in loaded.records:
        ids = encoding.prompt_ids(tokenizer, record.value)
        if not ids:
            raise UserError(
                f"{record.place}: the prompt has no tokens, so there is nothing to continue."
            )
        cut = len(ids) > limit
        if cut:
            long.append((len(ids), record.number, record.place))
            ids = ids[-limit:]
        text = record.value if isinstance(record.value, str) and not cut else tokenizer.decode(ids)
        out.append(
            Prompt(
                id=stable_hash(record.value),
                text=text,
                token_ids=tuple(ids),
                source=record.value,
                fields=record.fields,
            )
        )
    if long and not data.truncate_prompts:
        tokens, number, place = max(long)
        where = f"row {number}" if len(loaded.formats) == 1 else place
        raise UserError(
            f"{loaded.place}: {len(long)} of {len(out)} prompts are longer than "
            f"data.max_prompt_length={limit} tokens; the longest is {where} "
            f"with {tokens}. Raise data.max_prompt_length, or set data.truncate_prompts=true to "
            "keep each prompt's last tokens."
        )
    return out


def prompts(cfg: Config, tokenizer: Any, split: str = "train") -> list[Prompt]:
    """The training or held-out prompts (`split`: train, eval), tokenised for the policy.

    Texts get the special tokens that the tokenizer adds by itself; conversations go through its
    chat template with the generation prompt. With one prompt only and no ``data.eval_path`` that
    prompt trains, and asking for held-out ones raises UserError.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: expected train or eval")
    train, held = _train_and_eval(cfg, Use.prompt, lambda prompt: prompt)
    if split == "eval":
        _require_eval(held, cfg)
    return tokenised(tokenizer, train if split == "train" else held, cfg.data)


def distinct_prompts(cfg: Config, count: int | None) -> Loaded:
    """The first `count` different prompts of the training rows (all for None), none of them held
    out. Raises UserError.
    """
    loaded = load(cfg, required_sources(cfg), Use.prompt)
    first: dict[str, Record] = {}
    for record in loaded.records:
        first.setdefault(stable_hash(record.value), record)
    return replace(loaded, records=list(first.values())[:count])


def tokenised(tokenizer: Any, loaded: Loaded, data: DataConfig) -> list[Prompt]:
    """Records of prompts as a policy reads them. Raises UserError: no chat template for
    conversations, prompts that are too long.
    """
    if isinstance(loaded.records[0].value, list):
        encoding.require_template(tokenizer, loaded.place)
    return _tokenise(tokenizer, loaded, data)


def stage_texts(cfg: Config) -> Iterable[str]:
    """Every text in the rows of ``data.path``, as the stage reads them: what a tiny model's
    tokenizer is trained on.
    """
    for record in load(cfg, required_sources(cfg), use_of(cfg)).records:
        yield from texts_in(record.value)
