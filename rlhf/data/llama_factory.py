"""LLaMA-Factory's registry of data sets, dataset_info.json, so that its users bring it along
(data.registry, data.dataset). Entries are read as its parser and converters read them (looked up
at ff6d4d12e of 2026-08-18).

    {"NAME": {"file_name": "x.json", "formatting": "sharegpt", "columns": {"messages": "turns"},
              "tags": {"role_tag": "from", ...}}}

`columns` maps a role to the file's column, `tags` a role to the file's word. An entry without
`columns` has the usual ones; an entry with `columns` has those that it names and no other. The hub
comes before the file. num_samples draws rows by run.seed, and repeats them where there are fewer.

    a prompt alone (alpaca)       whole texts to train on, their pre-training
    a prompt with history, query  prompts
    a history (alpaca)            a conversation, every answer of which trains
    prompt and query              one instruction, joined by a line break
    chosen, rejected; kto_tag     pairs (ranking: true); judged answers

images are the row's pictures, at the marks <image> in its texts; their paths begin at the
registry's folder, or at data.image_dir (media_dir there).

What differs on purpose is told in a note on the entry. Not read: videos and sounds (refused where a
row holds some), and places other than a file and the Hugging Face hub. What becomes of a row is in
rlhf/data/llama_factory_rows.py.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.data import DataFormat
from rlhf.data.llama_factory_rows import MEDIA, TAGS, alpaca_rows, sharegpt_rows
from rlhf.data.mixture import Part, Source, hub_part, parts_of
from rlhf.data.opening import endings, kind_of, readable_files
from rlhf.process.wording import nearest, nearest_hint
from rlhf.types import UserError

INFO_FILE = "dataset_info.json"
_PLACE = ("file_name", "hf_hub_url", "subset", "split", "folder")
_ENTRY = (*_PLACE, "formatting", "ranking", "num_samples", "columns", "tags")
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_BOTH = ("system", "tools", "chosen", "rejected", "kto_tag")
_ROLES = {
    "alpaca": ("prompt", "query", "response", "history", *_BOTH, *MEDIA),
    "sharegpt": ("messages", *_BOTH, *MEDIA),
    "openai": ("messages", *_BOTH, *MEDIA),
}
# role: its column, in an entry without `columns`
_USUAL = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}


def sources(path: Path, names: str, image_dir: Path | None = None) -> list[Source]:
    """The entries NAME or NAME,NAME of the registry (a file, or the directory that holds it), one
    after the other. image_dir: of their pictures; None: the registry's, as LLaMA-Factory has it.
    Raises UserError naming file, entry and key.
    """
    if path.is_dir():
        path = path / INFO_FILE
    entries = _read(path)
    out = []
    for name in (one.strip() for one in names.split(",")):
        if name not in entries:
            hint = nearest_hint(name, list(entries), " Nearest: ", ".")
            raise UserError(
                f"data.dataset={names}: {path} has no entry {name!r}; it has "
                f"{', '.join(list(entries)[:20])}.{hint}"
            )
        out.append(_source(path, name, entries[name], image_dir or path.parent))
    return out


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"data.registry={path}: no such file. Expected a {INFO_FILE} of theirs.")
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


# ---- entries ----


def _source(path: Path, name: str, entry: Any, image_dir: Path) -> Source:
    where = f"{path}, entry {name!r}"
    _check_entry(where, entry)
    formatting = entry.get("formatting", "alpaca")
    columns = _columns(where, entry, formatting)
    tags = TAGS | _strings(where, entry, "tags", tuple(TAGS))
    kind = _kind(where, entry, formatting, columns)
    if formatting == "alpaca":
        transform = alpaca_rows(columns, kind)
    else:
        transform = sharegpt_rows(columns, tags)
    count = entry.get("num_samples")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise UserError(
            f"{where}, key 'num_samples': expected a number of rows of at least 1, found {count!r}."
        )
    return Source(
        f"data.dataset (entry {name!r} of {path})",
        name,
        _parts(path, where, f"data.dataset (entry {name!r} of {path})", entry),
        DataFormat[kind],
        (transform,),
        count,
        repeats=True,
        notes=_notes(where, entry, kind, columns),
        image_dir=image_dir,
    )


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, found {type(entry).__name__}.")
    elsewhere = next((key for key in _ELSEWHERE if key in entry), None)
    if "hf_hub_url" not in entry and elsewhere is not None:
        hint = f" Leave {elsewhere!r} out, and 'file_name' is read." if "file_name" in entry else ""
        raise UserError(
            f"{where}: expected rows of 'hf_hub_url' or 'file_name', found {elsewhere!r}, a place "
            f"that is not read.{hint}"
        )
    if "file_name" not in entry and "hf_hub_url" not in entry:
        raise UserError(f"{where}: expected 'file_name' or 'hf_hub_url', found neither.")
    for key in _unknown_keys(entry):
        near = difflib.get_close_matches(key, _ENTRY, n=1, cutoff=0.8)
        if near:
            raise UserError(
                f"{where}: unknown key {key!r}; nearest: {near[0]!r}. Known keys: "
                f"{', '.join(_ENTRY)}."
            )
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _ROLES:
        raise UserError(
            f"{where}, key 'formatting': expected {', '.join(_ROLES)}, found {formatting!r}; "
            f"nearest: {nearest(str(formatting), list(_ROLES))!r}."
        )


def _unknown_keys(entry: Mapping[str, Any]) -> list[str]:
    return [key for key in entry if key not in (*_ENTRY, *_ELSEWHERE)]


def _strings(
    where: str, entry: Mapping[str, Any], key: str, known: tuple[str, ...]
) -> dict[str, str]:
    """An object of texts; null and empty ones are left out. Raises UserError."""
    values = entry.get(key) or {}
    if not isinstance(values, dict) or not all(
        value is None or isinstance(value, str) for value in values.values()
    ):
        raise UserError(f"{where}, key {key!r}: expected an object of texts, found {values!r}.")
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"{where}, key {key!r}: unknown {unknown!r}; nearest: {nearest(unknown, known)!r}. "
            f"Known: {', '.join(known)}."
        )
    return {name: value for name, value in values.items() if value}


def _columns(where: str, entry: Mapping[str, Any], formatting: str) -> dict[str, str]:
    """The file's column of each role that the entry's rows have."""
    given = _strings(where, entry, "columns", _ROLES[formatting])
    columns = given if "columns" in entry else dict(_USUAL[formatting])
    if entry.get("ranking"):
        columns = {"chosen": "chosen", "rejected": "rejected", **columns}
        columns.pop("response", None)
    needed = "prompt" if formatting == "alpaca" else "messages"
    if needed not in columns and not (formatting == "alpaca" and "query" in columns):
        raise UserError(
            f"{where}, key 'columns': expected the column of {needed!r}, found none: an entry "
            f"that names columns has only those that it names ({', '.join(columns) or 'none'})."
        )
    return columns


def _kind(where: str, entry: Mapping[str, Any], formatting: str, columns: dict[str, str]) -> str:
    """The format that an entry's rows have once they are ours. Raises UserError."""
    ranking, judged = bool(entry.get("ranking", False)), "kto_tag" in columns
    if ranking and judged:
        raise UserError(f"{where}: expected ranking or a kto_tag, found both.")
    layout = "alpaca" if formatting == "alpaca" else "sharegpt"
    if ranking:
        return f"{layout}_preference"
    if judged:
        return f"{layout}_unpaired"
    if layout == "sharegpt":
        return layout
    if "response" in columns:
        return "messages" if "history" in columns else layout
    if columns.keys() & {"query", "history", "system"}:
        return "prompt"
    return "text"


def _notes(
    where: str, entry: Mapping[str, Any], kind: str, columns: Mapping[str, str]
) -> tuple[str, ...]:
    """What the log says of an entry: how it is read, and what LLaMA-Factory does otherwise."""
    roles = ", ".join(f"{role} from {column!r}" for role, column in columns.items())
    told = [f"read as {kind}: {roles}; a role without a column is not read"]
    if entry.get("ranking") and not {"chosen", "rejected"} <= set(entry.get("columns") or {}):
        told.append(
            "the columns chosen and rejected are assumed here, where LLaMA-Factory wants them named"
        )
    tags = entry.get("tags") or {}
    if tags and kind.startswith("sharegpt") and any(tag not in tags for tag in TAGS):
        assumed = ", ".join(f"{tag} {word!r}" for tag, word in TAGS.items() if tag not in tags)
        told.append(f"tags that it leaves out are assumed here: {assumed} (LLaMA-Factory has none)")
    if entry.get("formatting") == "openai":
        told.append(
            "LLaMA-Factory adds 'detailed thinking off' to system messages of this formatting; "
            "here they stay as they are"
        )
    if "hf_hub_url" in entry and "file_name" in entry:
        told.append(f"from the hub, so the file {entry['file_name']} is not read")
    if unknown := _unknown_keys(entry):
        told.append(f"keys that nothing reads: {', '.join(unknown)}")
    return (f"{where}: {'. '.join(told)}.",)


def _parts(path: Path, where: str, key: str, entry: Mapping[str, Any]) -> tuple[Part, ...]:
    subset, split, folder = entry.get("subset"), entry.get("split"), entry.get("folder")
    if "hf_hub_url" in entry:
        hint = ""
        if "file_name" in entry:
            hint = (
                f" The hub comes before file_name={entry['file_name']}, as in LLaMA-Factory: "
                "leave 'hf_hub_url' out of the entry to read the file."
            )
        return (hub_part(str(entry["hf_hub_url"]), key, subset, split, folder, hint),)
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
        kinds = sorted({kind_of(each) or "" for each in files})
        if len(kinds) != 1:
            raise UserError(
                f"{where}, key 'file_name': the directory {file}: expected files of one kind that "
                f"end with {endings()}; found {', '.join(kinds) or 'none'}."
            )
        return tuple(part for each in files for part in parts_of(str(each), key))
    return parts_of(str(file), key, subset, split if file.is_dir() else None)
