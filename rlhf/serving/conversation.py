"""A conversation, the comparisons that were made in it, and the rows for training that both become.
The terminal (session.py) and the board's chat page keep theirs here. It loads no model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from rlhf.types import Message, Tools, UserError

TRAINING, PREFERENCES = "sft.jsonl", "preferences.jsonl"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote, and what tools said to it in between."""

    turns: tuple[Message, ...]  # its own first and last
    whole: bool  # it ended by itself


class Kept(Enum):
    """What a comparison became: a pair, or no row, and why."""

    pair = "pair"
    cut = "cut"  # an answer was cut short
    tools = "tools"  # an answer called tools


@dataclass(frozen=True, slots=True)
class Saved:
    """What was written: the files, where there was something for them."""

    training: Path | None
    cut: int  # answers of the conversation that don't train, since they were cut
    preferences: Path | None
    pairs: int


@dataclass
class Conversation:
    """Turns of a user and a model, and pairs of a better and a worse answer."""

    system: str | None = None
    tools: Tools | None = None  # functions that answers may call
    turns: list[Message] = field(default_factory=list)  # user, assistant, and tools between
    pairs: list[dict[str, Any]] = field(default_factory=list)  # not saved yet
    _saved: tuple[int, int] | None = None  # where the conversation's row lies in its file

    def messages(self, question: str) -> list[Message]:
        """What is answered: the conversation with a further question."""
        return [*self._said(), {"role": "user", "content": question}]

    def _said(self) -> list[Message]:
        head: list[Message] = []
        if self.system is not None:
            head = [{"role": "system", "content": self.system}]
        return [*head, *self.turns]

    def keep(self, question: str, answer: Answer) -> None:
        """The question and its answer are said."""
        self.turns += [{"role": "user", "content": question}, *answer.turns]
        if not answer.whole:
            self.turns[-1] = {**self.turns[-1], "train": False}  # it would teach to end there

    def prefer(self, question: str, better: Answer, worse: Answer) -> Kept:
        """Keep a comparison as a pair, where it makes one, and the better answer as what was
        said.
        """
        kept = Kept.pair
        if len(better.turns) > 1 or len(worse.turns) > 1:
            kept = Kept.tools
        elif not (better.whole and worse.whole):
            kept = Kept.cut
        else:
            self.pairs.append(self._pair(question, better.turns, worse.turns))
        self.keep(question, better)
        return kept

    def _pair(
        self, question: str, chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": self.messages(question)}
        row |= {"chosen": list(chosen), "rejected": list(rejected)}
        return self._with_tools(row)

    def _with_tools(self, row: dict[str, Any]) -> dict[str, Any]:
        return row if self.tools is None else {**row, "tools": self.tools}

    def last_question(self) -> str | None:
        """None before anything was asked."""
        return self.turns[self._last_asked()]["content"] if self.turns else None

    def _last_asked(self) -> int:
        """Where the last question stands."""
        return max(i for i, turn in enumerate(self.turns) if turn["role"] == "user")

    def undo(self) -> bool:
        """Take the last question and its answer back, and a comparison of them; whether there was
        one. Raises UserError where nothing was said.
        """
        question = self.last_question()
        if question is None:
            raise UserError("there is nothing to undo.")
        del self.turns[self._last_asked() :]
        taken = bool(self.pairs) and self.pairs[-1]["prompt"] == self.messages(question)
        if taken:
            self.pairs.pop()
        return taken

    def clear(self) -> None:
        """Begin anew; comparisons stay."""
        self.turns.clear()
        self._saved = None

    def save(self, folder: Path) -> Saved:
        """Append the conversation as a row for stage=sft, and the comparisons as pairs. A longer
        conversation takes the place of its own earlier row; one whose every answer was cut is none.
        Raises UserError where there is nothing.
        """
        if not self.turns and not self.pairs:
            raise UserError("there is nothing to save yet.")
        folder.mkdir(parents=True, exist_ok=True)
        own = [turn for turn in self.turns if turn["role"] == "assistant"]
        cut = sum(turn.get("train") is False for turn in own)
        training = preferences = None
        if cut < len(own):
            training = folder / TRAINING
            self._write_conversation(training, self._with_tools({"messages": self._said()}))
        count = len(self.pairs)
        if count:
            preferences = folder / PREFERENCES
            with preferences.open("a", encoding="utf-8") as file:
                file.writelines(_row(pair) for pair in self.pairs)
            self.pairs.clear()
        return Saved(training, cut, preferences, count)

    def _write_conversation(self, path: Path, row: dict[str, Any]) -> None:
        size = path.stat().st_size if path.is_file() else 0
        start = size
        if self._saved is not None and self._saved[1] == size:
            start = self._saved[0]
        with path.open("r+b" if path.is_file() else "wb") as file:
            file.seek(start)
            file.truncate()
            file.write(_row(row).encode("utf-8"))
            self._saved = (start, file.tell())


def _row(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
