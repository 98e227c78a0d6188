"""Rows in the toolkit's own columns out into other formats: which formats there are for which kind
of row (TARGETS), and what becomes of a row's further columns.

A row that comes without a note reads back as the same row, its further columns included; a note
says what reads back otherwise.
"""

import json
from collections.abc import Mapping
from typing import Any

from conf.data import DataTarget
from rlhf.data.formats import (
    FORMATS,
    Use,
    argilla,
    chats,
    comparisons,
    detect,
    label_studio,
    openai,
    sheet,
    texts_in,
    trl,
)
from rlhf.data.formats.draft import Draft, Row, Writer, transcripts_as_turns
from rlhf.data.formats.names import is_known
from rlhf.data.formats.values import CANONICAL, chats_of, on_messages, pictures_in
from rlhf.data.media import IMAGE_TEXT
from rlhf.data.rows import RowError
from rlhf.types import PICTURE_MARK, Message, UserError

TARGETS: dict[DataTarget, dict[Use, Writer]] = {
    DataTarget.trl: trl.WRITE_TRL,
    DataTarget.kto: trl.WRITE_KTO,
    DataTarget.messages: openai.WRITE_MESSAGES,
    DataTarget.sharegpt: chats.WRITE_SHAREGPT,
    DataTarget.alpaca: chats.WRITE_ALPACA,
    DataTarget.hh_rlhf: comparisons.WRITE_HH_RLHF,
    DataTarget.ultrafeedback: trl.WRITE_ULTRAFEEDBACK,
    DataTarget.shp: comparisons.WRITE_SHP,
    DataTarget.nectar: comparisons.WRITE_NECTAR,
    DataTarget.rewardbench: comparisons.WRITE_REWARDBENCH,
    DataTarget.alpaca_eval: comparisons.WRITE_ALPACA_EVAL,
    DataTarget.label_studio: label_studio.WRITE_LABEL_STUDIO,
    DataTarget.label_studio_ranker: label_studio.WRITE_LABEL_STUDIO_RANKER,
    DataTarget.argilla: argilla.WRITE_ARGILLA,
    DataTarget.csv: sheet.WRITE_SHEET,
    DataTarget.xlsx: sheet.WRITE_SHEET,
}
# targets that hold conversations
_OF_TURNS = (
    DataTarget.messages,
    DataTarget.sharegpt,
    DataTarget.alpaca,
    DataTarget.ultrafeedback,
    DataTarget.alpaca_eval,
)
_OF_KIND = {
    Use.sft: ("text", "prompt", "completion", "messages"),
    Use.preference: ("prompt", "chosen", "rejected", "margin"),
    Use.unpaired: ("prompt", "completion", "label"),
    Use.prompt: ("prompt",),
}
_MESSAGES = ("prompt", "completion", "messages", "chosen", "rejected")
# targets that hold messages with all their keys, and columns that the others hold so
_WHOLE = (
    DataTarget.trl,
    DataTarget.kto,
    DataTarget.messages,
    DataTarget.sharegpt,
    DataTarget.ultrafeedback,
)
_WHOLE_PROMPT = (
    DataTarget.nectar,
    DataTarget.rewardbench,
    DataTarget.label_studio,
    DataTarget.label_studio_ranker,
    DataTarget.argilla,
)
# targets whose rows are read with a column tools beside messages
_WITH_TOOLS = (
    *_WHOLE,
    DataTarget.alpaca,
    DataTarget.alpaca_eval,
    DataTarget.nectar,
    DataTarget.rewardbench,
)
# targets whose rows have marks in their texts and a column of paths, as LLaMA-Factory and ms-swift
# read them
_WITH_MARKS = (DataTarget.messages, DataTarget.sharegpt, DataTarget.alpaca)
_SCORES = ("score_chosen", "score_rejected")  # read as a margin where there is none
# own columns that would change what a conversation or a pair is
_CHANGING = ("kto_tag", "system", "history", "input", "rejected_response")
# columns by which formats are recognised
_TELLING = {key for format_ in FORMATS for key in format_.keys} | {
    "chosen_model",
    "models",
    "kto_tag",
    "reward_model",
}


def _may_tell(name: str) -> bool:
    return name in _TELLING or is_known(name)


def check_target(to: DataTarget, kind: Use) -> None:
    """Whether `to` holds rows of `kind`. Raises UserError with the targets that do."""
    if kind not in TARGETS[to]:
        known = ", ".join(target.value for target, kinds in TARGETS.items() if kind in kinds)
        holds = ", ".join(use.value for use in TARGETS[to])
        raise UserError(
            f"data.to={to.value} holds rows of the kind {holds}, found rows of the kind "
            f"{kind.value}. Targets for them: {known}."
        )


def convert(kind: Use, columns: Mapping[str, Any], to: DataTarget) -> tuple[list[Row], list[str]]:
    """The rows of `to` that a row of `kind` becomes (two for a pair as judged answers), and notes
    on what reads back otherwise.

    Raises RowError for a row that `to` can't hold, UserError for a kind that it can't.
    """
    check_target(to, kind)
    content = {key: columns[key] for key in _OF_KIND[kind] if columns.get(key) is not None}
    own = {key: value for key, value in columns.items() if key not in (*content, "tools")}
    draft = Draft(content, own, [])
    beside = _tools(columns.get("tools"), to, draft)
    beside |= _images(draft, to)
    _only_texts(draft, to)
    if to in _OF_TURNS:
        transcripts_as_turns(draft)
    lost = _misread(draft, kind, to)
    for key in lost:
        draft.notes.append(f"{key} is not carried: it would be read as part of the row's content")
    draft.own = {
        key: value for key, value in own.items() if key not in lost and key not in CANONICAL
    }
    rows = [{**row, **beside} for row in TARGETS[to][kind](draft)]
    return [_with_own(row, draft, kind) for row in rows], draft.notes


def _tools(tools: Any, to: DataTarget, draft: Draft) -> Row:
    """The column tools as `to` has it, or nothing where it has none."""
    if not tools:
        return {}
    if to not in _WITH_TOOLS:
        draft.notes.append("tools are not carried: the format has no place for them")
        draft.own.pop("functions", None)
        return {}
    if to is DataTarget.sharegpt:  # as LLaMA-Factory reads them
        return {"tools": json.dumps(tools, ensure_ascii=False)}
    return {"tools": tools}


def _images(draft: Draft, to: DataTarget) -> Row:
    """The column images of a row that shows pictures, whose texts get the mark <image>; nothing
    where it shows none, or `to` has pictures in messages. Raises RowError where it can hold none.
    """
    shown = [message for chat in chats_of(draft.columns) for message in chat if "images" in message]
    if not shown:
        return {}
    if to not in _WITH_MARKS:
        if to in _WHOLE:
            return {}
        raise RowError(
            f"a row that shows pictures can't be held by {to.value}. data.to=messages, sharegpt, "
            "alpaca or trl holds it"
        )
    if any(IMAGE_TEXT in text for text in texts_in(draft.columns)):
        raise RowError(
            f"expected texts without {IMAGE_TEXT} beside pictures, since it stands for one in "
            f"{to.value}. data.to=trl holds it"
        )
    paths = [picture["path"] for picture in pictures_in(draft.columns)]
    draft.columns = on_messages(draft.columns, _marked)
    return {"images": paths}


def _marked(message: Message) -> Any:
    if "images" not in message:
        return message
    held: Any = {key: value for key, value in message.items() if key != "images"}
    return {**held, "content": message["content"].replace(PICTURE_MARK, IMAGE_TEXT)}


def _only_texts(draft: Draft, to: DataTarget) -> None:
    """Leave messages of which `to` holds the text alone with their roles and texts, and note what
    they lose. Raises RowError for calls, without which a conversation means something else.
    """
    if to in _WHOLE:
        return
    for key in _MESSAGES:
        value = draft.columns.get(key)
        if not isinstance(value, list) or (key == "prompt" and to in _WHOLE_PROMPT):
            continue
        for i, message in enumerate(value):
            if message.get("tool_calls"):
                raise RowError(
                    f"key '{key}[{i}].tool_calls': {to.value} holds texts, found a call. "
                    "data.to=messages, sharegpt or trl holds it"
                )
            draft.notes += [
                f"{name} of a message is not carried: the format holds its text alone"
                for name in message
                if name not in ("role", "content")
            ]
        draft.columns[key] = [{"role": m["role"], "content": m["content"]} for m in value]


def _misread(draft: Draft, kind: Use, to: DataTarget) -> list[str]:
    """The own columns that would be read as part of the row's content."""
    own = draft.own
    out = [key for key in own if key in CANONICAL and own[key] is not None]
    without_margin = kind is Use.preference and "margin" not in draft.columns
    if without_margin and all(own.get(key) not in (None, "") for key in _SCORES):
        out += _SCORES
    changing = ("kto_tag",) if to is DataTarget.trl else _CHANGING
    out += [key for key in changing if key in own]
    return out


def _with_own(row: Row, draft: Draft, kind: Use) -> Row:
    """A written row with the row's own columns beside it, without those that would make it look
    like another format.
    """
    own = dict(draft.own)
    for key in [key for key in own if key in row]:
        draft.notes.append(f"{key} is not carried: the format has its own {key}")
        del own[key]
    if any(_may_tell(key) for key in own):
        _drop_misleading(row, own, draft, kind)
    return {**row, **own}


def _drop_misleading(row: Row, own: Row, draft: Draft, kind: Use) -> None:
    """Remove from `own` the columns with which the row would be read as another format, and to
    other values.
    """
    while own and not _reads_alike(row, {**own, **row}, kind):
        whole = {**own, **row}
        other = detect(whole, kind)
        taken = () if other is None else (*other.keys, *sum(other.taken(whole), ()))
        for key in [key for key in own if key in taken] or list(own):
            draft.notes.append(
                f"{key} is not carried: with it the row would look like another format"
            )
            del own[key]


def _reads_alike(row: Row, other: Row, use: Use) -> bool:
    """Whether two rows give the same values when their formats are detected."""
    first, second = detect(row, use), detect(other, use)
    if first is second or first is None or second is None:
        return first is second
    try:
        values = [made.value for made in first.read(row, use).pairs]
        return values == [made.value for made in second.read(other, use).pairs]
    except RowError:
        return False
