"""A conversation in the terminal: messages, commands, and rows of what was said."""

import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from rlhf.process.supervision import Terminated
from rlhf.serving.conversation import PREFERENCES, TRAINING, Answer, Conversation, Kept
from rlhf.serving.talkers import Talker
from rlhf.types import Message, UserError

__all__ = ["HELP", "PREFERENCES", "TRAINING", "Session", "visible"]

HELP = """\
/compare [MESSAGE]   two answers, to MESSAGE or to the last one again; you choose without names
/undo                take the last message and its answer back
/system [TEXT]       another system message, or none; the conversation goes on
/clear               begin anew
/history             what was said
/save                write the conversation and the comparisons as rows for training
/quit                end (so does Ctrl-D); Ctrl-C cuts an answer short"""
_CHOICES = {"1": 0, "2": 1}
_WHY = {Kept.tools: "called tools", Kept.cut: "was cut"}

# overrides and isolates of the direction in which a text runs
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

Read = Callable[[str], str]  # shows a prompt; raises EOFError where the input ends
Write = Callable[[str], None]


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
    system: InitVar[str | None] = None
    most_turns: int = 1  # of an answer that calls functions
    said: Conversation = field(init=False)
    _asked: int = 0  # answers so far, each with a seed of its own

    def __post_init__(self, system: str | None) -> None:
        self.said = Conversation(system)

    @property
    def turns(self) -> list[Message]:
        """What was said: user, assistant, and tools between."""
        return self.said.turns

    def run(self) -> None:
        """Until the user ends it."""
        if self.talker.toolbox is not None:
            self.said.tools = self.talker.toolbox.tools
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
        if self.said.pairs:
            self.write(f"\n{len(self.said.pairs)} comparisons were not saved (/save).\n")

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

    def _ask(self, question: str) -> None:
        self.said.keep(question, self._answer(self.talker, question, ""))

    def _answer(self, talker: Talker, question: str, heading: str) -> Answer:
        """An answer, with the tools that it calls."""
        turns: list[Message] = []
        while True:
            text, whole = self._stream(talker, [*self.said.messages(question), *turns], heading)
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
        before = list(self.said.turns), list(self.said.pairs)
        if not question:
            question = self._last_question()
            self.said.undo()
        try:
            self._compare_answers(question)
        except UserError:
            self.said.turns, self.said.pairs = before
            raise

    def _compare_answers(self, question: str) -> None:
        shown = [self.talker, self.other]
        random.Random(f"{self.seed}/{self._asked}").shuffle(shown)
        answers: list[Answer] = []
        for number, talker in enumerate(shown, 1):
            answers.append(self._answer(talker, question, f"[{number}] "))
        chosen = self._chosen(answers)
        if chosen is None:
            self.said.keep(question, answers[shown.index(self.talker)])
            self.write("no preference; the conversation goes on with the model's own answer\n")
            return
        kept = self.said.prefer(question, answers[chosen], answers[1 - chosen])
        if kept is not Kept.pair:
            self.write(f"an answer {_WHY[kept]}, so the comparison becomes no row\n")
        if self.other is not self.talker:
            self.write(f"[1] was {shown[0].name}, [2] was {shown[1].name}\n")

    def _last_question(self) -> str:
        question = self.said.last_question()
        if question is None:
            raise UserError("there is no message to compare answers to. /compare MESSAGE asks one.")
        return question

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

    def _undo(self) -> None:
        """Take the last question and its answer back, and a comparison of them."""
        taken = self.said.undo()
        self.write("taken back" + (", with its comparison\n" if taken else "\n"))

    def _set_system(self, text: str) -> None:
        self.said.system = text or None
        self.write("no system message\n" if self.said.system is None else "system message set\n")

    def _clear(self) -> None:
        self.said.clear()
        self.write("a new conversation\n")

    def _history(self) -> None:
        if self.said.system is not None:
            self.write(f"system> {self.said.system}\n")
        for turn in self.turns:
            self.write(f"{turn['role']}> {visible(turn['content'])}\n")

    # ---- rows ----

    def _save(self) -> None:
        """Append the conversation as a row for stage=sft, and the comparisons as pairs."""
        saved = self.said.save(self.folder)
        if saved.training is not None:
            self.write(f"1 conversation: {saved.training}\n")
            if saved.cut:
                cut = saved.cut
                self.write(f"{cut} of its answers were cut, and don't train (train: false)\n")
        elif self.said.turns:
            self.write("every answer was cut, so the conversation teaches nothing: no row\n")
        if saved.preferences is not None:
            self.write(f"{saved.pairs} comparisons: {saved.preferences}\n")


def visible(text: str) -> str:
    """A text for a terminal: characters that could move its cursor, set its title or turn its
    direction, as Python writes them; line ends and tabs stay.
    """
    return "".join(repr(c)[1:-1] if _acts(c) else c for c in text)


def _acts(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) == "Cc" or character in _TURNING
