"""A conversation in the terminal: messages, commands, and rows of what was said."""

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.process.supervision import Terminated
from rlhf.serving.talkers import Talker
from rlhf.types import Message, UserError

TRAINING, PREFERENCES = "sft.jsonl", "preferences.jsonl"
HELP = """\
/compare [MESSAGE]   two answers, to MESSAGE or to the last one again; you choose without names
/undo                take the last message and its answer back
/system [TEXT]       another system message, or none; the conversation goes on
/clear               begin anew
/history             what was said
/save                write the conversation and the comparisons as rows for training
/quit                end (so does Ctrl-D); Ctrl-C cuts an answer short"""
_CHOICES = {"1": 0, "2": 1}

# overrides and isolates of the direction in which a text runs
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

Read = Callable[[str], str]  # shows a prompt; raises EOFError where the input ends
Write = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a talker wrote, and what tools said to it in between."""

    turns: tuple[Message, ...]  # its own first and last
    whole: bool  # it ended by itself


@dataclass
class Session:
    """A conversation with one talker, and comparisons with another."""

    talker: Talker
    other: Talker
    read: Read
    write: Write
    folder: Path  # of saved rows
    seed: int = 0
    greedy: bool = False
    system: str | None = None
    most_turns: int = 1  # of an answer that calls functions
    turns: list[Message] = field(default_factory=list)  # user, assistant, and tools between
    _pairs: list[dict[str, Any]] = field(default_factory=list)  # not saved yet
    _saved: tuple[int, int] | None = None  # where the conversation's row lies in its file
    _asked: int = 0  # answers so far, each with a seed of its own

    def run(self) -> None:
        """Until the user ends it."""
        self.write("/help lists the commands.\n")
        while True:
            line = self._line("you> ")
            if line is None:
                line = "/quit"
            if line == "/quit":
                return self._leave()
            try:
                self._take(line)
            except UserError as error:
                self.write(f"{error}\n")

    def _line(self, prompt: str) -> str | None:
        """What the user types; None at the input's end and for Ctrl-C."""
        try:
            return self.read(prompt).strip()
        except Terminated:  # SIGTERM ends the process
            raise
        except (EOFError, KeyboardInterrupt):
            return None

    def _leave(self) -> None:
        if self._pairs:
            self.write(f"\n{len(self._pairs)} comparisons were not saved (/save).\n")

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.write(HELP + "\n"),
            "/compare": self._compare,
            "/undo": lambda _: self._undo(),
            "/system": self._set_system,
            "/clear": lambda _: self._clear(),
            "/history": lambda _: self._history(),
            "/save": lambda _: self._save(),
        }
        if command in commands:
            commands[command](rest.strip())
        elif command.startswith("/"):
            raise UserError(f"there is no command {command}. /help lists them.")
        elif line:
            self._ask(line)

    # ---- answers ----

    def _messages(self, question: str) -> list[Message]:
        """What is answered: the conversation with a further question."""
        head: list[Message] = []
        if self.system is not None:
            head = [{"role": "system", "content": self.system}]
        return [*head, *self.turns, {"role": "user", "content": question}]

    def _ask(self, question: str) -> None:
        self._keep(question, self._answer(self.talker, question, ""))

    def _keep(self, question: str, answer: Answer) -> None:
        self.turns += [{"role": "user", "content": question}, *answer.turns]
        if not answer.whole:
            self.turns[-1] = {**self.turns[-1], "train": False}  # it would teach to end there

    def _answer(self, talker: Talker, question: str, heading: str) -> Answer:
        """An answer, with the tools that it calls."""
        turns: list[Message] = []
        while True:
            text, whole = self._stream(talker, [*self._messages(question), *turns], heading)
            turns.append({"role": "assistant", "content": text})
            last = len([turn for turn in turns if turn["role"] == "assistant"]) == self.most_turns
            observed: Sequence[Message] = ()
            if talker.toolbox is not None and whole and not last:
                observed = talker.toolbox.act(text)
            if not observed:
                return Answer(tuple(turns), whole)
            for message in observed:
                self.write(f"{message['role']}> {visible(message['content'])}\n")
            turns += observed
            heading = ""

    def _stream(
        self, talker: Talker, messages: Sequence[Message], heading: str
    ) -> tuple[str, bool]:
        """A turn, shown while it is written, and whether it ended by itself. Ctrl-C cuts it
        short.
        """
        self._asked += 1
        seed = self.seed * 1_000_003 + self._asked
        pieces: list[str] = []
        cut = False
        self.write(heading)
        try:
            for piece in talker.stream(messages, seed, greedy=self.greedy):
                pieces.append(piece)
                self.write(visible(piece))
        except Terminated:
            raise
        except KeyboardInterrupt:
            cut = True
        if cut:
            self.write(" [cut short]")
        elif not talker.finished:
            self.write(" [longest length]")
        self.write("\n")
        return "".join(pieces), talker.finished and not cut

    # ---- commands ----

    def _compare(self, question: str) -> None:
        """Two answers, in an order that the user doesn't know."""
        before = list(self.turns), list(self._pairs)
        if not question:
            question = self._last_question()
            self._undo(quiet=True)
        try:
            self._compare_answers(question)
        except UserError:
            self.turns, self._pairs = before
            raise

    def _compare_answers(self, question: str) -> None:
        shown = [self.talker, self.other]
        random.Random(f"{self.seed}/{self._asked}").shuffle(shown)
        answers: list[Answer] = []
        for number, talker in enumerate(shown, 1):
            answers.append(self._answer(talker, question, f"[{number}] "))
        chosen = self._chosen(answers)
        if chosen is None:
            self._keep(question, answers[shown.index(self.talker)])
            self.write("no preference; the conversation goes on with the model's own answer\n")
            return
        better, worse = answers[chosen], answers[1 - chosen]
        if len(better.turns) > 1 or len(worse.turns) > 1:
            self.write("an answer called tools, so the comparison becomes no row\n")
        elif better.whole and worse.whole:
            self._pairs.append(self._pair(question, better.turns, worse.turns))
        else:
            self.write("an answer was cut, so the comparison becomes no row\n")
        self._keep(question, better)
        if self.other is not self.talker:
            self.write(f"[1] was {shown[0].name}, [2] was {shown[1].name}\n")

    def _last_question(self) -> str:
        if not self.turns:
            raise UserError("there is no message to compare answers to. /compare MESSAGE asks one.")
        return self.turns[self._last_asked()]["content"]

    def _last_asked(self) -> int:
        """Where the last question stands."""
        return max(i for i, turn in enumerate(self.turns) if turn["role"] == "user")

    def _chosen(self, answers: Sequence[Answer]) -> int | None:
        """Which answer is better; None for neither, and where the two are the same."""
        if answers[0].turns == answers[1].turns:
            self.write("both answers are the same\n")
            return None
        while True:
            line = self._line("better [1, 2, or n for neither]> ")
            if line is None or line == "n":
                return None
            if line in _CHOICES:
                return _CHOICES[line]

    def _pair(
        self, question: str, chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": self._messages(question)}
        row |= {"chosen": list(chosen), "rejected": list(rejected)}
        return self._with_tools(row)

    def _with_tools(self, row: dict[str, Any]) -> dict[str, Any]:
        toolbox = self.talker.toolbox
        return row if toolbox is None else {**row, "tools": toolbox.tools}

    def _undo(self, *, quiet: bool = False) -> None:
        """Take the last question and its answer back, and a comparison of them."""
        if not self.turns:
            raise UserError("there is nothing to undo.")
        asked = self._last_asked()
        question = self.turns[asked]["content"]
        del self.turns[asked:]
        taken = self._pairs and self._pairs[-1]["prompt"] == self._messages(question)
        if taken:
            self._pairs.pop()
        if not quiet:
            self.write("taken back" + (", with its comparison\n" if taken else "\n"))

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self.write("no system message\n" if self.system is None else "system message set\n")

    def _clear(self) -> None:
        self.turns.clear()
        self._saved = None
        self.write("a new conversation\n")

    def _history(self) -> None:
        if self.system is not None:
            self.write(f"system> {self.system}\n")
        for turn in self.turns:
            self.write(f"{turn['role']}> {visible(turn['content'])}\n")

    # ---- rows ----

    def _save(self) -> None:
        """Append the conversation as a row for stage=sft, and the comparisons as pairs. A longer
        conversation takes the place of its own earlier row.
        """
        if not self.turns and not self._pairs:
            raise UserError("there is nothing to save yet.")
        self.folder.mkdir(parents=True, exist_ok=True)
        own = [turn for turn in self.turns if turn["role"] == "assistant"]
        cut = [turn for turn in own if turn.get("train") is False]
        if own and len(cut) == len(own):
            self.write("every answer was cut, so the conversation teaches nothing: no row\n")
        elif self.turns:
            path = self.folder / TRAINING
            row = self._with_tools({"messages": self._messages("")[:-1]})
            self._write_conversation(path, row)
            self.write(f"1 conversation: {path}\n")
            if cut:
                self.write(f"{len(cut)} of its answers were cut, and don't train (train: false)\n")
        if self._pairs:
            path = self.folder / PREFERENCES
            with path.open("a", encoding="utf-8") as file:
                file.writelines(_row(pair) for pair in self._pairs)
            self.write(f"{len(self._pairs)} comparisons: {path}\n")
            self._pairs.clear()

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


def visible(text: str) -> str:
    """A text for a terminal: characters that could move its cursor, set its title or turn its
    direction, as Python writes them; line ends and tabs stay.
    """
    return "".join(repr(c)[1:-1] if _acts(c) else c for c in text)


def _acts(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) == "Cc" or character in _TURNING


def _row(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
