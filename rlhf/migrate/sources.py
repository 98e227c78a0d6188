"""Data sets as other toolkits name them, as data.path or data.sources."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.migrate.shared import computed, impossible
from rlhf.migrate.tables import Answer, NotPossible, Settings

DATA = (
    "data.path",
    "data.sources",
    "data.format",
    "data.columns",
    "data.split",
    "data.subset",
)


def from_sources(sources: Sequence[Mapping[str, Any]], note: str = "") -> Answer:
    """One source as the options of the group data, several as data.sources."""
    kept = [{key: value for key, value in source.items() if value} for source in sources]
    if len(kept) == 1:
        return computed({f"data.{key}": value for key, value in kept[0].items()}, note)
    named: dict[str, Any] = {}
    for source in kept:
        named[_free_name(str(source["path"]), named)] = source
    return computed({"data.sources": named}, note)


def _free_name(path: str, taken: Mapping[str, Any]) -> str:
    """A name for a source: the end of its path."""
    last = path.rstrip("/").rpartition("/")[2].partition("#")[0]
    name = re.sub(r"\W+", "_", last).strip("_") or "rows"
    number = 2
    free = name
    while free in taken:
        free = f"{name}_{number}"
        number += 1
    return free


def swift_source(text: str) -> dict[str, Any]:
    """name:subset#rows of ms-swift; a path may have a colon after its drive only."""
    name, cap, rows = text.partition("#")
    path, _, subset = name.partition(":")
    source: dict[str, Any] = {"path": path + (f"#{rows}" if cap else "")}
    if subset:
        source["subset"] = subset
    return source


def mixed(names: Sequence[str], weights: Sequence[float]) -> Answer:
    """Data sets by name, with a weight each where there are any."""
    if not weights:
        return from_sources([{"path": name} for name in names])
    pairs = zip(names, weights, strict=True)
    return from_sources([{"path": name, "weight": weight} for name, weight in pairs])


# ---- axolotl ----

_AXOLOTL = {
    "alpaca": "alpaca",
    "chat_template": "auto",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
}


def axolotl_data(s: Settings) -> Answer:
    """The list of data sets."""
    items = s.get("datasets", "pretraining_dataset", "test_datasets")
    if isinstance(items, str):
        items = [{"path": items}]
    if isinstance(items, Mapping):
        items = [items]
    try:
        return from_sources([_axolotl_source(item) for item in items])
    except NotPossible as error:
        return impossible(str(error))


def _axolotl_source(item: Mapping[str, Any]) -> dict[str, Any]:
    path, files = str(item.get("path")), item.get("data_files")
    if files and path in ("json", "csv", "parquet", "text"):
        path = str(files[0] if isinstance(files, list) else files)
    format_, columns = _format(item)
    rows = item.get("shards")
    if rows is not None:
        raise NotPossible("a shard of a data set: #ROWS at the path's end draws rows")
    split = item.get("split")
    if split is not None and "[" in str(split):
        split, _, part = str(split).partition("[")
        cap = part.strip(":]%")
        path += f"#{cap}" if cap.isdigit() and "%" not in part else ""
    return {
        "path": path,
        "format": format_ if format_ != "auto" else None,
        "columns": columns,
        "subset": item.get("name"),
        "split": split,
    }


def _format(item: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Our format and columns for a data set's type and fields."""
    kind = item.get("type")
    columns: dict[str, str] = {}
    roles = item.get("message_property_mappings") or {}
    messages = item.get("field_messages")
    words = (roles.get("role") or item.get("message_field_role"), messages)
    name = str(kind).partition(".")[0].partition(":")[0] if isinstance(kind, str) else "auto"
    format_ = _AXOLOTL.get(name, "auto")
    if words[0] == "from":
        format_ = "sharegpt"
        if messages not in (None, "conversations"):
            columns["conversations"] = str(messages)
    elif messages not in (None, "messages") and name == "chat_template":
        columns["messages"] = str(messages)
    for ours in ("chosen", "rejected"):
        theirs = item.get(f"field_{ours}")
        if theirs not in (None, ours):
            columns[ours] = str(theirs)
    if item.get("field") not in (None, "text"):
        columns["text"] = str(item["field"])
    if isinstance(kind, Mapping):
        for theirs, ours in (("field_instruction", "instruction"), ("field_output", "output")):
            if kind.get(theirs) not in (None, ours):
                columns[ours] = str(kind[theirs])
    return format_, columns


# ---- OpenRLHF ----


def openrlhf_columns(s: Settings) -> Answer:
    """Their names of columns as data.columns."""
    named = {
        "prompt": s.get("data.input_key", "data.prompt_key"),
        "completion": s.get("data.output_key"),
        "chosen": s.given.get("data.chosen_key"),
        "rejected": s.given.get("data.rejected_key"),
        "answer": s.get("data.label_key"),
    }
    renamed = {ours: theirs for ours, theirs in named.items() if theirs not in (None, ours)}
    return computed({"data.columns": renamed})


def openrlhf_data(s: Settings, value: Any) -> Answer:
    names = str(value).split(",")
    shares = s.get("data.dataset_probs", "data.prompt_probs")
    weights = [float(share) for share in str(shares).split(",")] if shares is not None else []
    return mixed(names, weights if len(names) > 1 else [])
