"""Data files as what stages take: rows in TRL's columns, preference pairs, tokenised prompts; and
the first rows of each file, for preflight.

    request = DataRequest.of(cfg)
    train, held_out = sft_records(request)

Rows that don't fit are handled in loading.py.
"""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from conf.schema import DataConfig
from conf.stages import OfflineStage, RewardStage
from rlhf.data.converting import PROBE, Record, shape_of, tell_columns
from rlhf.data.formats import Use, texts_in
from rlhf.data.formats.base import both_sides
from rlhf.data.loading import (
    DataRequest,
    Loaded,
    convert,
    load,
    require_margins,
    required_sources,
    soft_label,
)
from rlhf.data.mixture import Source
from rlhf.data.prepare.held import gathered, mapped, picked
from rlhf.data.prompts import prompt_id, stable_hash, tokenised
from rlhf.data.sources import eval_sources, given, train_sources
from rlhf.data.telling import refuse_pictures
from rlhf.process import distributed
from rlhf.types import SOFT_LABEL, JudgedAnswer, PreferencePair, Prompt, UserError

__all__ = [
    "DataRequest",
    "check_first_rows",
    "check_first_strength",
    "check_sources",
    "distinct_prompts",
    "first_fields",
    "judged_answers",
    "load",
    "preference_pairs",
    "preference_records",
    "prompt_records",
    "prompts",
    "required_sources",
    "sft_records",
    "sft_rows",
    "stage_texts",
    "tokenised",
    "unpaired_records",
]

NO_PROMPTS_HELD_OUT = (
    "data.eval_fraction=0 holds no prompts out. Give held-out prompts as data.eval_path, or set "
    "data.eval_fraction above 0."
)
Split = tuple[Sequence[Record], Sequence[Record]]  # training and held-out rows

# ---- the first rows, for preflight ----


def check_first_rows(request: DataRequest, use: Use | None = None) -> None:
    """Raises UserError unless each file is there, not empty, and its first rows have a format that
    fits `use` (by default that of the stage).
    """
    for sources in _splits(request.data):
        check_sources(request, sources, use or request.use)


def check_sources(request: DataRequest, sources: Sequence[Source], use: Use) -> None:
    """`check_first_rows` of these sources. Raises UserError."""
    parts = first_rows(sources, use, request.data, request.seed)
    for loaded in parts:
        if len(loaded.rejected) > request.data.max_bad_rows:
            row, reason = loaded.rejected[0]
            raise UserError(f"{row.place}: {reason} (read as format {loaded.layout()}).")
    refuse_two_shapes(parts)


def first_fields(request: DataRequest) -> list[tuple[str, dict[str, Any]]]:
    """(place, columns beside the prompt) of each file's first rows that fit. Raises UserError as
    `check_first_rows`.
    """
    return [(record.place, record.fields) for record in _first_records(request, request.use)]


def check_first_strength(request: DataRequest) -> None:
    """The first rows that fit have what ``stage.margin=true`` or ``stage.soft_label=true`` needs.
    Raises UserError.
    """
    for sources in _splits(request.data):
        for loaded in first_rows(sources, Use.preference, request.data, request.seed):
            if request.stage.margin:
                require_margins(loaded)
            if request.stage.soft_label:
                for record in loaded.records:
                    soft_label(record)


def _splits(data: DataConfig) -> list[list[Source]]:
    """The sources of each split that has some."""
    return [sources for sources in (train_sources(data), eval_sources(data)) if sources]


def _first_records(request: DataRequest, use: Use) -> Iterator[Record]:
    for sources in _splits(request.data):
        for loaded in first_rows(sources, use, request.data, request.seed):
            yield from loaded.records


def refuse_two_shapes(parts: Sequence[Loaded]) -> None:
    """Raises UserError where of these files some hold texts and others messages: one tokenizer's
    template can't be used for some rows and left out for others.
    """
    shapes = {shape_of(part.records[0].value): part for part in parts if part.records}
    if len(shapes) > 1:
        text, chat = shapes["text"], shapes["messages"]
        raise UserError(
            f"{text.name} holds texts (format {text.layout()}), {chat.name} conversations (format "
            f"{chat.layout()}): expected one of the two, since texts have no turns for a chat "
            "template. Leave one of them out, or write the texts as messages."
        )


def first_rows(sources: Sequence[Source], use: Use, data: DataConfig, seed: int) -> list[Loaded]:
    """The first rows of each file by itself."""
    out = []
    for source in sources:
        for part in source.parts:
            alone = replace(source, parts=(part,), cap=None, weight=None)
            out.append(convert([alone], use, data, seed, PROBE + data.max_bad_rows))
    return out


# ---- training and held-out rows ----


def split_rows(groups: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and held-out rows, `groups` [N] naming each row's group (rows of one
    prompt). Whole groups are drawn until `fraction` of the rows are held out.

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


def _train_and_eval(
    request: DataRequest, use: Use, group: Callable[[Any], Any]
) -> tuple[Loaded, Loaded]:
    """Training and held-out records: those of ``data.eval_path``, or a share of ``data.path`` drawn
    by ``run.seed``; records with equal `group` stay together. With ``data.eval_fraction=0`` none
    are held out.
    """
    train = load(request, required_sources(request), use)
    if isinstance(request.stage, OfflineStage) and distributed.is_main():
        read = {"tools", request.data.weight_column}
        if isinstance(request.stage, RewardStage):
            read.add(SOFT_LABEL)
        tell_columns(train.records, read, train.name, request.stage.name)
    if request.data.eval_path is not None:
        return train, load(request, eval_sources(request.data), use)
    if not request.data.holds_out:
        return train, replace(train, records=[])
    groups = [stable_hash(group(record.value)) for record in train.records]
    return _split(train, groups, request)


def _split(loaded: Loaded, groups: Sequence[str], request: DataRequest) -> tuple[Loaded, Loaded]:
    train_rows, held_rows = split_rows(groups, request.data.eval_fraction, request.seed)
    train = replace(loaded, records=picked(loaded.records, array("Q", train_rows)))
    return train, replace(loaded, records=picked(loaded.records, array("Q", held_rows)))


def _require_eval(held: Loaded, data: DataConfig) -> None:
    if data.holds_out and not held.records:
        raise UserError(
            f"{given(data)}: all its rows have one prompt, so none can be held out. Give a "
            "second file as data.eval_path."
        )


def sft_records(request: DataRequest) -> Split:
    """Training and held-out rows in TRL's columns: text, prompt and completion, or messages; each
    row has its own; ``weight`` and ``tools`` where it has them. Raises UserError.
    """

    def group(row: dict[str, Any]) -> Any:
        return row.get("prompt", {key: value for key, value in row.items() if key != "weight"})

    train, held = _train_and_eval(request, Use.sft, group)
    # all rows have the same prompt, as in instruction data with a fixed instruction: then single
    # rows are held out
    if request.data.holds_out and not held.records:
        train, held = _split(train, [record.place for record in train.records], request)
    _require_eval(held, request.data)
    return train.records, held.records


def sft_rows(request: DataRequest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`sft_records` without their places."""
    train, held = sft_records(request)
    return [record.value for record in train], [record.value for record in held]


def preference_pairs(request: DataRequest) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Training and held-out pairs; pairs with the same prompt (or, without prompts, the same chosen
    text) stay on one side. Raises UserError.
    """
    train, held = _pairs(request)
    return train.values(), held.values()


def _pairs(request: DataRequest) -> tuple[Loaded, Loaded]:
    train, held = _train_and_eval(request, Use.preference, lambda pair: pair.prompt or pair.chosen)
    _require_eval(held, request.data)
    if isinstance(request.stage, RewardStage) and request.stage.margin:
        require_margins(train)
        require_margins(held)
    return train, held


def judged_answers(request: DataRequest) -> tuple[list[JudgedAnswer], list[JudgedAnswer]]:
    """Training and held-out answers, a pair as its two sides; answers to the same prompt stay on
    one side. Raises UserError.
    """
    train, held = _judged(request)
    return [record.value for record in train], [record.value for record in held]


def _judged(request: DataRequest) -> Split:
    def group(value: JudgedAnswer | PreferencePair) -> Any:
        answer = value.chosen if isinstance(value, PreferencePair) else value.completion
        return value.prompt or answer

    train, held = _train_and_eval(request, Use.unpaired, group)
    _require_eval(held, request.data)
    answers = _single_answers(train)
    labels = {record.value.good for record in answers}
    if len(labels) == 1:
        judged = "good" if labels == {True} else "bad"
        raise UserError(
            f"{train.name}: each of its {len(answers)} training answers is judged {judged}: "
            "expected good ones and bad ones."
        )
    return answers, _single_answers(held)


def _single_answers(loaded: Loaded) -> Sequence[Record]:
    def answers() -> Iterator[Record]:
        for record in loaded.records:
            if isinstance(record.value, JudgedAnswer):
                yield record
            else:
                yield from (replace(record, value=side) for side in both_sides(record.value))

    return gathered(answers())


def stage_texts(request: DataRequest) -> Iterable[str]:
    """Every text in the rows of ``data.path``, as the stage reads them: a tiny model's tokenizer is
    trained on them.
    """
    for record in load(request, required_sources(request), request.use).records:
        yield from texts_in(record.value)


# ---- TRL's columns ----


def _in_columns(
    records: Sequence[Record], columns: Callable[[Any], dict[str, Any]]
) -> Sequence[Record]:
    """Each record with its value as columns, and those of its options that it has."""

    def in_columns(record: Record) -> Record:
        row = columns(record.value)
        for name in ("weight", SOFT_LABEL, "tools"):
            option = getattr(record.value, name, None)
            if option is not None:
                row[name] = option
        return replace(record, value=row)

    return mapped(in_columns, records)


def preference_records(request: DataRequest) -> Split:
    """Training and held-out rows: chosen, rejected; prompt, weight, soft_label and tools where rows
    have them, margin where every row has one. Raises UserError.
    """
    train, held = _pairs(request)
    with_prompt, with_margin = False, True
    for record in chain(train.records, held.records):
        with_prompt = with_prompt or bool(record.value.prompt)
        with_margin = with_margin and record.value.margin is not None

    def columns(pair: PreferencePair) -> dict[str, Any]:
        out: dict[str, Any] = {"prompt": pair.prompt} if with_prompt else {}
        out |= {"chosen": pair.chosen, "rejected": pair.rejected}
        if with_margin:
            out["margin"] = pair.margin
        return out

    return _in_columns(train.records, columns), _in_columns(held.records, columns)


def unpaired_records(request: DataRequest) -> Split:
    """Training and held-out rows: completion, label; prompt, weight and tools where rows have them.
    Raises UserError.
    """
    train, held = _judged(request)
    with_prompt = any(record.value.prompt for record in chain(train, held))

    def columns(answer: JudgedAnswer) -> dict[str, Any]:
        out: dict[str, Any] = {"prompt": answer.prompt} if with_prompt else {}
        return out | {"completion": answer.completion, "label": answer.good}

    return _in_columns(train, columns), _in_columns(held, columns)


# ---- prompts ----


def prompt_records(request: DataRequest, split: str = "train") -> Loaded:
    """The training or held-out prompts (`split`: train, eval) with their files and rows. With a
    single prompt and no ``data.eval_path`` that prompt trains, and asking for held-out prompts
    raises UserError, as with ``data.eval_fraction=0``.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: expected train or eval")
    train, held = _train_and_eval(request, Use.prompt, lambda prompt: prompt)
    if split == "train":
        return train
    if not request.data.holds_out:
        raise UserError(NO_PROMPTS_HELD_OUT)
    _require_eval(held, request.data)
    return held


def prompts(request: DataRequest, tokenizer: Any, split: str = "train") -> Sequence[Prompt]:
    """`prompt_records`, tokenised for the policy.

    Texts get the special tokens that the tokenizer adds by itself; conversations go through its
    chat template with the generation prompt. Raises UserError.
    """
    return tokenised(tokenizer, prompt_records(request, split), request)


def distinct_prompts(request: DataRequest, count: int | None) -> Loaded:
    """The first `count` different prompts of the training rows (all for None), none of them held
    out. Raises UserError, also for rows that show pictures: people would not see them.
    """
    loaded = load(request, required_sources(request), Use.prompt)
    why = f"stage={request.stage.name} shows people texts alone. Give it rows of texts"
    refuse_pictures(loaded.keys, loaded.name, why)
    first: dict[str, Record] = {}
    for record in loaded.records:
        first.setdefault(prompt_id(record), record)
    return replace(loaded, records=list(first.values())[:count])
