"""Conversations under other names and in other layouts (Capybara, LIMA, WildChat), conversations
with a system message beside them, trees of messages (Open Assistant), and prompts with what
verifies their answers (verl, DAPO, RLVR).
"""

from collections.abc import Mapping
from typing import Any

from rlhf.data.formats.base import Format, Several, ranked, with_assistant, with_system
from rlhf.data.formats.names import TURNS, plain, roles_of
from rlhf.data.formats.trl import prompt_plain
from rlhf.data.rows import Chat, Row, RowError, chat_of, number_of, text_of, without_answer
from rlhf.process.wording import describe
from rlhf.types import Message

# ---- conversations ----

_SPEAKING = ("user", "assistant")
# turns that hold a question and its answer (Capybara, ms-swift)
_EXCHANGES = {"input": "output", "human": "assistant", "user": "assistant", "question": "answer"}


def _key(row: Row) -> str:
    known = {plain(str(key)): str(key) for key in row}
    return next((known[name] for name in TURNS if name in known), "")


def _layout(turns: Any) -> str:
    """How a conversation is written: role, from, input or text; "" for anything else."""
    if not isinstance(turns, list) or not turns:
        return ""
    if all(isinstance(turn, str) for turn in turns):
        return "text"
    keys = turns[0].keys() if isinstance(turns[0], Mapping) else ()
    return next((key for key in ("role", "from", *_EXCHANGES) if key in keys), "")


def _chat(row: Row) -> Chat:
    """The conversation, the row's system message in front. Raises RowError."""
    key = _key(row)
    turns: Any = row[key]
    layout = _layout(turns)
    if layout == "role":
        chat = chat_of(row, key)
    elif layout == "from":
        chat = chat_of(row, key, role="from", content="value")
    elif layout == "text":
        texts = [text_of({f"{key}[{i}]": text}, f"{key}[{i}]") for i, text in enumerate(turns)]
        chat = [{"role": _SPEAKING[i % 2], "content": text} for i, text in enumerate(texts)]
    else:
        chat = _exchanges(turns, key, (layout, _EXCHANGES[layout]))
    return with_system(row, chat, key, roles_of(row).system)


def _exchanges(turns: list[Any], key: str, names: tuple[str, str]) -> Chat:
    """Turns of a question and its answer each. Raises RowError."""
    chat: Chat = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise RowError(f"key '{key}[{i}]': expected an object, found {describe(turn)}")
        try:
            asked, said = text_of(turn, names[0]), text_of(turn, names[1])
        except RowError as error:
            raise RowError(f"{key}[{i}]: {error}") from None
        rest = {name: value for name, value in turn.items() if name not in names}
        second = next((name for name in ("role", "content") if rest.get(name)), None)
        if second is not None:
            raise RowError(
                f"key '{key}[{i}].{second}': expected {names[0]!r} and {names[1]!r} alone, found "
                f"{describe(rest[second])} too"
            )
        question: Any = {**rest, "role": "user", "content": asked}
        chat += [question, {"role": "assistant", "content": said}]
    return chat


def _is_dialogue(row: Row) -> bool:
    """A layout that neither the format messages nor sharegpt has."""
    key = _key(row)
    layout = _layout(row.get(key))
    system = roles_of(row).system
    if (key, layout) == ("messages", "role"):
        return bool(system) and system != "system"
    if (key, layout) == ("conversations", "from"):
        return bool(system) and system != "system"
    return bool(layout) and plain(key) != "trajectory"


DIALOGUE = Format(
    "dialogue",
    (),
    "conversation, conversations or messages of {role, content}, {from, value}, {input, output} "
    "or texts, the user's first; and system, system_prompt",
    sft=lambda row: {"messages": with_assistant(_chat(row), _key(row))},
    prompt=lambda row: without_answer(_chat(row), _key(row)),
    test=_is_dialogue,
    find_columns=lambda row: (tuple(filter(None, (_key(row), roles_of(row).system))), ()),
)

# ---- trees ----

_ROLES = {"prompter": "user", "assistant": "assistant"}
_KEYS = ("text", "role", "rank", "deleted")  # that are read of a message
_DEEPEST = 30  # replies on replies: as deep as Open Assistant's trees are


def _turn(message: Mapping[str, Any]) -> Message:
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise RowError(f"key 'role': expected prompter or assistant, found {message.get('role')!r}")
    return {"role": role, "content": text_of(message, "text")}


def _replies(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The replies that were not deleted, the best-ranked first. Raises RowError."""
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise RowError(f"key 'replies': expected a list of messages, found {describe(replies)}")

    def place(reply: Mapping[str, Any]) -> tuple[bool, float]:
        rank = _rank(reply)
        return rank is None, rank or 0.0

    return sorted((reply for reply in replies if not reply.get("deleted")), key=place)


def _rank(reply: Mapping[str, Any]) -> float | None:
    if reply.get("rank") is None:
        return None
    return number_of(reply, "rank")


def _best_path(row: Row) -> dict[str, Any]:
    """The conversation of the best-ranked replies, up to its last answer. Raises RowError."""
    message: Mapping[str, Any] | None = row["prompt"]
    chat: Chat = []
    while message is not None:
        chat.append(_turn(message))
        message = next(iter(_replies(message)), None)
    if chat[-1]["role"] == "user":
        chat.pop()
    if not chat:
        raise RowError("key 'prompt': expected a message with an assistant's reply, found none")
    return {"messages": chat}


def _pairs_of_tree(row: Row) -> Several:
    """The pairs of differently ranked replies to each message of the tree."""
    out = Several()

    def visit(message: Mapping[str, Any], before: Chat, name: str) -> None:
        chat: Chat = [*before, _turn(message)]
        replies = [(f"{name}.replies[{i}]", reply) for i, reply in enumerate(_replies(message))]
        if chat[-1]["role"] == "user":
            answers = [
                (place, _turn(reply)["content"], rank)
                for place, reply in replies
                if (rank := _rank(reply)) is not None
            ]
            several = ranked(chat, answers, {})
            out.pairs.extend(several.pairs)
            out.set_aside.extend(several.set_aside)
        for place, reply in replies:
            visit(reply, chat, place)

    visit(row["prompt"], [], "prompt")
    if not out.pairs:
        out.set_aside.append("no message of the tree has two ranked answers")
    return out


MESSAGE_TREE = Format(
    "message_tree",
    ("message_tree_id", "prompt"),
    "prompt of {role, text, replies} (Open Assistant's trees): the best-ranked replies as a "
    "conversation, or pairs of replies by rank",
    sft=_best_path,
    pairs=_pairs_of_tree,
    prompt=lambda row: [_turn(row["prompt"])],
    test=lambda row: isinstance(row["prompt"], Mapping) and "replies" in row["prompt"],
    consumed=("prompt",),
    read_inside=tuple(
        f"prompt{'.replies[]' * depth}.{key}" for depth in range(_DEEPEST) for key in _KEYS
    ),
    note=lambda row: "a conversation goes along the best-ranked replies, a pair is two of them",
)

# ---- prompts with what verifies their answers ----


def _truth(row: Row) -> dict[str, Any]:
    """verl's reference answer, which stands inside reward_model."""
    inside = row.get("reward_model")
    if isinstance(inside, Mapping) and "ground_truth" in inside:
        return {"ground_truth": inside["ground_truth"]}
    return {}


def _is_verifiable(row: Row) -> bool:
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            return False
        roles = [turn.get("role") for turn in turns]
        asked = bool(roles) and roles[-1] == "user"
        return asked and ("ground_truth" in row or "assistant" not in roles)
    return "prompt" in row and bool(_truth(row))


VERIFIABLE = Format(
    "verifiable",
    (),
    "prompt and reward_model of {ground_truth} (verl), or messages that end with the user's (RLVR, "
    "with ground_truth)",
    prompt=lambda row: chat_of(row, "messages") if "messages" in row else prompt_plain(row),
    test=_is_verifiable,
    consumed=("prompt", "messages"),
    extra=_truth,
)
