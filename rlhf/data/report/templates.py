"""Conversations and texts that a chat template would turn into something else than was meant."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item, parts
from rlhf.data.report.lengths import conversation_ids, conversations
from rlhf.data.report.looked import by_row
from rlhf.data.report.records import Finding, Marked, Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES
from rlhf.models import encoding
from rlhf.models.facts import noticed
from rlhf.types import UserError

# Markers of ChatML, Llama 2 and 3, Gemma, Zephyr, Phi, GPT-2, DeepSeek and Alpaca. A text that
# holds one was formatted already.
MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|endoftext|>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "### Instruction:",
    "### Response:",
)
_FIRST = ("system", "developer")
_LOOKED_AT = 100  # rows rendered in search of what the template itself does wrong


def role_problem(chat: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the order of a conversation's roles; None: nothing. An optional system
    message, then user and assistant in turns.

    A tool's message follows an assistant's or another tool's, and the assistant speaks after it.
    """
    turns = list(chat)
    while turns and turns[0]["role"] in _FIRST:
        turns = turns[1:]
    start = len(chat) - len(turns)
    if start > 1:
        return f"{start} system messages at the start"
    if not turns:
        return "a system message alone"
    if turns[0]["role"] != "user":
        return f"the first turn is the {turns[0]['role']}'s, not the user's"
    may_follow = {
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    for i, (before, after) in enumerate(pairwise(turns), start=start + 1):
        if after["role"] not in may_follow[before["role"]]:
            return f"message {i} is the {after['role']}'s and follows the {before['role']}'s"
    return None


def ending_problem(columns: Mapping[str, Any], kind: Use) -> str | None:
    """A conversation that trains must end with the assistant's turn, and one to continue
    must not.
    """
    for chat in conversations(columns):
        last = chat[-1]["role"]
        if kind is Use.prompt and last == "assistant":
            return "the prompt ends with the assistant's turn"
        if kind is not Use.prompt and last != "assistant":
            return f"the conversation ends with the {last}'s turn"
    return None


def empty_problem(columns: dict[str, Any]) -> str | None:
    """Whether a turn or an answer has no visible character. An empty prompt is no problem: then the
    texts are whole.
    """
    for where, text in parts(columns):
        if not text.strip() and where != "prompt":
            return f"{where} is empty"
    return None


def marker_problem(columns: dict[str, Any], markers: re.Pattern[str]) -> str | None:
    """Whether a text of a row holds a template's markers, and which."""
    for where, text in parts(columns):
        match = markers.search(text)
        if match:
            return f"{where} holds {match.group()}"
    return None


def marker_pattern(tokenizer: Any = None) -> re.Pattern[str]:
    """MARKERS, and the tokenizer's own special tokens where one is given."""
    special = (
        [str(token) for token in tokenizer.all_special_tokens] if tokenizer is not None else []
    )
    return re.compile(
        "|".join(
            re.escape(m) for m in sorted({*MARKERS, *special}, key=lambda m: (-len(m), m)) if m
        )
    )


def encoded(tokenizer: Any, columns: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of every sequence of a row as the stages encode it. Raises ValueError and UserError
    for one that can't be.
    """
    chats = list(conversations(columns))
    if chats:
        if tokenizer.chat_template is None:
            return []
        return [conversation_ids(tokenizer, chat, columns.get("tools")) for chat in chats]
    prompt = columns.get("prompt") or ""
    answers = [
        columns[key]
        for key in ("chosen", "rejected", "completion")
        if isinstance(columns.get(key), str)
    ]
    if "text" in columns:
        return [encoding.encode_text(tokenizer, columns["text"])[0]]
    return [encoding.encode_answer(tokenizer, prompt, answer) for answer in answers] or [
        encoding.prompt_ids(tokenizer, prompt)
    ]


def doubled(
    tokenizer: Any, columns: Mapping[str, Any], sequences: Iterable[Sequence[int]]
) -> tuple[bool, bool]:
    """Whether a text or conversation writes a beginning-of-sequence token that is there already
    (the stages keep one), and whether a sequence ends with two end-of-sequence tokens.
    """
    eos = tokenizer.eos_token_id
    begins = any("bos" in noticed(tokenizer, value) for value in columns.values())
    return begins, eos is not None and any(list(ids)[-2:] == [eos, eos] for ids in sequences)


def special_problems(tokenizer: Any, items: Sequence[Item], most: int) -> dict[str, Marked]:
    """By check, the rows whose sequence has a doubled token, or that the template can't render.

    Looked at are the first rows, which show what the template does to all, and every row whose text
    holds one of the two tokens itself.
    """
    out = {check: Marked(most) for check in ("double_bos", "double_eos", "unrendered")}
    marks = [str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
    for number, item in enumerate(items):
        if number >= _LOOKED_AT and not any(
            mark in text for _, text in parts(item.columns) for mark in marks
        ):
            continue
        try:
            bos, eos = doubled(tokenizer, item.columns, encoded(tokenizer, item.columns))
        except (ValueError, UserError) as error:
            out["unrendered"].add(item, str(error))
            continue
        if bos:
            out["double_bos"].add(item, f"begins with {tokenizer.bos_token} twice as written")
        if eos:
            out["double_eos"].add(item, f"ends with {tokenizer.eos_token} twice")
    return out


_MESSAGES = {
    "role_order": (Severity.warn, "conversations whose roles don't take turns"),
    "empty_turns": (Severity.fail, "rows with an empty turn or answer"),
    "wrong_end": (Severity.fail, "conversations that end with the wrong turn"),
    "template_markers": (
        Severity.warn,
        "rows whose text holds a chat template's markers, so that a template would be "
        "applied twice",
    ),
    "double_bos": (
        Severity.warn,
        "rows that write two beginning-of-sequence tokens, of which the stages keep one",
    ),
    "double_eos": (Severity.warn, "rows that end with two end-of-sequence tokens"),
    "unrendered": (Severity.fail, "conversations that the chat template refuses"),
}


@dataclass(frozen=True, slots=True)
class Checked:
    """(row, (check, what is wrong)) of some rows, for every check that needs no tokenizer."""

    kind: Use
    markers: re.Pattern[str]

    @classmethod
    def of(cls, settings: Settings) -> "Checked":
        """As the report's settings ask."""
        return cls(settings.kind, marker_pattern(settings.tokenizer))

    def __call__(self, items: list[Item]) -> list[tuple[int, tuple[str, str]]]:
        out = []
        for number, item in enumerate(items):
            wrong_roles = filter(None, map(role_problem, conversations(item.columns)))
            problems = {
                "role_order": next(wrong_roles, None),
                "empty_turns": empty_problem(item.columns),
                "wrong_end": ending_problem(item.columns, self.kind),
                "template_markers": marker_problem(item.columns, self.markers),
            }
            for check, why in problems.items():
                if why is not None:
                    out.append((number, (check, why)))
        return out


def templates(items: Sequence[Item], settings: Settings) -> Section:
    """Every check of conversations and templates."""
    checks = ("role_order", "empty_turns", "wrong_end", "template_markers")
    rows_with = {check: Marked(settings.named) for check in checks}
    for row, (check, problem) in by_row(Checked.of(settings), items):
        rows_with[check].add(items[row], problem)
    if settings.tokenizer is not None:
        rows_with |= special_problems(settings.tokenizer, items, settings.named)
    findings: list[Finding] = []
    shown: list[tuple[str, int]] = []
    for check, rows in rows_with.items():
        severity, message = _MESSAGES[check]
        findings += finding(check, severity, f"{len(rows)} {message}", REMEDIES[check], rows)
        shown.append((message, len(rows)))
    figures = {check: len(rows) for check, rows in rows_with.items()}
    table = Table("Template problems", ("check", "rows"), tuple(shown))
    return Section("templates", "Conversations and templates", figures, tuple(findings), (table,))
