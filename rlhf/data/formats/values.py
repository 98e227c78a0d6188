"""What the values of a use hold, whatever the use: conversations or texts, keys of messages, and
the functions that a template shows; how they stand in columns; and what formats read of the objects
inside a row's columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from rlhf.data.calls import is_nothing
from rlhf.data.rows import Chat, Row, RowError, finite
from rlhf.types import JudgedAnswer, Message, PreferencePair

# the toolkit's own columns that hold texts or messages, and all of its own columns
CONTENT = ("prompt", "text", "completion", "messages", "chosen", "rejected")
CANONICAL = (*CONTENT, "tools", "margin", "label")


def is_conversation(value: Any) -> bool:
    """Whether a value of a use holds messages, not texts."""
    part = value
    if isinstance(value, PreferencePair):
        part = value.chosen
    elif isinstance(value, JudgedAnswer):
        part = value.completion
    if isinstance(part, dict):
        part = next(iter(part.values()))
    return isinstance(part, list)


def layout_of(value: Any) -> str:
    """In what columns a value of a use is written: its own of a text to train on, for messages."""
    kind = "messages" if is_conversation(value) else "texts"
    if not isinstance(value, dict):
        return kind
    if "text" in value:
        return "whole texts"
    if "messages" in value:
        return "whole conversations"
    return f"prompts and completions ({kind})"


def as_whole(value: dict[str, Any]) -> dict[str, Any]:
    """A prompt and completion of messages as the conversation that they are, whose completion alone
    trains: answers within the prompt are flagged. Anything else as it stands.
    """
    if not is_conversation(value) or "completion" not in value:
        return value
    before = [
        {**message, "train": False} if message["role"] == "assistant" else message
        for message in value["prompt"]
    ]
    others = {key: held for key, held in value.items() if key not in ("prompt", "completion")}
    return {"messages": [*before, *value["completion"]], **others}


def with_default_system(value: Any, system: str) -> Any:
    """A value of a use whose conversations begin with a system message: their own, or `system`.
    Raises RowError for texts, which have no turns.
    """
    if not is_conversation(value):
        raise RowError("data.system is set: expected messages, found a text")
    if isinstance(value, list):
        return _begun(value, system)
    if isinstance(value, PreferencePair):
        if value.prompt:
            return replace(value, prompt=_begun(value.prompt, system))
        chosen, rejected = _begun(value.chosen, system), _begun(value.rejected, system)
        return replace(value, chosen=chosen, rejected=rejected)
    if isinstance(value, JudgedAnswer):
        if value.prompt:
            return replace(value, prompt=_begun(value.prompt, system))
        return replace(value, completion=_begun(value.completion, system))
    first = next(key for key in ("messages", "prompt", "completion") if value.get(key))
    return {**value, first: _begun(value[first], system)}


def _begun(chat: Any, system: str) -> Chat:
    if chat[0]["role"] == "system":
        return list(chat)
    return [{"role": "system", "content": system}, *chat]


def chats_of(value: Any) -> list[Chat]:
    """Every list of messages of a value of a use."""
    parts: tuple[Any, ...]
    if isinstance(value, PreferencePair):
        parts = (value.prompt, value.chosen, value.rejected)
    elif isinstance(value, JudgedAnswer):
        parts = (value.prompt, value.completion)
    elif isinstance(value, dict):
        parts = tuple(part for key, part in value.items() if key != "tools")
    else:
        parts = (value,)
    return [part for part in parts if isinstance(part, list)]


def has_pictures(value: Any) -> bool:
    """Whether a message of a value of a use shows a picture."""
    return any("images" in message for chat in chats_of(value) for message in chat)


def on_messages(value: Any, change: Callable[[Message], Message]) -> Any:
    """A value of a use with every message as `change` gives it, in their order."""

    def part(held: Any) -> Any:
        if isinstance(held, list):
            return [change(message) for message in held]
        return held

    if isinstance(value, PreferencePair):
        prompt = part(value.prompt)
        return replace(
            value, prompt=prompt, chosen=part(value.chosen), rejected=part(value.rejected)
        )
    if isinstance(value, JudgedAnswer):
        return replace(value, prompt=part(value.prompt), completion=part(value.completion))
    if isinstance(value, dict):
        return {key: held if key == "tools" else part(held) for key, held in value.items()}
    return part(value)


def pictures_in(value: Any) -> Iterator[Any]:
    """The pictures of a value of a use, in their order."""
    for chat in chats_of(value):
        for message in chat:
            yield from message.get("images", ())


def keys_of(value: Any, fields: Mapping[str, Any]) -> set[str]:
    """What the messages of a value hold beside role and content, and "tools" where a template shows
    some (a prompt's are among its `fields`). A flag to train that no stage follows is named with
    its turn.
    """
    tools = fields.get("tools")
    if isinstance(value, (PreferencePair, JudgedAnswer)):
        tools = value.tools
    elif isinstance(value, dict):
        tools = value.get("tools")
    out: set[str] = {"tools"} if tools else set()
    for messages in chats_of(value):
        for message in messages:
            if len(message) == 2:  # role and content, as most
                continue
            out.update(message.keys() - {"role", "content", "train"})
            if message.get("train") and message["role"] != "assistant":
                out.add(f"train (true, in a turn of role {message['role']})")
    return out


def require_messages(value: Any, column: str) -> None:
    """Raises RowError for plain texts beside functions, which no template renders."""
    if not is_conversation(value):
        raise RowError(
            f"key {column!r}: expected messages beside it, since a chat template shows them, found "
            "plain texts. A column that holds something else can be renamed by data.columns; a "
            "file that stage=label wrote for people is read by stage=label label.mode=import"
        )


def tools_outside(key: str) -> Callable[[Row], Row]:
    """A format's `flatten`: the functions inside a row's object `key`, as its own column ``tools``.
    Raises RowError where the row has others there.
    """

    def flatten(row: Row) -> Row:
        inside = row.get(key)
        if not isinstance(inside, Mapping) or is_nothing(inside.get("tools")):
            return row
        if not is_nothing(row.get("tools")) and row["tools"] != inside["tools"]:
            raise RowError(f"keys 'tools' and '{key}.tools': expected one of them, found both")
        rest = {name: value for name, value in inside.items() if name != "tools"}
        return {**row, key: rest, "tools": inside["tools"]}

    return flatten


def shows_tools(value: Any) -> bool:
    """Whether a system message holds the functions, as Hermes' rows have them."""
    first = next((chat[0] for chat in chats_of(value) if chat), None)
    return first is not None and first["role"] == "system" and "<tools>" in first["content"]


# ---- back into columns ----


def columns_of(
    value: Any, fields: Mapping[str, Any], answers: Sequence[str] = ()
) -> dict[str, Any]:
    """A value of a use in the toolkit's own columns (see rlhf/data/prepare/items.py), followed by
    those `fields` that are neither canonical nor among its format's `answers`.
    """
    own = {key: held for key, held in fields.items() if key not in (*CANONICAL, *answers)}
    if isinstance(value, PreferencePair):
        columns = {"prompt": value.prompt, "chosen": value.chosen, "rejected": value.rejected}
        if value.margin is not None:
            columns["margin"] = value.margin
        return {**columns, **_tools_column(value.tools), **own}
    if isinstance(value, JudgedAnswer):
        columns = {"prompt": value.prompt, "completion": value.completion, "label": value.good}
        return {**columns, **_tools_column(value.tools), **own}
    if isinstance(value, dict):
        return {**value, **own}
    return {"prompt": value, **_tools_column(fields.get("tools")), **own}


def _tools_column(tools: Any) -> dict[str, Any]:
    return {} if tools is None else {"tools": tools}


# ---- columns that are not carried ----


def replaced(own: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Notes on the values of `own` in whose place a judgement's `fields` have others."""
    return [
        f"column {name!r} is not carried: the judgement's own {name!r} stands in its place"
        for name, value in own.items()
        if not is_nothing(value) and fields.get(name) != value
    ]


def not_carried(columns: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Notes on a row's `fields` that its written `columns` have no place for (a margin given as a
    text is there as a number).
    """
    out = []
    for key, value in fields.items():
        written = columns.get(key)
        if is_nothing(value) or (written is not None and written in (value, finite(value))):
            continue
        out.append(
            f"column {key!r} is not carried: such rows have none of this name, and "
            f"data.columns='{{own_{key}: {key}}}' carries it"
        )
    return out


# ---- objects inside columns ----

# A path names a key that a format reads; `[]` steps into a list, `*` stands for any characters of a
# name. A key that ends a path holds no object of its own, unless any name will do there. All else
# is counted by name, so that nothing of a row goes without a word.


def unread_inside(columns: Mapping[str, Any], read: Sequence[str]) -> list[str]:
    """The keys inside a row's `columns` that none of the paths `read` names; empty ones are not
    among them, nor are those of columns that no path begins with.
    """
    found: dict[str, None] = {}
    for column, value in columns.items():
        inside = [path.replace("[]", "").split(".") for path in read]
        onward = [path[1:] for path in inside if path[0] == column]
        if onward:
            _walk(value, onward, column, found)
    return list(found)


def _walk(value: Any, paths: list[list[str]], where: str, found: dict[str, None]) -> None:
    """Note the keys in `value` that begin no path; `paths` are those that lead on from it."""
    if isinstance(value, list):
        for item in value:
            _walk(item, paths, f"{where}[]", found)
        return
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        name = f"{where}.{key}"
        fitting = [path for path in paths if fnmatchcase(str(key), path[0])]
        onward = [path[1:] for path in fitting if len(path) > 1]
        object_at_end = isinstance(inner, Mapping) and not onward and ["*"] not in fitting
        if inner in (None, "", [], {}):
            continue
        if not fitting or object_at_end:
            found[name] = None
        elif onward:
            _walk(inner, onward, name, found)
