"""What a tokenizer and its chat template do by themselves: the tokens before a text, how an
assistant's turn is written, which tokens end a response, and what a template never reads.

Nobody states these, so the tokenizer is tried on short texts, once for each template.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.models.templates import Chat, TemplateRefusal, processor_of, rendered, rendered_short
from rlhf.models.words import words_of
from rlhf.types import Message, Tools, UserError

# Attributes that `rlhf.models.loading.load_tokenizer` sets: the end tokens that the model's files
# name, and the rows of its embedding where the tokenizer has more entries.
LISTED_ENDS = "listed_end_ids"
EMBEDDING_ROWS = "embedding_rows"
# where transformers' class around the library tokenizers has these methods from
_ENCODING = {
    "__call__": "transformers.tokenization_utils_base",
    "_encode_plus": "transformers.tokenization_utils_tokenizers",
}
_DECODING = {
    "decode": "transformers.tokenization_utils_base",
    "_decode": "transformers.tokenization_utils_tokenizers",
}
_BLANKS: "weakref.WeakKeyDictionary[Any, dict[int, bool]]" = weakref.WeakKeyDictionary()
_KEPT = "rlhf_habits"  # attribute: what was found, with what it depends on
_ASKED = "Why is that?"
_ANSWERS = ("It is so: twelve, of course.", "42 or more", '"Yes", she said.')
_MARK = "Zanzibar"  # a word that no template writes by itself


@dataclass(frozen=True, slots=True)
class Turn:
    """How a chat template writes an assistant's turn."""

    end: int | None = None  # the special token that ends it
    # What stands between the prompt and the text in a template without a generation prompt, such
    # as "<|assistant|>\n". Prompts get it, or the policy would have to write it.
    opening: str = ""
    lead: str = ""  # blanks that the template writes before the text
    trail: str = ""  # and behind it
    strips: bool = False  # blanks around the text are removed
    # A text tokenised by itself, with the end token, is what a rendered conversation holds.
    apart: bool = True


@dataclass(frozen=True, slots=True)
class Habits:
    """What was found by trying a tokenizer."""

    prefix: tuple[int, ...]  # tokens that the tokenizer writes before a text
    turn: Turn
    ends: tuple[int, ...]  # `end_ids`
    doubles_bos: bool  # the template writes the beginning-of-sequence token twice
    unread: frozenset[str]  # roles, and tool_calls, that the template never reads


def habits(tokenizer: Any) -> Habits:
    """What `tokenizer` and its template do, found at the first call and after every change of the
    template or a special token.
    """
    depends = (
        tokenizer.chat_template,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        vars(tokenizer).get(LISTED_ENDS, ()),
    )
    kept = vars(tokenizer).get(_KEPT)
    if kept is None or kept[0] != depends:
        kept = (depends, _habits(tokenizer))
        vars(tokenizer)[_KEPT] = kept
    return kept[1]


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end a response: those that the model's generation_config.json (or
    config.json) lists, the tokenizer's end-of-sequence token, and the one with which the chat
    template ends an assistant's turn.
    """
    return habits(tokenizer).ends


def closing_id(tokenizer: Any, *, chat: bool) -> int:
    """The token that a finished answer is trained to end with: the template's own in a
    conversation that has one, else the tokenizer's end-of-sequence token.
    """
    end = habits(tokenizer).turn.end
    if chat and end is not None:
        return end
    return int(tokenizer.eos_token_id)


def response_text(tokenizer: Any, token_ids: Iterable[int], *, chat: bool) -> str:
    """What a response says: without the tokens that end, pad or begin a sequence or stand for
    nothing (unk), with all others, such as <think>.

    chat: the blanks that the template writes around an answer by itself are no part of the text.
    """
    found = habits(tokenizer)
    silent = {
        *found.ends,
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
    }
    text: str = tokenizer.decode([i for i in token_ids if i not in silent])
    if chat:
        text = text.removeprefix(found.turn.lead).removesuffix(found.turn.trail)
    return text


# ---- what a policy continues, and where it ends ----


def prompt_text(tokenizer: Any, messages: Chat, tools: Tools | None = None) -> str:
    """The text up to the assistant's turn, which the policy continues. Raises TemplateRefusal."""
    text = rendered(tokenizer, messages, generation_prompt=True, tools=tools)
    return text + habits(tokenizer).turn.opening


def short_prompt_text(tokenizer: Any, messages: Chat, tools: Tools | None = None) -> str:
    """The same with one image token for each picture. Raises TemplateRefusal."""
    text = rendered_short(tokenizer, messages, generation_prompt=True, tools=tools)
    return text + habits(tokenizer).turn.opening


def up_to_end(tokenizer: Any, span: list[int]) -> list[int]:
    """`span` up to the end token that it ends with, the first of several; blanks behind it are
    left out. All of it where it ends with none.
    """
    ends, stop = end_ids(tokenizer), len(span)
    for i in reversed(range(len(span))):
        if span[i] in ends:
            stop = i + 1
        elif not is_blank(tokenizer, span[i]):
            break
    return span[:stop]


# ---- tokens ----


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone. Raises ValueError for a token without a row in the embedding."""
    ids = ids_of(tokenizer, [text])[0]
    check_rows(tokenizer, ids)
    return ids


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that somebody wrote: one that spells a picture's token is refused. Raises
    ValueError.
    """
    processor = processor_of(tokenizer)
    if processor is not None:
        processor.check_text(text)
    return plain_ids(tokenizer, text)


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text alone, whether or not the embedding has rows for them."""
    core = _core(tokenizer)
    if core is None or not all(isinstance(text, str) for text in texts):
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    words = words_of(tokenizer, core)
    if words is not None:
        return [words.ids_of(text) for text in texts]
    return [found.ids for found in core.encode_batch_fast(texts, add_special_tokens=False)]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """What token ids say, with tokens that are no part of any text."""
    text: str
    if _is_usual(type(tokenizer), _DECODING) and not tokenizer.clean_up_tokenization_spaces:
        # transformers looks at the type of each id first
        text = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    else:
        text = tokenizer.decode(ids)
    return text


def _core(tokenizer: Any) -> Any | None:
    """The tokenizer of the library tokenizers, where calling it gives what calling `tokenizer`
    does: it is asked without masks and places of tokens, which takes half as long again.
    """
    if not _is_usual(type(tokenizer), _ENCODING):
        return None
    core = tokenizer.backend_tokenizer
    # what an earlier call, or the tokenizer's file, has left: a call through transformers ends it
    if core.truncation is not None or core.padding is not None:
        return None
    if core.encode_special_tokens != tokenizer.split_special_tokens:
        return None
    return core


def _is_usual(kind: type, methods: Mapping[str, str]) -> bool:
    """Whether a class of tokenizers has transformers' own `methods`, by name and module."""
    return all(
        getattr(getattr(kind, name, None), "__module__", None) == module
        for name, module in methods.items()
    )


def check_rows(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raises ValueError for a token without a row in the model's embedding."""
    rows = vars(tokenizer).get(EMBEDDING_ROWS)
    if rows is not None and ids and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(
            f"the text holds {token!r}, token {max(ids)}, but the model's embedding has {rows} rows"
        )


def single_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` with one beginning-of-sequence token where several begin it."""
    if len(ids) < 2 or ids[0] != ids[1]:
        return ids
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return ids
    start = 0
    while ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


def is_blank(tokenizer: Any, token: int) -> bool:
    """Whether a token says nothing but blanks."""
    known = _BLANKS.setdefault(tokenizer, {})
    if token not in known:
        known[token] = not tokenizer.decode([token]).strip()
    return known[token]


# ---- trying ----


def _habits(tokenizer: Any) -> Habits:
    turn, doubles, unread = Turn(), False, frozenset[str]()
    if tokenizer.chat_template is not None:
        prompt = _accepted_prompt(tokenizer)
        if prompt is not None:
            turn = _turn(tokenizer, prompt)
            doubles = _doubles_bos(tokenizer, prompt)
        unread = frozenset(name for name, chat in _TRIED if _drops(tokenizer, chat))
    listed = vars(tokenizer).get(LISTED_ENDS, ())
    own = [i for i in (tokenizer.eos_token_id, turn.end) if i is not None]
    ends = tuple(dict.fromkeys((*listed, *own)))
    return Habits(_prefix(tokenizer), turn, ends, doubles, unread)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer writes before a text by itself."""
    plain = list(tokenizer(_ASKED, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_ASKED)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    raise UserError(
        f"{type(tokenizer).__name__}: with its special tokens it writes the text {_ASKED!r} as "
        f"{whole}, without them as {plain}: expected the same tokens between the special ones. "
        "Give the tokenizer another post-processor."
    )


def _accepted_prompt(tokenizer: Any) -> list[Message] | None:
    """A prompt that the template renders: a user's turn, or one behind a system message."""
    user: Message = {"role": "user", "content": _ASKED}
    prompts: list[list[Message]] = [[user], [{"role": "system", "content": "Be brief."}, user]]
    for prompt in prompts:
        try:
            _whole(tokenizer, prompt, _ANSWERS[0])
        except TemplateRefusal:
            continue
        return prompt
    return None


def _whole(tokenizer: Any, prompt: Chat, answer: str) -> str:
    chat: list[Message] = [*prompt, {"role": "assistant", "content": answer}]
    return rendered(tokenizer, chat, generation_prompt=False)


def _doubles_bos(tokenizer: Any, prompt: Chat) -> bool:
    ids = plain_ids(tokenizer, rendered(tokenizer, prompt, generation_prompt=True))
    return len(single_bos(tokenizer, ids)) < len(ids)


def _turn(tokenizer: Any, prompt: Chat) -> Turn:
    answer = _ANSWERS[0]
    head = rendered(tokenizer, prompt, generation_prompt=True)
    whole = _whole(tokenizer, prompt, answer)
    if answer not in whole:
        return Turn()
    before, _, after = whole.rpartition(answer)
    end, trail = _end_of(tokenizer, after)
    strips = f" {answer} " not in _whole(tokenizer, prompt, f" {answer} ")
    if not before.startswith(head):  # the prompt goes on otherwise than the template does later
        return Turn(end=end, trail=trail, strips=strips)
    between = before.removeprefix(head)
    opening = ""
    if between.strip() and head == rendered(tokenizer, prompt, generation_prompt=False):
        opening, between = between, ""
    lead = between if not between.strip() else ""
    apart = not between and not trail and _same_apart(tokenizer, prompt, head + opening, end)
    return Turn(end, opening, lead, trail, strips, apart)


def _same_apart(tokenizer: Any, prompt: Chat, head: str, end: int | None) -> bool:
    """Whether answers tokenised by themselves are what rendered conversations hold."""
    context = plain_ids(tokenizer, head)
    for answer in _ANSWERS:
        whole = plain_ids(tokenizer, _whole(tokenizer, prompt, answer))
        expected = [*context, *plain_ids(tokenizer, answer), *([end] if end is not None else [])]
        if whole[: len(expected)] != expected:
            return False
    return True


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that are no part of any text."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _end_of(tokenizer: Any, after: str) -> tuple[int | None, str]:
    """The special token that follows an answer, blanks aside, and those blanks."""
    special = special_ids(tokenizer)
    for token in plain_ids(tokenizer, after):
        if token in special:
            return token, after[: len(after) - len(after.lstrip())]
        if not is_blank(tokenizer, token):
            break
    return None, ""


_USER: Message = {"role": "user", "content": _ASKED}
_ANSWER: Message = {"role": "assistant", "content": "Yes."}
_CALL = {"type": "function", "function": {"name": _MARK, "arguments": {"x": 1}}}
# (role or key, a conversation that holds the mark there)
_TRIED: tuple[tuple[str, list[Message]], ...] = (
    ("user", [{"role": "user", "content": _MARK}]),
    ("assistant", [_USER, {"role": "assistant", "content": _MARK}]),
    ("system", [{"role": "system", "content": _MARK}, _USER]),
    ("developer", [{"role": "developer", "content": _MARK}, _USER]),
    ("tool", [_USER, _ANSWER, {"role": "tool", "name": "f", "content": _MARK}]),
    ("tool_calls", [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]),
)


def _drops(tokenizer: Any, chat: Chat) -> bool:
    """Whether the template renders `chat` without the mark that it holds. One that refuses it
    drops nothing: it will say so of the row.
    """
    try:
        text = rendered(tokenizer, chat, generation_prompt=False)
    except TemplateRefusal:
        return False
    return _MARK not in text
