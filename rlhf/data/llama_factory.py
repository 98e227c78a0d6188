"""LLaMA-Factory's dataset_info.json, so that its users bring their registry along (data.registry,
data.dataset).

    {"NAME": {"file_name": "x.json" | "hf_hub_url": "OWNER/NAME", "formatting": "alpaca" |
    "sharegpt", "ranking": true, "subset": ..., "split": ...,
              "num_samples": N, "columns": {"prompt": "instruction", ...}, "tags": {"role_tag":
              "from", ...}}}

Recalled, not read in its source; what an entry leaves out is assumed as there and logged.
`columns` maps a role to the file's column, `tags` a role to the file's word. Their rows become
ours: alpaca (instruction, input, output ...), sharegpt (conversations of {from, value}), with
chosen and rejected for ranking and kto_tag for judged answers. num_samples draws rows by run.seed.
A column of tools goes with its row. Not read: images and other media (refused where a row holds
some), and places other than a file and the Hugging Face hub.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.choices import DataFormat
from rlhf.data.mixture import Part, Row, Source, Transform, parts_of
from rlhf.data.opening import endings, readable_files
from rlhf.data.rows import RowError
from rlhf.process.wording import describe, nearest, nearest_hint
from rlhf.types import UserError

_ENTRY = (
    "file_name",
    "hf_hub_url",
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
)
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
# role: its column where the entry names none
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_COLUMNS = {
    "alpaca": (
        "prompt",
        "query",
        "response",
        "history",
        "system",
        "tools",
        "chosen",
        "rejected",
        "kto_tag",
    ),
    "sharegpt": ("messages", "system", "tools", "chosen", "rejected", "kto_tag"),
}
_MEDIA = ("images", "videos", "audios")
# what we call a role's column
_OURS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# ours
_SPEAKERS = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}


def sources(path: Path, names: str) -> list[Source]:
    """The entries NAME or NAME,NAME of the registry, one after the other. Raises UserError naming
    file, entry and key.
    """
    entries = _read(path)
    out = []
    for name in (one.strip() for one in names.split(",")):
        if name not in entries:
            hint = nearest_hint(name, list(entries), " Nearest: ", ".")
            raise UserError(
                f"data.dataset={names}: {path} has no entry {name!r}; it has "
                f"{', '.join(list(entries)[:20])}.{hint}"
            )
        out.append(_source(path, name, entries[name]))
    return out


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"data.registry={path}: no such file. Expected LLaMA-Factory's dataset_info.json."
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, byte {error.start + 1}: expected UTF-8 text. Save it as UTF-8."
        ) from error
    # a number of too many digits, or too many brackets
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({type(error).__name__}: {error}).") from error
    if not isinstance(entries, dict):
        raise UserError(
            f"{path}: expected an object of entries by name, found {type(entries).__name__}."
        )
    return entries


def _source(path: Path, name: str, entry: Any) -> Source:
    where = f"{path}, entry {name!r}"
    _check_entry(where, entry)
    formatting = entry.get("formatting", "alpaca")
    columns = _columns(where, entry, formatting)
    tags = _TAGS | _strings(where, entry, "tags", tuple(_TAGS))
    judged, ranking = "kto_tag" in columns, bool(entry.get("ranking", False))
    if ranking and judged:
        raise UserError(f"{where}: expected ranking or a kto_tag, found both.")
    kind = formatting
    if ranking:
        kind = f"{formatting}_preference"
    elif judged:
        kind = f"{formatting}_unpaired"
    transform = alpaca_rows(columns) if formatting == "alpaca" else sharegpt_rows(columns, tags)
    count = entry.get("num_samples")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise UserError(
            f"{where}, key 'num_samples': expected a number of rows of at least 1, found {count!r}."
        )
    key = f"data.dataset (entry {name!r} of {path})"
    return Source(
        key,
        name,
        _parts(path, where, key, entry),
        DataFormat[kind],
        (transform,),
        count,
        notes=_assumed(where, entry, kind),
    )


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, found {type(entry).__name__}.")
    elsewhere = [key for key in _ELSEWHERE if key in entry]
    if not any(key in entry for key in ("file_name", "hf_hub_url")):
        hint = f" Found {elsewhere[0]!r}, a place that is not read." if elsewhere else ""
        raise UserError(f"{where}: expected 'file_name' or 'hf_hub_url'.{hint}")
    unknown = next((key for key in entry if key not in (*_ENTRY, *_ELSEWHERE)), None)
    if unknown is not None:
        raise UserError(
            f"{where}: unknown key {unknown!r}; nearest: {nearest(unknown, _ENTRY)!r}. Known "
            f"keys: {', '.join(_ENTRY)}."
        )
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _COLUMNS:
        raise UserError(
            f"{where}, key 'formatting': expected alpaca or sharegpt, found {formatting!r}; "
            f"nearest: {nearest(str(formatting), list(_COLUMNS))!r}."
        )


def _strings(
    where: str, entry: Mapping[str, Any], key: str, known: tuple[str, ...]
) -> dict[str, str]:
    values = entry.get(key) or {}
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise UserError(f"{where}, key {key!r}: expected an object of texts, found {values!r}.")
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"{where}, key {key!r}: unknown {unknown!r}; nearest: {nearest(unknown, known)!r}. "
            f"Known: {', '.join(known)}."
        )
    return values


def _columns(where: str, entry: Mapping[str, Any], formatting: str) -> dict[str, str]:
    """The file's column of each role that the entry's rows have."""
    given = _strings(where, entry, "columns", (*_COLUMNS[formatting], *_MEDIA))
    if formatting == "alpaca":
        columns = _ALPACA | given
        if entry.get("ranking"):
            columns.pop("response", None)
            columns = {"chosen": "chosen", "rejected": "rejected"} | columns
        return columns
    defaults = {"messages": "conversations"}
    if entry.get("ranking"):
        defaults |= {"chosen": "chosen", "rejected": "rejected"}
    return defaults | given


def _parts(path: Path, where: str, key: str, entry: Mapping[str, Any]) -> tuple[Part, ...]:
    subset, split = entry.get("subset"), entry.get("split")
    if "file_name" not in entry:
        if "folder" in entry:
            raise UserError(
                f"{where}, key 'folder': a folder of a hub's data set is not read. Give its "
                "files as 'file_name'."
            )
        return parts_of(str(entry["hf_hub_url"]), key, subset, split)
    file = path.parent / str(entry["file_name"])
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise UserError(
            f"{where}, key 'file_name': {entry['file_name']} is outside of {path.parent}. A "
            "registry names files of its own folder only."
        )
    if file.is_dir() and not any(
        (file / name).is_file() for name in ("state.json", "dataset_dict.json")
    ):
        files = readable_files(file)
        if not files:
            raise UserError(
                f"{where}, key 'file_name': the directory {file} holds no file that ends with "
                f"{endings()}."
            )
        return tuple(part for each in files for part in parts_of(str(each), key))
    return parts_of(str(file), key, subset, split if file.is_dir() else None)


def _assumed(where: str, entry: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    assumed = []
    if "formatting" not in entry:
        assumed.append("formatting alpaca")
    if not entry.get("columns"):
        assumed.append("the columns' usual names")
    if kind.startswith("sharegpt") and not entry.get("tags"):
        assumed.append("the tags from/value and human/gpt")
    if "hf_hub_url" in entry and "file_name" in entry:
        assumed.append("the file rather than the hub")
    note = f" Assumed, as LLaMA-Factory does: {', '.join(assumed)}." if assumed else ""
    return (f"{where}: read as {kind}.{note}",)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with our names for the roles' columns; columns of other roles keep theirs. A column
    that has our name by chance is left out.
    """
    ours = {
        _OURS.get(role, role): row[column]
        for role, column in columns.items()
        if column in row and role not in _MEDIA
    }
    roles = {*_COLUMNS["alpaca"], *_COLUMNS["sharegpt"]} - {"tools"}
    shadowed = {_OURS.get(role, role) for role in roles}
    others = {
        key: value
        for key, value in row.items()
        if key not in columns.values() and key not in shadowed
    }
    return {**others, **ours}


def alpaca_rows(columns: Mapping[str, str]) -> Transform:
    """Rows of an alpaca entry as instruction, input, output, system, history (chosen, rejected or
    kto_tag).
    """

    def transform(row: Row) -> Row:
        _refuse_media(row, columns)
        return _renamed(row, columns)

    return transform


def sharegpt_rows(columns: Mapping[str, str], tags: Mapping[str, str]) -> Transform:
    """Rows of a sharegpt entry as conversations of {from, value} with the speakers human, gpt and
    system.
    """
    speakers = {tags[tag]: ours for tag, ours in _SPEAKERS.items()}

    def message(given: Any) -> Any:
        if (
            not isinstance(given, Mapping)
            or tags["role_tag"] not in given
            or tags["content_tag"] not in given
        ):
            return given  # refused, with its place, when it is read
        speaker = given[tags["role_tag"]]
        named = (tags["role_tag"], tags["content_tag"])
        rest = {key: value for key, value in given.items() if key not in named}
        if isinstance(speaker, str):
            speaker = speakers.get(speaker, speaker)
        return {**rest, "from": speaker, "value": given[tags["content_tag"]]}

    def transform(row: Row) -> Row:
        _refuse_media(row, columns)
        out = _renamed(row, columns)
        if isinstance(out.get("conversations"), list):
            out["conversations"] = [message(turn) for turn in out["conversations"]]
        return out | {side: message(out[side]) for side in ("chosen", "rejected") if side in out}

    return transform


def _refuse_media(row: Row, columns: Mapping[str, str]) -> None:
    held = next((role for role in _MEDIA if role in columns and row.get(columns[role])), None)
    if held is not None:
        raise RowError(
            f"key {columns[held]!r}: pictures, videos and sounds are not read, found {held}: "
            f"{describe(row[columns[held]])}"
        )
