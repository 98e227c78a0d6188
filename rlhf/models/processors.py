"""transformers' processors of picture models: loaded with our tokenizer in them, tried on two
pictures, and saved.

A processor writes each picture's tokens in place of one image token of the text, and makes the
tensors that the model's forward takes beside the token ids. Processors of families that read videos
too want a video processor, which transformers has with torchvision alone. Videos are refused here,
so such a processor goes without; what the files say of videos is kept and saved again.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from rlhf.models.directories import readable
from rlhf.models.encoding import IGNORED
from rlhf.models.facts import is_picture_model, model_file
from rlhf.models.templates import keep_processor
from rlhf.models.turns import ids_of
from rlhf.process.files import sha256
from rlhf.types import PICTURE_MARK, Picture, RowError, UserError

_VIDEO = "video_processor"
_NEEDED = {"image_processor", "tokenizer", _VIDEO}
# of what a processor gives, these are made from the text
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_TYPES = ("mm_token_type_ids", "token_type_ids")
_TRIED = ((64, 48), (40, 72))  # width and height of the pictures that a processor is tried on


@dataclass(slots=True)
class Processor:
    """A picture model's processor, and what was found by trying it."""

    inner: Any  # transformers'
    name: str  # of the model, for messages
    image_token: str  # in a text, where a picture stands
    reserved: tuple[str, ...]  # tokens that no text may hold of itself
    feature_ids: tuple[int, ...]  # the token whose embedding a picture's features replace
    types_key: str | None  # of the model's argument that tells picture tokens from text
    videos: dict[str, Any] | None  # what the files say of videos
    # by width and height: what stands for a picture in the text
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    # whether a chat template writes contents that are texts, by template
    writes_texts: dict[str, bool] = field(default_factory=dict)

    def called(self, text: str, images: Sequence[Any], **options: Any) -> Any:
        """What the processor gives for one text with these pictures."""
        return self.inner(text=[text], images=list(images), add_special_tokens=False, **options)

    def state(self) -> dict[str, Any]:
        """What tokens of pictures depend on."""
        written = json.loads(self.inner.to_json_string())
        kind = type(self.inner).__qualname__
        return {"class": kind, "content": written, "code": sha256(Path(__file__))}

    # ---- in the text ----

    def as_parts(self, tokenizer: Any, messages: Sequence[Any]) -> list[Any]:
        """Messages for a picture model's chat template: one with pictures as a list of parts, texts
        and pictures in turn. So are texts under a template that writes nothing of texts. Raises
        RowError.
        """
        return [self._parts(tokenizer, number, one) for number, one in enumerate(messages)]

    def _parts(self, tokenizer: Any, number: int, message: Any) -> Any:
        content, images = message["content"], message.get("images")
        if not images:
            if self._writes_texts(tokenizer):
                return message
            return {**message, "content": [{"type": "text", "text": content}]}
        texts = content.split(PICTURE_MARK)
        if len(texts) != len(images) + 1:
            raise RowError(
                f"message {number}: its text has {len(texts) - 1} places for pictures, but it "
                f"holds {len(images)}"
            )
        parts: list[dict[str, str]] = []
        for place, text in enumerate(texts):
            if place > 0:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        shown = {key: value for key, value in message.items() if key != "images"}
        return {**shown, "content": parts}

    def _writes_texts(self, tokenizer: Any) -> bool:
        """Whether the chat template writes a content that is a text, rather than a list of
        parts.
        """
        template = str(tokenizer.chat_template)
        if template not in self.writes_texts:
            self.writes_texts[template] = _writes(tokenizer)
        return self.writes_texts[template]

    def expanded(self, text: str, pictures: Sequence[Picture]) -> str:
        """A rendered text with each image token replaced by its picture's tokens. Raises RowError
        where it has another number of them.
        """
        pieces = text.split(self.image_token)
        for piece in pieces:
            self.check_text(piece)
        if len(pieces) != len(pictures) + 1:
            raise RowError(
                f"the chat template writes {len(pieces) - 1} image tokens ({self.image_token}) for "
                f"{len(pictures)} pictures. Expected one for each: a text that spells the token "
                "counts as one, and some templates have no place for pictures, or none in some "
                "roles"
            )
        out = [pieces[0]]
        for picture, piece in zip(pictures, pieces[1:], strict=True):
            out += [self.text_of(picture), piece]
        return "".join(out)

    def text_of(self, picture: Picture) -> str:
        """What stands in a text for a picture. Its size alone decides that, so the processor is
        asked with a blank one, once for each size. Raises RowError.
        """
        size = (picture["width"], picture["height"])
        if size not in self.texts:
            try:
                self.texts[size] = _replacement(self, size)
            except ValueError as error:
                name = f"{picture['path']} ({size[0]} x {size[1]} pixels)"
                raise RowError(f"the picture {name}: {error}") from error
        return self.texts[size]

    def check_text(self, text: str) -> None:
        """Raises RowError for a text that spells a token that stands for a picture."""
        for token in self.reserved:
            if token in text:
                raise RowError(
                    f"the text spells {token!r}, which stands for a picture: remove it, or write "
                    "it otherwise"
                )

    def unlabelled(self, ids: Sequence[int], labels: list[int]) -> list[int]:
        """`labels` without those of tokens that stand for pictures."""
        pairs = zip(ids, labels, strict=True)
        return [IGNORED if token in self.feature_ids else label for token, label in pairs]

    def features(self, ids: Sequence[int]) -> int:
        """How many of a row's tokens stand for a part of a picture."""
        return sum(ids.count(token) for token in self.feature_ids)

    # ---- saving ----

    def save(self, tokenizer: Any, directory: str | Path) -> None:
        """Write the processor, with the `tokenizer` that it belongs to."""
        inner = self.inner
        inner.chat_template = tokenizer.chat_template
        inner.save_pretrained(directory)
        if self.videos is not None:
            file = Path(directory) / "processor_config.json"
            written = json.loads(file.read_text(encoding="utf-8"))
            written[_VIDEO] = self.videos
            text = json.dumps(written, indent=2, sort_keys=True)
            file.write_text(text + "\n", encoding="utf-8")


def _writes(tokenizer: Any) -> bool:
    """Whether the template writes the words of contents that are texts."""
    words = ("Zanzibar", "Quito")  # that no template writes by itself
    chat = [
        {"role": "user", "content": words[0]},
        {"role": "assistant", "content": words[1]},
    ]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    # a template is a program, and this one may not be written for texts
    except (TemplateError, LookupError, TypeError, ValueError, AttributeError):
        return False
    return all(word in text for word in words)


def load_processor(
    path: str, tokenizer: Any, *, trust_remote_code: bool = False
) -> Processor | None:
    """The processor of the model at `path` with `tokenizer` in it, where that is a picture model;
    `processor_of` gives it from now on. The processor's chat template, if it has one, becomes the
    tokenizer's. Raises UserError.
    """
    from transformers import AutoConfig

    what = f"model.path={path}: its processor"
    with readable(what):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if not is_picture_model(config):
            return None
        inner = _transformers_processor(
            path, config, tokenizer, trust_remote_code=trust_remote_code
        )
    template = getattr(inner, "chat_template", None)
    if template is not None:
        tokenizer.chat_template = template
    found = _tried(inner, config, tokenizer, path)
    keep_processor(tokenizer, found)
    return found


def _transformers_processor(
    path: str, config: Any, tokenizer: Any, *, trust_remote_code: bool
) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if type(config) not in PROCESSOR_MAPPING:
        inner = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        inner.tokenizer = tokenizer
        return inner
    kind = PROCESSOR_MAPPING[type(config)]
    parts = kind.get_attributes()
    further = sorted(set(parts) - _NEEDED)
    if further:
        raise UserError(
            f"model.path={path}: {kind.__name__} needs {', '.join(further)} too, and only text and "
            "pictures are read here. Expected a model of these alone."
        )
    images = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    written, _ = kind.get_processor_dict(path)
    if _VIDEO in parts:
        kind = _without_videos(kind)
        written = {**written, _VIDEO: None}
    given = {"image_processor": images, "tokenizer": tokenizer}
    return kind.from_args_and_dict([given[name] for name in kind.get_attributes()], written)


def _without_videos(kind: Any) -> Any:
    """The same class of processors without the part that reads videos."""
    parts = [name for name in kind.get_attributes() if name != _VIDEO]

    def get_attributes(cls: Any) -> list[str]:
        return list(parts)

    body = {"get_attributes": classmethod(get_attributes), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


def _videos(path: str) -> dict[str, Any] | None:
    """What a model's files say of videos, in the order in which transformers looks for it."""
    nested = model_file(path, "processor_config.json").get(_VIDEO)
    if isinstance(nested, dict):
        return nested
    return (
        model_file(path, "video_preprocessor_config.json")
        or model_file(path, "preprocessor_config.json")
        or None
    )


# ---- trying ----


def _tried(inner: Any, config: Any, tokenizer: Any, path: str) -> Processor:
    """The processor with what two blank pictures show of it: a text's tokens are those of the text
    with each image token replaced, and nothing else. Raises UserError.
    """
    what = f"model.path={path}: its processor {type(inner).__name__}"
    token = getattr(inner, "image_token", None)
    if not isinstance(token, str):
        raise UserError(
            f"{what} names no image token, so pictures have no place in a text. Expected a model "
            "whose chat template writes one for each picture."
        )
    text = f"See {token} and {token}, well."
    found = Processor(inner, path, token, (), (), None, None)
    with readable(what):
        given = found.called(text, [blank(size) for size in _TRIED], return_tensors="pt")
        ids = given["input_ids"][0].tolist()
        first, second = (_replacement(found, size) for size in _TRIED)
    ours = ids_of(tokenizer, [f"See {first} and {second}, well."])[0]
    if ids != ours:
        raise UserError(
            f"{what} writes more into a text than its pictures' tokens, so prompts can't be told "
            "apart from answers. Expected a family whose processor only replaces image tokens."
        )
    feature = _feature_ids(inner, config)
    found.feature_ids = feature
    held = [token, getattr(inner, "video_token", None), *tokenizer.convert_ids_to_tokens(feature)]
    found.reserved = tuple(dict.fromkeys(one for one in held if isinstance(one, str)))
    found.types_key = _types_key(inner, given)
    if _VIDEO in inspect.signature(type(inner)).parameters:
        found.videos = _videos(path)
    return found


def _feature_ids(inner: Any, config: Any) -> tuple[int, ...]:
    """The token ids that the model gives a picture's features."""
    for holder in (config, inner):
        for name in ("image_token_id", "image_token_index"):
            found = getattr(holder, name, None)
            if isinstance(found, int):
                return (found,)
    return ()


def _types_key(inner: Any, given: Any) -> str | None:
    """The key under which the processor marks the tokens of pictures, where it does."""
    import torch

    marked = torch.isin(given["input_ids"], _marked_ids(inner))
    for key in _TYPES:
        if key in given and torch.equal(given[key].bool(), marked):
            return key
    return None


def _marked_ids(inner: Any) -> Any:
    import torch

    ids = [i for i in getattr(inner, "image_token_ids", ()) if isinstance(i, int)]
    return torch.tensor(ids, dtype=torch.long)


def token_types(processor: Processor, input_ids: Any) -> dict[str, Any]:
    """`input_ids` [B, L] -> 1 at the tokens of pictures and 0 elsewhere, by the name of the model's
    argument; nothing where the model takes none.
    """
    import torch

    if processor.types_key is None:
        return {}
    marked = torch.isin(input_ids, _marked_ids(processor.inner).to(input_ids.device))
    return {processor.types_key: marked.long()}


# ---- the tokens of a picture ----


def blank(size: tuple[int, int]) -> Any:
    """A white picture of a width and height."""
    from PIL import Image

    return Image.new("RGB", size, "white")


def _replacement(processor: Processor, size: tuple[int, int]) -> str:
    """What the processor writes for a picture of a width and height. Raises ValueError."""
    given = processor.called(
        processor.image_token, [blank(size)], return_text_replacement_offsets=True
    )
    return str(given["text_replacement_offsets"][0][0]["replacement"])
