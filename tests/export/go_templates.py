"""The part of Go's text/template that our Modelfiles use, read anew from its documentation: text,
range, if, else if, else, end, variables, fields, eq, strings. Checked once against Go 1.27 itself.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PARTS = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
_WORDS = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s"]+')


class Template:
    """A template, and what it writes for messages as Ollama gives them."""

    def __init__(self, text: str) -> None:
        pieces = _PARTS.split(text)
        self._parts = [(i % 2 == 1, piece) for i, piece in enumerate(pieces)]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        self._variables: dict[str, str] = {}
        self._at = 0
        dot = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        out = "".join(self._block(dot, True))
        assert self._at == len(self._parts), "an end too many"
        return out

    def _block(self, dot: Any, runs: bool) -> Iterator[str]:
        """Up to the action that ends the block, which is left for the caller."""
        while self._at < len(self._parts):
            is_action, text = self._parts[self._at]
            if is_action and (text == "end" or text.startswith("else")):
                return
            self._at += 1
            if not is_action:
                yield text if runs else ""
            elif text.startswith("range "):
                yield from self._range(dot, text.removeprefix("range "), runs)
            elif text.startswith("if "):
                yield from self._if(dot, text.removeprefix("if "), runs)
            elif " = " in text or ":=" in text:
                name, _, value = re.split(r" (:?=) ", text)
                if runs:
                    self._variables[name] = self._value(dot, value)
            else:
                yield self._value(dot, text) if runs else ""

    def _range(self, dot: Any, what: str, runs: bool) -> Iterator[str]:
        start = self._at
        for item in self._value(dot, what) if runs else []:
            self._at = start
            yield from self._block(item, True)
        if self._at == start:
            yield from self._block(dot, False)
        self._at += 1

    def _if(self, dot: Any, condition: str, runs: bool) -> Iterator[str]:
        taken = False
        while True:
            holds = runs and not taken and self._holds(dot, condition)
            taken = taken or holds
            yield from self._block(dot, holds)
            text = self._parts[self._at][1]
            self._at += 1
            if text == "end":
                return
            condition = text.removeprefix("else").strip().removeprefix("if ")

    def _holds(self, dot: Any, condition: str) -> bool:
        if not condition:
            return True
        name, first, second = _WORDS.findall(condition)
        assert name == "eq"
        return bool(self._value(dot, first) == self._value(dot, second))

    def _value(self, dot: Any, word: str) -> Any:
        if word.startswith('"'):
            return json.loads(word)
        if word.startswith("$"):
            return self._variables[word]
        assert word.startswith(".")
        return dot[word[1:]]


def template_in(modelfile: str) -> str:
    """The TEMPLATE of a Modelfile."""
    _, mark, rest = modelfile.partition('TEMPLATE """')
    assert mark
    return rest.partition('"""')[0]
