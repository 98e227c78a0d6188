"""From a task's rows to what a policy reads: texts with a row's columns, examples, and the token
ids of prompts and of the texts that are scored behind them.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from conf.labelling import OF_CHOICES, TaskConfig
from eval.tasks.shapes import LETTERS, TaskRow
from rlhf.models.encoding import Chat, answer_ids, prompt_ids
from rlhf.process.wording import describe
from rlhf.types import Message, RowError

_FIELD = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
_OPTIONS = "options"
Text = str | Chat


def names_in(template: str) -> list[str]:
    """The columns that a text of the options names."""
    return [match[2] for match in _FIELD.finditer(template) if match[2] is not None]


def filled(template: str, row: TaskRow) -> str:
    """A text with a row's columns: {question}; {options}, the row's choices a line each behind
    their letters; {{name}} stands for {name}. Raises RowError for a column that the row lacks.
    """

    def value(match: re.Match[str]) -> str:
        if match[2] is None:
            return f"{{{match[1]}}}"
        if match[2] == _OPTIONS and _OPTIONS not in row.columns:
            return options_of(row)
        held = row.columns.get(match[2])
        if isinstance(held, bool) or not isinstance(held, (str, int, float)):
            there = ", ".join(row.columns)
            raise RowError(
                f"the task's text {template!r} needs a text or a number in the column "
                f"{match[2]!r}, found {describe(held)} (columns: {there})"
            )
        return str(held)

    return _FIELD.sub(value, template)


def options_of(row: TaskRow) -> str:
    """The choices of a row, a line each. Raises RowError for a row without choices."""
    choices = choices_of(row)
    return "\n".join(
        f"{letter}. {text}"
        for letter, text in zip(
            LETTERS,
            choices,
            strict=False,
        )
    )


def choices_of(row: TaskRow) -> list[str]:
    """The texts to choose from. Raises RowError where there are none, or too many for letters."""
    choices = row.columns.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise RowError(
            f"expected 2 to {len(LETTERS)} choices, found {describe(choices)} in the column "
            "'choices'"
        )
    return choices


# ---- a task's texts ----


def scores_choices(task: TaskConfig) -> bool:
    """Whether a row's choices are scored."""
    return bool(task.metrics) and task.metrics[0] in OF_CHOICES


def scored_texts(task: TaskConfig, row: TaskRow) -> list[str]:
    """The texts whose log-probabilities a row asks for. Raises RowError."""
    if not scores_choices(task):
        return [filled(task.target, row)]
    choices = choices_of(row)
    return list(LETTERS[: len(choices)]) if task.letters_only else choices


def shown_target(task: TaskConfig, row: TaskRow) -> str:
    """What an example shows as its answer. Raises RowError."""
    if scores_choices(task):
        return scored_texts(task, row)[row.columns["gold"][0]]
    return filled(task.target, row)


def examples_for(
    task: TaskConfig,
    row: TaskRow,
    pool: Sequence[TaskRow],
) -> list[TaskRow]:
    """The examples before a row: the first of the pool, or those that tasks.<name>.fewshot_seed
    draws for it; never the row itself, by place and by content. Raises RowError where there are
    too few.
    """
    found = list(islice(_others(row, _candidates(task, row, pool)), task.fewshot))
    if len(found) < task.fewshot:
        raise RowError(
            f"fewshot={task.fewshot} needs as many other rows, found {len(found)} beside this one"
        )
    return found


def _candidates(
    task: TaskConfig,
    row: TaskRow,
    pool: Sequence[TaskRow],
) -> Iterator[TaskRow]:
    """The pool in the order in which examples are taken."""
    if task.fewshot_seed is None:
        yield from pool
        return
    drawn = random.Random(f"{task.fewshot_seed}:{row.number}")
    # most rows need no more than these, and a pool may be long
    first = drawn.sample(range(len(pool)), min(len(pool), 2 * task.fewshot + 8))
    yield from (pool[number] for number in first)
    taken = set(first)
    rest = [number for number in range(len(pool)) if number not in taken]
    yield from (pool[number] for number in drawn.sample(rest, len(rest)))


def _others(row: TaskRow, pool: Iterable[TaskRow]) -> Iterator[TaskRow]:
    return (one for one in pool if one.place != row.place and one.columns != row.columns)


def prompt_of(
    task: TaskConfig,
    row: TaskRow,
    pool: Sequence[TaskRow],
) -> Text:
    """What a row asks, with its examples: a text, or messages with task.chat. Raises RowError."""
    examples = examples_for(task, row, pool)
    asked = filled(task.prompt, row)
    if not task.chat:
        parts = [
            f"{filled(task.prompt, one)}{task.delimiter}{shown_target(task, one)}"
            for one in examples
        ]
        return (task.system or "") + task.separator.join([*parts, asked])
    messages: list[Message] = []
    if task.system is not None:
        messages.append({"role": "system", "content": task.system})
    for one in examples:
        messages.append({"role": "user", "content": filled(task.prompt, one)})
        messages.append({"role": "assistant", "content": shown_target(task, one)})
    return [*messages, {"role": "user", "content": asked}]


# ---- token ids ----


@dataclass(frozen=True, slots=True)
class Scored:
    """A text behind a context, as token ids."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


def scored_ids(
    task: TaskConfig,
    tokenizer: Any,
    prompt: Text,
    text: str,
) -> Scored:
    """The token ids of a prompt and of a text behind it.

    Of a plain prompt both are tokenised as one text, and what lies behind as many tokens as the
    prompt has by itself is the text's; blanks that end the prompt go to the text. That is what
    lm-eval does, so that figures agree. Raises ValueError for a text without tokens.
    """
    if not isinstance(prompt, str):
        context = prompt_ids(tokenizer, prompt)
        ids = answer_ids(
            tokenizer,
            prompt,
            text,
            finished=False,
        )
    else:
        begun = prompt.rstrip()
        behind = prompt[len(begun) :] + task.delimiter + text
        context = prompt_ids(tokenizer, begun)
        ids = prompt_ids(tokenizer, begun + behind)[len(context) :]
        if not context:  # nothing stands before: the token that begins or ends a text
            context = [first_id(tokenizer)]
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens behind its prompt")
    return Scored(tuple(context), tuple(ids))


def first_id(tokenizer: Any) -> int:
    """The token that stands before a text that has no prompt: the one that begins a sequence, or
    else ends it.
    """
    bos = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if bos is None else bos)


def windows(scored: Scored, limit: int) -> list[Scored]:
    """A text that is longer than a model reads, in parts of at most `limit` tokens with their
    context, each of which is scored once. The first part has the whole context, later ones the last
    token before them, as lm-eval's rolling windows. Raises ValueError where the context alone
    leaves no room.
    """
    if len(scored.context) + len(scored.ids) <= limit:
        return [scored]
    room = limit - len(scored.context)
    if room < 1:
        raise ValueError(f"its context has {len(scored.context)} tokens, the model reads {limit}")
    parts = [Scored(scored.context, scored.ids[:room])]
    at = room
    while at < len(scored.ids):
        end = min(at + limit - 1, len(scored.ids))
        parts.append(Scored((scored.ids[at - 1],), scored.ids[at:end]))
        at = end
    return parts


def measures(
    task: TaskConfig,
    row: TaskRow,
    tokens: int,
) -> Mapping[str, float]:
    """By what a perplexity of a row divides: tokens, bytes and words of its target."""
    text = filled(task.target, row)
    words = len(re.split(r"\s+", text))
    return {"token": tokens, "byte": len(text.encode("utf-8")), "word": words}
