"""What the values of a use hold, whatever the use: conversations or texts, keys of messages, and
the functions that a template shows.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.data.rows import Chat, RowError
from rlhf.types import JudgedAnswer, PreferencePair


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


def chats_of(value: Any) -> list[Chat]:
    """Every list of messages of a value of a use."""
    if isinstance(value, PreferencePair):
        parts = (value.prompt, value.chosen, value.rejected)
    elif isinstance(value, JudgedAnswer):
        parts = (value.prompt, value.completion)
    elif isinstance(value, dict):
        parts = tuple(part for key, part in value.items() if key != "tools")
    else:
        parts = (value,)
    return [part for part in parts if isinstance(part, list)]


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
            "plain texts. A column that holds something else can be renamed by data.columns"
        )


def shows_tools(value: Any) -> bool:
    """Whether a system message holds the functions, as Hermes' rows have them."""
    first = next((chat[0] for chat in chats_of(value) if chat), None)
    return first is not None and first["role"] == "system" and "<tools>" in first["content"]
