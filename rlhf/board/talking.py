"""Conversations of the chat page: with one model, or with two whose answers stand side by side
without names until the reader chose. What was said becomes the rows that stage=chat writes.
"""

import random
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.board.workers import Voice, Worker
from rlhf.serving.conversation import Answer, Conversation, Kept, Saved
from rlhf.types import Message, UserError

MOST = 50  # conversations that are kept
Get = Callable[[Voice], Worker]  # a loaded model
Before = tuple[list[Message], list[dict[str, Any]]]  # turns and pairs


@dataclass
class Shown:
    """An answer as it grows, or as it stands to be chosen."""

    voice: Voice
    text: str = ""
    whole: bool = False
    done: bool = False


@dataclass
class Chat:
    """One conversation. state: idle, answering, choosing (between two answers)."""

    voices: tuple[Voice, ...]
    folder: Path  # of saved rows
    said: Conversation
    greedy: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    state: str = "idle"
    question: str = ""
    shown: list[Shown] = field(default_factory=list)
    problem: str | None = None
    told: list[str] | None = None  # names of the models in the order shown, after a choice
    note: str | None = None  # key of what else is to be told
    saved: Saved | None = None
    votes: dict[str, int] = field(default_factory=dict)  # by model
    _asked: int = 0
    _worker: Worker | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    # ---- asking ----

    def say(
        self, question: str, get: Get, *, two: bool, before: Before | None = None
    ) -> threading.Thread | None:
        """Begin to answer in a thread; two: also where there is one model; before: what was said,
        where no answer comes. None where there is nothing to answer, or an answer is awaited.
        """
        with self._lock:
            if self.state != "idle" or not question:
                return None
            voices = list(self.voices)
            if two and len(voices) == 1:
                voices *= 2
            if len(voices) == 2:
                random.Random(f"{self.id}/{self._asked}").shuffle(voices)
            self.state, self.question = "answering", question
            self.shown = [Shown(voice) for voice in voices]
            self._forget()
        thread = threading.Thread(target=self._answer, args=(get, before), daemon=True)
        thread.start()
        return thread

    def again(self, get: Get) -> threading.Thread | None:
        """Two answers to the last question, in the place of its one. Raises UserError."""
        with self._lock:
            question = self.said.last_question()
            if self.state != "idle" or question is None:
                return None
            before = list(self.said.turns), list(self.said.pairs)
            self.said.undo()
        return self.say(question, get, two=True, before=before)

    def _forget(self) -> None:
        self.problem = self.note = self.told = self.saved = None

    def _answer(self, get: Get, before: Before | None) -> None:
        messages = self.said.messages(self.question)
        try:
            for shown in self.shown:
                self._asked += 1
                self._worker = get(shown.voice)
                self._write(self._worker, shown, messages)
        except (UserError, OSError, ValueError) as error:
            with self._lock:
                self.problem, self.state, self.shown = str(error), "idle", []
                if before is not None:
                    self.said.turns, self.said.pairs = before
            return
        finally:
            self._worker = None
        with self._lock:
            self._settle()

    def _write(self, worker: Worker, shown: Shown, messages: list[Message]) -> None:
        def tell(piece: str) -> None:
            shown.text += piece

        shown.text, shown.whole = worker.ask(messages, self._asked, self.greedy, tell)
        shown.done = True

    def _settle(self) -> None:
        """The answers are there."""
        answers = self._answers()
        if len(answers) == 2 and answers[0].turns != answers[1].turns:
            self.state = "choosing"
            return
        self.note = "chat.same" if len(answers) == 2 else None
        self.said.keep(self.question, answers[0])
        self._end()

    def _answers(self) -> list[Answer]:
        return [
            Answer(({"role": "assistant", "content": shown.text},), shown.whole)
            for shown in self.shown
        ]

    def _end(self) -> None:
        self.state, self.question, self.shown = "idle", "", []

    # ---- what the reader does ----

    def choose(self, which: int | None) -> None:
        """The answer of that number is better; None: neither, and the first model's goes on."""
        with self._lock:
            if self.state != "choosing":
                return
            answers = self._answers()
            if which is None:
                own = [shown.voice for shown in self.shown].index(self.voices[0])
                self.said.keep(self.question, answers[own])
                self.note = "chat.neither.kept"
            elif self._prefers(answers[which], answers[1 - which]):
                self.note = "chat.preferred"
                winner = self.shown[which].voice.path
                self.votes[winner] = self.votes.get(winner, 0) + 1
            else:
                self.note = "chat.cut.no_pair"
            if len(self.voices) == 2:
                self.told = [shown.voice.path for shown in self.shown]
            self._end()

    def _prefers(self, better: Answer, worse: Answer) -> bool:
        return self.said.prefer(self.question, better, worse) is Kept.pair

    def cut(self) -> None:
        """End the answer that is being written."""
        worker = self._worker
        if worker is not None:
            worker.cut()

    def undo(self) -> None:
        """Take back the last question. Raises UserError."""
        with self._lock:
            if self.state == "choosing":
                self._end()
            elif self.state == "idle":
                self.said.undo()
            self._forget()

    def clear(self, system: str | None) -> None:
        """Begin anew with this system message."""
        with self._lock:
            if self.state != "answering":
                self._end()
                self.said.clear()
                self.said.system = system
                self._forget()

    def save(self) -> None:
        """Write the rows. Raises UserError where there are none."""
        with self._lock:
            self._forget()
            self.saved = self.said.save(self.folder)


class Chats:
    """The conversations of this board, by id; the oldest go first."""

    def __init__(self) -> None:
        self._held: dict[str, Chat] = {}

    def add(self, chat: Chat) -> None:
        """Keep one more."""
        self._held[chat.id] = chat
        for old in list(self._held)[:-MOST]:
            del self._held[old]

    def get(self, name: str) -> Chat | None:
        """None for an id that is not there."""
        return self._held.get(name)

    def all(self) -> list[Chat]:
        """The newest first."""
        return list(self._held.values())[::-1]
