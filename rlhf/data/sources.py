"""The sources that a configuration names: a file, a glob, a data set, a mixture of them
(data.sources), or entries of LLaMA-Factory's registry (data.dataset).
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from conf.data import DataFormat
from conf.schema import DataConfig, SourceConfig
from rlhf.data import llama_factory
from rlhf.data.calls import is_nothing
from rlhf.data.formats import mt_bench
from rlhf.data.mixture import Row, Source, Transform, parts_of
from rlhf.types import UserError

_CAP = re.compile(r"(.+)#(\d+)")


def train_sources(data: DataConfig) -> list[Source]:
    """The sources of data.path, data.sources or data.dataset; empty when none is set. Raises
    UserError for one that doesn't exist.
    """
    if data.sources:
        out = [_named(name, source, data) for name, source in data.sources.items()]
        return _each_once(out, "data.sources")
    if data.dataset is not None:
        assert data.registry is not None
        if data.format is not DataFormat.auto or data.columns:
            option = "data.columns" if data.columns else f"data.format={data.format.value}"
            raise UserError(
                f"{option} and data.dataset={data.dataset}: the registry says both format and "
                f"columns. Leave {option} out."
            )
        registry = Path(data.registry).expanduser()
        entries = llama_factory.sources(registry, data.dataset, _image_dir(data))
        return _each_once(entries, f"data.dataset={data.dataset}")
    if data.path is None:
        return []
    return [_plain(data.path, "data.path", data)]


def _each_once(sources: list[Source], given_by: str) -> list[Source]:
    """The sources. Raises UserError for a file that is in two of them."""
    origins = Counter(part.origin for source in sources for part in source.parts)
    twice = next((origin for origin, times in origins.items() if times > 1), None)
    if twice is not None:
        raise UserError(
            f"{given_by}: {twice} is in more than one of them. Name it once, with the weight that "
            "it shall have."
        )
    return sources


def eval_sources(data: DataConfig) -> list[Source]:
    """The source of data.eval_path; empty when it isn't set. Raises UserError for one that doesn't
    exist.
    """
    if data.eval_path is None:
        return []
    return [_plain(data.eval_path, "data.eval_path", data)]


def sources_of(data: DataConfig, split: str) -> list[Source]:
    """The sources of a split, train or eval. Raises UserError as `train_sources`."""
    if split == "train":
        return train_sources(data)
    return eval_sources(data)


def all_sources(data: DataConfig) -> list[Source]:
    """The sources of both splits. Raises UserError as `train_sources`."""
    return [*train_sources(data), *eval_sources(data)]


def one_source(path: str, key: str) -> Source:
    """The rows of `path`, in whatever format, `key` being the option that names it. Raises
    UserError for a path that doesn't exist.
    """
    return _plain(path, key, DataConfig())


def given(data: DataConfig) -> str | None:
    """The training rows' option with its value, for messages; None when none is set."""
    if data.sources:
        return f"data.sources={{{', '.join(data.sources)}}}"
    if data.dataset is not None:
        return f"data.dataset={data.dataset}"
    if data.path is None:
        return None
    return f"data.path={data.path}"


def data_files(data: DataConfig) -> list[Path]:
    """Every file on this machine that the run reads, once each, for its manifest."""
    parts = [part for source in all_sources(data) for part in source.parts]
    for path in data.join:
        parts += parts_of(path, "data.join")
    return list(dict.fromkeys(file for part in parts for file in part.files))


def _plain(path: str, key: str, data: DataConfig) -> Source:
    only_train = key == "data.path"
    subset, split = (data.subset, data.split) if only_train else (None, None)
    where, cap = split_cap(path, key)
    parts = parts_of(where, key, subset, split)
    transforms = _transforms(data.columns, data.join)
    named = bool(data.columns)
    images = _image_dir(data)
    return Source(
        key, path, parts, data.format, transforms, cap, named_columns=named, image_dir=images
    )


def _named(name: str, source: SourceConfig, data: DataConfig) -> Source:
    key = f"data.sources.{name}.path"
    where, cap = split_cap(source.path, key)
    if cap is not None and source.cap is not None:
        raise UserError(
            f"{key}={source.path}: the cap is given twice, as #{cap} and as "
            f"data.sources.{name}.cap={source.cap}."
        )
    form = source.format if source.format is not DataFormat.auto else data.format
    columns = source.columns or data.columns
    transforms = _transforms(columns, data.join)
    parts = parts_of(where, key, source.subset, source.split)
    cap = source.cap if cap is None else cap
    return Source(
        key,
        name,
        parts,
        form,
        transforms,
        cap,
        source.weight,
        named_columns=bool(columns),
        image_dir=_image_dir(data),
    )


def _image_dir(data: DataConfig) -> Path | None:
    """data.image_dir. Raises UserError where it is no folder."""
    if data.image_dir is None:
        return None
    folder = Path(data.image_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.image_dir={data.image_dir}: no such folder.")
    return folder


def _transforms(columns: dict[str, Any], join: list[str]) -> tuple[Transform, ...]:
    out: list[Transform] = []
    if columns:
        out.append(renamer(columns))
    if join:
        out.append(mt_bench.joiner(tuple(join)))
    return tuple(out)


def split_cap(path: str, key: str) -> tuple[str, int | None]:
    """`path#500` as the path and the most rows to take of it. A path without such an ending, or
    that exists with it, has no cap.
    """
    match = _CAP.fullmatch(path)
    if match is None or Path(path).expanduser().exists():
        return path, None
    if int(match[2]) < 1:
        raise UserError(f"{key}={path}: expected at least one row after '#', found {match[2]}.")
    return match[1], int(match[2])


def renamer(columns: dict[str, Any]) -> Transform:
    """A function that calls a row's column columns[name] `name`. A column that the row lacks stays
    missing. One that had the name before is not read, which is noted.
    """
    names = {source: name for name, source in columns.items()}

    def rename(row: Row, lost: list[str]) -> Row:
        out: Row = {}
        for key, value in row.items():
            source = columns.get(key)
            if key in names:
                out[names[key]] = value
            elif source not in row:
                out[key] = value
            elif not is_nothing(value) and value != row[source]:
                lost.append(
                    f"column {key!r} is not read: data.columns reads {source!r} in its place, and "
                    f"'own_{key}: {key}' added to it carries the column"
                )
        return out

    return rename
