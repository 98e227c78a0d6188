"""A Modelfile for Ollama. Its TEMPLATE is found by trying the model's chat template: the text
before each message, by what comes before it. Whether that rule gives what the chat template gives,
token by token, is checked on conversations; a template that is no such rule is refused.

Ollama joins neighbouring messages of one role, and all system messages into one at the beginning,
before its template sees them (its package template, `collate`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.models.encoding import prompt_ids
from rlhf.models.templates import TemplateRefusal
from rlhf.models.turns import end_ids, plain_ids, prompt_text
from rlhf.types import Message, UserError

_WORDS = ("Zanzibar", "Quetzal", "Okapi", "Xylem", "Yttrium")  # that no template writes by itself
_QUOTE = '"""'
_REMEDY = "Set stage.modelfile=false, and give the chat template to llama.cpp (--jinja) instead."

# Contents of the conversations on which the rule is checked.
_TEXTS = (
    "What is 17 + 25?\nAnd 3 times that?",
    "It's 42.\n\n- twice 21\n- \u00e9t\u00e9, \u4f60\u597d",
    'Thanks; {curly} and <b>bold</b> & "quoted"?',
    "Sure: ```python\nprint('x')\n```",
    "Done.",
)
_SYSTEM = "Answer in one\nsentence."


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a chat template writes before each message and behind the last one."""

    first_user: str  # before a user's message that is the first
    answer: str  # between a user's message and the assistant's
    next_user: str  # between the assistant's message and the user's
    ask: str  # behind the last message, a user's: what the model continues
    system: str | None  # before a system message; None: the template takes none
    after_system: str | None  # between it and the user's

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a user's message."""
        out = ""
        before = None
        for message in messages:
            role = message["role"]
            out += self._lead(role, before) + message["content"]
            before = role
        return out + self.ask

    def _lead(self, role: str, before: str | None) -> str:
        if role == "system":
            return self.system or ""
        if role == "assistant":
            return self.answer
        if before is None:
            return self.first_user
        return (self.after_system or "") if before == "system" else self.next_user


@dataclass(frozen=True, slots=True)
class Template:
    """A rule that was checked, and what it leaves to say."""

    pieces: Pieces
    stops: tuple[str, ...]  # texts of the tokens that end an answer
    notes: tuple[str, ...]  # where conversations may differ all the same


def template_of(tokenizer: Any, *, adds_bos: bool) -> Template:
    """The rule of a tokenizer's chat template. `adds_bos`: whether the model's file says that bos
    stands before every text. Raises UserError where there is none.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "stage.modelfile=true: the tokenizer has no chat template. Set stage.modelfile=false."
        )
    if "strftime_now" in str(tokenizer.chat_template):
        raise _refusal("it writes today's date, and Ollama's can't")
    pieces = _pieces(tokenizer, adds_bos)
    for messages in _conversations(_TEXTS, with_system=pieces.system is not None):
        if not _agrees(tokenizer, pieces, messages, adds_bos):
            raise _refusal(
                f"for a conversation of {len(messages)} messages Ollama's gives other tokens"
            )
    stops = tuple(tokenizer.convert_ids_to_tokens(list(end_ids(tokenizer))))
    return Template(pieces, stops, tuple(_notes(tokenizer, pieces, adds_bos)))


def _refusal(reason: str) -> UserError:
    return UserError(f"stage.modelfile=true: the chat template is refused: {reason}. {_REMEDY}")


def _conversations(texts: Sequence[str], *, with_system: bool) -> list[list[Message]]:
    """Of one, three and five messages, and the same behind a system message."""
    chats: list[list[Message]] = []
    for length in (1, 3, 5):
        roles = ("user", "assistant") * 3
        chat = [_message(role, text) for role, text in zip(roles, texts[:length], strict=False)]
        chats.append(chat)
        if with_system:
            chats.append([_message("system", _SYSTEM), *chat])
    return chats


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ---- finding the pieces ----


def _pieces(tokenizer: Any, adds_bos: bool) -> Pieces:
    chat = _conversations(_WORDS, with_system=False)[-1]
    between = _between(tokenizer, chat)
    if between is None or between[1] != between[3] or between[2] != between[4]:
        raise _refusal("what it writes around a message does not follow from its role alone")
    system, after_system = _system_pieces(tokenizer, chat[0])
    first = between[0]
    if adds_bos:
        first = _without_bos(tokenizer, first)
        system = system if system is None else _without_bos(tokenizer, system)
    return Pieces(first, between[1], between[2], between[5], system, after_system)


def _between(tokenizer: Any, chat: Sequence[Message]) -> list[str] | None:
    """The texts around the messages' contents; None where a content is not there once, in order."""
    try:
        rest = prompt_text(tokenizer, list(chat))
    except TemplateRefusal as refusal:
        raise _refusal(str(refusal)) from refusal
    out = []
    for message in chat:
        before, mark, rest = rest.partition(message["content"])
        if not mark or message["content"] in rest:
            return None
        out.append(before)
    return [*out, rest]


def _system_pieces(tokenizer: Any, user: Message) -> tuple[str | None, str | None]:
    system = _message("system", _WORDS[-1])
    try:
        between = _between(tokenizer, [system, user])
    except UserError:
        return None, None
    return (None, None) if between is None else (between[0], between[1])


def _without_bos(tokenizer: Any, text: str) -> str:
    return text.removeprefix(tokenizer.bos_token or "")


def _agrees(tokenizer: Any, pieces: Pieces, chat: list[Message], adds_bos: bool) -> bool:
    ids = plain_ids(tokenizer, pieces.text(chat))
    if adds_bos:
        ids = [tokenizer.bos_token_id, *ids]
    return ids == prompt_ids(tokenizer, chat)


def _notes(tokenizer: Any, pieces: Pieces, adds_bos: bool) -> list[str]:
    """Contents that the chat template changes, and what it reads that Ollama's does not."""
    notes = ["Tools, images and documents are not in the template."]
    blanks = ("  Hello \n", "\n It is so. ", "  Why?\n")
    thought = ("Hello", "<think>\nHm.\n</think>\n\nIt is so.", "Why?")
    chats = {"blanks around messages": blanks, "the reasoning of earlier answers": thought}
    for what, texts in chats.items():
        chat = _conversations(texts, with_system=False)[1]
        if not _agrees(tokenizer, pieces, chat, adds_bos):
            notes.append(f"The chat template removes {what}; Ollama leaves them as they are.")
    if pieces.system is None:
        notes.append("The chat template takes no system message: Ollama leaves it out.")
    return notes


# ---- the file ----


def go_template(pieces: Pieces) -> str:
    """The rule as a template of Go's text/template, with Ollama's values."""
    leads = [f'{{{{ if eq $before "" }}}}{_literal(pieces.first_user)}']
    if pieces.after_system is not None:
        leads.append(f'{{{{ else if eq $before "system" }}}}{_literal(pieces.after_system)}')
    leads.append(f"{{{{ else }}}}{_literal(pieces.next_user)}{{{{ end }}}}")
    turns = [_turn("user", "".join(leads)), _turn("assistant", _literal(pieces.answer))]
    if pieces.system is not None:
        turns.append(_turn("system", _literal(pieces.system)))
    start = '{{ $before := "" }}{{ range .Messages }}'
    end = f'{{{{ end }}}}{{{{ if eq $before "user" }}}}{_literal(pieces.ask)}{{{{ end }}}}'
    return start + "".join(turns) + end


def _turn(role: str, lead: str) -> str:
    """Writes a message of the role; messages of other roles leave no trace."""
    content = f'{{{{ .Content }}}}{{{{ $before = "{role}" }}}}'
    return f'{{{{ if eq .Role "{role}" }}}}{lead}{content}{{{{ end }}}}'


def _literal(text: str) -> str:
    """A text that Go's templates write as it is: braces would begin an action."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(file: str, template: Template, license_name: str | None) -> str:
    """A Modelfile for the GGUF file of this name beside it. Raises UserError for a template that
    holds the marks by which a Modelfile quotes.
    """
    text = go_template(template.pieces)
    if _QUOTE in text:
        raise _refusal(f"it holds {_QUOTE}, by which a Modelfile quotes")
    lines = [f"FROM ./{file}", f"TEMPLATE {_QUOTE}{text}{_QUOTE}"]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in template.stops]
    if license_name is not None:
        lines.append(f"LICENSE {_quoted(license_name)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"{_QUOTE}{text}{_QUOTE}"
