"""What the writers of formats share: a row to write, and its parts in the form that a format wants.

A writer turns one row in the toolkit's own columns (rlhf/data/prepare/items.py) into rows of its
format. A row that the format can't hold raises RowError with the reason; what the format changes or
leaves out is noted. A format for conversations takes a text prompt as a user's message and a text
answer as an assistant's, with a note. The two answers of a pair stand in the order of its column
`position`, or in one drawn from their content, so that neither side is always first.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.data.formats.values import CANONICAL
from rlhf.data.rows import Chat, RowError
from rlhf.process.wording import describe
from rlhf.types import Message

Row = dict[str, Any]


@dataclass(slots=True)
class Draft:
    """One row to write."""

    columns: Row  # the toolkit's own columns
    own: Row  # the row's other columns
    notes: list[str]  # what reads back otherwise

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an own column that the format has a key for; the column is then no longer
        among the others.
        """
        value = self.own.pop(name, None)
        if value is None:
            return default
        return value

    def lose(self, name: str, why: str) -> None:
        """Note a column that the format can't hold."""
        if self.columns.get(name) is not None:
            self.notes.append(f"{name} is not carried: {why}")

    def margin(self) -> Row:
        """The column margin, or nothing."""
        if self.columns.get("margin") is None:
            return {}
        return {"margin": self.columns["margin"]}


Writer = Callable[[Draft], list[Row]]


# ---- transcripts ----

HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"  # hh-rlhf's marks
_MARK = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def is_transcript(prompt: Any) -> bool:
    """Whether a text is turns of Human: and Assistant: up to the answer."""
    return (
        isinstance(prompt, str)
        and prompt.startswith(HUMAN_TURN)
        and prompt.endswith(ASSISTANT_TURN)
    )


def transcript_turns(prompt: str) -> Chat:
    """The turns of a transcript that ends where the answer begins, without the blanks around
    them.
    """
    parts = _MARK.split(prompt)[1:-2]
    return [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def transcripts_as_turns(draft: Draft) -> None:
    """Where the prompt is a transcript, make turns of it and of the answers."""
    if not is_transcript(draft.columns.get("prompt")):
        return
    draft.columns["prompt"] = transcript_turns(draft.columns["prompt"])
    for key in ("chosen", "rejected", "completion"):
        if isinstance(draft.columns.get(key), str):
            text = draft.columns[key].strip()
            draft.columns[key] = [{"role": "assistant", "content": text}]
    draft.notes.append("a transcript of Human: and Assistant: becomes turns")


# ---- texts and turns ----


def turns_of(draft: Draft, prompt: str | Chat) -> Chat:
    """A prompt as the turns of a conversation. Raises RowError for an empty one."""
    if isinstance(prompt, list):
        return prompt
    if not prompt:
        raise RowError(
            "key 'prompt': a conversation begins with what is asked, but this row's texts are whole"
        )
    draft.notes.append("texts become messages of a conversation")
    return [{"role": "user", "content": prompt}]


def prompt_turns(draft: Draft) -> Chat:
    """The column prompt as the turns of a conversation. Raises RowError."""
    return turns_of(draft, draft.columns["prompt"])


def is_plain(message: Message) -> bool:
    """Whether a message is its role and its text, and nothing else."""
    return message.keys() == {"role", "content"}


def single_turn(answer: str | Chat, key: str, *, empty: bool = False) -> Message:
    """An answer as one turn of the assistant's. Raises RowError for an answer of several messages,
    or (unless `empty`) without text and calls.
    """
    turn: Message
    if isinstance(answer, str):
        turn = {"role": "assistant", "content": answer}
    elif len(answer) != 1 or answer[0]["role"] != "assistant":
        raise RowError(
            f"key {key!r}: expected one message of the assistant's, found {len(answer)} messages"
        )
    else:
        turn = answer[0]
    if not turn["content"] and not turn.get("tool_calls") and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    return turn


def single_text(answer: str | Chat, key: str, *, empty: bool = False) -> str:
    """The text of an answer that is text alone (rlhf/data/targets.py sees to that). Raises RowError
    as `single_turn`.
    """
    return single_turn(answer, key, empty=empty)["content"]


def flags_as_weights(chat: Chat) -> list[Row]:
    """Messages to write, with OpenAI's `weight` for whether a turn trains."""
    out = []
    for message in chat:
        row: Row = {key: value for key, value in message.items() if key != "train"}
        if "train" in message:
            row["weight"] = int(message["train"])
        out.append(row)
    return out


def plain_text(value: str | Chat, key: str, *, empty: bool = False) -> str:
    """A text as it is. Raises RowError for a conversation, or (unless `empty`) for no text."""
    if isinstance(value, list):
        raise RowError(
            f"key {key!r}: expected text, found {describe(value)} messages, which this format "
            "can't hold"
        )
    if not value and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    return value


def required_prompt(draft: Draft) -> str | Chat:
    """The column prompt. Raises RowError for an empty one."""
    prompt = draft.columns["prompt"]
    if not prompt:
        raise RowError("key 'prompt': expected text, found an empty one")
    return prompt


def trained_turns(draft: Draft) -> tuple[Chat, Chat]:
    """(context, answer) of a row to train on; no answer where the whole conversation trains. Raises
    RowError for a whole text.
    """
    columns = draft.columns
    if "messages" in columns:
        return columns["messages"], []
    if "completion" not in columns:
        raise RowError("key 'text': a whole text has no turns, so it is no conversation")
    answer = columns["completion"]
    turns = prompt_turns(draft)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return turns, answer


def whole_conversation(draft: Draft) -> Chat:
    """A row to train on as one conversation, of whose prompt no turn trains. Raises RowError."""
    context, answer = trained_turns(draft)
    if not answer:
        return context
    draft.notes.append("prompt and completion become one conversation")
    return [*map(_as_context, context), *answer]


def _as_context(message: Message) -> Message:
    if message["role"] == "assistant":
        return {**message, "train": False}
    return message


def judged_turns(draft: Draft) -> Chat:
    """A judged answer as a conversation that ends with it. Raises RowError."""
    return [
        *prompt_turns(draft),
        single_turn(draft.columns["completion"], "completion", empty=True),
    ]


# ---- pairs ----


def two_texts(draft: Draft, *, empty: bool = False) -> tuple[str, str]:
    """(chosen, rejected) as single texts. Raises RowError."""
    columns = draft.columns
    chosen = single_text(columns["chosen"], "chosen", empty=empty)
    return chosen, single_text(columns["rejected"], "rejected", empty=empty)


def require_same_form(columns: Row) -> None:
    """Raises RowError where the prompt is a text and the answers are conversations, or the other
    way: an answer is read in its prompt's form.
    """
    if isinstance(columns["prompt"], list) != isinstance(columns["chosen"], list):
        raise RowError("key 'chosen': whole conversations without a prompt can't be held")


def shown_pair(draft: Draft) -> tuple[str, str, int]:
    """(first, second, position of the chosen answer: 1 or 2) of a pair of single texts. Raises
    RowError.
    """
    chosen, rejected = two_texts(draft)
    require_same_form(draft.columns)
    return in_order(draft, chosen, rejected)


def in_order(draft: Draft, chosen: str, rejected: str) -> tuple[str, str, int]:
    """(first, second, position of the chosen answer): as the column `position` says, else drawn
    from the texts, so that neither side is preferred.
    """
    position = draft.own.pop("position", None)
    if position not in (1, 2, "1", "2"):
        if position is not None:
            draft.notes.append("position is not carried: it is neither 1 nor 2")
        content = json.dumps([draft.columns.get("prompt"), chosen, rejected], sort_keys=True)
        position = 1 + hashlib.sha256(content.encode()).digest()[0] % 2
    if int(position) == 1:
        return chosen, rejected, 1
    return rejected, chosen, 2


def ranks_of(draft: Draft) -> tuple[Any, Any]:
    """Ranks of the chosen and the rejected answer: those of the row's columns, or 1 and 2."""
    ranks = draft.take("rank_chosen"), draft.take("rank_rejected")
    numbers = all(isinstance(rank, (int, float)) and not isinstance(rank, bool) for rank in ranks)
    if numbers and ranks[0] < ranks[1]:
        return ranks
    if ranks != (None, None):
        draft.notes.append("ranks are not carried: expected a number each, the chosen one smaller")
    return (1, 2)


def own_columns_inside(draft: Draft, *taken: str) -> Row:
    """The row's own columns for an inner object of the format, without canonical names and those in
    `taken`, which would be mistaken for parts of the format.
    """
    for name in (*taken, *CANONICAL):
        if draft.own.pop(name, None) is not None:
            draft.notes.append(f"{name} is not carried: the format has its own {name}")
    own, draft.own = draft.own, {}
    return own
