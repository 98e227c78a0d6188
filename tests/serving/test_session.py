"""A conversation in the terminal: commands, comparisons without names, and rows that training
reads.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import config
from rlhf.data import reading
from rlhf.process.supervision import Terminated
from rlhf.serving.session import PREFERENCES, TRAINING, Session
from rlhf.serving.talkers import Toolbox
from rlhf.types import Message, UserError


class Scripted:
    """Answers by number: `name` 1, `name` 2 and so on, in pieces; keeps what it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.finished = name, True
        self.toolbox: Toolbox | None = None
        self.asked: list[list[Message]] = []
        self.seeds: list[int] = []
        self.cut = False  # the next answer reaches the longest length
        self.interrupted = False  # Ctrl-C behind the first piece
        self.refuses = False

    def stream(self, messages: Sequence[Message], seed: int, *, greedy: bool) -> Iterator[str]:
        if self.refuses:
            raise UserError("the conversation has 99 tokens")
        self.asked.append(list(messages))
        self.seeds.append(seed)
        yield self.name
        if self.interrupted:
            raise KeyboardInterrupt
        yield f" {len(self.asked)}"
        self.finished = not self.cut

    def close(self) -> None: ...


class Terminal:
    """A session with what the user types, line by line; the input ends behind the last one."""

    def __init__(self, folder: Path, other: Any = None, **options: Any) -> None:
        self.model = Scripted("model")
        self.other = other or self.model
        self.lines: list[str] = []
        self.shown = ""
        self.session = Session(
            self.model, self.other, self._read, self._write, folder / "rows", **options
        )
        self.folder = folder / "rows"

    def _read(self, prompt: str) -> str:
        self._write(prompt)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def _write(self, text: str) -> None:
        self.shown += text

    def type(self, *lines: str) -> str:
        """What is shown from here on."""
        self.lines, self.shown = list(lines), ""
        self.session.run()
        return self.shown

    @property
    def said(self) -> list[str]:
        return [turn["content"] for turn in self.session.turns]


def rows(stage: str, path: Path) -> Any:
    cfg = config.compose([f"stage={stage}", f"data.path={path}", "data.eval_path=" + str(path)])
    request = reading.DataRequest.of(cfg)
    if stage == "sft":
        return [row["messages"] for row in reading.sft_rows(request)[0]]
    return reading.preference_pairs(request)[0]


def test_answers_see_the_conversation(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, system="Be kind.")
    shown = terminal.type("Hello", "", "And then?")
    assert "model 1" in shown and "model 2" in shown
    assert terminal.said == ["Hello", "model 1", "And then?", "model 2"]
    roles = [message["role"] for message in terminal.model.asked[1]]
    assert roles == ["system", "user", "assistant", "user"]
    assert terminal.model.asked[1][0]["content"] == "Be kind."
    assert len(set(terminal.model.seeds)) == 2  # or a second answer would be the first's


def test_commands(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.type("Hello", "More", "/undo", "/system In verse.", "Again")
    assert terminal.said == ["Hello", "model 1", "Again", "model 3"]
    assert terminal.model.asked[2][0] == {"role": "system", "content": "In verse."}
    history = terminal.type("/history")
    assert "system> In verse." in history and "assistant> model 3" in history
    assert "/compare" in terminal.type("/help")
    terminal.type("/system", "/clear", "Anew")
    assert terminal.model.asked[-1] == [{"role": "user", "content": "Anew"}]
    assert "/flip" in terminal.type("/flip") and "undo" in terminal.type("/clear", "/undo")
    assert terminal.type("Last", "/quit", "never") and terminal.lines == ["never"]


def test_a_conversation_that_has_no_room_stays_as_it_was(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.type("Hello")
    terminal.model.refuses = True
    assert "99 tokens" in terminal.type("Long")
    assert "99 tokens" in terminal.type("/compare")
    assert terminal.said == ["Hello", "model 1"]


@pytest.mark.parametrize("better", ["1", "2"])
def test_a_comparison_becomes_a_pair_of_the_choice(better: str, tmp_path: Path) -> None:
    other = Scripted("other")
    terminal = Terminal(tmp_path, other, system="Be kind.")
    shown = terminal.type("Hello", "/compare Why?", "maybe", better, "/save")
    first, second = (shown.split(f"[{number}] ")[1].split("\n")[0] for number in (1, 2))
    chosen, rejected = (first, second) if better == "1" else (second, first)
    assert {first, second} == {"model 2", "other 1"}
    assert "other" in shown.split("better")[-1]  # names only after the choice
    assert "was" not in shown.split("better")[0]
    assert terminal.said == ["Hello", "model 1", "Why?", chosen]
    (pair,) = rows("dpo", terminal.folder / PREFERENCES)
    assert [message["content"] for message in pair.prompt] == ["Be kind.", *terminal.said[:3]]
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == (chosen, rejected)


def test_the_order_of_a_comparison_varies(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, Scripted("other"))
    shown = terminal.type(*["/compare Why?", "1"] * 12)
    first = [part.split(" ")[0] for part in shown.split("[1] ")[1::2]]
    assert {"model", "other"} <= set(first)


def test_the_last_answer_is_compared_anew(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.type("Hello", "/compare", "2")
    assert terminal.said[0] == "Hello" and terminal.said[1] in ("model 2", "model 3")
    assert len(terminal.said) == 2
    assert "comparison" in terminal.type("/undo")
    assert terminal.said == []
    with pytest.raises(UserError, match="/compare"):
        terminal.session._compare("")


def test_without_a_preference_there_is_no_pair(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, Scripted("other"))
    terminal.type("/compare Why?", "n", "/save")
    assert terminal.said == ["Why?", "model 1"]
    assert not (terminal.folder / PREFERENCES).exists()


def test_unsaved_comparisons_are_told_at_the_end(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, Scripted("other"))
    assert "/save" in terminal.type("/compare Why?", "1").split("was")[-1]
    assert "1 comparisons" not in terminal.type("/save", "/quit").split("comparisons: ")[-1]


def test_a_longer_conversation_takes_the_place_of_its_row(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    path = terminal.folder / TRAINING
    terminal.type("One", "/save", "/clear", "Two", "/save", "Three", "/save")
    held = [[m["content"] for m in messages] for messages in rows("sft", path)]
    assert held == [["One", "model 1"], ["Two", "model 2", "Three", "model 3"]]
    later = Terminal(tmp_path)  # another session appends
    later.type("Four", "/save")
    assert len(rows("sft", path)) == 3
    assert "nothing to save" in Terminal(tmp_path).type("/save")


def test_without_an_answer_that_trains_there_is_no_row(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.model.cut = True
    assert "no row" in terminal.type("One", "/save")
    assert not (terminal.folder / TRAINING).exists()


def test_a_signal_to_end_is_not_taken_for_ctrl_c(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.model.name = "said"

    def stream(messages: Any, seed: int, *, greedy: bool) -> Iterator[str]:
        yield "said"
        raise Terminated(15)

    terminal.model.stream = stream  # type: ignore[method-assign]
    with pytest.raises(Terminated):
        terminal.type("One")


def test_control_characters_are_shown_as_text(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.model.name = "\x1b]0;title\x07 \u202e\u00e9\t\u4f60\u3000\n"
    shown = terminal.type("One", "/history", "/save")
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert shown.count("\\x1b]0;title\\x07 \\u202e\u00e9\t\u4f60\u3000\n") == 2
    (messages,) = rows("sft", terminal.folder / TRAINING)
    assert messages[-1]["content"].startswith("\x1b]0;")  # a row has what was said


@pytest.mark.parametrize("how", ["cut", "interrupted"])
def test_an_answer_that_was_cut_does_not_train(how: str, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, Scripted("other"))
    terminal.type("One")
    setattr(terminal.model, how, True)
    shown = terminal.type("Two", "/compare Three", "1", "/save")
    assert "[longest length]" in shown or "[cut short]" in shown
    assert not (terminal.folder / PREFERENCES).exists() and "no row" in shown
    (messages,) = rows("sft", terminal.folder / TRAINING)
    trains = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    assert trains[:2] == [True, False]


CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


def with_tools(folder: Path, **options: Any) -> Terminal:
    """A session whose model calls a tool in every odd turn."""
    terminal = Terminal(folder, most_turns=4, **options)

    def act(text: str) -> Sequence[Message]:
        if int(text.rsplit(maxsplit=1)[-1]) % 2 == 0:
            return ()
        return [{"role": "tool", "name": "calculator", "content": f"12\x1b[2J of {text}"}]

    terminal.model.toolbox = Toolbox([CALCULATOR], act)
    return terminal


def test_tools_answer_between_the_turns_of_an_answer(tmp_path: Path) -> None:
    terminal = with_tools(tmp_path)
    shown = terminal.type("How many?", "/history")
    assert "tool> 12\\x1b[2J of model 1" in shown and "model 2" in shown
    roles = [turn["role"] for turn in terminal.session.turns]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert [m["role"] for m in terminal.model.asked[1]] == ["user", "assistant", "tool"]
    assert "tool> 12" in shown.partition("user> How many?")[2]
    terminal.type("More", "/undo", "/save")
    (row,) = rows("sft", terminal.folder / TRAINING)
    assert [turn["role"] for turn in row] == roles and row[2]["content"].startswith("12")
    assert '"tools"' in (terminal.folder / TRAINING).read_text(encoding="utf-8")
    terminal.type("/undo")
    assert terminal.session.turns == []


def test_an_answer_takes_most_turns_at_most(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, most_turns=2)
    said: Message = {"role": "tool", "content": "again"}
    terminal.model.toolbox = Toolbox([CALCULATOR], lambda text: [said])
    terminal.type("How many?")
    assert [turn["role"] for turn in terminal.session.turns] == [
        "user", "assistant", "tool", "assistant"
    ]  # fmt: skip


def test_a_comparison_of_answers_that_called_tools_is_no_row(tmp_path: Path) -> None:
    terminal = with_tools(tmp_path)
    assert "called tools" in terminal.type("/compare How many?", "1", "/save")
    assert not (terminal.folder / PREFERENCES).exists()
