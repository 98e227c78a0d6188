"""Data files as what stages take: TRL data sets, preference pairs, tokenised prompts; and the first
rows of each file, for preflight.

    request = DataRequest.of(cfg)
    train, held_out = sft_dataset(request)

Rows that don't fit are handled in loading.py.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from conf.schema import DataConfig
from conf.stages import RewardStage
from rlhf.data.converting import PROBE, Record, shape_of
from rlhf.data.formats import Use, texts_in
from rlhf.data.formats.base import both_sides
from rlhf.data.loading import (
    SOFT_LABEL,
    DataRequest,
    Loaded,
    convert,
    load,
    require_margins,
    required_sources,
    soft_label,
    tell_unread,
)
from rlhf.data.mixture import Source
from rlhf.data.sources import eval_sources, given, train_sources
from rlhf.models import encoding
from rlhf.types import JudgedAnswer, PreferencePair, Prompt, UserError

__all__ = [
    "DataRequest",
    "check_first_rows",
    "check_first_strength",
    "check_sources",
    "distinct_prompts",
    "first_fields",
    "judged_answers",
    "load",
    "preference_dataset",
    "preference_pairs",
    "prompts",
    "required_sources",
    "sft_dataset",
    "sft_rows",
    "stage_texts",
    "tokenised",
    "unpaired_dataset",
]

# ---- the first rows, for preflight ----


def check_first_rows(request: DataRequest, use: Use | None = None) -> None:
    """Raises UserError unless each file is there, not empty, and its first rows have a format that
    fits `use` (by default that of the stage).
    """
    for sources in _splits(request.data):
        check_sources(request, sources, use or request.use)


def check_sources(request: DataRequest, sources: Sequence[Source], use: Use) -> None:
    """`check_first_rows` of these sources. Raises UserError."""
    parts = _first_rows(request, sources, use)
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
        for loaded in _first_rows(request, sources, Use.preference):
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
        for loaded in _first_rows(request, sources, use):
            yield from loaded.records


def _first_rows(request: DataRequest, sources: Sequence[Source], use: Use) -> list[Loaded]:
    return first_rows(sources, use, request.data, request.seed)


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


def stable_hash(value: Any) -> str:
    """16 hexadecimal digits that depend on a prompt's content alone."""
    content = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
    by ``run.seed``; records with equal `group` stay together.
    """
    train = load(request, required_sources(request), use)
    if request.data.eval_path is not None:
        return train, load(request, eval_sources(request.data), use)
    return _split(train, [stable_hash(group(value)) for value in train.values()], request)


def _split(loaded: Loaded, groups: Sequence[str], request: DataRequest) -> tuple[Loaded, Loaded]:
    kept, held = split_rows(groups, request.data.eval_fraction, request.seed)
    records = loaded.records
    train = replace(loaded, records=[records[i] for i in kept])
    return train, replace(loaded, records=[records[i] for i in held])


def _require_eval(held: Loaded, data: DataConfig) -> None:
    if not held.records:
        raise UserError(
            f"{given(data)}: all its rows have one prompt, so none can be held out. Give a "
            "second file as data.eval_path."
        )


def sft_rows(request: DataRequest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows in TRL's columns: text, prompt and completion, or messages. Raises
    UserError.
    """

    def group(row: dict[str, Any]) -> Any:
        return row.get("prompt", {key: value for key, value in row.items() if key != "weight"})

    train, held = _train_and_eval(request, Use.sft, group)
    # all rows have the same prompt, as in instruction data with a fixed instruction: then single
    # rows are held out
    if not held.records:
        train, held = _split(train, [record.place for record in train.records], request)
    _require_eval(held, request.data)
    return train.values(), held.values()


def preference_pairs(request: DataRequest) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Training and held-out pairs; pairs with the same prompt (or, without prompts, the same chosen
    text) stay on one side. Raises UserError.
    """
    train, held = _train_and_eval(request, Use.preference, lambda pair: pair.prompt or pair.chosen)
    _require_eval(held, request.data)
    if isinstance(request.stage, RewardStage) and request.stage.margin:
        require_margins(train)
        require_margins(held)
    return train.values(), held.values()


def judged_answers(request: DataRequest) -> tuple[list[JudgedAnswer], list[JudgedAnswer]]:
    """Training and held-out answers, a pair as its two sides; answers to the same prompt stay on
    one side. Raises UserError.
    """

    def group(value: JudgedAnswer | PreferencePair) -> Any:
        answer = value.chosen if isinstance(value, PreferencePair) else value.completion
        return value.prompt or answer

    train, held = _train_and_eval(request, Use.unpaired, group)
    _require_eval(held, request.data)
    answers = _single_answers(train)
    labels = {answer.good for answer in answers}
    if len(labels) == 1:
        judged = "good" if labels == {True} else "bad"
        raise UserError(
            f"{train.name}: each of its {len(answers)} training answers is judged {judged}: "
            "expected good ones and bad ones."
        )
    return answers, _single_answers(held)


def _single_answers(loaded: Loaded) -> list[JudgedAnswer]:
    out: list[JudgedAnswer] = []
    for value in loaded.values():
        out += [value] if isinstance(value, JudgedAnswer) else both_sides(value)
    return out


def stage_texts(request: DataRequest) -> Iterable[str]:
    """Every text in the rows of ``data.path``, as the stage reads them: a tiny model's tokenizer is
    trained on them.
    """
    for value in load(request, required_sources(request), request.use).values():
        yield from texts_in(value)


# ---- TRL's data sets ----


def _datasets(train: list[dict[str, Any]], held: list[dict[str, Any]]) -> tuple[Any, Any]:
    from datasets import Dataset

    return Dataset.from_list(train), Dataset.from_list(held)


def sft_dataset(request: DataRequest) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset in TRL's SFT columns: strings or lists of messages; weight
    where rows have one. Raises UserError.
    """
    return _datasets(*sft_rows(request))


def preference_dataset(request: DataRequest) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset: chosen, rejected; prompt, weight and soft_label where rows
    have them, margin where every row has one. Raises UserError.
    """
    train, held = preference_pairs(request)
    both = [*train, *held]
    with_prompt = any(pair.prompt for pair in both)
    with_margin = all(pair.margin is not None for pair in both)

    def row(pair: PreferencePair) -> dict[str, Any]:
        out: dict[str, Any] = {"prompt": pair.prompt} if with_prompt else {}
        out |= {"chosen": pair.chosen, "rejected": pair.rejected}
        if with_margin:
            out["margin"] = pair.margin
        if pair.tools is not None:
            out["tools"] = pair.tools
        if pair.weight is not None:
            out["weight"] = pair.weight
        if pair.soft_label is not None:
            out[SOFT_LABEL] = pair.soft_label
        return out

    return _datasets([row(pair) for pair in train], [row(pair) for pair in held])


def unpaired_dataset(request: DataRequest) -> tuple[Any, Any]:
    """(train, eval) as datasets.Dataset: completion, label; prompt and weight where rows have them.
    Raises UserError.
    """
    train, held = judged_answers(request)
    with_prompt = any(answer.prompt for answer in [*train, *held])

    def row(answer: JudgedAnswer) -> dict[str, Any]:
        out: dict[str, Any] = {"prompt": answer.prompt} if with_prompt else {}
        out |= {"completion": answer.completion, "label": answer.good}
        if answer.tools is not None:
            out["tools"] = answer.tools
        if answer.weight is not None:
            out["weight"] = answer.weight
        return out

    return _datasets([row(answer) for answer in train], [row(answer) for answer in held])


# ---- prompts ----


def prompts(request: DataRequest, tokenizer: Any, split: str = "train") -> list[Prompt]:
    """The training or held-out prompts (`split`: train, eval), tokenised for the policy.

    Texts get the special tokens that the tokenizer adds by itself; conversations go through its
    chat template with the generation prompt. With a single prompt and no ``data.eval_path`` that
    prompt trains, and asking for held-out prompts raises UserError.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: expected train or eval")
    train, held = _train_and_eval(request, Use.prompt, lambda prompt: prompt)
    if split == "train":
        return tokenised(tokenizer, train, request.data)
    _require_eval(held, request.data)
    return tokenised(tokenizer, held, request.data)


def distinct_prompts(request: DataRequest, count: int | None) -> Loaded:
    """The first `count` different prompts of the training rows (all for None), none of them held
    out. Raises UserError.
    """
    loaded = load(request, required_sources(request), Use.prompt)
    first: dict[str, Record] = {}
    for record in loaded.records:
        first.setdefault(_id(record), record)
    return replace(loaded, records=list(first.values())[:count])


def _id(record: Record) -> str:
    """Names a prompt; with other functions to call it is another one."""
    if record.tools is None:
        return stable_hash(record.value)
    return stable_hash([record.value, record.tools])


def tokenised(tokenizer: Any, loaded: Loaded, data: DataConfig) -> list[Prompt]:
    """Records as prompts of at most ``data.max_prompt_length`` tokens. Raises UserError:
    conversations without a chat template, and prompts that are too long, naming the longest row,
    unless ``data.truncate_prompts`` is set.
    """
    if isinstance(loaded.records[0].value, list):
        encoding.require_template(tokenizer, loaded.name)
    tell_unread(loaded.keys, tokenizer, loaded.name)
    limit, out = data.max_prompt_length, []
    too_long: list[tuple[int, int, str]] = []  # tokens, row number, place
    for record in loaded.records:
        tools = record.tools
        ids = encoding.prompt_ids(tokenizer, record.value, tools)
        if not ids:
            raise UserError(
                f"{record.place}: the prompt has no tokens, so there is nothing to continue."
            )
        if len(ids) > limit:
            too_long.append((len(ids), record.number, record.place))
            ids = ids[-limit:]
            text = tokenizer.decode(ids)
        else:
            text = record.value if isinstance(record.value, str) else tokenizer.decode(ids)
        out.append(
            Prompt(_id(record), text, tuple(ids), record.value, fields=record.fields, tools=tools)
        )
    if too_long and not data.truncate_prompts:
        tokens, number, place = max(too_long)
        where = f"row {number}" if len(loaded.formats) == 1 else place
        raise UserError(
            f"{loaded.name}: {len(too_long)} of {len(out)} prompts are longer than "
            f"data.max_prompt_length={limit} tokens; the longest is {where} "
            f"with {tokens}. Raise data.max_prompt_length, or set data.truncate_prompts=true to "
            "keep each prompt's last tokens."
        )
    return out
