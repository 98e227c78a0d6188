"""How long the rows are, and what a limit would cut."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from rlhf.data.formats.values import CONTENT
from rlhf.data.messages import texts_of_message
from rlhf.data.prepare.items import Item
from rlhf.data.report.looked import over
from rlhf.data.report.records import Histogram, Marked, Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import counted_words, quantile
from rlhf.models import encoding
from rlhf.process import parallel
from rlhf.types import Message, Tools, UserError

_ANSWERS = ("chosen", "rejected", "completion")
_BATCH = 1024  # texts tokenised at a time
_WORRYING = 0.01  # share of truncated rows that is worth a warning


def column_texts(columns: Mapping[str, Any]) -> dict[str, list[str]]:
    """The texts of each content column: a single text, or the messages' texts."""
    out = {}
    for key in CONTENT:
        value = columns.get(key)
        if isinstance(value, str):
            out[key] = [value]
        elif isinstance(value, list):
            out[key] = [text for message in value for text in texts_of_message(message)]
    return out


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special tokens not counted."""
    out: list[int] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        out += map(len, tokenizer(batch, add_special_tokens=False)["input_ids"])
    return out


Sizes = dict[str, int]  # the length of each content column of a row


def words_and_characters(items: list[Item]) -> list[tuple[Sizes, Sizes]]:
    """What a process does to some rows: the words and the characters of each content column."""
    out = []
    for item in items:
        row = column_texts(item.columns)
        words, characters = {}, {}
        for key, texts in row.items():
            characters[key] = sum(map(len, texts))
            parted = map(counted_words, texts)
            words[key] = sum(len(counted.tokens) for counted in parted)
        out.append((words, characters))
    return out


def _tokens(tokenizer: Any, items: Sequence[Item]) -> list[Sizes]:
    """Per row, the tokens of each content column."""
    rows = [column_texts(item.columns) for item in items]
    flat = [text for row in rows for texts in row.values() for text in texts]
    counts = iter(token_counts(tokenizer, flat))
    return [{key: sum(islice(counts, len(texts))) for key, texts in row.items()} for row in rows]


def by_columns(rows: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Rows of lengths as the lengths of each content column that some row has."""
    out: dict[str, list[int]] = {}
    for key in CONTENT:
        values = [row[key] for row in rows if key in row]
        if values:
            out[key] = values
    return out


def row_length(lengths: Mapping[str, int]) -> int:
    """The length of the longest sequence of a row: the prompt with its longest answer, or the whole
    text.
    """
    answers = [lengths[key] for key in _ANSWERS if key in lengths]
    rest = sum(n for key, n in lengths.items() if key not in _ANSWERS)
    return rest + max(answers, default=0)


def sequence_lengths(
    tokenizer: Any, items: Sequence[Item], lengths: Sequence[Mapping[str, int]]
) -> tuple[list[int], int]:
    """Tokens of each row's longest sequence as the stages encode it, and the number of
    conversations that the template can't render.

    Texts: what is before and what follows, the special tokens that the tokenizer adds, and
    end-of-sequence. Conversations: through the chat template; one that it can't render, or that has
    no template, counts by its texts.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False) + 1  # and end-of-sequence
    out, broken = [], 0
    for item, by_column in zip(items, lengths, strict=True):
        chats = list(conversations(item.columns))
        if not chats:
            out.append(row_length(by_column) + special)
            continue
        try:
            tools = item.columns.get("tools")
            out.append(max(_rendered(tokenizer, chat, tools) for chat in chats))
        except (ValueError, UserError):
            out.append(row_length(by_column) + special)
            broken += 1
    return out, broken


def _rendered(tokenizer: Any, chat: list[Message], tools: Tools | None) -> int:
    if tokenizer.chat_template is None:
        raise ValueError("no chat template")
    return len(conversation_ids(tokenizer, chat, tools))


def conversation_ids(tokenizer: Any, chat: list[Message], tools: Tools | None = None) -> list[int]:
    """Token ids of a conversation as the stages encode it: with its last answer, or as a prompt."""
    if chat[-1]["role"] == "assistant" and len(chat) > 1:
        return encoding.encode_answer(tokenizer, None, chat, tools)
    return encoding.prompt_ids(tokenizer, chat, tools)


def conversations(columns: Mapping[str, Any]) -> Iterable[list[Message]]:
    """The whole conversations of a row: the prompt with each answer, the prompt alone where nothing
    answers, or its messages. None for texts.
    """
    prompt = columns.get("prompt")
    before = prompt if isinstance(prompt, list) else []
    answers = [columns[key] for key in _ANSWERS if isinstance(columns.get(key), list)]
    if answers:
        yield from ([*before, *answer] for answer in answers)
    elif before:
        yield before
    if isinstance(columns.get("messages"), list):
        yield columns["messages"]


def summary(values: Sequence[int]) -> dict[str, float]:
    """Mean and quantiles. Raises ValueError without values."""
    ordered = sorted(map(float, values))
    return {
        "rows": len(values),
        "mean": sum(values) / len(values),
        "p5": quantile(ordered, 0.05),
        "median": quantile(ordered, 0.5),
        "p95": quantile(ordered, 0.95),
        "max": ordered[-1],
    }


def lengths(items: Sequence[Item], settings: Settings) -> Section:
    """Lengths by column and of whole rows, in tokens where a tokenizer is given, else in words and
    characters; and who is over the limit.
    """
    title = "Lengths"
    if not items:
        return Section("lengths", title, {}, unmeasured="there are no rows")
    if settings.tokenizer is None:
        unit, broken = "words", 0
        both = list(chain.from_iterable(over(words_and_characters, items)))
        by_column = [words for words, _ in both]
        whole = [row_length(row) for row in by_column]
        characters = [sizes for _, sizes in both]
    else:
        unit, characters = "tokens", []
        batches = parallel.parts(items, _BATCH)
        by_column = [row for batch in batches for row in _tokens(settings.tokenizer, batch)]
        whole, broken = sequence_lengths(settings.tokenizer, items, by_column)
    columns = by_columns(by_column) | {"row": whole}
    longer = ((items[i], f"{n} {unit}") for i, n in enumerate(whole) if n > settings.limit)
    cut = Marked(settings.named, longer)
    share = len(cut) / len(items)
    hint = ""
    if unit == "words":
        hint = " (words are counted instead of tokens: set model.path to count tokens)"
    findings = finding(
        "truncated",
        Severity.warn if share >= _WORRYING else Severity.info,
        f"{len(cut)} of {len(items)} rows ({share:.1%}) are longer than {settings.limit} "
        f"{unit}{hint}",
        REMEDIES["truncated"],
        cut,
    )
    figures: dict[str, Any] = {
        "unit": unit,
        "limit": settings.limit,
        "truncated": len(cut),
        "truncated_share": share,
        "unrendered": broken,
        "columns": {key: summary(values) for key, values in columns.items()},
    }
    heads = ("column", "rows", "mean", "5 %", "median", "95 %", "longest")
    tables = [Table(f"Lengths in {unit}", heads, _lines(columns))]
    if characters:
        counted = by_columns(characters) | {"row": [row_length(row) for row in characters]}
        figures["characters"] = {key: summary(values) for key, values in counted.items()}
        tables.append(Table("Lengths in characters", heads, _lines(counted)))
    plot = Histogram(
        f"Lengths of rows and columns in {unit}",
        unit,
        {k: [float(v) for v in values] for k, values in columns.items()},
        settings.limit,
    )
    return Section("lengths", title, figures, findings, tuple(tables), (plot,))


def _lines(columns: Mapping[str, Sequence[int]]) -> tuple[tuple[str | float, ...], ...]:
    """A row of the table for each column; "row" is the longest sequence of a row."""
    return tuple((key, *summary(values).values()) for key, values in columns.items())
