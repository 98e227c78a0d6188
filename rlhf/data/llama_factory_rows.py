"""Rows of an entry of LLaMA-Factory's registry in our columns (rlhf/data/llama_factory.py)."""

from collections.abc import Mapping
from typing import Any

from rlhf.data.calls import is_nothing
from rlhf.data.mixture import Row, Transform
from rlhf.data.rows import judgement_of, text_of, value_of
from rlhf.process.wording import describe
from rlhf.types import RowError

MEDIA = ("images", "videos", "audios")
_REFUSED = ("videos", "audios")
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_SPEAKERS = tuple(tag for tag in TAGS if tag not in ("role_tag", "content_tag"))
# columns that rows have once they are ours; a file's column of such a name that the entry gives no
# role is not one of them
_OURS = (
    "instruction",
    "input",
    "output",
    "conversations",
    "messages",
    "text",
    "history",
    "system",
    "tools",
    "chosen",
    "rejected",
    "kto_tag",
)
# roles that rows of a kind have; rows of the others have every role
_TURNS = ("prompt", "query", "history", "system", "tools", "images")
_READ = {"text": ("prompt", "images"), "prompt": _TURNS, "messages": (*_TURNS, "response")}


def _others(row: Row, columns: Mapping[str, str]) -> Row:
    """The columns without a role, as a row's own fields."""
    taken = set(columns.values())
    return {key: value for key, value in row.items() if key not in taken and key not in _OURS}


def _dropped(columns: Mapping[str, str], kind: str) -> list[str]:
    """The columns that rows of `kind` do not keep: those that have no role and one of our names,
    and those of a role that such rows don't have.
    """
    read = {column for role, column in columns.items() if role in _READ.get(kind, columns)}
    ours = {*_OURS, "prompt"} if kind == "prompt" else set(_OURS)
    if "images" in columns:
        ours.add("images")
    return sorted((ours | set(columns.values())) - read)


def _note_dropped(row: Row, dropped: list[str], lost: list[str]) -> None:
    for name in dropped:
        if not is_nothing(row.get(name)):
            lost.append(f"column {name!r} is not read: the registry's entry gives it no role here")


def _beside(row: Row, columns: Mapping[str, str]) -> Row:
    """system, tools and images, where a row has some."""
    out = {}
    for role in ("system", "tools", "images"):
        value = row.get(columns.get(role, ""))
        if value not in (None, "", "[]", "{}", [], {}):
            out[role] = value
    return out


def _question(row: Row, columns: Mapping[str, str]) -> str:
    """prompt and query, a line each; either may be empty. Raises RowError."""
    names = [columns[role] for role in ("prompt", "query") if role in columns]
    value_of(row, names[0])
    lines = [text_of(row, name) for name in names if row.get(name) not in (None, "")]
    return "\n".join(lines) or text_of(row, names[0])  # raises: every one is empty


def _judged(row: Row, columns: Mapping[str, str]) -> Row:
    """The answers of a row as the entry names them. Raises RowError with the file's own names."""
    out: Row = {}
    if "kto_tag" in columns:
        out["kto_tag"] = judgement_of(row, columns["kto_tag"])
    for role in ("chosen", "rejected"):
        if role in columns:
            out[role] = value_of(row, columns[role])
    return out


def _turns(row: Row, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """system, history and question of an alpaca entry's row, as messages. Raises RowError."""
    name = columns.get("history", "")
    history = row.get(name) or []
    out = []
    if system := _beside(row, columns).get("system"):
        out.append({"role": "system", "content": system})
    for i, pair in enumerate(history if isinstance(history, (list, tuple)) else [history]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(
                f"key '{name}[{i}]': expected [question, answer], found {describe(pair)}"
            )
        out.append({"role": "user", "content": pair[0]})
        out.append({"role": "assistant", "content": pair[1]})
    return [*out, {"role": "user", "content": _question(row, columns)}]


def alpaca_rows(columns: Mapping[str, str], kind: str) -> Transform:
    """Rows of an alpaca entry as those of the format `kind`: text, prompt, messages, or one of
    alpaca's own.
    """

    dropped = _dropped(columns, kind)

    def transform(row: Row, lost: list[str]) -> Row:
        _refuse_media(row, columns)
        _note_dropped(row, dropped, lost)
        out = _others(row, columns)
        beside = _beside(row, columns)
        if kind == "text":
            images = {key: beside[key] for key in ("images",) if key in beside}
            return {**out, **images, "text": text_of(row, columns["prompt"])}
        if kind in ("prompt", "messages"):
            beside.pop("system", None)  # one of the turns
            turns = _turns(row, columns)
            if kind == "messages":
                answer = text_of(row, columns["response"])
                turns.append({"role": "assistant", "content": answer})
            return {**out, **beside, kind: turns}
        out |= {"instruction": _question(row, columns)} | beside | _judged(row, columns)
        if "response" in columns:
            out["output"] = text_of(row, columns["response"])
        if row.get(columns.get("history", "")):
            out["history"] = row[columns["history"]]
        return out

    return transform


def sharegpt_rows(columns: Mapping[str, str], tags: Mapping[str, str]) -> Transform:
    """Rows of a sharegpt or openai entry as conversations of {from, value} with ShareGPT's
    speakers; what else a message holds stays. A system message comes before a column of it.
    """
    speakers = {tags[tag]: TAGS[tag] for tag in _SPEAKERS}
    role, content = tags["role_tag"], tags["content_tag"]

    def message(given: Any) -> Any:
        if not isinstance(given, Mapping) or role not in given:
            return given  # refused, with its place, when it is read
        rest = {key: value for key, value in given.items() if key not in (role, content)}
        for key in ("from", "value"):
            if not is_nothing(rest.get(key)):
                raise RowError(
                    f"key {key!r} of a message: expected {role!r} and {content!r} alone, as the "
                    f"entry's tags say, found {describe(rest[key])} too"
                )
        speaker = given[role]
        if isinstance(speaker, str):
            speaker = speakers.get(speaker, speaker)
        return {**rest, "from": speaker, "value": given.get(content)}

    dropped = _dropped(columns, "conversations")

    def transform(row: Row, lost: list[str]) -> Row:
        _refuse_media(row, columns)
        _note_dropped(row, dropped, lost)
        turns = value_of(row, columns["messages"])
        out = {**_others(row, columns), **_beside(row, columns), "conversations": turns}
        if isinstance(turns, list) and turns:
            out["conversations"] = [message(turn) for turn in turns]
            if isinstance(turns[0], Mapping) and turns[0].get(role) == tags["system_tag"]:
                system = out.pop("system", None)
                if system is not None and system != turns[0].get(content):
                    lost.append(
                        f"column {columns['system']!r} is not read: the conversation begins with "
                        "a system message"
                    )
        sides = _judged(row, columns)
        return out | {key: message(value) for key, value in sides.items()}

    return transform


def _refuse_media(row: Row, columns: Mapping[str, str]) -> None:
    held = next((role for role in _REFUSED if role in columns and row.get(columns[role])), None)
    if held is not None:
        raise RowError(
            f"key {columns[held]!r}: videos and sounds are not read, found {held}: "
            f"{describe(row[columns[held]])}"
        )
