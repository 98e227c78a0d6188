"""How rows look to a model: every token with what it is to training, counts of BOS and EOS, and
what a pair's two sides share (data.preview).

The tokens are those that the stages train and score (rlhf/models/encoding.py), so what is seen here
is what a run sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Any

from conf.choices import RewrittenTurns
from rlhf.data.formats import Use
from rlhf.models import encoding
from rlhf.models.conversations import encode_apart
from rlhf.models.facts import Notices
from rlhf.models.turns import end_ids, special_ids
from rlhf.types import Message, Tools, UserError


class Part(Enum):
    """What a token is to training."""

    prompt = "prompt"  # read, not trained
    response = "response"  # written by the policy: trained, or scored
    # after the first answer, but not trained: the template's marks and later questions
    masked = "masked"
    special = "special"  # one of the tokenizer's special tokens, wherever it stands
    truncated = "truncated"  # beyond the limit


STYLES = {
    Part.prompt: "cyan",
    Part.response: "bold green",
    Part.masked: "bright_black",
    Part.special: "bold magenta",
    Part.truncated: "strike red",
}


@dataclass(frozen=True, slots=True)
class Token:
    id: int
    text: str
    part: Part
    trained: bool  # its label is itself


@dataclass(frozen=True, slots=True)
class Side:
    """One sequence of a row: a text, an answer with its prompt, or a prompt."""

    name: str
    tokens: tuple[Token, ...]
    bos: int  # how often the token that begins a sequence, and those that end one, stand in it
    eos: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RowPreview:
    """A row's sequences; `shared`: how many first tokens the sides of a pair have in common."""

    place: str
    sides: tuple[Side, ...]
    shared: int | None = None


def preview_row(
    tokenizer: Any, kind: Use, columns: dict[str, Any], place: str, limit: int | None = None
) -> RowPreview:
    """A row in canonical columns as tokens, those beyond `limit` marked. Raises UserError naming a
    row whose turns don't fit the template.
    """
    try:
        sequences = _sequences(tokenizer, kind, columns)
    except (ValueError, UserError) as error:
        raise UserError(f"{place}: {error}") from error
    # A prompt that is too long loses its beginning, everything else its end.
    sides = tuple(
        _side(tokenizer, name, ids, labels, limit, keep_end=kind is Use.prompt)
        for name, ids, labels in sequences
    )
    notices = Notices(tokenizer)
    notices.look(place, (v for key, v in columns.items() if key != "tools"))
    if notices.lines():
        sides = tuple(replace(one, problems=(*notices.lines(), *one.problems)) for one in sides)
    shared = None
    if kind is Use.preference:
        first, second = (ids for _, ids, _ in sequences)
        shared = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
    return RowPreview(place, sides, shared)


def _sequences(
    tokenizer: Any, kind: Use, columns: dict[str, Any]
) -> list[tuple[str, list[int], list[int]]]:
    """(name, token ids, labels) of each of a row's sequences."""
    tools = columns.get("tools")
    chat = any(
        isinstance(columns.get(key), list) for key in ("prompt", "messages", "chosen", "completion")
    )
    if chat:
        encoding.require_template(tokenizer, "preview")
    if kind is Use.prompt:
        ids = encoding.prompt_ids(tokenizer, columns["prompt"], tools)
        return [("prompt", ids, [encoding.IGNORED] * len(ids))]
    if kind is Use.preference:
        return [
            (side, *_answer(tokenizer, columns["prompt"], columns[side], tools))
            for side in ("chosen", "rejected")
        ]
    if kind is Use.unpaired:
        judged = "good answer" if columns["label"] else "bad answer"
        answer = _answer(tokenizer, columns["prompt"], columns["completion"], tools)
        return [(judged, *answer)]
    if "text" in columns:
        return [("text", *encoding.encode_text(tokenizer, columns["text"]))]
    if "messages" in columns:
        return _conversations(tokenizer, columns["messages"], 0, tools, "conversation")
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(completion, list):
        messages = [*prompt, *completion]
        return _conversations(tokenizer, messages, len(prompt), tools, "completion")
    return [
        (
            "completion",
            *encoding.encode_completion(tokenizer, prompt, completion, completion_only=True),
        )
    ]


def _conversations(
    tokenizer: Any, messages: list[Message], first: int, tools: Tools | None, name: str
) -> list[tuple[str, list[int], list[int]]]:
    """The sequences of a conversation: several where the template renders earlier answers
    otherwise.
    """
    parts = encode_apart(tokenizer, messages, RewrittenTurns.split, first=first, tools=tools)
    if len(parts) == 1:
        return [(name, parts[0].ids, parts[0].labels)]
    return [(f"{name} {i}", part.ids, part.labels) for i, part in enumerate(parts, start=1)]


def _answer(
    tokenizer: Any, prompt: Any, answer: Any, tools: Tools | None
) -> tuple[list[int], list[int]]:
    context, turn = encoding.split_turn(prompt or None, answer)
    before = encoding.prompt_ids(tokenizer, context, tools)
    after = encoding.answer_ids(tokenizer, context, turn, tools)
    return [*before, *after], [*([encoding.IGNORED] * len(before)), *after]


def _side(
    tokenizer: Any,
    name: str,
    ids: Sequence[int],
    labels: Sequence[int],
    limit: int | None,
    *,
    keep_end: bool,
) -> Side:
    specials = special_ids(tokenizer)
    first = next((i for i, label in enumerate(labels) if label != encoding.IGNORED), len(ids))
    start, stop = 0, len(ids)
    if limit is not None and keep_end:
        start = len(ids) - limit
    elif limit is not None:
        stop = limit
    tokens = []
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        trained = label != encoding.IGNORED
        if not start <= i < stop:
            part = Part.truncated
        elif token in specials:
            part = Part.special
        elif trained:
            part = Part.response
        else:
            part = Part.prompt if i < first else Part.masked
        tokens.append(Token(token, _text(tokenizer, token), part, trained))
    kept = [t.id for t in tokens if t.part is not Part.truncated]
    return Side(
        name,
        tuple(tokens),
        list(ids).count(tokenizer.bos_token_id),
        sum(token in end_ids(tokenizer) for token in ids),
        _problems(tokenizer, kept, keep_end),
    )


def _problems(tokenizer: Any, kept: Sequence[int], prompt_only: bool) -> tuple[str, ...]:
    out = []
    bos, ends = tokenizer.bos_token_id, end_ids(tokenizer)
    if bos is not None and bos not in ends and any(a == b == bos for a, b in pairwise(kept)):
        out.append("BOS stands twice in a row")
    if not prompt_only and (not kept or kept[-1] not in ends):
        out.append("does not end with EOS, so a response never ends: it is cut off")
    if not prompt_only and len(kept) > 1 and kept[-1] == kept[-2] in ends:
        out.append("EOS stands twice at the end")
    return tuple(out)


def _text(tokenizer: Any, token: int) -> str:
    """The text of a token; for a token that holds part of a character, the tokenizer's own name for
    it.
    """
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:
        return tokenizer.convert_ids_to_tokens(token)
    return text


def render(rows: Sequence[RowPreview]) -> Any:
    """A rich renderable: a legend, then each row's tokens in colour with its counts."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    legend = Text("tokens: ")
    for part, style in STYLES.items():
        legend.append(part.value, style)
        legend.append("  ")
    panels: list[Any] = [legend]
    for row in rows:
        lines: list[Text] = []
        for side in row.sides:
            cut = sum(token.part is Part.truncated for token in side.tokens)
            trained = sum(
                token.trained and token.part is not Part.truncated for token in side.tokens
            )
            counts = (
                f"{len(side.tokens)} tokens, {trained} of a response, {cut} truncated, BOS "
                f"{side.bos}, EOS {side.eos}"
            )
            lines.append(Text(f"{side.name}: {counts}", "bold"))
            tokens = Text()
            for token in side.tokens:
                tokens.append(token.text.replace("\n", "\u21b5\n"), STYLES[token.part])
            lines.append(tokens)
            lines.extend(Text(f"! {problem}", "bold red") for problem in side.problems)
        if row.shared is not None:
            lines.append(Text(f"shared prefix: {row.shared} tokens", "bold"))
        panels.append(Panel(Group(*lines), title=row.place, title_align="left"))
    return Group(*panels)
