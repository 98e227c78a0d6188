"""How the turns of an episode are joined: what stands between two turns that a policy wrote.

What the policy wrote is never tokenised again, since other tokens may say the same text. Behind its
end token comes what the chat template writes there: the environment's messages, and the beginning
of the next answer. A text without a template is continued by the environment's text alone.

An environment's text may spell a special token, and is not to become it: the output of a tool must
not end a turn or begin one. A mark is put into each such token's text. Where the rendered text has
the mark, it is cut, and the pieces are tokenised apart: none of them spells the token any more, and
together they say the text.
"""

import itertools
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.models.encoding import answer_ids, is_chat, prompt_ids, render
from rlhf.models.templates import TemplateRefusal
from rlhf.models.turns import (
    check_rows,
    closing_id,
    habits,
    ids_of,
    prompt_text,
    single_bos,
    special_ids,
    text_of,
)
from rlhf.types import Message, Observation, Prompt, Tools, UserError

_MARK = "Zanzibar"  # an answer that no template writes by itself
# of the check: two answers, what an environment says between them, and an answer with reasoning
_FIRST, _SECOND = "It is so: twelve, of course.", '"Yes", she said.'
_BETWEEN = "Seven, said the sailor."
_REASONED = "<think>\nTwelve is even.\n</think>\n\nIt is so."


@dataclass(frozen=True, slots=True)
class Joiner:
    """Joins turns under a tokenizer's template, which shows these functions to be called."""

    tokenizer: Any
    tools: Tools | None = None
    # what `opened` has made, by prompt and observation: a group's episodes begin alike
    _known: dict[str, Prompt] = field(default_factory=dict, compare=False, repr=False)

    def opened(self, prompt: Prompt, observation: Observation) -> Prompt:
        """The first prompt of an episode: a row's own, and what the environment begins with ("" or
        no messages where that is nothing). Raises ValueError and UserError for what can't be
        rendered.
        """
        chat = is_chat(prompt.source)
        if not observation and (self.tools == prompt.tools or not chat):
            return prompt
        key = f"{prompt.id}/{observation}"
        if key not in self._known:
            self._known[key] = self._opened(prompt, observation)
        return self._known[key]

    def _opened(self, prompt: Prompt, observation: Observation) -> Prompt:
        source: Any = prompt.text
        if prompt.source is not None:
            source = prompt.source
        marks = Marks.beside(self.tokenizer, source, observation, self.tools)
        told = marks.put(observation)
        if is_chat(source):
            text = prompt_text(self.tokenizer, [*source, *messages_of(told)], self.tools)
            ids = single_bos(self.tokenizer, marks.ids(text))
            source = [*source, *messages_of(observation)]
        else:
            first, rest = marks.cut(source + _text_alone(told))
            ids = prompt_ids(self.tokenizer, first)
            ids += marks.ids_behind(rest)
            source = source + _text_alone(observation)
        return Prompt(
            prompt.id,
            text_of(self.tokenizer, ids),
            tuple(ids),
            source,
            prompt.fields,
            self.tools,
            prompt.limit,
        )

    def observation_ids(self, source: object, observation: Observation) -> list[int]:
        """The tokens from behind the end token of a policy's turn to where it writes the next one.
        `source`: of the episode's prompt, a text or messages. Raises UserError for messages that
        the template can't render there, and for tokens that the model has no row for.
        """
        marks = Marks.beside(self.tokenizer, source, observation, self.tools)
        told = marks.put(observation)
        try:
            if not isinstance(source, list):
                return marks.ids(_text_alone(told))
            return self._between(source, messages_of(told), marks)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    def _between(
        self, source: list[Message], observation: Sequence[Message], marks: "Marks"
    ) -> list[int]:
        unread = habits(self.tokenizer).unread
        for message in observation:
            if message["role"] in unread:
                raise UserError(
                    f"the environment answers in the role {message['role']}, which the chat "
                    f"template of {self._name()} never reads. Set data.chat_template to one that "
                    "does."
                )
        end = self.tokenizer.convert_ids_to_tokens(closing_id(self.tokenizer, chat=True))
        mark = _MARK
        while mark in f"{source}{observation}{self.tools}":
            mark += "a"
        answer: Message = {"role": "assistant", "content": mark}
        text = prompt_text(self.tokenizer, [*source, answer, *observation], self.tools)
        _, found, behind = text.partition(mark)
        blanks, closed, rest = behind.partition(end)
        if not found or not closed or blanks.strip():
            raise UserError(
                f"the chat template of {self._name()} does not end an answer with {end!r} where "
                f"an environment's message follows: it goes on with {behind[:40]!r}. Set "
                "data.chat_template to one that does."
            )
        # With the end token in front, some of which take the blanks behind them.
        return marks.ids(rest, end)

    def _name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__)

    # ---- the check at the start ----

    def check(self, source: object) -> list[str]:
        """Joined turns behind the prompt `source` are what the template and the tokenizer make of
        the whole conversation. Returns notes worth a warning. Raises UserError naming what differs.
        """
        if not isinstance(source, list):
            return []  # nothing is rendered
        difference = self._difference(source, _FIRST)
        if difference is not None:
            raise UserError(
                f"environment: turns can't be joined under the chat template of {self._name()}: "
                f"{difference}. Set data.chat_template to one that leaves earlier turns as they "
                "are, such as chatml or hermes."
            )
        if self._difference(source, _REASONED) is None:
            return []
        return [
            f"the chat template of {self._name()} renders earlier answers without their reasoning. "
            "In an episode the policy goes on from all that it wrote."
        ]

    def _difference(self, source: list[Message], first: str) -> str | None:
        """How joined turns differ from the rendered conversation; None where they don't."""
        role = "tool" if self.tools else "user"
        observed: list[Message] = [{"role": role, "content": _BETWEEN}]
        answer: Message = {"role": "assistant", "content": first}
        last: Message = {"role": "assistant", "content": _SECOND}
        whole = [*source, answer, *observed, last]
        try:
            joined = [
                *prompt_ids(self.tokenizer, source, self.tools),
                *answer_ids(self.tokenizer, source, answer, self.tools),
                *self._between(source, observed, Marks.beside(self.tokenizer, whole, self.tools)),
                *answer_ids(self.tokenizer, whole[:-1], last, self.tools),
            ]
            rendered = render(self.tokenizer, whole, generation_prompt=False, tools=self.tools)
        except (TemplateRefusal, ValueError) as error:
            return str(error)
        if rendered[: len(joined)] == joined:
            return None
        pairs = zip(rendered, joined, strict=False)
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(rendered))
        shown = [text_of(self.tokenizer, ids[same : same + 8]) for ids in (joined, rendered)]
        return f"joined they go on with {shown[0]!r}, rendered as a whole with {shown[1]!r}"


def messages_of(observation: Observation) -> list[Message]:
    """An observation as messages: a text is the user's."""
    if not isinstance(observation, str):
        return list(observation)
    return [{"role": "user", "content": observation}] if observation else []


def words_of(observation: Observation) -> str:
    """What an environment says, for people: the texts of its messages."""
    if isinstance(observation, str):
        return observation
    return "\n".join(message["content"] for message in observation)


def _text_alone(observation: Observation) -> str:
    """What a prompt that is a text is continued with. Raises UserError for messages."""
    if isinstance(observation, str):
        return observation
    raise UserError(
        "the environment answers with messages, but the row's prompt is a text, which no chat "
        "template renders. Give prompts as messages, or environments that answer with texts."
    )


# ---- special tokens that an environment spells ----

_PRIVATE = range(0xE000, 0xF900)  # Unicode's characters for private use
_KNOWN: "weakref.WeakKeyDictionary[Any, re.Pattern[str] | None]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Marks:
    """Puts marks into the texts of special tokens, and cuts rendered texts at the marks."""

    tokenizer: Any
    mark: str  # one character, which stands nowhere else

    @classmethod
    def beside(cls, tokenizer: Any, *texts: object) -> "Marks":
        """With a mark that none of the texts or messages holds, not as JSON writes it either."""
        told = repr(texts)  # has such characters as JSON has them
        return cls(tokenizer, next(chr(c) for c in _PRIVATE if _in_json(c) not in told))

    def put(self, observation: Observation) -> Observation:
        """`observation` with a mark in each text of a special token."""
        if isinstance(observation, str):
            return self._text(observation)
        return [self.put_message(message) for message in observation]

    def put_message(self, message: Message) -> Message:
        """The same of one message."""
        out = dict(message)
        for key, value in message.items():
            if isinstance(value, str) and key != "role":
                out[key] = self._text(value)
        return out  # type: ignore[return-value] # the same keys

    def _text(self, text: str) -> str:
        pattern = _pattern(self.tokenizer)
        if pattern is None:
            return text
        return pattern.sub(lambda found: found[0][0] + self.mark + found[0][1:], text)

    def cut(self, text: str) -> tuple[str, list[str]]:
        """A text up to its first mark, and what lies between and behind the marks."""
        first, *rest = text.replace(_in_json(ord(self.mark)), self.mark).split(self.mark)
        return first, rest

    def ids(self, text: str, head: str = "") -> list[int]:
        """Token ids of a rendered text, of which the marks are no part. head: the text of a special
        token before it, whose id is left out.
        """
        first, rest = self.cut(text)
        ids = [*_behind(self.tokenizer, head, [first])[0], *self.ids_behind(rest)]
        check_rows(self.tokenizer, ids)
        return ids

    def ids_behind(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of texts that go on with another text: some tokenizers begin every text with a
        blank, but not behind a special token.
        """
        if not pieces:
            return []
        end = self.tokenizer.convert_ids_to_tokens(closing_id(self.tokenizer, chat=True))
        return list(itertools.chain(*_behind(self.tokenizer, end, pieces)))


def conversation_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools | None) -> list[int]:
    """What a policy reads before its next turn, as `prompt_ids` has it; what tools said stays text.
    Raises TemplateRefusal.
    """
    marks = Marks.beside(tokenizer, messages, tools)
    told: list[Message] = []
    for message in messages:
        is_told = message["role"] == "tool"
        told.append(marks.put_message(message) if is_told else message)
    return single_bos(tokenizer, marks.ids(prompt_text(tokenizer, told, tools)))


def _in_json(character: int) -> str:
    return f"\\u{character:04x}"


def _behind(tokenizer: Any, head: str, texts: Sequence[str]) -> list[list[int]]:
    drop = 1 if head else 0
    return [ids[drop:] for ids in ids_of(tokenizer, [head + text for text in texts])]


def _pattern(tokenizer: Any) -> "re.Pattern[str] | None":
    """What finds the texts of special tokens, the longest first."""
    if tokenizer not in _KNOWN:
        texts = {str(tokenizer.convert_ids_to_tokens(i)) for i in special_ids(tokenizer)}
        several = sorted((text for text in texts if len(text) > 1), key=lambda t: (-len(t), t))
        together = "|".join(re.escape(text) for text in several)
        _KNOWN[tokenizer] = re.compile(together) if together else None
    return _KNOWN[tokenizer]
