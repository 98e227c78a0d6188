"""What training makes of the first rows beside what the sampler would make of them, token for
token, for the tokenizer and template at hand.

What is trained comes from encoding whole conversations, what is sampled from the prompt alone and
from the response's text: two ways to the same tokens, under most templates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from conf.choices import RewrittenTurns
from conf.schema import DataConfig, ModelConfig
from rlhf.data.formats import Use
from rlhf.data.formats.values import columns_of
from rlhf.data.loading import convert
from rlhf.data.prepare.ingest import kind_of
from rlhf.data.sources import train_sources
from rlhf.models.conversations import encode_apart
from rlhf.models.encoding import (
    IGNORED,
    answer_ids,
    encode_answer,
    encode_completion,
    encode_text,
    is_chat,
    is_text_turn,
    prompt_ids,
    split_turn,
)
from rlhf.models.facts import Notices
from rlhf.models.loading import load_tokenizer
from rlhf.models.turns import end_ids, habits, response_text
from rlhf.stages.examination.findings import Finding, State
from rlhf.types import UserError

ROWS = 200  # that are looked at
_SHOWN = 12  # tokens quoted


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it trains: its context and turn in the row, and their tokens."""

    context: Any
    turn: Any  # a text, or a message
    before: list[int]
    ids: list[int]


def check_rows(model: ModelConfig, data: DataConfig, seed: int) -> list[Finding]:
    """What ends a response of ``model.path``, and the comparison of the first rows of
    ``data.path``, where they are set.
    """
    if model.path is None:
        return []
    try:
        tokenizer = load_tokenizer(model, data.chat_template)
    except (UserError, OSError, ValueError):
        return []  # rlhf/stages/examination/tokenizers.py tells it
    out = [_ends(tokenizer)]
    sources = train_sources(data)
    if not sources:
        return out
    try:
        use = kind_of(data)
        records = convert(sources, use, data, seed, ROWS).records
    except UserError as error:
        return [*out, Finding("rows", State.fail, str(error), "run stage=data on the file")]
    notices = Notices(tokenizer)
    differing: list[str] = []
    refused: list[str] = []
    for record in records:
        columns = columns_of(record.value, {})
        tools = columns.pop("tools", None) or record.tools
        notices.look(record.place, columns.values())
        try:
            found = next(differences(tokenizer, use, columns, tools), None)
        except (ValueError, UserError) as error:
            refused.append(f"{record.place}: {error}")
            continue
        if found is not None:
            differing.append(f"{record.place}: {found}")
    out += _told(f"{len(records)} rows of {sources[0].name}", differing, refused)
    return out + [Finding("rows", State.warn, line) for line in notices.lines()]


def _told(rows: str, differing: Sequence[str], refused: Sequence[str]) -> list[Finding]:
    out = []
    if refused:
        out.append(
            Finding(
                "rows",
                State.warn,
                f"{len(refused)} of {rows} can't be encoded; {refused[0]}",
                "set data.chat_template, mend the rows, or allow them with data.max_bad_rows",
            )
        )
    if differing:
        out.append(
            Finding(
                "rows",
                State.warn,
                f"{len(differing)} of {rows} differ between training and sampling; {differing[0]}",
                "set data.chat_template to a template that writes turns as they are",
            )
        )
    if not out:
        equal = "what trains and what the sampler continues are equal, token for token"
        out.append(Finding("rows", State.ok, f"{rows}: {equal}"))
    return out


def _ends(tokenizer: Any) -> Finding:
    """Which tokens end a response, and what else the template does."""
    names = [repr(tokenizer.convert_ids_to_tokens(i)) for i in end_ids(tokenizer)]
    found = f"a response ends at {' or '.join(names)}"
    turn = habits(tokenizer).turn
    if turn.lead or turn.trail:
        found += f"; the template writes {turn.lead!r} before and {turn.trail!r} behind an answer"
    if turn.strips:
        found += "; the template removes blanks around an answer"
    return Finding("end tokens", State.info, found)


def differences(
    tokenizer: Any, use: Use, columns: dict[str, Any], tools: Any = None
) -> Iterator[str]:
    """How the row trains otherwise than the sampler would go on. Raises ValueError or UserError
    for a row that can't be encoded.
    """
    ends = end_ids(tokenizer)
    for answer in _answers(tokenizer, use, columns, tools):
        if answer.context is not None:
            yield from _differs(tokenizer, answer, tools)
        if answer.ids and answer.ids[-1] not in ends:
            yield f"it ends with {_shown(tokenizer, answer.ids[-1:])}, which ends no response"


def _differs(tokenizer: Any, answer: Answer, tools: Any) -> Iterator[str]:
    sampled = prompt_ids(tokenizer, answer.context, tools)
    if answer.before != sampled:
        yield (
            f"before the answer training has {_shown(tokenizer, answer.before)}, "
            f"the sampler {_shown(tokenizer, sampled)}"
        )
    said = answer.turn
    if not isinstance(said, str):
        if not is_text_turn(said):
            return
        said = said["content"]
    text = response_text(tokenizer, answer.ids, chat=is_chat(answer.context))
    if text != said:
        yield f"the answer {said[:60]!r} trains as {text[:60]!r}"
    again = answer_ids(tokenizer, answer.context, text, tools)
    if again != answer.ids:
        yield (
            f"the answer trains as {_shown(tokenizer, answer.ids)}, but a response of the same "
            f"text is scored as {_shown(tokenizer, again)}"
        )


def _answers(tokenizer: Any, use: Use, columns: dict[str, Any], tools: Any) -> Iterator[Answer]:
    """Every answer of a row that trains; a text without a prompt has no context."""
    if use is Use.prompt:
        prompt_ids(tokenizer, columns["prompt"], tools)
        return
    if "text" in columns:
        yield Answer(None, columns["text"], [], encode_text(tokenizer, columns["text"])[0])
        return
    for key in ("messages", "completion", "chosen", "rejected"):
        if key not in columns:
            continue
        prompt, answer = columns.get("prompt"), columns[key]
        if use is not Use.sft:
            context, turn = split_turn(prompt, answer)
            before = prompt_ids(tokenizer, context, tools)
            whole = encode_answer(tokenizer, prompt, answer, tools)
            yield Answer(context, turn, before, whole[len(before) :])
            answer = [*context, turn] if is_chat(context) else turn
            prompt = None if is_chat(context) else context
        yield from _trained(tokenizer, prompt, answer, tools)


def _trained(tokenizer: Any, prompt: Any, answer: Any, tools: Any) -> Iterator[Answer]:
    """The answers of a row for SFT."""
    if isinstance(answer, str):
        ids, labels = encode_completion(
            tokenizer, prompt or "", answer, completion_only=True, tools=tools
        )
        start = labels.count(IGNORED)
        yield Answer(prompt or "", answer, ids[:start], ids[start:])
        return
    before = prompt or []
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    messages, first = [*before, *answer], len(before)
    how = RewrittenTurns.split
    for part in encode_apart(tokenizer, messages, how, first=first, tools=tools):
        spans, turns = _spans(part.labels), part.trained
        if len(spans) != len(turns):
            raise ValueError(f"{len(turns)} turns train, but their tokens are {len(spans)} pieces")
        for (start, stop), i in zip(spans, turns, strict=True):
            yield Answer(messages[:i], messages[i], part.ids[:start], part.ids[start:stop])


def _spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """From which to which token labels train."""
    out: list[tuple[int, int]] = []
    for i, label in enumerate(labels):
        if label == IGNORED:
            continue
        if out and out[-1][1] == i:
            out[-1] = (out[-1][0], i + 1)
        else:
            out.append((i, i + 1))
    return out


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    """The last tokens as text."""
    return repr(tokenizer.decode(list(ids[-_SHOWN:])))
