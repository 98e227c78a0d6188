"""The texts of a row that augmentation may change: what is asked, never an answer, so that a label
stays right.
"""

from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item, replace_texts


def asked(columns: dict[str, Any], kind: Use) -> list[str]:
    """Where the texts that may be changed are, as `replace_texts` calls it: a prompt or its users'
    messages, a conversation's, or a whole text. Empty for rows without any, such as pairs of whole
    texts, whose prompt can't be told from their answers.
    """
    if "messages" in columns:
        return [
            f"messages[{i}]"
            for i, message in enumerate(columns["messages"])
            if message["role"] == "user" and message["content"].strip()
        ]
    prompt = columns.get("prompt")
    if isinstance(prompt, list):
        return [
            f"prompt[{i}]"
            for i, message in enumerate(prompt)
            if message["role"] == "user" and message["content"].strip()
        ]
    if isinstance(prompt, str) and prompt.strip():
        return ["prompt"]
    text = columns.get("text")
    if kind is Use.sft and isinstance(text, str) and text.strip():
        return ["text"]
    return []


def text_at(columns: dict[str, Any], where: str) -> str:
    """The text at one of the keys that `asked` gives."""
    key, _, rest = where.partition("[")
    if rest:
        return columns[key][int(rest[:-1])]["content"]
    return columns[key]


def changed(item: Item, texts: dict[str, str], how: str) -> Item:
    """A new row for the training split: the item's columns with `texts` by key, and two columns
    that say how the row was made and from which row.
    """
    columns = replace_texts(item.columns, texts.get)
    return Item(
        {**columns, "augmented": how, "augmented_from": item.place},
        item.origin,
        item.number,
        item.split,
    )


def may_grow(item: Item) -> bool:
    """Whether a row is of the training split and was not made by augmentation itself."""
    return item.split == "train" and not item.columns.get("augmented")
