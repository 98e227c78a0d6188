"""What the files of a model say of its tokens: which ones end a response, and how many rows its
embedding has. A tokenizer carries both along (rlhf/models/turns.py), and a saved model keeps the
first. And what a tokenizer and its template do to rows without their asking.
"""

import hashlib
import inspect
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tokenizers import AddedToken

from conf.schema import ModelConfig, asked_tokens
from rlhf.models.directories import readable
from rlhf.models.turns import (
    EMBEDDING_ROWS,
    LISTED_ENDS,
    end_ids,
    habits,
    processor_of,
    special_ids,
)
from rlhf.models.words import forget
from rlhf.process.files import sha256
from rlhf.process.libraries import first_line
from rlhf.types import UserError

_MEDIA = ("image", "audio", "video", "boi", "eoi", "boa", "eoa")  # of names such as image_token


def model_file(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a model's directory or of a hub's model; {} where there is none."""
    from transformers.utils import cached_file

    with readable(f"model.path={path}: its {name}"):
        found = cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            return {}
        content = json.loads(Path(found).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def has_vision(path: str) -> bool:
    """Whether the model's config.json speaks of a part for pictures."""
    return bool(model_file(path, "config.json").get("vision_config"))


def attach_ends(tokenizer: Any, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Make known to `tokenizer` the end tokens that the model's generation_config.json names, or
    its config.json where the former names none.
    """
    ends = _ids(generation.get("eos_token_id"))
    if not ends:
        # A configuration has an end token by default, which need not be one of this tokenizer's.
        special = special_ids(tokenizer)
        ends = tuple(i for i in _ids(_of_text(config, "eos_token_id")) if i in special)
    vars(tokenizer)[LISTED_ENDS] = ends


def _of_text(config: Mapping[str, Any], name: str) -> Any:
    """A value of config.json, where several modalities have a part of their own that of text."""
    part = config.get("text_config")
    if name not in config and isinstance(part, dict):
        return part.get(name)
    return config.get(name)


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids of an ``eos_token_id``: one, or a list."""
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in values if isinstance(i, int) and not isinstance(i, bool))


def attach_rows(tokenizer: Any, config: Mapping[str, Any], what: str) -> None:
    """Every entry of the tokenizer has a row in the model's embedding, except those for images,
    sounds and videos, which checkpoints for text alone lack: encoding refuses texts that hold them.

    what: the model, for the message. Raises UserError.
    """
    rows = _of_text(config, "vocab_size")
    if not isinstance(rows, int):
        return
    surplus = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not surplus:
        return
    vars(tokenizer)[EMBEDDING_ROWS] = rows
    media = set()
    for name, token in tokenizer.special_tokens_map.items():
        if name.partition("_")[0] in _MEDIA:
            media.add(str(token))
    tokens = [token for _, token in sorted(surplus.items()) if token not in media]
    if tokens:
        raise UserError(
            f"{what}: its tokenizer has {max(surplus) + 1} entries, but its embedding has {rows} "
            f"rows (vocab_size in config.json), so {', '.join(map(repr, tokens[:5]))} can't be "
            "read. Give the model its own tokenizer, or resize it "
            "(model.resize_token_embeddings(len(tokenizer)) of transformers, then save both)."
        )


# ---- tokens that a stage adds ----

_ADDED = "_rlhf_added_tokens"  # on a tokenizer: what `add_tokens` did


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """What ``model.add_tokens`` and ``model.add_special_tokens`` did to a tokenizer."""

    place: str | None  # model.path
    new: dict[str, int]  # ids by token
    known: list[str]  # tokens that were there


def add_tokens(tokenizer: Any, model: ModelConfig) -> None:
    """Give `tokenizer`, that of ``model.path``, the tokens that `model` asks for. Raises UserError
    where it has entries without a row in the embedding.
    """
    if not asked_tokens(model):
        return
    if EMBEDDING_ROWS in vars(tokenizer):
        raise UserError(
            f"model.add_tokens: the tokenizer of model.path={model.path} has tokens for images or "
            "sounds that the model has no rows for, so the rows of new ones would not be theirs. "
            "Leave model.add_tokens and model.add_special_tokens out."
        )
    before = tokenizer.get_vocab()
    asked = asked_tokens(model)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in model.add_tokens])
    special = [AddedToken(token, special=True) for token in model.add_special_tokens]
    tokenizer.add_tokens(special, special_tokens=True)
    after = tokenizer.get_vocab()
    new = {token: after[token] for token in asked if token not in before}
    known = [token for token in asked if token in before]
    vars(tokenizer)[_ADDED] = AddedTokens(model.path, new, known)


def added_tokens(tokenizer: Any) -> AddedTokens | None:
    """What `add_tokens` did; None where no tokens were asked for."""
    found: AddedTokens | None = vars(tokenizer).get(_ADDED)
    return found


def make_rows(model: Any, tokenizer: Any, place: str | None) -> None:
    """Rows of `model`, which was read from `place`, for the tokens that `add_tokens` added. Each is
    the mean of those that are known: the same in every copy of the model, where transformers would
    draw it (mean_resizing). Other rows, those of a model that has trained them too, stay.
    """
    added = added_tokens(tokenizer)
    if added is None or not added.new:
        return
    rows = int(model.get_input_embeddings().weight.shape[0])
    needed = max(added.new.values()) + 1
    # rows that pad the embedding may be there already
    ids = [i for i in added.new.values() if i >= rows or place == added.place]
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    if not ids:
        return
    first = min(added.new.values())
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    for layer in layers:
        if layer is None:
            continue
        for weight in (layer.weight, getattr(layer, "bias", None)):
            if weight is not None:
                known = weight.data[: min(first, rows)]
                weight.data[ids] = known.float().mean(dim=0).to(weight.dtype)


def make_room(model: Any, rows: int | None) -> None:
    """Give the embedding as many rows as an adapter brings that was trained with new tokens."""
    if rows is not None and rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)


def set_ends(model: Any, tokenizer: Any) -> None:
    """Make the model's generation_config name every token that ends a response."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        ends = end_ids(tokenizer)
        settings.eos_token_id = ends[0] if len(ends) == 1 else list(ends)


def make_savable(settings: Any) -> None:
    """transformers reads sampling settings beside ``do_sample=false`` and refuses to write them,
    which would be at the end of a training: then they are taken as meant. Raises ValueError for
    settings that can't be saved either way.
    """
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
    settings.validate(strict=True)


# ---- what is done to rows without their asking ----


class Placed(Protocol):
    """A row's value, and its file and number for messages."""

    @property
    def value(self) -> Any: ...

    @property
    def place(self) -> str: ...


Row = TypeVar("Row", bound=Placed)


class Notices:
    """Counts the rows of one file of which the tokenizer or its template leaves something out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._rows: dict[str, tuple[int, str]] = {}  # how many, and the first one's place

    def look(self, place: str, values: Iterable[Any]) -> None:
        """Look at a row: its texts and conversations."""
        self.count(place, {name for value in values for name in noticed(self._tokenizer, value)})

    def count(self, place: str, names: Iterable[str]) -> None:
        """Count a row in which something `noticed` was found."""
        for name in names:
            count, first = self._rows.get(name, (0, place))
            self._rows[name] = (count + 1, first)

    def lines(self) -> list[str]:
        """A sentence for each kind, with the number of rows and the first one's place."""
        out = []
        for name, (count, first) in sorted(self._rows.items()):
            rows = f"{count} rows (the first: {first})"
            if name == "opening":
                opening = habits(self._tokenizer).turn.opening
                out.append(
                    f"{rows} are conversations, but the chat template has no generation prompt: "
                    f"{opening!r}, with which it begins an assistant's turn, is added to prompts"
                )
            elif name == "bos":
                out.append(
                    f"{rows} begin with {self._tokenizer.bos_token!r}, which the tokenizer or its "
                    "template writes as well: it stands once"
                )
            else:
                out.append(
                    f"{rows} have messages of the role {name!r}, which the chat template never "
                    "reads: the model sees nothing of them. Set data.chat_template to a template "
                    "that reads them, or put their text into the user's message"
                )
        return out


def telling_noticed(
    tokenizer: Any, rows: Iterable[Row], log: logging.Logger, name: str
) -> Iterator[Row]:
    """The `rows`, whose values are texts, conversations, or several of them; after the last one
    warns of what was noticed in them. name: of the rows.
    """
    notices = Notices(tokenizer)
    for row in rows:
        values = row.value if isinstance(row.value, tuple) else (row.value,)
        if isinstance(row.value, dict):
            values = tuple(row.value.values())
        notices.look(row.place, values)
        yield row
    for line in notices.lines():
        log.warning("%s: %s", name, line)


def noticed(tokenizer: Any, value: Any) -> set[str]:
    """What the tokenizer or its template makes of a text or a conversation without its asking:
    "bos" (it would stand twice), "opening" (the generation prompt is ours), and the names of roles
    that are left out.
    """
    found, bos = habits(tokenizer), tokenizer.bos_token
    if isinstance(value, str):
        doubled = bos is not None and tokenizer.bos_token_id in found.prefix
        return {"bos"} if doubled and value.startswith(bos) else set()
    if not isinstance(value, list):
        return set()
    names = set(found.unread & {message.get("role") for message in value})
    if found.doubles_bos:
        names.add("bos")
    if found.turn.opening:
        names.add("opening")
    return names


# ---- what tokens depend on ----


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """What the tokens of a text, and of a conversation, depend on."""
    tokenizer("")  # takes back what an earlier call has set for itself, such as truncation
    forget(tokenizer)  # words of another state
    kind = type(tokenizer)
    code = ""
    if not kind.__module__.startswith("transformers."):
        code = sha256(Path(inspect.getfile(kind)))
    processor = processor_of(tokenizer)
    pictures = {} if processor is None else {"pictures": processor.state()}
    return pictures | {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "code": code,
        "content": _tokenizer_content(tokenizer),
        "template": tokenizer.chat_template,
        # what `rlhf.models.loading` has found in the model's files
        "ends": list(vars(tokenizer).get(LISTED_ENDS, ())),
        "rows": vars(tokenizer).get(EMBEDDING_ROWS),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "splits": getattr(tokenizer, "split_special_tokens", False),
        "cleans": getattr(tokenizer, "clean_up_tokenization_spaces", None),
    }


def save_tokenizer(tokenizer: Any, directory: str | Path) -> None:
    """Write a tokenizer, with a picture model's processor where it has one."""
    tokenizer.save_pretrained(directory)
    processor = processor_of(tokenizer)
    if processor is not None:
        processor.save(tokenizer, directory)


def _tokenizer_content(tokenizer: Any) -> str:
    """A hash of vocabulary, merges, added tokens and rules."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        return hashlib.sha256(core.to_str().encode()).hexdigest()
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


# ---- the model ----


def is_picture_model(config: Any) -> bool:
    """Whether transformers loads the configuration as a model that reads text and pictures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    has_part = getattr(config, "vision_config", None) is not None
    return has_part and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def is_picture_policy(path: str) -> bool:
    """Whether the model at `path` reads pictures and writes texts: it is no classifier."""
    names = model_file(path, "config.json").get("architectures") or [""]
    return has_vision(path) and not str(names[0]).endswith(("ScalarHead", "Classification"))


def language_class(config: Any) -> Any:
    """transformers' class that loads a language model of this configuration: one that reads
    pictures too, where that is what it is.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if is_picture_model(config) else AutoModelForCausalLM


def check_forward(model: Any, role: str) -> None:
    """The model reads a row of four tokens, as `role` ("a reward model"). Raises UserError by the
    family's name where its code can't, or wants more than token ids.
    """
    import torch

    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(4, device=model.device).remainder(vocabulary)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids[None])
    # A family's code may raise anything.
    except Exception as error:
        raise UserError(
            f"model.path: {model.config.model_type} can't be {role} here: four tokens end in "
            f"{type(error).__name__}: {first_line(error)}."
        ) from error
    finally:
        model.train(training)
